"""What every script that generates images shares: diffusers pipelines with flags for memory and
speed, the contexts asked for, and saving without overwriting."""
import argparse
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
import transformers
from PIL.PngImagePlugin import PngInfo
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

import common
import models
from common import MINI, MODELS, UserError, first_line, number, positive

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
image_weight = number(float, -100, 100)
TORCHAO = "torchao==0.18.0"
# diffusers is imported below, too late for common.cli_main to silence it
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# ------------------------------------------------------------------------------------------- flags
# flag, type, full size, miniature, [source] and meaning
FLUX_FLAGS = [
    ("--flux", str, MODELS["flux"], MINI["flux"], "path or hub name of a FLUX"),
    ("--seed", common.seed, 0, 0, "seed of the first image's noise; the next ones count up"),
    ("--steps", positive, 28, 28, "[release] denoising steps"),
    ("--guidance", number(float, 0), 3.5, 3.5,
     "[release] FLUX's distilled guidance (the miniature FLUX has none and ignores it); of the "
     "other decoders classifier-free guidance"),
    ("--true-cfg", number(float, 1), 1.0, 3.0,
     "[ours] classifier-free guidance of FLUX away from the empty prompt, at twice the cost; 1: "
     "none, as FLUX.1-dev has its guidance built in"),
]
# what the other decoders have in place of FLUX's defaults (size None: the model's own) [diffusers]
DEFAULTS = {
    "pixart": {"steps": 20, "guidance": 4.5, "size": 1024},
    "sd3": {"steps": 28, "guidance": 7.0, "size": 1024},
    "chroma": {"steps": 35, "guidance": 5.0, "size": 1024},
    "cogvideox": {"steps": 50, "guidance": 6.0, "size": None},
    "ltx": {"steps": 50, "guidance": 3.0, "size": None, "fps": 25},
}
MINI_DEFAULTS = {**DEFAULTS, "pixart": {"steps": 28, "guidance": 3.0, "size": 64}}
DECODERS = ("flux", *DEFAULTS)
# tokens of the longest prompt that each was trained with; FLUX, trained with 512, gets more from
# many images, as in the paper
LONGEST = {"pixart": 300, "sd3": 256, "chroma": 512, "cogvideox": 226, "ltx": 128}
VIDEOS = ("cogvideox", "ltx")
# those whose text mask hides padding. Chroma's only weakens it: diffusers 0.42 adds its ones and
# zeros to the attention scores
MASKED = ("pixart", "ltx")
OTHER_ENCODERS = {
    "wan": "umT5", "auraflow": "umT5", "hunyuanvideo": "Qwen2.5-VL and ByT5", "cosmos": "T5-11B",
    "prx": "T5Gemma", "flux2": "Mistral", "qwenimage": "Qwen2.5-VL", "zimage": "Qwen3",
}


def decoder_name(text):
    """An argparse type: one of DECODERS. Names the text encoder of those that cannot work."""
    name = re.sub("[^a-z0-9]", "", common.text(text).lower())
    if name in OTHER_ENCODERS:
        raise argparse.ArgumentTypeError(
            f"{text} reads {OTHER_ENCODERS[name]}, and an aligner leads to T5 v1.1-XXL: choose "
            f"{', '.join(DECODERS)}")
    if name not in DECODERS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DECODERS)}")
    return name


DECODER_FLAGS = [
    ("--decoder", decoder_name, "flux", "flux",
     f"what draws: {', '.join(DECODERS)}; the last two draw videos. Each has its own --steps, "
     "--guidance and --size"),
    ("--pixart", str, MODELS["pixart"], MINI["pixart"], "path or hub name"),
    ("--sd3", str, MODELS["sd3"], MODELS["sd3"], "path or hub name"),
    ("--chroma", str, MODELS["chroma"], MODELS["chroma"], "path or hub name"),
    ("--cogvideox", str, MODELS["cogvideox"], MODELS["cogvideox"], "path or hub name"),
    ("--ltx", str, MODELS["ltx"], MODELS["ltx"], "path or hub name"),
]
VIDEO_FLAGS = [
    ("--frames", number(int, 1, 10_001, step=4), 49, 49,
     "[ours] frames of a video: 4 k + 1; of ltx 8 k + 1"),
    ("--fps", positive, 8, 8, "[ours] frames a second of a video"),
]
OUTPUT_FLAGS = [
    ("--out", Path, None, None, "image, or folder with --batch; default: outputs/NNNN.png"),
    ("--overwrite", bool, False, False, "allow replacing existing images"),
    ("--num-images", positive, 1, 1, "images for each context, with seeds counting up"),
    ("--batch-size", positive, 1, 32, "contexts, and then images, computed together"),
]
SPEED = {"memory and speed (all off: the stock pipeline's images, bit for bit)": [
    ("--offload", bool, False, False,
     "keep submodules in main memory and move each to the GPU on demand: less GPU memory, slower, "
     "the same images"),
    ("--quantize", bool, False, False,
     "8-bit weights of the VLM, the decoder's transformer and its T5 (torchao int8 weight-only; "
     f"pip install {TORCHAO}): half of bf16's memory; images change slightly"),
    ("--compile", bool, False, False,
     "torch.compile the transformer's blocks: faster, minutes to start and for each new shape; "
     "images change by rounding"),
    ("--cache", number(float, 0, above=True), None, None,
     "first-block cache: skip the other blocks in steps where the first one's output changed by "
     "less than this share; a larger one is faster and less faithful; the images of a batch skip "
     "together, so that each depends on the others"),
]}


class Interleave(argparse.Action):
    """Keeps --text and --image in the order in which they were typed, in args.context."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.context = [*namespace.context, {self.dest: value}]


def add_context_flags(parser, variant, example_line):
    """Adds --text, --image and --batch; --mini has a default context."""
    example = common.EXAMPLE / f"{variant}.jsonl" if common.is_mini() else None
    parser.set_defaults(context=[], example=example)
    group = parser.add_argument_group("context")
    for flag, kind in (("--text", common.utf8), ("--image", common.text)):
        group.add_argument(flag, action=Interleave, type=kind, default=argparse.SUPPRESS,
                           help="a part of the context, in reading order (repeat)")
    group.add_argument("--batch", metavar="FILE.jsonl", type=common.text, help="contexts, one a "
                       f"line, such as {example_line}, also \"seed\" and \"out\", a name inside of "
                       "--out; image paths are relative to the file")


def add_decoder_flags(parser, video=True):
    """Adds DECODER_FLAGS, and makes the defaults those of the decoder on the command line."""
    group = parser.add_argument_group("decoder")
    for row in DECODER_FLAGS + VIDEO_FLAGS * video:
        common.add_flag(group, *row)
    if video:
        group.add_argument("--video", dest="decoder", action="store_const", const="cogvideox",
                           default=argparse.SUPPRESS, help="short for --decoder cogvideox")
    given = " ".join(sys.argv).replace("=", " ").replace("--video", "--decoder cogvideox")
    for name, defaults in (MINI_DEFAULTS if common.is_mini() else DEFAULTS).items():
        if re.search(rf"--decoder {name}\b", given):
            parser.set_defaults(**defaults)


def add_composition_flags(parser):
    """Adds --image-weight."""
    group = parser.add_argument_group("composition")
    group.add_argument("--image-weight", action="append", type=image_weight, default=[],
                       help="factor of an image's aligned tokens, one for each --image; 1 is the "
                       "paper's, FLUX was trained for no other")


def pipeline_options(args):
    """The flags as load_pipeline takes them. Raises UserError for one that cannot work here.

    Call it before any model is loaded."""
    if args.offload and not torch.cuda.is_available():
        raise UserError("--offload moves models between main memory and a GPU, and there is no GPU "
                        "here: leave it out")
    if args.quantize and not importlib.util.find_spec("torchao"):
        raise UserError(f"--quantize needs one more package: pip install {TORCHAO}")
    if args.decoder in VIDEOS:
        if not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
            raise UserError("videos need two more packages: pip install imageio==2.38.1 "
                            "imageio-ffmpeg==0.8.1")
    if args.decoder == "ltx" and args.frames % 8 != 1:
        raise UserError(f"--frames {args.frames}: LTX draws 8 k + 1 frames, such as 49 or 57")
    return {name: vars(args)[name] for name in ("offload", "quantize", "compile", "cache")}


# --------------------------------------------------------------------------------------- pipelines
def int8_weights():
    """torchao's config of --quantize: int8 weights with a scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig
    return Int8WeightOnlyConfig()


def int8(quantize):
    """--quantize as models of transformers take it."""
    if not quantize:
        return {}
    return {"quantization_config": transformers.TorchAoConfig(int8_weights())}


# {pipeline: its text encoders}, of which diffusers would not notice missing weights
TEXT_ENCODERS = {
    "FluxPipeline": {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
    "PixArtSigmaPipeline": {"text_encoder": T5EncoderModel},
    "StableDiffusion3Pipeline": {
        "text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel},
    "ChromaPipeline": {"text_encoder": T5EncoderModel},
    "CogVideoXPipeline": {"text_encoder": T5EncoderModel},
    "LTXPipeline": {"text_encoder": T5EncoderModel},
}
PIPELINES = dict(zip(DECODERS, TEXT_ENCODERS, strict=True))


def load_pipeline(kind, path, device, dtype, offload=False, quantize=False, compile=False,
                  cache=None, **parts):
    """The diffusers pipeline of class `kind` with pipeline_options. parts: NAME=None omits one."""
    import diffusers
    for name in TEXT_ENCODERS[kind].keys() - parts.keys():
        model = TEXT_ENCODERS[kind][name]
        parts[name] = common.pretrained_model(
            model, path, subfolder=name, dtype=dtype, device_map="cpu" if offload else device,
            **int8(quantize and model is T5EncoderModel))
    if quantize:
        transformer = diffusers.TorchAoConfig(int8_weights())
        parts["quantization_config"] = diffusers.PipelineQuantizationConfig(
            quant_mapping={"transformer": transformer})
    with common.loading(path):
        pipe = getattr(diffusers, kind).from_pretrained(path, dtype=dtype, **parts)
        pipe.set_progress_bar_config(disable=True)
        # missing weights cannot be moved to the device
        return speed_up(pipe, device, offload, compile, cache)


def speed_up(pipe, device, offload=False, compile=False, cache=None):
    """The pipeline on the device, with those of pipeline_options that need no other weights."""
    transformer = pipe.transformer
    if compile:
        # Block by block: blocks of one class share a graph. Before the cache, whose hooks differ.
        single_blocks = getattr(transformer, "single_transformer_blocks", [])
        for block in [*transformer.transformer_blocks, *single_blocks]:
            block.forward = torch.compile(block.forward)
    if cache:
        from diffusers import FirstBlockCacheConfig
        transformer.enable_cache(FirstBlockCacheConfig(threshold=cache))
    if not offload:
        return pipe.to(device)
    # from now on the pipeline moves its submodules itself
    pipe.enable_model_cpu_offload(device=device)
    return pipe


def load_flux(path, device, dtype, t5_encoder=False, **options):
    """FluxPipeline; its T5 encoder (9.5 GB in bf16 at full size) is loaded only for texts."""
    parts = {} if t5_encoder else {"text_encoder_2": None, "tokenizer_2": None}
    return load_pipeline("FluxPipeline", path, device, dtype, **options, **parts)


def load_decoder(args, device, dtype, t5_encoder):
    """The pipeline of --decoder. t5_encoder: whether FLUX needs its T5's; the others always do, as
    classifier-free guidance leads away from the empty prompt."""
    options = pipeline_options(args)
    if args.decoder == "flux":
        return load_flux(args.flux, device, dtype, t5_encoder, **options)
    path = vars(args)[args.decoder]
    return load_pipeline(PIPELINES[args.decoder], path, device, dtype, **options)


def prompt_width(args):
    """d_t5, the width of the prompts that the decoder reads; loads the config alone."""
    from diffusers import FluxTransformer2DModel
    path = vars(args)[args.decoder]
    with common.loading(path):
        config = FluxTransformer2DModel.load_config(path, subfolder="transformer")
        # FLUX, SD3, Chroma; CogVideoX; PixArt, LTX
        return (config.get("joint_attention_dim") or config.get("text_embed_dim")
                or config["caption_channels"])


@torch.no_grad()
def t5_embeds(pipe, texts, max_length):
    """LLM_E(T): B texts through the pipeline's T5 encoder, padded -> (B, max_length, d_t5)."""
    # of FLUX the second, of SD3 the third, of the others the only one
    number = max(name for name in pipe.components if name.startswith("tokenizer"))[9:]
    tokenizer = pipe.components[f"tokenizer{number}"]
    for text in texts:
        n_tokens = len(tokenizer(text).input_ids)
        if n_tokens > max_length:
            print(f"the text {text[:40]!r} has {n_tokens} T5 tokens, the last "
                  f"{n_tokens - max_length} are cut (FLUX reads --t5-length)", file=sys.stderr)
    tokens = tokenizer(texts, padding="max_length", max_length=max_length, truncation=True,
                       return_tensors="pt")
    encoder = pipe.components[f"text_encoder{number}"]
    # without a mask, as FLUX was trained
    return encoder(tokens.input_ids.to(pipe._execution_device))[0].to(encoder.dtype)


def text_embeds(pipe, text, args, n_image_tokens=0):
    """T5's outputs for a text (n, d_t5), as the decoder reads them behind n_image_tokens.

    FLUX and SD3: padded to --t5-length. CogVideoX: to what the images leave of its 226 (appendix
    D); UserError if they leave nothing. The others read no padding: the text's own tokens."""
    length, n_tokens = args.t5_length, None
    if args.decoder not in ("flux", "sd3"):
        length = LONGEST[args.decoder] - n_image_tokens
    if length < 1:
        raise UserError(f"the pictures are {n_image_tokens} tokens, but {args.decoder} reads "
                        f"{LONGEST[args.decoder]}: give fewer")
    if args.decoder in ("chroma", *MASKED):
        n_tokens = len(pipe.tokenizer(text).input_ids)
    if args.decoder in ("pixart", "chroma"):
        # T5 itself reads no padding here, for LTX it does
        length = min(length, n_tokens)
    return t5_embeds(pipe, [text], length)[0][:n_tokens]


# ---------------------------------------------------------------------------------- the decoders
# Each function returns what its pipeline is called with, for B prompts, a list of (n, d_t5), and B
# texts for CLIP, "" where the prompt holds no text. All read T5 v1.1-XXL's space (d_t5 = 4096):
#
#             prompt                                    lengths       guidance
#   flux      x'; pooled CLIP of the text               equal         built in; --true-cfg
#   pixart    x'                                        any, masked   classifier-free (all below)
#   sd3       77 tokens of two CLIPs, x'; both pooled   equal
#   chroma    x', a padding token                       equal
#   cogvideox x', T5's empty text, together 226         equal
#   ltx       x'                                        any, masked
def padded(prompts):
    """Prompts [(n, d_t5)] -> (B, N, d_t5), zeros behind them, and the mask (B, N) bool."""
    mask = [torch.ones(len(prompt), dtype=torch.bool, device=prompt.device) for prompt in prompts]
    return pad_sequence(prompts, batch_first=True), pad_sequence(mask, batch_first=True)


def flux_inputs(pipe, prompts, texts, true_cfg):
    """Prompts of equal lengths; true_cfg > 1 leads away from an empty prompt as long as they."""
    x = torch.stack(prompts)  # (B, N, d_t5)
    inputs = {"prompt_embeds": x, "pooled_prompt_embeds": pipe._get_clip_prompt_embeds(texts)}
    if true_cfg > 1:
        # padded to N tokens
        empty = t5_embeds(pipe, [""], x.shape[1])  # (1, N, d_t5)
        pooled = pipe._get_clip_prompt_embeds([""] * len(texts))
        inputs |= {"true_cfg_scale": true_cfg, "negative_pooled_prompt_embeds": pooled,
                   "negative_prompt_embeds": empty.expand_as(x)}
    return inputs


def pixart_inputs(pipe, prompts, *_):
    """Prompts of any lengths, and their mask."""
    x, mask = padded(prompts)
    # binning would draw another size and resize the image
    return {"prompt_embeds": x, "prompt_attention_mask": mask.long(), "clean_caption": False,
            "use_resolution_binning": False}


def sd3_inputs(pipe, prompts, texts, _):
    """CLIPs' tokens in front of prompts of equal lengths."""
    x = torch.stack(prompts)  # (B, N, d_t5)
    n = x.shape[1]
    both, _, pooled, _ = pipe.encode_prompt(
        texts, None, [""] * len(texts), do_classifier_free_guidance=False, max_sequence_length=n)
    # of [CLIPs' 77 tokens ; T5's N], CLIPs' are zero from their width on
    x = torch.cat([both[:, :-n], x], dim=1)  # (B, 77 + N, d_t5)
    return {"prompt_embeds": x, "pooled_prompt_embeds": pooled, "max_sequence_length": n}


def chroma_inputs(pipe, prompts, *_):
    """A padding token behind prompts of equal lengths."""
    # it was trained with the first padding token unmasked: that behind the empty prompt's EOS
    padding = pipe._get_t5_prompt_embeds([""], max_sequence_length=2)[0][0, 1:]  # (1, d_t5)
    x = torch.stack([torch.cat([prompt, padding.to(prompt.dtype)]) for prompt in prompts])
    return {"prompt_embeds": x, "prompt_attention_mask": torch.ones_like(x[..., 0])}


def cogvideox_inputs(pipe, prompts, *_):
    """T5's outputs for the empty text fill each prompt to 226 tokens."""
    longest = pipe.transformer.config.max_text_seq_length
    x = torch.stack([torch.cat([prompt, t5_embeds(pipe, [""], longest - len(prompt))[0]])
                     if len(prompt) < longest else prompt for prompt in prompts])
    return {"prompt_embeds": x, "max_sequence_length": longest}


def ltx_inputs(pipe, prompts, *_):
    """Prompts of any lengths, and their mask."""
    x, mask = padded(prompts)
    return {"prompt_embeds": x, "prompt_attention_mask": mask, "max_sequence_length": x.shape[1]}


INPUTS = dict(zip(TEXT_ENCODERS, (flux_inputs, pixart_inputs, sd3_inputs, chroma_inputs,
                                  cogvideox_inputs, ltx_inputs), strict=True))


@torch.no_grad()
def generate_images(pipe, prompts, texts, seeds, size, steps, guidance, true_cfg=1.0, **video):
    """B PIL images, or lists of PIL images, of size x size px from prompts [(n, d_t5)] (Eq. 3, 5).

    prompts may be one tensor (B, N, d_t5). texts: B strings for CLIP, "" where the prompt holds no
    text. One seed for each image, so that it does not depend on its batch. size None: the model's
    own. true_cfg: of FLUX alone. video: num_frames, and frame_rate for LTX."""
    prompts = [prompt.to(pipe.transformer.dtype) for prompt in prompts]
    inputs = INPUTS[type(pipe).__name__](pipe, prompts, texts, true_cfg)
    if size:
        inputs |= {"height": size, "width": size}
    drawn = pipe(**inputs, **video, num_inference_steps=steps, guidance_scale=guidance,
                 generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    return drawn.frames if video else drawn.images


def equal_lengths(jobs, size, desc="draw", decoder="flux"):
    """Batches of at most `size` jobs whose first items, the prompts, have equal lengths; of any
    lengths for a decoder with a text mask. Shows progress.

    Without a mask a padded prompt would be another prompt."""
    jobs = sorted(jobs, key=lambda job: len(job[0]))
    bar = tqdm(total=len(jobs), desc=desc, unit="image", disable=len(jobs) < 2)
    while jobs:
        batch = [job for job in jobs[:size]
                 if len(job[0]) == len(jobs[0][0]) or decoder in MASKED]
        yield batch
        bar.update(len(batch))
        jobs = jobs[len(batch):]
    bar.close()


# ---------------------------------------------------------------------------------------- contexts
def read_contexts(args, read, example_line):
    """The contexts asked for, as dicts. Lines of --batch that cannot be drawn are skipped.

    A context is read(item, folder, args), with "out", "names" and "seed" added. item: a line of
    --batch, or of args.example, the miniature's; or the flags --text and --image. Image paths are
    relative to folder, names of --batch to --out. All files are opened and all names checked here,
    before any model is loaded. Raises UserError if no context is left."""
    suffixes = (".mp4",) if args.decoder in VIDEOS else tuple(FORMATS)
    images = [part["image"] for part in args.context if "image" in part]
    text = " ".join(part["text"] for part in args.context if "text" in part)
    asked = bool(images or text.strip())
    file = args.batch or (args.example if not asked else None)
    if not (file or asked):
        raise UserError("no context: give --text and --image, --batch FILE.jsonl, or --mini "
                        "for the shipped example")
    lines = read_lines(file) if file else [(1, None)]
    if args.batch:
        args.out = args.out or Path("outputs")
        common.lock_folder(args.out)
    args.out = args.out or next_name(Path(f"outputs/0001{suffixes[0]}"))
    args.skipped, taken = 0, set()

    def complete(c):
        item, out = {"context": args.context, "image": images, "text": text}, args.out
        if file:
            item = read_line(c["json"], example_line)
        if args.batch:
            out = args.out / item.get("out", f"{c['line']:05d}{suffixes[0]}")
        else:
            print("context:", json.dumps(args.context or item, ensure_ascii=False))
        c |= read(item, Path(file or "").parent, args)
        c |= {"out": out, "names": output_names(out, args, suffixes, taken),
              "seed": common.seed(item.get("seed", args.seed))}
    return usable([{"line": n_line, "json": line} for n_line, line in lines], complete, args)


def usable(contexts, use, args):
    """The contexts for which use(context) raises nothing. Lines of --batch for which it does are
    named, and counted in args.skipped. Raises UserError if none is left."""
    left = []
    for c in contexts:
        try:
            use(c)
            left.append(c)
        # JSON, file names, tokenizers and chat templates raise many kinds
        except Exception as error:
            if not args.batch:
                raise UserError(first_line(error)) from error
            args.skipped += 1
            print(f"skipped {args.batch} line {c['line']}: {first_line(error)}", file=sys.stderr)
    if not left:
        raise UserError(f"{args.batch} holds no context that can be drawn")
    return left


def read_lines(path):
    """[(number of the line, bytes)] of the lines of a JSONL file that are not blank."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [(n_line, line) for n_line, line in enumerate(lines, 1) if line.strip()]


def read_line(line, example_line):
    """The JSON object in a line (bytes): some keys of example_line, "seed", "out", and values like
    theirs. Raises UserError, or ValueError for what is no Unicode."""
    try:
        item = {**json.loads(line.decode("utf-8-sig"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"it is no JSON object like {example_line} ({first_line(error)})") from None
    # refuses halves of surrogate pairs, NaN and Infinity
    json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
    example = {**json.loads(example_line), "seed": 0, "out": "a.png"}
    for key, value in item.items():
        if key not in example or not is_like(value, example[key]):
            raise UserError(f"{json.dumps({key: value})[:80]} is not like {json.dumps(example)}")
    if not (item.get("context") or item.get("image") or item.get("text", "").strip()):
        raise UserError("it holds no text and no picture")
    return item


def is_like(value, example):
    """Whether two JSON values have the same type and, if they are objects, the same keys; each item
    of a list must be like one of the example's."""
    if isinstance(value, list) and isinstance(example, list):
        return all(any(is_like(item, other) for other in example) for item in value)
    if isinstance(value, dict) and isinstance(example, dict):
        return value.keys() == example.keys() and all(is_like(value[k], example[k]) for k in value)
    return type(value) is type(example)


def next_name(name):
    """The path, or the next one that is free: 0002.png after 0001.png, a2.png after a.png."""
    stem, number = re.fullmatch(r"(.*?)(\d*)", name.stem, re.DOTALL).groups()
    names = (name.with_stem(f"{stem}{k:0{len(number)}}") for k in itertools.count(int(number or 2)))
    return next(free for free in itertools.chain([name], names) if not os.path.lexists(free))


def output_names(out, args, suffixes, taken):
    """A file name for each of --num-images images; their resolved paths are added to `taken`.

    Raises UserError if one is taken, outside of --batch's --out, cannot be written or would
    overwrite something."""
    names = [out]
    if args.num_images > 1:
        names = [out.with_stem(f"{out.stem}-{k + 1}") for k in range(args.num_images)]
    for name in names:
        path = name.resolve()
        if args.batch and not path.is_relative_to(args.out.resolve()):
            raise UserError(f"{name} is not inside {args.out}")
        if taken & {path, *path.parents}:
            raise UserError(f"{name} is the image of an earlier line")
        if name.is_dir() or (os.path.lexists(name) and not args.overwrite):
            raise UserError(f"{name} exists: choose another --out, or add --overwrite for an image")
        check_name(name, suffixes)
    taken.update(name.resolve() for name in names)
    return names


def check_name(name, suffixes):
    """Raises UserError unless a file with one of the suffixes can be written under this name."""
    if name.suffix.lower() not in suffixes:
        raise UserError(f"--out {name}: end the name in {' or '.join(suffixes)}")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        # the longest name of a temporary file
        probe = Path(f"{name}.{os.getpid()}.tmp0.mp4")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {name.parent}: {error.strerror}; choose another --out"
                        ) from None


# ------------------------------------------------------------------------------------------ saving
def best_of_score(args):
    """For draw_batch, by the VLM that gave the answers: score(images, contexts), log p(a context's
    "words" | "Describe the image concisely.", image). None without --best-of."""
    # ThinkDiff-CLIP has none
    if vars(args).get("best_of", 1) == 1:
        return None
    vlm = models.load_vlm(args.vlm, *common.pick_device(args.dtype), **int8(args.quantize))

    def score(images, contexts):
        chats = [[{"role": "user", "content": [
            {"type": "image", "image": image},
            {"type": "text", "text": "Describe the image concisely."}]}] for image in images]
        return models.log_likelihoods(*vlm, chats, [c["words"] for c in contexts])
    return score


def draw_batch(pipe, prompts, texts, seeds, args, score=None, **video):
    """generate_images with the flags: (images, seeds). With --best-of N each is the one of N, with
    seeds counting up, that score(images) -> [float] ranks highest."""
    n = args.best_of if score else 1
    drawn = [generate_images(pipe, prompts, texts, [seed + j for seed in seeds], args.size,
                             args.steps, args.guidance, args.true_cfg, **video) for j in range(n)]
    if n == 1:
        return drawn[0], seeds
    best = torch.tensor([score(images) for images in drawn]).argmax(0).tolist()
    return [drawn[j][i] for i, j in enumerate(best)], [
        seed + j for seed, j in zip(seeds, best, strict=True)]


def draw_contexts(pipe, contexts, build_prompt, args):
    """Draws each context's images from build_prompt(context) (N, d_t5), saves and reports them."""
    def add_prompt(c):
        c["prompt"] = build_prompt(c)
        if len(c["prompt"]) > LONGEST.get(args.decoder, math.inf):
            raise UserError(f"its prompt has {len(c['prompt'])} tokens, but {args.decoder} reads "
                            f"{LONGEST[args.decoder]}")
        if not c["prompt"].isfinite().all():
            raise UserError("its prompt has values that are not finite: are the models whole?")
    score = best_of_score(args)
    n = args.best_of if score else 1
    saved, jobs = [], [(c["prompt"], c["seed"] + k * n, name, c)
                       for c in usable(contexts, add_prompt, args)
                       for k, name in enumerate(c["names"])]
    video = {"num_frames": args.frames} if args.decoder in VIDEOS else {}
    if args.decoder == "ltx":
        video["frame_rate"] = args.fps
    for batch in equal_lengths(jobs, args.batch_size, decoder=args.decoder):
        prompts, seeds, names, of = zip(*batch, strict=True)
        images, seeds = draw_batch(
            pipe, prompts, [c["text"] for c in of], seeds, args,
            score and functools.partial(score, contexts=of), **video)
        for image, seed, name, c in zip(images, seeds, names, of, strict=True):
            if video:
                saved.append(save_video(image, name, args.fps, args.overwrite))
                continue
            if n > 1:
                print(f"{name}: seed {seed}, the best of {n}")
            metadata = {**c["metadata"], "seed": seed, "aligner": str(args.aligner)}
            saved.append(save_image(image, name, metadata, args.overwrite))
    if args.batch:
        print(f"drew {len(saved)} pictures, skipped {args.skipped} lines of {args.batch}")
    else:
        print("picture:", *saved)


def draw_features(x_aligned, args, device, dtype):
    """Draws one image from x' (N, d_t5) to --out, for `explain`."""
    check_name(args.out, FORMATS)
    pipe = load_flux(args.flux, device, dtype, t5_encoder=args.true_cfg > 1)
    images = generate_images(pipe, x_aligned[None], [""], [args.seed], args.size, args.steps,
                             args.guidance, args.true_cfg)
    name = save_image(images[0], args.out, {"image": args.image, "seed": args.seed})
    print(f"\npicture: {name}")


def save_image(image, name, metadata, overwrite=False):
    """Writes a PIL image in the format of its suffix, as `save` does.

    A PNG keeps `metadata` as JSON in its text entry "thinkdiff"."""
    options = {"format": FORMATS[name.suffix.lower()]}
    if options["format"] == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("thinkdiff", json.dumps(metadata))
    return save(name, lambda temporary: image.save(temporary, **options), overwrite)


def save_video(frames, name, fps, overwrite):
    """Writes PIL images as an mp4, as `save` does."""
    from diffusers.utils import export_to_video

    def export(temporary):
        # export_to_video knows the format by the suffix
        export_to_video(frames, f"{temporary}.mp4", fps=fps)
        os.replace(f"{temporary}.mp4", temporary)
    return save(name, export, overwrite)


def save(name, write, overwrite):
    """Writes what write(temporary_path) writes, atomically, to the path `name`; without
    `overwrite` to the next free one if another program has taken it. Returns the path."""
    # another program may be writing the same name
    own = Path(f"{name}.{os.getpid()}")
    common.write_atomically(own, write)
    while not overwrite:
        try:
            open(name, "x").close()
            break
        except FileExistsError:
            print(f"{name} was written by another program meanwhile", file=sys.stderr)
            name = next_name(name)
    os.replace(own, name)
    return name
