"""What every script that draws shares: pipelines with flags for memory and speed, the contexts asked for, pictures that overwrite nothing."""
import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common import UserError, pretrained, write_atomically

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TORCHAO = "torchao==0.18.0"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it is imported below, too late for common.run to silence it


# ---------------------------------------------------------------- pipelines, with flags for memory and speed
def drawing_flags(parser):
    """Adds the flags of drawing_options. All are off by default: then a picture is the stock pipeline's, bit for bit."""
    group = parser.add_argument_group("memory and speed of drawing (all off: the stock pipeline)")
    group.add_argument("--offload", action="store_true", help="keep the pipeline's parts in main memory and bring each to the GPU when its turn comes: "
                       "needs GPU memory for the largest part only, costs a copy of each part for each batch; the pictures stay the same")
    group.add_argument("--quantize", action="store_true", help="hold the weights of the transformer that draws, and of the VLM if there is one, as "
                       f"8-bit integers (torchao's int8 weight-only; pip install {TORCHAO}): half of bf16's memory; costs a conversion in each "
                       "product, and the pictures change a little")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks: faster pictures after a wait of minutes before "
                       "the first one, and before some of those with another size of batch, picture or prompt; the pictures change by a rounding")
    group.add_argument("--cache", type=threshold, metavar="THRESHOLD", help="first-block cache: skip all blocks but the first in a step where that one's "
                       "output has changed by less than this share since the last step; the higher, the faster and the farther from the picture "
                       "without it; pictures of one batch skip together, so that each depends on the others")


def threshold(text):
    """An argparse type: a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def drawing_options(args):
    """The flags as load_pipeline takes them. Raises UserError for one that cannot work on this machine; call it before any model is loaded."""
    if args.offload and not torch.cuda.is_available():
        raise UserError("--offload moves models between main memory and a GPU, and there is no GPU here: leave it out")
    if args.quantize and not importlib.util.find_spec("torchao"):
        raise UserError(f"--quantize needs one more package: pip install {TORCHAO}")
    return {"offload": args.offload, "quantize": args.quantize, "compile": args.compile, "cache": args.cache}


def int8():
    """What --quantize makes of a matrix: 8-bit integers with a scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig
    return Int8WeightOnlyConfig()


def vlm_options(quantize):
    """--quantize as prepare_data.load_vlm takes it."""
    return {"quantization_config": transformers.TorchAoConfig(int8())} if quantize else {}


def load_pipeline(kind, path, device, dtype, offload=False, quantize=False, compile=False, cache=None, **parts):
    """The diffusers pipeline of class `kind`, with drawing_options applied. parts: NAME=None leaves a part out."""
    import diffusers
    if quantize:
        parts["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": diffusers.TorchAoConfig(int8())})
    pipe = pretrained(getattr(diffusers, kind), path, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return speed_up(pipe, device, offload, compile, cache)


def speed_up(pipe, device, offload=False, compile=False, cache=None):
    """The pipeline on the device, with those of drawing_options that need no new weights."""
    if compile:  # blocks of one class share what is compiled; before the cache, whose hooks differ from block to block
        for block in [*pipe.transformer.transformer_blocks, *getattr(pipe.transformer, "single_transformer_blocks", [])]:
            block.forward = torch.compile(block.forward)
    if cache:
        from diffusers import FirstBlockCacheConfig
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=cache))
    if not offload:
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)  # from now on the pipeline moves its parts itself
    return pipe


def equal_lengths(jobs, size):
    """Yields batches of at most `size` jobs whose prompts, their first items, are equally long: FLUX has no text mask."""
    jobs = sorted(jobs, key=lambda job: len(job[0]))
    while jobs:
        same = [job for job in jobs[:size] if len(job[0]) == len(jobs[0][0])]
        yield same
        jobs = jobs[len(same):]


# ---------------------------------------------------------------- what is asked for
def read_contexts(args, typed, read, like, endings=PICTURES):
    """The contexts to draw: [{**read(item, folder, args), "out", "names", "seed"}], and how many lines of --batch are skipped.

    item: a line of --batch, as in the example `like`, or `typed`, that of the command line; pictures are named relative to folder. All files are
    opened and all output names checked here, before any model is loaded. Skipped lines are named on stderr; UserError if no context is left."""
    if args.out is None:
        free = (Path("outputs") / f"{k:04d}{endings[0]}" for k in range(1, 10000))
        args.out = Path("outputs") if args.batch else next(name for name in free if not name.exists())
    try:
        lines = [line for line in Path(args.batch).read_text().splitlines() if line.strip()] if args.batch else [typed]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --batch {args.batch}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    contexts, skipped = [], 0
    for number, line in enumerate(lines, 1):
        try:
            item, folder = (json.loads(line), Path(args.batch).parent) if args.batch else (line, Path())
            out = Path(item.get("out") or (args.out / f"{number:05d}{endings[0]}" if args.batch else args.out))
            context = {**read(item, folder, args), "out": out, "names": output_names(out, args, endings), "seed": int(item.get("seed", args.seed))}
            if taken := [name for other in contexts for name in other["names"] if name in context["names"]]:
                raise UserError(f"{taken[0]} is the picture of an earlier line")
            contexts.append(context)
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            if not args.batch:
                raise
            skipped += 1
            print(f"skipped {args.batch} line {number}: {error if isinstance(error, UserError) else f'not a line like {like}'}", file=sys.stderr)
    if not contexts:
        raise UserError(f"{args.batch} holds no context that can be drawn")
    return contexts, skipped


def output_names(out, args, endings):
    """One file name for each of --num-images pictures; a UserError if one cannot be written or would overwrite something."""
    names = [out] if args.num_images == 1 else [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(args.num_images)]
    for name in names:
        if name.suffix.lower() not in endings:
            raise UserError(f"--out {name}: end the name in {' or '.join(endings)}")
        if name.exists() and not args.overwrite:
            raise UserError(f"{name} exists: choose another --out, or add --overwrite")
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {name.parent}: {error.strerror}; choose another --out") from None
        if not os.access(name.parent, os.W_OK):
            raise UserError(f"cannot write to {name.parent}: permission denied; choose another --out")
    return names


# ---------------------------------------------------------------- pictures and videos
def save_picture(image, name, note):
    """Writes a PIL image in the format of its name's ending, atomically. A PNG keeps `note` as JSON in its text entry "thinkdiff"."""
    kind, info = {".png": "PNG", ".webp": "WEBP"}.get(name.suffix.lower(), "JPEG"), PngInfo()
    info.add_text("thinkdiff", json.dumps(note))
    write_atomically(name, lambda f: image.save(f, kind, **({"pnginfo": info} if kind == "PNG" else {})))


def save_video(frames, name, fps):
    """Writes PIL images as an mp4, atomically."""
    from diffusers.utils import export_to_video

    def export(temporary):
        export_to_video(frames, f"{temporary}.mp4", fps=fps)  # which knows the format by the ending
        os.replace(f"{temporary}.mp4", temporary)
    write_atomically(name, export)


def side_by_side(images):
    """PIL images of one size in a row."""
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * image.width, 0))
    return sheet
