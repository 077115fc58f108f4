"""What every script that generates images shares: diffusers pipelines with flags for memory and
speed, the contexts asked for, and saving without overwriting."""
import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import common
from common import MINI, MODELS, UserError, number, positive

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TORCHAO = "torchao==0.18.0"
# diffusers is imported below, too late for common.cli_main to silence it
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

# ------------------------------------------------------------------------------------------- flags
# flag, type, full size, miniature, [source] and meaning
FLUX_FLAGS = [
    ("--flux", str, MODELS["flux"], MINI["flux"], "path or hub name of a FLUX"),
    ("--seed", int, 0, 0, "seed of the first image's noise; the next ones count up"),
    ("--steps", positive, 28, 28, "[release] denoising steps"),
    ("--guidance", float, 3.5, 3.5,
     "[release] FLUX's distilled guidance (the miniature FLUX has none and ignores it)"),
    ("--true-cfg", float, 1.0, 3.0,
     "[ours] classifier-free guidance away from the empty prompt, at twice the cost; 1: none, as "
     "FLUX.1-dev has its guidance built in"),
]
OUTPUT_FLAGS = [
    ("--out", Path, None, None, "image, or folder with --batch; default: outputs/NNNN.png"),
    ("--overwrite", bool, False, False, "allow replacing existing images"),
    ("--num-images", positive, 1, 1, "images for each context, with seeds counting up"),
    ("--batch-size", positive, 1, 32, "contexts, and then images, computed together"),
]
VIDEO_FLAGS = [
    ("--decoder", ("flux", "cogvideox"), "flux", "flux", "FLUX: an image; CogVideoX: a video"),
    ("--cogvideox", str, MODELS["cogvideox"], MODELS["cogvideox"], "path or hub name"),
    ("--frames", positive, 49, 49, "[ours] frames of a video: 4 k + 1"),
    ("--fps", positive, 8, 8, "[ours] frames a second of a video"),
]
PIPELINE_FLAGS = [
    ("--offload", bool, False, False,
     "keep submodules in main memory and move each to the GPU on demand: less GPU memory, slower, "
     "the same images"),
    ("--quantize", bool, False, False,
     f"8-bit weights of FLUX's transformer and the VLM (torchao int8 weight-only; pip install "
     f"{TORCHAO}): half of bf16's memory; images change slightly"),
    ("--compile", bool, False, False,
     "torch.compile the transformer's blocks: faster, minutes to start and for each new shape; "
     "images change by rounding"),
]


class Interleave(argparse.Action):
    """Keeps --text and --image in the order in which they were typed, in args.context."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.context = [*namespace.context, {self.dest: value}]


def add_context_flags(parser, variant, example_line):
    """Adds --text, --image and --batch; --mini has a default context."""
    example = common.EXAMPLE / f"{variant}.jsonl" if common.is_mini() else None
    parser.set_defaults(context=[], example=example)
    for kind in ("text", "image"):
        parser.add_argument(f"--{kind}", action=Interleave, default=argparse.SUPPRESS,
                            help="a part of the context, in reading order (repeat)")
    parser.add_argument("--batch", metavar="FILE.jsonl", help="contexts, one a line, such as "
                        f"{example_line}; image paths are relative to the file")


def add_composition_flags(parser):
    """Adds --image-weight and the flags of CogVideoX, with which other defaults hold [release]."""
    parser.add_argument("--image-weight", action="append", type=float, default=[],
                        help="factor of an image's aligned tokens, one for each --image; 1 is the "
                        "paper's, FLUX was trained for no other")
    common.add_flags(parser, VIDEO_FLAGS)
    parser.add_argument("--video", dest="decoder", action="store_const", const="cogvideox",
                        default=argparse.SUPPRESS, help="short for --decoder cogvideox")
    given = " ".join(sys.argv).replace("=", " ")
    if "--video" in sys.argv or "--decoder cogvideox" in given:
        parser.set_defaults(steps=50, guidance=6.0, size=None)


def add_pipeline_flags(parser):
    """Adds the flags of pipeline_options. All off: the stock pipeline's images, bit for bit."""
    group = parser.add_argument_group("memory and speed (all off: the stock pipeline)")
    common.add_flags(group, PIPELINE_FLAGS)
    group.add_argument(
        "--cache", type=number(float, 0, above=True), metavar="THRESHOLD",
        help="first-block cache: skip the other blocks in steps where the first one's output "
        "changed by less than this share; a larger threshold is faster and less faithful; the "
        "images of a batch skip together, so that each depends on the others")


def pipeline_options(args):
    """The flags as load_pipeline takes them. Raises UserError for one that cannot work here.

    Call it before any model is loaded."""
    if args.offload and not torch.cuda.is_available():
        raise UserError("--offload moves models between main memory and a GPU, and there is no GPU "
                        "here: leave it out")
    if args.quantize and not importlib.util.find_spec("torchao"):
        raise UserError(f"--quantize needs one more package: pip install {TORCHAO}")
    if is_video(args):
        if not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
            raise UserError("videos need two more packages: pip install imageio==2.38.1 "
                            "imageio-ffmpeg==0.8.1")
        if args.frames % 4 != 1:
            raise UserError(f"--frames {args.frames}: CogVideoX makes 4 k + 1 frames, such as "
                            f"{args.frames // 4 * 4 + 1}")
    return {name: vars(args)[name] for name in ("offload", "quantize", "compile", "cache")}


# --------------------------------------------------------------------------------------- pipelines
def int8_weights():
    """torchao's config of --quantize: int8 weights with a scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig
    return Int8WeightOnlyConfig()


def vlm_options(args):
    """--quantize as load_vlm takes it."""
    if not args.quantize:
        return {}
    return {"quantization_config": transformers.TorchAoConfig(int8_weights())}


def load_pipeline(kind, path, device, dtype, offload=False, quantize=False, compile=False,
                  cache=None, **parts):
    """The diffusers pipeline of class `kind` with pipeline_options. parts: NAME=None omits one."""
    import diffusers
    if quantize:
        transformer = diffusers.TorchAoConfig(int8_weights())
        parts["quantization_config"] = diffusers.PipelineQuantizationConfig(
            quant_mapping={"transformer": transformer})
    pipe = common.pretrained(getattr(diffusers, kind), path, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
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


@torch.no_grad()
def t5_embeds(pipe, texts, max_length):
    """LLM_E(T): B texts through the pipeline's T5 encoder, padded -> (B, max_length, d_t5)."""
    return pipe._get_t5_prompt_embeds(texts, max_sequence_length=max_length)


def is_video(args):
    """Whether CogVideoX draws, not FLUX."""
    return vars(args).get("decoder") == "cogvideox"


def prompt_width(args):
    """d_t5, the width of the prompts that FLUX or CogVideoX reads; loads the config alone."""
    from diffusers import FluxTransformer2DModel
    path = args.cogvideox if is_video(args) else args.flux
    with common.loading(path):
        config = FluxTransformer2DModel.load_config(path, subfolder="transformer")
    return config.get("joint_attention_dim") or config["text_embed_dim"]


def load_decoder(args, device, dtype, t5_encoder):
    """The FLUX or CogVideoX of the flags. t5_encoder: whether FLUX's T5 encoder is needed."""
    options = pipeline_options(args)
    if is_video(args):
        return load_pipeline("CogVideoXPipeline", args.cogvideox, device, dtype, **options)
    return load_flux(args.flux, device, dtype, t5_encoder, **options)


@torch.no_grad()
def generate_images(pipe, prompt_embeds, texts, seeds, size, steps, guidance, true_cfg=1.0):
    """B PIL images of size x size px by FLUX from prompt_embeds (B, N, d_t5) (Eq. 3, 5).

    texts: B strings for the pooled CLIP embedding, "" where the prompt holds no text. One seed for
    each image, so that it does not depend on its batch. true_cfg > 1: classifier-free guidance
    away from the empty prompt padded to N tokens, for which pipe needs its T5 encoder."""
    prompt_embeds = prompt_embeds.to(pipe.transformer.dtype)
    negative = {}
    if true_cfg > 1:
        empty = t5_embeds(pipe, [""], prompt_embeds.shape[1])  # (1, N, d_t5)
        pooled = pipe._get_clip_prompt_embeds([""] * len(texts))
        negative = {"true_cfg_scale": true_cfg, "negative_pooled_prompt_embeds": pooled,
                    "negative_prompt_embeds": empty.expand_as(prompt_embeds)}
    return pipe(prompt_embeds=prompt_embeds, height=size, width=size, num_inference_steps=steps,
                pooled_prompt_embeds=pipe._get_clip_prompt_embeds(texts), guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **negative).images


@torch.no_grad()
def generate_videos(pipe, prompt_embeds, seeds, size, frames, steps, guidance):
    """B lists of `frames` PIL images by CogVideoX from prompt_embeds (B, 226, d_t5).

    226 tokens are what CogVideoX was trained with; it has no text mask. Guidance leads away from
    the empty prompt, which pipe encodes. size None: the model's own (720 x 480)."""
    return pipe(prompt_embeds=prompt_embeds.to(pipe.transformer.dtype), height=size, width=size,
                max_sequence_length=prompt_embeds.shape[1], num_frames=frames,
                num_inference_steps=steps, guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds]).frames


def text_length(pipe, n_image_tokens, text, args):
    """Number of T5 tokens that the text of a prompt is padded to, behind the images' tokens.

    FLUX: --t5-length, 0 without text. CogVideoX: what the images leave of its 226 (appendix D);
    raises UserError if they leave nothing."""
    if not is_video(args):
        return args.t5_length if text else 0
    longest = pipe.transformer.config.max_text_seq_length
    if n_image_tokens >= longest:
        raise UserError(f"the pictures are {n_image_tokens} tokens, but {args.cogvideox} reads "
                        f"{longest}: give fewer")
    return longest - n_image_tokens


def equal_lengths(jobs, size, desc="draw"):
    """Batches of at most `size` jobs whose first items, the prompts, have equal lengths.

    FLUX has no text mask, so that a padded prompt would be another prompt. Shows progress."""
    jobs = sorted(jobs, key=lambda job: len(job[0]))
    bar = tqdm(total=len(jobs), desc=desc, unit="image", disable=len(jobs) < 2)
    while jobs:
        batch = [job for job in jobs[:size] if len(job[0]) == len(jobs[0][0])]
        yield batch
        bar.update(len(batch))
        jobs = jobs[len(batch):]
    bar.close()


# ---------------------------------------------------------------------------------------- contexts
def read_contexts(args, read, example_line):
    """The contexts asked for, as dicts, and the number of skipped lines of --batch.

    A context is read(item, folder, args), with "out", "names" and "seed" added. item: a line of
    --batch, as in example_line; or the flags --text and --image; or args.example, the miniature's.
    Image paths are relative to folder. All files are opened and all output names checked here,
    before any model is loaded. Raises UserError if no context is left."""
    suffixes = (".mp4",) if is_video(args) else IMAGE_SUFFIXES
    images = [part["image"] for part in args.context if "image" in part]
    text = " ".join(part["text"] for part in args.context if "text" in part)
    folder, lines = Path(), [{"context": args.context, "image": images, "text": text}]
    if args.batch:
        folder, lines = Path(args.batch).parent, read_lines(args.batch)
    elif not (images or text.strip()):
        if not args.example:
            raise UserError("no context: give --text and --image, --batch FILE.jsonl, or --mini "
                            "for the shipped example")
        folder, lines = Path(args.example).parent, read_lines(args.example)
    if args.out is None:
        args.out = Path("outputs") if args.batch else next_free_name(suffixes[0])
    contexts, skipped = [], 0
    for n_line, line in enumerate(lines, 1):
        try:
            item = json.loads(line) if isinstance(line, str) else line
            out = args.out
            if args.batch:
                out = Path(item.get("out") or args.out / f"{n_line:05d}{suffixes[0]}")
            context = read(item, folder, args)
            context |= {"out": out, "names": output_names(out, args, suffixes),
                        "seed": int(item.get("seed", args.seed))}
            taken = {name for other in contexts for name in other["names"]}
            if taken & set(context["names"]):
                raise UserError(f"{context['names'][0]} is the image of an earlier line")
            contexts.append(context)
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            if not args.batch:
                raise
            skipped += 1
            reason = error if isinstance(error, UserError) else f"not a line like {example_line}"
            print(f"skipped {args.batch} line {n_line}: {reason}", file=sys.stderr)
    if not contexts:
        raise UserError(f"{args.batch} holds no context that can be drawn")
    return contexts, skipped


def read_lines(path):
    """The lines of a JSONL file that are not blank."""
    try:
        return [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"cannot read {path}: {reason}") from None


def next_free_name(suffix):
    """outputs/0001.png, or the next number that is free."""
    names = (Path("outputs") / f"{k:04d}{suffix}" for k in range(1, 10000))
    return next(name for name in names if not name.exists())


def output_names(out, args, suffixes):
    """A file name for each of --num-images images.

    Raises UserError if one cannot be written or would overwrite something."""
    names = [out]
    if args.num_images > 1:
        names = [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(args.num_images)]
    for name in names:
        if name.suffix.lower() not in suffixes:
            raise UserError(f"--out {name}: end the name in {' or '.join(suffixes)}")
        if name.exists() and not args.overwrite:
            raise UserError(f"{name} exists: choose another --out, or add --overwrite")
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {name.parent}: {error.strerror}; choose another "
                            "--out") from None
        if not os.access(name.parent, os.W_OK):
            raise UserError(f"cannot write to {name.parent}: permission denied; choose another "
                            "--out")
    return names


# ------------------------------------------------------------------------------------------ saving
def draw_contexts(pipe, contexts, skipped, build_prompt, args):
    """Draws each context's images from build_prompt(context) (N, d_t5), saves and reports them."""
    jobs = []
    for c in contexts:
        try:
            prompt = build_prompt(c)
        except UserError as error:
            if not args.batch:
                raise
            skipped += 1
            print(f"skipped {c['out']}: {error}", file=sys.stderr)
            continue
        jobs += [(prompt, c["seed"] + k, name, c) for k, name in enumerate(c["names"])]
    for batch in equal_lengths(jobs, args.batch_size):
        prompts, seeds, names, of = zip(*batch, strict=True)
        if is_video(args):
            videos = generate_videos(pipe, torch.stack(prompts), seeds, args.size, args.frames,
                                     args.steps, args.guidance)
            for frames, name in zip(videos, names, strict=True):
                save_video(frames, name, args.fps)
            continue
        images = generate_images(pipe, torch.stack(prompts), [c["text"] for c in of], seeds,
                                 args.size, args.steps, args.guidance, args.true_cfg)
        for image, seed, name, c in zip(images, seeds, names, of, strict=True):
            save_image(image, name, {**c["metadata"], "seed": seed, "aligner": str(args.aligner)})
    if args.batch:
        print(f"drew {len(jobs)} pictures, skipped {skipped} lines of {args.batch}")
    else:
        print("picture:", *contexts[0]["names"])


def draw_features(x_aligned, args, device, dtype):
    """Draws one image from x' (N, d_t5) to --out, for `explain`."""
    pipe = load_flux(args.flux, device, dtype, t5_encoder=args.true_cfg > 1)
    images = generate_images(pipe, x_aligned[None], [""], [args.seed], args.size, args.steps,
                             args.guidance, args.true_cfg)
    save_image(images[0], args.out, {"image": args.image, "seed": args.seed})
    print(f"\npicture: {args.out}")


def save_image(image, name, metadata):
    """Writes a PIL image atomically, in the format of its suffix.

    A PNG keeps `metadata` as JSON in its text entry "thinkdiff"."""
    options = {"format": {".png": "PNG", ".webp": "WEBP"}.get(name.suffix.lower(), "JPEG")}
    if options["format"] == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("thinkdiff", json.dumps(metadata))
    common.write_atomically(name, lambda temporary: image.save(temporary, **options))


def save_video(frames, name, fps):
    """Writes PIL images as an mp4, atomically."""
    from diffusers.utils import export_to_video

    def export(temporary):
        # export_to_video knows the format by the suffix
        export_to_video(frames, f"{temporary}.mp4", fps=fps)
        os.replace(f"{temporary}.mp4", temporary)
    common.write_atomically(name, export)
