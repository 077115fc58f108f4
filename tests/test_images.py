"""images.py: damaged and unusual tars, folders, pictures of every mode, pairs of captions."""
import hashlib
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

import images
from common import REPO, UserError
from helpers import write_tar
from images import ImageRef, find_images, index_captions, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (12, 10), dtype=np.uint16)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(PIXELS))


def tar_bytes(members, kind=tarfile.GNU_FORMAT):
    """The bytes of a tar of [(name, bytes)], or of TarInfos without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def found_in(folder, data, name="a.tar"):
    """{member: bytes}, skipped and faults of what find_images finds in a tar."""
    path = folder / name
    path.write_bytes(data)
    refs, skipped, faults = find_images([str(path)])
    return {ref.member: ref.read() for ref in refs}, skipped, faults


# ---------------------------------------------------------------- tars
MEMBERS = [(f"{i}{'x' * 120 * (i % 2)}.png", bytes([i + 1]) * size)
           for i, size in enumerate((600, 1, 512, 5000, 511, 513, 2000, 1024))]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_costs_its_member_only(tmp_path, kind):
    """Each header of a tar in turn, those of long names included."""
    data = tar_bytes(MEMBERS, kind)
    assert found_in(tmp_path, data) == (dict(MEMBERS), [], [])
    headers = [at for at in range(0, len(data), 512) if data[at + 257:at + 262] == b"ustar"]
    assert len(headers) == 12
    for at in headers:
        broken = bytearray(data)
        broken[at + 140] ^= 1
        found, _, faults = found_in(tmp_path, bytes(broken))
        assert len(found) >= 7 and all(dict(MEMBERS).get(name, content) == content
                                       for name, content in found.items())
        (path, fault), = faults
        before = [name for name, content in MEMBERS if data.find(content) < at][-1:]
        assert "bytes are damaged after" in fault
        assert (before or ["its beginning"])[0] in fault


def test_random_damage_to_tars_is_named(tmp_path):
    """Bits of headers, garbage, cuts. What is found has its bytes; what is missing is named."""
    draw = random.Random(0)
    for _ in range(300):
        data = tar_bytes(MEMBERS, draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        headers = [at for at in range(0, len(data), 512) if data[at + 257:at + 262] == b"ustar"]
        broken, kind = bytearray(data), draw.choice(["bit", "garbage", "hole", "cut"])
        at = draw.choice(headers)
        if kind == "bit":
            # not in fields that nobody reads
            broken[at + draw.randrange(148)] ^= 1 << draw.randrange(8)
        elif kind == "garbage":
            broken[at:at + 512] = draw.randbytes(512)
        elif kind == "hole":
            broken[at:at + 512] = bytes(512)
        else:
            del broken[draw.randrange(1, data.rfind(bytes([8]))):]
        try:
            found, _, faults = found_in(tmp_path, bytes(broken))
        except UserError as error:
            found, faults = {}, [str(error)]
        assert faults, kind
        whole = set(dict(MEMBERS).values())
        assert all(content in whole for content in found.values()), kind


def test_concatenated_tars_are_one(tmp_path):
    """With both endings that programs write: 1,024 zeros, or zeros up to 10,240."""
    first, second = tar_bytes(MEMBERS[:3]), tar_bytes(MEMBERS[3:], tarfile.PAX_FORMAT)
    end = first.rfind(MEMBERS[2][1][-1:]) + 1
    for ending in (1024, 10240 - end % 10240):
        data = first[:end] + bytes(ending) + second
        assert found_in(tmp_path, data) == (dict(MEMBERS), [], [])
    assert "3,072 bytes are zeros after 2.png" in found_in(
        tmp_path, first[:end] + bytes(3072) + second)[2][0][1]


def test_what_is_no_whole_tar_is_named(tmp_path):
    whole = tar_bytes(MEMBERS)
    (tmp_path / "good.png").write_bytes(PNG)
    for name, data, fault in [
            ("empty", b"", "the end is missing after its beginning"),
            ("text", b"no tar" * 900, "5,400 bytes are damaged"),
            ("short", b"no tar", "6 bytes are damaged"),
            ("cut", whole[:whole.rfind(b"\x08")], "the end is missing after 7"),
            ("between", whole[:whole.rfind(b"\x07") + 1 + 48], "the end is missing after 6.png")]:
        (tmp_path / f"{name}.tar").write_bytes(data)
        refs, skipped, faults = find_images([str(tmp_path)])
        assert fault in dict(faults)[str(tmp_path / f"{name}.tar")]
    assert len([ref for ref in refs if ref.path.endswith("cut.tar")]) == 7
    assert skipped == [(f"{tmp_path}/cut.tar::{MEMBERS[7][0]}", "in the tar it is cut off")]


def test_members_that_are_no_plain_files_are_named(tmp_path):
    odd = []
    for name, kind in (("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE),
                       ("f.png", tarfile.FIFOTYPE), ("u.png", b"Z"), ("d.png", tarfile.DIRTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "a.png"
        odd.append(info)
    sparse = tarfile.TarInfo("p.png")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
    data = tar_bytes([("a.png", PNG), *odd, sparse, ("b.tar", b""), ("a.png", b"another")],
                     tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    refs, skipped, faults = find_images([str(tmp_path)])
    # of two members of one name both are kept
    assert [ref.read() for ref in refs] == [PNG, b"another"]
    assert [name[-5:] for name, _ in skipped] == [
        "s.png", "h.png", "f.png", "u.png", "p.png"]
    assert faults == [(f"{tmp_path}/a.tar::b.tar", "an archive in a tar: unpack it first")]


def write_many_tars(folder):
    """14 tars, some cut, one that is none, with archives in them; a picture and a pipe."""
    folder.mkdir()
    for i in range(14):
        data = tar_bytes([("0.txt", b"text"), *MEMBERS[:1 + i % 8], ("b.zip", b"")])
        (folder / f"{i:02}.tar").write_bytes(data[:len(data) * 2 // 3] if i % 3 else data)
    (folder / "05.tar").write_bytes(b"no tar")
    (folder / "055.png").write_bytes(PNG)
    os.mkfifo(folder / "06-pipe.tar")


def test_many_tars_are_read_by_other_processes(tmp_path, monkeypatch):
    """What is found, skipped and wrong is as if this process had read them, and so is the order."""
    data, seen, index_tar = tmp_path / "data", tmp_path / "seen", images.index_tar
    write_many_tars(data)
    seen.mkdir()

    def watch(path, *lists):
        # the first one is ready last
        time.sleep(0.3 * path.endswith("00.tar"))
        (seen / f"{os.getpid()} {os.path.basename(path)}").touch()
        return index_tar(path, *lists)
    monkeypatch.setattr(images, "index_tar", watch)
    files = sorted(map(str, data.iterdir()))
    alone = [find_images(files[start:start + 6]) for start in (0, 6, 12)]
    assert {int(name.split()[0]) for name in os.listdir(seen)} == {os.getpid()}
    found = find_images([str(data)])
    assert len(os.listdir(seen)) == 28
    assert found == tuple(sum(parts, []) for parts in zip(*alone, strict=True))
    assert len(found[0]) > 40 and len(found[1]) > 1 and len(found[2]) > 14


def test_a_killed_process_ends_the_indexing(tmp_path, monkeypatch):
    write_many_tars(tmp_path / "data")
    monkeypatch.setattr(images, "index_tar", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a process that read tars was killed"):
        find_images([str(tmp_path / "data")])


# each process names itself and reads its tar for ever
ENDLESS = """
import os, sys, time, images
from common import cli_main
images.index_tar = lambda *_: time.sleep(1000 + bool(os.write(1, b"reads\\n")))
cli_main(lambda: images.find_images(sys.argv[1:]))
"""


@pytest.mark.parametrize("stop, end, message", [
    (os.killpg, signal.SIGINT, "error: interrupted\n"), (os.kill, signal.SIGKILL, "")], ids=str)
def test_processes_end_with_their_script_and_say_nothing(tmp_path, stop, end, message):
    """Ctrl-C, which all of them get, and a kill of the script alone, which comes from stdin."""
    write_many_tars(tmp_path / "data")
    script = subprocess.Popen(
        [sys.executable, "-", tmp_path / "data"], cwd=REPO, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # a job in a shell's background has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    script.stdin.write(ENDLESS)
    script.stdin.close()
    for _ in range(min(os.cpu_count(), 14)):
        assert script.stdout.readline() == "reads\n"
    stop(script.pid, end)
    # the pipes end with the last process
    assert (script.stdout.read(), script.stderr.read()) == ("", message)
    assert script.wait() == (130 if end == signal.SIGINT else -9)


# ---------------------------------------------------------------- folders
def test_folders_are_read_whole_and_what_is_not_is_named(tmp_path, monkeypatch):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "sub", root / "locked", other):
        folder.mkdir(parents=True)
    for file in (root / "a.avif", root / "sub/b.jfif", other / "c.JPG", root / "e.eps"):
        file.write_bytes(PNG)
    for link, target in {"linked": other, "sub/up": root, "again": root / "sub",
                         "lost.png": "nowhere"}.items():
        (root / link).symlink_to(target)
    os.mkfifo(root / "f.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(root)
        server.bind("s.png")
    (tmp_path / "list.txt").write_text("a list")
    for name in ("x.tar.gz", "y.tgz"):
        (root / name).touch()
    scandir = os.scandir

    def scan(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", scan)
    refs, skipped, faults = find_images(
        [str(path) for path in (root, other, root / "a.avif", tmp_path / "list.txt")])
    assert sorted(os.path.basename(ref.path) for ref in refs) == ["a.avif", "b.jfif", "c.JPG"]
    assert sorted(os.path.basename(name) for name, _ in skipped) == [
        "f.png", "locked", "lost.png", "s.png"]
    assert [os.path.basename(path) for path, _ in faults] == [
        "x.tar.gz", "y.tgz", "list.txt"]
    assert "unpack it first" in faults[0][1]


@pytest.mark.parametrize("name, complaint", [
    ("fifo.png", "no regular file"), ("https://example.com/a.png", "it is a URL: download it"),
    ("missing.png", "No such file"), ("huge.png", "too many for a picture"),
    ("strip.png", "more than 200 times as long")])
def test_open_image_refuses_what_could_hang_or_is_no_picture(tmp_path, name, complaint):
    os.mkfifo(tmp_path / "fifo.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(10**12)
    (tmp_path / "strip.png").write_bytes(encoded(Image.new("L", (402, 2))))
    with pytest.raises(UserError, match=complaint):
        open_image(tmp_path / name)


# ---------------------------------------------------------------- pictures
def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(values, depth, colour, *chunks):
    """A PNG of values (height, width, channels), written by hand."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8), axis=-1)
    rows = bits.reshape(len(values), -1, 16)[..., 16 - depth:].reshape(len(values), -1)
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    head = struct.pack(">2I5B", values.shape[1], len(values), depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (
        (b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")))


def raw_tiff(values, bits, sample_format=1, photometric=1):
    """An uncompressed grey TIFF of values (height, width), bytes or array, written by hand."""
    height, width = values.shape
    data = values.tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2)
        data = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pairs)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 120 + 4,
            277: 1, 278: height, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<2H2I", tag, 4 if tag in (273, 279) else 3, 1, value)
                       for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def assert_pixels(data, expected, tolerance=0):
    """expected: (height, width) grey or (height, width, 3), 0 to 255."""
    expected = np.asarray(expected, float)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    found = np.asarray(open_image(data), float)
    assert found.shape == expected.shape and abs(found - expected).max() <= tolerance + 0.5


def test_grey_pictures_of_every_range():
    floats = RNG.random((12, 10)).astype(np.float32)
    floats[0, :4] = np.nan, -5, 1, np.inf
    shown = np.nan_to_num(floats, posinf=1).clip(0, 1)
    for top in (1, 255, 65535, 3e6):
        assert_pixels(raw_tiff(floats * np.float32(top), 32, 3), shown * 255)
    big = RNG.integers(0, 2**32, (12, 10), dtype=np.uint32)
    big[0, 0] = 2**32 - 1
    signed = (GREY16 // 2).astype(np.int32) - 100
    twelve = GREY16 // 16
    assert_pixels(raw_tiff(big, 32), big / (2**32 - 1) * 255)
    assert_pixels(raw_tiff(GREY16.astype(np.uint32), 32), GREY16 / 257)
    assert_pixels(raw_tiff(signed, 32, 2), signed.clip(0) / 257)
    assert_pixels(raw_tiff(twelve, 12), twelve / 4095 * 255)
    assert_pixels(raw_tiff(GREY16, 16), GREY16 / 257)
    assert_pixels(raw_tiff(GREY16, 16, photometric=0), 255 - GREY16 / 257)
    assert_pixels(encoded(Image.fromarray(GREY16), "JPEG2000"), GREY16 / 257)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white(depth):
    values = GREY16 >> 16 - depth
    values[3, 3:6] = 1
    shown = np.where(values == 1, 255, values / (2**depth - 1) * 255)
    assert_pixels(raw_png(values[..., None], depth, 0, (b"tRNS", b"\0\1")), shown)


def test_transparency_of_colours_and_alpha():
    for values, depth in ((PIXELS, 8), (RNG.integers(0, 65536, (12, 10, 3)), 16)):
        key = struct.pack(">3H", *values[3, 4].tolist())
        shown = (values >> depth - 8).astype(int)
        shown[3, 4] = 255
        assert_pixels(raw_png(values, depth, 2, (b"tRNS", key)), shown)
    for depth in (8, 16):
        grey, alpha = (RNG.integers(0, 2**depth, (12, 10)) for _ in range(2))
        shown = 255 * (1 + alpha / (2**depth - 1) * (grey / (2**depth - 1) - 1))
        assert_pixels(raw_png(np.stack([grey, alpha], -1), depth, 4), shown, tolerance=1.5)
    # shrunk, too: the key is not mixed with its neighbours first
    values = np.zeros((40, 40, 1), int)
    values[:20] = 9
    data = raw_png(values, 8, 0, (b"tRNS", b"\0\x09"))
    assert open_image(data, max_side=10).getpixel((5, 2)) == (255, 255, 255)


def test_other_colour_spaces():
    smooth = Image.fromarray(np.kron(PIXELS[:4, :4] // 2 + 64, np.ones((8, 8, 1), np.uint8)))
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(smooth, transform)
    assert_pixels(encoded(lab, "TIFF"), np.asarray(smooth), tolerance=4)
    ink = RNG.integers(0, 256, (12, 10, 4), dtype=np.uint8)
    paper = 255.0 - ink
    assert_pixels(encoded(Image.fromarray(ink, "CMYK"), "TIFF"),
                  paper[..., :3] * paper[..., 3:] / 255, tolerance=1)
    alpha = PIXELS[..., 0].astype(int)
    grey = alpha // 2
    # TIFF's premultiplied grey, ExtraSamples 1
    file = encoded(Image.fromarray(np.stack([grey, alpha], -1).astype(np.uint8), "LA"), "TIFF")
    entry = struct.pack("<2HIH", 338, 3, 1, 2)
    assert file.count(entry) == 1
    assert_pixels(file.replace(entry, entry[:-2] + b"\1\0"), grey + 255 - alpha, tolerance=1.5)


def test_damaged_metadata_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x10e], exif[0x132] = "a description" * 3, "2020:01:01 00:00:00"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    draw = random.Random(0)
    for kind, options in (("PNG", {"dpi": (72, 72)}), ("JPEG", {"comment": b"hello"}),
                          ("WEBP", {"lossless": True}), ("AVIF", {})):
        data = encoded(Image.fromarray(PIXELS), kind, exif=exif.tobytes(), icc_profile=icc,
                       **options)
        right = np.asarray(open_image(encoded(Image.fromarray(PIXELS), kind, **options)))
        blocks = [block for block in (exif.tobytes()[6:], b"hello", icc) if block in data]
        for _ in range(60):
            block = draw.choice(blocks)
            broken = bytearray(data)
            at = data.index(block) + draw.randrange(len(block) - 3)
            broken[at:at + 4] = draw.randbytes(4)
            assert np.array_equal(np.asarray(open_image(bytes(broken))), right), kind
    # each of these makes Pillow itself refuse the picture
    for bad in ((b"iCCP", b"name\0\1"), (b"gAMA", b""), (b"pHYs", b"\0"), (b"zTXt", b"a\0\7"),
                (b"acTL", b"\0")):
        assert_pixels(PNG[:33] + chunk(*bad) + PNG[33:], PIXELS)
    assert_pixels(PNG[:33] + chunk(b"tIME", bytes(7))[:-1] + b"?" + PNG[33:], PIXELS)
    # the orientation survives damage to other metadata
    turned = Image.Exif()
    turned[0x112] = 3
    turned = chunk(b"eXIf", turned.tobytes()[6:])
    assert_pixels(PNG[:33] + turned + chunk(b"iCCP", b"name\0\1") + PNG[33:], PIXELS[::-1, ::-1])
    jpeg = encoded(Image.fromarray(PIXELS), "JPEG")
    for marker, bad in ((0xe0, b"JFIF\0"), (0xe2, b"ICC_PROFILE\0"), (0xe2, b"MPF\0II*"),
                        (0xed, b"Photoshop 3.0\x008BIM\4\4")):
        segment = struct.pack(">2BH", 255, marker, len(bad) + 2) + bad
        assert_pixels(jpeg[:2] + segment + jpeg[2:], np.asarray(open_image(jpeg)))


def test_cut_pictures_are_refused():
    for kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF"):
        data = encoded(Image.fromarray(PIXELS), kind)
        with pytest.raises(UserError, match="cannot read the picture"):
            open_image(data[:len(data) * 2 // 3])


def test_one_large_picture_at_a_time(monkeypatch):
    """Small pictures do not wait; the limit is Pillow's."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 200)
    running, most, shrink, together = [], [], Image.Image.thumbnail, threading.Barrier(4)

    def thumbnail(self, size):
        running.append(self)
        if self.width < 20:
            together.wait(timeout=60)
        else:
            time.sleep(0.05)
            most.append(len(running))
        running.remove(self)
        return shrink(self, size)
    monkeypatch.setattr(Image.Image, "thumbnail", thumbnail)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_image, [PNG] * 4))
        list(pool.map(open_image, [encoded(Image.new("RGB", (20, 20)))] * 4))
    assert most == [1] * 4
    with pytest.raises(UserError, match="exceeds limit of 178956970 pixels"):
        open_image(raw_png(np.zeros((1, 1, 1), int), 8, 0).replace(
            chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0)),
            chunk(b"IHDR", struct.pack(">2I5B", 13_400, 13_400, 8, 0, 0, 0, 0))))


def smooth_jpeg(width, height):
    """A JPEG of slow changes, which any way to shrink it should keep."""
    coarse = RNG.integers(0, 256, (height // 100, width // 100, 3), dtype=np.uint8)
    return encoded(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), "JPEG")


@pytest.mark.parametrize("size, drafted, exact", [
    ((4000, 500), (1000, 125), (512, 64)), ((500, 4000), (125, 1000), (64, 512)),
    ((4000, 3000), (1000, 750), (512, 384)), ((1536, 1024), (768, 512), (512, 341)),
    ((2049, 2100), (513, 525), (500, 512)), ((1000, 900), (1000, 900), (512, 461)),
    ((512, 400), (512, 400), (512, 400))], ids=str)
def test_jpegs_are_decoded_at_a_fraction(size, drafted, exact):
    """That the longer side allows, of whatever shape; all ways to 100 px look the same."""
    data = smooth_jpeg(*size)
    whole = Image.open(io.BytesIO(data))
    whole.load()
    found = open_image(data, max_side=512, exact=False)
    assert found.size == drafted and open_image(data, max_side=512).size == exact
    if size == drafted:
        assert np.array_equal(found, whole)
    few = [np.asarray(image.resize((100, 100), Image.BICUBIC), int)
           for image in (found, open_image(data, max_side=512), whole)]
    for shrunk in few[:2]:
        assert abs(shrunk - few[2]).max() <= 20 and abs(shrunk - few[2]).mean() < 1.5


def test_other_pictures_are_shrunk_if_twice_as_large():
    for width, expected in ((300, 300), (1024, 1024), (1025, 512)):
        data = encoded(Image.new("RGB", (width, 200)))
        assert open_image(data, max_side=512, exact=False).width == expected


# ---------------------------------------------------------------- captions
def test_captions_pair_with_their_picture_or_are_named(tmp_path, capsys):
    root, index = tmp_path / "data", tmp_path / "run/pairs.jsonl"
    root.mkdir()
    members = [("t.png", PNG), ("t.txt", b"text"), ("t.json", b'{"caption": "no"}'),
               ("j.png", PNG), ("j.json", b'{"caption": "json"}'),
               # a name that is there twice, with as many captions, and with fewer
               ("k.png", PNG), ("k.txt", b"first"), ("k.png", PNG), ("k.txt", b"second"),
               ("m.png", PNG), ("m.png", PNG), ("m.txt", b"one"), ("n.png", PNG)]
    (root / "a.tar").write_bytes(tar_bytes(members))
    (root / "b.tar").write_bytes(b"no tar")
    for name, content in {"f.png": PNG, "f.txt": b"file", "g.png": PNG, "h.png": PNG,
                          "h.json": b'{"caption": "object"}'}.items():
        (root / name).write_bytes(content)
    # no caption, and no picture
    os.mkfifo(root / "g.txt")
    os.mkfifo(root / "q.png")
    index_captions([str(root)], index)
    table = index.with_name("skipped.csv")
    assert capsys.readouterr().out == (
        f"found 11 pictures = 6 pairs + 5 skipped; 1 faults in tars (see {table})\n")
    pairs = [[ImageRef(*fields) for fields in json.loads(line)]
             for line in index.read_text().splitlines()[1:]]
    assert [(image.key.rpartition("/")[2], (root / caption.path).read_bytes()[
        caption.offset:][:caption.size if caption.member else None]) for image, caption in pairs
    ] == [("a.tar::t.png", b"text"), ("a.tar::j.png", b'{"caption": "json"}'),
          ("a.tar::k.png", b"first"), ("a.tar::k.png", b"second"), ("f.png", b"file"),
          ("h.png", b'{"caption": "object"}')]
    assert len({image.offset for image, _ in pairs[2:4]}) == 2
    listed = table.read_text()
    assert listed.count("2 pictures, but 1 captions have this name") == 2
    assert "n.png,no caption: neither n.txt nor n.json" in listed and "b.tar" in listed
    for image, _ in pairs:
        assert open_image(image, max_side=64).size == (10, 12)


def test_the_index_of_many_tars_is_that_of_a_few_at_a_time(tmp_path):
    """Lines in their order, sizes of tars, and what is skipped."""
    write_many_tars(tmp_path / "data")
    files = sorted(map(str, (tmp_path / "data").glob("*.tar")))
    parts = {"all": files, "first": files[:7], "second": files[7:13], "third": files[13:]}
    heads, lines, skipped = {}, {}, {}
    for name, part in parts.items():
        index_captions(part, tmp_path / name / "pairs.jsonl")
        head, *lines[name] = (tmp_path / name / "pairs.jsonl").read_text().splitlines()
        heads[name] = json.loads(head)["tars"]
        skipped[name] = (tmp_path / name / "skipped.csv").read_text().splitlines()[1:]
    for found in (lines, skipped):
        whole, *few = found.values()
        assert sorted(whole) == sorted(sum(few, [])) and len(whole) > 8
    whole, *few = lines.values()
    assert whole == sum(few, [])
    whole, *few = heads.values()
    assert whole == few[0] | few[1] | few[2] and whole[files[0]] == os.path.getsize(files[0])


def test_the_index_is_written_as_it_is_read(tmp_path, monkeypatch):
    """200 times 1,000 pairs in 1/20 of the memory that their lines take."""
    pairs = [f"{i:0149}\n" for i in range(1000)]
    monkeypatch.setattr(images, "find_files", lambda *_: ((f"{i}", pairs) for i in range(200)))
    tracemalloc.start()
    index_captions(["data"], tmp_path / "pairs.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    head, _, body = (tmp_path / "pairs.jsonl").read_bytes().partition(b"\n")
    assert body.decode() == "".join(pairs) * 200 and peak < len(body) / 20
    assert json.loads(head)["hash"] == hashlib.blake2b(body).hexdigest()
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_each_tar_is_read_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.txt": b"text"})
    opened, tar_open = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **b: opened.append(a) or tar_open(*a, **b))
    index_captions([str(tmp_path), str(tmp_path / "a.tar")], tmp_path / "run/pairs.jsonl")
    assert len(opened) == 1
    assert len((tmp_path / "run/pairs.jsonl").read_text().splitlines()) == 2
