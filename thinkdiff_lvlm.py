"""ThinkDiff-LVLM: a vision-language model thinks, FLUX draws (paper section 3.3).

Training (Eq. 2). The VLM has described pictures in N tokens each and left the features x_1..x_N from which it sampled them
(`prepare_data.py lvlm`). A random prefix x_1..x_s goes through the aligner to a frozen T5 decoder, which must write the text
of the rest, y_{s+1}..y_N. Only the aligner learns.

    python thinkdiff_lvlm.py train --mini --data data/mini-lvlm --out runs/mini-lvlm
    torchrun --nproc_per_node 4 thinkdiff_lvlm.py train --data data/lvlm --out runs/lvlm
    python thinkdiff_lvlm.py train --mini --data data/mini-lvlm --out runs/mini-lvlm --resume

Generation (Eq. 3). The VLM answers a context of interleaved texts and pictures; the features of its answer go through the
aligner and are FLUX's whole prompt.

    python thinkdiff_lvlm.py generate --mini
    python thinkdiff_lvlm.py generate --aligner runs/lvlm/aligner --text "Word 1: white, " --image white_car.png \\
        --text "Word 2: blue, " --image blue_car.png --text "Word 3: red, " --out red_car.png
"""
import argparse
import csv
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

from aligner import NORMS, Aligner, load_aligner
from common import MINI, MODELS, UserError, mini_flag, open_image, pick_device, pretrained, run, torchrun_ranks, write_atomically
from prepare_data import encode_messages, generate_with_features, load_vlm, recompute_features

# ---------------------------------------------------------------- constants (protocol; paper section 4.1 and appendix B)
INSTRUCTION = ("I give you several words and pictures. First, please analyse what the next picture is. Then give me a detailed "
               "diffusion prompt to describe the next picture. Please only provide me the detailed prompt and start the answer "
               "with 'Create an image'.")
MAX_TARGET = 128  # T5 tokens of a target, EOS included
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.05  # AdamW of the released code; no decay on biases and norms
WARMUP_FROM = 1e-6  # learning rate at step 0


# ---------------------------------------------------------------- data: shards of tokens y and features x
class Shards:
    """The samples that `prepare_data.py lvlm` wrote to a folder; `shards[i]` -> x (N, d_vlm) bf16, y (N,) int64.

    Nothing but an index is kept in memory (780 GB at paper scale). With `prepare_data.py --tokens-only` there are no
    features: x is None, and `image(i)`, `prompt(i)` say what to recompute it from."""

    def __init__(self, folder):
        try:
            self.meta = json.loads((Path(folder) / "meta.json").read_text())
        except FileNotFoundError:
            raise UserError(f"no training data in {folder} (meta.json is missing): make it with `python prepare_data.py lvlm --out {folder}`") from None
        self.files, self.index, self.samples = {}, [], []
        for file in sorted(Path(folder).glob("shard-*.safetensors")):
            lines = file.with_suffix(".jsonl").read_text().splitlines()
            self.index += [(file, row) for row in range(len(lines))]
            self.samples += [json.loads(line) for line in lines]
        if not self.index:
            raise UserError(f"{folder} holds no finished shard yet: let `prepare_data.py lvlm` write at least one")
        # the order must not depend on how many ranks prepared the data
        order = sorted(range(len(self.index)), key=lambda i: self.samples[i]["key"])
        self.index, self.samples = [self.index[i] for i in order], [self.samples[i] for i in order]

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        file, row = self.index[i]
        if file not in self.files:
            self.files[file] = safe_open(file, "pt")  # memory-mapped: reads only the rows asked for
        f = self.files[file]
        n = self.samples[i].get("length")  # features of a prompt (--features input) differ in length
        x = f.get_slice("features")[row, :n] if "features" in f.keys() else None
        return x, f.get_slice("tokens")[row].long()


def sample_order(n, seed, start):
    """Endless stream of sample numbers from position `start` on: each epoch a new permutation of range(n). A function of
    its arguments alone, so that neither a resume nor the number of processes changes which samples a step sees."""
    epoch, skip = divmod(start, n)
    while True:
        yield from torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()[skip:]
        epoch, skip = epoch + 1, 0


def split(x, y, masking, position, seed):
    """f_mask of Eq. 2: features of a prefix and the tokens of the rest.

    x (N', d_vlm), y (N,). masking "random": s uniform in [1, N-1] -> x_1..x_s, y_{s+1}..y_N. "none" (Table 3): all features,
    all tokens. position: the sample's place in the training stream, which alone (with the seed) decides s."""
    if masking == "none":
        return x, y
    s = random.Random(f"{seed} {position}").randint(1, len(y) - 1)
    return x[:s], y[s:]


def collate(pairs, vlm_tokenizer, t5_tokenizer, device):
    """[(x (s, d), y (n,))] -> x (B, S, d) right-padded, mask (B, S), labels (B, T) with -100 where padded.

    The target is text: decoded with the VLM's tokenizer, encoded again with T5's."""
    x = torch.nn.utils.rnn.pad_sequence([x for x, _ in pairs], batch_first=True)  # (B, S, d)
    lengths = torch.tensor([len(x) for x, _ in pairs])
    mask = (torch.arange(x.shape[1]) < lengths[:, None]).long()  # (B, S)
    texts = vlm_tokenizer.batch_decode([y for _, y in pairs], skip_special_tokens=True)
    target = t5_tokenizer(texts, padding=True, truncation=True, max_length=MAX_TARGET, return_tensors="pt")
    labels = target.input_ids.masked_fill(target.attention_mask == 0, -100)  # (B, T)
    return x.to(device), mask.to(device), labels.to(device)


# ---------------------------------------------------------------- model: frozen T5 decoder, trainable aligner
def load_t5_decoder(path, device, dtype):
    """T5ForConditionalGeneration without its encoder's blocks (half of the memory): decoder, embedding, lm_head and the
    encoder's final norm, all frozen. The shards' encoder weights are never read into memory."""
    config = pretrained(AutoConfig, path)
    config.num_layers = 0  # of the encoder; num_decoder_layers stays
    t5, info = pretrained(T5ForConditionalGeneration, path, config=config, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"{path} lacks T5 weights: {', '.join(sorted(info['missing_keys'])[:4])}; give a T5 encoder-decoder checkpoint")
    return t5.requires_grad_(False).eval().to(device)


def decode_loss(t5, memory, mask, labels):
    """Sum of the cross-entropies of the target tokens, and their number (section 3.3: L is the mean over tokens).

    memory (B, S, d_t5): x' in the place of T5's encoder output; mask (B, S); labels (B, T), -100 ignored."""
    logits = t5(encoder_outputs=(memory.to(t5.dtype),), attention_mask=mask, decoder_input_ids=t5._shift_right(labels)).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


def learning_rate(step, args):
    """Linear warm-up from 1e-6, then a cosine from --lr to --lr-end over --lr-horizon steps."""
    if step < args.warmup:
        return WARMUP_FROM + (args.lr - WARMUP_FROM) * step / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.lr_horizon - args.warmup))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------- checkpoints: a folder each, complete or not there at all
SETTINGS = ("data", "vlm", "t5", "batch_size", "lr", "lr_end", "lr_horizon", "warmup", "masking", "norm", "seed", "held_out")


def save_checkpoint(out, step, aligner, optimizer, args):
    folder, partial = out / f"checkpoint-{step:07d}", out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    aligner.save_pretrained(partial)
    names = [n for n, _ in aligner.named_parameters()]
    state = optimizer.state_dict()["state"]
    # .clone(): safetensors refuses tensors that share storage, as AdamW's step counters may
    save_file({f"{names[i]}.{k}": v.clone() for i, s in state.items() for k, v in s.items()}, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **{k: vars(args)[k] for k in SETTINGS}}, default=str, indent=1))
    os.replace(partial, folder)
    for old in sorted(out.glob("checkpoint-*"))[:-args.keep]:
        shutil.rmtree(old)


def load_checkpoint(out, aligner, optimizer, args):
    """Restores the last whole checkpoint under `out` and returns its step."""
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        raise UserError(f"nothing to resume in {out}: there is no checkpoint yet; start without --resume")
    state = json.loads((found[-1] / "state.json").read_text())
    now = json.loads(json.dumps({k: vars(args)[k] for k in SETTINGS}, default=str))
    if changed := [f"{k} was {state[k]!r}, is {now[k]!r}" for k in SETTINGS if state.get(k) != now[k]]:
        raise UserError(f"cannot resume {found[-1]} with other settings: {'; '.join(changed)}. Repeat the first command with --resume, or choose another --out")
    aligner.load_state_dict(load_file(found[-1] / "model.safetensors"))
    saved = load_file(found[-1] / "optimizer.safetensors")
    own = optimizer.state_dict()
    own["state"] = {i: {k.removeprefix(f"{n}."): v for k, v in saved.items() if k.startswith(f"{n}.")}
                    for i, (n, _) in enumerate(aligner.named_parameters())}
    optimizer.load_state_dict(own)
    return state["step"]


def write_csv(file, rows):
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def plot_log(file):
    """Draws the loss curves of a log.csv beside it (log scale, as the paper's Fig. 7)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(file) as f:
        rows = list(csv.DictReader(f))
    plt.figure(figsize=(6, 4))
    for name in ("loss", "held_out_loss"):
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        plt.plot(*zip(*points), label=name.replace("_", "-")) if points else None
    plt.yscale("log"), plt.xlabel("step"), plt.ylabel("cross-entropy per token"), plt.legend(), plt.tight_layout()
    plt.savefig(partial := file.with_name(".loss.png"), dpi=120)
    plt.close()
    os.replace(partial, file.with_name("loss.png"))


# ---------------------------------------------------------------- training
def train(args):
    rank, world, local_rank = torchrun_ranks()
    device, dtype = pick_device()
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: choose a multiple of {world}")
    data = Shards(args.data)
    recompute = data.meta["tokens_only"]
    n_held_out = min(args.held_out, len(data) // 10)
    n_train = len(data) - n_held_out  # the last samples in key order are held out
    if n_train < 1 or n_held_out < 1:
        raise UserError(f"{args.data} holds only {len(data)} samples: training needs at least 10, one of them held out")
    if (n_tokens := data.meta["tokens"]) < 2 and args.masking == "random":
        raise UserError(f"the samples of {args.data} have {n_tokens} token: a random split needs at least 2; prepare longer ones or use --masking none")
    out = Path(args.out)
    if rank == 0:
        if not args.resume and any(out.glob("checkpoint-*")):
            raise UserError(f"{out} already holds a training run: add --resume to go on, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    vlm_tokenizer, t5_tokenizer = pretrained(AutoTokenizer, args.vlm), pretrained(AutoTokenizer, args.t5)
    vlm = load_vlm(args.vlm, device, dtype) if recompute else None
    t5 = load_t5_decoder(args.t5, device, dtype)
    torch.manual_seed(args.seed)
    aligner = Aligner(data.meta["d_vlm"], t5.config.d_model, norm=args.norm, eps=t5.config.layer_norm_epsilon)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    aligner.to(device)  # fp32 weights; the products run in bf16 where the hardware has it
    # one group a parameter, in the module's order, so that optimizer states are saved under the parameters' names
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": WEIGHT_DECAY if p.ndim > 1 else 0.0} for p in aligner.parameters()],
                                  lr=args.lr, betas=BETAS)
    step = load_checkpoint(out, aligner, optimizer, args) if args.resume else 0
    model = DistributedDataParallel(aligner, device_ids=[local_rank] if device.type == "cuda" else None) if world > 1 else aligner
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    if rank == 0:
        print(f"trains {sum(p.numel() for p in aligner.parameters()):,} parameters on {n_train:,} samples ({n_held_out:,} held out), "
              f"{world} x {args.batch_size // world} a step, {device.type} {dtype}".replace("torch.", ""))

    def batch(numbers, positions):
        samples = [data[i] for i in numbers]
        if recompute:
            samples = list(zip(recompute_features(*vlm, data, numbers, [y for _, y in samples]), [y for _, y in samples]))
        return collate([split(x, y, args.masking, p, args.seed) for (x, y), p in zip(samples, positions)], vlm_tokenizer, t5_tokenizer, device)

    @torch.no_grad()
    def held_out_loss():
        total = torch.zeros(2)
        for at in range(0, n_held_out, args.micro_batch):
            numbers = range(n_train + at, n_train + min(at + args.micro_batch, n_held_out))
            x, mask, labels = batch(numbers, numbers)  # fixed split points: the same task at every evaluation
            with autocast:
                total += torch.tensor([float(v) for v in decode_loss(t5, aligner(x), mask, labels)])
        return (total[0] / total[1]).item()

    log_file, rows = out / "log.csv", []
    if rank == 0 and args.resume and log_file.exists():
        rows = [r for r in csv.DictReader(log_file.open()) if int(r["step"]) <= step]  # what a killed run logged after its checkpoint
    pipe = load_flux(args.flux, device, dtype) if args.sample_every and rank == 0 else None
    stream = sample_order(n_train, args.seed, step * args.batch_size)
    share = args.batch_size // world
    bar = tqdm(total=args.steps, initial=step, desc="train", disable=rank > 0, unit="step")
    running, since, seen = [], time.time(), 0
    while step < args.steps:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        numbers = [next(stream) for _ in range(args.batch_size)][rank * share:(rank + 1) * share]
        positions = range(step * args.batch_size + rank * share, step * args.batch_size + (rank + 1) * share)
        micro = [batch(numbers[a:a + args.micro_batch], positions[a:a + args.micro_batch]) for a in range(0, share, args.micro_batch)]
        count = sum((labels != -100).sum() for _, _, labels in micro).float()
        if world > 1:
            dist.all_reduce(count)  # the mean is over the tokens of the whole batch, however it is spread
        loss = torch.zeros((), device=device)
        for i, (x, mask, labels) in enumerate(micro):
            if world > 1:
                model.require_backward_grad_sync = i == len(micro) - 1
            with autocast:
                memory = model(x)  # Eq. 1: (B, S, d_t5)
                part = decode_loss(t5, memory, mask, labels)[0] / count
            (part * world).backward()  # DDP averages the gradients over the processes; the loss is already their mean
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + args.batch_size
        running.append(loss)

        if step % args.log_every == 0 or step == args.steps:
            mean = torch.stack(running).mean()
            if world > 1:
                dist.all_reduce(mean)
            if rank == 0:
                evaluate = step % args.eval_every == 0 or step == args.steps
                rate = seen / (time.time() - since)
                rows.append({"step": step, "loss": f"{mean.item():.6f}", "held_out_loss": f"{held_out_loss():.6f}" if evaluate else "",
                             "lr": f"{lr:.3e}", "samples_per_s": f"{rate:.1f}"})
                bar.set_postfix(loss=f"{mean.item():.3f}", lr=f"{lr:.1e}", samples_s=f"{rate:.0f}", refresh=False)
                if evaluate:
                    tqdm.write(f"step {step}: loss {rows[-1]['loss']}, held-out {rows[-1]['held_out_loss']}, lr {lr:.2e}, {rate:.0f} samples/s")
            running, since, seen = [], time.time(), 0
        if rank == 0:
            if pipe and step % args.sample_every == 0:  # the same held-out features each time, to watch them become pictures
                xs = [x for x, _ in (data[n_train + i] for i in range(min(8, n_held_out)))]
                with torch.no_grad():
                    images = [draw(pipe, aligner(x[None].to(device)), [args.seed], args.size, args.sample_steps, 3.5)[0] for x in xs]
                write_atomically(out / f"sample-{step:07d}.png", lambda f: side_by_side(images).save(f, "PNG"))
            if step % args.save_every == 0 or step == args.steps:
                write_atomically(log_file, lambda f: write_csv(f, rows))
                save_checkpoint(out, step, aligner, optimizer, args)
        bar.update()
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        plot_log(log_file)
        shutil.rmtree(out / ".partial", ignore_errors=True)
        aligner.save_pretrained(out / ".partial")
        shutil.rmtree(out / "aligner", ignore_errors=True)
        os.replace(out / ".partial", out / "aligner")
        print(f"aligner: {out / 'aligner'}   log: {log_file}   curve: {out / 'loss.png'}")


# ---------------------------------------------------------------- inference: context -> VLM -> aligner -> FLUX (Eq. 3)
def load_flux(path, device, dtype, t5_encoder=False):
    """FluxPipeline, without its T5 encoder (9.5 GB in bf16 at full size) unless the relay needs it."""
    pipe = pretrained(FluxPipeline, path, torch_dtype=dtype, **({} if t5_encoder else {"text_encoder_2": None, "tokenizer_2": None}))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@torch.no_grad()
def draw(pipe, prompt_embeds, seeds, size, steps, guidance):
    """Pictures from prompt embeddings: prompt_embeds (B, N, d_t5), all of one length since FLUX has no text mask.

    The pooled CLIP embedding is that of the empty prompt: all content comes from prompt_embeds. One seed a picture, so that
    a picture does not depend on the batch it was drawn in. Returns B PIL images of size x size px."""
    ids = pipe.tokenizer("", padding="max_length", max_length=pipe.tokenizer_max_length, return_tensors="pt").input_ids
    pooled = pipe.text_encoder(ids.to(pipe.device)).pooler_output.expand(len(prompt_embeds), -1)  # (B, d_clip)
    return pipe(prompt_embeds=prompt_embeds.to(pipe.transformer.dtype), pooled_prompt_embeds=pooled.to(pipe.transformer.dtype), height=size,
                width=size, num_inference_steps=steps, guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(s) for s in seeds]).images


@torch.no_grad()
def relay_embeds(pipe, texts, max_length):
    """The plain baseline: the VLM's words through FLUX's own T5 encoder, as the stock pipeline does it. (B, max_length, d_t5)"""
    return pipe._get_t5_prompt_embeds(texts, max_sequence_length=max_length)


def context_message(parts, instruction):
    """Chat messages for an interleaved context: parts is a list of ("text", str) and ("image", PIL image)."""
    content = [{"type": "text", "text": instruction}] if instruction else []
    return [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": content + [{"type": kind, kind: value} for kind, value in parts]}]


@torch.no_grad()
def think(vlm, messages, max_new_tokens, temperature=0.0, seed=0, ignore_eos=False):
    """The VLM answers each of `messages`: list of (text, features (n, d_vlm)), n up to and with the end token."""
    model, processor = vlm
    torch.manual_seed(seed)
    tokens, features, lengths = generate_with_features(model, encode_messages(processor, messages), max_new_tokens, ignore_eos=ignore_eos,
                                                       do_sample=temperature > 0, temperature=temperature or 1.0)
    texts = [processor.tokenizer.decode(t[:n], skip_special_tokens=True) for t, n in zip(tokens, lengths)]
    return [(text, x[:n]) for text, x, n in zip(texts, features, lengths)]


def side_by_side(images):
    """PIL images of one size in a row."""
    from PIL import Image
    sheet = Image.new("RGB", (sum(i.width for i in images), images[0].height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i * image.width, 0))
    return sheet
