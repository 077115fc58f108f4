"""The samples of training as datasets that threads read ahead: the VLM's features (ThinkDiff-LVLM),
or images with captions (ThinkDiff-CLIP). Which samples a step sees depends on the seed alone."""
import array
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from common import UserError, torchrun_ranks
from images import ImageRef, index_captions, load_image


# ------------------------------------------------------- ThinkDiff-LVLM: tokens and features
def read_shards(folder, kind="shard"):
    """[(stem, {"samples", "skipped"})] of a folder's finished shards; tensors: stem.safetensors.

    kind "tokens": shards of `prepare_data.py lvlm --backend vllm`, which have no features yet."""
    files = sorted(Path(folder).glob(f"{kind}-*.json"))
    return [(file.with_suffix(""), json.loads(file.read_text())) for file in files]


class FeatureDataset:
    """What `prepare_data.py lvlm` wrote to a folder: dataset[i] -> x (N, d_vlm) bf16, y (N,) int64.

    Of --tokens-only data x is the conversation messages(image, prompt number), from which
    models.recompute_features makes x. args: checked against the data if given. Only an index is
    kept in memory: the features are 780 GB at full size. meta: the settings of the data."""

    def __init__(self, folder, messages=None, args=None):
        try:
            self.meta = json.loads((Path(folder) / "meta.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no training data in {folder} (no meta.json there): make it with "
                            f"`python prepare_data.py lvlm --out {folder}`") from None
        if args:
            self.check(args)
        self.files, self.rows, self.messages, self.unreadable = {}, [], messages, set()
        for stem, shard in read_shards(folder):
            self.rows += [(f"{stem}.safetensors", row, record)
                          for row, record in enumerate(shard["samples"])]
        # an order that does not depend on how many processes prepared the data
        self.rows.sort(key=lambda row: row[2]["index"])

    def check(self, args):
        """Raises UserError if the data does not fit train's --features and --masking."""
        features, n_tokens = self.meta["features"], self.meta["tokens"]
        if features != args.features:
            raise UserError(f"{args.data} holds features of {features} tokens: pass --features "
                            f"{features}, or prepare other data")
        if n_tokens < 2 and args.masking == "random":
            raise UserError(f"the samples of {args.data} have {n_tokens} token: a random split "
                            "needs at least 2; prepare longer ones or use --masking none")

    def __len__(self):
        return len(self.rows)

    def tensor(self, i, name):
        """Sample i's row of the shard's tensor `name`; the file is mapped, only the row is read."""
        file, row, _ = self.rows[i]
        if file not in self.files:
            self.files[file] = safe_open(file, "pt")
        return self.files[file].get_slice(name)[row]

    def __getitem__(self, i):
        """Any number of threads may call it. Raises UserError if an image cannot be read."""
        y = self.tensor(i, "tokens").long()
        if self.meta["tokens_only"]:
            record = self.rows[i][2]
            image = load_image(ImageRef(*record["sample"]), self.meta["max_side"])
            return self.messages(image, record["prompt"]), y
        x = self.tensor(i, "features")
        if self.meta["features"] == "input":
            x = x[:self.tensor(i, "lengths")]
        # clone: read the disk now, in the caller's thread, not when the mapped memory is first used
        return x.clone(), y


# ------------------------------------------------------- ThinkDiff-CLIP: images and captions
class ImageCaptionDataset:
    """Images with captions (KEY.jpg, KEY.txt) in tars and folders: dataset[i] -> pixels, caption.

    load: ImageRef -> pixels. The first start writes where everything lies to the file `index`, a
    line for each pair; only the lines' offsets are kept in memory (120 MB for 15 M pairs)."""

    def __init__(self, sources, index, load, resume=False):
        head = json.dumps([os.path.abspath(source) for source in sources]) + "\n"

        def is_indexed():
            return index.exists() and index.open().readline() == head

        # a resumed run keeps its index, whatever has come to the folders since
        if resume and not is_indexed():
            raise UserError(f"cannot resume {index.parent}: it is no run with --data "
                            f"{' '.join(sources)}. Repeat the first command with --resume, or "
                            "choose another --out")
        if torchrun_ranks()[0] == 0 and not is_indexed():
            index_captions(sources, index, head)
        elif torchrun_ranks()[0] == 0 and not resume:
            print(f"takes the pairs from {index}; delete it to look for them again")
        # the other processes wait; torchrun ends them if the first one fails
        while not is_indexed():
            time.sleep(0.5)
        self.file, self.load, self.unreadable = open(index, "rb"), load, set()
        self.starts = array.array("q", itertools.accumulate(map(len, self.file), initial=0))

    def __len__(self):
        # the first line is the head, the last start is the end of the file
        return len(self.starts) - 2

    def __getitem__(self, i):
        """Any number of threads may call it. Raises UserError if a file cannot be read."""
        start, end = self.starts[i + 1:i + 3]
        line = json.loads(os.pread(self.file.fileno(), end - start, start))
        image, caption = (ImageRef(*fields) for fields in line)
        try:
            with open(caption.path, "rb") as file:
                file.seek(caption.offset)
                text = file.read(caption.size).decode("utf-8", "replace").strip()
        except OSError as error:
            raise UserError(f"cannot read {caption.key}: {error.strerror}") from None
        if not text:
            raise UserError(f"the caption {caption.key} is empty")
        return self.load(image), text


# ------------------------------------------------------------- which samples, in which order
def train_size(dataset, held_out):
    """The number of training samples: all but the last `held_out`, which are at most a tenth."""
    n_held_out = min(held_out, len(dataset) // 10)
    if n_held_out < 1:
        raise UserError(f"--data holds only {len(dataset)} samples: training needs at least 10, "
                        "one of them held out")
    return len(dataset) - n_held_out


def sample_order(n, seed, start):
    """Endless stream of sample numbers from position `start` on; each epoch is a new permutation.

    It depends on its arguments alone: neither resuming nor the number of processes changes it."""
    epoch, skip = divmod(start, n)
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        yield from torch.randperm(n, generator=generator).tolist()[skip:]
        epoch, skip = epoch + 1, 0


def training_batches(n_train, args, step):
    """Endless [(position in the stream, sample number)]: this process's part of each step."""
    rank, world, _ = torchrun_ranks()
    per_rank_batch = args.batch_size // world
    position = step * args.batch_size
    stream = enumerate(sample_order(n_train, args.seed, position), position)
    while True:
        batch = list(itertools.islice(stream, args.batch_size))
        yield batch[rank * per_rank_batch:(rank + 1) * per_rank_batch]


def held_out_batches(dataset, n_train, batch_size):
    """[(position, sample number)] of the held-out samples: fixed positions, so fixed splits."""
    for start in range(n_train, len(dataset), batch_size):
        yield [(i, i) for i in range(start, min(start + batch_size, len(dataset)))]


def read_ahead(dataset, batches, workers):
    """Yields [(position, *dataset[i])] for each batch [(position, i)]; threads read the next one.

    A sample that cannot be read is left out, named on stderr and added to dataset.unreadable.
    Raises UserError if a batch has no readable sample."""
    def finish(batch):
        samples = []
        for position, i, future in batch:
            try:
                samples.append((position, *future.result()))
            except UserError as error:
                dataset.unreadable.add(i)
                count = len(dataset.unreadable)
                tqdm.write(f"skipped ({count} so far): {error}", file=sys.stderr)
        if not samples:
            raise UserError(f"none of the {len(batch)} samples of a step can be read: are the "
                            "images still where they were?")
        return samples

    with ThreadPoolExecutor(workers) as readers:
        reading = None
        for batch in batches:
            coming = [(position, i, readers.submit(dataset.__getitem__, i))
                      for position, i in batch]
            if reading:
                yield finish(reading)
            reading = coming
        if reading:
            yield finish(reading)


def micro_batches(samples, size):
    """Groups of at most `size` samples, sorted by the lengths of their targets, the last items.

    Similar lengths need little padding. As the loss is a mean over the tokens of the whole step,
    the grouping changes the gradient by rounding only."""
    samples = sorted(samples, key=lambda sample: len(sample[-1]))
    return [samples[start:start + size] for start in range(0, len(samples), size)]
