"""Pictures of the drawn world for training (cached) and for tests (drawn fresh), their augmentation, and saving."""
import multiprocessing
import os
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from world import PAIRS, SIZE, draw

PER_KIND = 48  # training pictures of each of the 500 kinds: 24,000 in all, 295 MB
HELD_OUT = 10 ** 6  # seeds from here on are never seen in training


def picture(kind, index):
    """Picture `index` of PAIRS[kind] as (64, 64, 3) uint8; the same pair of numbers always gives the same picture."""
    return np.asarray(draw(random.Random(f"{kind}-{index}"), *PAIRS[kind]).convert("RGB"))


def held_out(kind, index):
    """A picture of PAIRS[kind] that no training has seen, (64, 64, 3) uint8."""
    return picture(kind, HELD_OUT + index)


def _pictures_of(kind):
    return np.stack([picture(kind, index) for index in range(PER_KIND)])


def pictures(build):
    """All training pictures, a read-only memory map (500, PER_KIND, 64, 64, 3) uint8, drawn on the first call.

    The file name carries a checksum of one picture of each kind, so that pictures of an older drawing are not used.
    """
    checksum = zlib.crc32(np.stack([picture(kind, 0) for kind in range(len(PAIRS))]).tobytes())
    path = Path(build) / f"pictures-{checksum:08x}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        store = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(PAIRS), PER_KIND, SIZE, SIZE, 3))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for kind, drawn in enumerate(tqdm(pool.imap(_pictures_of, range(len(PAIRS))), "drawing kinds", len(PAIRS))):
                store[kind] = drawn
        store.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def augment(pics, seed, noise=0.06, blur=0.0):
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) float in 0..1: shifted by up to 4 px, a little brighter or darker, noisy, sometimes blurred.

    noise: upper bound of each picture's noise level; blur: share of pictures blurred (by 3 x 3 means or to half the resolution).
    Without this the VLM overfits (75 % instead of 94 % of captions right in the probe).
    """
    random_ = np.random.default_rng(seed)
    n = len(pics)
    padded = np.pad(pics, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    shifts = random_.integers(0, 9, (n, 2))
    x = np.stack([p[a:a + SIZE, b:b + SIZE] for p, (a, b) in zip(padded, shifts)]).transpose(0, 3, 1, 2)
    x = torch.from_numpy(np.ascontiguousarray(x)).float() / 255
    if blur:
        how = torch.from_numpy(random_.random(n))[:, None, None, None]
        x = torch.where(how < blur / 2, torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x)
        coarse = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.where((how >= blur / 2) & (how < blur), coarse, x)
    column = lambda low, high: torch.from_numpy(random_.uniform(low, high, (n, 1, 1, 1)).astype(np.float32))
    x = x * column(0.88, 1.12) + column(-0.05, 0.05)
    x = x + column(0, noise) * torch.from_numpy(random_.standard_normal(x.shape, dtype=np.float32))
    return x.clamp(0, 1)


# ---------------------------------------------------------------- saving
def save_state(path, state):
    """torch.save through a temporary file: after kill -9 at any moment the old or the new state is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)


def publish(fresh, out):
    """Moves the files of folder `fresh` over those of `out`, one by one: a reader finds each of them whole."""
    for file in sorted(f for f in fresh.rglob("*") if f.is_file()):
        target = out / file.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(fresh)


def save_stand_in(path, model, *others):
    """save_pretrained of model (weights in fp16; its config keeps float32, so that it loads in float32) and processors."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    model.save_pretrained(fresh, state_dict={name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()})
    for other in others:
        other.save_pretrained(fresh)
    publish(fresh, path)
