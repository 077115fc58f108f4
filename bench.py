"""Speed and memory of every step of ThinkDiff beside the stock version of it, in one run.

Full size on one GPU of 80 GB or more (nothing is downloaded: the true architectures with random
weights), then the miniature on the CPU, in a few minutes:

    python bench.py --size full
    python bench.py --size full --parts train-lvlm --out results/bench-train-lvlm
    python bench.py --size mini

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
import copy
import datetime
import gc
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Callable, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.initialization import no_init_weights

import common
import models
import pipelines
import prepare_data
import thinkdiff_clip
import thinkdiff_lvlm
import training_data
from common import MINI, first_line, positive, write_atomically, write_json

# ------------------------------- full size: the numbers of each model's config.json on the hub
# google/flan-t5-xxl and t5-v1_1-xxl
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_decoder_layers=24,
    num_heads=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    decoder_start_token_id=0)
# Qwen/Qwen2-VL-7B-Instruct; the vision tower's are the defaults of transformers
QWEN2_VL_7B = dict(vision_config=dict(), text_config=dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])))
# the vision tower of Salesforce/blip2-flan-t5-xxl: the defaults of transformers
EVA_CLIP_G = dict()
# black-forest-labs/FLUX.1-dev; the transformer's other numbers are the defaults of diffusers
FLUX_DEV = dict(joint_attention_dim=4096, guidance_embeds=True)
FLUX_VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16,
    scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
FLUX_CLIP = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    eos_token_id=2)
FLUX_SCHEDULER = dict(base_shift=0.5, max_shift=1.15, shift=3.0, use_dynamic_shifting=True)


# ------------------------------ models: the miniature's, or at full size with random weights
@torch.no_grad()
def random_model(kind, config, device, dtype, attention=None):
    """A frozen model of class `kind` on the device, with random weights.

    They depend on their names alone: ours and the baseline have the same ones. Matrices have a
    standard deviation of fan_in ** -0.5, so that no layer blows up; norms are 1, biases 0."""
    is_transformer = issubclass(kind, transformers.PreTrainedModel)
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            if is_transformer:
                model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
            else:
                model = kind(**config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    if is_transformer:
        model.tie_weights()
    # transformers ties the lm_head of a new T5, the checkpoints have one of its own
    if kind is T5ForConditionalGeneration:
        lm_head = torch.empty_like(model.shared.weight)
        model.lm_head.weight = torch.nn.Parameter(lm_head, requires_grad=False)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0 if name.endswith("bias") else 1)
        elif device.type != "meta":
            g = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            # T5's weights of q include the 1 / sqrt(64) of its attention
            scale = weight[0].numel() ** -0.5 / (8 if name.endswith(".q.weight") else 1)
            weight.copy_(torch.randn(weight.shape, generator=g, device=device) * scale)
    return model


def model_for(args, ours, load, path, kind, config):
    """load(path) or a random model; ours: args.dtype, sdpa; the baseline's: fp32, eager."""
    dtype, attention = (args.dtype, "sdpa") if ours else (torch.float32, "eager")
    if args.size == "full":
        return random_model(kind, config, args.device, dtype, attention)
    model = load(path, args.device, dtype)
    model.set_attn_implementation(attention)
    return model


def t5_for(args, ours=True, encoder=False):
    """T5, with or without its encoder's blocks."""
    load = models.load_t5 if encoder else models.load_t5_decoder
    config = T5Config(**T5_XXL if encoder else {**T5_XXL, "num_layers": 0})
    return model_for(args, ours, load, MINI["t5"], T5ForConditionalGeneration, config)


def clip_for(args, ours=True):
    """The vision tower of ThinkDiff-CLIP."""
    config = transformers.Blip2VisionConfig(**EVA_CLIP_G)
    kind = transformers.Blip2VisionModel
    return model_for(args, ours, models.load_clip, MINI["clip"], kind, config)


def vlm_config(args):
    """The config of the VLM, a Qwen2-VL."""
    if args.size == "mini":
        return common.pretrained(transformers.Qwen2VLConfig, MINI["vlm"])
    # a copy, as it changes what it is given
    return transformers.Qwen2VLConfig(**copy.deepcopy(QWEN2_VL_7B))


def vlm_for(args, quantize=False):
    """The VLM."""
    if args.size == "mini":
        options = pipelines.vlm_options(argparse.Namespace(quantize=quantize))
        return models.load_vlm(MINI["vlm"], args.device, args.dtype, **options)[0]
    kind = transformers.Qwen2VLForConditionalGeneration
    vlm = random_model(kind, vlm_config(args), args.device, args.dtype)
    if quantize:
        # all but lm_head, as loading does it
        quantize_weights(vlm.model)
    return vlm


def flux_for(args, t5_encoder=False, quantize=False, **options):
    """FluxPipeline as load_flux leaves it."""
    if args.size == "mini":
        return pipelines.load_flux(
            MINI["flux"], args.device, args.dtype, t5_encoder, quantize=quantize, **options)
    new = partial(random_model, device=args.device, dtype=args.dtype)
    t5 = new(transformers.T5EncoderModel, T5Config(**T5_XXL)) if t5_encoder else None
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=new(diffusers.AutoencoderKL, FLUX_VAE),
        transformer=new(diffusers.FluxTransformer2DModel, FLUX_DEV),
        text_encoder=new(transformers.CLIPTextModel, transformers.CLIPTextConfig(**FLUX_CLIP)),
        # any tokenizer will do for the empty text
        tokenizer=AutoTokenizer.from_pretrained(f"{MINI['flux']}/tokenizer"),
        text_encoder_2=t5, tokenizer_2=None)
    pipe.set_progress_bar_config(disable=True)
    if quantize:
        quantize_weights(pipe.transformer)
    return pipelines.speed_up(pipe, args.device, **options)


def quantize_weights(model):
    """Does what loading with a TorchAoConfig does to a model's matrices."""
    from torchao.quantization import quantize_
    quantize_(model, pipelines.int8_weights())


def weight_bytes(*modules):
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


# ------------------------------------------------------- FLOPs of one sample; c: a config
def layer_flops(tokens, weights, width, seen):
    """2 for each weight and token in a matrix product, 4 for each channel and pair of query and key
    (masked pairs too, as in torch's counter and the kernels). The rest is below 1 %."""
    return tokens * (2 * weights + 4 * width * seen)


def t5_encoder_flops(c, length):
    """T5's encoder on `length` tokens."""
    inner = c.num_heads * c.d_kv
    weights = 4 * c.d_model * inner + 3 * c.d_model * c.d_ff
    return c.num_layers * layer_flops(length, weights, inner, length)


def t5_training_flops(c, memory, target):
    """Forward and backward of the frozen decoder: `target` tokens for `memory` encoder outputs.

    At full size 2 x (10.9 GFLOP a target token, 1.6 a token of memory), 2 x 0.26 for the head.
    Backward costs what forward does, as frozen weights have no gradient; in attention twice that,
    as q, k and v all pass one on. Nothing before the first cross-attention depends on the aligner:
    no backward there."""
    inner = c.num_heads * c.d_kv
    weights = c.d_model * inner
    attention, cross_attention = 4 * inner * target**2, 4 * inner * target * memory
    # q, k, v, o; q, o of cross-attention; wi_0, wi_1, wo; then k, v of cross-attention
    linear = target * 2 * (6 * weights + 3 * c.d_model * c.d_ff) + memory * 2 * 2 * weights
    layers = c.num_decoder_layers * (2 * linear + 3 * (attention + cross_attention))
    head = 2 * target * c.d_model * c.vocab_size
    # of the first layer: self-attention, q of cross-attention
    unused = 2 * target * 5 * weights + 2 * attention + cross_attention / 2
    return layers + 2 * head - unused


def aligner_training_flops(d_vlm, d_t5, tokens):
    """Forward, the gradients of both matrices, and that of the second one's input."""
    return tokens * 2 * (2 * (d_vlm * d_t5 + d_t5**2) + d_t5**2)


def tower_flops(c):
    """A CLIP's vision tower on one image."""
    patches, d = (c.image_size // c.patch_size) ** 2, c.hidden_size
    weights = 4 * d**2 + 2 * d * c.intermediate_size
    layer = layer_flops(patches + 1, weights, d, patches + 1)
    return c.num_hidden_layers * layer + patches * 2 * 3 * c.patch_size**2 * d


def qwen_text_flops(c, tokens, seen):
    """`tokens` positions of Qwen2's layers, each attending to `seen` positions; without head."""
    d, kv = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    weights = d * (2 * d + 2 * kv + 3 * c.intermediate_size)
    return c.num_hidden_layers * layer_flops(tokens, weights, d, seen)


def qwen_vision_flops(c, patches):
    """Qwen2-VL's vision tower and merger on one image."""
    e, merged = c.embed_dim, c.embed_dim * c.spatial_merge_size**2
    layer = layer_flops(patches, (4 + 2 * c.mlp_ratio) * e**2, e, patches)
    embedding = patches * 2 * c.in_channels * c.temporal_patch_size * c.patch_size**2 * e
    merger = patches // c.spatial_merge_size**2 * 2 * (merged**2 + merged * c.hidden_size)
    return c.depth * layer + embedding + merger


def describe_flops(c, prompt, tokens, patches):
    """(prefill of `prompt` tokens, decoding `tokens`, both in one teacher-forced pass)."""
    text, last = partial(qwen_text_flops, c.text_config), prompt + tokens - 1
    vision = qwen_vision_flops(c.vision_config, patches)
    head = 2 * c.text_config.hidden_size * c.text_config.vocab_size
    decoding = sum(text(1, seen) + head for seen in range(prompt + 1, last + 1))
    return vision + text(prompt, prompt) + head, decoding, vision + text(last, last)


def flux_flops(c, image, text):
    """One pass of FLUX's transformer: 15.8 TFLOP for 512 px and 128 text tokens.

    Less than 2 x 11.9 G x 1,152 tokens = 27 TFLOP, as a token meets one of a double block's two
    sets of weights, and the modulations (3.2 G of the 11.9 G weights) are used once a pass."""
    d, tokens = c["num_attention_heads"] * c["attention_head_dim"], image + text
    double, single = c["num_layers"], c["num_single_layers"]
    # q, k, v, o and an MLP 4 d wide: 12 d^2 weights
    blocks = (double + single) * layer_flops(tokens, 12 * d**2, d, tokens)
    modulations = d * (12 * double + 3 * single + 2)
    # time, guidance, pooled text
    conditions = (256 + d) * (1 + c["guidance_embeds"]) + c["pooled_projection_dim"] + d
    ends = 2 * image * c["in_channels"] + text * c["joint_attention_dim"]
    return blocks + 2 * d * (modulations + conditions + ends)


# --------------------------------------------------------------------------------- measuring
class Job(NamedTuple):
    """step() does a step. Of one step: samples, tokens, the FLOPs that its result needs (without
    padding and recomputation), the bytes of weights and caches that must be read, and the least
    number of seconds (floor). 0: not known."""
    step: Callable
    samples: int
    tokens: int = 0
    flops: float = 0
    read: float = 0
    floor: float = 0


class Way(NamedTuple):
    """One way to do a step: build(micro_batch, args, **options) -> Job. If memory is short, it is
    tried again with half of the micro_batch. baseline: the name of another way."""
    name: str
    build: Callable
    options: dict
    baseline: str | None = None
    micro_batch: int | None = None
    note: str = ""


FIELDS = ("part way micro_batch ms ms_min ms_max steps samples_s tokens_s peak_gb fits_gb tflop "
          "of_matmul of_copy of_floor speedup failed note").split()
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
    """The fastest large matrix product in our dtype, the fastest copy (bytes read and written)."""
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
    return job._replace(step=None), ms, peak, result


def measure(part, ways, args, report):
    """Adds a row for each way to the report and prints them: {name: row}.

    args.rounds rounds alternate between the ways. FLUX's images are compared with the baseline's.
    """
    rows = {way.name: {"part": part, "way": way.name, "micro_batch": way.micro_batch,
                       "note": way.note} for way in ways}
    report["rows"] += rows.values()
    times, results = {name: [] for name in rows}, {}
    for way in args.rounds * ways:
        row = rows[way.name]
        while "failed" not in row:
            print(f"\r{part}: {way.name:90.90}", end="", file=sys.stderr, flush=True)
            try:
                job, ms, peak, results[way.name] = measure_round(way, row["micro_batch"], args)
            except Exception as error:  # the other ways go on
                add_failure(row, way, error)
                times[way.name].clear()
                continue
            times[way.name] += ms
            add_figures(row, job, times[way.name], peak, args.ceilings)
            break
        baseline = rows.get(way.baseline, {})
        if "ms" in row and "ms" in baseline:
            row["speedup"] = baseline["ms"] / row["ms"]
        write_report(report, args)
    for way in ways:
        if " px" in way.name and way.name in results and way.baseline in results:
            note = difference(results[way.name], results[way.baseline])
            if args.size == "full" and "--cache" in way.name:
                note += "; random weights: the real FLUX's gain and change are others"
            rows[way.name]["note"] = note
    print(f"\r{'':110}\r", end="", file=sys.stderr)
    print_table(part, rows.values())
    return rows


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
    seconds = ms / 1e3
    row.update(
        ms=ms, ms_min=min(times), ms_max=max(times), steps=len(times),
        samples_s=job.samples / seconds, tokens_s=job.tokens / seconds,
        tflop=job.flops / 1e12 or None,
        of_matmul=job.flops / seconds / 1e12 / ceilings["matmul_tflop_s"] or None,
        of_copy=job.read / seconds / 1e9 / ceilings["copy_gb_s"] or None,
        of_floor=seconds / job.floor if job.floor else None)
    if peak:
        row["peak_gb"] = max(peak, row.get("peak_gb", 0))
        fitting = [card for card in CARDS if row["peak_gb"] * 1e9 < 0.95 * card * 2**30]
        row["fits_gb"] = min(fitting, default=None)


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
    "samples_s": "samples/s", "tokens_s": "tokens/s", "peak_gb": "peak GB", "fits_gb": "fits GB",
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


def check_bar(report, what, value, sign, limit, unit="", note=""):
    """Notes and prints whether a bar of the project is met; value None: not measured."""
    mark, met, figure = "?   ", None, "not measured"
    if value is not None:
        met = value >= limit if sign == ">=" else value <= limit
        mark, figure = "PASS" if met else "miss", f"{value:.3g}{unit}"
    report["bars"].append({"bar": what, "value": value, "limit": limit, "met": met, "note": note})
    print(f"{mark}  {what}: {figure} (bar: {sign} {limit:g}{unit}) {note}".rstrip(), flush=True)


def write_report(report, args):
    """Writes --out.json and --out.csv."""
    write_json(f"{args.out}.json", report)
    common.write_csv(f"{args.out}.csv", FIELDS,
                     [[row.get(field) for field in FIELDS] for row in report["rows"]])


# ---------------------------------------------------------------------------- training steps
STOCK = "baseline: stock models, fp32, eager, padded"


def one_token_words():
    """The miniature's tokenizers, of the VLM and of T5, and ids of the VLM's (1-dim. tensor) that
    are a word and one token of T5 too: the length of a text of them is known."""
    vlm_tokenizer, t5_tokenizer = (AutoTokenizer.from_pretrained(MINI[m]) for m in ("vlm", "t5"))
    texts = vlm_tokenizer.batch_decode([[i] for i in range(len(vlm_tokenizer))])
    words = [i for i, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha()
             and len(t5_tokenizer(text).input_ids) == 2]
    return vlm_tokenizer, t5_tokenizer, torch.tensor(words)


def random_samples(n, words, d_vlm, args):
    """n times features x (N, d_vlm) and tokens y (N,), as `prepare_data.py lvlm` leaves them."""
    g = torch.Generator().manual_seed(args.seed)
    for _ in range(n):
        x = torch.randn(args.tokens, d_vlm, generator=g).bfloat16()
        yield x, words[torch.randint(len(words), (args.tokens,), generator=g)]


def training_job(variant, t5, d_vlm, samples, collate, micro_batch, args, ours):
    """A Job whose step(update=True) -> loss is that of the variant's `train`, or the baseline's."""
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
            optimizer.zero_grad()
        return loss

    # forward and backward read the frozen weights once each
    read = 2 * len(groups) * weight_bytes(t5.decoder, t5.lm_head)
    return Job(step, len(samples), read=read)


def lvlm_job(micro_batch, args, ours=True, compile=False):
    """Eq. 2, on random features and words."""
    t5, d_vlm = t5_for(args, ours, encoder=not ours), vlm_config(args).text_config.hidden_size
    if compile:
        t5.decoder.compile(dynamic=True)
    *tokenizers, words = one_token_words()
    samples, tokens, flops = [], 0, 0
    for position, (x, y) in enumerate(random_samples(args.batch, words, d_vlm, args)):
        x, y = thinkdiff_lvlm.split(x, y, position, args)
        samples.append((x, y))
        target = min(len(y) + 1, thinkdiff_lvlm.MAX_TARGET)
        tokens += len(x) + target
        flops += t5_training_flops(t5.config, len(x), target)
        flops += aligner_training_flops(d_vlm, t5.config.d_model, len(x))
    collate = partial(thinkdiff_lvlm.collate, tokenizers=tokenizers, device=args.device)
    job = training_job(thinkdiff_lvlm, t5, d_vlm, samples, collate, micro_batch, args, ours)
    return job._replace(tokens=tokens, flops=flops)


def clip_job(micro_batch, args, ours=True, compile=False):
    """Eq. 4, on random images with captions of 6 to 20 words."""
    t5, clip = t5_for(args, ours, encoder=True), clip_for(args, ours)
    if compile:
        clip.compile()
        t5.decoder.compile(dynamic=True)
    c, (vlm_tokenizer, t5_tokenizer, words) = clip.config, one_token_words()
    rng, g = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    # tokens of a pooled image
    image = (c.image_size // c.patch_size // 2) ** 2 + 1
    samples, tokens, flops = [], 0, 0
    for position in range(args.batch):
        pixels = torch.randn(3, c.image_size, c.image_size, generator=g)
        caption = vlm_tokenizer.decode(rng.choices(words.tolist(), k=rng.randint(6, 20)))
        texts = thinkdiff_clip.split(caption, position, args)
        samples.append((pixels, *texts))
        first, target = (len(text.split()) + 1 for text in texts)
        tokens += image + first + target
        flops += tower_flops(c) + t5_encoder_flops(t5.config, first)
        flops += t5_training_flops(t5.config, image + first, target)
        flops += aligner_training_flops(c.hidden_size, t5.config.d_model, image)
    collate = partial(thinkdiff_clip.collate, t5_tokenizer=t5_tokenizer, clip=clip, t5=t5)
    job = training_job(
        thinkdiff_clip, t5, c.hidden_size, samples, collate, micro_batch, args, ours)
    return job._replace(tokens=tokens, flops=flops)


def reading_job(_, args):
    """What a step of thinkdiff_lvlm.py reads, with its threads: shards -> batches on the device."""
    folder, d_vlm = tempfile.TemporaryDirectory(), vlm_config(args).text_config.hidden_size
    *tokenizers, words = one_token_words()
    samples = [({"index": i}, y, x)
               for i, (x, y) in enumerate(random_samples(512, words, d_vlm, args))]
    settings = {"out": folder.name, "features": "generated", "tokens_only": False}
    prepare_data.write_shard(argparse.Namespace(**settings), "shard", samples, [])
    write_json(f"{folder.name}/meta.json", {**settings, "tokens": args.tokens, "d_vlm": d_vlm})
    write_atomically(f"{folder.name}/plan.jsonl", "\n" * len(samples))
    dataset, readers = training_data.FeatureDataset(folder.name), ThreadPoolExecutor(8)
    order = training_data.sample_order(len(dataset), args.seed, 0)

    # the folder is deleted with the step
    def step(folder=folder):
        read = readers.map(dataset.__getitem__, [next(order) for _ in range(args.batch)])
        pairs = [thinkdiff_lvlm.split(x, y, i, args) for i, (x, y) in enumerate(read)]
        return thinkdiff_lvlm.collate(pairs, tokenizers, args.device)

    return Job(step, args.batch, args.batch * args.tokens)


def training_ways(job, batch, micro_batch, args):
    """The baseline and ours. batch, micro_batch: the defaults of `train`."""
    args.batch = args.batch_size or batch
    micro_batch = min(micro_batch, args.batch)
    ways = [Way(STOCK, job, {"ours": False}, micro_batch=args.batch),
            Way("ours", job, {}, STOCK, micro_batch),
            Way(f"ours, micro-batch {args.batch}", job, {}, STOCK, args.batch)]
    if not args.no_compile:
        ways.append(Way("ours --compile", job, {"compile": True}, STOCK, micro_batch))
    return ways


def train_lvlm(args, report):
    """A step of Eq. 2, and reading its data."""
    ways = training_ways(lvlm_job, 96, 24, args)
    ways.append(Way("reading its data alone", reading_job, {},
                    note="with a warm page cache; training reads while it computes"))
    rows = measure("train-lvlm", ways, args, report)
    ours = [row for way, row in rows.items() if way.startswith("ours") and "ms" in row]
    best = min(ours, key=lambda row: row["ms"], default={"way": ""})
    check_bar(report, f"LVLM training step, batch {args.batch}, against the baseline",
              best.get("speedup"), ">=", 3, "x", best["way"])
    check_bar(report, "LVLM training step, share of the matmul ceiling", best.get("of_matmul"),
              ">=", 0.45, note=best["way"])
    hours = 25000 * best["ms"] / 3.6e6 if ours and args.batch == 96 else None
    check_bar(report, "25,000 steps of 96", hours, "<=", 2, " h")


def train_clip(args, report):
    """A step of Eq. 4."""
    measure("train-clip", training_ways(clip_job, 168, 42, args), args, report)


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

    The floor: prefill at the matmul ceiling, then each token at the copy ceiling, as it reads all
    weights and the keys and values of all tokens before it (or at the matmul ceiling, if the batch
    is so large)."""
    model, config, inputs = vlm_for(args, quantize), vlm_config(args), vlm_inputs(args, batch)
    c, prompt = config.text_config, inputs["input_ids"].shape[1]
    known = torch.randint(N_WORDS, (batch, args.tokens)).to(args.device)
    generate = partial(thinkdiff_lvlm.generate_with_features, model, inputs, args.tokens,
                       seeds=range(batch))
    stock = partial(stock_features, model, inputs, args.tokens, do_sample=True, temperature=0.6,
                    top_p=0.9, top_k=0)

    def two_passes():
        return models.teacher_forced_features(model, inputs, generate()[0])

    patches = (args.picture // config.vision_config.patch_size) ** 2
    flops = describe_flops(config, prompt, args.tokens, patches)
    prefill, decoding, forced = (batch * part for part in flops)
    weights = weight_bytes(model.model.language_model.layers, model.lm_head)
    kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    # bytes of a position
    cached = batch * 2 * c.num_hidden_layers * kv * args.dtype.itemsize
    read = sum(weights + cached * (prompt + i) for i in range(1, args.tokens))
    # the step, its FLOPs, the bytes that it reads after the first pass
    step, flops, read = {
        "stock": (stock, prefill + decoding, read),
        "hook": (generate, prefill + decoding, read),
        "two passes": (two_passes, prefill + decoding + forced, read + weights),
        "forced": (partial(models.teacher_forced_features, model, inputs, known), forced, 0)}[how]
    matmul, copying = args.ceilings["matmul_tflop_s"] * 1e12, args.ceilings["copy_gb_s"] * 1e9
    floor = prefill / matmul + max(read / copying, decoding / matmul)
    if how == "forced":
        floor = forced / matmul
    return Job(step, batch, batch * args.tokens, flops, 0 if quantize else read + weights, floor)


def recomputing_job(micro_batch, args):
    """A training step from --tokens-only data: teacher-forced passes of the VLM come first."""
    job, model = lvlm_job(micro_batch, args), vlm_for(args)
    inputs = vlm_inputs(args, micro_batch)
    known = torch.randint(N_WORDS, (micro_batch, args.tokens)).to(args.device)

    def step():
        for _ in range(0, args.batch, micro_batch):
            models.teacher_forced_features(model, inputs, known).bfloat16()
        return job.step()

    return job._replace(step=step)


def features(args, report):
    """Describing images, and a training step that recomputes their features."""
    ways = []
    for batch in args.feature_batches:
        name = f"batch {batch}: "
        stock = f"{name}stock generate, output_hidden_states"
        job = partial(features_job, batch=batch)
        ways += [Way(stock, job, {"how": "stock"}),
                 Way(f"{name}generate with a hook (default)", job, {"how": "hook"}, stock),
                 Way(f"{name}generate, then a teacher-forced pass", job, {"how": "two passes"},
                     stock),
                 Way(f"{name}teacher-forced pass alone", job, {"how": "forced"},
                     note="the tokens are known (--backend vllm)")]
    args.batch = args.batch_size or 96
    read, micro_batch = "training step, features read", min(24, args.batch)
    ways += [Way(read, lvlm_job, {}, micro_batch=micro_batch),
             Way("training step, features recomputed (--tokens-only)", recomputing_job, {}, read,
                 micro_batch)]
    rows = measure("features", ways, args, report)
    for batch in args.feature_batches:
        generating = [row for way, row in rows.items() if way.startswith(f"batch {batch}:")
                      and "alone" not in way and "ms" in row]
        fastest = max((row["samples_s"] for row in generating), default=None)
        default = rows[f"batch {batch}: generate with a hook (default)"]
        share = default["samples_s"] / fastest if "ms" in default else None
        check_bar(report, f"features, batch {batch}: the default against the fastest way", share,
                  ">=", 0.97, "x")
        check_bar(report, f"features, batch {batch}: the default against the floor",
                  default.get("of_floor"), "<=", 1.2, "x")


# -------------------------------------------------------------------------------------- FLUX
SPEED = {"--compile": {"compile": True}, "--cache 0.1": {"cache": 0.1},
         "--compile --cache 0.1": {"compile": True, "cache": 0.1}}
MEMORY = {"--offload": {"offload": True}, "--quantize": {"quantize": True},
          "--quantize --offload": {"quantize": True, "offload": True}}


def flux_job(_, args, px, batch, stock=False, t5_encoder=False, **options):
    """Images from prompt_embeds of a caption; at full size, where the weights are random, too."""
    if args.size == "full":
        g = torch.Generator().manual_seed(args.seed)
        prompt = torch.randn(batch, 128, FLUX_DEV["joint_attention_dim"], generator=g)
        prompt = prompt.to(args.device, args.dtype)
    else:
        texts = ["A picture of a red car."] * batch
        prompt = pipelines.t5_embeds(flux_for(args, t5_encoder=True), texts, 48)
    pipe, seeds = flux_for(args, t5_encoder=stock or t5_encoder, **options), range(batch)

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
    n, flops = batch * args.flux_steps, flux_flops(pipe.transformer.config, image, prompt.shape[1])
    read = 0 if options.get("quantize") else weight_bytes(pipe.transformer)
    return Job(stock_step if stock else ours, batch, n * image, n * flops, args.flux_steps * read)


def flux(args, report):
    """Drawing images, stock and ours, with the flags for speed."""
    ways, fewest = [], min(args.flux_batches)
    for px in args.flux_sizes:
        for batch in args.flux_batches:
            name, job = f"{px} px, batch {batch}: ", partial(flux_job, px=px, batch=batch)
            stock = f"{name}stock FluxPipeline"
            ways += [Way(stock, job, {"stock": True}), Way(f"{name}ours", job, {}, stock)]
            ways += [Way(f"{name}ours {flag}", job, options, stock)
                     for flag, options in SPEED.items()
                     if batch == fewest and not (args.no_compile and "compile" in options)]
    rows, px = measure("flux", ways, args, report), args.flux_sizes[0]
    notes = [rows[f"{px} px, batch {batch}: ours"]["note"] for batch in args.flux_batches]
    same = sum(note.endswith("bit for bit") for note in notes) / len(notes)
    check_bar(report, f"FLUX {px} px without flags: share of the batch sizes with stock's "
              "pictures, bit for bit", same if all(notes) else None, ">=", 1)
    fast = [row for way, row in rows.items()
            if way.startswith(f"{px} px, batch {fewest}: ours --") and "speedup" in row]
    best = max(fast, key=lambda row: row["speedup"], default={"way": "", "note": ""})
    check_bar(report, f"FLUX {px} px with speed flags", best.get("speedup"), ">=", 1.5, "x",
              f"{best['way']}, {best['note']}".strip(", "))


def memory(args, report):
    """Peaks, weights included; `x baseline` is the speed against the same without the flag."""
    args.batch, px = 24, args.flux_sizes[0]
    training, vlm = "LVLM training, 24 samples at once", "VLM, a picture described"
    stock, plain = f"{training}: {STOCK}", f"FLUX, {px} px"
    describe = partial(features_job, how="hook", batch=1)
    draw = partial(flux_job, px=px, batch=1)
    ways = [Way(training, lvlm_job, {}, stock, 24),
            Way(stock, lvlm_job, {"ours": False}, micro_batch=24),
            Way(vlm, describe, {}),
            Way(f"{vlm} --quantize", describe, {"quantize": True}, vlm),
            Way(plain, draw, {}),
            Way(f"{plain}, with its T5 (--relay)", draw, {"t5_encoder": True}, plain),
            *(Way(f"{plain} {flag}", draw, options, plain) for flag, options in MEMORY.items())]
    ours = measure("memory", ways, args, report)[training]
    peak = ours.get("peak_gb") if ours["micro_batch"] == 24 else None
    check_bar(report, "LVLM training, peak memory at 24 samples", peak, "<=", 20, " GB")


# ------------------------------------------------------------------------------ command line
PARTS = {"train-lvlm": train_lvlm, "train-clip": train_clip, "features": features, "flux": flux,
         "memory": memory}
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
    ("--dtype", ("bfloat16", "float32"), None, None, "of our weights; None: bfloat16 on a GPU"),
    ("--seed", common.seed, 0, 0, "of samples and splits"),
    ("--out", str, "results/bench-full", "results/bench-mini", "where to write, without ending"),
]


def main():
    # --size decides the other defaults
    is_full = "--size full" in " ".join(sys.argv).replace("=", " ")
    p = common.Parser(description=__doc__)
    p.add_argument("--size", choices=("mini", "full"), default="mini",
                   help="the miniature's models, or the true architectures (default: mini)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                   help="what to measure (default: all)")
    for flag, kind, full, mini, text in FLAGS:
        default = full if is_full else mini
        common.add_flag(p, flag, kind, default, default, text)
    # of `train`
    p.set_defaults(masking="random", features="generated", norm="t5", hidden=None,
                   weight_decay=0.05)
    args = p.parse_args()
    args.device, dtype = common.pick_device()
    args.dtype = getattr(torch, args.dtype) if args.dtype else dtype
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
    if args.size == "mini":
        print("The bars are those of full size on an H200; the miniature only shows that "
              "everything runs.")
    for part in args.parts:
        try:
            PARTS[part](args, report)
        except Exception as error:  # the other parts go on
            report["rows"].append({"part": part, "way": "(the part itself)",
                                   "failed": first_line(error), "note": ""})
            print(f"{part}: {first_line(error)}", file=sys.stderr)
        write_report(report, args)
    print(f"\nwritten: {args.out}.json, {args.out}.csv")


if __name__ == "__main__":
    common.cli_main(main)
