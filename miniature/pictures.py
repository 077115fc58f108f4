"""What the trainings share: toy pictures, augmentation, saving models, the command line."""
import argparse
import multiprocessing
import os
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cobsat_eval import KINDS
from miniature import BUILD, WEIGHTS
from miniature.world import SIZE, draw

# training pictures of each of the 500 kinds: 24,000 in all, 295 MB
PER_KIND = 48
# indices from here on are never seen in training
HELD_OUT = 10**6


# ---------------------------------------------------------------- data
def training_image(kind, index):
    """Picture `index` of KINDS[kind], (64, 64, 3) uint8: a function of its two arguments alone."""
    return np.asarray(draw(random.Random(f"{kind}-{index}"), *KINDS[kind]).convert("RGB"))


def held_out_image(kind, index):
    """A picture of KINDS[kind] that no training has seen, (64, 64, 3) uint8."""
    return training_image(kind, HELD_OUT + index)


def _images_of_kind(kind):
    return np.stack([training_image(kind, index) for index in range(PER_KIND)])


def training_images(build):
    """All training pictures: a read-only memory map (500, PER_KIND, 64, 64, 3) uint8 in `build`.

    They are drawn on the first call. The file name carries a checksum of one picture of each kind,
    so that a cache of an older version of world.py is not used.
    """
    sample = np.stack([training_image(kind, 0) for kind in range(len(KINDS))])
    path = Path(build) / f"pictures-{zlib.crc32(sample.tobytes()):08x}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        shape = (len(KINDS), PER_KIND, SIZE, SIZE, 3)
        store = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            images = pool.imap(_images_of_kind, range(len(KINDS)))
            for kind, of_kind in enumerate(tqdm(images, "drawing kinds", len(KINDS))):
                store[kind] = of_kind
        store.flush()
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def augment(images, seed, noise=0.06, blur=0.0):
    """Shifts by up to 4 px, a little brighter or darker, noise, sometimes blur.

    images: (n, 64, 64, 3) uint8. noise: upper bound of each picture's noise level. blur: share of
    pictures blurred (by 3 x 3 means or to half the resolution). Returns (n, 3, 64, 64) float in
    0..1. Without it the VLM overfits: 75 % instead of 94 % of the captions right in a short run.
    """
    random_ = np.random.default_rng(seed)
    n = len(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")  # (n, 72, 72, 3)
    shifts = random_.integers(0, 9, (n, 2))
    x = np.stack([image[a:a + SIZE, b:b + SIZE]
                  for image, (a, b) in zip(padded, shifts, strict=True)])
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).float() / 255
    if blur:
        which = torch.from_numpy(random_.random(n))[:, None, None, None]  # (n, 1, 1, 1)
        smooth = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = torch.where(which < blur / 2, smooth, x)
        coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = torch.where((which >= blur / 2) & (which < blur), coarse, x)

    def per_image(low, high):
        return torch.from_numpy(random_.uniform(low, high, (n, 1, 1, 1)).astype(np.float32))

    x = x * per_image(0.88, 1.12) + per_image(-0.05, 0.05)
    level = per_image(0, noise)
    x = x + level * torch.from_numpy(random_.standard_normal(x.shape, dtype=np.float32))
    return x.clamp(0, 1)


# ---------------------------------------------------------------- command line
def training_folders(description):
    """Reads the command line of one training: (build, weights, seed)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--build", type=Path, default=BUILD, help="of states and caches")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the stand-ins")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    return args.build, args.weights, args.seed


# ---------------------------------------------------------------- saving
def save_state(path, state):
    """torch.save, atomically: a kill leaves the old or the new state, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.{os.getpid()}")
    os.replace(f"{path}.{os.getpid()}", path)


def publish(fresh, out):
    """Moves the files of folder `fresh` over those of `out`, each of them atomically."""
    for file in sorted(f for f in fresh.rglob("*") if f.is_file()):
        target = out / file.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(fresh)


def save_stand_in(path, model, *processors):
    """save_pretrained of a model and its processors.

    The weights are stored in fp16; the config keeps float32, so that they load in float32.
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    weights = {name: tensor.half().cpu().contiguous()
               for name, tensor in model.state_dict().items()}
    model.save_pretrained(fresh, state_dict=weights)
    for processor in processors:
        processor.save_pretrained(fresh)
    publish(fresh, path)
