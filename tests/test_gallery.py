"""`python -m miniature gallery` and `sheet`: which images they show, and how these are marked."""
import functools
import random
import re
import shutil

import numpy as np
from PIL import Image

from cobsat_eval import DETAILS, NOUNS
from common import REPO
from helpers import command
from miniature import gallery
from miniature.world import draw


def rgb(color):
    return tuple(int(color[i:i + 2], 16) for i in (1, 3, 5))


def test_gallery_counts_and_marks_what_is_right(tmp_path, monkeypatch):
    """The words draw more right than an aligner with random weights, and the frames say so."""
    weights = tmp_path / "weights"
    shutil.copytree(REPO / "miniature/weights", weights)
    for name in ("lvlm", "clip"):
        shutil.copytree(weights / f"aligner-{name}", weights / f"aligner-{name}-encoder",
                        dirs_exist_ok=True)
    monkeypatch.setattr(gallery, "SEEDS", range(1))
    monkeypatch.setattr(gallery, "EXAMPLE_SEEDS", range(2))
    monkeypatch.setattr(gallery, "draw_prompts", functools.partial(gallery.draw_prompts, steps=8))
    out, _ = command("miniature", "gallery", "--weights", weights, "--out", tmp_path / "page.png")
    assert len(re.findall(r"red car, .*: right with \d of 2 seeds", out)) == 3 + 4
    assert "red car, the VLM's words: right with 2 of 2 seeds" in out
    # six contexts; five images, and two composed ones that are not judged; two decoders
    assert re.findall(r"^[\w'., ]+: \d of (\d) right$", out, re.M) == [*"66655" "6666"]
    for name, columns in (("page.png", 3), ("page-clip.png", 2), ("page-decoders.png", 4)):
        page = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        counts = [(page == rgb(color)).all(-1).sum() for color in (gallery.RIGHT, gallery.WRONG)]
        # a frame of 3 px and its mark
        assert sum(counts) > 5 * columns * 3 * 4 * (gallery.IMAGE - 6) and counts[0] > counts[1]


def test_the_page_marks_each_image_by_its_verdict():
    """Frame and corner are green, red, or left as they were; the count leaves these out."""
    white = Image.new("RGB", (64, 64), "white")
    rows = [([["word", white]], {"one": [(white, right) for right in (True, False, None, True)]})]
    assert gallery.count_right(rows) == {"one": "2 of 3 right"}
    page = gallery.draw_page(rows, 0)
    left, step = 2 * gallery.GAP + gallery.IMAGE + 4, gallery.IMAGE + 4
    for number, color in enumerate((gallery.RIGHT, gallery.WRONG, "#ffffff", gallery.RIGHT)):
        corner = left + number % 2 * step, 60 + number // 2 * step
        for shift in (0, 1, 17):
            assert page.getpixel((corner[0] + shift, corner[1] + 1)) == rgb(color)


def test_the_sheet_shows_all_500_kinds(tmp_path):
    command("miniature", "sheet", "--out", tmp_path / "world.png")
    sheet = np.asarray(Image.open(tmp_path / "world.png"))
    for number, detail in ((0, "color"), (4, "texture")):
        value, noun = DETAILS[detail][9], NOUNS[detail][2]
        image = np.asarray(draw(random.Random(f"sheet {value} {noun}"), detail, value, noun))
        left = number % 2 * 794 + 118 + 2 * 66
        top = 16 + number // 2 * 706 + 30 + 9 * 66
        assert (sheet[top:top + 64, left:left + 64] == image).all()
