"""How fast, how large: every step of ThinkDiff beside the straightforward stock version of it, in one run.

Full size, on one GPU of 80 GB or more; nothing is downloaded, the true architectures get random weights on the device:
    python bench.py --size full
    python bench.py --size full --parts train-lvlm --out results/bench-train-lvlm
The miniature's models, on the CPU, in a few minutes:
    python bench.py --size mini

Speed is measured against two ceilings of the same machine in the same run: the fastest large matrix product and the fastest copy. The baseline of
training is what the authors' release does with stock transformers: the whole T5 in fp32 under bf16 autocast, eager attention, batches padded to
their longest sample. The rounds alternate between the ways to do a step; each builds a way anew, alone on the device, warms it up and times single
steps with the device synchronised. The tables have the median and the range of all of them. A way that does not fit is a row that says so.

--out gets NAME.json (everything) and NAME.csv (the rows), both written anew after each measurement: a killed run keeps what it has.
"""
import argparse
import copy
import csv
import datetime
import gc
import io
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

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import (AutoTokenizer, Blip2VisionConfig, Blip2VisionModel, CLIPTextConfig, CLIPTextModel, PreTrainedModel, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, T5Config, T5EncoderModel, T5ForConditionalGeneration)
from transformers.initialization import no_init_weights

import thinkdiff_clip
import thinkdiff_lvlm
from aligner import Aligner
from common import MINI, first_line, pick_device, positive, pretrained, run, write_atomically, write_json
from drawing import int8, speed_up, vlm_options
from prepare_data import generate_with_features, load_vlm, teacher_forced_features

# ---------------------------------------------------------------- full size: the numbers of each model's config.json on the hub
T5_XXL = dict(  # google/flan-t5-xxl, google/t5-v1_1-xxl
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
    tie_word_embeddings=False, decoder_start_token_id=0)
QWEN2_VL_7B = dict(  # Qwen/Qwen2-VL-7B-Instruct
    text_config=dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                     rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    vision_config=dict(depth=32, embed_dim=1280, hidden_size=3584, mlp_ratio=4, num_heads=16, patch_size=14, spatial_merge_size=2, temporal_patch_size=2))
EVA_CLIP_G = dict(  # Salesforce/blip2-flan-t5-xxl: vision_config
    hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224, patch_size=14)
FLUX_DEV = dict(  # black-forest-labs/FLUX.1-dev: transformer/
    in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
    pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
FLUX_VAE = dict(  # vae/
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024)
FLUX_CLIP = dict(  # text_encoder/
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77, eos_token_id=2)
FLUX_SCHEDULER = dict(base_shift=0.5, max_shift=1.15, shift=3.0, use_dynamic_shifting=True)  # scheduler/


# ---------------------------------------------------------------- models: the miniature's from their folders, full size with random weights
@torch.no_grad()
def random_model(make, device, dtype):
    """make(), frozen, built on the device in dtype. Its random weights depend on their names alone: ours and the baseline have the same ones,
    whatever else each holds. Matrices have a standard deviation of fan_in ** -0.5, so that no layer blows up; norms are 1, biases 0."""
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            model = make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    if isinstance(model, T5ForConditionalGeneration):  # the checkpoints have an lm_head of its own; transformers ties that of a new model
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight), requires_grad=False)
    for name, weight in model.named_parameters() if device.type != "meta" else ():
        if weight.ndim == 1:
            weight.fill_(0 if name.endswith("bias") else 1)
        else:
            g = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            scale = weight[0].numel() ** -0.5 / (8 if name.endswith(".q.weight") else 1)  # T5 has the 1 / sqrt(64) of its attention in q
            weight.copy_(torch.randn(weight.shape, generator=g, device=device) * scale)
    return model


def t5_for(args, ours=True, encoder=False):
    """T5. Ours: args.dtype, sdpa, with or without encoder. The baseline's: fp32, eager attention, whole."""
    dtype, attention = (args.dtype, "sdpa") if ours else (torch.float32, "eager")
    if args.size == "mini":
        t5 = (thinkdiff_clip.load_t5 if encoder else thinkdiff_lvlm.load_t5_decoder)(MINI["t5"], args.device, dtype)
        t5.set_attn_implementation(attention)
        return t5
    config = T5Config(**{**T5_XXL, **({} if encoder else {"num_layers": 0})})
    return random_model(lambda: T5ForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention), args.device, dtype)


def clip_for(args, ours=True):
    """The vision tower; the baseline's in fp32 with eager attention."""
    dtype, attention = (args.dtype, "sdpa") if ours else (torch.float32, "eager")
    if args.size == "mini":
        clip = thinkdiff_clip.load_clip(MINI["clip"], args.device, dtype)
        clip.set_attn_implementation(attention)
        return clip
    config = Blip2VisionConfig(**EVA_CLIP_G)
    return random_model(lambda: Blip2VisionModel._from_config(config, dtype=dtype, attn_implementation=attention), args.device, dtype)


def vlm_config(args):
    return pretrained(Qwen2VLConfig, MINI["vlm"]) if args.size == "mini" else Qwen2VLConfig(**copy.deepcopy(QWEN2_VL_7B))


def vlm_for(args, quantize=False):
    if args.size == "mini":
        return load_vlm(MINI["vlm"], args.device, args.dtype, **vlm_options(quantize))[0]
    vlm = random_model(lambda: Qwen2VLForConditionalGeneration._from_config(vlm_config(args), dtype=args.dtype), args.device, args.dtype)
    return quantized(vlm, vlm.model) if quantize else vlm  # all but lm_head, as loading does it


def flux_for(args, t5_encoder=False, quantize=False, **options):
    """FluxPipeline as load_flux leaves it."""
    if args.size == "mini":
        return thinkdiff_lvlm.load_flux(MINI["flux"], args.device, args.dtype, t5_encoder, quantize=quantize, **options)
    import diffusers
    new = partial(random_model, device=args.device, dtype=args.dtype)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER), vae=new(lambda: diffusers.AutoencoderKL(**FLUX_VAE)),
        transformer=new(lambda: diffusers.FluxTransformer2DModel(**FLUX_DEV)),
        text_encoder=new(lambda: CLIPTextModel._from_config(CLIPTextConfig(**FLUX_CLIP), dtype=args.dtype)),
        text_encoder_2=new(lambda: T5EncoderModel._from_config(T5Config(**T5_XXL), dtype=args.dtype)) if t5_encoder else None,
        tokenizer=AutoTokenizer.from_pretrained(f"{MINI['flux']}/tokenizer"), tokenizer_2=None)  # any will do for the empty text
    pipe.set_progress_bar_config(disable=True)
    return speed_up(quantized(pipe, pipe.transformer) if quantize else pipe, args.device, **options)


def quantized(whole, part):
    """What loading with a TorchAoConfig does to the matrices of `part`."""
    from torchao.quantization import quantize_
    quantize_(part, int8())
    return whole


def weight_bytes(*modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


# ---------------------------------------------------------------- FLOPs of one sample: 2 a weight and token in a matrix product, 4 a channel and pair
# of query and key in attention (masked pairs too, as torch's counter and the kernels do). Norms, softmax, embeddings are below 1 % and left out.
def t5_encoder_flops(c, length):
    inner = c.num_heads * c.d_kv
    return c.num_layers * (length * 2 * (4 * c.d_model * inner + 3 * c.d_model * c.d_ff) + 4 * inner * length**2)


def t5_training_flops(c, memory, target):
    """Forward and backward of the frozen decoder: at full size 2 x (10.9 GFLOP a target token, 1.6 a memory token; protocol 7), and 2 x 0.26 of the head.

    Frozen weights have no gradient, so that backward costs what forward does, in attention twice that: q, k and v all pass one on. Nothing
    before the first cross-attention depends on the aligner: no backward there."""
    inner, layers = c.num_heads * c.d_kv, c.num_decoder_layers
    weights = c.d_model * inner
    self_attention, cross_attention = 4 * inner * target**2, 4 * inner * target * memory
    linear = layers * (target * 2 * (6 * weights + 3 * c.d_model * c.d_ff)  # q, k, v, o; q, o of cross-attention; wi_0, wi_1, wo
                       + memory * 2 * 2 * weights)  # k, v of cross-attention
    head = 2 * target * c.d_model * c.vocab_size
    unused = 2 * target * 5 * weights + 2 * self_attention + cross_attention / 2  # layer 0: self-attention, q of cross-attention
    return 2 * (linear + head) + 3 * layers * (self_attention + cross_attention) - unused


def aligner_training_flops(d_vlm, d_t5, tokens):
    """Forward, the gradients of both matrices, and that of the second one's input."""
    return tokens * 2 * (2 * (d_vlm * d_t5 + d_t5**2) + d_t5**2)


def tower_flops(c):
    """A CLIP's vision tower on one picture."""
    patches, d = (c.image_size // c.patch_size) ** 2, c.hidden_size
    return (c.num_hidden_layers * ((patches + 1) * 2 * (4 * d**2 + 2 * d * c.intermediate_size) + 4 * d * (patches + 1) ** 2)
            + patches * 2 * 3 * c.patch_size**2 * d)


def qwen_text_flops(c, tokens, seen):
    """`tokens` positions of Qwen2's layers that attend to `seen` positions each; without the head."""
    d, kv = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    return c.num_hidden_layers * tokens * (2 * d * (2 * d + 2 * kv + 3 * c.intermediate_size) + 4 * d * seen)


def qwen_vision_flops(c, patches):
    """One picture in Qwen2-VL's tower and merger."""
    e, merged = c.embed_dim, c.embed_dim * c.spatial_merge_size**2
    return (c.depth * (patches * 2 * (4 + 2 * c.mlp_ratio) * e**2 + 4 * e * patches**2)
            + patches * 2 * c.in_channels * c.temporal_patch_size * c.patch_size**2 * e
            + patches // c.spatial_merge_size**2 * 2 * (merged**2 + merged * c.hidden_size))


def describe_flops(c, prompt, tokens, patches):
    """A picture described in `tokens` tokens after a prompt of `prompt` tokens: (prefill, decoding, both at once by a teacher-forced pass)."""
    vision, text = qwen_vision_flops(c.vision_config, patches), partial(qwen_text_flops, c.text_config)
    head = 2 * c.text_config.hidden_size * c.text_config.vocab_size
    return (vision + text(prompt, prompt) + head, sum(text(1, prompt + i) + head for i in range(1, tokens)),
            vision + text(prompt + tokens - 1, prompt + tokens - 1))


def flux_flops(c, image, text):
    """One pass of FLUX's transformer with `image` and `text` tokens; c: its config. 15.8 TFLOP for a picture of 512 px and 128 text tokens.

    Of a double block's two sets of weights a token meets one, and the modulations (3.2 G of the 11.9 G weights) are used once a pass: so
    it is less than 2 x 11.9 G x 1,152 tokens = 27 TFLOP."""
    d, tokens = c["num_attention_heads"] * c["attention_head_dim"], image + text
    blocks = (c["num_layers"] + c["num_single_layers"]) * (tokens * 24 * d**2 + 4 * d * tokens**2)  # q, k, v, o and an MLP 4 d wide: 12 d^2 weights
    modulations = 2 * d**2 * (12 * c["num_layers"] + 3 * c["num_single_layers"] + 2)
    conditions = 2 * ((256 * d + d**2) * (1 + c["guidance_embeds"]) + c["pooled_projection_dim"] * d + d**2)  # time, guidance, pooled text
    return blocks + modulations + conditions + 2 * d * (2 * image * c["in_channels"] + text * c["joint_attention_dim"])  # in and out


# ---------------------------------------------------------------- measuring
class Job(NamedTuple):
    """step() does a step. Of one step: samples, tokens, the FLOPs that its result needs (not padding, not recomputation), the bytes of weights and
    caches that must be read, and, where known, the seconds it takes at least."""
    step: Callable
    samples: int
    tokens: int = 0
    flops: float = 0
    read: float = 0
    floor: float = 0


class Way(NamedTuple):
    """One way to do a step. build(micro_batch) -> Job; one with a micro_batch is tried with half of it if it does not fit. baseline: another's name."""
    name: str
    build: Callable
    baseline: str | None = None
    micro_batch: int | None = None
    note: str = ""


FIELDS = ("part", "way", "micro_batch", "ms", "ms_min", "ms_max", "steps", "samples_s", "tokens_s", "peak_gb", "fits_gb", "tflop", "of_matmul", "of_copy",
          "of_floor", "speedup", "failed", "note")
WARM_UP = 2  # steps of a round that are not timed
CARDS = (24, 48, 80)  # GB as sold, which are GiB; 5 % are left to CUDA and to fragmentation


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_ceilings(args):
    """The fastest large matrix product in our dtype, and the fastest copy (bytes read and written)."""
    def seconds(step):
        times = []
        for _ in range(23):
            start = now(args.device)
            step()
            times.append(now(args.device) - start)
        return statistics.median(times[3:])

    cuda, matmul = args.device.type == "cuda", 0
    for n in (4096, 8192, 16384) if cuda else (512, 1024):
        a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
        out = torch.empty_like(a)
        matmul = max(matmul, 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out)) / 1e12)
    source = torch.ones(2**32 if cuda else 2**27, dtype=torch.uint8, device=args.device)  # far beyond any cache
    target = torch.empty_like(source)
    return {"matmul_tflop_s": matmul, "copy_gb_s": 2 * len(source) / seconds(lambda: target.copy_(source)) / 1e9}


def take(way, micro_batch, args):
    """One round of a way, alone on the device: (its Job, ms of each timed step, peak GB or None, what the last step returned)."""
    torch.compiler.reset()
    gc.collect()
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    job = way.build(micro_batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started, ms = now(args.device), []
    for _ in range(WARM_UP):
        result = job.step()
        if now(args.device) - started > args.seconds:
            break
    while len(ms) < args.repeats and sum(ms) < args.seconds * 1e3:
        start = now(args.device)
        result = job.step()
        ms.append((now(args.device) - start) * 1e3)
    return job, ms, torch.cuda.max_memory_allocated() / 1e9 if cuda else None, result


def measure(part, ways, args, report):
    """Adds a row for each way to the report, in args.rounds rounds that alternate between them; returns {name: what its last step returned}."""
    rows = {way.name: {"part": part, "way": way.name, "micro_batch": way.micro_batch, "note": way.note} for way in ways}
    times, results = {way.name: [] for way in ways}, {}
    report["rows"] += rows.values()
    for way in args.rounds * ways:
        row = rows[way.name]
        while "failed" not in row:
            print(f"\r{part}: {way.name:90.90}", end="", file=sys.stderr, flush=True)
            try:
                job, ms, peak, results[way.name] = take(way, row["micro_batch"], args)
            except Exception as error:  # the other ways go on
                full = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in ("ALLOC_FAILED", "can't allocate memory"))
                reason = "out of memory" if full else first_line(error)
            else:
                times[way.name] += ms
                fill(row, job, times[way.name], peak, report)
                job = None  # and its models, before the next way's come
                break
            if full and (row["micro_batch"] or 1) > 1:
                row["note"] = "; ".join(text for text in (way.note, f"does not fit with a micro-batch of {row['micro_batch']}") if text)
                row["micro_batch"], times[way.name] = (row["micro_batch"] + 1) // 2, []
            else:
                row["failed"] = reason
        if "ms" in row and (other := rows.get(way.baseline, {}).get("ms")):
            row["speedup"] = other / row["ms"]
        write(report, args)
    print(f"\r{'':110}\r", end="", file=sys.stderr)
    return results


def fill(row, job, times, peak, report):
    """The figures of a row."""
    seconds, ceilings = statistics.median(times) / 1e3, report["ceilings"]
    row.update(ms=seconds * 1e3, ms_min=min(times), ms_max=max(times), steps=len(times), samples_s=job.samples / seconds, tokens_s=job.tokens / seconds)
    for name, value in {"tflop": job.flops / 1e12, "of_matmul": job.flops / seconds / 1e12 / ceilings["matmul_tflop_s"],
                        "of_copy": job.read / seconds / 1e9 / ceilings["copy_gb_s"], "of_floor": job.floor and seconds / job.floor}.items():
        row[name] = value or None
    if peak:
        row["peak_gb"] = max(peak, row.get("peak_gb", 0))
        row["fits_gb"] = next((card for card in CARDS if row["peak_gb"] * 1e9 < 0.95 * card * 2**30), None)


# ---------------------------------------------------------------- the report
COLUMNS = {"way": "", "micro_batch": "micro-batch", "ms": "ms/step", "range": "range", "samples_s": "samples/s", "tokens_s": "tokens/s", "peak_gb": "peak GB",
           "fits_gb": "fits GB", "of_matmul": "of matmul", "of_copy": "of copy", "of_floor": "x floor", "speedup": "x baseline", "note": ""}


def cell(row, name):
    if name == "range":
        return f"{row['ms_min']:.4g}-{row['ms_max']:.4g}" if "ms" in row else ""
    if name == "note":
        return "; ".join(text for text in (row.get("failed"), row["note"]) if text)
    value = row.get(name)
    if value is None:
        return ""
    return f"{value:.1%}" if name in ("of_matmul", "of_copy") else f"{value:.4g}" if isinstance(value, float) else str(value)


def show(part, report):
    """Prints the part's rows as a markdown table, without empty columns."""
    lines = [list(COLUMNS.values())] + [[cell(row, name) for name in COLUMNS] for row in report["rows"] if row["part"] == part]
    columns = [column for column in zip(*lines) if any(column[1:])]
    padded = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    head, *body = (f"| {' | '.join(line)} |" for line in zip(*padded))
    print("", f"{part}:", head, f"|{'|'.join('-' * (len(column[0]) + 2) for column in padded)}|", *body, sep="\n", flush=True)


def bar(report, what, value, limit, at_least=True, unit="", note=""):
    """Notes and prints whether a bar of the project is met; value None: not measured."""
    met = None if value is None else value >= limit if at_least else value <= limit
    report["bars"].append({"bar": what, "value": value, "limit": limit, "met": met, "note": note})
    figure = "not measured" if value is None else f"{value:.3g}{unit}"
    print(f"{'?   ' if met is None else 'PASS' if met else 'miss'}  {what}: {figure} (bar: {'>=' if at_least else '<='} {limit:g}{unit})"
          + f" {note}".rstrip(), flush=True)


def write(report, args):
    table = io.StringIO()
    writer = csv.DictWriter(table, FIELDS)
    writer.writeheader()
    writer.writerows(report["rows"])
    write_json(f"{args.out}.json", report)
    write_atomically(f"{args.out}.csv", table.getvalue())


# ---------------------------------------------------------------- training steps
def one_token_words(args):
    """The mini's tokenizers, of the VLM and of T5, which serve at any size as only the number of ids matters, and those ids of the VLM that are a
    word and one token of T5 too: the length of a text of them is known."""
    vlm_tokenizer, t5_tokenizer = (AutoTokenizer.from_pretrained(MINI[name]) for name in ("vlm", "t5"))
    texts = vlm_tokenizer.batch_decode([[i] for i in range(len(vlm_tokenizer))])
    return vlm_tokenizer, t5_tokenizer, [i for i, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha() and len(t5_tokenizer(text).input_ids) == 2]


def training_job(samples, worth, weights, micro_batch, load, loss, aligner, args, ours):
    """A training step of either variant. load(samples) -> what loss needs, the labels last; loss(*loaded) -> the sum over the target tokens."""
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=1e-4, fused=ours and args.device.type == "cuda")
    if ours:  # as micro_batches does it
        samples = sorted(samples, key=lambda sample: len(sample[-1]))
    chunks = [samples[at:at + micro_batch] for at in range(0, len(samples), micro_batch)]

    def step(update=True):
        loaded, total = [load(chunk) for chunk in chunks], torch.zeros((), device=args.device)
        count = sum((labels != -100).sum() for *_, labels in loaded)
        for inputs in loaded:
            part = loss(*inputs) / count
            part.backward()
            total += part.detach()
        if update:
            optimizer.step()
            optimizer.zero_grad()
        return total

    return Job(step, len(samples), *worth, 2 * len(chunks) * weights)  # forward and backward read the frozen weights once each


def new_aligner(d_vlm, t5, args):
    torch.manual_seed(args.seed)
    aligner = Aligner(d_vlm, t5.config.d_model, eps=t5.config.layer_norm_epsilon)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    return aligner.to(args.device)


def autocast_for(args, enabled=True):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=enabled and args.dtype == torch.bfloat16)


def stock_loss(t5, memory, mask, labels):
    """The stock model's own loss, as a sum."""
    return t5(encoder_outputs=(memory,), attention_mask=mask, labels=labels).loss * (labels != -100).sum()


def lvlm_job(micro_batch, args, ours=True, compile=False):
    """Eq. 2, on samples as `prepare_data.py lvlm` leaves them."""
    t5, d_vlm = t5_for(args, ours, encoder=not ours), vlm_config(args).text_config.hidden_size
    if compile:
        t5.decoder.compile(dynamic=True)
    aligner, (vlm_tokenizer, t5_tokenizer, words) = new_aligner(d_vlm, t5, args), one_token_words(args)
    g = torch.Generator().manual_seed(args.seed)
    draw = lambda: (torch.randn(args.tokens, d_vlm, generator=g).bfloat16(), torch.tensor(words)[torch.randint(len(words), (args.tokens,), generator=g)])
    samples = [thinkdiff_lvlm.split(*draw(), args, position) for position in range(args.batch)]  # [(x (s, d_vlm), y (N - s,))]
    lengths = [(len(x), min(len(y) + 1, thinkdiff_lvlm.MAX_TARGET)) for x, y in samples]
    flops = sum(t5_training_flops(t5.config, *pair) + aligner_training_flops(d_vlm, t5.config.d_model, pair[0]) for pair in lengths)

    def loss(x, mask, labels):
        with autocast_for(args):
            memory = aligner(x)
            if not ours:
                return stock_loss(t5, memory, mask, labels)
        return thinkdiff_lvlm.decode_loss(t5, memory, mask, labels)[0]

    load = partial(thinkdiff_lvlm.collate, vlm_tokenizer=vlm_tokenizer, t5_tokenizer=t5_tokenizer, device=args.device)
    return training_job(samples, (sum(map(sum, lengths)), flops), weight_bytes(t5.decoder, t5.lm_head), micro_batch, load, loss, aligner, args, ours)


def clip_job(micro_batch, args, ours=True, compile=False):
    """Eq. 4, on random pictures with captions of 6 to 20 words."""
    t5, clip = t5_for(args, ours, encoder=True), clip_for(args, ours)
    if compile:
        clip.compile(dynamic=True)
        t5.decoder.compile(dynamic=True)
    c, aligner, (vlm_tokenizer, t5_tokenizer, words) = clip.config, new_aligner(clip.config.hidden_size, t5, args), one_token_words(args)
    rng, g = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    draw = lambda: (torch.randn(3, c.image_size, c.image_size, generator=g), vlm_tokenizer.decode(rng.choices(words, k=rng.randint(6, 20))))
    samples = [(pixels, *thinkdiff_clip.split(caption, args, position)) for position, (pixels, caption) in enumerate(draw() for _ in range(args.batch))]
    image = (c.image_size // c.patch_size // 2) ** 2 + 1  # tokens of a pooled picture
    lengths = [(len(first.split()) + 1, len(rest.split()) + 1) for _, first, rest in samples]
    flops = sum(tower_flops(c) + t5_encoder_flops(t5.config, first) + t5_training_flops(t5.config, image + first, rest)
                + aligner_training_flops(c.hidden_size, t5.config.d_model, image) for first, rest in lengths)

    def load(chunk):
        pixels, ids, first_mask, labels = thinkdiff_clip.collate(chunk, t5_tokenizer, args.device)
        with autocast_for(args, not ours):
            x, t = thinkdiff_clip.image_tokens(clip, pixels), thinkdiff_clip.encode(t5, ids, first_mask)  # (B, 65, d_vlm), (B, L, d_t5)
        return x, t, torch.cat([first_mask.new_ones(x.shape[:2]), first_mask], dim=1), labels

    def loss(x, t, mask, labels):
        with autocast_for(args):
            memory = torch.cat([aligner(x), t], dim=1)
            if not ours:
                return stock_loss(t5, memory, mask, labels)
        return thinkdiff_clip.decode_loss(t5, memory, mask, labels)[0]

    worth = sum(image + first + rest for first, rest in lengths), flops
    return training_job(samples, worth, weight_bytes(t5.decoder, t5.lm_head), micro_batch, load, loss, aligner, args, ours)


def reading_job(_, args):
    """What a step of thinkdiff_lvlm.py reads, with its threads: shards on disk -> batches on the device."""
    d_vlm, folder, (vlm_tokenizer, t5_tokenizer, words) = vlm_config(args).text_config.hidden_size, tempfile.TemporaryDirectory(), one_token_words(args)
    save_file({"tokens": torch.tensor(words)[torch.randint(len(words), (512, args.tokens))].int(),
               "features": torch.randn(512, args.tokens, d_vlm).bfloat16()}, f"{folder.name}/shard-00-00000.safetensors")
    write_json(f"{folder.name}/shard-00-00000.json", {"samples": [{"index": i} for i in range(512)], "skipped": []})
    write_json(f"{folder.name}/meta.json", {"features": "generated", "tokens_only": False})
    shards, order, readers = thinkdiff_lvlm.Shards(folder.name), thinkdiff_lvlm.sample_order(512, args.seed, 0), ThreadPoolExecutor(8)

    def step(folder=folder):  # which is deleted with the step
        read = readers.map(shards.__getitem__, [next(order) for _ in range(args.batch)])
        return thinkdiff_lvlm.collate([thinkdiff_lvlm.split(*sample, args, i) for i, sample in enumerate(read)], vlm_tokenizer, t5_tokenizer, args.device)

    return Job(step, args.batch, args.batch * args.tokens)


STOCK = "baseline: stock models, fp32, eager, padded"


def training_ways(job, batch, micro_batch, args):
    args.batch = args.batch_size or batch
    options = [("ours", False, micro_batch), (f"ours, micro-batch {args.batch}", False, args.batch), ("ours --compile", True, micro_batch)]
    return [Way(STOCK, partial(job, args=args, ours=False), micro_batch=args.batch),
            *(Way(name, partial(job, args=args, compile=compile), STOCK, min(size, args.batch)) for name, compile, size in options
              if not (compile and args.no_compile))]


def train_lvlm(args, report):
    ways = training_ways(lvlm_job, 96, 24, args)  # the paper's batch; the defaults of train
    measure("train-lvlm", [*ways, Way("reading its data alone", partial(reading_job, args=args),
                                      note="with a warm page cache; training reads while it computes")], args, report)
    show("train-lvlm", report)
    ours = min((row for row in report["rows"] if row["part"] == "train-lvlm" and row["way"].startswith("ours") and "ms" in row),
               key=lambda row: row["ms"], default={})
    bar(report, f"LVLM training step, batch {args.batch}, against the baseline", ours.get("speedup"), 3, unit="x", note=ours.get("way", ""))
    bar(report, "LVLM training step, share of the matmul ceiling", ours.get("of_matmul"), 0.45, note=ours.get("way", ""))
    bar(report, "25,000 steps of 96", 25000 * ours["ms"] / 3.6e6 if ours and args.batch == 96 else None, 2, at_least=False, unit=" h")


def train_clip(args, report):
    measure("train-clip", training_ways(clip_job, 168, 42, args), args, report)
    show("train-clip", report)


# ---------------------------------------------------------------- features
def vlm_inputs(config, batch, side, device, dtype):
    """What the processor makes of `batch` questions about a picture of side px: random pixels, and random words around the true placeholders."""
    v, grid = config.vision_config, side // config.vision_config.patch_size
    words = lambda count: torch.randint(900, (count,)).tolist()  # below the special tokens of either size
    image = [config.vision_start_token_id, *[config.image_token_id] * (grid // v.spatial_merge_size) ** 2, config.vision_end_token_id]
    ids = torch.tensor([[*words(15), *image, *words(10)] for _ in range(batch)])
    pixels = torch.randn(batch * grid**2, v.in_channels * v.temporal_patch_size * v.patch_size**2, dtype=dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == config.image_token_id).long(),
              "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, grid, grid]] * batch)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def stock_features(model, inputs, tokens, **sampling):
    """The stock way: generate keeps the states of all layers. -> tokens (B, N), features (B, N, d_vlm)."""
    out = model.generate(**inputs, max_new_tokens=tokens, eos_token_id=None, output_hidden_states=True, return_dict_in_generate=True, **sampling)
    return out.sequences[:, -tokens:], torch.stack([states[-1][:, -1] for states in out.hidden_states], dim=1)


def features_job(_, args, report, how, batch, quantize=False):
    """`batch` pictures described in args.tokens tokens, with features. The floor: prefill at the matmul ceiling, then each token at the copy
    ceiling, as it reads all weights and the keys and values of all tokens before it (or at the matmul ceiling, if the batch is so large)."""
    model, config = vlm_for(args, quantize), vlm_config(args)
    c, patches = config.text_config, (args.picture // config.vision_config.patch_size) ** 2
    inputs, known = vlm_inputs(config, batch, args.picture, args.device, args.dtype), torch.randint(900, (batch, args.tokens), device=args.device)
    prompt, generate = inputs["input_ids"].shape[1], lambda: generate_with_features(model, inputs, args.tokens, seeds=range(batch))
    prefill, decoding, forced = (batch * flops for flops in describe_flops(config, prompt, args.tokens, patches))
    weights = weight_bytes(model.model.language_model.layers, model.lm_head)
    cached = batch * 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * args.dtype.itemsize  # bytes a position
    read = sum(weights + cached * (prompt + i) for i in range(1, args.tokens))
    matmul, copying = report["ceilings"]["matmul_tflop_s"] * 1e12, report["ceilings"]["copy_gb_s"] * 1e9
    step, flops, read, floor = {
        "stock": (lambda: stock_features(model, inputs, args.tokens, do_sample=True, temperature=0.6, top_p=0.9, top_k=0), prefill + decoding, read, True),
        "hook": (generate, prefill + decoding, read, True),
        "two passes": (lambda: teacher_forced_features(model, inputs, generate()[0]), prefill + decoding + forced, read + weights, True),
        "forced": (lambda: teacher_forced_features(model, inputs, known), forced, 0, False)}[how]
    seconds = prefill / matmul + max(read / copying, decoding / matmul) if floor else forced / matmul
    return Job(step, batch, batch * args.tokens, flops, 0 if quantize else read + weights, seconds)


def recomputing_job(micro_batch, args):
    """A training step from --tokens-only data: a teacher-forced pass of the VLM for each micro-batch first, as `recompute` does it."""
    job, model, config = lvlm_job(micro_batch, args), vlm_for(args), vlm_config(args)
    inputs = vlm_inputs(config, micro_batch, args.picture, args.device, args.dtype)
    known = torch.randint(900, (micro_batch, args.tokens), device=args.device)

    def step():
        for _ in range(0, args.batch, micro_batch):
            teacher_forced_features(model, inputs, known).bfloat16()
        return job.step()

    return job._replace(step=step)


def features(args, report):
    ways = []
    for batch in args.feature_batches:
        way = lambda how: partial(features_job, args=args, report=report, how=how, batch=batch)
        stock = f"batch {batch}: stock generate, output_hidden_states"
        ways += [Way(stock, way("stock")), Way(f"batch {batch}: generate with a hook (default)", way("hook"), stock),
                 Way(f"batch {batch}: generate, then a teacher-forced pass", way("two passes"), stock),
                 Way(f"batch {batch}: teacher-forced pass alone", way("forced"), note="the tokens are known (--backend vllm)")]
    args.batch = args.batch_size or 96
    read, micro_batch = "training step, features read", min(24, args.batch)
    ways += [Way(read, partial(lvlm_job, args=args), micro_batch=micro_batch),
             Way("training step, features recomputed (--tokens-only)", partial(recomputing_job, args=args), read, micro_batch)]
    measure("features", ways, args, report)
    show("features", report)
    for batch in args.feature_batches:
        rows = [row for row in report["rows"] if row["way"].startswith(f"batch {batch}:") and "ms" in row and "alone" not in row["way"]]
        default = next((row for row in rows if "default" in row["way"]), {})
        fastest = max((row["samples_s"] for row in rows), default=None)
        bar(report, f"features, batch {batch}: the default against the fastest way", default["samples_s"] / fastest if default else None, 0.97, unit="x")
        bar(report, f"features, batch {batch}: the default against the floor", default.get("of_floor"), 1.2, at_least=False, unit="x")


# ---------------------------------------------------------------- FLUX
CACHE = 0.1  # --cache's threshold
FAST = {"--compile": {"compile": True}, f"--cache {CACHE}": {"cache": CACHE}, f"--compile --cache {CACHE}": {"compile": True, "cache": CACHE}}
SMALL = {"--offload": {"offload": True}, "--quantize": {"quantize": True}, "--quantize --offload": {"quantize": True, "offload": True}}


def flux_job(_, args, px, batch, stock=False, t5_encoder=False, **options):
    """Pictures from prompt embeddings: of a caption in the miniature; at full size, where the weights are random too, of random numbers."""
    if args.size == "full":
        prompt = torch.randn(batch, 128, FLUX_DEV["joint_attention_dim"], generator=torch.Generator().manual_seed(args.seed)).to(args.device, args.dtype)
    else:
        prompt = thinkdiff_lvlm.text_embeds(flux_for(args, t5_encoder=True), ["A picture of a red car."] * batch, 48)
    pipe, seeds = flux_for(args, t5_encoder=stock or t5_encoder, **options), range(batch)
    image = (px // pipe.vae_scale_factor // 2) ** 2  # tokens

    @torch.no_grad()
    def stock_step():
        ids = pipe.tokenizer([""] * batch, padding="max_length", return_tensors="pt").input_ids.to(args.device)
        return pipe(prompt_embeds=prompt, pooled_prompt_embeds=pipe.text_encoder(ids).pooler_output, height=px, width=px, guidance_scale=3.5,
                    num_inference_steps=args.flux_steps, generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images

    step = stock_step if stock else lambda: thinkdiff_lvlm.draw(pipe, prompt, [""] * batch, seeds, px, args.flux_steps, 3.5)
    return Job(step, batch, batch * image * args.flux_steps, batch * args.flux_steps * flux_flops(pipe.transformer.config, image, prompt.shape[1]),
               0 if options.get("quantize") else args.flux_steps * weight_bytes(pipe.transformer))


def difference(images, others):
    """In words, between two lists of pictures."""
    a, b = (np.stack([np.asarray(image, dtype=np.float64) for image in some]) for some in (images, others))
    if (a == b).all():
        return "the same picture, bit for bit"
    return f"differs by {abs(a - b).mean():.2g} of 255 on average, PSNR {10 * np.log10(255**2 / ((a - b) ** 2).mean()):.1f} dB"


def compare_pictures(part, ways, results, args, report):
    """Notes what became of FLUX's pictures in comparison with the baseline's; returns the part's rows by name."""
    rows = {row["way"]: row for row in report["rows"] if row["part"] == part}
    for way in ways:
        if " px" in way.name and way.name in results and way.baseline in results:
            rows[way.name]["note"] = difference(results[way.name], results[way.baseline])
            if args.size == "full" and "--cache" in way.name:
                rows[way.name]["note"] += "; random weights: the real FLUX's gain and change are others"
    return rows


def flux(args, report):
    ways = []
    for px in args.flux_sizes:
        for batch in args.flux_batches:
            name, way = f"{px} px, batch {batch}: ", partial(partial, flux_job, args=args, px=px, batch=batch)
            ways += [Way(name + "stock FluxPipeline", way(stock=True)), Way(name + "ours", way(), name + "stock FluxPipeline"),
                     *(Way(name + f"ours {flag}", way(**options), name + "stock FluxPipeline") for flag, options in FAST.items()
                       if batch == min(args.flux_batches) and not (args.no_compile and "compile" in options))]
    results = measure("flux", ways, args, report)
    rows = compare_pictures("flux", ways, results, args, report)
    show("flux", report)
    px, batch = args.flux_sizes[0], min(args.flux_batches)
    same = [rows[f"{px} px, batch {batch}: ours"]["note"] for batch in args.flux_batches]
    bar(report, f"FLUX {px} px without flags: share of the batch sizes with stock's pictures, bit for bit",
        sum(note.endswith("bit for bit") for note in same) / len(same) if all(same) else None, 1)
    fast = max((row for way, row in rows.items() if way.startswith(f"{px} px, batch {batch}: ours --") and "speedup" in row), key=lambda row: row["speedup"],
               default={"way": "", "note": ""})
    bar(report, f"FLUX {px} px with speed flags", fast.get("speedup"), 1.5, unit="x", note=f"{fast['way']}, {fast['note']}".strip(", "))


# ---------------------------------------------------------------- memory: what fits where
def memory(args, report):
    """Peaks of the whole, weights included; `x baseline` is the speed against the same thing without the flag."""
    args.batch, px = 24, args.flux_sizes[0]
    training, vlm, plain = "LVLM training, 24 samples at once", "VLM, a picture described", f"FLUX, {px} px"
    describe, draw = partial(partial, features_job, args=args, report=report, how="hook", batch=1), partial(partial, flux_job, args=args, px=px, batch=1)
    ways = [
        Way(training, partial(lvlm_job, args=args), f"{training}: {STOCK}", 24),
        Way(f"{training}: {STOCK}", partial(lvlm_job, args=args, ours=False), micro_batch=24),
        Way(vlm, describe()), Way(f"{vlm} --quantize", describe(quantize=True), vlm),
        Way(plain, draw()), Way(f"{plain}, with its T5 (--relay)", draw(t5_encoder=True), plain),
        *(Way(f"{plain} {flag}", draw(**options), plain) for flag, options in SMALL.items())]
    ours = compare_pictures("memory", ways, measure("memory", ways, args, report), args, report)[training]
    show("memory", report)
    bar(report, "LVLM training, peak memory at 24 samples", ours.get("peak_gb") if ours["micro_batch"] == 24 else None, 20, at_least=False, unit=" GB")


# ---------------------------------------------------------------- command line
PARTS = {"train-lvlm": train_lvlm, "train-clip": train_clip, "features": features, "flux": flux, "memory": memory}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    shown = "(default: %(default)s)"
    p.add_argument("--size", choices=("mini", "full"), default="mini", help=f"the miniature's models, or the true architectures {shown}")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    p.add_argument("--batch-size", type=positive, help="samples of a training step (default: the paper's 96, and 168 for ThinkDiff-CLIP)")
    p.add_argument("--tokens", type=positive, default=64, help=f"tokens in which a picture is described {shown}")
    p.add_argument("--picture", type=positive, default=504, help="px of a picture that is described; 504 is 324 tokens (default: 504, mini 64)")
    p.add_argument("--feature-batches", type=positive, nargs="+", default=[32, 128], help="pictures described at once (default: 32 128, mini 8 32)")
    p.add_argument("--flux-sizes", type=positive, nargs="+", default=[512, 1024], help="px of a picture that is drawn (default: 512 1024, mini 64 128)")
    p.add_argument("--flux-batches", type=positive, nargs="+", default=[1, 2, 4, 8], help="pictures drawn at once (default: 1 2 4 8, mini 1 4)")
    p.add_argument("--flux-steps", type=positive, default=28, help=f"steps of a picture {shown}")
    p.add_argument("--no-compile", action="store_true", help="leave out the ways with --compile, which take minutes")
    p.add_argument("--rounds", type=positive, default=2, help=f"times that each way is built and measured {shown}")
    p.add_argument("--repeats", type=positive, default=5, help=f"timed steps of a round {shown}")
    p.add_argument("--seconds", type=float, default=30, help="after which a round of a way begins no further step (default: 30, mini 5)")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of our weights (default: bfloat16 on a GPU, float32 on the CPU)")
    p.add_argument("--seed", type=int, default=0, help=f"of samples and splits {shown}")
    p.add_argument("--out", help="where to write, without ending (default: results/bench-SIZE)")
    p.set_defaults(masking="random", features="generated")  # of thinkdiff_lvlm.py train
    if p.parse_args().size == "mini":
        p.set_defaults(picture=64, feature_batches=[8, 32], flux_sizes=[64, 128], flux_batches=[1, 4], seconds=5)
    args = p.parse_args()
    args.out = args.out or f"results/bench-{args.size}"
    args.device, dtype = pick_device()
    args.dtype = getattr(torch, args.dtype) if args.dtype else dtype
    import diffusers
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
    cuda = args.device.type == "cuda"
    report = {"about": {
        "command": " ".join(sys.argv), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "size": args.size,
        "device": f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB" if cuda else
                  f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        "dtype": str(args.dtype), "seed": args.seed, **{module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }, "ceilings": measure_ceilings(args), "rows": [], "bars": []}
    for name, value in {**report["about"], **report["ceilings"]}.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    if args.size == "mini":
        print("The bars are those of full size on an H200; the miniature only shows that everything runs.")
    for part in args.parts:
        try:
            PARTS[part](args, report)
        except Exception as error:  # the other parts go on
            report["rows"].append({"part": part, "way": "(the part itself)", "failed": first_line(error), "note": ""})
            print(f"{part}: {first_line(error)}", file=sys.stderr)
        write(report, args)
    print(f"\nwritten: {args.out}.json, {args.out}.csv")


if __name__ == "__main__":
    run(main)
