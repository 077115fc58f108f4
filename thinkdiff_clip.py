"""ThinkDiff-CLIP: pictures and words compose one prompt, FLUX draws it, CogVideoX films it (paper section 3.4).

Training (Eq. 4). The vision tower of a CLIP sees a picture; its tokens, pooled to 65, go through the aligner. The first words T1
of the picture's caption go through T5's encoder. A frozen T5 decoder reads both and must write the rest T2 of the caption. Only
the aligner learns.

    python thinkdiff_clip.py train --mini --data data/mini --out runs/mini-clip
    torchrun --nproc_per_node 4 thinkdiff_clip.py train --data '/data/cc3m/{00000..00331}.tar' /data/sbu --out runs/clip
    python thinkdiff_clip.py train --mini --data data/mini --out runs/mini-clip --resume

Generation (Eq. 5). The aligned tokens of any number of pictures, then the text's own T5 embedding, are FLUX's whole prompt.

    python thinkdiff_clip.py generate --mini
    python thinkdiff_clip.py generate --aligner runs/clip/aligner --image cat.jpg --image beach.jpg --text "at night" --out night.png
    python thinkdiff_clip.py generate --aligner runs/clip/aligner --video --image beach.jpg --text "a dog runs" --out dog.mp4
"""
import argparse
import array
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import LinearCrossEntropyOptions
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, Blip2VisionModel, CLIPVisionModel, T5ForConditionalGeneration

from aligner import NORMS, Aligner, load_aligner
from common import (MINI, MODELS, REPO, UserError, mini_flag, open_image, part_weights, pick_device, plot_log, positive, pretrained, run, send,
                    torchrun_ranks, vision_tower, write_atomically, write_csv)
from drawing import drawing_flags, drawing_options, equal_lengths, load_pipeline, read_contexts, save_picture, save_video, side_by_side
from prepare_data import Sample, find_samples, index_tar, load_picture

# ---------------------------------------------------------------- constants (protocol; paper section 4.1 and appendix B)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of RGB in [0, 1]
MAX_SIDE = 512  # longer pictures are shrunk as they are decoded: the tower sees 224 px
MAX_TEXT = 32  # T5 tokens of T1 and of T2, EOS included
BETAS = (0.9, 0.999)  # AdamW of the released code
WARMUP_FROM = 1e-6  # learning rate at step 0


# ---------------------------------------------------------------- data: pictures I and captions T
class Pairs:
    """The pictures with a caption (KEY.jpg or .png, and KEY.txt) in tars and folders: `pairs[i]` -> pixels (3, S, S) float32, T.

    Nothing is prepared: the first start writes where everything lies to `index`, one [picture, caption] a line, and only the
    places of the lines are kept in memory (120 MB for 15 M pairs)."""

    def __init__(self, sources, index, size, resume=False):
        head = json.dumps([os.path.abspath(source) for source in sources]) + "\n"

        def indexed():  # a resumed run keeps its index, whatever has come to the folders since
            return index.exists() and index.open().readline() == head

        if resume and not index.exists():
            raise UserError(f"nothing to resume in {index.parent}: there is no checkpoint yet; start without --resume")
        if resume and not indexed():
            raise UserError(f"cannot resume {index.parent}: it is no run with --data {' '.join(sources)}. Repeat the first command with --resume, "
                            "or choose another --out")
        if torchrun_ranks()[0] == 0 and not indexed():
            write_index(sources, index, head)
        elif torchrun_ranks()[0] == 0 and not resume:
            print(f"takes the pairs from {index}; delete it to look for them again")
        while not indexed():  # the other ranks wait for rank 0; torchrun ends them if it fails
            time.sleep(0.5)
        self.file, self.size = open(index, "rb"), size
        self.starts = array.array("q", itertools.accumulate(map(len, self.file), initial=0))

    def __len__(self):
        return len(self.starts) - 2  # the first line is the head, the last start the end of the file

    def __getitem__(self, i):
        """Raises UserError if the picture cannot be read or the caption is empty. Any number of threads may call it."""
        start, end = self.starts[i + 1:i + 3]
        picture, caption = (Sample(*fields) for fields in json.loads(os.pread(self.file.fileno(), end - start, start)))
        try:
            with open(caption.path, "rb") as file:
                file.seek(caption.offset)
                text = file.read(caption.size).decode("utf-8", "replace").strip()
        except OSError as e:
            raise UserError(f"cannot read {caption.key}: {e.strerror}") from None
        if not text:
            raise UserError(f"the caption {caption.key} is empty")
        return preprocess(load_picture(picture, MAX_SIDE), self.size), text


def write_index(sources, index, head):
    """Finds the pictures and their captions; those without one, and broken tars, are named in skipped.csv beside the index."""
    samples, skipped = find_samples(sources)
    rows, captions, tar = [], {}, None
    for sample in samples.values():
        stem = os.path.splitext(sample.member or sample.path)[0]
        if not sample.member:
            caption = Sample(f"{stem}.txt", size=-1) if os.path.exists(f"{stem}.txt") else None
        else:
            if sample.path != tar:
                captions = {os.path.splitext(text.member)[0]: text for text in index_tar(sample.path, (".txt",))[0]}
                tar = sample.path
            caption = captions.get(stem)
        if caption:
            rows.append(json.dumps([sample, caption]) + "\n")
        else:
            skipped.append((sample.key, f"no caption: {os.path.basename(stem)}.txt is not beside it"))
    if not rows:
        raise UserError(f"none of the {len(samples)} pictures in {' '.join(sources)} has a caption: expected KEY.txt beside KEY.jpg")
    if skipped:
        table = io.StringIO()
        csv.writer(table).writerows([("picture", "reason"), *skipped])
        write_atomically(index.with_name("skipped.csv"), table.getvalue())
        print(f"skipped {len(skipped)} of {len(samples)}: {': '.join(skipped[0])}{', ...' if skipped[1:] else ''} (see {index.with_name('skipped.csv')})",
              file=sys.stderr)
    write_atomically(index, "".join([head, *rows]))


def preprocess(image, size):
    """PIL RGB image -> pixels (3, size, size) float32: resized without cropping, as BLIP-2's own processor does."""
    rgb = np.asarray(image.resize((size, size), Image.BICUBIC), dtype=np.float32) / 255  # (S, S, 3)
    return torch.from_numpy((rgb - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def sample_order(n, seed, start):
    """Endless stream of sample numbers from position `start` on: each epoch a new permutation of range(n). A function of
    its arguments alone, so that neither a resume nor the number of processes changes which samples a step sees."""
    epoch, skip = divmod(start, n)
    while True:
        yield from torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()[skip:]
        epoch, skip = epoch + 1, 0


def split(caption, args, position):
    """T1 and T2 of Eq. 4: the caption's words before and after an inner boundary, uniform over them; of one word, "" and the word.

    position: the sample's place in the training stream, which with the seed decides the boundary.
    --masking none: T1 is empty, all of the caption is the target."""
    words = caption.split()
    if args.masking == "none" or len(words) < 2:
        return "", " ".join(words)
    s = random.Random(f"{args.seed} {position}").randint(1, len(words) - 1)
    return " ".join(words[:s]), " ".join(words[s:])


def collate(triples, t5_tokenizer, device):
    """[(pixels (3, S, S), T1, T2)] -> pixels (B, 3, S, S), ids and mask of T1 (B, L), labels (B, T) with -100 where padded.

    An empty T1 is T5's end token alone."""
    pixels, first, rest = zip(*triples)
    first, target = (t5_tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TEXT, return_tensors="pt") for texts in (first, rest))
    labels = target.input_ids.masked_fill(target.attention_mask == 0, -100)  # (B, T)
    return send((torch.stack(pixels), first.input_ids, first.attention_mask, labels), device)


# ---------------------------------------------------------------- model: frozen CLIP and T5, trainable aligner
def tower_of(path):
    """(class, config) of the vision tower in a BLIP-2 (full size: EVA-CLIP ViT-g/14) or a CLIP, told apart by the config's model_type."""
    config = pretrained(AutoConfig, path)
    towers = {"blip-2": Blip2VisionModel, "clip": CLIPVisionModel}
    if config.model_type not in towers:
        raise UserError(f"{path} is a {config.model_type}, not a BLIP-2 or a CLIP: give a model with one of their vision towers")
    return towers[config.model_type], config.vision_config


def load_clip(path, device, dtype):
    """The frozen vision tower. Of a sharded checkpoint only the shards that hold it are fetched and read.

    Raises UserError if a weight is missing, which transformers would replace by a random one and only warn."""
    tower, config = tower_of(path)
    clip, info = tower.from_pretrained(None, config=config, state_dict=part_weights(path, vision_tower, dtype), key_mapping={r"^vision_model\.": ""},
                                       dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"{path} lacks weights of its vision tower: {', '.join(sorted(info['missing_keys'])[:4])}; download it again")
    return clip.requires_grad_(False).eval().to(device)


@torch.no_grad()
def image_tokens(clip, pixels):
    """{x_i} = CLIP(I), pooled (section 3.4): pixels (B, 3, S, S) -> x (B, 1 + g/2 * g/2, d_vlm), 65 tokens for a grid of g = 16."""
    x = clip(pixels.to(clip.dtype)).last_hidden_state  # (B, 1 + g*g, d_vlm)
    if isinstance(clip, CLIPVisionModel):  # BLIP-2's has been through its post-layernorm already
        x = clip.post_layernorm(x)
    return pool(x)


def pool(x):
    """2D pooling (section 3.4; released code: bilinear, factor 2, align_corners false): x (B, 1 + g*g, d) -> (B, 1 + g/2 * g/2, d).

    The first token, CLS, has no place in the grid and stays as it is."""
    g = math.isqrt(x.shape[1] - 1)
    grid = x[:, 1:].transpose(1, 2).unflatten(2, (g, g))  # (B, d, g, g)
    grid = F.interpolate(grid, scale_factor=0.5, mode="bilinear", align_corners=False)  # (B, d, g/2, g/2)
    return torch.cat([x[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_t5(path, device, dtype):
    """The whole T5ForConditionalGeneration, frozen: here its encoder reads T1."""
    t5, info = pretrained(T5ForConditionalGeneration, path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"{path} lacks T5 weights: {', '.join(sorted(info['missing_keys'])[:4])}; give a T5 encoder-decoder checkpoint")
    return t5.requires_grad_(False).eval().to(device)


@torch.no_grad()
def encode(t5, ids, mask):
    """{t_i} = LLM_E(T1) of Eq. 4: ids, mask (B, L) -> (B, L, d_t5)."""
    return t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


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
            "masking", "norm", "hidden", "seed", "held_out")


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
    data = Pairs(args.data, out / "pairs.jsonl", tower_of(args.vlm)[1].image_size, args.resume)
    n_held_out = min(args.held_out, len(data) // 10)
    n_train = len(data) - n_held_out  # the last in the data's order are held out
    if n_train < 1 or n_held_out < 1:
        raise UserError(f"--data holds only {len(data)} samples: training needs at least 10, one of them held out")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    t5_tokenizer = pretrained(AutoTokenizer, args.t5)
    clip = load_clip(args.vlm, device, dtype)
    t5 = load_t5(args.t5, device, dtype)
    torch.manual_seed(args.seed)
    aligner = Aligner(clip.config.hidden_size, t5.config.d_model, norm=args.norm, eps=t5.config.layer_norm_epsilon, hidden=args.hidden)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    aligner.to(device)  # fp32 weights; the products run in bf16 where the hardware has it
    # one group a parameter, in the module's order, so that optimizer states are saved under the parameters' names
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": args.weight_decay if p.ndim > 1 else 0.0} for p in aligner.parameters()],
                                  lr=args.lr, betas=BETAS, fused=device.type == "cuda")
    step = load_checkpoint(out, aligner, optimizer, args) if args.resume else 0
    model = DistributedDataParallel(aligner, device_ids=[local_rank] if device.type == "cuda" else None) if world > 1 else aligner
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    if args.compile:
        clip.compile()
        t5.decoder.compile(dynamic=True)
    if rank == 0:
        print(f"trains {sum(p.numel() for p in aligner.parameters()):,} parameters on {n_train:,} samples ({n_held_out:,} held out), "
              f"{world} x {args.batch_size // world} a step, {device.type} {dtype}".replace("torch.", ""))

    lost, readers = set(), ThreadPoolExecutor(args.workers)

    def read(numbers, first):
        """Lets threads read these samples, the first of which stands at position `first` of the training stream."""
        return [(i, first + k, readers.submit(data.__getitem__, i)) for k, i in enumerate(numbers)]

    def readable(reading):
        """[(pixels, caption, position)] of what `read` began; a sample that cannot be read is left out, named and counted."""
        samples = []
        for i, position, sample in reading:
            try:
                samples.append((*sample.result(), position))
            except UserError as e:  # a broken picture, or one that has gone since
                lost.add(i)
                tqdm.write(f"skipped ({len(lost)} so far): {e}", file=sys.stderr)
        return samples

    def micro_batches(reading):
        """Yields what the decoder is shown and must write: x (B, 65, d_vlm), t (B, L, d_t5), mask (B, 65 + L), labels (B, T)."""
        samples = [(pixels, *split(caption, args, position)) for pixels, caption, position in readable(reading)]
        # samples with targets of like length share a micro-batch, so that little of it is padding; because the loss is a mean over the
        # tokens of the whole step, who shares with whom changes the gradient by no more than a rounding
        samples.sort(key=lambda sample: len(sample[-1]))
        for at in range(0, len(samples), args.micro_batch):
            pixels, ids, first_mask, labels = collate(samples[at:at + args.micro_batch], t5_tokenizer, device)
            x, t = image_tokens(clip, pixels), encode(t5, ids, first_mask)
            yield x, t, torch.cat([first_mask.new_ones(x.shape[:2]), first_mask], dim=1), labels

    @torch.no_grad()
    def held_out_loss():
        total = torch.zeros(2)
        for at in range(n_train, len(data), args.batch_size):
            reading = read(range(at, min(at + args.batch_size, len(data))), at)  # fixed splits: the same task at every evaluation
            for x, t, mask, labels in micro_batches(reading):
                with autocast:
                    memory = torch.cat([aligner(x), t], dim=1)
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
        for i, (x, t, mask, labels) in enumerate(micro):
            if world > 1:
                model.require_backward_grad_sync = i == len(micro) - 1
            with autocast:
                memory = model(x)  # Eq. 1: (B, 65, d_t5)
            memory = torch.cat([memory, t], dim=1)  # Eq. 4: f_cat(AN(x), t), (B, 65 + L, d_t5)
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
                    images = [draw(pipe, aligner(image_tokens(clip, pixels[None].to(device))), [""], [args.seed], args.size, args.sample_steps, 3.5)[0]
                              for pixels, _, _ in readable(read(range(n_train, n_train + min(8, n_held_out)), n_train))]
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


# ---------------------------------------------------------------- inference: pictures -> CLIP -> aligner, text -> T5 -> FLUX (Eq. 5)
def load_flux(path, device, dtype, t5_encoder=False, **options):
    """FluxPipeline, without its T5 encoder (9.5 GB in bf16 at full size) unless a text needs it. options: drawing_options."""
    return load_pipeline("FluxPipeline", path, device, dtype, **options, **({} if t5_encoder else {"text_encoder_2": None, "tokenizer_2": None}))


def load_cogvideox(path, device, dtype, **options):
    """CogVideoXPipeline with its T5 encoder; it always reads a text (appendix D)."""
    return load_pipeline("CogVideoXPipeline", path, device, dtype, **options)


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


@torch.no_grad()
def film(pipe, prompt_embeds, seeds, size, frames, steps, guidance):
    """Videos from prompt embeddings: prompt_embeds (B, 226, d_t5), the length that CogVideoX was trained with; it has no text mask.

    Guidance leads away from the empty prompt, which the pipeline encodes itself. size None: the model's own (720 x 480).
    Returns B lists of `frames` PIL images."""
    return pipe(prompt_embeds=prompt_embeds.to(pipe.transformer.dtype), max_sequence_length=prompt_embeds.shape[1], height=size, width=size,
                num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(s) for s in seeds]).frames


def compose(pipe, x, weights, text, aligner, args):
    """f_cat(AN(x_1), AN(x_2), ..., LLM_E(T)) of Eq. 5: x, one (n, d_vlm) a picture, and a text -> (N, d_t5), pictures first.

    FLUX: the text, if any, is padded to --t5-length tokens. CogVideoX: always, to what the pictures leave of its 226 (appendix D).
    A picture's weight multiplies its aligned tokens. Raises UserError if CogVideoX has no room for the pictures."""
    with torch.no_grad():
        prompt = [weight * aligner(x_i[None])[0] for x_i, weight in zip(x, weights)]
    length = args.t5_length if text else 0
    if args.decoder == "cogvideox":
        length = pipe.transformer.config.max_text_seq_length - sum(map(len, prompt))
        if length < 1:
            raise UserError(f"{len(x)} pictures are {sum(map(len, prompt))} tokens, but {args.cogvideox} reads "
                            f"{pipe.transformer.config.max_text_seq_length}: give fewer")
    return torch.cat([*prompt, text_embeds(pipe, [text], length)[0]] if length else prompt)


def read_context(item, folder, args):
    """{"images", "weights", "text", "paths"} of a context as it is typed or stands in a line of --batch."""
    paths, weights, text = item.get("image", []), item.get("image_weight") or args.image_weight, str(item.get("text", ""))
    if not (paths or text) or not isinstance(paths, list):
        raise ValueError
    if weights and len(weights) != len(paths):
        raise UserError(f"{len(weights)} image weights for {len(paths)} pictures: give one for each, in the same order, or none")
    return {"images": [open_image(folder / path, max_side=MAX_SIDE) for path in paths], "weights": [float(w) for w in weights] or [1.0] * len(paths),
            "text": text, "paths": [str(path) for path in paths]}


def generate(args):
    if not (args.batch or args.image or args.text or args.example):
        raise UserError("no context: give --image and --text, --batch FILE.jsonl, or --mini for the shipped example")
    options, video = drawing_options(args), args.decoder == "cogvideox"
    if video and not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
        raise UserError("videos need two more packages: pip install imageio==2.38.1 imageio-ffmpeg==0.8.1")
    if video and args.frames % 4 != 1:
        raise UserError(f"--frames {args.frames}: CogVideoX makes 4 k + 1 frames, such as {args.frames // 4 * 4 + 1}")
    contexts, skipped = read_contexts(args, {"image": args.image, "text": args.text} if args.image or args.text else args.example, read_context,
                                      '{"image": ["a.png"], "text": "...", "out": "b.png"}', **({"endings": (".mp4",)} if video else {}))
    device, dtype = pick_device()
    aligner = None
    if any(c["images"] for c in contexts):
        aligner = load_aligner(args.aligner, d_vlm=tower_of(args.vlm)[1].hidden_size).to(device, dtype)
        clip = load_clip(args.vlm, device, dtype)
        for c in tqdm(contexts, "see", disable=len(contexts) == 1):
            pixels = [preprocess(image, clip.config.image_size) for image in c.pop("images")]
            c["x"] = image_tokens(clip, torch.stack(pixels).to(device)) if pixels else []  # (pictures, 65, d_vlm)
        del clip  # 2 GB at full size, before FLUX comes

    if video:
        pipe = load_cogvideox(args.cogvideox, device, dtype, **options)
        d_t5 = pipe.transformer.config.text_embed_dim
    else:
        pipe = load_flux(args.flux, device, dtype, t5_encoder=args.true_cfg > 1 or any(c["text"] for c in contexts), **options)
        d_t5 = pipe.transformer.config.joint_attention_dim
    if aligner and aligner.d_t5 != d_t5:
        raise UserError(f"aligner {args.aligner} makes prompts of width {aligner.d_t5}, but {args.cogvideox if video else args.flux} wants {d_t5}")
    jobs = []  # (prompt (N, d_t5), seed, name, context)
    for c in contexts:
        try:
            prompt = compose(pipe, c.get("x", []), c["weights"], c["text"], aligner, args)
        except UserError as e:
            if not args.batch:
                raise
            skipped += 1
            print(f"skipped {c['out']}: {e}", file=sys.stderr)
            continue
        jobs += [(prompt, c["seed"] + k, name, c) for k, name in enumerate(c["names"])]
    bar = tqdm(total=len(jobs), desc="draw", unit="picture", disable=len(jobs) == 1)
    for same in equal_lengths(jobs, args.batch_size):
        prompts, seeds, _, _ = zip(*same)
        if video:
            images = film(pipe, torch.stack(prompts), seeds, args.size, args.frames, args.steps, args.guidance)
        else:
            texts = [c["text"] for *_, c in same]
            images = draw(pipe, torch.stack(prompts), texts, seeds, args.size, args.steps, args.guidance, args.true_cfg)
        for image, (_, seed, name, c) in zip(images, same):
            if video:
                save_video(image, name, args.fps)
            else:
                save_picture(image, name, {"images": c["paths"], "weights": c["weights"], "text": c["text"], "seed": seed, "aligner": str(args.aligner)})
            bar.update()
    bar.close()
    if args.batch:
        print(f"drew {len(jobs)} pictures, skipped {skipped} lines of {args.batch}")
    else:
        print("picture:", *contexts[0]["names"])


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    example = {"image": [f"{REPO}/mini/example/blue_car.png"], "text": "a hat"}

    p = commands.add_parser("train", help="train the aligner on pictures with captions", **shown)
    p.set_defaults(run=train)
    p.add_argument("--data", nargs="+", default=["data/cc3m", "data/cc12m", "data/sbu"], metavar="SOURCE",
                   help="folders (of KEY.jpg and KEY.txt, or of tars), WebDataset tars, brace patterns of them")
    p.add_argument("--out", default="runs/clip", help="folder for checkpoints, log.csv, loss.png and the final aligner")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, bit for bit as if never stopped")
    p.add_argument("--vlm", default=MODELS["clip"], help="BLIP-2 or CLIP; only its vision tower is loaded")
    p.add_argument("--t5", default=MODELS["t5"], help="T5 encoder-decoder")
    p.add_argument("--steps", type=positive, default=100000, help="optimiser steps")
    p.add_argument("--batch-size", type=positive, default=168, help="samples a step, over all processes")
    p.add_argument("--micro-batch", type=positive, default=42, help="samples a process holds in memory at once")
    p.add_argument("--workers", type=positive, default=8, help="threads a process reads samples with")
    p.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    p.add_argument("--lr-end", type=float, default=8e-5, help="learning rate at the end of the cosine")
    p.add_argument("--lr-horizon", type=positive, default=200000, help="step at which the cosine ends (the released code's)")
    p.add_argument("--warmup", type=int, default=2000, help="steps of linear warm-up from 1e-6")
    p.add_argument("--weight-decay", type=float, default=0.05, help="AdamW's, on matrices")
    p.add_argument("--masking", choices=("random", "none"), default="random", help="random first words in, rest as target; none: no words in, all as target")
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
    p.add_argument("--size", type=positive, default=1024, help="only for --sample-every: px")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, order of samples and splits")
    # a world of 200 words is learned in far fewer steps than English, at a higher rate
    mini_flag(p, vlm=MINI["clip"], t5=MINI["t5"], flux=MINI["flux"], data=["data/mini"], out="runs/mini-clip",
              steps=5000, batch_size=64, micro_batch=64, workers=2, lr=2e-3, lr_end=2e-4, lr_horizon=5000, warmup=50, eval_every=100, save_every=100, size=64,
              hidden=512)  # T5-XXL is three times as wide as ViT-g, but the miniature's T5 a third of its CLIP: too narrow between the layers

    decoder = argparse.ArgumentParser(add_help=False)  # read first: other defaults hang on it
    decoder.add_argument("--decoder", choices=("flux", "cogvideox"), default="flux", help="what draws: FLUX a picture, CogVideoX a video")
    decoder.add_argument("--video", dest="decoder", action="store_const", const="cogvideox", default=argparse.SUPPRESS,
                         help="short for --decoder cogvideox (with --help: show its defaults)")
    p = commands.add_parser("generate", help="draw or film what pictures and a text compose", parents=[decoder], **shown)
    p.set_defaults(run=generate, example={})
    p.add_argument("--image", action="append", default=[], help="a picture of the context (repeat): its tokens come in the order given")
    p.add_argument("--text", default="", help="the text of the context, after the pictures")
    p.add_argument("--image-weight", action="append", type=float, default=[], help="how much a picture counts, one for each --image in the same "
                   "order. 1, and no such flag, is the paper's method. Any other number multiplies that picture's aligned tokens before FLUX reads "
                   "them, for which FLUX was never trained: a smaller one tends to leave more say to the rest of the prompt, nothing is promised, "
                   "and 0 leaves zeros in the picture's place, which is not the same as leaving the picture out")
    p.add_argument("--batch", metavar="FILE.jsonl", help='contexts, one a line: {"image": ["a.png", "b.png"], "text": "..", "out": "c.png"}, optionally '
                   '"image_weight" (a list) and "seed"; paths of pictures are relative to the file')
    p.add_argument("--out", type=Path, help="picture to write (with --batch: folder); default: the next free outputs/NNNN.png, or .mp4")
    p.add_argument("--overwrite", action="store_true", help="allow to replace existing pictures")
    p.add_argument("--vlm", default=MODELS["clip"], help="BLIP-2 or CLIP, path or hub name; only its vision tower is loaded")
    p.add_argument("--aligner", default="runs/clip/aligner", help="folder, hub name, or the authors' thinkdiff_clip.pth")
    p.add_argument("--flux", default=MODELS["flux"], help="FLUX path or hub name")
    p.add_argument("--cogvideox", default=MODELS["cogvideox"], help="CogVideoX path or hub name (--video)")
    p.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    p.add_argument("--steps", type=positive, default=28, help="denoising steps")
    p.add_argument("--guidance", type=float, default=3.5, help="FLUX's distilled guidance (the miniature FLUX has none and ignores it), or CogVideoX's, "
                   "away from the empty prompt")
    p.add_argument("--true-cfg", type=float, default=1.0, help="classifier-free guidance away from the empty prompt, at twice the cost; 1: none, as "
                   "FLUX.1-dev has its guidance built in")
    p.add_argument("--size", type=positive, default=1024, help="px; a video is 720 x 480 without it")
    p.add_argument("--frames", type=positive, default=49, help="of a video: 4 k + 1")
    p.add_argument("--fps", type=positive, default=8, help="frames a second of a video")
    p.add_argument("--num-images", type=positive, default=1, help="pictures a context, with seeds counting up")
    p.add_argument("--batch-size", type=positive, default=1, help="how many contexts, and then pictures, are computed together")
    p.add_argument("--t5-length", type=positive, default=128, help="T5 tokens the text is padded to (FLUX; CogVideoX: what the pictures leave of 226)")
    drawing_flags(p)
    if decoder.parse_known_args()[0].decoder == "cogvideox":
        p.set_defaults(steps=50, guidance=6.0, size=None)  # appendix D
    mini_flag(p, vlm=MINI["clip"], flux=MINI["flux"], aligner=MINI["aligner-clip"], size=64, true_cfg=3.0, batch_size=32, t5_length=48, example=example)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run(main)
