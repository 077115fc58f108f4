"""The bookkeeping of a training run: its folder, checkpoints, resuming, signals, log.csv."""
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import common
from common import UserError, first_line, sum_over_processes, torchrun_ranks
from training_data import training_batches

# ------------------------------------------------------------------- folder and checkpoints
# Flags that decide the weights: a run is resumed only with the same ones. Models count by the
# names of their folders, so that a run may be resumed after they have moved.
SETTINGS = ("data", "vlm", "t5", "batch_size", "lr", "lr_end", "lr_horizon", "warmup",
            "weight_decay", "masking", "features", "norm", "hidden", "seed", "held_out", "captions",
            "dtype", "encoder_loss")
# of checkpoints of earlier versions, which had no such flags
EARLIER = {"captions": "raw", "dtype": "auto", "encoder_loss": 0.0}
MODEL_SETTINGS = ("vlm", "t5")
# nothing else in --out is ever read as a checkpoint, or deleted
CHECKPOINTS = "checkpoint-" + 7 * "[0-9]"
TENSORS = ("model.safetensors", "optimizer.safetensors")


def check_run_folder(args):
    """Locks --out. Raises UserError unless it fits --resume and the flags fit the machine.

    --resume without a checkpoint begins a run, so that one command serves start and restart."""
    out, (rank, world, _) = Path(args.out), torchrun_ranks()
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: "
                        f"choose a multiple of {world}")
    if vars(args).get("offload") and not torch.cuda.is_available():
        raise UserError("--offload keeps T5's encoder out of a GPU's memory, and there is no GPU "
                        "here: leave it out")
    common.lock_folder(out)
    begun = any(out.glob(CHECKPOINTS))
    if rank == 0 and (begun and not args.resume or not begun and (out / "aligner").exists()):
        raise UserError(f"{out} already holds a training run: "
                        f"{'add --resume to go on, or ' * begun}choose another --out")
    if rank == 0 and args.resume and not begun:
        print(f"there is no checkpoint in {out} yet: starts from the beginning")
    args.resume = args.resume and begun


def run_settings(args):
    """{name: value} of the SETTINGS that the variant has, as they stand in state.json."""
    settings = {name: vars(args)[name] for name in SETTINGS if name in vars(args)}
    return json.loads(json.dumps(settings, default=str))


@contextlib.contextmanager
def replacing(folder, aligner, **card):
    """A folder with the aligner, which takes the place of `folder` in the end, all or nothing.

    card: of save_pretrained. Raises UserError for a full disk and weights that are not finite."""
    partial = folder.parent / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    if not all(p.isfinite().all() for p in aligner.parameters()):
        raise UserError("the aligner has weights that are not finite, which are not saved: go on "
                        "from the last checkpoint with a lower --lr, in another --out")
    try:
        aligner.save_pretrained(partial, **card)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except SafetensorError as error:
        raise UserError(f"cannot write {folder}: {first_line(error)} Free some space, then run "
                        "the same command with --resume") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checksum(folder, state):
    """A hash of a checkpoint's tensors and of its state, without the hash itself."""
    hash = hashlib.blake2b(json.dumps(state).encode())
    for name in TENSORS:
        hash.update((folder / name).read_bytes())
    return hash.hexdigest()


def save_checkpoint(args, state, aligner, optimizer):
    """Writes --out/checkpoint-STEP, complete or not at all, and deletes all but the last --keep.

    state: {"step", ...}, which becomes state.json together with the settings and a hash."""
    out, state = Path(args.out), {**state, **run_settings(args)}
    with replacing(out / f"checkpoint-{state['step']:07d}", aligner) as folder:
        names = [name for name, _ in aligner.named_parameters()]
        # clone: safetensors refuses tensors that share storage, as AdamW's step counters may
        common.write_tensors(folder / TENSORS[1], {
            f"{names[i]}.{key}": value.clone()
            for i, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()})
        common.write_json(folder / "state.json", {**state, "hash": checksum(folder, state)})
    for old in sorted(out.glob(CHECKPOINTS))[:-args.keep]:
        shutil.rmtree(old)


def read_checkpoint(folder):
    """(state, weights, optimizer's tensors) of a checkpoint. OSError, UserError: it is damaged."""
    advice = "it is left out"
    state = common.read_json(folder / "state.json", {"step": int}, advice)
    tensors = [common.read_tensors(folder / name, advice) for name in TENSORS]
    # earlier versions wrote no hash
    if state.pop("hash", None) not in (None, checksum(folder, state)):
        raise UserError(f"{folder} is damaged (its hash is another): {advice}")
    return state, *tensors


def check_same_run(args, data, folder, state):
    """Raises UserError if a checkpoint is of a run with other settings or other samples."""
    changed = []
    for name, value in run_settings(args).items():
        old = state.get(name, EARLIER.get(name))
        same = old == value
        if name in MODEL_SETTINGS and old:
            same = Path(str(old)).name == Path(value).name
        if not same:
            changed.append(f"{name} was {old!r}, is {value!r}")
    if "samples" not in state:
        print(f"{folder} is of an earlier version: whether --data has changed cannot be checked")
    elif state["samples"] != data.fingerprint:
        changed.append("the samples in --data have changed")
    if changed:
        raise UserError(f"cannot resume {folder} with other settings: {'; '.join(changed)}. Repeat "
                        "the first command with --resume, or choose another --out")


def load_checkpoint(args, data, aligner, optimizer):
    """Restores the last whole checkpoint under --out, returns its step; moves damaged ones aside.

    Raises UserError if none is whole, or for other settings or samples."""
    damaged = []
    for folder in sorted(Path(args.out).glob(CHECKPOINTS), reverse=True):
        try:
            state, weights, moments = read_checkpoint(folder)
            break
        except (OSError, UserError) as error:
            damaged.append((folder, error))
    else:
        raise UserError(f"no checkpoint in {args.out} can be read, choose another --out: "
                        f"{damaged[0][1]}")
    check_same_run(args, data, folder, state)
    own = optimizer.state_dict()
    try:
        aligner.load_state_dict(weights)
        for i, (name, _) in enumerate(aligner.named_parameters()):
            own["state"][i] = {key: moments[f"{name}.{key}"]
                               for key in ("step", "exp_avg", "exp_avg_sq")}
    except (LookupError, RuntimeError) as error:
        raise UserError(f"{folder} is of another aligner ({first_line(error)[:90]}): choose "
                        "another --out") from None
    optimizer.load_state_dict(own)
    for old, error in damaged if torchrun_ranks()[0] == 0 else ():
        aside = old.with_name(f"damaged-{old.name}-{time.time_ns()}")
        os.replace(old, aside)
        print(f"goes on from {folder.name}; {error} (moved to {aside.name})", file=sys.stderr)
    return state["step"]


# --------------------------------------------------------------------------- steps and log
def read_log(file, step):
    """The rows of log.csv up to `step`: a killed run may have logged some after its checkpoint."""
    number = r"\d+(\.\d+)?(e[+-]\d+)?"
    row = re.compile(rf"\d+,({number})?,({number})?,{number},{number}", re.ASCII)
    lines = file.read_text("utf-8", "replace").splitlines()[1:] if file.exists() else []
    rows = [line.split(",") for line in lines if row.fullmatch(line)]
    steps = [int(row[0]) for row in rows]
    # a checkpoint is saved where a row ends
    whole = len(rows) == len(lines) and steps == sorted({*steps}) and step in steps
    if file.exists() and not whole:
        raise UserError(f"{file} is damaged: restore it, or move it away, then the log begins here")
    return [row for row in rows if int(row[0]) <= step]


class TrainingRun:
    """The steps of a run, its checkpoints and its log. All processes call it, rank 0 writes."""
    HEADER = ("step", "loss", "held_out_loss", "lr", "samples_per_s")

    def __init__(self, args, data, n_train, aligner, optimizer):
        self.args, self.data, self.n_train = args, data, n_train
        self.aligner, self.optimizer = aligner, optimizer
        self.rank, self.world, _ = torchrun_ranks()
        self.device = next(aligner.parameters()).device
        self.step = load_checkpoint(args, data, aligner, optimizer) if args.resume else 0
        self.file = Path(args.out) / "log.csv"
        self.rows = read_log(self.file, self.step) if args.resume else []
        # of the steps since the last row of the log
        self.losses, self.since, self.signal = [], (time.time(), self.step), None
        self.bar = tqdm(total=args.steps, initial=self.step, desc="train", unit="step",
                        disable=self.rank > 0)
        if self.rank == 0:
            n_weights = sum(p.numel() for p in aligner.parameters())
            print(f"trains {n_weights:,} parameters on {n_train:,} samples "
                  f"({len(data) - n_train:,} held out), {self.world} x "
                  f"{args.batch_size // self.world} a step")

    @contextlib.contextmanager
    def noting_signals(self):
        """Within it, the first SIGTERM or Ctrl-C is only noted. The second one interrupts."""
        # other threads than the main one cannot handle signals
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number)
                  for number in (signal.SIGTERM, signal.SIGINT) if is_main}

        def note(number, _):
            self.signal = number
            signal.signal(number, before[number])
        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def steps(self, batches):
        """Yields the batches of the steps that are left.

        After SIGTERM or Ctrl-C the step of the next row of the log is the last: the process saves a
        checkpoint and exits with 143 or 130."""
        with self.noting_signals():
            for batch in itertools.islice(batches, max(0, self.args.steps - self.step)):
                # at rows only, because processes that agree make their GPUs wait
                if self.step and not self.losses:
                    self.stop_if_asked()
                yield batch

    def stop_if_asked(self):
        """Saves and exits, all processes after the same step, if one of them has got a signal."""
        asked = torch.tensor(float(self.signal is not None),
                             device=self.device if self.world > 1 else "cpu")
        sum_over_processes(asked)
        if asked:
            self.save()
            self.close()
            number = signal.Signals(self.signal or signal.SIGTERM)
            if self.rank == 0:
                print(f"stopped by {number.name} at step {self.step}, checkpoint saved: the same "
                      "command with --resume goes on", file=sys.stderr)
            sys.exit(128 + number)

    def add(self, loss, lr):
        """Counts a step. loss: this process's part of the step's mean over all target tokens."""
        self.step += 1
        self.losses.append(loss)
        self.bar.update()
        # also where a checkpoint is saved, so that a resumed run has the same rows
        if not any(map(self.every, (self.args.log_every, self.args.eval_every,
                                    self.args.save_every))):
            return
        losses = self.gather_losses()
        # exactly 0: no sample of the step could be read
        mean = losses[:, losses.sum(0) != 0].mean(1).sum().item()
        seconds, steps = time.time() - self.since[0], self.step - self.since[1]
        rate = steps * self.args.batch_size / seconds
        shown = "" if math.isnan(mean) else f"{mean:.6f}"
        self.rows.append([self.step, shown, "", f"{lr:.3e}", f"{rate:.1f}"])
        self.bar.set_postfix(loss=f"{mean:.3f}", lr=f"{lr:.1e}", samples_s=f"{rate:.0f}",
                             refresh=False)
        self.losses, self.since = [], (time.time(), self.step)

    def gather_losses(self):
        """The losses since the last row of the log, (processes, steps).

        Raises UserError if one is not finite, in the process whose samples are to blame."""
        losses = torch.zeros(self.world, len(self.losses), device=self.device)
        losses[self.rank] = torch.stack(self.losses)
        sum_over_processes(losses)
        bad = (~losses.isfinite()).T.nonzero().tolist()
        if bad:
            i, process = bad[0]
            if process != self.rank:
                sys.exit(1)
            step = self.step - len(self.losses) + i
            batch = next(training_batches(self.n_train, self.args, step))
            names = [self.data.name(sample) for _, sample in batch]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise UserError(
                f"loss is {losses[process, i].item()} at step {step + 1}; its samples: "
                f"{', '.join(names[:8])}{more} (process {process}). The checkpoints in "
                f"{self.args.out} are kept: lower --lr or look at these samples")
        return losses.cpu()

    def every(self, steps):
        """Whether this step is a multiple of `steps`, or the last one."""
        return self.step % steps == 0 or self.step == self.args.steps

    def is_due(self, steps):
        """every(steps), on the first process only: what it guards is done once."""
        return self.rank == 0 and self.every(steps)

    def add_held_out(self, loss):
        """Completes the last row with the held-out loss and prints it. UserError: it is nan."""
        if not math.isfinite(loss):
            raise UserError(f"the held-out loss at step {self.step} is {loss}: none of its samples "
                            "can be read (named above), or --lr is too high")
        row = self.rows[-1]
        row[2] = f"{loss:.6f}"
        tqdm.write(f"step {row[0]}: loss {row[1]}, held-out {row[2]}, lr {row[3]}, "
                   f"{row[4]} samples/s")
        self.since = time.time(), self.step

    def save(self):
        """Writes log.csv and a checkpoint; done by the first process."""
        if self.rank == 0:
            common.write_csv(self.file, self.HEADER, self.rows)
            state = {"step": self.step, "samples": self.data.fingerprint}
            save_checkpoint(self.args, state, self.aligner, self.optimizer)

    def close(self):
        """Ends the progress bar, says what could not be read and disconnects the processes."""
        self.bar.close()
        if self.data.unreadable:
            print(f"process {self.rank} could not read {len(self.data.unreadable):,} of "
                  f"{len(self.data):,} samples (named above)", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()

    def finish(self):
        """Disconnects the processes; the first one writes --out/aligner and the curve."""
        self.close()
        if self.rank:
            return
        folder, curve = self.file.with_name("aligner"), self.file.with_name("loss.png")
        models = [Path(path).name if os.path.isdir(path) else path
                  for path in (self.args.vlm, self.args.t5)]
        # it takes a second; a signal comes too late to stop anything
        with self.noting_signals():
            with replacing(folder, self.aligner, model_card_kwargs={"base_model": models}):
                pass
            plot_log(self.rows, curve)
        print(f"aligner: {folder}   log: {self.file}   curve: {curve}")


def plot_log(rows, curve):
    """Draws the loss curves of log.csv's rows (log scale, as the paper's Fig. 7)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.figure(figsize=(6, 4))
    for column, name in ((1, "loss"), (2, "held-out-loss")):
        points = [(int(row[0]), float(row[column])) for row in rows if row[column]]
        if points:
            plt.plot(*zip(*points, strict=True), label=name)
    plt.yscale("log")
    plt.xlabel("step")
    plt.ylabel("cross-entropy per token")
    plt.legend()
    plt.tight_layout()
    common.write_atomically(curve, lambda temporary: plt.savefig(temporary, format="png", dpi=120))
    plt.close()
