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
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import LinearCrossEntropyOptions
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

from aligner import NORMS, Aligner, load_aligner
from common import (MINI, MODELS, REPO, UserError, mini_flag, open_image, part_weights, pick_device, plot_log, positive, pretrained, run, send,
                    t5_decoder, torchrun_ranks, write_atomically, write_csv)
from drawing import drawing_flags, drawing_options, equal_lengths, load_pipeline, read_contexts, save_picture, side_by_side, vlm_options
from prepare_data import (Sample, caption_messages, encode_messages, generate_with_features, load_picture, load_vlm, prompt_features,
                          read_shards, teacher_forced_features)

# ---------------------------------------------------------------- constants (protocol; paper section 4.1 and appendix B)
INSTRUCTION = ("I give you several words and pictures. First, please analyse what the next picture is. Then give me a detailed "
               "diffusion prompt to describe the next picture. Please only provide me the detailed prompt and start the answer "
               "with 'Create an image'.")
MAX_TARGET = 128  # T5 tokens of a target, EOS included
BETAS = (0.9, 0.999)  # AdamW of the released code
WARMUP_FROM = 1e-6  # learning rate at step 0


# ---------------------------------------------------------------- data: shards of tokens y and features x
class Shards:
    """The samples that `prepare_data.py lvlm` wrote to a folder: `shards[i]` -> x (N, d_vlm) bf16, y (N,) int64.

    Only an index is kept in memory (780 GB at paper scale). Of `--tokens-only` data x is the question about the picture, of
    which `recompute` makes the features."""

    def __init__(self, folder):
        try:
            self.meta = json.loads((Path(folder) / "meta.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no training data in {folder} (no meta.json there): make it with `python prepare_data.py lvlm --out {folder}`") from None
        self.files, self.rows = {}, []  # rows: (file, row in the file, picture's record)
        for stem, content in read_shards(folder):
            self.rows += [(f"{stem}.safetensors", row, record) for row, record in enumerate(content["samples"])]
        self.rows.sort(key=lambda row: row[2]["index"])  # an order that does not depend on how many processes prepared the data

    def __len__(self):
        return len(self.rows)

    def tensor(self, i, name):
        file, row, _ = self.rows[i]
        if file not in self.files:
            self.files[file] = safe_open(file, "pt")  # memory-mapped: only the row asked for is read
        return self.files[file].get_slice(name)[row]

    def __getitem__(self, i):
        """Raises UserError if the picture of `--tokens-only` data cannot be read. Any number of threads may call it."""
        y = self.tensor(i, "tokens").long()
        if self.meta["tokens_only"]:
            record = self.rows[i][2]
            return caption_messages(load_picture(Sample(*record["sample"]), self.meta["max_side"]), record["prompt"]), y
        x = self.tensor(i, "features")
        if self.meta["features"] == "input":
            x = x[:self.tensor(i, "lengths")]
        return x.clone(), y  # clone: the disk is read now, by the caller's thread, not when the mapped memory is first used


def sample_order(n, seed, start):
    """Endless stream of sample numbers from position `start` on: each epoch a new permutation of range(n). A function of
    its arguments alone, so that neither a resume nor the number of processes changes which samples a step sees."""
    epoch, skip = divmod(start, n)
    while True:
        yield from torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()[skip:]
        epoch, skip = epoch + 1, 0


def split(x, y, args, position):
    """f_mask of Eq. 2: the features of a prefix x_1..x_s and the tokens of the rest y_{s+1}..y_N, s uniform in [1, N-1].

    x (N, d_vlm), y (N,). position: the sample's place in the training stream, which with the seed decides s.
    --masking none (Table 3): all features, all tokens; so too for a prompt's features, which have no token to be masked with."""
    if args.masking == "none" or args.features == "input":
        return x, y
    s = random.Random(f"{args.seed} {position}").randint(1, len(y) - 1)
    return x[:s], y[s:]


def collate(pairs, vlm_tokenizer, t5_tokenizer, device):
    """[(x (s, d), y (n,))] -> x (B, S, d) right-padded, mask (B, S), labels (B, T) with -100 where padded.

    The target is text: decoded with the VLM's tokenizer, encoded again with T5's."""
    xs, ys = zip(*pairs)
    x = torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)  # (B, S, d)
    mask = (torch.arange(x.shape[1]) < torch.tensor([len(x) for x in xs])[:, None]).long()  # (B, S)
    texts = vlm_tokenizer.batch_decode(ys, skip_special_tokens=True)
    target = t5_tokenizer(texts, padding=True, truncation=True, max_length=MAX_TARGET, return_tensors="pt")
    labels = target.input_ids.masked_fill(target.attention_mask == 0, -100)  # (B, T)
    return send((x, mask, labels), device)


# ---------------------------------------------------------------- model: frozen VLM and T5 decoder, trainable aligner
def recompute(vlm, samples, args):
    """{x_i} of `--tokens-only` data: [(question, y (N,), position)] -> the same with features for the question, in the order given.

    Teacher-forced passes of the frozen VLM: x_i is the state from which y_i was sampled."""
    model, processor = vlm
    for at in range(0, len(samples), args.micro_batch):
        questions, ys, positions = zip(*samples[at:at + args.micro_batch])
        inputs = encode_messages(processor, questions).to(model.device)
        x = prompt_features(model, inputs) if args.features == "input" else teacher_forced_features(model, inputs, torch.stack(ys).to(model.device))
        yield from zip((x_i.bfloat16() for x_i in x), ys, positions)


def load_t5_decoder(path, device, dtype):
    """T5ForConditionalGeneration without its encoder's blocks (half of the memory): decoder, embedding, lm_head and the
    encoder's final norm, all frozen. Of a sharded checkpoint only the shards that hold them are fetched and read."""
    config = pretrained(AutoConfig, path)
    config.num_layers = 0  # of the encoder; num_decoder_layers stays
    t5, info = T5ForConditionalGeneration.from_pretrained(None, config=config, state_dict=part_weights(path, t5_decoder, dtype), dtype=dtype,
                                                          output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"{path} lacks T5 weights: {', '.join(sorted(info['missing_keys'])[:4])}; give a T5 encoder-decoder checkpoint")
    return t5.requires_grad_(False).eval().to(device)


def decode_loss(t5, memory, mask, labels):
    """Sum of the cross-entropies of the target tokens, and their number (Eq. 2, 4: L is the mean over tokens).

    memory (B, S, d_t5): stands in the place of T5's encoder output; mask (B, S); labels (B, T), -100 ignored."""
    hidden = t5.decoder(input_ids=t5._shift_right(labels), encoder_hidden_states=memory.to(t5.dtype), encoder_attention_mask=mask,
                        use_cache=False).last_hidden_state  # (B, T, d_t5)
    if t5.config.scale_decoder_outputs:  # T5 1.0, whose lm_head is its embedding; v1.1 and Flan have one of its own scale
        hidden = hidden * t5.model_dim ** -0.5
    # in chunks, so that the logits (B * T, V) are never in memory as a whole; summed here, because its own sum of bf16 losses is in bf16
    losses = F.linear_cross_entropy(hidden.flatten(0, 1), t5.lm_head.weight, labels.flatten(), reduction="none", options=LinearCrossEntropyOptions())
    return losses.float().sum(), (labels != -100).sum()


def learning_rate(step, args):
    """Linear warm-up from 1e-6, then a cosine from --lr to --lr-end over --lr-horizon steps."""
    if step < args.warmup:
        return WARMUP_FROM + (args.lr - WARMUP_FROM) * step / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.lr_horizon - args.warmup))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------- checkpoints: a folder each, complete or not there at all
SETTINGS = ("data", "vlm", "t5", "batch_size", "lr", "lr_end", "lr_horizon", "warmup", "weight_decay",
            "masking", "features", "norm", "hidden", "seed", "held_out")


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
        raise UserError(f"cannot resume {found[-1]} with other settings: {'; '.join(changed)}. Repeat the first command with --resume, or choose "
                        "another --out")
    aligner.load_state_dict(load_file(found[-1] / "model.safetensors"))
    saved = load_file(found[-1] / "optimizer.safetensors")
    own = optimizer.state_dict()
    own["state"] = {i: {k.removeprefix(f"{n}."): v for k, v in saved.items() if k.startswith(f"{n}.")}
                    for i, (n, _) in enumerate(aligner.named_parameters())}
    optimizer.load_state_dict(own)
    return state["step"]


# ---------------------------------------------------------------- training
def train(args):
    rank, world, local_rank = torchrun_ranks()
    device, dtype = pick_device()
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: choose a multiple of {world}")
    out = Path(args.out)
    if rank == 0:
        if not args.resume and (any(out.glob("checkpoint-*")) or (out / "aligner").exists()):
            raise UserError(f"{out} already holds a training run: add --resume to go on, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
    data = Shards(args.data)
    if data.meta["features"] != args.features:
        raise UserError(f"{args.data} holds features of {data.meta['features']} tokens: pass --features {data.meta['features']}, or prepare other data")
    if (n_tokens := data.meta["tokens"]) < 2 and args.masking == "random":
        raise UserError(f"the samples of {args.data} have {n_tokens} token: a random split needs at least 2; prepare longer ones or use --masking none")
    n_held_out = min(args.held_out, len(data) // 10)
    n_train = len(data) - n_held_out  # the last in the data's order are held out
    if n_train < 1 or n_held_out < 1:
        raise UserError(f"--data holds only {len(data)} samples: training needs at least 10, one of them held out")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    vlm_tokenizer, t5_tokenizer = pretrained(AutoTokenizer, args.vlm), pretrained(AutoTokenizer, args.t5)
    vlm = load_vlm(args.vlm, device, dtype) if data.meta["tokens_only"] else None
    t5 = load_t5_decoder(args.t5, device, dtype)
    torch.manual_seed(args.seed)
    aligner = Aligner(data.meta["d_vlm"], t5.config.d_model, norm=args.norm, eps=t5.config.layer_norm_epsilon, hidden=args.hidden)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    aligner.to(device)  # fp32 weights; the products run in bf16 where the hardware has it
    # one group a parameter, in the module's order, so that optimizer states are saved under the parameters' names
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": args.weight_decay if p.ndim > 1 else 0.0} for p in aligner.parameters()],
                                  lr=args.lr, betas=BETAS, fused=device.type == "cuda")
    step = load_checkpoint(out, aligner, optimizer, args) if args.resume else 0
    model = DistributedDataParallel(aligner, device_ids=[local_rank] if device.type == "cuda" else None) if world > 1 else aligner
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    if args.compile:
        t5.decoder.compile(dynamic=True)
    if rank == 0:
        print(f"trains {sum(p.numel() for p in aligner.parameters()):,} parameters on {n_train:,} samples ({n_held_out:,} held out), "
              f"{world} x {args.batch_size // world} a step, {device.type} {dtype}".replace("torch.", ""))

    lost, readers = set(), ThreadPoolExecutor(args.workers)

    def read(numbers, first):
        """Lets threads read these samples, the first of which stands at position `first` of the training stream."""
        return [(i, first + k, readers.submit(data.__getitem__, i)) for k, i in enumerate(numbers)]

    def readable(reading):
        """[(x, y, position)] of what `read` began; a sample that cannot be read is left out, named and counted."""
        samples = []
        for i, position, sample in reading:
            try:
                samples.append((*sample.result(), position))
            except UserError as e:  # a broken picture, or one that has gone since
                lost.add(i)
                tqdm.write(f"skipped ({len(lost)} so far): {e}", file=sys.stderr)
        return list(recompute(vlm, samples, args)) if vlm else samples

    def micro_batches(reading):
        """Yields what the decoder is shown and must write: x (B, S, d_vlm), mask (B, S), labels (B, T)."""
        samples = [split(x, y, args, position) for x, y, position in readable(reading)]
        # samples with targets of like length share a micro-batch, so that little of it is padding; because the loss is a mean over the
        # tokens of the whole step, who shares with whom changes the gradient by no more than a rounding
        samples.sort(key=lambda sample: len(sample[-1]))
        for at in range(0, len(samples), args.micro_batch):
            yield collate(samples[at:at + args.micro_batch], vlm_tokenizer, t5_tokenizer, device)

    @torch.no_grad()
    def held_out_loss():
        total = torch.zeros(2)
        for at in range(n_train, len(data), args.batch_size):
            reading = read(range(at, min(at + args.batch_size, len(data))), at)  # fixed splits: the same task at every evaluation
            for x, mask, labels in micro_batches(reading):
                with autocast:
                    memory = aligner(x)
                total += torch.tensor([float(v) for v in decode_loss(t5, memory, mask, labels)])
        return (total[0] / total[1]).item()

    log_file, rows = out / "log.csv", []
    if rank == 0 and args.resume and log_file.exists():
        rows = [r for r in csv.DictReader(log_file.open()) if int(r["step"]) <= step]  # what a killed run logged after its checkpoint
    pipe = load_flux(args.flux, device, dtype) if args.sample_every and rank == 0 else None
    share = args.batch_size // world
    stream = sample_order(n_train, args.seed, step * args.batch_size)
    read_step = lambda step: read([next(stream) for _ in range(args.batch_size)][rank * share:][:share], step * args.batch_size + rank * share)
    coming = read_step(step)
    bar = tqdm(total=args.steps, initial=step, desc="train", disable=rank > 0, unit="step")
    running, since, seen = [], time.time(), 0
    while step < args.steps:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        reading, coming = coming, read_step(step + 1)  # threads read the next step's samples during this one
        micro = list(micro_batches(reading))
        if not micro:
            raise UserError(f"none of the {share} samples of a step can be read: are the pictures still where they were?")
        count = sum((labels != -100).sum() for *_, labels in micro).float()
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
            if pipe and step % args.sample_every == 0:  # the same held-out samples each time, to watch them become pictures
                with torch.no_grad():
                    images = [draw(pipe, aligner(x[None].to(device)), [""], [args.seed], args.size, args.sample_steps, 3.5)[0]
                              for x, _, _ in readable(read(range(n_train, n_train + min(8, n_held_out)), n_train))]
                if images:
                    write_atomically(out / f"sample-{step:07d}.png", lambda f: side_by_side(images).save(f, "PNG"))
            if step % args.save_every == 0 or step == args.steps:
                write_csv(log_file, rows)
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
def load_flux(path, device, dtype, t5_encoder=False, **options):
    """FluxPipeline, without its T5 encoder (9.5 GB in bf16 at full size) unless a text needs it. options: drawing_options."""
    return load_pipeline("FluxPipeline", path, device, dtype, **options, **({} if t5_encoder else {"text_encoder_2": None, "tokenizer_2": None}))


@torch.no_grad()
def text_embeds(pipe, texts, max_length):
    """LLM_E(T): texts through the pipeline's own T5 encoder, padded as the pipeline pads them. (B, max_length, d_t5)"""
    return pipe._get_t5_prompt_embeds(texts, max_sequence_length=max_length)


@torch.no_grad()
def draw(pipe, prompt_embeds, texts, seeds, size, steps, guidance, true_cfg=1.0):
    """Pictures from prompt embeddings: prompt_embeds (B, N, d_t5), texts: the B texts in them, "" for none.

    The pooled CLIP embedding is that of the text: features speak through prompt_embeds alone. One seed a picture, so that
    a picture does not depend on the batch it was drawn in. true_cfg > 1: classifier-free guidance away from the empty prompt
    (padded to N T5 tokens; the pipeline then needs its T5 encoder). Returns B PIL images of size x size px."""
    prompt_embeds = prompt_embeds.to(pipe.transformer.dtype)
    away = {}
    if true_cfg > 1:
        empty = text_embeds(pipe, [""], prompt_embeds.shape[1]).expand_as(prompt_embeds)  # (B, N, d_t5)
        away = {"true_cfg_scale": true_cfg, "negative_prompt_embeds": empty,
                "negative_pooled_prompt_embeds": pipe._get_clip_prompt_embeds([""] * len(texts))}
    return pipe(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pipe._get_clip_prompt_embeds(texts), height=size, width=size,
                num_inference_steps=steps, guidance_scale=guidance, generator=[torch.Generator().manual_seed(s) for s in seeds], **away).images


def context_message(parts, instruction):
    """Chat messages for an interleaved context: parts is a list of ("text", str) and ("image", PIL image), in reading order."""
    return [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "text", "text": instruction}] + [{"type": kind, kind: value} for kind, value in parts]}]


def read_context(item, folder, args):
    """{"parts", "instruction"} of a context as it is typed or stands in a line of --batch."""
    return {"parts": [(kind, open_image(folder / value) if kind == "image" else str(value)) for part in item["context"] for kind, value in part.items()],
            "instruction": item.get("instruction", args.instruction)}


def generate(args):
    if not (args.batch or args.typed or args.example):
        raise UserError("no context: give --text and --image in reading order, --batch FILE.jsonl, or --mini for the shipped example")
    options = drawing_options(args)
    contexts, skipped = read_contexts(args, {"context": [{kind: value} for kind, value in args.typed or args.example]}, read_context,
                                      '{"context": [{"text": "..."}, {"image": "a.png"}], "out": "b.png"}')
    device, dtype = pick_device()
    aligner = None
    if not args.relay:
        aligner = load_aligner(args.aligner, d_vlm=pretrained(AutoConfig, args.vlm).get_text_config().hidden_size).to(device, dtype)

    vlm = load_vlm(args.vlm, device, dtype, **vlm_options(args.quantize))
    for at in tqdm(range(0, len(contexts), args.batch_size), "think", disable=len(contexts) == 1):
        chunk = contexts[at:at + args.batch_size]
        inputs = encode_messages(vlm[1], [context_message(c["parts"], c["instruction"]) for c in chunk]).to(device)
        tokens, x, lengths = generate_with_features(vlm[0], inputs, args.max_new_tokens, ignore_eos=False, do_sample=args.temperature > 0,
                                                    temperature=args.temperature, top_p=args.top_p, seeds=[c["seed"] for c in chunk])
        x = [x_c[:max(n, 1)] for x_c, n in zip(x, lengths)]  # B x (n, d_vlm): without the state that said EOS, unless it is the only one
        if args.features == "input":
            x = prompt_features(vlm[0], inputs)
        for c, x_c, y, n in zip(chunk, x, tokens, lengths):
            c["x"], c["words"] = x_c, vlm[1].tokenizer.decode(y[:n], skip_special_tokens=True).strip()
            print(f"{c['out']}: {c['words']}")
    del vlm  # 16 GB at full size, before FLUX comes

    pipe = load_flux(args.flux, device, dtype, t5_encoder=args.relay or args.true_cfg > 1, **options)
    if aligner and aligner.d_t5 != (d_t5 := pipe.transformer.config.joint_attention_dim):
        raise UserError(f"aligner {args.aligner} makes prompts of width {aligner.d_t5}, but {args.flux} wants {d_t5}")
    jobs = []  # (prompt (N, d_t5), seed, name, context)
    for c in contexts:
        with torch.no_grad():
            prompt = text_embeds(pipe, [c["words"]], args.t5_length)[0] if args.relay else aligner(c["x"][None])[0]
        jobs += [(prompt, c["seed"] + k, name, c) for k, name in enumerate(c["names"])]
    bar = tqdm(total=len(jobs), desc="draw", unit="picture", disable=len(jobs) == 1)
    for same in equal_lengths(jobs, args.batch_size):
        prompts, seeds, _, _ = zip(*same)
        images = draw(pipe, torch.stack(prompts), [""] * len(same), seeds, args.size, args.steps, args.guidance, args.true_cfg)
        for image, (_, seed, name, c) in zip(images, same):
            save_picture(image, name, {"words": c["words"], "seed": seed, "relay": args.relay, "aligner": str(args.aligner)})
            bar.update()
    bar.close()
    if args.batch:
        print(f"drew {len(jobs)} pictures, skipped {skipped} lines of {args.batch}")
    else:
        print("picture:", *contexts[0]["names"])


# ---------------------------------------------------------------- command line
class Interleave(argparse.Action):
    """--text and --image, kept in the order they were typed."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.typed = namespace.typed + [(self.dest, value)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    example = [("text", "Word 1: white, "), ("image", f"{REPO}/mini/example/white_car.png"), ("text", "\n\nWord 2: blue, "),
               ("image", f"{REPO}/mini/example/blue_car.png"), ("text", "\n\nWord 3: red, ")]

    p = commands.add_parser("train", help="train the aligner on prepared features", **shown)
    p.set_defaults(run=train)
    p.add_argument("--data", default="data/lvlm", help="folder written by `prepare_data.py lvlm`")
    p.add_argument("--out", default="runs/lvlm", help="folder for checkpoints, log.csv, loss.png and the final aligner")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, bit for bit as if never stopped")
    p.add_argument("--vlm", default=MODELS["vlm"], help="the VLM that made the data (its tokenizer; with tokens-only data the model itself)")
    p.add_argument("--t5", default=MODELS["t5"], help="T5 encoder-decoder; only its decoder and final encoder norm are loaded")
    p.add_argument("--steps", type=positive, default=25000, help="optimiser steps")
    p.add_argument("--batch-size", type=positive, default=96, help="samples a step, over all processes")
    p.add_argument("--micro-batch", type=positive, default=24, help="samples a process holds in memory at once")
    p.add_argument("--workers", type=positive, default=8, help="threads a process reads samples with")
    p.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    p.add_argument("--lr-end", type=float, default=8e-5, help="learning rate at the end of the cosine")
    p.add_argument("--lr-horizon", type=positive, default=200000, help="step at which the cosine ends (the released code's)")
    p.add_argument("--warmup", type=int, default=2000, help="steps of linear warm-up from 1e-6")
    p.add_argument("--weight-decay", type=float, default=0.05, help="AdamW's, on matrices")
    p.add_argument("--masking", choices=("random", "none"), default="random", help="random prefix in, rest as target; none: all in, all as target (Table 3)")
    p.add_argument("--features", choices=("generated", "input"), default="generated", help="input: features of the prompt's tokens (Table 3); needs data "
                   "prepared with the same flag")
    p.add_argument("--norm", choices=NORMS, default="t5", help="aligner's RMSNorm: started from T5's, default (1), or none (Fig. 7)")
    p.add_argument("--hidden", type=positive, help="width between the aligner's two layers; not given: T5's, as in the paper")
    p.add_argument("--held-out", type=positive, default=512, help="samples kept for the held-out loss (at most a tenth)")
    p.add_argument("--log-every", type=positive, default=10, help="steps between rows of log.csv")
    p.add_argument("--eval-every", type=positive, default=500, help="steps between held-out losses (a multiple of --log-every)")
    p.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=positive, default=2, help="checkpoints kept")
    p.add_argument("--compile", action="store_true", help="torch.compile the frozen models: faster steps after a wait of minutes at the start; "
                   "the loss changes by a rounding")
    p.add_argument("--sample-every", type=int, default=0, help="steps between pictures that FLUX draws from held-out samples; 0: never")
    p.add_argument("--sample-steps", type=positive, default=28, help="FLUX steps of those pictures")
    p.add_argument("--flux", default=MODELS["flux"], help="only for --sample-every")
    p.add_argument("--size", type=positive, default=512, help="only for --sample-every: px")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, order of samples and splits")
    # a world of 200 words is learned in far fewer steps than English, at a higher rate
    mini_flag(p, vlm=MINI["vlm"], t5=MINI["t5"], flux=MINI["flux"], data="data/mini-lvlm", out="runs/mini-lvlm",
              steps=1500, batch_size=64, micro_batch=64, workers=2, lr=2e-3, lr_end=2e-4, lr_horizon=1500, warmup=50, eval_every=100, save_every=100, size=64)

    p = commands.add_parser("generate", help="draw the picture that a context asks for", **shown)
    p.set_defaults(run=generate, typed=[], example=[])
    p.add_argument("--text", dest="text", action=Interleave, default=argparse.SUPPRESS, help="a piece of the context, in the order typed (repeat)")
    p.add_argument("--image", dest="image", action=Interleave, default=argparse.SUPPRESS, help="a picture of the context, in the order typed (repeat)")
    p.add_argument("--instruction", default=INSTRUCTION, help="what the VLM is told before the context")
    p.add_argument("--batch", metavar="FILE.jsonl", help='contexts, one a line: {"context": [{"text": ".."}, {"image": "a.png"}], "out": "b.png"}, optionally '
                   '"instruction" and "seed"; paths of pictures are relative to the file')
    p.add_argument("--out", type=Path, help="picture to write (with --batch: folder); default: the next free outputs/NNNN.png")
    p.add_argument("--overwrite", action="store_true", help="allow to replace existing pictures")
    p.add_argument("--relay", action="store_true", help="baseline without aligner: the VLM's words through FLUX's own T5 encoder")
    p.add_argument("--vlm", default=MODELS["vlm"], help="Qwen2-VL path or hub name")
    p.add_argument("--aligner", default="runs/lvlm/aligner", help="folder, hub name, or the authors' thinkdiff_lvlm.pth")
    p.add_argument("--features", choices=("generated", "input"), default="generated", help="input: for an aligner trained so (Table 3)")
    p.add_argument("--flux", default=MODELS["flux"], help="FLUX path or hub name")
    p.add_argument("--max-new-tokens", type=positive, default=128, help="longest answer of the VLM")
    p.add_argument("--temperature", type=float, default=0.0, help="of the VLM's sampling; 0: greedy")
    p.add_argument("--top-p", type=float, default=0.9, help="nucleus of the VLM's sampling")
    p.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    p.add_argument("--steps", type=positive, default=28, help="denoising steps")
    p.add_argument("--guidance", type=float, default=3.5, help="FLUX's distilled guidance (the miniature FLUX has none and ignores it)")
    p.add_argument("--true-cfg", type=float, default=1.0, help="classifier-free guidance away from the empty prompt, at twice the cost; 1: none, as "
                   "FLUX.1-dev has its guidance built in")
    p.add_argument("--size", type=positive, default=512, help="px")
    p.add_argument("--num-images", type=positive, default=1, help="pictures a context, with seeds counting up")
    p.add_argument("--batch-size", type=positive, default=1, help="how many contexts, and then pictures, are computed together")
    p.add_argument("--t5-length", type=positive, default=512, help="only for --relay: T5 tokens the words are padded to")
    drawing_flags(p)
    mini_flag(p, vlm=MINI["vlm"], flux=MINI["flux"], aligner=MINI["aligner"], size=64, true_cfg=3.0, batch_size=32, t5_length=48, example=example)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run(main)
