"""`python -m miniature claims`: intervals, replacements, and the whole of it in a tiny size."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import thinkdiff_lvlm
from aligner import load_aligner
from helpers import command, complaint
from miniature import WEIGHTS, claims, claims_report

TINY = {
    "images": 40, "questions": 12, "pictures": 10, "flux_steps": 2, "seeds": 1,
    "lvlm": 20, "long": 20, "clip": 20, "checkpoints": [10],
    "samples": [20], "tokens": [16], "hard": 5, "noise": [0.3], "blend": [0.4],
    "shared": 4, "candidates": 3, "draws": 1, "best_of": 2, "captions": 200, "reader_steps": 20,
    "plain_kinds": 10, "per_kind": 4, "redrawn_kinds": 5,
}


def test_intervals_and_correlations_equal_values_by_hand():
    # 8 of 10: z^2 = 3.8415, (.8 + .19207 -+ 1.96 sqrt(.016 + .0096036)) / 1.38415
    assert claims_report.Share(8, 10).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert claims_report.Share(0, 10).interval() == pytest.approx((0, 0.2775), abs=1e-4)
    assert str(claims_report.Share(8, 10)) == "80.0 (49.0 to 94.3)"
    assert str(claims_report.Spread((0.5, 0.25, 0.75))) == "50.0 [25.0, 75.0]"
    # mean .25, standard deviation .5, 1.96 * .5 / 2
    assert str(claims_report.Difference((1, 0, 0, 0))) == "+25.0 ± 49.0"
    # ranks 0 1 2 3 and 0 1.5 1.5 3: covariance 4.5 of sqrt(5 * 4.5)
    assert claims_report.rank_correlation([1, 2, 3, 9], [0, 5, 5, 6]) == pytest.approx(0.9487, 1e-3)


def test_ridge_finds_within_kinds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(40).repeat_interleave(8)
    x = torch.randn(320, 5, generator=generator, dtype=torch.float64)
    known, noise = 2 * x[:, :1] - x[:, 1:2], torch.randn(320, 1, generator=generator)
    # the kind alone says nothing within kinds
    of_kind = kinds[:, None] + 0.1 * torch.randn(320, 1, generator=generator)
    found = claims.ridge_r2(torch.cat([x, kinds[:, None]], 1),
                            torch.cat([known, noise, of_kind], 1), kinds)
    assert found[0] > 0.99 and abs(found[1]) < 0.15 and abs(found[2]) < 0.15


def test_statistics_are_those_of_the_object():
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[10:26, 32:64:1] = (255, 0, 51)
    pixels[10:26, 48:] = 200
    red, area = [255, 0, 51], 16 * 16 / 64**2
    expected = [sum(red) / 765, *(c / 255 for c in red), area, 39.5 / 63]
    assert claims.image_statistics(Image.fromarray(pixels)) == pytest.approx(expected)


def test_splits_do_what_their_names_say():
    args = SimpleNamespace(seed=0, vlm=str(WEIGHTS / "qwen2-vl"))
    ends = claims.sentence_ends(args.vlm)
    y = torch.arange(1, 13) + 10**6
    y[[4, 8]] = ends[0]
    x = torch.arange(12)[:, None]
    scattered, sentences = set(), set()
    for position in range(60):
        read, tokens, rest = claims.scattered_split(x, y, position, args)
        assert torch.equal(tokens, y[read[:, 0]]) and len(rest) >= 1 and len(read) >= 1
        assert sorted([*tokens.tolist(), *rest.tolist()]) == sorted(y.tolist())
        scattered.add(read[-1].item() + 1 > len(read))
        read, tokens, rest = claims.sentence_split(x, y, position, args)
        assert torch.equal(read[:, 0], torch.arange(len(read)))
        assert torch.equal(torch.cat([tokens, rest]), y)
        sentences.add(len(read))
    assert True in scattered and sentences == {5, 9}


def test_replacements_end_and_a_deeper_aligner_can_be_loaded(tmp_path):
    split = thinkdiff_lvlm.split
    with claims.replaced("scattered"):
        assert thinkdiff_lvlm.split is claims.scattered_split
    assert thinkdiff_lvlm.split is split
    with claims.replaced("deeper"):
        aligner = thinkdiff_lvlm.Aligner(6, 4, hidden=8)
        aligner.init_norm(torch.full((4,), 0.5))
        aligner.save_pretrained(tmp_path)
        loaded, x = load_aligner(tmp_path), torch.randn(1, 3, 6)
        assert torch.equal(loaded(x), aligner(x))
    hidden = [m.out_features for m in loaded.net if isinstance(m, torch.nn.Linear)]
    assert hidden == [8, 8, 4]
    rms = loaded(x).square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.full_like(rms, 0.5), atol=1e-3)


def test_tiny_claims_resume_and_repeat(tmp_path, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setitem(claims.SIZES, name, value)
    monkeypatch.chdir(tmp_path)
    line = ("miniature", "claims", "--out", tmp_path / "claims")
    command(*line)
    out = tmp_path / "claims"
    page, numbers = (out / "claims.md").read_text(), (out / "claims.json").read_bytes()
    for number in range(1, 11):
        assert f"\n## {number}. " in page
    assert {f.stem for f in out.glob("*.png")} == {"norms", "steps", "transfer"}
    assert not any(text in page for text in ("nan", "None"))
    tables = json.loads(numbers)["tables"]
    assert sum(map(len, tables.values())) > 50

    # of what is deleted the same comes again, nothing else is done
    lost = ["main", "paper-seed0", "deeper-seed0", "draw main, words, seed 0"]
    for name in lost:
        (out / "finished" / f"{name}.json").unlink()
    shutil.rmtree(out / "runs/paper-seed0")
    before = {f.name: f.stat().st_mtime_ns for f in (out / "finished").iterdir()}
    trained = (out / "runs/deeper-seed0/log.csv").stat().st_mtime_ns
    command(*line)
    assert {f.stem for f in (out / "finished").iterdir()
            if before.get(f.name) != f.stat().st_mtime_ns} == {*lost}
    assert (out / "runs/deeper-seed0/log.csv").stat().st_mtime_ns == trained
    assert (out / "claims.json").read_bytes() == numbers

    monkeypatch.setitem(claims.SIZES, "questions", 13)
    assert "choose another --out" in complaint(*line)
