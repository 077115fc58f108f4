"""What every script shares: model paths, flags, one-line errors, devices and processes, loading
parts of checkpoints, files that are checked when read and written atomically, locked folders."""
import argparse
import contextlib
import csv
import errno
import io
import json
import math
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers.utils import cached_file, has_file

# -------------------------------------------------------------------------- models and flags
REPO = Path(__file__).resolve().parent
EXAMPLE = REPO / "miniature/example"
MODELS = {
    "vlm": "Qwen/Qwen2-VL-7B-Instruct",
    "t5": "google/flan-t5-xxl",
    "flux": "black-forest-labs/FLUX.1-dev",
    "clip": "Salesforce/blip2-flan-t5-xxl",
    "cogvideox": "THUDM/CogVideoX-5b",
    "judge-vlm": "llava-hf/llava-1.5-13b-hf",
    "judge-clip": "openai/clip-vit-base-patch32",
}
MINI = {
    flag: f"{REPO}/miniature/weights/{folder}"
    for flag, folder in {
        "vlm": "qwen2-vl", "t5": "t5", "flux": "flux", "clip": "clip",
        "aligner": "aligner-lvlm", "aligner-clip": "aligner-clip",
    }.items()
}


def number(kind, lowest, highest=math.inf, above=False):
    """An argparse type: a finite `kind` (int, float) in [lowest, highest]; above: not `lowest`."""
    def convert(text):
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if value < lowest or value > highest or (above and value == lowest):
            limits = f"{'above' if above else 'at least'} {lowest}"
            limits += f" and at most {highest}" if highest < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value
    convert.__name__ = kind.__name__
    return convert


positive = number(int, 1)
# torch's generators take 64 bits; seeds count up from here
seed = number(int, 0, 2**62)


# flag, type, full size, miniature, help
T5_FLAG = ("--t5", str, MODELS["t5"], MINI["t5"], "path or hub name of a T5 encoder-decoder")
MODEL_FLAGS = {
    "lvlm": [
        ("--vlm", str, MODELS["vlm"], MINI["vlm"], "path or hub name of a Qwen-VL"),
        ("--aligner", str, "runs/lvlm/aligner", MINI["aligner"],
         "folder, hub name, or the authors' thinkdiff_lvlm.pth")],
    "clip": [
        ("--vlm", str, MODELS["clip"], MINI["clip"],
         "path or hub name of a BLIP-2 or CLIP, whose vision tower is used"),
        ("--aligner", str, "runs/clip/aligner", MINI["aligner-clip"],
         "folder, hub name, or the authors' thinkdiff_clip.pth")],
}
# Flags of `train` that do not belong to the method; those that do stand in the variants.
RUN_FLAGS = [
    ("--resume", bool, False, False,
     "resume from the last checkpoint in --out, bit for bit as if never stopped"),
    ("--workers", positive, 8, 2, "threads of a process that read samples ahead"),
    ("--held-out", positive, 512, 512, "samples kept for the held-out loss (at most a tenth)"),
    ("--log-every", positive, 10, 10, "steps between rows of log.csv"),
    ("--eval-every", positive, 500, 100, "steps between held-out losses"),
    ("--save-every", positive, 500, 100, "steps between checkpoints"),
    ("--keep", positive, 2, 2, "checkpoints kept"),
    ("--compile", bool, False, False,
     "torch.compile the frozen models: faster steps, slow start, the loss changes by rounding"),
    ("--seed", int, 0, 0, "seed of the initialisation, the order of samples and the splits"),
]


def add_flags(parser, rows):
    """Adds one argument for each row (flag, type, full-size default, miniature default, help).

    type: bool is a switch, a tuple lists the choices; a list as default takes several values.
    `--mini` on the command line selects the second default; flags that are given win."""
    for flag, kind, full, mini, text in rows:
        default = mini if is_mini() else full
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            nargs = "+" if isinstance(full, list) else None
            allowed = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            parser.add_argument(flag, nargs=nargs, default=default, help=text, **allowed)


def is_mini():
    """Whether `--mini` is on the command line, which only replaces defaults."""
    return "--mini" in sys.argv[1:]


def add_command(commands, name, run, about, rows, **defaults):
    """A subcommand with the flags `rows` and --mini; its help shows the defaults."""
    # no abbreviations: --min would be taken for --mini, but with the full-size defaults
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False,
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mini", action="store_true",
                        help="use the miniature's models (with --help: show its defaults)")
    add_flags(parser, rows)
    parser.set_defaults(run=run, **defaults)
    return parser


# flags of earlier versions, and what to do instead
REMOVED_FLAGS = {
    "--sample-every": "draw from a checkpoint with `explain --aligner OUT/checkpoint-STEP`",
}


# ------------------------------------------------------------------------------------ errors
class UserError(Exception):
    """Something the user can put right. Its message is one line that says what to do."""


def first_line(error):
    """The first line of an exception's message, with a full stop; its type if there is none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else line + "."


ADVICE = {
    errno.ENOSPC: " Free some space or choose another --out, then run the same command again.",
    errno.EACCES: " Choose a path that you may read and write.",
    errno.EROFS: " Choose a path that can be written.",
}


def cli_main(main):
    """Calls main(). What the user can put right ends as one line on stderr and exit code 1.

    Ctrl-C exits with 130, argparse's own errors with 2. THINKDIFF_DEBUG=1 shows the traceback."""
    # the libraries warn about what these scripts do on purpose, such as leaving out T5's encoder;
    # diffusers is not installed everywhere (prepare_data.py --backend vllm)
    for library in ("transformers", "diffusers"):
        if library in sys.modules:
            sys.modules[library].utils.logging.set_verbosity_error()
    try:
        for flag in {arg.split("=")[0] for arg in sys.argv} & REMOVED_FLAGS.keys():
            raise UserError(f"{flag} was removed: {REMOVED_FLAGS[flag]}")
        return main()
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on from what is on disk", 130
    except UserError as error:
        message, code = str(error), 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        advice = "use a smaller --batch-size (or --micro-batch)"
        message = f"out of memory: {advice}. {first_line(error)}"
        code = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = first_line(error.strerror or error)
        message, code = f"{where}{reason}{ADVICE.get(error.errno, '')}", 1
    except RuntimeError as error:
        # torch.distributed has no exception type of its own for this
        if "EADDRINUSE" not in str(error):
            raise
        message = ("the port is in use: start with `torchrun --standalone` (any free port) or "
                   "another --master-port")
        code = 1
    finally:
        release_locks()
    if os.environ.get("THINKDIFF_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------------- loading models
@contextlib.contextmanager
def loading(path):
    """Around code that loads a model from a folder or the hub: failures become a UserError."""
    if str(path).startswith((".", "/", "~")) and not os.path.isdir(path):
        raise UserError(f"{path} is no folder: give the folder of a model, or its name on the hub")
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot load {path}: {first_line(error)} Check the name, log in with `hf auth login` "
            "and accept the licence if the model is gated (FLUX.1-dev is), or give the folder of a "
            "local copy."
        ) from error


def pretrained(cls, path, **kwargs):
    """`cls.from_pretrained(path, **kwargs)`; raises UserError if the model cannot be loaded."""
    with loading(path):
        return cls.from_pretrained(path, **kwargs)


def check_loaded(info, path, what):
    """Raises UserError if weights are missing, which transformers would replace by random ones.

    info: from_pretrained's loading info. what: the model's name in the message."""
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:4])
        raise UserError(f"{path} lacks weights of {what}: {names}; download it again")


def decoder_tensors(name):
    """Whether LVLM training needs this tensor of a T5: all but the encoder's blocks."""
    return not name.startswith("encoder.block.")


def vision_tensors(name):
    """Whether a tensor of a BLIP-2 or a CLIP belongs to the vision tower."""
    return name.startswith("vision_model.")


def weight_files(path, wanted):
    """Names of the safetensors files that hold a tensor whose name wanted(name) accepts.

    path: folder or hub name; of a hub model only the shard index is fetched. A model without an
    index is one file, ["model.safetensors"]. Raises UserError if the model cannot be loaded."""
    with loading(path):
        # offline, a file that is not in the cache may be one that does not exist
        index = cached_file(path, "model.safetensors.index.json",
                            _raise_exceptions_for_missing_entries=False)
        if not index:
            return ["model.safetensors"]
        shards = json.loads(Path(index).read_text())["weight_map"]
        return sorted({file for name, file in shards.items() if wanted(name)})


def part_weights(path, wanted, dtype=None):
    """{name: tensor} of the tensors whose names wanted(name) accepts, on the CPU.

    Only the shards that hold one are fetched and read. Each tensor is converted to `dtype` (None:
    as stored) as it is read, so that no more memory is needed than the result takes. path: folder
    or hub name. Raises UserError if the model cannot be loaded or has no safetensors."""
    weights, files = {}, weight_files(path, wanted)
    with loading(path):
        pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        if files == ["model.safetensors"] and not has_file(path, files[0]):
            if any(has_file(path, file) for file in pickles):
                raise UserError(
                    f"{path} has only pytorch_model.bin, a pickle of which no part can be read: "
                    "load it once with transformers, `save_pretrained` it and give that folder")
        for file in files:
            with safe_open(cached_file(path, file), "pt") as tensors:
                for name in filter(wanted, tensors.keys()):
                    tensor = tensors.get_tensor(name)
                    convert = dtype and tensor.is_floating_point()
                    weights[name] = tensor.to(dtype) if convert else tensor
    return weights


# --------------------------------------------------------------------- processes and devices
def torchrun_ranks():
    """(rank, number of processes, rank on this machine) from torchrun; (0, 1, 0) without it."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    return tuple(int(os.environ.get(name, default)) for name, default in names)


def pick_device():
    """(device, dtype): this process's GPU in bf16 (fp32 if it has no bf16), or the CPU in fp32."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    local_rank = torchrun_ranks()[2]
    if local_rank >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise UserError(f"process {local_rank} has no GPU: use torchrun --nproc_per_node {n_gpus}")
    torch.cuda.set_device(local_rank)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda", local_rank), torch.bfloat16 if has_bf16 else torch.float32


def to_device(tensors, device):
    """The tensors on `device`; pinned memory lets the CPU go on while a GPU receives them."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [t if t.is_cuda else t.pin_memory().to(device, non_blocking=True) for t in tensors]


def start_processes(device):
    """Connects the processes that torchrun has started; nothing to do for one process."""
    if torchrun_ranks()[1] > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def sum_over_processes(*tensors):
    """Replaces each tensor, in place, by its sum over all processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


# ------------------------------------------------------------------------------------- files
def write_atomically(path, data):
    """Writes bytes, text or what data(temporary_path) writes; a kill leaves no half of a file."""
    temporary = Path(f"{path}.tmp{torchrun_ranks()[0]}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        if callable(data):
            data(temporary)
        else:
            # file names in the text can be any bytes
            text = isinstance(data, str)
            temporary.write_bytes(data.encode("utf-8", "surrogateescape") if text else data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_json(path, fields=None, advice="restore or delete it"):
    """The content of a JSON file, if need be an object with `fields`, {name: type}.

    Raises OSError if it cannot be opened, UserError with `advice` if it holds anything else."""
    try:
        # int() refuses the constants NaN and Infinity, which are no JSON
        value = json.loads(Path(path).read_text("utf-8"), parse_constant=int)
        for name, kind in (fields or {}).items():
            if not isinstance(value[name], kind):
                raise TypeError(f"{name} is a {type(value[name]).__name__}")
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)[:90]}): {advice}") from None
    return value


def read_tensors(path, advice="restore or delete it"):
    """{name: tensor} of a safetensors file, on the CPU.

    Raises OSError if it cannot be opened, UserError with `advice` if it is damaged or holds a
    number that is not finite."""
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)[:90]}): {advice}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite: {advice}")
    return tensors


def write_json(path, value):
    """Writes `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as safetensors, atomically."""
    write_atomically(path, save(tensors, metadata))


def write_csv(path, header, rows):
    """Writes a table, atomically."""
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, table.getvalue())


LOCKS = []


def lock_folder(folder):
    """Makes this run the only one that writes to `folder`, until it ends, however it ends.

    Raises UserError if another run does. With torchrun the first process holds the lock."""
    if torchrun_ranks()[0]:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is writing to {folder}: wait until it has ended, or choose "
                        "another --out") from None
    LOCKS.append(lock)


def release_locks():
    """Ends what lock_folder has begun; a folder that is still empty goes too."""
    while LOCKS:
        lock = LOCKS.pop()
        file = Path(lock.lock_file)
        with contextlib.suppress(OSError):
            file.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            file.parent.rmdir()
