"""What every script shares: model paths, one clear line per user error, pictures of any kind, files that are never half written."""
import argparse
import contextlib
import csv
import errno
import io
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file, has_file

# ---------------------------------------------------------------- models
REPO = Path(__file__).resolve().parent
MODELS = {"vlm": "Qwen/Qwen2-VL-7B-Instruct", "t5": "google/flan-t5-xxl", "flux": "black-forest-labs/FLUX.1-dev",
          "clip": "Salesforce/blip2-flan-t5-xxl", "cogvideox": "THUDM/CogVideoX-5b", "judge-vlm": "llava-hf/llava-1.5-13b-hf",
          "judge-clip": "openai/clip-vit-base-patch32"}
MINI = {"vlm": f"{REPO}/mini/qwen2-vl", "t5": f"{REPO}/mini/t5", "flux": f"{REPO}/mini/flux", "aligner": f"{REPO}/mini/aligner-lvlm",
        "clip": f"{REPO}/mini/clip", "aligner-clip": f"{REPO}/mini/aligner-clip"}


def mini_flag(parser, **defaults):
    """Adds `--mini`, which does nothing but replace the parser's defaults by these: flags that are given still win. Call it last."""
    parser.add_argument("--mini", action="store_true", help="use the miniature's models (with --help: show its defaults)")
    if "--mini" in sys.argv[1:]:
        parser.set_defaults(**defaults)


def positive(text):
    """An argparse type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


@contextlib.contextmanager
def loading(path):
    """Around what loads a model from a folder or the hub: one that cannot be had is a UserError that says what to do."""
    if str(path).startswith((".", "/", "~")) and not os.path.isdir(path):
        raise UserError(f"{path} is no folder: give the folder of a model, or its name on the hub")
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load {path}: {first_line(error)} Check the name, log in with `hf auth login` and accept the licence if "
                        "the model is gated (FLUX.1-dev is), or give the folder of a local copy.") from error


def pretrained(cls, path, **kwargs):
    """`cls.from_pretrained(path, **kwargs)`; a model that cannot be had is a UserError that says what to do."""
    with loading(path):
        return cls.from_pretrained(path, **kwargs)


def t5_decoder(name):
    """Of T5's tensors those that training the aligner on the VLM's features reads: all but the encoder's blocks."""
    return not name.startswith("encoder.block.")


def vision_tower(name):
    """Of BLIP-2's or a CLIP's tensors those of the vision tower."""
    return name.startswith("vision_model.")


def weight_files(path, wanted):
    """Names of a model's safetensors files that hold a tensor whose name wanted(name) accepts. Fetches no more than the shard index.

    A model without an index is one file: ["model.safetensors"]. path: folder or hub name; raises UserError if it cannot be had."""
    with loading(path):
        # offline, a file that is not in the cache may be one that does not exist: that is an error only when no file is left
        index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        shards = json.loads(Path(index).read_text())["weight_map"] if index else {"": "model.safetensors"}
        return sorted({file for name, file in shards.items() if wanted(name) or not index})


def part_weights(path, wanted, dtype=None):
    """{name: tensor} of a model's tensors whose names wanted(name) accepts, in `dtype` (None: as stored), on the CPU.

    Only the shards that hold one are fetched and read, and each tensor is converted as it is read, so that no more memory is needed than the
    result takes. path: folder or hub name. Raises UserError if it cannot be had or has no safetensors."""
    weights, files = {}, weight_files(path, wanted)
    with loading(path):
        pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        if files == ["model.safetensors"] and not has_file(path, files[0]) and any(has_file(path, file) for file in pickles):
            raise UserError(f"{path} has only pytorch_model.bin, a pickle of which no part can be read: open it once in transformers with "
                            "`from_pretrained`, `save_pretrained` it to a folder and give that folder")
        for file in [cached_file(path, file) for file in files]:
            with safe_open(file, "pt") as tensors:
                for name in filter(wanted, tensors.keys()):
                    tensor = tensors.get_tensor(name)
                    weights[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return weights


# ---------------------------------------------------------------- errors
class UserError(Exception):
    """Something the user can put right. Its message is one line that says what to do."""


def first_line(error):
    """The first line of an exception's message with a full stop, or its type where there is none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."


def run(main):
    """Calls main(); what a user can put right ends as one line on stderr and exit code 1 (Ctrl-C: 130), argparse's own errors as 2.

    THINKDIFF_DEBUG=1 shows the traceback as well."""
    for library in ("transformers", "diffusers"):  # their warnings are about what these scripts do on purpose, such as leaving out T5's encoder
        if library in sys.modules:  # prepare_data.py also runs where diffusers is not installed (--backend vllm)
            sys.modules[library].utils.logging.set_verbosity_error()
    try:
        return main()
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on from what is on disk", 130
    except UserError as error:
        message, code = str(error), 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        message, code = f"out of memory: use a smaller --batch-size (or --micro-batch). {first_line(error)}", 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        advice = {errno.ENOSPC: " Free some space or choose another --out, then run the same command again.",
                  errno.EACCES: " Choose a path that you may read and write.", errno.EROFS: " Choose a path that can be written."}
        message, code = f"{where}{first_line(error.strerror or error)}{advice.get(error.errno, '')}", 1
    except RuntimeError as error:  # torch.distributed has no type of its own for this
        if "EADDRINUSE" not in str(error):
            raise
        message, code = "the port is in use: start with `torchrun --standalone` (any free port) or another --master-port", 1
    if os.environ.get("THINKDIFF_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------- processes and devices
def torchrun_ranks():
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without it."""
    return tuple(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def pick_device():
    """(device, dtype): this process's GPU in bf16 (fp32 where it has no bf16), or the CPU in fp32, where bf16 is slower."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    local_rank = torchrun_ranks()[2]
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} has no GPU: use torchrun --nproc_per_node {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda", local_rank), torch.bfloat16 if bf16 else torch.float32


def send(tensors, device):
    """The tensors on `device`: to a GPU through pinned memory, so that the CPU goes on while they are copied."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


# ---------------------------------------------------------------- pictures
MAX_PIXELS = 20_000 * 20_000  # 1.2 GB as RGB: above, a file is more likely an attack than a picture
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is lower; open_image has MAX_PIXELS


def open_image(source, name=None, max_side=4096):
    """The RGB picture in a path, bytes or binary file: upright (EXIF), on white, 16 bit scaled to 8, at most max_side pixels long.

    Raises UserError with `name` (default: the path) if it cannot be read in full."""
    name = name or (source if isinstance(source, (str, os.PathLike)) else "the picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image.draft(None, (max_side, max_side))  # JPEG only: decodes at a fraction of the size
            image.thumbnail((max_side, max_side))  # first, because each copy of a huge picture costs gigabytes
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bit grey; convert() would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is empty or no picture" if unknown else getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {name}: {reason.rstrip('.')}") from error


# ---------------------------------------------------------------- files
def write_atomically(path, data):
    """Writes bytes, text or what data(temporary_path) writes, so that `path` is absent, old or complete, whenever the process is killed."""
    temporary = Path(f"{path}.tmp{torchrun_ranks()[0]}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        if callable(data):
            data(temporary)
        else:
            temporary.write_bytes(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)  # file names can be any bytes
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path, value):
    """Writes `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_csv(path, rows):
    """Writes dicts of the same keys as a table, atomically."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, table.getvalue())


def plot_log(file):
    """Draws the loss curves of a log.csv beside it (log scale, as the paper's Fig. 7)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(file) as f:
        rows = list(csv.DictReader(f))
    plt.figure(figsize=(6, 4))
    for name in ("loss", "held_out_loss"):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        plt.plot(*zip(*points), label=name.replace("_", "-")) if points else None
    plt.yscale("log"), plt.xlabel("step"), plt.ylabel("cross-entropy per token"), plt.legend(), plt.tight_layout()
    write_atomically(file.with_name("loss.png"), lambda temporary: plt.savefig(temporary, format="png", dpi=120))
    plt.close()
