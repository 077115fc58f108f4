"""The bookkeeping of a training run: its folder, checkpoints, resuming, log.csv, progress bar."""
import csv
import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common import (
    UserError,
    sum_over_processes,
    torchrun_ranks,
    write_atomically,
    write_csv,
)

# ------------------------------------------------------------------- folder and checkpoints
# Flags that decide the weights: a run is resumed only with the same ones. Models count by the
# names of their folders, so that a run may be resumed after they have moved.
SETTINGS = ("data", "vlm", "t5", "batch_size", "lr", "lr_end", "lr_horizon", "warmup",
            "weight_decay", "masking", "features", "norm", "hidden", "seed", "held_out")
MODEL_SETTINGS = ("vlm", "t5")


def check_run_folder(args):
    """Raises UserError unless --out fits --resume and the processes can share --batch-size."""
    out, (rank, world, _) = Path(args.out), torchrun_ranks()
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: "
                        f"choose a multiple of {world}")
    holds_run = any(out.glob("checkpoint-*")) or (out / "aligner").exists()
    if rank == 0 and holds_run and not args.resume:
        raise UserError(f"{out} already holds a training run: add --resume to go on, or choose "
                        "another --out")
    if args.resume and not any(out.glob("checkpoint-*")):
        raise UserError(f"nothing to resume in {out}: there is no checkpoint yet; start without "
                        "--resume")


def run_settings(args):
    """{name: value} of the SETTINGS that the variant has, as they stand in state.json."""
    settings = {name: vars(args)[name] for name in SETTINGS if name in vars(args)}
    return json.loads(json.dumps(settings, default=str))


def save_aligner(aligner, folder, vlm, t5):
    """Replaces `folder` by the aligner and its card, all or nothing. vlm, t5: their models."""
    partial = folder.parent / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    models = [Path(path).name if os.path.isdir(path) else path for path in (vlm, t5)]
    aligner.save_pretrained(partial, model_card_kwargs={"base_model": models})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def save_checkpoint(args, step, aligner, optimizer):
    """Writes --out/checkpoint-STEP, complete or not at all, and deletes all but the last --keep."""
    out = Path(args.out)
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    aligner.save_pretrained(partial)
    names = [name for name, _ in aligner.named_parameters()]
    # clone: safetensors refuses tensors that share storage, as AdamW's step counters may
    state = {f"{names[i]}.{key}": value.clone()
             for i, values in optimizer.state_dict()["state"].items()
             for key, value in values.items()}
    save_file(state, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **run_settings(args)}, indent=1))
    os.replace(partial, out / f"checkpoint-{step:07d}")
    for old in sorted(out.glob("checkpoint-*"))[:-args.keep]:
        shutil.rmtree(old)


def load_checkpoint(args, aligner, optimizer):
    """Restores the last checkpoint under --out, returns its step. UserError: other settings."""
    last = sorted(Path(args.out).glob("checkpoint-*"))[-1]
    state, now = json.loads((last / "state.json").read_text()), run_settings(args)
    changed = []
    for name, value in now.items():
        old = state.get(name)
        same = old == value
        if name in MODEL_SETTINGS and old:
            same = Path(old).name == Path(value).name
        if not same:
            changed.append(f"{name} was {old!r}, is {value!r}")
    if changed:
        raise UserError(f"cannot resume {last} with other settings: {'; '.join(changed)}. Repeat "
                        "the first command with --resume, or choose another --out")
    aligner.load_state_dict(load_file(last / "model.safetensors"))
    saved, own = load_file(last / "optimizer.safetensors"), optimizer.state_dict()
    for i, (name, _) in enumerate(aligner.named_parameters()):
        own["state"][i] = {key.removeprefix(f"{name}."): value for key, value in saved.items()
                           if key.startswith(f"{name}.")}
    optimizer.load_state_dict(own)
    return state["step"]


# --------------------------------------------------------------------------------------- log
class TrainingLog:
    """log.csv, progress bar and loss.png of a run. All processes add to it, rank 0 writes."""
    HEADER = ("step", "loss", "held_out_loss", "lr", "samples_per_s")

    def __init__(self, args, step, aligner, n_train, n_held_out):
        self.args, self.step, self.rank = args, step, torchrun_ranks()[0]
        self.file, self.rows = Path(args.out) / "log.csv", []
        self.losses, self.since = [], time.time()
        if args.resume and self.file.exists():
            with self.file.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
            # a killed run may have logged steps after its last checkpoint
            self.rows = [row for row in rows if int(row[0]) <= step]
        self.bar = tqdm(total=args.steps, initial=step, desc="train", unit="step",
                        disable=self.rank > 0)
        if self.rank == 0:
            n_weights, world = sum(p.numel() for p in aligner.parameters()), torchrun_ranks()[1]
            print(f"trains {n_weights:,} parameters on {n_train:,} samples ({n_held_out:,} held "
                  f"out), {world} x {args.batch_size // world} a step")

    def add(self, loss, lr):
        """Counts a step. loss: this process's part of the step's mean over all target tokens."""
        self.step += 1
        self.losses.append(loss)
        self.bar.update()
        if not (self.every(self.args.log_every) or self.every(self.args.eval_every)):
            return
        mean = torch.stack(self.losses).mean()
        sum_over_processes(mean)
        rate = len(self.losses) * self.args.batch_size / (time.time() - self.since)
        self.rows.append([self.step, f"{mean.item():.6f}", "", f"{lr:.3e}", f"{rate:.1f}"])
        self.bar.set_postfix(loss=f"{mean.item():.3f}", lr=f"{lr:.1e}", samples_s=f"{rate:.0f}",
                             refresh=False)
        self.losses, self.since = [], time.time()

    def every(self, steps):
        """Whether this step is a multiple of `steps`, or the last one."""
        return self.step % steps == 0 or self.step == self.args.steps

    def is_due(self, steps):
        """every(steps), on the first process only: what it guards is done once."""
        return self.rank == 0 and self.every(steps)

    def add_held_out(self, loss):
        """Completes the last row with the held-out loss and prints it."""
        row = self.rows[-1]
        row[2] = f"{loss:.6f}"
        tqdm.write(f"step {row[0]}: loss {row[1]}, held-out {row[2]}, lr {row[3]}, "
                   f"{row[4]} samples/s")
        self.since = time.time()

    def save(self):
        """Writes log.csv."""
        write_csv(self.file, self.HEADER, self.rows)

    def finish(self, aligner):
        """Disconnects the processes; the first one writes the curve and --out/aligner."""
        self.bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank == 0:
            plot_log(self.file)
            folder, curve = self.file.with_name("aligner"), self.file.with_name("loss.png")
            save_aligner(aligner, folder, self.args.vlm, self.args.t5)
            print(f"aligner: {folder}   log: {self.file}   curve: {curve}")


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
        if points:
            plt.plot(*zip(*points, strict=True), label=name.replace("_", "-"))
    plt.yscale("log")
    plt.xlabel("step")
    plt.ylabel("cross-entropy per token")
    plt.legend()
    plt.tight_layout()
    curve = file.with_name("loss.png")
    write_atomically(curve, lambda temporary: plt.savefig(temporary, format="png", dpi=120))
    plt.close()
