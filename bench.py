"""Speed and memory of every step of ThinkDiff beside the stock version of it, in one run.

Full size on one GPU of 80 GB or more (nothing is downloaded: the true architectures with random
weights), the miniature on the CPU, in a few minutes, and full size without a GPU, simulated:

    python bench.py --size full
    python bench.py --size full --parts train-lvlm --out results/bench-train-lvlm
    python bench.py --size mini
    python bench.py --simulate

Speed is compared with two ceilings that are measured in the same run: the fastest large matrix
product and the fastest copy. The baseline of training is what the authors' release does with stock
transformers: the whole T5 in fp32 under bf16 autocast, eager attention, batches padded to their
longest sample. The rounds alternate between the ways to do a step. Each round builds a way anew,
alone on the device, warms it up and times single steps with the device synchronised. The tables
show the median and the range of all of them. A way that does not fit is a row that says so.

--out gets NAME.json (everything) and NAME.csv (the rows), written anew after each measurement.
"""
import startup

import argparse
import contextlib
import datetime
import gc
import os
import platform
import re
import statistics
import sys
import time
from functools import partial
from typing import Callable, NamedTuple

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import AutoTokenizer

import cobsat_eval
import common
import models
import pipelines
import simulation
import thinkdiff_clip
import thinkdiff_lvlm
import training_data
from common import MINI, UserError, first_line, positive, write_json
from simulation import (
    clip_for,
    decoder_for,
    flux_for,
    t5_for,
    vlm_config,
    vlm_for,
    weight_bytes,
)


# --------------------------------------------------------------------------------- measuring
class Job(NamedTuple):
    """step() does a step. Of one step: samples, tokens, the bytes of weights and caches that must
    be read, the FLOPs of it that are bound to the rate of reading, token by token, and all FLOPs
    (counted; those of padding and recomputation too). 0: not known."""
    step: Callable
    samples: int
    tokens: int = 0
    read: float = 0
    decoding: float = 0
    flops: float = 0


class Way(NamedTuple):
    """One way to do a step: build(micro_batch, args, **options) -> Job. If memory is short, it is
    tried again with half of the micro_batch. baseline: the name of another way. loop: tokens or
    denoising steps, of which --simulate does one and two and draws a line through both."""
    name: str
    build: Callable
    options: dict
    baseline: str | None = None
    micro_batch: int | None = None
    note: str = ""
    loop: int = 0


WARM_UP = 2  # steps of a round that are not timed
CARDS = (24, 48, 80)  # GB as sold, which are GiB; 5 % are left to CUDA and to fragmentation


def timed(step, device):
    """What step() returns, and the seconds until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait()
    start = time.perf_counter()
    result = step()
    wait()
    return result, time.perf_counter() - start


def measure_ceilings(args):
    """The fastest large matrix product in our dtype, the fastest copy (bytes read and written).

    {} for --simulate. Raises UserError for full size without a GPU."""
    if args.fake:
        return {}
    if args.size == "full":
        require_gpu(args.device)

    def seconds(step):
        return statistics.median([timed(step, args.device)[1] for _ in range(23)][3:])

    cuda, matmul = args.device.type == "cuda", 0
    for n in (4096, 8192, 16384) if cuda else (512, 1024):
        a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        matmul = max(matmul, 2 * n**3 / seconds(product) / 1e12)
    # far beyond any cache
    source = torch.ones(2**32 if cuda else 2**27, dtype=torch.uint8, device=args.device)
    copying = seconds(partial(torch.empty_like(source).copy_, source))
    return {"matmul_tflop_s": matmul, "copy_gb_s": 2 * len(source) / copying / 1e9}


def measure_round(way, micro_batch, args):
    """One round of a way, alone on the device.

    Returns its Job, ms of each step, peak GB or None, the last step's result."""
    cuda = args.device.type == "cuda"
    torch.compiler.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    job = way.build(micro_batch, args, **way.options)
    # compiled graphs hide their operations
    with torch.compiler.set_stance("force_eager"), simulation.Meter() as meter:
        job.step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    warm_up, ms = [], []
    while len(warm_up) < WARM_UP and sum(warm_up) <= args.seconds:
        warm_up.append(timed(job.step, args.device)[1])
    while len(ms) < args.repeats and sum(ms) < args.seconds * 1e3:
        result, seconds = timed(job.step, args.device)
        ms.append(seconds * 1e3)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    # without step, which holds the models: they must leave before those of the next way come
    return job._replace(step=None, flops=meter.flops), ms, peak, result


def simulated(way, args):
    """The figures of a way on fake weights."""
    if {"compile", "cache"} & way.options.keys():
        raise UserError("not simulated: depends on the compiler or on the data")

    def figures(n):
        shorter = {**vars(args), "tokens": n, "flux_steps": n} if way.loop else vars(args)
        build = partial(way.build, way.micro_batch, argparse.Namespace(**shorter), **way.options)
        return simulation.simulate(build)

    found = figures(1)
    if way.loop:
        for name, value in figures(2).items():
            found[name] += (way.loop - 1) * (value - found[name])
    return {**found, "fits_gb": smallest_card(found["peak_gb"])}


def measure(part, ways, args, report):
    """Adds a row for each way to the report and prints them: {name: row}.

    args.rounds rounds alternate between the ways. FLUX's images are compared with the baseline's.
    """
    rows = {way.name: {"part": part, "way": way.name, "micro_batch": way.micro_batch,
                       "note": way.note} for way in ways}
    report["rows"] += rows.values()
    times, results, speed = {name: [] for name in rows}, {}, "H100" if args.fake else "ms"
    for way in tqdm(args.rounds * ways, part, unit="way", leave=False):
        row, baseline = rows[way.name], rows.get(way.baseline, {})
        while "failed" not in row:
            try:
                if args.fake:
                    row |= simulated(way, args)
                    break
                job, ms, peak, results[way.name] = measure_round(way, row["micro_batch"], args)
                times[way.name] += ms
                add_figures(row, job, times[way.name], peak, args.ceilings)
                break
            except Exception as error:  # the other ways go on
                add_failure(row, way, error)
                times[way.name].clear()
        if speed in row and speed in baseline:
            row["speedup"] = baseline[speed] / row[speed]
        write_report(report, args)
    for way in ways:
        if " px" in way.name and way.name in results and way.baseline in results:
            note = difference(results[way.name], results[way.baseline])
            if args.size == "full" and "--cache" in way.name:
                note += "; random weights: the real FLUX's gain and change are others"
            rows[way.name]["note"] = note
    print_table(part, rows.values())
    check_bars(part, rows.values(), args, report)


def add_failure(row, way, error):
    """Halves the micro-batch of a row if memory was short; otherwise the row has failed."""
    signs = ("ALLOC_FAILED", "can't allocate memory")
    short = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
    if not short or (row["micro_batch"] or 1) == 1:
        row["failed"] = "out of memory" if short else first_line(error)
        return
    tried = f"does not fit with a micro-batch of {row['micro_batch']}"
    row["note"] = f"{way.note}; {tried}" if way.note else tried
    row["micro_batch"] = (row["micro_batch"] + 1) // 2


def add_figures(row, job, times, peak, ceilings):
    """The figures of a row. times: ms of all steps so far; peak: GB, or None on the CPU."""
    ms = statistics.median(times)
    seconds, matmul = ms / 1e3, ceilings["matmul_tflop_s"] * 1e12
    reading = job.read / ceilings["copy_gb_s"] / 1e9
    floor = (job.flops - job.decoding) / matmul + max(reading, job.decoding / matmul)
    row.update(
        ms=ms, ms_min=min(times), ms_max=max(times), steps=len(times),
        samples_s=job.samples / seconds, tokens_s=job.tokens / seconds,
        tflop=job.flops / 1e12 or None,
        of_matmul=job.flops / seconds / matmul or None, of_copy=reading / seconds or None,
        of_floor=seconds / floor if job.decoding else None)
    if peak:
        row["peak_gb"] = max(peak, row.get("peak_gb", 0))
        row["fits_gb"] = smallest_card(row["peak_gb"])


def smallest_card(peak):
    """GB of the smallest of CARDS for a peak in GB, None if it is too large for all."""
    return min((card for card in CARDS if peak * 1e9 < 0.95 * card * 2**30), default=None)


def difference(images, others):
    """In words, between two lists of images."""
    a, b = (np.stack([np.asarray(image, dtype=np.float64) for image in group])
            for group in (images, others))
    if (a == b).all():
        return "the same picture, bit for bit"
    psnr = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
    return f"differs by {abs(a - b).mean():.2g} of 255 on average, PSNR {psnr:.1f} dB"


# -------------------------------------------------------------------------------- the report
COLUMNS = {
    "way": "", "micro_batch": "micro-batch", "ms": "ms/step", "range": "range",
    "samples_s": "samples/s", "tokens_s": "tokens/s", "weights_gb": "weights GB",
    "peak_gb": "peak GB", "fits_gb": "fits GB", "tflop": "TFLOP",
    **{name: f"ms {name}" for name in simulation.DEVICES},
    "of_matmul": "of matmul", "of_copy": "of copy", "of_floor": "x floor",
    "speedup": "x baseline", "note": ""}


def cell(row, name):
    """The text in a column of the table."""
    value = row.get(name)
    if name == "range" and "ms" in row:
        return f"{row['ms_min']:.4g}-{row['ms_max']:.4g}"
    if name == "note":
        return "; ".join(filter(None, (row.get("failed"), value)))
    if value is None:
        return ""
    if name in ("of_matmul", "of_copy"):
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(part, rows):
    """Prints the rows as a markdown table, without empty columns."""
    columns = [[head, *(cell(row, name) for row in rows)] for name, head in COLUMNS.items()]
    columns = [[text.ljust(max(map(len, column))) for text in column]
               for column in columns if any(column[1:])]
    head, *body = (f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
    rule = "|".join("-" * (len(column[0]) + 2) for column in columns)
    print(f"\n{part}:", head, f"|{rule}|", *body, sep="\n", flush=True)


# part, pattern of the way's name, figure (the largest of all such rows), sign, limit
BARS = [
    ("train-lvlm", "ours.*", "speedup", ">=", 3),
    ("train-lvlm", "ours.*", "of_matmul", ">=", 0.45),
    ("features", "batch .* \\(default\\)", "of_floor", "<=", 1.2),
    ("flux", ".*: ours --.*", "speedup", ">=", 1.5),
    ("memory", "LVLM training, 24 samples at once", "peak_gb", "<=", 20),
]


def check_bars(part, rows, args, report):
    """Notes and prints which bars of the project, for full size on an H200, are met."""
    for of_part, way, figure, sign, limit in BARS if not args.fake else ():
        if of_part != part:
            continue
        values = [row[figure] for row in rows if row.get(figure) and re.fullmatch(way, row["way"])]
        value, bar = max(values, default=None), f"{part}: {way}: {figure} {sign} {limit}"
        met = (value >= limit if sign == ">=" else value <= limit) if values else None
        report["bars"].append({"bar": bar, "value": value, "met": met})
        mark = {True: "PASS", False: "miss", None: "?"}[met]
        print(f"{mark:4}  bar: {bar}; measured: {value}", flush=True)


def write_report(report, args):
    """Writes --out.json and --out.csv."""
    write_json(f"{args.out}.json", report)
    fields = list(dict.fromkeys(name for row in report["rows"] for name in row))
    common.write_csv(f"{args.out}.csv", fields,
                     [[row.get(field) for field in fields] for row in report["rows"]])


# ---------------------------------------------------------------------------- training steps
STOCK = "baseline: stock models, fp32, eager, padded"
WORD = " car"  # a token of the miniature's VLM and one of its T5


def training_job(variant, t5, d_vlm, samples, collate, micro_batch, args, ours):
    """A Job whose step(update=True) -> loss is that of the variant's `train`, or the baseline's."""
    with args.fake or contextlib.nullcontext():
        aligner = variant.new_aligner(t5, d_vlm, args)
    optimizer = variant.new_optimizer(aligner, args)
    groups = training_data.micro_batches(samples, micro_batch)
    if not ours:
        optimizer = torch.optim.AdamW(aligner.parameters())
        starts = range(0, len(samples), micro_batch)
        groups = [samples[start:start + micro_batch] for start in starts]
    is_bf16 = args.dtype == torch.bfloat16
    autocast = partial(torch.autocast, args.device.type, torch.bfloat16)

    def step(update=True):
        with autocast(enabled=is_bf16 and not ours):
            micro_batches = [collate(group) for group in groups]
        n_tokens = sum((labels != -100).sum() for *_, labels in micro_batches)
        loss = torch.zeros((), device=args.device)
        for x, *t1, mask, labels in micro_batches:
            with autocast(enabled=is_bf16):
                memory = torch.cat([aligner(x), *t1], dim=1)  # (B, S, d_t5)
                if not ours:
                    out = t5(encoder_outputs=(memory,), attention_mask=mask, labels=labels)
                    nll = out.loss * (labels != -100).sum()
            if ours:
                nll, _ = variant.t5_nll(t5, memory, mask, labels)
            (nll / n_tokens).backward()
            loss += nll.detach() / n_tokens
        if update:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not ours)
        return loss

    if args.fake:
        # a real run has AdamW's moments from its second step on
        for p in aligner.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not ours)

    # of features and texts, without padding
    tokens = sum(int((labels != -100).sum() + mask.sum())
                 for *_, mask, labels in map(collate, groups))
    # forward and backward read the frozen weights once each
    read = 2 * len(groups) * weight_bytes(t5.decoder, t5.lm_head)
    return Job(step, len(samples), tokens, read)


def lvlm_job(micro_batch, args, batch, ours=True, compile=False, longest=False):
    """Eq. 2, on random features and one word, a token, again and again.

    longest: all samples have the longest prefix and the longest target."""
    t5, d_vlm = t5_for(args, ours, encoder=not ours), vlm_config(args).text_config.hidden_size
    if compile:
        t5.decoder.compile(dynamic=True)
    tokenizers = [AutoTokenizer.from_pretrained(MINI[name]) for name in ("vlm", "t5")]
    y = torch.tensor(tokenizers[0](WORD).input_ids[-1:] * args.tokens)  # (N,)
    samples, g = [], torch.Generator().manual_seed(args.seed)
    for position in range(batch):
        x = torch.randn(args.tokens, d_vlm, generator=g).bfloat16()
        samples.append(
            (x[:-1], y[:-1], y[1:]) if longest else thinkdiff_lvlm.split(x, y, position, args))
    collate = partial(thinkdiff_lvlm.collate, tokenizers=tokenizers, device=args.device)
    return training_job(thinkdiff_lvlm, t5, d_vlm, samples, collate, micro_batch, args, ours)


def clip_job(micro_batch, args, batch, ours=True, compile=False, longest=False, offload=False):
    """Eq. 4, on random images with captions of 6 to 20 words; longest: of the longest T1 and T2."""
    t5, clip = t5_for(args, ours, encoder=True), clip_for(args, ours)
    if offload:
        # as models.load_t5
        t5.encoder.block = accelerate.cpu_offload(t5.encoder.block, args.device)
    if compile:
        clip.compile()
        t5.decoder.compile(dynamic=True)
    size, t5_tokenizer = clip.config.image_size, AutoTokenizer.from_pretrained(MINI["t5"])
    samples, rng = [], np.random.default_rng(args.seed)
    for position in range(batch):
        image = Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8))
        texts = [WORD * (thinkdiff_clip.MAX_TEXT - 1)] * 2
        if not longest:
            texts = thinkdiff_clip.split(WORD * rng.integers(6, 21), position, args)
        samples.append((thinkdiff_clip.preprocess(image, size), *texts))
    collate = partial(thinkdiff_clip.collate, t5_tokenizer=t5_tokenizer, clip=clip, t5=t5)
    d_clip = clip.config.hidden_size
    return training_job(thinkdiff_clip, t5, d_clip, samples, collate, micro_batch, args, ours)


def training_ways(job, batch, micro_batch, args):
    """The baseline and ours. batch, micro_batch: the defaults of `train`."""
    batch = args.batch_size or batch
    n, whole, stock = min(micro_batch, batch), {"batch": batch}, {"ours": False}
    if args.fake:
        longest, step = f"{STOCK}, {n} longest samples", f"a step of {batch}"
        return [Way(longest, job, {**stock, "batch": n, "longest": True}, micro_batch=n),
                *(Way(f"ours, {m} longest samples", job, {"batch": m, "longest": True},
                      longest if m == n else None, m) for m in (4, 8, n, batch)),
                *(Way(f"ours, {m} longest samples, --offload", job,
                      {"batch": m, "longest": True, "offload": True}, longest if m == n else None,
                      m) for m in (8, n) if job is clip_job),
                Way(f"{STOCK}, {step}", job, {**stock, **whole}, micro_batch=n),
                Way(f"ours, {step}", job, whole, f"{STOCK}, {step}", n)]
    ways = [Way(STOCK, job, {**stock, **whole}, micro_batch=batch),
            Way("ours", job, whole, STOCK, n),
            Way(f"ours, micro-batch {batch}", job, whole, STOCK, batch)]
    if not args.no_compile:
        ways.append(Way("ours --compile", job, {**whole, "compile": True}, STOCK, n))
    return ways


# ---------------------------------------------------------------------------------- features
N_WORDS = 900  # ids below the special tokens of either size


def vlm_inputs(args, batch):
    """What the processor makes of `batch` questions about an image: random pixels, and random
    words around the true placeholders."""
    config = vlm_config(args)
    v = config.vision_config
    grid = args.picture // v.patch_size
    placeholders = [config.image_token_id] * (grid // v.spatial_merge_size) ** 2
    image = [config.vision_start_token_id, *placeholders, config.vision_end_token_id]
    image = torch.tensor([image] * batch)
    before, after = torch.randint(N_WORDS, (batch, 25)).split((15, 10), dim=1)
    ids = torch.cat([before, image, after], dim=1)  # (B, P)
    size = batch * grid**2, v.in_channels * v.temporal_patch_size * v.patch_size**2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == config.image_token_id).long(),
              "pixel_values": torch.randn(size, dtype=args.dtype),
              "image_grid_thw": torch.tensor([[1, grid, grid]] * batch)}
    return {name: tensor.to(args.device) for name, tensor in inputs.items()}


def stock_features(model, inputs, tokens, **sampling):
    """The stock way: generate keeps the states of all layers. -> y (B, N), x (B, N, d_vlm)."""
    out = model.generate(**inputs, max_new_tokens=tokens, eos_token_id=None,
                         output_hidden_states=True, return_dict_in_generate=True, **sampling)
    x = torch.stack([states[-1][:, -1] for states in out.hidden_states], dim=1)
    return out.sequences[:, -tokens:], x


def features_job(_, args, how, batch, quantize=False):
    """`batch` images described in --tokens tokens, with features.

    The floor: all passes of many tokens at the matmul ceiling, then each token at the copy
    ceiling, as it reads all weights and the keys and values of all tokens before it (or at the
    matmul ceiling, if the batch is so large)."""
    model, config, inputs = vlm_for(args, quantize), vlm_config(args), vlm_inputs(args, batch)
    c, prompt = config.text_config, inputs["input_ids"].shape[1]
    known = torch.randint(N_WORDS, (batch, args.tokens)).to(args.device)
    generate = partial(thinkdiff_lvlm.generate_with_features, model, inputs, args.tokens,
                       seeds=range(batch))
    stock = partial(stock_features, model, inputs, args.tokens, do_sample=True, temperature=0.6,
                    top_p=0.9, top_k=0)

    def two_passes():
        return models.teacher_forced_features(model, inputs, generate()[0])

    decoder = torch.nn.ModuleList([model.model.language_model.layers, model.lm_head])
    weights, n_weights = weight_bytes(decoder), sum(p.numel() for p in decoder.parameters())
    kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    # bytes of a position
    cached = batch * 2 * c.num_hidden_layers * kv * args.dtype.itemsize
    # read and computed after the first pass
    read = sum(weights + cached * (prompt + i) for i in range(1, args.tokens))
    decoding = 2 * batch * (args.tokens - 1) * n_weights
    step, read, decoding = {
        "stock": (stock, read, decoding), "hook": (generate, read, decoding),
        "two passes": (two_passes, read + weights, decoding),
        "forced": (partial(models.teacher_forced_features, model, inputs, known), 0, 0)}[how]
    return Job(step, batch, batch * args.tokens, read + weights, decoding)


def recomputing_job(micro_batch, args, batch):
    """A training step from --tokens-only data: teacher-forced passes of the VLM come first."""
    job, model = lvlm_job(micro_batch, args, batch), vlm_for(args)
    inputs = vlm_inputs(args, micro_batch)
    known = torch.randint(N_WORDS, (micro_batch, args.tokens)).to(args.device)

    def step():
        for _ in range(0, batch, micro_batch):
            models.teacher_forced_features(model, inputs, known).bfloat16()
        return job.step()

    return job._replace(step=step)


def feature_ways(args):
    """Describing images, and a training step that recomputes their features."""
    ways, batch = [], args.batch_size or 96
    for n in args.feature_batches:
        job, stock = partial(features_job, batch=n), f"batch {n}: stock generate, all states"
        ways += [Way(stock, job, {"how": "stock"}, loop=args.tokens),
                 Way(f"batch {n}: generate with a hook (default)", job, {"how": "hook"}, stock,
                     loop=args.tokens),
                 Way(f"batch {n}: generate, then a teacher-forced pass", job,
                     {"how": "two passes"}, stock, loop=args.tokens),
                 Way(f"batch {n}: teacher-forced pass alone", job, {"how": "forced"},
                     note="the tokens are known (--backend vllm)")]
    if args.fake:
        ways = [way for way in ways if "teacher" not in way.name]
    read, n, whole = "training step, features read", min(24, batch), {"batch": batch}
    return [*ways, Way(read, lvlm_job, whole, micro_batch=n),
            Way("training step, features recomputed (--tokens-only)", recomputing_job, whole, read,
                n)]


# -------------------------------------------------------------------------------------- FLUX
SPEED = {"--compile": {"compile": True}, "--cache 0.1": {"cache": 0.1},
         "--compile --cache 0.1": {"compile": True, "cache": 0.1}}
MEMORY = {"--offload": {"offload": True}, "--quantize": {"quantize": True},
          "--quantize --offload": {"quantize": True, "offload": True}}


def flux_job(_, args, px, batch, stock=False, t5_encoder=False, **options):
    """Images from random prompt_embeds of 128 tokens."""
    pipe, seeds = flux_for(args, t5_encoder=stock or t5_encoder, **options), range(batch)
    size, g = (batch, 128, pipe.transformer.config.joint_attention_dim), torch.Generator()
    prompt = torch.randn(size, generator=g.manual_seed(args.seed)).to(args.device, args.dtype)

    @torch.no_grad()
    def stock_step():
        ids = pipe.tokenizer([""] * batch, padding="max_length", return_tensors="pt").input_ids
        pooled = pipe.text_encoder(ids.to(args.device)).pooler_output
        return pipe(prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=px, width=px,
                    guidance_scale=3.5, num_inference_steps=args.flux_steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images

    ours = partial(pipelines.generate_images, pipe, prompt, [""] * batch, seeds, px,
                   args.flux_steps, guidance=3.5)
    # tokens of an image
    image = (px // pipe.vae_scale_factor // 2) ** 2
    return Job(stock_step if stock else ours, batch, batch * args.flux_steps * image,
               args.flux_steps * weight_bytes(pipe.transformer))


def flux_ways(args):
    """Drawing images, stock and ours, with the flags for speed."""
    ways, fewest = [], min(args.flux_batches)
    for px in args.flux_sizes:
        for n in args.flux_batches:
            name, job = f"{px} px, batch {n}: ", partial(flux_job, px=px, batch=n)
            stock = f"{name}stock FluxPipeline"
            ways += [Way(stock, job, {"stock": True}), Way(f"{name}ours", job, {}, stock)]
            ways += [Way(f"{name}ours {flag}", job, options, stock)
                     for flag, options in SPEED.items()
                     if n == fewest and not (args.no_compile and "compile" in options)]
    return [way._replace(loop=args.flux_steps) for way in ways]


def memory_ways(args):
    """Peaks, weights included; `x baseline` is the speed against the same without the flag."""
    training, vlm = "LVLM training, 24 samples at once", "VLM, a picture described"
    stock, describe = f"{training}: {STOCK}", partial(features_job, how="hook", batch=1)
    ways = [Way(training, lvlm_job, {"batch": 24}, stock, 24),
            Way(stock, lvlm_job, {"batch": 24, "ours": False}, micro_batch=24),
            Way(vlm, describe, {}, loop=args.tokens),
            Way(f"{vlm} --quantize", describe, {"quantize": True}, vlm, loop=args.tokens)]
    for px in args.flux_sizes if args.fake else args.flux_sizes[:1]:
        plain, draw = f"FLUX, {px} px", partial(flux_job, px=px, batch=1)
        flags = {", with its T5 (--relay)": {"t5_encoder": True},
                 **{f" {flag}": options for flag, options in MEMORY.items()}}
        ways += [Way(plain, draw, {}, loop=args.flux_steps),
                 *(Way(f"{plain}{flag}", draw, options, plain, loop=args.flux_steps)
                   for flag, options in flags.items())]
    if args.fake:
        for name, defaults in pipelines.DEFAULTS.items():
            shown = ", 49 frames" if name in pipelines.VIDEOS else f", {defaults['size']} px"
            ways += [Way(f"{name}{shown} {flag}", partial(decoder_job, name=name), options,
                         loop=defaults["steps"])
                     for flag, options in {"": {}, **MEMORY}.items()]
        ways.append(Way("CoBSAT's judge, 8 pictures", judge_job, {"batch": 8},
                        loop=cobsat_eval.JUDGE_TOKENS))
    return ways


def decoder_job(_, args, name, **options):
    """An image by another decoder than FLUX from 128 prompt tokens, or a video of 49 frames."""
    pipe, defaults = decoder_for(name, args, **options), pipelines.DEFAULTS[name]
    length = 226 if name == "cogvideox" else 128
    prompt = torch.randn(1, length, simulation.T5_XXL["d_model"], dtype=args.dtype)
    video = {"num_frames": 49} if name in pipelines.VIDEOS else {}
    draw = partial(pipelines.generate_images, pipe, prompt, [""], [0], defaults["size"],
                   args.flux_steps, defaults["guidance"], **video)
    return Job(draw, samples=1)


def judge_job(_, args, batch):
    """A question of CoBSAT's judge about `batch` pictures, in some 100 tokens of text."""
    model = simulation.judge_for(args)
    v = model.config.vision_config
    ids = torch.full((batch, (v.image_size // v.patch_size) ** 2), model.config.image_token_id)
    ids = torch.cat([ids, torch.ones(batch, 100, dtype=ids.dtype)], dim=1)  # (B, P)
    pixels = torch.randn(batch, 3, v.image_size, v.image_size, dtype=args.dtype)
    answer = torch.no_grad()(partial(
        model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
        max_new_tokens=args.tokens, do_sample=False, eos_token_id=None))
    return Job(answer, batch)


# ------------------------------------------------------------------------------ command line
PARTS = {"train-lvlm": partial(training_ways, lvlm_job, 96, 24),
         "train-clip": partial(training_ways, clip_job, 168, 42),
         "features": feature_ways, "flux": flux_ways, "memory": memory_ways}
# flag, type, full size, miniature, meaning
FLAGS = [
    ("--batch-size", positive, None, None, "samples of a training step; None: the paper's"),
    ("--tokens", positive, 64, 64, "tokens in which an image is described"),
    ("--picture", positive, 504, 64, "px of an image that is described; 504 is 324 tokens"),
    ("--feature-batches", positive, [32, 128], [8, 32], "images described at once"),
    ("--flux-sizes", common.image_size, [512, 1024], [64, 128], "px of an image that is drawn"),
    ("--flux-batches", positive, [1, 2, 4, 8], [1, 4], "images drawn at once"),
    ("--flux-steps", positive, 28, 28, "denoising steps of an image"),
    ("--no-compile", bool, False, False, "leave out the ways with --compile, which take minutes"),
    ("--rounds", positive, 2, 2, "times that each way is built and measured"),
    ("--repeats", positive, 5, 5, "timed steps of a round"),
    ("--seconds", common.number(float, 0), 30, 5,
     "after which a round of a way begins no further step"),
    common.DTYPE_FLAG,
    ("--seed", common.seed, 0, 0, "of samples and splits"),
    ("--out", str, "results/bench-full", "results/bench-mini", "where to write, without ending"),
]


def require_gpu(device):
    """Raises UserError without a GPU: full size would take all of the main memory."""
    if device.type != "cuda":
        raise UserError("--size full needs a GPU, and there is none here: use --simulate, which "
                        "takes neither a GPU nor much memory, or --size mini")


def main():
    # --size and --simulate decide the other defaults
    given = " ".join(sys.argv).replace("=", " ")
    is_full = "--size full" in given or "--simulate" in given
    p = common.Parser(description=__doc__)
    p.add_argument("--size", choices=("mini", "full"), default="mini",
                   help="the miniature's models, or the true architectures (default: mini)")
    p.add_argument("--simulate", action="store_true",
                   help="peak memory, FLOPs and the least time of full size, without a GPU")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                   help="what to measure (default: all)")
    for flag, kind, full, mini, text in FLAGS:
        default = full if is_full else mini
        common.add_flag(p, flag, kind, default, default, text)
    # of `train`
    p.set_defaults(masking="random", features="generated", norm="t5", hidden=None,
                   weight_decay=0.05, captions="raw")
    if "--simulate" in given:
        p.set_defaults(feature_batches=[1, 8, 32], flux_batches=[1], dtype="bfloat16",
                       out="results/bench-simulated")
    args = p.parse_args()
    args.device, args.dtype = common.pick_device(args.dtype)
    args.fake = None
    if args.simulate:
        args.device, args.size, args.rounds = torch.device("cpu"), "full", 1
        args.fake = FakeTensorMode(allow_non_fake_inputs=True)
    libraries = (torch, transformers, diffusers)
    for library in libraries[1:]:
        library.utils.logging.disable_progress_bar()
    device = (f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, load "
              f"{os.getloadavg()[0]:.1f}")
    if args.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        device = f"{torch.cuda.get_device_name()}, {total:.0f} GB"
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"command": " ".join(sys.argv), "date": date, "size": args.size, "device": device,
             "dtype": str(args.dtype), "seed": args.seed,
             **{library.__name__: library.__version__ for library in libraries}}
    args.ceilings = measure_ceilings(args)
    report = {"about": about, "ceilings": args.ceilings, "rows": [], "bars": []}
    for name, value in {**about, **args.ceilings}.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name}: {text}", flush=True)
    for part in args.parts:
        try:
            measure(part, PARTS[part](args), args, report)
        except Exception as error:  # the other parts go on
            report["rows"].append({"part": part, "way": "(the part itself)",
                                   "failed": first_line(error), "note": ""})
            print(f"{part}: {first_line(error)}", file=sys.stderr)
        write_report(report, args)
    print(f"\nwritten: {args.out}.json, {args.out}.csv")


if __name__ == "__main__":
    common.cli_main(main)
