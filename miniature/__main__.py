"""The miniature: toy pictures and captions, and the stand-ins of the big models trained on them.

    # picture-caption WebDataset tars: KEY.png, KEY.txt
    python -m miniature draw --out data/mini --count 5000
    # the 500 pictures in CoBSAT's folders, none of which is seen in training
    python -m miniature cobsat --out data/cobsat
    # train everything in miniature/weights again, to build/weights
    python -m miniature train
    # only these, with another seed
    python -m miniature train clip vlm --seed 1 --build build-1 --weights build-1/weights
    # contexts, and what each recipe draws from them over four seeds
    python -m miniature gallery --out outputs/gallery.png
    # how good each stand-in is on held-out pictures
    python -m miniature check --json results/check.json
    # the paper's claims: tables and plots
    python -m miniature claims --out results/claims
    # all 500 kinds of picture on one page
    python -m miniature sheet --out outputs/world.png

A stand-in is the real model's class with a tiny configuration; every script loads it by path like
the real model. `train` resumes after a kill from what it left in --build.
"""
import startup

import argparse
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import common
from cobsat_eval import DETAILS, KINDS, NOUNS, shown_word
from common import UserError, cli_main, write_atomically, write_json
from miniature import WEIGHTS
from miniature.world import SIZE, caption, draw

# samples a tar
TAR_SIZE = 1000
# in an order in which each finds what it needs
STAND_INS = ("t5", "vae", "clip", "vlm", "flux", "pixart", "aligners")
# {folder of an aligner: its variant, its number of images, and what it changes of `train --mini`}
ALIGNERS = {
    "aligner-lvlm": ("lvlm", 5000, ()),
    "aligner-lvlm-encoder": (
        "lvlm", 5000, ("--encoder-loss", 1, "--steps", 1500, "--lr-horizon", 1500)),
    "aligner-clip": ("clip", 5000, ()),
    "aligner-clip-encoder": (
        "clip", 20000,
        ("--encoder-loss", 2, "--hidden", 1024, "--steps", 6000, "--lr-horizon", 6000)),
}
CHECKS = ("t5", "clip", "vlm", "flux", "lvlm", "compose")
# glibc otherwise returns a step's memory to the system and fetches it again in the next: FLUX
# trains 3 times slower
FAST_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28), "OMP_NUM_THREADS": "1",
}


# ---------------------------------------------------------------- data
def _write_tar(job):
    path, first, count, seed = job

    def write(temporary):
        with tarfile.open(temporary, "w") as tar:
            for number in range(first, first + count):
                rng = random.Random(f"draw {seed} {number}")
                kind = rng.choice(KINDS)
                png = io.BytesIO()
                draw(rng, *kind).save(png, "PNG")
                text = caption(rng, *kind, create=rng.random() < 0.5)
                for suffix, data in (("png", png.getvalue()), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    write_atomically(path, write)


def draw_data(args):
    """`draw`: pictures of random kinds with captions, as tars of TAR_SIZE samples.

    Tars that are there already are kept.
    """
    out = Path(args.out)
    settings = {"count": args.count, "seed": args.seed}
    settings_file = out / "drawn.json"
    if settings_file.exists():
        found = json.loads(settings_file.read_text())
        if found != settings:
            raise UserError(
                f"{out} holds data drawn with {found}, not {settings}: choose another --out")
    write_json(settings_file, settings)
    jobs = []
    for number, first in enumerate(range(0, args.count, TAR_SIZE)):
        path = out / f"{number:05d}.tar"
        if not path.exists():
            jobs.append((path, first, min(TAR_SIZE, args.count - first), args.seed))
    with multiprocessing.Pool() as pool:
        for _ in tqdm(pool.imap_unordered(_write_tar, jobs), "drawing", len(jobs), unit="tar"):
            pass
    print(f"{args.count} pictures with captions: {out}")


def draw_cobsat(args):
    """`cobsat`: one picture of each kind in CoBSAT's layout, from seeds of its own."""
    folder = Path(args.out) / "datasets"
    for detail, value, noun in tqdm(KINDS, "drawing"):
        image = draw(random.Random(f"cobsat {value} {noun}"), detail, value, noun)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=95)
        write_atomically(folder / f"{detail}_{noun}" / f"{value}_{noun}.jpg", jpeg.getvalue())
    print(f"500 pictures: {folder}")


def draw_sheet(args):
    """`sheet`: the 500 kinds on one page, a block for each detail, a row for each value."""
    # legible where the page is shown 900 px wide
    font, small = ImageFont.load_default(20), ImageFont.load_default(18)
    cell, margin, head, gap = SIZE + 2, 118, 30, 16
    block = (margin + 10 * cell + gap, head + 10 * cell + gap)
    sheet = Image.new("RGB", (2 * block[0], 3 * block[1] + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, detail in enumerate(DETAILS):
        left, top = number % 2 * block[0], gap + number // 2 * block[1]
        pen.text((left + margin - 8, top), f"{detail}:", "black", font, anchor="ra")
        for column, noun in enumerate(NOUNS[detail]):
            middle = left + margin + column * cell + SIZE // 2
            pen.text((middle, top), noun, "black", small, anchor="ma")
        for row, value in enumerate(DETAILS[detail]):
            y = top + head + row * cell
            pen.text((left + margin - 8, y + SIZE // 2), shown_word(value).replace(" ", "\n"),
                     "black", font, anchor="rm", align="right")
            for column, noun in enumerate(NOUNS[detail]):
                image = draw(random.Random(f"sheet {value} {noun}"), detail, value, noun)
                sheet.paste(image, (left + margin + column * cell, y))
    kind = "JPEG" if Path(args.out).suffix in (".jpg", ".jpeg") else "PNG"
    write_atomically(args.out, lambda temporary: sheet.save(temporary, kind, quality=85))
    print(args.out)


# ---------------------------------------------------------------- stand-ins
def run_training(name, args, n_processes=1, output=None):
    """Trains a stand-in in processes of its own; output: a file for what they print."""
    command = [sys.executable, "-m"]
    if n_processes > 1:
        command += ["torch.distributed.run", "--standalone",
                    "--nproc_per_node", str(n_processes), "-m"]
    command += [f"miniature.{name}", "--build", args.build, "--weights", args.weights,
                "--seed", str(args.seed)]
    print(f"[{name}]", " ".join(command[1:]), flush=True)
    code = subprocess.run(command, cwd=common.REPO, env={**os.environ, **FAST_MALLOC},
                          stdout=output, stderr=output).returncode
    if code:
        where = output.name if output else "above"
        raise UserError(f"training of {name} ended with code {code}: see {where}; the same "
                        "command resumes from the last saved state")


def run_script(*command):
    """Runs one of the scripts, or this one, in a process of its own."""
    command = [*map(str, command)]
    print("python", *command, flush=True)
    code = subprocess.run([sys.executable, *command], cwd=common.REPO,
                          env={**os.environ, **FAST_MALLOC}).returncode
    if code:
        raise UserError(f"`python {' '.join(command)}` ended with code {code}: see above; the same "
                        "command resumes")


def train_aligners(args):
    """Draws and describes images, and trains the ALIGNERS by the real scripts, two at a time."""
    build, weights = Path(args.build), Path(args.weights)
    images = {count: build / f"images-{count}" for _, count, _ in ALIGNERS.values()}
    for count, folder in images.items():
        run_script("-m", "miniature", "draw", "--out", folder, "--count", count)
    features = build / "features"
    run_script("prepare_data.py", "lvlm", "--mini", "--images",
               images[ALIGNERS["aligner-lvlm"][1]], "--out", features,
               "--vlm", weights / "qwen2-vl", "--seed", args.seed)

    def train_aligner(name):
        variant, count, flags = ALIGNERS[name]
        data, encoder = (features, "qwen2-vl") if variant == "lvlm" else (images[count], "clip")
        run_script(f"thinkdiff_{variant}.py", "train", "--mini", "--resume", "--data", data,
                   "--out", build / name, "--vlm", weights / encoder, "--t5", weights / "t5",
                   "--seed", args.seed, *flags)
        for file in ("config.json", "model.safetensors"):
            write_atomically(weights / name / file, (build / name / "aligner" / file).read_bytes())

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(train_aligner, ALIGNERS))


def train(args):
    """`train`: on two cores the VLM, which takes longest, beside T5, VAE and CLIP; then FLUX, and
    the aligners."""
    args.build, args.weights = (os.path.abspath(path) for path in (args.build, args.weights))
    os.makedirs(args.build, exist_ok=True)
    names = [name for name in STAND_INS if not args.names or name in args.names]
    n_cores = min(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(1) as beside, open(f"{args.build}/vlm.log", "a") as log:
        vlm = None
        if "vlm" in names and n_cores > 1:
            vlm = beside.submit(run_training, "vlm", args, output=log)
            names.remove("vlm")
        for name in names:
            if name in ("flux", "pixart", "aligners") and vlm:
                vlm.result()
            if name == "aligners":
                train_aligners(args)
            else:
                run_training(name, args, n_cores if name in ("flux", "pixart") else 1)
        if vlm:
            vlm.result()


def check(args):
    """`check`: accuracy of each stand-in on pictures and texts that no training has seen."""
    # imports all of the models' libraries, which takes seconds
    from miniature import check as checks
    checks.check(args)


def gallery(args):
    """`gallery`: contexts, and what each recipe draws from them over four seeds."""
    # imports all of the models' libraries, which takes seconds
    from miniature import gallery as page
    page.gallery(args)


def claims(args):
    """`claims`: the paper's claims measured with three aligner seeds each: tables and plots."""
    # imports all of the models' libraries, which takes seconds
    from miniature import claims as measured
    measured.claims(args)


# ---------------------------------------------------------------- command line
def one_of(names):
    """An argparse type: one of `names`."""
    # `choices` would refuse an empty list in Python 3.11 (nargs="*")
    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def add_command(commands, name, run, about, *flags):
    """A subcommand with flags, (flag, type, default, help); its args.run is `run`."""
    parser = commands.add_parser(name, help=about, description=about)
    for flag, kind, default, text in flags:
        common.add_flag(parser, flag, kind, default, default, text)
    parser.set_defaults(run=run)
    return parser


def main():
    parser = common.Parser(prog="python -m miniature", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    add_command(commands, "draw", draw_data, "picture-caption tars",
                ("--out", str, "data/mini", "folder for the tars"),
                ("--count", common.count, 5000, "pictures"),
                ("--seed", common.seed, 0, "of kinds, pictures and captions"))

    add_command(commands, "cobsat", draw_cobsat, "the 500 pictures in CoBSAT's layout",
                ("--out", str, "data/cobsat", "folder"))

    add_command(commands, "sheet", draw_sheet, "contact sheet of the 500 kinds of picture",
                ("--out", str, "outputs/world.png", "PNG or JPEG"))

    p = add_command(commands, "train", train, "train the stand-ins from scratch",
                    ("--build", str, "build", "folder for caches and states"),
                    ("--weights", str, "build/weights", "folder for the stand-ins"),
                    ("--seed", common.number(int, 0), 0, "of weights, batches and noise"))
    p.add_argument("names", nargs="*", type=one_of(STAND_INS), metavar="NAME",
                   help=f"any of {', '.join(STAND_INS)} (none: all)")

    p = add_command(commands, "check", check, "accuracy of the stand-ins on held-out pictures",
                    ("--weights", str, str(WEIGHTS), "folder of the stand-ins"),
                    ("--aligner", str, [], "for lvlm; default: those in --weights"),
                    ("--clip-aligner", str, [], "for compose; default: those in --weights"),
                    ("--decoder", ("flux", "pixart"), "flux", "what draws, for lvlm and compose"),
                    ("--count", common.count, 500, "questions or pictures of each sort"),
                    ("--json", str, None, "also write the figures to this file"))
    p.add_argument("names", nargs="*", type=one_of(CHECKS), metavar="NAME",
                   help="t5, clip, vlm, flux; lvlm: all of ThinkDiff-LVLM; compose: of "
                   "ThinkDiff-CLIP (none: all)")

    add_command(commands, "gallery", gallery, "contexts and what each recipe draws from them",
                ("--out", str, "outputs/gallery.png",
                 "PNG; beside it -clip.png, of ThinkDiff-CLIP, and -decoders.png, of PixArt"),
                ("--weights", str, str(WEIGHTS), "folder of the stand-ins and aligners"),
                ("--seed", common.seed, 0, "the first of four"))

    add_command(commands, "claims", claims, "the paper's claims measured, in under three hours",
                ("--out", str, "results/claims", "folder for the report"),
                ("--weights", str, str(WEIGHTS), "folder of the stand-ins"))

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli_main(main)
