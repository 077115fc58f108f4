"""Images in folders and tars: finding them, loading them robustly, pairing them with captions.

Tars (WebDataset) are never unpacked: an image in one is read in place, by its offset."""
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import stat
import tarfile
import tempfile
import threading
import warnings
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common import UserError, first_line, write_atomically, write_csv

Image.preinit()
Image.init()
# all that Pillow decodes by itself; EPS would start another program
FORMATS = [name for name in Image.ID if name not in "BUFR EPS GRIB HDF5 MPEG WMF".split()]
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
CAPTIONS = (".txt", ".json")
COMPRESSED = {".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar"}
# what the most pixels that Pillow opens (178,956,970) take as RGB
MAX_BYTES = 3 * 2 * Image.MAX_IMAGE_PIXELS
# larger pictures are decoded one at a time, so that threads do not multiply their memory
LARGE, LARGE_PIXELS = threading.Lock(), 2**24
# Pillow's memory in pieces so large (64 MB) that malloc gives them back to the system
Image.core.set_block_size(2**26)
# of metadata that is damaged, and of large pictures
warnings.filterwarnings("ignore", module="PIL")


# ---------------------------------------------------------------- loading
class ImageRef(NamedTuple):
    """Where an image (or a caption) is stored: a file, or `size` bytes at `offset` of a tar."""
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0

    @property
    def key(self):
        """Its name: the path, and the member in a tar."""
        return f"{self.path}::{self.member}" if self.member else self.path

    def random(self, seed, purpose):
        """A random int in [0, 2**56), a function of the seed, the purpose and the names of file
        and member only, so that processes, order and folder do not matter."""
        text = f"{seed} {purpose} {os.path.basename(self.path)} {self.member}"
        data = text.encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")

    def read(self):
        """Its bytes. Raises OSError, or ValueError if it is no file or too large for a picture."""
        if re.search("(^|/)https?:/", self.path) and not os.path.exists(self.path):
            raise ValueError("it is a URL: download it first")
        status = os.stat(self.path)
        # a pipe or a device could last for ever
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        size = self.size if self.member else status.st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are too many for a picture")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(size)


def without_metadata(data):
    """A PNG, JPEG or AVIF with only what its pixels depend on; other bytes as they are."""
    if data.startswith(b"\xff\xd8"):
        # decoders ignore segments of unknown names
        return re.sub(rb"(?s)(\xff[\xe0-\xed]..)(JFIF|Exif|http|ICC_|MPF\0|FPXR|Phot)",
                      rb"\1none", data)
    if data[4:8] == b"ftyp":
        return re.sub(rb"(?s)(infe.{8})Exif", rb"\1none", data)
    if not data.startswith(b"\x89PNG"):
        return data
    kept, end = [data[:8]], 8
    while end < len(data):
        start, end = end, end + 12 + int.from_bytes(data[end:end + 4], "big")
        if data[start + 4:start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[start:end])
        elif data[start + 4:start + 8] == b"eXIf":
            # the picture is upright if it can be read, whatever its checksum
            checksum = zlib.crc32(data[start + 4:end - 4])
            kept.append(data[start:end - 4] + checksum.to_bytes(4, "big"))
    return b"".join(kept)


def grey_8_bit(image):
    """A grey image of 12 to 32 bits or of floats (modes I;16, I, F) as L, or LA if a value is
    transparent. White is the smallest usual maximum that no pixel exceeds; NaN is black."""
    # tags of a TIFF: bits a sample, their format (1: unsigned), and 262, 0 if black is the highest
    tags, key = getattr(image, "tag_v2", {}), image.info.pop("transparency", None)
    bits, unsigned = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 1
    values = np.asarray(image)  # (height, width)
    # Pillow keeps unsigned numbers as signed ones
    values = values.view(np.uint32) if image.mode == "I" and bits == 32 and unsigned else values
    peak = values.max(where=np.isfinite(values), initial=0)
    whites = (2 ** min(bits, 16) - 1, 2 ** (32 if unsigned else 31) - 1)
    whites = (1, 255, 65535, peak) if image.mode == "F" else whites
    white = next(white for white in whites if white >= peak)
    # in place, because each copy of a huge picture takes gigabytes
    shade = values.astype(np.float32)
    np.clip(shade, 0, white, out=shade)
    shade *= 255 / white
    np.nan_to_num(shade, copy=False)
    shade = np.rint(shade, out=shade).astype(np.uint8)
    shade = 255 - shade if tags.get(262) == 0 else shade
    if key is not None:
        shade = np.stack([shade, (values != key) * np.uint8(255)], axis=-1)
    grey = Image.fromarray(shade)
    grey.info = image.info
    return grey


def to_8_bit(image, data):
    """A loaded image of any mode as L, LA, RGB or RGBA; a transparent colour becomes alpha.

    data: the bytes of its file."""
    if image.mode[0] in "IF":
        return grey_8_bit(image)
    key = image.info.get("transparency")
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in ("L", "LA", "RGB", "RGBA") and key is None:
        return image
    # the transparent colour of a PNG has the depth of the file (byte 24), Pillow's pixels have 8
    if image.format == "PNG" and image.mode == "L":
        image.info["transparency"] = key * 255 // (2 ** data[24] - 1)
    elif image.format == "PNG" and image.mode == "RGB":
        image.info["transparency"] = tuple(value >> data[24] - 8 for value in key)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def decode(data, max_side, exact):
    """What open_image returns, from bytes. Decoders raise OSError, SyntaxError, ValueError, ..."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            # JPEG only: decodes at a fraction of the size
            shorter = min(image.size) * max_side // max(*image.size, max_side) or 1
            image.draft(None, [max_side if exact else shorter] * 2)
            # a progressive one takes the memory of the whole all the same
            if "progressive" not in image.info:
                pixels = image.width * image.height
            with LARGE if pixels > LARGE_PIXELS else contextlib.nullcontext():
                image.load()
                image = to_8_bit(image, data)
                if exact or max(image.size) > 2 * max_side:
                    image.thumbnail((max_side, max_side))
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
                if image.mode in ("LA", "RGBA"):
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image.convert("RGBA"))
                # convert would copy an RGB image
                return image if image.mode == "RGB" else image.convert("RGB")
    except Exception:
        plain = without_metadata(data)
        if plain == data:
            raise
        return decode(plain, max_side, exact)


def open_image(source, name=None, max_side=4096, exact=True):
    """The PIL RGB image in a path, ImageRef, bytes or binary file: upright (EXIF), transparency
    on white, more than 8 bits scaled to 8, its longer side at most max_side pixels.

    exact=False: at most twice max_side, for callers that resize it once more. Raises UserError
    with `name` (default: the path) if it cannot be decoded in full or is a strip."""
    if isinstance(source, (str, os.PathLike)):
        source = ImageRef(os.fspath(source))
    if name is None:
        name = source.key if isinstance(source, ImageRef) else "the picture"
    try:
        image = decode(source if isinstance(source, bytes) else source.read(), max_side, exact)
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            reason = "it is empty or no picture"
        else:
            reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {name}: {reason.rstrip('.')}") from error
    # Qwen2-VL's processor refuses a larger aspect ratio
    if max(image.size) > 200 * min(image.size):
        raise UserError(f"cannot use {name}: it is a strip, more than 200 times as long as wide")
    return image


# ---------------------------------------------------------------- finding
def file_suffix(name):
    """'.jpg' of 'a/b.JPG'."""
    return os.path.splitext(name)[1].lower()


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


class TarMember(tarfile.TarInfo):
    """A member of a tar. If its headers are damaged, tarfile goes on behind it."""

    def _proc_member(self, tar):
        """Reads what follows a header: a long name, a pax header, then the member's header."""
        try:
            member = super()._proc_member(tar)
            if member.size < 0:
                raise ValueError("negative size")
        except Exception as error:
            # the one error that ignore_zeros ignores
            raise tarfile.InvalidHeaderError(first_line(error)) from error
        # global headers belong to it, too
        member.offset = self.offset
        return member


def gap_fault(file, archive, start, stop):
    """What is wrong with bytes start to stop of a tar, which belong to no member; None if they are
    only the end of an archive that began at byte `archive`."""
    size = stop - start
    file.seek(start)
    if any(file.read(min(2**20, stop - at)).strip(b"\0") for at in range(start, stop, 2**20)):
        return f"{size:,} bytes are damaged"
    if size < 1024 and not file.read(1):
        return "the end is missing"
    # 1,024 zeros, and most programs fill up to 10,240
    filled = 1024 <= size < 1024 + 10240 and (stop - archive) % 10240 == 0
    return None if filled or size == 1024 else f"{size:,} bytes are zeros"


def index_tar(path, skipped, faults):
    """[ImageRef] of the images and captions in a tar; appends the other images to skipped, and
    what is wrong with the tar to faults: (name, reason).

    Reads only the headers, also behind damage. Concatenated tars are read as one."""
    refs, gaps, end, last = [], [], 0, "its beginning"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # it is no tar at all, which is a gap, too
        with (contextlib.suppress(tarfile.ReadError),
              tarfile.open(fileobj=file, mode="r:", tarinfo=TarMember, ignore_zeros=True) as tar):
            for member in tar:
                if member.offset > end:
                    gaps.append((end, member.offset, last))
                end, last = tar.offset, member.name
                ref = ImageRef(path, member.name, member.offset_data, member.size)
                suffix = file_suffix(member.name)
                # what may be missing is the zeros behind the last member
                is_cut = end > size and ref.offset + ref.size > size
                if suffix in COMPRESSED or suffix == ".tar":
                    faults.append((ref.key, "an archive in a tar: unpack it first"))
                elif member.isreg() and not member.issparse() and not is_cut:
                    refs += [ref] if suffix in SUFFIXES or suffix in CAPTIONS else []
                elif suffix in SUFFIXES and not member.isdir():
                    kind = "cut off" if is_cut else "a link or another kind of file"
                    skipped.append((ref.key, f"in the tar it is {kind}"))
                if end > size:
                    break
        archive = 0
        gaps.append((end, size, last))
        for start, stop, before in gaps:
            fault = gap_fault(file, archive, start, stop)
            if fault:
                faults.append((path, f"damaged: {fault} after {before}"))
            else:
                archive = stop
    return refs


def start_worker():
    """In a process of index_tars: Ctrl-C, and the end of its parent, end it silently."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def use_tar(path, use):
    """(use([ImageRef] of index_tar), skipped, faults)."""
    refs, skipped, faults = [], [], []
    try:
        refs = index_tar(path, skipped, faults)
    except OSError as error:
        faults.append((path, f"cannot read it: {error.strerror}"))
    return use(refs), skipped, faults


def index_tars(use, paths):
    """Yields use_tar(path, use) of each path, in their order, from processes on all cores."""
    if len(paths) < 8:
        yield from (use_tar(path, use) for path in paths)
        return
    # spawned ones would load torch first; these only read files
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(min(os.cpu_count(), len(paths)), fork, start_worker) as pool:
            yield from pool.map(use_tar, paths, [use] * len(paths))
    except BrokenExecutor:
        raise UserError("a process that read tars was killed: is there enough memory?") from None


def find_files(sources, skipped, faults, use):
    """Yields (path, use([ImageRef])) of the images and captions of each tar, and of each image that
    is a file, in files, folders (recursively; links are followed), and brace patterns of these.

    use, which other processes call: returns a list, an item for each image. Appends (name, reason)
    to skipped for images that cannot be used, and to faults for damaged tars and ignored archives.
    Raises UserError if a source does not exist or there is no image."""
    paths = [os.path.abspath(path) for source in sources for path in expand_braces(source)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        others = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} does not exist{others}: check the path")

    def unreadable(error):
        skipped.append((error.filename, f"cannot read this folder: {error.strerror}"))

    files, given, known, n_found = {}, set(paths), set(), 0
    for path in paths:
        is_folder = os.path.isdir(path)
        walk = os.walk(path, onerror=unreadable, followlinks=True) if is_folder else ()
        found = [] if is_folder else [path]
        for folder, below, names in walk:
            below.sort()
            # links can lead to it again, or in a circle
            if os.path.realpath(folder) in known:
                below.clear()
                continue
            known.add(os.path.realpath(folder))
            found += [os.path.join(folder, name) for name in names]
        files.update(dict.fromkeys(sorted(found)))
    tars = {path: 0 for path in files if file_suffix(path) == ".tar" and os.path.isfile(path)}
    indexed = index_tars(use, tars)
    for path in tqdm(files, desc="indexing", unit=" files", leave=False, disable=None):
        suffix, found = file_suffix(path), []
        if path in tars:
            found, more_skipped, more_faults = next(indexed)
            skipped += more_skipped
            faults += more_faults
        elif suffix in COMPRESSED:
            faults.append((path, "compressed: unpack it first"))
        elif suffix != ".tar" and suffix not in SUFFIXES:
            faults += [(path, "it is neither a picture nor a tar")] if path in given else []
        elif not os.path.isfile(path):
            skipped.append((path, "it is no regular file, or a link that leads nowhere"))
        else:
            found = use([ImageRef(path)])
        n_found += len(found)
        yield path, found
    if not n_found:
        reasons = "".join(f"; {path}: {reason}" for path, reason in (faults + skipped)[:1])
        raise UserError(f"no pictures in {' '.join(sources)}: expected .jpg, .png and what else "
                        f"Pillow reads, or .tar files of them{reasons}")


def pictures(refs):
    """Those of find_files' refs that are images."""
    return [ref for ref in refs if file_suffix(ref.key) in SUFFIXES]


def find_images(sources):
    """[ImageRef] of all images in the sources, in a fixed order; [(name, reason)] of those that
    cannot be used; [(path, fault)] of damaged tars and ignored archives. See find_files."""
    skipped, faults = [], []
    refs = [ref for _, found in find_files(sources, skipped, faults, pictures) for ref in found]
    return refs, skipped, faults


def pair_captions(refs):
    """For each image of find_files' refs its line in the index, or (name, why it has none)."""
    found, named = [], {}
    for ref in refs:
        stem, suffix = os.path.splitext(ref.member or ref.path)
        named.setdefault((stem, suffix.lower()), []).append(ref)
    for (stem, suffix), images in named.items():
        if images[0].member:
            captions = named.get((stem, ".txt")) or named.get((stem, ".json"), [])
        else:
            captions = [ImageRef(stem + suffix, size=-1) for suffix in CAPTIONS
                        if os.path.isfile(stem + suffix)][:1]
        if len(captions) != len(images):
            name = os.path.basename(stem)
            reason = (f"{len(images)} pictures, but {len(captions)} captions have this name"
                      if captions else f"no caption: neither {name}.txt nor {name}.json beside it")
            found += [(image.key, reason) for image in images if suffix not in CAPTIONS]
        elif suffix not in CAPTIONS:
            found += [json.dumps(pair) + "\n" for pair in zip(images, captions, strict=True)]
    return found


def index_captions(sources, index):
    """Pairs each image with its caption (KEY.txt, or else KEY.json, beside KEY.jpg) and writes the
    file `index`. Members of the same name are paired in their order.

    Its first line is {"sources", "tars": {path: size}, "hash": BLAKE2b of the other lines}, each
    other line a JSON pair [image, caption] of ImageRefs. Images without a caption, and damaged
    tars, are listed in skipped.csv beside it."""
    tars, skipped, faults, n_pairs, hash = {}, [], [], 0, hashlib.blake2b()
    index.parent.mkdir(parents=True, exist_ok=True)
    # the lines, before the head is known
    with tempfile.TemporaryFile(dir=index.parent) as body:
        for path, found in find_files(sources, skipped, faults, pair_captions):
            lines = "".join(item for item in found if isinstance(item, str)).encode()
            skipped += [item for item in found if not isinstance(item, str)]
            n_pairs += lines.count(b"\n")
            hash.update(lines)
            body.write(lines)
            if found and file_suffix(path) == ".tar":
                tars[path] = os.path.getsize(path)
        n_found = n_pairs + len(skipped)
        if not n_pairs:
            raise UserError(f"none of the {n_found} pictures in {' '.join(sources)} has a caption: "
                            "expected KEY.txt or KEY.json beside KEY.jpg")
        table = index.with_name("skipped.csv")
        if skipped or faults:
            write_csv(table, ("picture", "reason"), faults + skipped)
        print(f"found {n_found} pictures = {n_pairs} pairs + {len(skipped)} skipped"
              + f"; {len(faults)} faults in tars" * bool(faults)
              + f" (see {table})" * bool(skipped or faults))
        head = {"sources": [os.path.abspath(source) for source in sources],
                "tars": dict(sorted(tars.items())), "hash": hash.hexdigest()}

        def write(temporary):
            with open(temporary, "wb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                body.seek(0)
                file.writelines(body)
        write_atomically(index, write)
