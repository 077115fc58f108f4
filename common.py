"""What every script shares: model paths, flags, one-line errors, devices and processes, loading
parts of checkpoints, files that are checked when read and written atomically, locked folders."""
import startup

import argparse
import contextlib
import csv
import errno
import io
import json
import math
import os
import pickletools
import re
import signal
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.utils import cached_file, has_file

# -------------------------------------------------------------------------- models and flags
REPO = Path(__file__).resolve().parent
EXAMPLE = REPO / "miniature/example"
MODELS = {
    "vlm": "Qwen/Qwen2-VL-7B-Instruct",
    "t5": "google/flan-t5-xxl",
    "flux": "black-forest-labs/FLUX.1-dev",
    "clip": "Salesforce/blip2-flan-t5-xxl",
    "pixart": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "chroma": "lodestones/Chroma1-HD",
    "cogvideox": "THUDM/CogVideoX-5b",
    "ltx": "Lightricks/LTX-Video",
    "judge-vlm": "llava-hf/llava-1.5-13b-hf",
    "judge-clip": "openai/clip-vit-base-patch32",
}
MINI = {
    flag: f"{REPO}/miniature/weights/{folder}"
    for flag, folder in {
        "vlm": "qwen2-vl", "t5": "t5", "flux": "flux", "pixart": "pixart", "clip": "clip",
        "aligner": "aligner-lvlm", "aligner-clip": "aligner-clip",
    }.items()
}


def number(kind, lowest, highest=10**9, above=False, step=None):
    """An argparse type: a `kind` (int, float) from `lowest` (above: not itself) to `highest`.

    step: only lowest, lowest + step, lowest + 2 * step, ..."""
    def convert(text):
        value = kind(text)
        # nan is in no range
        inside = lowest <= value <= highest and not (above and value == lowest)
        if not inside or (step and (value - lowest) % step):
            least, steps = "above" if above else "at least", f", in steps of {step}" if step else ""
            raise argparse.ArgumentTypeError(
                f"{text} is not {least} {lowest} and at most {highest}{steps}")
        return value
    convert.__name__ = kind.__name__
    return convert


def text(value):
    """An argparse type: a string that is not blank."""
    if not value.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return value


def utf8(value):
    """An argparse type: a text for a model, which reads no other bytes."""
    text(value).encode()
    return value


def path(value):
    """An argparse type: a Path."""
    return Path(text(value))


# lengths, sizes of batches, threads
positive = number(int, 1, 100_000)
# steps and samples
count = number(int, 1)
# torch's generators take 64 bits; seeds count up from here
seed = number(int, 0, 2**62)
# FLUX draws patches of 16 x 16 pixels
image_size = number(int, 16, 8192, step=16)
nucleus = number(float, 0, 1, above=True)
# FLUX's longest prompt
t5_length = number(int, 1, 512)


# flag, type, full size, miniature, help
T5_FLAG = ("--t5", str, MODELS["t5"], MINI["t5"], "path or hub name of a T5 encoder-decoder")
DTYPE_FLAG = ("--dtype", ("auto", "float32", "bfloat16"), "auto", "auto",
              "of the frozen models; auto: bfloat16 on a GPU that has it, else float32")
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
     "go on from the last checkpoint in --out, bit for bit as if never stopped; or start"),
    ("--workers", positive, 8, 2, "threads of a process that read samples ahead"),
    ("--held-out", count, 512, 512, "samples kept for the held-out loss (at most a tenth)"),
    ("--log-every", count, 10, 10, "steps between rows of log.csv"),
    ("--eval-every", count, 500, 100, "steps between held-out losses"),
    ("--save-every", count, 500, 100, "steps between checkpoints"),
    ("--keep", count, 2, 2, "checkpoints kept"),
    ("--compile", bool, False, False,
     "torch.compile the frozen models: faster steps, slow start, the loss changes by rounding"),
    ("--seed", seed, 0, 0, "seed of the initialisation, the order of samples and the splits"),
]


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line, which name the nearest flag."""

    def __init__(self, **options):
        # no abbreviations: --min would be taken for --mini, but with the full-size defaults
        super().__init__(allow_abbrev=False, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses unknown flags here, where a subcommand still knows its own."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # the value of an unknown flag is unknown, too
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            self.error(startup.unknown_flag(flag, self._option_string_actions))
        return namespace, unknown

    def error(self, message):
        startup.print_once(f"{self.prog}: error: {message} (see --help)")
        self.exit(2)


def add_flags(parser, groups):
    """Adds groups of flags, {title: rows of (flag, type, full-size default, miniature default,
    help)}.

    type: bool is a switch, a tuple lists the choices; a list as default takes several values.
    `--mini` on the command line selects the second default; flags that are given win."""
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for row in rows:
            add_flag(group, *row)


def add_flag(parser, flag, kind, full, mini, about):
    """Adds a row of add_flags; its help ends with the default."""
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=about)
        return
    default = mini if is_mini() else full
    if default not in (None, []):
        about += " (default: %(default)s)"
    nargs = "+" if isinstance(full, list) else None
    kind = {str: text, Path: path}.get(kind, kind)
    allowed = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
    parser.add_argument(flag, nargs=nargs, default=default, help=about, **allowed)


def is_mini():
    """Whether `--mini` is on the command line, which only replaces defaults."""
    return "--mini" in sys.argv[1:]


def add_command(commands, name, run, about, groups, **defaults):
    """A subcommand with --mini and groups of flags, {title: rows}."""
    parser = commands.add_parser(name, help=about, description=about,
                                 usage="%(prog)s [FLAGS]")
    parser.add_argument("--mini", action="store_true",
                        help="use the miniature's models (with --help: show its defaults), and one "
                             "CPU thread a process unless OMP_NUM_THREADS is set")
    add_flags(parser, groups)
    parser.set_defaults(run=run, **defaults)
    return parser


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


def user_message(error):
    """What to tell the user about an exception; None if it is a bug."""
    reason = first_line(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        # nobody reads on, as in `... | head`
        return ""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        reason = first_line(error.strerror or error)
        return f"{where}{reason}{ADVICE.get(error.errno, '')}"
    # the libraries have no types of their own for some errors
    if "EADDRINUSE" in str(error):
        return ("the port is in use: start with `torchrun --standalone` (any free port) or another "
                "--master-port")
    memory = "can't allocate memory" in str(error)
    if memory or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: use a smaller --batch-size (or --micro-batch). {reason}"
    full = "No space left" in str(error)
    if full or isinstance(error, SafetensorError):
        return reason + ADVICE[errno.ENOSPC] * full
    return None


def cli_main(main, *after_interrupt):
    """Calls main(). What the user can put right ends as one line on stderr and exit code 1, once
    for all processes of a machine. THINKDIFF_DEBUG=1 shows the traceback.

    Ctrl-C exits with 130 and says after_interrupt, argparse's own errors exit with 2."""
    # the libraries warn about what these scripts do on purpose, such as leaving out T5's encoder;
    # diffusers is not installed everywhere (prepare_data.py --backend vllm)
    for library in ("transformers", "diffusers"):
        if library in sys.modules:
            sys.modules[library].utils.logging.set_verbosity_error()
    # the aligner's weights are in fp32, what they meet in bf16
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    # startup has left Ctrl-C to the system
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    message, code = "", 0
    try:
        main()
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        message, code = "; ".join(["interrupted", *after_interrupt]), 130
    except Exception as error:
        message, code = user_message(error), 1
        if message is None:
            raise
        if os.environ.get("THINKDIFF_DEBUG") == "1":
            traceback.print_exc()
    finally:
        release_locks()
    if message:
        startup.print_once(f"error: {message}")
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    if code:
        sys.exit(code)


# ---------------------------------------------------------------------------- loading models
@contextlib.contextmanager
def loading(path):
    """Around code that loads a model from a folder or the hub: failures become a UserError.

    A model in a folder may have no more weights than its files have bytes, or twice as many, as
    some share weights: a wrong width in a config.json would cost any amount of memory."""
    advice = ("Check the name, log in with `hf auth login` and accept the licence if the model is "
              "gated (FLUX.1-dev is), or give the folder of a local copy.")
    n_weights, most = 0, math.inf
    if os.path.isdir(path):
        advice = "If this is the right kind of model, download it again."
        files = [*Path(path).glob("*"), *Path(path).glob("*/*")]
        most = 2 * sum(file.stat().st_size for file in files if file.is_file()) + 10**7
    elif str(path).startswith((".", "/", "~")):
        raise UserError(f"{path} is no folder: give the folder of a model, or its name on the hub")

    def count(module, name, weight):
        nonlocal n_weights
        # weights that are read take the place of those of the same name
        n_weights += 0 if hasattr(module, name) else weight.numel()
        if n_weights > most:
            raise ValueError("a config.json describes more weights than the files can hold")
    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    # damaged files lead to exceptions of any kind
    except Exception as error:
        raise UserError(f"cannot load {path}: {first_line(error)} {advice}") from error
    finally:
        hook.remove()


def pretrained(cls, path, **kwargs):
    """`cls.from_pretrained(path, **kwargs)`; raises UserError if it cannot be loaded."""
    with loading(path):
        return cls.from_pretrained(path, **kwargs)


def pretrained_model(cls, path, **kwargs):
    """A model of transformers; config and state_dict, if given, are used in place of the files.

    With device_map=device each tensor is read, converted and moved by itself: main memory never
    holds the model. Raises UserError if it cannot be loaded or if weights are missing or of other
    sizes than the config says: transformers would make random ones."""
    with loading(path):
        model, info = cls.from_pretrained(
            None if "state_dict" in kwargs else path, output_loading_info=True,
            ignore_mismatched_sizes=True, **kwargs)
    wrong = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if wrong:
        raise UserError(f"{path} lacks weights of a {type(model).__name__}, or they are of other "
                        f"sizes: {', '.join(sorted(wrong)[:4])}; download it again")
    return model


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


def part_weights(path, wanted):
    """{name: unread tensor} of those whose names wanted(name) accepts, for pretrained_model.

    Only the shards that hold one are fetched. path: folder or hub name. Raises UserError if the
    model cannot be loaded or has no safetensors."""
    weights, files = {}, weight_files(path, wanted)
    with loading(path):
        pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        if files == ["model.safetensors"] and not has_file(path, files[0]):
            if any(has_file(path, file) for file in pickles):
                raise UserError(
                    f"{path} has only pytorch_model.bin, a pickle of which no part can be read: "
                    "load it once with transformers, `save_pretrained` it and give that folder")
        for file in files:
            tensors = safe_open(cached_file(path, file), "pt")
            weights |= {name: tensors.get_slice(name) for name in filter(wanted, tensors.keys())}
    return weights


# --------------------------------------------------------------------- processes and devices
def torchrun_ranks():
    """(rank, number of processes, rank on this machine) from torchrun; (0, 1, 0) without it."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    return tuple(int(os.environ.get(name, default)) for name, default in names)


def pick_device(dtype="auto"):
    """(device, dtype): this process's GPU in bf16 (fp32 if it has no bf16), or the CPU in fp32.

    Without CUDA, Apple's GPU in bf16 (mps; never tried). dtype: of DTYPE_FLAG; wins if not auto."""
    if not torch.cuda.is_available():
        has_mps = torch.backends.mps.is_available()
        device, best = ("mps", torch.bfloat16) if has_mps else ("cpu", torch.float32)
        return torch.device(device), best if dtype == "auto" else getattr(torch, dtype)
    local_rank = torchrun_ranks()[2]
    if local_rank >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise UserError(f"process {local_rank} has no GPU: use torchrun --nproc_per_node {n_gpus}")
    torch.cuda.set_device(local_rank)
    if dtype == "auto":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    return torch.device("cuda", local_rank), getattr(torch, dtype)


def to_device(tensors, device):
    """The tensors on `device`; pinned memory lets the CPU go on while a GPU receives them."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [t if t.is_cuda else t.pin_memory().to(device, non_blocking=True) for t in tensors]


def shared_store():
    """The key-value store of the processes that torchrun has started; of one process its own."""
    if torchrun_ranks()[1] == 1:
        return dist.HashStore()
    # all attempts of torchrun share a store, where those that have ended left their addresses
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])


def start_processes(device):
    """Connects the processes that torchrun has started; nothing to do for one process."""
    rank, world, _ = torchrun_ranks()
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=shared_store(), rank=rank, world_size=world)


def sum_over_processes(*tensors):
    """Replaces each tensor, in place, by its sum over all processes. UserError: one has ended."""
    try:
        for tensor in tensors if dist.is_initialized() else ():
            dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError("another process has ended; what it said is above") from error


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


def finite(text):
    """A finite float. Raises ValueError for NaN, Infinity, and 1e999, which is read as infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def read_json(path, fields=None, advice="restore or delete it"):
    """The content of a JSON file, if need be an object with `fields`, {name: type}.

    Raises OSError if it cannot be opened, UserError with `advice` if it holds anything else."""
    try:
        value = json.loads(Path(path).read_text("utf-8"), parse_constant=finite, parse_float=finite)
        if fields is not None and not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}, no object")
        for name, kind in (fields or {}).items():
            if not isinstance(value.get(name), kind):
                raise TypeError(f"{name} is a {type(value.get(name)).__name__}")
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)[:90]}): {advice}") from None
    return value


def read_tensors(path, advice="restore or delete it"):
    """{name: tensor} of a safetensors file, on the CPU.

    Raises OSError if it cannot be opened, UserError with `advice` if it is damaged or holds a
    number that is not finite."""
    try:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
    except (SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)[:90]}): {advice}") from None
    return tensors


# what torch.save refers to in a file of tensors and plain containers
PICKLED = r"collections OrderedDict|torch \w+Storage|torch._utils _rebuild_(tensor_v2|parameter)"


def read_pth(path, key, advice="download it again"):
    """{name: tensor} under `key` of a file that torch.save has written, on the CPU.

    No code in the file runs, and it takes no more memory than it takes on the disk. Raises
    UserError with `advice` if it is damaged or refers to more than tensors and containers."""
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type for entry in file.infolist()):
                raise ValueError("it is compressed")
            if file.testzip():
                raise ValueError("a checksum is wrong")
            # torch ignores case
            for entry in (e for e in file.infolist() if e.filename.lower().endswith("data.pkl")):
                for operation, argument, _ in pickletools.genops(file.read(entry)):
                    if operation.name == "GLOBAL" and not re.fullmatch(PICKLED, argument):
                        raise ValueError(f"it refers to {argument}")
        # mapped: a tensor that claims more than the file holds is refused
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))[key]
        for name, tensor in tensors.items():
            # a view of one number can have any shape
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(f"{name} is larger than the file")
    # zipfile and torch raise many kinds
    except Exception as error:
        raise UserError(f"cannot read '{key}' of {path} with weights_only=True "
                        f"({first_line(error)[:90]}): {advice}") from None
    return {str(name): tensor for name, tensor in tensors.items()}


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
    rank, _, local_rank = torchrun_ranks()
    # torchrun's own folder, of this start and this machine: ATTEMPT/RANK/error.json
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    locked = Path(error_file).parents[1] / "locked" if error_file else None
    if rank:
        # until then the first one may be refused; torchrun ends this process with it
        while locked and rank == local_rank and not locked.exists():
            time.sleep(0.1)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is writing to {folder}: wait until it has ended, or choose "
                        "another --out") from None
    LOCKS.append(lock)
    if locked:
        locked.touch()


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
