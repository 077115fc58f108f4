"""Attacks the programs: kills, full disks, damaged and hostile inputs; prints what became of them.

    python tests/stress.py --seed 0                           # about an hour on two cores
    python tests/stress.py --seed 0 --short                   # three minutes, for CI
    python tests/stress.py --seed 0 --only tars --number 17   # one case again; keeps its files

A row of the table is a kind of input. A case is one folder with inputs drawn from (seed, kind,
number), on which the real command lines run: kills in processes of their own, the others in forks
of this one, which has imported everything. What is right is known without the code under test:
from what was put in, from Pillow, or from the same commands undisturbed. Columns:

    tried          inputs, or kills
    refused        one line on stderr that says "error: ", exit code not 0
    skipped        left out, named and counted
    right          the result is that of the undamaged input, or the damage is to numbers and pixels
                   themselves, which only a checksum could show
    traceback      an exception or a signal ended a run, or it failed with more or less than a line
    hang           a run took more than SECONDS, or MEMORY bytes more than at its start
    write outside  something changed that is not in the run's folder
    silent loss    an input is neither used nor named, or a good one was not used
    silently wrong a result differs, or counts do not add up

Exit code 1 if one of the last five is not 0. Where `unshare` makes no file system, the disk is not
tried."""
import argparse
import csv
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
# not torch.set_num_threads: a fork that starts threads would set it again and can fail (torch 2.14)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
FAULTS = ("traceback", "hang", "write outside", "silent loss", "silently wrong")
COLUMNS = ("tried", "refused", "skipped", "right", *FAULTS)
SECONDS, MEMORY = 90, 2 << 30
SCRIPTS = ("prepare_data", "thinkdiff_lvlm", "thinkdiff_clip", "cobsat_eval")
# one at a time, because the others of a batch change the last bits
DRAW = "--size 32 --steps 1 --true-cfg 1 --batch-size 1".split()
# made once, before the workers are forked: folders and the results of undisturbed runs
BASE = {}


# ---------------------------------------------------------------- a case and its runs
class Case:
    """in/: inputs; run/: all that the programs may write; canary/: a neighbour."""

    def __init__(self, kind, number, args):
        self.name, self.number, self.short = f"{kind} {number}", number, args.short
        self.rng = random.Random(f"{args.seed} {kind} {number}")
        self.folder = args.workdir / f"{kind}-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.inputs, self.work, self.canary = (
            self.folder / name for name in ("in", "run", "canary"))
        for folder in (self.inputs, self.work, self.canary):
            folder.mkdir(parents=True)
        for name in ("keep.png", "00001.png", "notes.json"):
            (self.canary / name).write_text("here before")
        self.counts, self.faults, self.notes = Counter(), [], {}

    def fault(self, column, message):
        self.counts[column] += 1
        self.faults.append(f"{self.name}: {column}: {message}")

    def run(self, script, *argv, hook=None):
        """(exit code, stdout, stderr) of a command line in a fork; faults that any run can have
        are noted, and the exit code is None then. hook(notes) runs before it, in the fork."""
        before, argv = self.outside(), [*map(str, argv)]
        files = [self.folder / name for name in ("stdout", "stderr", "notes")]
        pid = os.fork()
        if not pid:
            in_fork(self.work, script, argv, files, hook)
        end, used = time.time() + SECONDS, None
        while time.time() < end and not used:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            used = done and usage
            time.sleep(0.003)
        if not used:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        out, err = (file.read_text(errors="replace") for file in files[:2])
        code = os.waitstatus_to_exitcode(status) if used else None
        what = f"{script} {' '.join(argv)[:1500]!a}: "
        ended = self.check_end(code, err, what)
        if used and used.ru_maxrss * 1024 - MEMORY > BASE["memory"]:
            self.fault("hang", f"{what}took {used.ru_maxrss >> 10} MB")
        for name in dict(before.items() ^ self.outside().items()):
            self.fault("write outside", f"{what}{name}")
        if files[2].exists():
            self.notes = pickle.loads(files[2].read_bytes())
        return code if ended else None, out, err

    def check_end(self, code, err, what):
        """Whether a run ended as it may: with exit code 0, or another and one line."""
        lines = sum("error: " in line for line in err.splitlines())
        if code is None:
            self.fault("hang", f"{what}no end")
        elif "Traceback" in err or code not in (0, 1, 2):
            self.fault("traceback", f"{what}code {code}: {err.strip()[-300:]}")
        elif code and lines != 1:
            self.fault("traceback", f"{what}code {code}, {lines} lines: {err.strip()[-300:]}")
        else:
            return True
        return False

    def outside(self):
        """{path: hash} of all of the case that a run may not change."""
        files = [*self.inputs.rglob("*"), *self.canary.rglob("*"), *self.folder.glob("*")]
        own = {self.work, *(self.folder / name for name in ("stdout", "stderr", "notes"))}
        return {str(file): digest(file) for file in files if file not in own}

    def check_found(self, out, tried, used):
        """Checks "found N pictures = W written + S skipped"; used: W, None if not known."""
        found = re.findall(r"found (\d+) pictures = (\d+) \D*\+ (\d+) skipped", out)
        n, w, s = map(int, found[-1]) if found else (-1, 0, 0)
        if n != w + s or (tried is not None and n != tried) or (used is not None and w != used):
            self.fault("silently wrong", f"found {found}, put in {tried}, used {used}")

    def compare(self, code, said, result, payload=False):
        """Counts the outcome of a run on damaged state. result(): whether it is the right one."""
        if code is None:
            return
        if code:
            self.counts["refused"] += 1
        elif re.search(r"skipped \(\d|skipped [1-9]|[1-9]\d* skipped", said):
            self.counts["skipped"] += 1
        elif payload or result():
            self.counts["right"] += 1
        else:
            self.fault("silently wrong", f"{self.notes.get('damage')} changes the result")


def digest(file):
    return hashlib.sha1(file.read_bytes()).hexdigest() if file.is_file() else "no file"


def in_fork(work, script, argv, files, hook):
    """Runs a command line in this process, which is a fork, and ends it."""
    notes, code = {}, 0
    try:
        os.chdir(work)
        streams = [os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                   for name in (os.devnull, *files[:2])]
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        # far above MEMORY: only to protect this machine
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MEMORY,) * 2)
        if hook:
            hook(notes)
        sys.argv = [str(REPO / script), *argv]
        module = Path(script).stem.replace("miniature", "miniature.__main__")
        importlib.import_module("common").cli_main(importlib.import_module(module).main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    if notes:
        files[2].write_bytes(pickle.dumps(notes))
    os._exit(code)


# ---------------------------------------------------------------- results, to be compared
def shard_rows(folder):
    """(record, {tensor: its row's bytes}) of every sample in a folder of prepare_data.py."""
    from safetensors.torch import load_file
    for file in sorted(folder.glob("shard-*.json")):
        samples = json.loads(file.read_text())["samples"]
        tensors = load_file(file.with_suffix(".safetensors")) if samples else {}
        for i, record in enumerate(samples):
            yield record, {name: rows[i].view(-1).float().numpy().tobytes()
                           for name, rows in tensors.items()}


def prepared(folder):
    """[(index, tokens and features)], sorted: the same index twice would be seen."""
    return sorted((record["index"], sorted(row.items())) for record, row in shard_rows(folder))


def trained(folder):
    """The aligner and log.csv without its times."""
    from safetensors.torch import load_file
    aligner = load_file(folder / "aligner/model.safetensors")
    with (folder / "log.csv").open() as file:
        log = [{name: value for name, value in row.items() if name != "samples_per_s"}
               for row in csv.DictReader(file)]
    return {name: tensor.numpy().tobytes() for name, tensor in aligner.items()}, log


def evaluated(folder):
    """CoBSAT's images, verdicts and table."""
    images = {str(file.relative_to(folder)): digest(file) for file in folder.glob("exps/**/*.jpg")}
    verdicts = {str(file.relative_to(folder)): json.loads(file.read_text())
                for file in folder.glob("verdicts/**/*.json")}
    return images, verdicts, (folder / "results.md").read_text()


def pixels(file):
    from PIL import Image
    return Image.open(file).convert("RGB").tobytes()


# The programs with settings for `scale` times a few seconds, and what they make
def programs(scale, base):
    small = "--batch-size 8 --log-every 3 --eval-every 10 --keep 2 --resume --mini --save-every 8"
    train = f"--steps {100 * scale} {small} --out out --data"
    return {
        "prepare": (f"prepare_data.py lvlm --mini --images {base}/many --out out --tokens 12 "
                    f"--count {140 * scale} --batch-size 8 --shard-size 16", prepared),
        "lvlm": (f"thinkdiff_lvlm.py train {train} {base}/data", trained),
        "clip": (f"thinkdiff_clip.py train --hidden 16 {train} {base}/pictures", trained),
        "cobsat": (f"cobsat_eval.py run --mini --images {base}/cobsat --out out --shots 1 --tasks "
                   f"1 2 --limit {6 * scale} --method thinkdiff oracle --size 32 --steps 2 "
                   "--true-cfg 1 --max-new-tokens 16 --batch-size 4 --judge clip", evaluated),
    }


# ---------------------------------------------------------------- kills
def attack_kills(case):
    """Kills one program again and again, also while it saves; a run that ends must be right."""
    name = list(BASE["programs"])[case.number % 4]
    command, result = BASE["programs"][name]
    kills, since = (1, 0) if case.short else (6, 0)
    while True:
        process = start(case, command.split())
        how = case.rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
        end = time.time() + (case.rng.uniform(0.5, BASE[name, 1][1]) if kills else 5 * SECONDS)
        # every second time it waits until something is being saved
        last = end + case.rng.choice([0, 2])
        while process.poll() is None and (time.time() < end or (
                kills and time.time() < last and not is_saving(case.work))):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(how if kills else signal.SIGKILL)
            process.wait()
            if not kills:
                return case.fault("hang", f"{command} does not end")
            case.counts["tried"] += 1
            kills, since = kills - 1, since + 1
            check_stop(case, name, how, process.returncode)
            continue
        err = (case.folder / "stderr").read_text()
        if case.check_end(process.returncode, err, command) and process.returncode == 0:
            if result(case.work / "out") == BASE[name, 1][0]:
                case.counts["right"] += since
            else:
                case.fault("silently wrong", f"{since} kills change the result of {command}")
        else:
            case.fault("silent loss", f"cannot go on: {err[-300:]}")
        if not kills:
            return
        shutil.rmtree(case.work / "out")
        since = 0


def is_saving(folder):
    """Whether a file or folder is half written."""
    names = (name for _, folders, files in os.walk(folder) for name in folders + files)
    return any(re.search(r"\.tmp|\.partial", name) for name in names)


def start(case, command):
    """A process of a command line, in run/."""
    with open(case.folder / "stdout", "w") as out, open(case.folder / "stderr", "w") as err:
        script = [str(REPO / command[0])] if command[0] != "-m" else command[:1]
        return subprocess.Popen([sys.executable, *script, *command[1:]], cwd=case.work, stdout=out,
                                stderr=err, stdin=subprocess.DEVNULL)


def check_stop(case, name, how, code):
    """SIGTERM and Ctrl-C end in a line or in silence; training saves and says so."""
    out, err = ((case.folder / file).read_text() for file in ("stdout", "stderr"))
    if how == signal.SIGKILL:
        return
    expected = {signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}[how]
    if "Traceback" in err or code not in (0, *expected):
        case.fault("traceback", f"{name} {how.name}: code {code}: {err[-300:]}")
    elif name in ("lvlm", "clip") and how == signal.SIGTERM and "train:" in err:
        saved = list(case.work.glob("out/checkpoint-*")) or list(case.work.glob("out/aligner"))
        if code == -15 or not saved or not re.search("saved|checkpoint", out + err):
            case.fault("silent loss", f"{name} SIGTERM: code {code}: {err[-200:]}")


def attack_ranks(case):
    """Kills one of two processes; `torchrun --max-restarts 1` goes on by itself."""
    name = ("lvlm", "prepare", "clip")[case.number // 2 % 3]
    restarts = int(case.number % 2 == 0 and name != "prepare")
    command, result = BASE["programs"][name]
    delay, ranks = case.rng.uniform(0.5, 1) * BASE[name, 2][1], []
    while not ranks:
        shutil.rmtree(case.work / "out", ignore_errors=True)
        process = start(case, torchrun(command, case.folder / "logs", restarts))
        time.sleep(delay)
        ranks = [int(file.parent.name) for file in Path("/proc").glob("[0-9]*/stat")
                 if parent(file) == process.pid]
        # it had ended
        delay *= 0.8
    case.counts["tried"] += 1
    os.kill(case.rng.choice(ranks), signal.SIGKILL)
    code = wait(process)
    # torchrun prints a screen of its own: what the processes say is in the logs
    for file in case.folder.glob("logs/**/stderr.log"):
        text = file.read_text()
        if "Traceback" in text or text.count("error: ") > 1:
            return case.fault("traceback", f"{name}, {file}: {text[-300:]}")
    if restarts and code:
        return case.fault("silent loss", f"{name}: --max-restarts 1 ends with {code}")
    code = code and wait(start(case, torchrun(command, case.folder / "logs2", 0)))
    case.compare(code, "", lambda: result(case.work / "out") == BASE[name, 2][0])


def torchrun(command, logs, restarts):
    flags = f"--standalone --nproc_per_node 2 --max-restarts {restarts} -r 3 --log-dir {logs}"
    script, *rest = command.split()
    return ["-m", "torch.distributed.run", *flags.split(), str(REPO / script), *rest]


def parent(stat):
    try:
        return int(stat.read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def wait(process):
    """The exit code, None after SECONDS."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def attack_disk(case):
    """Fills a small file system at a random level; with space again the same command goes on."""
    disk = case.work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk]).returncode:
        return
    name = ("prepare", "lvlm", "draw", "cobsat", "clip")[case.number % 5]
    command, result = BASE["small"][name]
    right, size = BASE["small", name]
    (disk / "before").write_text("here before")
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (32 << 20) - 8192 - int(case.rng.random() * size))
    command = command.replace("--out out", f"--out {disk}/out").split()
    code, _, err = case.run(*command)
    case.counts["tried"] += 1
    case.counts["refused"] += code == 1
    if code and not re.search("space|free", err):
        case.fault("silently wrong", f"{name}: a full disk is called {err[-200:]}")
    if (disk / "before").read_text() != "here before":
        case.fault("silent loss", f"{name} changes a file that was there")
    filler.unlink()
    if code is not None:
        again = case.run(*command)[0] if code else 0
        if again or result(disk / "out") != right:
            case.fault("silent loss", f"{name} does not go on when there is space")
    subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- damage
def damage(data, rng):
    """Bytes with flipped bits, a cut, a hole, noise, something doubled, or nothing left."""
    how = rng.choice(["flip"] * 5 + ["cut", "hole", "noise", "double", "empty"])
    at = rng.randrange(len(data) + 1)
    end, data = at + rng.choice([1, 4, 64, 512, 4096]), bytearray(data)
    if how == "flip":
        for _ in range(rng.choice([1, 1, 1, 4, 30]) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "hole":
        data[at:end] = bytes(len(data[at:end]))
    elif how == "noise":
        data[at:end] = rng.randbytes(len(data[at:end]))
    elif how == "double":
        data[at:at] = data[at:end]
    else:
        data.clear()
    return bytes(data), f"{how} at {at} to {end}"


ODD = [None, True, -1, 0, 1, 1.5, 1e308, 10 ** 12, 10 ** 400, float("nan"), -float("inf"), "", "x",
       "None", "x" * 300, "\ud800", "a\0b", "../canary/keep.png", "/dev/zero", [], {}, [[]], [None],
       {"": None}, "@deep@"]


def odd(value, rng):
    """JSON with one value at a random place replaced, left out or added."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(ODD)
    value = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.15:
        del value[key]
    elif how < 0.2 and isinstance(value, dict):
        value["unknown"] = 1
    else:
        value[key] = odd(value[key], rng)
    return value


def dump(value):
    return json.dumps(value).replace('"@deep@"', "[" * 99999 + "]" * 99999).encode()


def damage_state(file, rng):
    """Damages a JSON, JSONL or CSV file; (what was done, whether only numbers or texts in it
    differ)."""
    data = file.read_bytes()
    new, how = damage(data, rng)
    if rng.random() < 0.5 and file.suffix != ".csv":
        lines = data.splitlines() if file.suffix == ".jsonl" else [data]
        at = rng.randrange(len(lines))
        lines[at] = dump(odd(json.loads(lines[at]), rng))
        new, how = b"\n".join(lines) + b"\n", f"line {at + 1} is {lines[at][:300]!a}"
    file.write_bytes(new)
    return f"{file.name}: {how}", outline(file.name, data) == outline(file.name, new)


def outline(name, data):
    """What is left of a state file without its numbers and texts; unique if it is not readable."""
    def kinds(value):
        if isinstance(value, dict):
            return {key: kinds(item) for key, item in value.items()}
        if isinstance(value, list):
            return [kinds(item) for item in value]
        return isinstance(value, str), value is None, isinstance(value, (int, float))
    try:
        if name.endswith(".csv"):
            rows = [line.split(",") for line in data.decode().splitlines()]
            return rows[0], [(row[0], [bool(float(x)) if x else x for x in row[1:]])
                             for row in rows[1:]]
        return [kinds(json.loads(x, parse_constant=int)) for x in (
            data.splitlines() if name.endswith("l") else [data])]
    except (ValueError, RecursionError, LookupError):
        return object()


def damage_tensors(file, rng):
    """The same for a safetensors file: bytes of it, or a tensor of other values, shape or name."""
    import torch
    from safetensors.torch import load, save
    data = file.read_bytes()
    tensors = load(data)
    how = rng.choice(["bytes"] * 6 + ["header"] * 4 + ["nan", "shape", "type", "name", "less"])
    name = rng.choice(sorted(tensors))
    new, tensor = data, tensors[name]
    if how == "bytes":
        new, how = damage(data, rng)
    elif how == "header":
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header, how = damage(data[:end], rng)
        new, how = header + data[end:], f"header {how}"
    else:
        if how == "nan" and tensor.is_floating_point():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), -torch.inf])
        elif how == "shape":
            tensors[name] = tensor[None].repeat(2, *[1] * tensor.ndim)
        elif how == "type":
            tensors[name] = tensor.to(rng.choice([torch.int16, torch.bool, torch.float64]))
        elif how in ("name", "less"):
            tensors.pop(name)
            if how == "name":
                tensors[f"{name}x"] = tensor
        how, new = f"{how} of {name}", save(tensors)
    file.write_bytes(new)
    return f"{file.name}: {how}", same_form(load, data, new)


def damage_pth(file, rng):
    """The same for a released checkpoint, a zip with a pickle; and pickles that would run code,
    and small files that unpack to gigabytes."""
    import torch
    data, how = file.read_bytes(), rng.choice(["bytes"] * 8 + ["code", "bomb", "view", "keys"])
    model = torch.load(file, weights_only=True)["model"]
    first = next(iter(model))
    if how == "bytes":
        new, how = damage(data, rng)
        file.write_bytes(new)
    elif how == "code":
        torch.save({"model": model, "x": Hostile(str(file.parents[1] / "canary/x"))}, file)
    elif how == "bomb":
        file.write_bytes(deflate_bomb(data))
    elif how == "view":
        model[first] = torch.zeros(1).expand(rng.choice([10 ** 5, 10 ** 6]), 10 ** 5)
        torch.save({"model": model}, file)
    else:
        value = rng.choice([None, 3, "x", torch.tensor(float("nan")), model[first].T, {}, [1]])
        model[rng.choice([first, "x", 3])] = value
        torch.save(rng.choice([{"model": model}, model, [model], value]), file)
    if how in ("bomb", "view"):
        return f"{file.name}: {how}", False
    return f"{file.name}: {how}", same_form(
        lambda x: torch.load(io.BytesIO(x), weights_only=True)["model"], data, file.read_bytes())


def same_form(load, *files):
    """Whether tensors differ in their finite values only."""
    try:
        forms = [{k: (v.shape, v.dtype, bool(v.isfinite().all())) for k, v in load(x).items()}
                 for x in files]
    except Exception:
        return False
    return forms[0] == forms[1]


class Hostile:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (self.path,)


def deflate_bomb(data):
    """The checkpoint with its largest tensor replaced by 8 GB of zeros in a few MB."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        largest = max(old.infolist(), key=lambda entry: entry.file_size).filename
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
            for name in old.namelist():
                if name != largest:
                    new.writestr(name, old.read(name))
            with new.open(largest, "w", force_zip64=True) as file:
                for _ in range(512):
                    file.write(bytes(1 << 24))
    return packed.getvalue()


# ---------------------------------------------------------------- pictures
# what Pillow can write, and modes of each
FORMATS = {"PNG": "1 L LA P RGB RGBA I;16", "JPEG": "L RGB CMYK", "WEBP": "RGB RGBA",
           "GIF": "L P RGB", "TIFF": "1 L P RGB RGBA CMYK I;16 LAB", "BMP": "1 L P RGB"}


def picture(rng, kind=None, size=None):
    """(format, bytes) of a smooth picture with noise, often with metadata or transparency."""
    import numpy as np
    from PIL import Image
    kind = kind or rng.choice(list(FORMATS))
    mode, options = rng.choice(FORMATS[kind].split()), {}
    width, height = size or (rng.randint(8, 90), rng.randint(8, 90))
    noise = np.random.default_rng(rng.randrange(2 ** 32))
    raw = {"1": "L", "P": "RGB"}.get(mode, mode)
    channels = {"L": 1, "I;16": 1, "LA": 2}.get(raw, len(raw))
    array = np.linspace(0, 200, width)[None, :, None] * noise.random((1, 1, channels))
    array = (array + noise.integers(0, 40, (height, width, channels))).astype(np.uint8)
    if mode == "I;16":
        array = array.astype(np.uint16) * 257
    image = Image.frombytes(raw, (width, height), array.tobytes()).convert(mode)
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and rng.random() < 0.5:
        image.getexif()[274] = rng.randint(1, 8)
        image.getexif()[270] = "a description"
        options["exif"] = image.getexif()
    if kind in ("PNG", "GIF") and mode in ("L", "P", "I;16") and rng.random() < 0.5:
        options["transparency"] = rng.randrange(256)
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and rng.random() < 0.3:
        options["icc_profile"] = rng.randbytes(200)
    packing = rng.choice(["raw", "tiff_lzw", "tiff_deflate"])
    options |= {"JPEG": {"progressive": rng.random() < 0.5}, "WEBP": {"lossless": True},
                "TIFF": {"compression": packing}}.get(kind, {})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return kind, file.getvalue()


def damage_picture(kind, data, rng):
    """Damaged bytes, or a PNG's chunk or a JPEG's segment changed with its checksum right."""
    if rng.random() < 0.1:
        return data, "whole"
    if kind not in ("PNG", "JPEG") or rng.random() < 0.5:
        return damage(data, rng) if rng.random() < 0.7 else (
            (new := damage(data[:100], rng))[0] + data[100:], f"head {new[1]}")
    parts, at = [], 8 if kind == "PNG" else 2
    while at < len(data) - 4:
        size = 12 + struct.unpack(">I", data[at:at + 4])[0]
        if kind == "JPEG":
            size = 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
        parts.append(data[at:at + size] if kind == "PNG" or data[at + 1] != 0xda else data[at:])
        at += len(parts[-1])
    k, how = rng.randrange(len(parts)), rng.choice(["drop", "double", "swap", "content", "size"])
    name = parts[k][4:8] if kind == "PNG" else parts[k][:2]
    if how == "content" and kind == "PNG":
        body = name + damage(parts[k][8:-4], rng)[0]
        parts[k] = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    elif how == "content":
        parts[k] = parts[k][:4] + damage(parts[k][4:], rng)[0]
    elif how == "size" and kind == "PNG":
        sides = rng.choices([0, 1, 90, 20000, 65535, 2 ** 31 - 1], k=2)
        body = b"IHDR" + struct.pack(">II", *sides) + parts[0][16:-4]
        parts[0] = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    elif how == "swap":
        rng.shuffle(parts)
    else:
        parts[k:k + 1] = [] if how == "drop" else [parts[k]] * 2
    return data[:8 if kind == "PNG" else 2] + b"".join(parts), f"{how} of {name}"


def seen(data, upright=True):
    """(height, width, 3) as Pillow's decoders see a picture: upright, on white. None: they cannot;
    False: too large to be tried here."""
    import numpy as np
    from PIL import Image
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > 3e7:
            return False
        image.load()
    except Exception:
        return None
    try:
        turn = image.getexif().get(274, 1) if upright else 1
    except Exception:
        turn = 1
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(float)
        rgb = np.repeat((grey / 257)[..., None], 3, axis=2)
        rgb[grey == image.info.get("transparency", -1)] = 255
    elif image.mode in ("I", "F"):
        # which range they have is not known
        return False
    elif image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        rgb = rgba[..., :3] * alpha + 255 * (1 - alpha)
    else:
        rgb = np.asarray(image.convert("RGB")).astype(float)
    turns = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
             5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 8: np.rot90,
             7: lambda x: x[::-1, ::-1].swapaxes(0, 1)}
    return turns.get(turn, lambda x: x)(rgb)


def is_close(want, got):
    return want.shape == got.shape and abs(want - got).max() <= 2


def keep_pixels(notes):
    """Notes the pixels of each picture that prepare_data.py reads."""
    import numpy as np

    import prepare_data
    load = prepare_data.open_image

    def keep(ref, *args, **options):
        image = load(ref, *args, **options)
        notes[tuple(ref)] = np.asarray(image)
        return image
    prepare_data.open_image = keep


def prepare(case, *sources):
    """Describes the pictures in `sources`: (exit code, {sample as stored: pixels},
    [(picture, reason)] skipped)."""
    code, out, err = case.run(
        "prepare_data.py", "lvlm", "--mini", "--tokens-only", "--tokens", 2, "--batch-size", 16,
        "--out", "out", "--images", *sources, hook=keep_pixels)
    written, skipped = [], []
    for record, _ in shard_rows(case.work / "out") if code == 0 else ():
        written.append((record["sample"], case.notes.get(tuple(record["sample"]))))
    if (case.work / "out/skipped.csv").exists():
        with open(case.work / "out/skipped.csv", newline="", errors="surrogateescape") as file:
            skipped = list(csv.reader(file))[1:]
    if code == 0:
        case.check_found(out, None, len(written))
    return code, written, skipped


def attack_pictures(case):
    """Damaged pictures in a folder: what Pillow decodes must be seen so, the others be named."""
    files = {}
    for i in range(17):
        kind, whole = picture(case.rng)
        data, how = damage_picture(kind, whole, case.rng) if i else (whole, "whole")
        name = case.inputs / f"{i:02}.{kind.lower()}"
        name.write_bytes(data)
        files[str(name)] = whole, data, how
    code, written, skipped = prepare(case, case.inputs)
    case.counts["tried"] += len(files)
    written = {sample[0]: array for sample, array in written}
    skipped = dict(skipped)
    for name, (whole, data, how) in files.items() if code is not None else ():
        want, got, what = seen(data), written.get(name), f"{name} ({how})"
        if want is None and got is not None:
            # what Pillow does not read may be read, but only as it was; its EXIF may be damaged
            want = seen(whole)
            if want is not None and want is not False and not is_close(want, got):
                want = seen(whole, upright=False)
        strip = want is not None and want is not False and (
            max(want.shape[:2]) > 200 * min(want.shape[:2]))
        if (got is None) == (name not in skipped):
            case.fault("silent loss", f"{what} is {'neither' if got is None else 'both'}")
        elif got is None and (want is None or want is False or strip):
            case.counts["skipped"] += 1
        elif got is None:
            case.fault("silent loss", f"{what}: Pillow reads it, but: {skipped[name]}")
        elif want is False or max(want.shape) > 1024 or is_close(want, got):
            case.counts["right"] += 1
        else:
            case.fault("silently wrong", f"{what}: {want.shape} {want.mean()}, {got.shape} "
                                         f"{got.mean()}")


# ---------------------------------------------------------------- tars and captions
def build_tar(rng, folder, prefix):
    """([(member name, pixels or None if it need not be readable)], bytes) of a tar of pictures,
    with links, long and doubled names, sparse and special members."""
    import numpy as np
    from PIL import Image
    members, file, names = [], io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=rng.choice([0, 1, 2])) as tar:
        for i in range(rng.randint(3, 6)):
            color = tuple(rng.randbytes(3))
            image, png = Image.new("RGB", (16, 16), color), io.BytesIO()
            image.save(png, "PNG")
            name = f"{prefix}{i}" + rng.choice(["", "", "é", "x" * 80, " b"]) + ".png"
            if rng.random() < 0.1 and names:
                name = rng.choice(names)
            info = tarfile.TarInfo(name)
            info.size = png.tell()
            png.seek(0)
            tar.addfile(info, png)
            members.append((name, np.asarray(image)))
            names.append(name)
            kind = rng.choice([None] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                                            tarfile.CONTTYPE, b"Z"])
            if kind:
                link = tarfile.TarInfo(f"{prefix}link{i}.png")
                link.type = kind
                link.linkname = rng.choice([name, "missing.png", "/etc/passwd", "../x.png"])
                tar.addfile(link)
                members.append((link.name, None))
    data = file.getvalue()
    if rng.random() < 0.15:
        data = sparse_tar(folder, prefix, rng, members)
    return members, data


def sparse_tar(folder, prefix, rng, members):
    """A tar that GNU tar makes of a picture with a hole; replaces `members`."""
    import numpy as np
    from PIL import Image
    array = np.zeros((128, 128, 3), np.uint8)
    array[:16] = rng.randrange(1, 256)
    name = folder / f"{prefix}hole.bmp"
    Image.fromarray(array).save(name)
    subprocess.run(["fallocate", "--dig-holes", name], check=True)
    members[:] = [(name.name, array)]
    form = rng.choice(["gnu", "posix"])
    tar = subprocess.run(["tar", "-c", "-S", f"--format={form}", "-C", folder, name.name],
                         check=True, stdout=subprocess.PIPE).stdout
    name.unlink()
    return tar


def damage_tar(members, data, rng, folder):
    """Bits flipped in headers or data, holes, cuts, two tars in one, compression."""
    how = rng.choice(["whole", "header", "data", "hole", "cut", "both", "junk", "gzip"])
    at = rng.randrange(len(data) // 512) * 512
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
    if how in ("header", "data"):
        one = rng.choice(infos)
        # a BMP has no checksum
        if how == "header" or one.name.endswith(".bmp") or not one.size:
            at = rng.randrange(one.offset, one.offset_data)
        else:
            at = rng.randrange(one.offset_data, one.offset_data + one.size)
        new = bytearray(data)
        new[min(at, len(new) - 1)] ^= 1 << rng.randrange(8)
        return bytes(new), how
    if how in ("hole", "junk"):
        size = rng.choice([1, 2, 5]) * 512
        if how == "junk":
            return data[:at] + rng.randbytes(size) + data[at:], f"junk {size} at {at}"
        # whole members replaced by 1,024 zeros, or by zeros to the end, look like an archive's end
        if {at, at + size} <= {one.offset for one in infos} or not data[at + size:].strip(b"\0"):
            at, size = 0, 512
        return data[:at] + bytes(size) + data[at + size:], f"hole {size} at {at}"
    if how == "cut":
        return data[:rng.randrange(1, len(data))], how
    if how == "both":
        more, other = build_tar(rng, folder, "second")
        members += more
        return data + other, how
    return data, how


def attack_tars(case):
    """Each picture of a tar is read right, or is named, or the tar is."""
    members, data = build_tar(case.rng, case.inputs, "")
    data, how = damage_tar(members, data, case.rng, case.inputs)
    tar = case.inputs / ("a.tar.gz" if how == "gzip" else "a.tar")
    if how == "gzip":
        import gzip
        data = gzip.compress(data)
    tar.write_bytes(data)
    case.counts["tried"] += 1
    (case.inputs / "good.png").write_bytes(picture(random.Random(0), "PNG")[1])
    code, written, skipped = prepare(case, case.inputs)
    if code is None:
        return
    if code:
        return case.fault("silent loss", f"{how}: the picture beside the tar is not written")
    left = Counter(array.tobytes() for _, array in members if array is not None)
    for sample, array in written:
        if sample[0] != str(tar):
            continue
        if array is None or not left[array.tobytes()]:
            # a link has the pixels of what it names
            if (sample[1], None) not in [(name, array) for name, array in members]:
                return case.fault("silently wrong", f"{how}: {sample} has pixels of no member")
        elif how in ("whole", "cut", "both") and array.tobytes() not in [
                other.tobytes() for name, other in members
                if other is not None and name == sample[1]]:
            return case.fault("silently wrong", f"{how}: {sample} has another member's pixels")
        else:
            left[array.tobytes()] -= 1
    named = " ".join(name for name, _ in skipped)
    has_fault = any(name == str(tar) for name, _ in skipped)
    used = Counter(sample[1] for sample, _ in written)
    names = Counter(name for name, _ in members)
    for name, array in members:
        lost = left[array.tobytes()] > 0 if array is not None else not used[name]
        if lost and name not in named and not has_fault:
            return case.fault("silent loss", f"{how}: {name} is neither written nor named")
        if lost and how == "whole" and name.endswith(".png") and (
                array is not None and names[name] == 1):
            return case.fault("silent loss", f"{how}: {name} is whole, but skipped: {skipped}")
    case.counts["skipped" if skipped else "right"] += 1


def keep_texts(notes):
    """Notes the captions that thinkdiff_clip.py trains with."""
    import thinkdiff_clip
    split, notes["texts"] = thinkdiff_clip.split, []

    def keep(caption, *args):
        notes["texts"].append(caption)
        return split(caption, *args)
    thinkdiff_clip.split = keep


def odd_caption(rng, i):
    """(suffix, bytes, the text or None, whether it may also be left out)."""
    ends = ["a dog", "été", "猫 🐈", "a\tb", "a\u2028b", "<pad></s>"]
    text = f"number {i} {rng.choice(ends)}"
    how = rng.choice(["whole", "bytes", "coding", "blank", "nul", "huge", "json", "json"])
    suffix, data = "txt", text.encode()
    if how == "bytes":
        data = damage(data, rng)[0]
    elif how == "coding":
        data = text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "cp500"]), "replace")
    elif how == "blank":
        data = rng.choice([b"", b"\n \t", "\u3000".encode(), "\ufeff".encode()])
    elif how == "nul":
        data = data[:4] + b"\0" + data[4:]
    elif how == "huge":
        data = data + b" word" * 300_000
    elif how == "json":
        suffix, data = "json", json.dumps({"caption": text, "url": "x", "width": 3}).encode()
        if rng.random() < 0.6:
            data = dump(odd(json.loads(data), rng)) if rng.random() < 0.5 else damage(data, rng)[0]
    text = None
    try:
        text = data.decode()
        text = json.loads(text)["caption"] if suffix == "json" else text
        # a lone surrogate is no text
        text = text.encode().decode().strip() or None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = None
    either = how in ("nul", "huge") or "\ufeff" in (text or "") or b"NaN" in data
    return suffix, data, text, either or b"Infinity" in data


def attack_captions(case):
    """Every caption that is text is trained with, word for word; the others are named."""
    from PIL import Image

    from miniature import world
    pairs, files = {}, {}
    for i in range(24):
        png = io.BytesIO()
        Image.new("RGB", (world.SIZE,) * 2, tuple(case.rng.randbytes(3))).save(png, "PNG")
        pairs[i] = odd_caption(case.rng, i) if i % 2 else ("txt", b"good %d" % i, f"good {i}", 0)
        files[f"{i:04}.png"], files[f"{i:04}.{pairs[i][0]}"] = png.getvalue(), pairs[i][1]
    if case.rng.random() < 0.5:
        with tarfile.open(case.inputs / "a.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        for name, data in files.items():
            (case.inputs / name).write_bytes(data)
    code, out, err = case.run(
        "thinkdiff_clip.py", "train", "--mini", "--hidden", 8, "--steps", 2, "--batch-size", 24,
        "--data", case.inputs, "--out", "out", hook=keep_texts)
    case.counts["tried"] += 12
    if code is None:
        return
    if code:
        return case.fault("silent loss", f"good captions are not trained with: {err[-300:]}")
    case.check_found(out, 24, None)
    table = case.work / "out/skipped.csv"
    named = err + out + (table.read_text(errors="replace") if table.exists() else "")
    trained_with = {text.lstrip("\ufeff") for text in case.notes.get("texts", [])}
    for i, (suffix, data, text, either) in pairs.items():
        used, what = (text or "").lstrip("\ufeff") in trained_with, f"{i}.{suffix} {data[:80]}"
        if used and text:
            case.counts["right"] += i % 2
        elif f"{i:04}" not in named or (text and not either):
            case.fault("silent loss", f"{what} is not trained with{' nor named' * (not either)}")
        else:
            case.counts["skipped"] += 1
    texts = {(text or "").lstrip("\ufeff") for *_, text, _ in pairs.values()}
    if trained_with - texts:
        case.fault("silently wrong", f"trained with {ascii(trained_with - texts)[:300]}")


# ---------------------------------------------------------------- --batch files
def good_line(variant, i):
    line = {"text": f"a {'dog cat hat'.split()[i % 3]}", "image": ["white_car.png"]}
    if variant == "lvlm":
        line = {"context": [{"text": f"Word {i}: red, "}, {"image": "white_car.png"}]}
    return line | {"seed": i}


def odd_line(variant, rng, canary):
    """(bytes of a line, whether it must not be drawn)."""
    line = good_line(variant, rng.randrange(3)) | {"out": f"odd{rng.randrange(10 ** 9)}.png"}
    how = rng.choice(["bytes", "bytes", "odd", "odd", "must", "must", "out", "text"])
    must = False
    if how == "must":
        line |= rng.choice([{"unknown": 1}, {"out": 3}, {"seed": -1}, {"seed": 2 ** 64},
                            {"seed": "x"}, {"image": None}, {"context": None}, {"text": 3}, {
                            "image_weight": [float("nan")]}, {"image_weight": [1, 2, 3]}, {
                            "context": [{"audio": "a.wav"}]}, {"context": [{"text": None}]}, {
                            "image": [["x"]]}, {"context": "x"}, {"out": None, "seeds": 3}])
        must = True
    elif how == "out":
        line["out"] = rng.choice(["../canary/keep.png", f"{canary}/new.png", "a/../../x.png",
                                  "a\0.png", "x" * 300 + ".png", "\ud800.png", "a.exe", ".png", ".",
                                  "folder.png/x.png", "../run/y.png"])
        must = not line["out"].startswith((".png", "a/", "folder"))
    elif how == "text":
        text = rng.choice(["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "\ud800",
                           "<|im_end|>", "<|video_pad|>", "a\0b", "\u2028", "", "x " * 3000])
        line |= {"context": [{"text": text}]} if variant == "lvlm" else {"text": text}
    data = dump(odd(line, rng)) if how == "odd" else dump(line)
    if rng.random() < 0.3 and how != "odd":
        with_text = json.dumps(line | {"x": 1} if must else line, ensure_ascii=False)
        data = with_text.encode("utf-8", "surrogatepass")
    return damage(data, rng)[0].replace(b"\n", b"?") if how == "bytes" else data, must


def attack_lines(case):
    """Good lines are drawn as if alone, at the right names; the others are drawn or named."""
    variant = case.rng.choice(["lvlm", "clip"])
    shutil.copy(REPO / "miniature/example/white_car.png", case.inputs)
    lines = []
    for i in range(3):
        line = good_line(variant, i)
        lines.append((dump(line | {"out": f"good{i}.png"} if case.rng.random() < 0.5 else line), i))
    odd_lines = [odd_line(variant, case.rng, case.canary) for _ in range(7)]
    case.notes["damage"] = odd_lines
    lines += [(data, "must" if must else "odd") for data, must in odd_lines]
    lines += [(blank, "blank") for blank in case.rng.choices([b"", b"  "], k=2)]
    case.rng.shuffle(lines)
    (case.inputs / "lines.jsonl").write_bytes(b"\n".join(data for data, _ in lines) + b"\n")
    code, out, err = case.run(
        f"thinkdiff_{variant}.py", "generate", "--mini", *DRAW, "--batch",
        case.inputs / "lines.jsonl", "--out", "out",
        *(["--max-new-tokens", 6] if variant == "lvlm" else []))
    case.counts["tried"] += len(odd_lines)
    if code is None:
        return
    pictures = [file for file in (case.work / "out").rglob("*") if file.is_file()]
    found = re.findall(r"drew (\d+) pictures, skipped (\d+) lines", out)
    n_lines = sum(bool(data.strip()) for data, _ in lines)
    if code or not found or [len(pictures), n_lines - len(pictures)] != [*map(int, found[-1])]:
        return case.fault("silent loss", f"code {code}, {len(pictures)} pictures, {found}: "
                                         f"{err[-400:]}")
    named = {int(number) for number in re.findall(r"jsonl line (\d+)", err)}
    for number, (data, kind) in enumerate(lines, 1):
        data = data.strip()
        name = case.work / "out" / f"{number:05}.png"
        if isinstance(kind, int):
            name = name.with_name(f"good{kind}.png") if b'"out"' in data else name
            if not name.exists() or pixels(name) != BASE[variant, "lines"][kind]:
                case.fault("silently wrong" if name.exists() else "silent loss", f"{name.name}")
        elif kind == "must" and number not in named:
            case.fault("silently wrong", f"line {number} is drawn: {data[:300]}")
        elif data:
            case.counts["skipped" if number in named else "right"] += 1
        elif number in named:
            case.fault("silently wrong", f"blank line {number} is skipped")


# ---------------------------------------------------------------- state, tensors, pickles
# what goes on from state: (folder to copy, what then is deleted of it, what may be damaged); the
# command is that of BASE["small"]
STATE = [
    ("prepare", "prepare", "shard half", "meta.json plan.jsonl shard-*.json"),
    ("lvlm", "lvlm", "last", "log.csv checkpoint-*/*.json"),
    ("lvlm", "data", "", "data/meta.json data/plan.jsonl data/shard-*.json"),
    ("clip", "clip", "last", "log.csv pairs.jsonl checkpoint-*/*.json"),
    ("cobsat", "cobsat", "some", "exps/*/settings.json exps/*/*/*/*/*.json verdicts/**/*.json "
                                 "vlm_features/settings.json"),
    ("aligner", "aligner", "", "aligner/config.json"),
]
TENSORS = [
    ("lvlm", "lvlm", "last", "checkpoint-*/*.safetensors"),
    ("clip", "clip", "last", "checkpoint-*/*.safetensors"),
    ("lvlm", "data", "", "data/shard-*.safetensors"),
    ("cobsat", "cobsat", "some", "vlm_features/**/*.safetensors"),
    ("aligner", "aligner", "", "aligner/*.safetensors"),
]
PTH = [("pth", "pth", "", "a.pth")]
# with these, other numbers or texts are other data
DATA = re.compile(r"verdicts|exps/.*shot|log.csv|safetensors|pth|config")


def attack_state(case, scenarios=STATE, harm=damage_state):
    """Goes on from damaged state: it is refused, or the result is that of undamaged state."""
    scenario, folder, deleted, patterns = case.rng.choice(scenarios)
    out = case.work / "out"
    source = case.work / "data" if folder == "data" else out
    shutil.copytree(BASE["folder"] / "small" / folder, source)
    if deleted == "last":
        shutil.rmtree(out / "aligner")
        shutil.rmtree(sorted(out.glob("checkpoint-*"))[-1])
    elif deleted == "shard half":
        for file in sorted(out.glob("shard-*.json"))[3:]:
            file.unlink()
            file.with_suffix(".safetensors").unlink()
    elif deleted == "some":
        for file in case.rng.sample(sorted(out.glob("exps/**/*.jpg")), 2):
            file.unlink()
    files = sorted({file for pattern in patterns.split() for file in case.work.glob(
        pattern if folder == "data" else f"out/{pattern}")})
    file = case.rng.choice(files)
    how, same = harm(file, case.rng)
    case.counts["tried"] += 1
    command, result = BASE["small"][scenario]
    if folder == "data":
        command = re.sub("--data \\S+", f"--data {source}", command)
    code, stdout, err = case.run(*command.split())
    case.notes["damage"] = f"{scenario} {file.relative_to(case.work)}: {how}"
    case.compare(code, stdout + err,
                 lambda: (result(out) if result else stdout) == BASE["small", scenario][0],
                 payload=same and DATA.search(str(file.relative_to(case.work))))


def attack_safetensors(case):
    attack_state(case, TENSORS, damage_tensors)


def attack_pth(case):
    attack_state(case, PTH, damage_pth)


# ---------------------------------------------------------------- flags
def parsers():
    """[(script, command, its flags as argparse holds them)] of the programs."""
    parse, found = argparse.ArgumentParser.parse_args, []
    argparse.ArgumentParser.parse_args = lambda parser: found.append(parser) or sys.exit()
    for script in SCRIPTS:
        sys.argv = [script, "--mini"]
        try:
            importlib.import_module(script).main()
        except SystemExit:
            pass
        commands = found.pop()._subparsers._group_actions[0].choices
        for command, parser in commands.items():
            flags = [action for action in parser._actions if action.option_strings
                     and action.dest != "help"]
            BASE.setdefault("flags", []).append((script, command, flags))
    argparse.ArgumentParser.parse_args = parse


def attack_flags(case):
    """An odd value, or a name with a typo, is refused in one line; some values are legal."""
    script, command, flags = case.rng.choice(BASE["flags"])
    flag, rng = case.rng.choice(flags), case.rng
    name, base = flag.option_strings[-1], BASE["folder"]
    small = {
        "lvlm": f"--images {base}/pictures --out out --tokens 4 --count 4",
        "train": f"--data {base}/{'data' if 'lvlm' in script else 'pictures'} --out out --steps 1",
        "generate": f"{' '.join(DRAW)} --out a.png", "explain": "--no-picture"}
    small = small.get(command, "").split()
    if script == "cobsat_eval":
        folder = "--out" if command in ("run", "generate") else "--results"
        small = f"--images {base}/cobsat {folder} out --shots 1 --tasks 1 --limit 1".split()
        shutil.copytree(base / "small/cobsat", case.work / "out")
    number = getattr(flag.type, "__name__", "") in ("int", "float")
    must, how = True, rng.choice(["value"] * 4 + ["typo", "huge"])
    if how == "typo" or flag.nargs == 0:
        at = rng.randrange(2, len(name))
        odd_name = name[:at] + rng.choice(["", name[at] * 2, "x"]) + name[at + 1:]
        given = [odd_name] + ["1"] * (flag.nargs != 0)
        if flag.nargs == 0 and how != "typo":
            given = [f"{name}=x"]
        must = not any(given[0] in other.option_strings for other in flags)
    elif flag.choices:
        given = [name, rng.choice(["", "x", "-1", "nan", "\udcff", "ALL"])]
    elif number and how == "huge":
        # the models are missing, so that a legal value does not run for years
        given = [name, "9" * 30, *(["--vlm", "./missing"] if "--vlm" in small else [])]
        given += [part for other in flags for part in (other.option_strings[-1], "./missing")
                  if other.dest in ("vlm", "flux", "judge_vlm", "judge_clip") and other != flag]
        must = False
    elif number:
        value = rng.choice(["nan", "inf", "-inf", "", "x", "1e999", "0x10", "1 2", "-1", "0", "٣",
                            "-0", "1e-320"])
        must = value not in ("-1", "0", "٣", "-0", "1e-320")
        given = [f"{name}={value}"]
    else:
        value = rng.choice(["", "x", "x" * 5000, "\udcff", "/dev/null", "-", "~", " "])
        given, must = [f"{name}={value}"], False
    case.counts["tried"] += 1
    code, _, _ = case.run(f"{script}.py", command, "--mini", *small, *given)
    if code == 0 and must:
        case.fault("silently wrong", f"{script} {command} accepts {given}")
    elif code is not None:
        case.counts["refused" if code else "right"] += 1


# ---------------------------------------------------------------- all of it
# kind: (its attack, cases, cases of --short), as many as make the inputs that are asked for
KINDS = {
    "kills": (attack_kills, 20, 4), "ranks": (attack_ranks, 12, 1), "disk": (attack_disk, 50, 5),
    "pictures": (attack_pictures, 30, 3), "tars": (attack_tars, 500, 20),
    "captions": (attack_captions, 42, 3), "lines": (attack_lines, 72, 4),
    "state": (attack_state, 500, 20), "safetensors": (attack_safetensors, 500, 15),
    "pth": (attack_pth, 500, 20), "flags": (attack_flags, 500, 30),
}


def released(folder):
    """32 hidden units of the shipped aligner, T5's width, as the authors store theirs."""
    import torch
    from safetensors.torch import load_file
    weights = load_file(REPO / "miniature/weights/aligner-lvlm/model.safetensors")
    for name in ("net.0.weight", "net.0.bias"):
        weights[name] = weights[name][:32].clone()
    weights["net.2.weight"] = weights["net.2.weight"][:, :32].clone()
    folder.mkdir()
    torch.save({"model": {name.replace("net", "mm_projector"): tensor
                          for name, tensor in weights.items()}}, folder / "a.pth")


def small_programs(base):
    """The same programs with the least settings that leave state of each kind."""
    train = ("--steps 6 --batch-size 8 --save-every 2 --keep 9 --log-every 1 --resume --mini "
             "--out out")
    explain = "thinkdiff_lvlm.py explain --mini --no-picture --tokens 6 --aligner out"
    draw = f"thinkdiff_lvlm.py generate --mini {' '.join(DRAW)} --max-new-tokens 6"
    return {
        "prepare": (f"prepare_data.py lvlm --mini --images {base}/pictures --out out --tokens 6 "
                    "--batch-size 4 --shard-size 4", prepared),
        "lvlm": (f"thinkdiff_lvlm.py train {train} --data {base}/data", trained),
        "clip": (f"thinkdiff_clip.py train {train} --hidden 8 --data {base}/pictures", trained),
        "cobsat": (f"cobsat_eval.py run --mini --images {base}/cobsat --out out --shots 1 --tasks 1"
                   " --limit 4 --size 32 --steps 1 --true-cfg 1 --max-new-tokens 8 --judge clip",
                   evaluated),
        "draw": (f"{draw} --out out/a.png", lambda out: pixels(out / "a.png")),
        "aligner": (f"{explain}/aligner", None), "pth": (f"{explain}/a.pth", None),
    }


def make_base(args):
    """Data, and the results of undisturbed runs."""
    case = Case("base", 0, args)
    base, small = case.work, case.work / "small"
    BASE.update(folder=base, memory=int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    small.mkdir()

    def run(*command, out=None):
        code, stdout, err = case.run(*command)
        if code != 0:
            raise SystemExit(f"{command} fails undisturbed: {case.faults} {err[-2000:]}")
        if out:
            (base / "out").rename(out)
        return stdout
    run("miniature", "draw", "--out", "pictures", "--count", 24)
    run("miniature", "draw", "--out", "many", "--count", 900)
    run("miniature", "cobsat", "--out", "cobsat")
    BASE["small"], BASE["programs"] = small_programs(base), programs(1 if args.short else 3, base)
    released(small / "pth")
    shutil.copytree(REPO / "miniature/weights/aligner-lvlm", small / "aligner/aligner")
    for name, (command, result) in BASE["small"].items():
        if result:
            run(*command.split(), out=small / name)
            files = [file for file in (small / name).rglob("*") if file.is_file()]
            size = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)
            BASE["small", name] = result(small / name), size
        else:
            shutil.copytree(small / name, base / "out")
            BASE["small", name] = run(*command.split()), 0
            shutil.rmtree(base / "out")
        if name == "prepare":
            for copy in (small / "data", base / "data"):
                shutil.copytree(small / name, copy)
    for variant in ("lvlm", "clip"):
        shutil.copy(REPO / "miniature/example/white_car.png", base)
        (base / "lines.jsonl").write_bytes(
            b"\n".join(dump(good_line(variant, i)) for i in range(3)))
        tokens = ["--max-new-tokens", 6] if variant == "lvlm" else []
        run(f"thinkdiff_{variant}.py", "generate", "--mini", *DRAW, *tokens, "--batch",
            "lines.jsonl", "--out", base / variant)
        BASE[variant, "lines"] = [pixels(base / variant / f"0000{i + 1}.png")
                                  for i in range(3)]


def undisturbed(job):
    """((program, processes), (result, seconds)) of a whole run in processes of its own."""
    (name, processes), args = job
    case = Case(f"whole-{name}", processes, args)
    command, result = BASE["programs"][name]
    began = time.time()
    argv = command.split() if processes == 1 else torchrun(command, case.folder / "logs", 0)
    code = start(case, argv).wait()
    if code:
        raise SystemExit(f"{command} fails undisturbed: {(case.folder / 'stderr').read_text()}")
    return (name, processes), (result(case.work / "out"), time.time() - began)


def attack(job):
    """(kind, number, counts, faults) of a case; its folder is deleted if nothing was found."""
    kind, number, args = job
    case = Case(kind, number, args)
    try:
        KINDS[kind][0](case)
    except Exception as error:
        raise RuntimeError(f"stress.py itself fails: --only {kind} --number {number}") from error
    if not args.keep:
        shutil.rmtree(case.folder, ignore_errors=True)
    return kind, number, case.counts, case.faults


def attack_all(args, kinds):
    """{kind: counts}; prints faults as they are found, and a row of the table after each kind."""
    whole = {(name, 1) for name in BASE["programs"] if "kills" in kinds}
    whole |= {(name, 2) for name in ("lvlm", "prepare", "clip") if "ranks" in kinds}
    if args.short:
        whole -= {("prepare", 2), ("clip", 2)}
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for key, value in pool.imap_unordered(undisturbed, [(key, args) for key in whole]):
            BASE[key] = value
    table = {kind: Counter() for kind in kinds}
    print(f"\n{'':14}" + "".join(f"{name:>16}" for name in COLUMNS), flush=True)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for kind in kinds:
            numbers = range(KINDS[kind][1 + args.short]) if args.number is None else [args.number]
            jobs = [(kind, number, args) for number in numbers]
            for _, _, counts, faults in pool.imap_unordered(attack, jobs):
                table[kind] += counts
                print(*faults, sep="\n", end="\n" * bool(faults), flush=True)
            cells = "".join(f"{table[kind][name]:16}" for name in COLUMNS)
            print(f"{kind:14}{cells}" if table[kind] else f"{kind:14}not tried", flush=True)
    return table


def repository():
    """What must not change: the working tree and the shipped weights."""
    status = subprocess.run(["git", "status", "--porcelain"], cwd=REPO, capture_output=True).stdout
    return status, {str(file): digest(file) for file in (REPO / "miniature").rglob("*")
                    if "__pycache__" not in str(file)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="three minutes instead of an hour")
    parser.add_argument("--only", choices=KINDS, nargs="+", help="these kinds alone")
    parser.add_argument("--number", type=int, help="this case of a kind alone; keeps its files")
    parser.add_argument("--workdir", type=Path, help="kept; default: a temporary folder")
    args = parser.parse_args()
    # a file system table of our own: what is mounted here ends with this process
    if not os.environ.get("STRESS_UNSHARED"):
        os.environ["STRESS_UNSHARED"] = "1"
        unshare = ["unshare", "-rm"] if os.geteuid() else ["unshare", "-m"]
        if shutil.which("unshare") and not subprocess.run([*unshare, "true"]).returncode:
            os.execvp("unshare", [*unshare, sys.executable, *sys.argv])
    args.keep = args.workdir is not None or args.number is not None
    args.workdir = (args.workdir or Path(tempfile.mkdtemp(prefix="stress-"))).absolute()
    # of the damaged files that are read here
    warnings.simplefilter("ignore")
    for module in (*SCRIPTS, "diffusers", "miniature.__main__"):
        importlib.import_module(module)
    began, before, kinds = time.time(), repository(), args.only or list(KINDS)
    parsers()
    make_base(args)
    table = attack_all(args, kinds)
    unchanged = before == repository()
    print(f"\n{(time.time() - began) / 60:.1f} minutes, seed {args.seed}; the repository is "
          f"{'unchanged' if unchanged else 'CHANGED'}" + f"; files: {args.workdir}" * args.keep)
    if not args.keep:
        shutil.rmtree(args.workdir)
    sys.exit(any(table[kind][name] for kind in kinds for name in FAULTS) or not unchanged)


if __name__ == "__main__":
    main()
