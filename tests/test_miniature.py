"""world.py, miniature.py and the shipped stand-ins: data in the promised layout, weights that work."""
import random
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import common
import miniature
from common import REPO
from standins import clip, t5, vlm
from world import DETAILS, NOUNS, PAIRS, caption, draw, label


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["miniature.py", *map(str, args)])
    common.run(miniature.main)


def test_the_world_is_cobsats():
    assert len(PAIRS) == len(set(PAIRS)) == 500 and all(len(v) == 10 for v in [*DETAILS.values(), *NOUNS.values()])
    assert (DETAILS["color"][8], DETAILS["style"][8], DETAILS["background"][4], NOUNS["action"][9], NOUNS["style"][0]) == (
        "blue", "3d", "park", "bird", "leaf")  # indices of the protocol
    assert label("style", "3d", "hat") == "wireframe hat" and label("background", "park", "dog") == "amusement park dog"


def test_every_caption_names_its_noun_and_value_and_no_other():
    rng = random.Random(0)
    for kind in PAIRS:
        for create in (False, True):
            text = caption(rng, *kind, create=create)
            assert vlm.said(text, *kind), text
            assert text.startswith(("Create", "Draw", "Generate", "Make")) == create


def test_pictures_are_classes_and_not_templates():
    for kind in PAIRS[::23]:
        first, same, other = (np.asarray(draw(random.Random(seed), *kind)).astype(int) for seed in (1, 1, 2))
        assert first.shape == (64, 64, 3) and (first == same).all() and abs(first - other).mean() > 1


def test_draw_writes_webdataset_tars_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(miniature, "TAR_SIZE", 4)
    command(monkeypatch, "draw", "--out", tmp_path, "--count", 10)
    tars = sorted(tmp_path.glob("*.tar"))
    names = [name for path in tars for name in tarfile.open(path).getnames()]
    assert len(tars) == 3 and sorted(names) == sorted(f"{i:07d}.{suffix}" for i in range(10) for suffix in ("png", "txt"))
    before = tars[1].read_bytes()
    tars[1].unlink()
    kept = tars[0].stat().st_mtime_ns
    command(monkeypatch, "draw", "--out", tmp_path, "--count", 10)
    assert tars[1].read_bytes() == before and tars[0].stat().st_mtime_ns == kept
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "draw", "--out", tmp_path, "--count", 11)
    assert stop.value.code == 1


def test_cobsat_layout(monkeypatch, tmp_path):
    command(monkeypatch, "cobsat", "--out", tmp_path)
    assert len(list(tmp_path.glob("datasets/*/*.jpg"))) == 500
    for path in ("color_car/white_car.jpg", "background_dog/park_dog.jpg", "style_hat/3d_hat.jpg"):
        assert Image.open(tmp_path / "datasets" / path).size == (64, 64)


def test_shipped_weights_are_small():
    assert sum(file.stat().st_size for file in (REPO / "mini").rglob("*") if file.is_file()) < 40e6


def test_t5s_decoder_depends_on_its_memory():
    result = t5.check(REPO / "mini", 60)
    assert result["label read from a caption"] >= 0.95 and result["label read from another caption"] <= 0.1


def test_shipped_clip_and_vlm_work():
    """Far below what they reach (mini/README.md), far above chance: a broken file or processor does not pass."""
    assert clip.check(REPO / "mini", 100)["held-out pictures"]["both"] > 0.95
    result = vlm.check(REPO / "mini", 20)
    assert result["4-shot"] >= 0.9 and result["caption"] >= 0.9 and result["fast path off by"] < 1e-3
