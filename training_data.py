"""The samples of training as datasets that threads read ahead: the VLM's features (ThinkDiff-LVLM),
or images with captions (ThinkDiff-CLIP). Which samples a step sees depends on the seed alone."""
import array
import hashlib
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from common import UserError, first_line, is_mini, read_json, torchrun_ranks
from images import ImageRef, index_captions, open_image


# ------------------------------------------------------- ThinkDiff-LVLM: tokens and features
def digest(data):
    """A hash of bytes, 16 characters, by which changed or mixed-up files are noticed."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def read_shards(folder, kind="shard"):
    """[(stem, {"samples", "skipped"})] of a folder's finished shards; tensors: stem.safetensors.

    kind "tokens": shards of `prepare_data.py lvlm --backend vllm`, which have no features yet.
    The features are not read. Raises UserError for a damaged shard, and if two have an index."""
    shards, known = [], set()
    for file in sorted(Path(folder).glob(f"{kind}-*.json")):
        stem = file.with_suffix("")
        advice = f"delete {stem}.* and prepare these images again with the same command"
        shard = read_json(file, {"samples": list, "skipped": list}, advice)
        try:
            indices = [row["index"] for row in shard["samples"] + shard["skipped"]]
            n_known = len(known)
            known.update(indices)
            if {*map(type, indices)} - {int} or len(known) < n_known + len(indices):
                raise ValueError("an index is there twice, or is no number")
            if shard["samples"]:
                check_tensors(stem, file.read_bytes(), len(shard["samples"]))
        except (SafetensorError, FileNotFoundError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged ({first_line(error)[:90]}): {advice}") from None
        shards.append((stem, shard))
    return shards


# of a shard's tensors
TYPES = {"tokens": "I32", "features": "BF16", "lengths": "I64"}
DTYPES = {"tokens": torch.int32, "features": torch.bfloat16, "lengths": torch.int64}


def check_tensors(stem, content, n_samples):
    """Raises ValueError unless a shard's tensors belong to the content (bytes) of its JSON."""
    with safe_open(f"{stem}.safetensors", "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        types = {name: part.get_dtype() for name, part in slices.items()}
        if not {"tokens": "I32"}.items() <= types.items() <= TYPES.items():
            raise ValueError(f"its tensors are {types}")
        written_for = (tensors.metadata() or {}).get("hash")
        found = digest(content + tensors.get_tensor("tokens").numpy().tobytes())
    # older shards have no hash
    lengths = {part.get_shape()[0] for part in slices.values()}
    if lengths != {n_samples} or written_for not in (None, found):
        raise ValueError("the .safetensors does not belong to the .json")


class FeatureDataset:
    """What `prepare_data.py lvlm` wrote to a folder: dataset[i] -> x (N, d_vlm) bf16, y (N,) int64.

    Of --tokens-only data x is messages(image, prompt number): the conversation, or after
    models.load_for_recomputing the VLM's inputs. args: checked against the data if given. Only an
    index is kept in memory: the features are 780 GB at full size. meta: the data's settings."""

    def __init__(self, folder, messages=None, args=None):
        meta, plan = Path(folder, "meta.json"), Path(folder, "plan.jsonl")
        fields = {"features": str, "tokens": int, "tokens_only": bool, "d_vlm": int}
        try:
            self.meta, planned = read_json(meta, fields), plan.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            mini = " --mini" if is_mini() else ""
            raise UserError(
                f"no training data in {folder} ({error.filename} is missing): make it with `python "
                f"prepare_data.py lvlm{mini} --images FOLDER --out {folder}`") from None
        if self.meta.get("plan_hash", digest(planned)) != digest(planned):
            raise UserError(f"{plan} is not the one that {meta} was written with: restore it")
        if args:
            self.check(args)
        self.headers, self.rows, self.messages, self.unreadable = {}, [], messages, set()
        found, hash = set(), hashlib.blake2b(planned)
        for stem, shard in read_shards(folder):
            self.rows += [(f"{stem}.safetensors", row, record)
                          for row, record in enumerate(shard["samples"])]
            found.update(row["index"] for row in shard["samples"] + shard["skipped"])
            size = os.path.getsize(f"{stem}.safetensors") if shard["samples"] else 0
            hash.update(Path(f"{stem}.json").read_bytes() + b"%d" % size)
        n = planned.count(b"\n")
        if found != {*range(n)}:
            raise UserError(f"{folder} holds {len(found):,} of {n:,} samples: finish it with the "
                            "same `prepare_data.py` command")
        # what a resumed run must find again
        self.fingerprint = hash.hexdigest()
        # an order that does not depend on how many processes prepared the data
        self.rows.sort(key=lambda row: row[2]["index"])

    def check(self, args):
        """Raises UserError if the data does not fit train's --features and --masking."""
        features, n_tokens = self.meta["features"], self.meta["tokens"]
        if features != args.features:
            raise UserError(f"{args.data} holds features of {features} tokens: pass --features "
                            f"{features}, or prepare other data")
        if args.encoder_loss and features == "input":
            raise UserError("--encoder-loss compares features of generated tokens with T5's of the "
                            "same words; features of input tokens have none: leave it out")
        if n_tokens < 2 and args.masking == "random":
            raise UserError(f"the samples of {args.data} have {n_tokens} token: a random split "
                            "needs at least 2; prepare longer ones or use --masking none")

    def __len__(self):
        return len(self.rows)

    def tensor(self, i, name):
        """Sample i's row of the shard's tensor `name`. Raises UserError if the file is cut."""
        path, row, _ = self.rows[i]
        # one read, because of a mapped file the system reads 20 times as much, ahead
        with open(path, "rb", buffering=0) as file:
            if path not in self.headers:
                # the tensors lie behind 8 bytes, the size of the JSON that follows
                size = int.from_bytes(file.read(8), "little")
                self.headers[path] = 8 + size, json.loads(file.read(size))
            start, header = self.headers[path]
            x = torch.empty(header[name]["shape"][1:], dtype=DTYPES[name])
            file.seek(start + header[name]["data_offsets"][0] + row * x.nbytes)
            if file.readinto(x[None].view(torch.uint8).numpy()) < x.nbytes:
                raise UserError(f"cannot use {self.name(i)}: {path} is shorter than it was")
        return x

    def name(self, i):
        """The image of sample i, for messages."""
        return ImageRef(*self.rows[i][2]["sample"]).key

    def __getitem__(self, i):
        """Any number of threads may call it. Raises UserError if a sample cannot be used."""
        y = self.tensor(i, "tokens").long()
        if y.min() < 0:
            raise UserError(f"cannot use {self.name(i)}: it has negative tokens")
        if self.meta["tokens_only"]:
            record = self.rows[i][2]
            image = open_image(ImageRef(*record["sample"]), max_side=self.meta["max_side"])
            return self.messages(image, record["prompt"]), y
        x = self.tensor(i, "features")
        if self.meta["features"] == "input":
            x = x[:self.tensor(i, "lengths")]
        if not x.isfinite().all():
            raise UserError(f"cannot use {self.name(i)}: it has features that are not finite")
        return x, y


# ------------------------------------------------------- ThinkDiff-CLIP: images and captions
class ImageCaptionDataset:
    """Images with captions (KEY.jpg, KEY.txt) in tars and folders: dataset[i] -> pixels, caption.

    load: ImageRef -> pixels. The first start writes where everything lies to the file `index`, a
    line for each pair; only the lines' offsets are kept in memory (120 MB for 15 M pairs)."""

    def __init__(self, sources, index, load, resume=False):
        def fault():
            """Why the index cannot be used; None if it can."""
            try:
                with open(index, "rb") as file:
                    head = json.loads(file.readline())
                    # earlier versions wrote the sources only
                    head = head if isinstance(head, dict) else {"sources": head}
                    self.fingerprint = hashlib.file_digest(file, "blake2b").hexdigest()
                if head.get("hash", self.fingerprint) != self.fingerprint:
                    raise ValueError("its hash is another")
            except (FileNotFoundError, ValueError, RecursionError):
                return f"{index} is missing or damaged"
            if head.get("sources") != [os.path.abspath(source) for source in sources]:
                return f"it is no run with --data {' '.join(sources)}"
            for tar, size in head.get("tars", {}).items():
                if not os.path.exists(tar) or os.path.getsize(tar) != size:
                    return f"{tar} is missing, or its size has changed since {index} was made"
            return None

        # a resumed run keeps its index, whatever has come to the folders since
        problem, rank = fault(), torchrun_ranks()[0]
        if problem and rank == 0 and not resume:
            index_captions(sources, index)
            problem = fault()
        elif rank == 0 and not resume:
            print(f"takes the pairs from {index}; delete it to look for them again")
        # the other processes wait; torchrun ends them if the first one fails
        while problem and rank and not resume:
            time.sleep(0.5)
            problem = fault()
        if problem:
            raise UserError(f"cannot resume {index.parent}: {problem}. Repeat the first command "
                            "with --resume, or choose another --out")
        self.file, self.load, self.unreadable = open(index, "rb"), load, set()
        self.starts = array.array("q", itertools.accumulate(map(len, self.file), initial=0))

    def __len__(self):
        # the first line is the head, the last start is the end of the file
        return len(self.starts) - 2

    def refs(self, i):
        """[ImageRef of the image, ImageRef of its caption]."""
        start, end = self.starts[i + 1:i + 3]
        line = os.pread(self.file.fileno(), end - start, start)
        return [ImageRef(*fields) for fields in json.loads(line)]

    def name(self, i):
        """The image of sample i, for messages."""
        return self.refs(i)[0].key

    def __getitem__(self, i):
        """Any number of threads may call it. Raises UserError if a file cannot be read."""
        caption = self.caption(i)
        return self.load(self.refs(i)[0]), caption

    def caption(self, i):
        """The caption of sample i. Raises UserError if it cannot be read."""
        caption = self.refs(i)[1]
        try:
            with open(caption.path, "rb") as file:
                file.seek(caption.offset)
                data = file.read(caption.size)
            if caption.key.lower().endswith(".json"):
                data = json.loads(data)["caption"].encode()
            text = data.decode("utf-8-sig").strip()
        except OSError as error:
            raise UserError(f"cannot read {caption.key}: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"the caption {caption.key} is no text in UTF-8") from None
        if not text:
            raise UserError(f"the caption {caption.key} is empty")
        return text


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
        # as an array: a list of 15 M numbers takes 576 MB
        yield from map(int, torch.randperm(n, generator=generator).numpy()[skip:])
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


# samples in a row
MAX_UNREADABLE = 100


def read_ahead(dataset, batches, workers):
    """Yields [(position, *dataset[i])] for each batch [(position, i)]; threads read the next one.

    A sample that cannot be read is left out, named on stderr and added to dataset.unreadable.
    Raises UserError if so many in a row cannot be read that the disk is more likely at fault."""
    in_a_row = 0

    def finish(batch):
        nonlocal in_a_row
        samples = []
        for position, i, future in batch:
            try:
                samples.append((position, *future.result()))
                in_a_row = 0
            except UserError as error:
                dataset.unreadable.add(i)
                in_a_row += 1
                count = len(dataset.unreadable)
                tqdm.write(f"skipped ({count} so far): {error}", file=sys.stderr)
                if in_a_row == MAX_UNREADABLE:
                    raise UserError(f"{in_a_row} samples in a row cannot be read: is the disk "
                                    f"there? The last: {error}") from None
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
