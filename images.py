"""Images in folders and tars: finding them, loading them robustly, pairing them with captions.

Tars (WebDataset) are never unpacked: an image in one is read in place, by its offset."""
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common import UserError, first_line, write_atomically, write_csv

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# 1.2 GB as RGB: a larger file is more likely a decompression bomb than a picture
MAX_PIXELS = 20_000 * 20_000
# Pillow's own limit is lower; open_image checks MAX_PIXELS instead
Image.MAX_IMAGE_PIXELS = None


# ---------------------------------------------------------------- loading
def open_image(source, name=None, max_side=4096):
    """The PIL RGB image in a path, bytes or binary file: upright (EXIF), transparency on white,
    16 bit scaled to 8, its longer side at most max_side pixels.

    Raises UserError with `name` (default: the path) if it cannot be decoded in full."""
    if name is None:
        name = source if isinstance(source, (str, os.PathLike)) else "the picture"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            # JPEG only: decodes at a fraction of the size
            image.draft(None, (max_side, max_side))
            # before the conversions, because each copy of a huge image costs gigabytes
            image.thumbnail((max_side, max_side))
            image = ImageOps.exif_transpose(image)
            # 16 bit grey, which convert() would clip at 255
            if image.mode.startswith("I"):
                grey = np.asarray(image).clip(0, 65535) / 257
                image = Image.fromarray(grey.round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            reason = "it is empty or no picture"
        else:
            reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {name}: {reason.rstrip('.')}") from error


class ImageRef(NamedTuple):
    """Where an image (or a caption) is stored: a file, or `size` bytes at `offset` of a tar."""
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0

    @property
    def key(self):
        """A unique name: the path, and the member in a tar."""
        return f"{self.path}::{self.member}" if self.member else self.path

    def random(self, seed, purpose):
        """A random int in [0, 2**56), a function of the seed, the purpose and the names of file
        and member only, so that processes, order and folder do not matter."""
        text = f"{seed} {purpose} {os.path.basename(self.path)} {self.member}"
        data = text.encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")


def load_image(ref, max_side):
    """The image of an ImageRef as open_image returns it. Raises UserError if it is unreadable."""
    if ref.member:
        try:
            with open(ref.path, "rb") as tar:
                tar.seek(ref.offset)
                data = tar.read(ref.size)
        except OSError as error:
            raise UserError(f"cannot read {ref.key}: {error.strerror}") from error
        image = open_image(data, ref.key, max_side)
    else:
        image = open_image(ref.path, max_side=max_side)
    # Qwen2-VL's processor refuses a larger aspect ratio
    if max(image.size) > 200 * min(image.size):
        raise UserError(
            f"cannot use {ref.key}: it is a strip, more than 200 times as long as wide")
    return image


# ---------------------------------------------------------------- finding
def expand_braces(pattern):
    """'a{08..10}{x,y}' -> [a08x, a08y, a09x, a09y, a10x, a10y], as the shell does; the path of an
    existing file is left alone."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if os.path.exists(pattern) or not braces:
        return [pattern]
    first, last, words = braces.groups()
    if words is None:
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        words = words.split(",")
    before, after = pattern[:braces.start()], pattern[braces.end():]
    return [path for word in words for path in expand_braces(before + word + after)]


def index_tar(path, suffixes=SUFFIXES):
    """([ImageRef] of the members with these suffixes, what is wrong with the tar or None).

    Reads only the headers. Of a truncated tar it returns the members that are complete."""
    refs, fault = [], None
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                whole = member.offset_data + member.size <= size
                if member.isfile() and whole and member.name.lower().endswith(suffixes):
                    refs.append(ImageRef(path, member.name, member.offset_data, member.size))
        # tarfile takes a cut between two members for the end, which is 1,024 zeros
        with open(path, "rb") as file:
            file.seek(max(0, size - 1024))
            if file.read().strip(b"\0"):
                fault = "the end is missing"
    except (tarfile.TarError, EOFError) as error:
        fault = str(error)
    if fault:
        fault = f"broken tar ({fault}), {len(refs)} pictures of it can be read"
    return refs, fault


def find_images(sources):
    """All images in files, folders (recursively), tars, and brace patterns of these.

    Returns {key: ImageRef}, in the same order each time, and [(path, fault)] of the broken tars.
    Raises UserError if a source does not exist or no image is found."""
    paths = [os.path.abspath(path) for source in sources for path in expand_braces(source)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        others = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} does not exist{others}: check the path")
    files = []
    for path in paths:
        if os.path.isdir(path):
            walk = os.walk(path)
            files += sorted(os.path.join(folder, name) for folder, _, names in walk
                            for name in names)
        else:
            files.append(path)
    refs, faults = {}, []
    for path in tqdm(files, desc="indexing", unit=" files", leave=False, disable=None):
        if path.lower().endswith(SUFFIXES):
            refs[path] = ImageRef(path)
        elif path.lower().endswith(".tar"):
            found, fault = index_tar(path)
            refs.update((ref.key, ref) for ref in found)
            if fault:
                faults.append((path, fault))
    if not refs:
        message = (f"no pictures in {' '.join(sources)}: expected {' '.join(SUFFIXES)} files, "
                   "or .tar files of them")
        if faults:
            message += f"; {faults[0][0]}: {faults[0][1]}"
        raise UserError(message)
    return refs, faults


def index_captions(sources, index, head):
    """Pairs each image with its caption (KEY.txt beside KEY.jpg) and writes the file `index`.

    Its first line is `head`, each other line a JSON pair [image, caption] of ImageRefs. Images
    without a caption, and broken tars, are listed in skipped.csv beside it."""
    refs, skipped = find_images(sources)
    lines, captions, tar = [], {}, None
    for ref in refs.values():
        stem = os.path.splitext(ref.member or ref.path)[0]
        caption = None
        if ref.member:
            if ref.path != tar:
                tar = ref.path
                texts = index_tar(tar, (".txt",))[0]
                captions = {os.path.splitext(text.member)[0]: text for text in texts}
            caption = captions.get(stem)
        elif os.path.exists(f"{stem}.txt"):
            # size -1: the whole file
            caption = ImageRef(f"{stem}.txt", size=-1)
        if caption:
            lines.append(json.dumps([ref, caption]) + "\n")
        else:
            name = os.path.basename(stem)
            skipped.append((ref.key, f"no caption: {name}.txt is not beside it"))
    if not lines:
        raise UserError(f"none of the {len(refs)} pictures in {' '.join(sources)} has a caption: "
                        "expected KEY.txt beside KEY.jpg")
    if skipped:
        table = index.with_name("skipped.csv")
        write_csv(table, ("picture", "reason"), skipped)
        first = ": ".join(skipped[0]) + (", ..." if len(skipped) > 1 else "")
        print(f"skipped {len(skipped)} of {len(refs)}: {first} (see {table})", file=sys.stderr)
    write_atomically(index, "".join([head, *lines]))
