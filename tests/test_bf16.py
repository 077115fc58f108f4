"""The whole chain in bf16, as on a GPU, but on the CPU: --dtype of every script, against fp32."""
import csv
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import EXAMPLE, REPO
from helpers import command, read_log
from references import aligner_weights, pixels

BATCH = "--batch-size 8 --micro-batch 4 --held-out 2 --log-every 1 --warmup 0 --steps 3".split()
DTYPES = ("float32", "bfloat16")


def psnr(a, b):
    """Of two image files, in dB."""
    return 10 * math.log10(255 ** 2 / max(1e-9, np.mean((pixels(a) - pixels(b)) ** 2)))


def check_training(runs):
    """Losses within 1 % of fp32's, but not the same; a finite aligner, kept in fp32."""
    logs = [[float(row["loss"]) for row in read_log(run)] for run in runs]
    assert [len(log) for log in logs] == [3, 3] and logs[0] != logs[1]
    assert logs[1] == pytest.approx(logs[0], rel=0.01)
    for weight in aligner_weights(runs[1] / "aligner").values():
        assert weight.isfinite().all() and weight.dtype == torch.float32


def draw(script, tmp_path, *context):
    """The picture of a context by the shipped aligner, in each dtype; and one of another noise."""
    names = [tmp_path / f"{script}-{name}.png" for name in (*DTYPES, "other")]
    for name, dtype, seed in zip(names, (*DTYPES, "float32"), (0, 0, 1), strict=True):
        command(f"{script}.py", "generate", "--mini", *context, "--dtype", dtype, "--seed", seed,
                "--steps", 8, "--out", name)
    return names


def check_pictures(fp32, bf16, other):
    """bf16 changes the picture by its rounding, far less than another noise does."""
    assert pixels(bf16).shape == (64, 64, 3)
    # 36 and 41 dB; other noise 14 and 13 dB
    assert psnr(fp32, bf16) > 30 > psnr(fp32, other) + 5


def test_lvlm(tmp_path):
    command("miniature", "draw", "--count", 24, "--out", tmp_path / "images")
    for dtype in DTYPES:
        out = ("--dtype", dtype, "--out", tmp_path / dtype)
        command(REPO / "prepare_data.py", "lvlm", "--mini", "--images", tmp_path / "images",
                "--tokens", 12, *out)
    shards = [load_file(tmp_path / dtype / "shard-0000000.safetensors") for dtype in DTYPES]
    a, b = (shard["features"] for shard in shards)  # (24, 12, 128)
    assert a.dtype == b.dtype == torch.bfloat16 and b.isfinite().all()
    # some sampled tokens change by rounding; the first feature depends on none
    same = (shards[0]["tokens"] == shards[1]["tokens"]).all(1)
    for one, two in ((a[:, 0].float(), b[:, 0].float()), (a[same].float(), b[same].float())):
        assert 0 < (one - two).norm() < 0.02 * one.norm()

    runs = [tmp_path / f"run-{dtype}" for dtype in DTYPES]
    for run, dtype in zip(runs, DTYPES, strict=True):
        command("thinkdiff_lvlm.py", "train", "--mini", "--data", tmp_path / "float32", *BATCH,
                "--dtype", dtype, "--out", run)
    check_training(runs)
    check_pictures(*draw("thinkdiff_lvlm", tmp_path))


def test_clip(tmp_path):
    command("miniature", "draw", "--count", 24, "--out", tmp_path / "images")
    runs = [tmp_path / f"run-{dtype}" for dtype in DTYPES]
    for run, dtype in zip(runs, DTYPES, strict=True):
        command("thinkdiff_clip.py", "train", "--mini", "--data", tmp_path / "images", *BATCH,
                "--dtype", dtype, "--out", run)
    check_training(runs)
    check_pictures(*draw("thinkdiff_clip", tmp_path, "--image", EXAMPLE / "white_car.png",
                         "--text", "The car is blue."))


def test_cobsat(tmp_path):
    """All steps; without the VLM as judge, whose 500 reference pictures take a minute in bf16."""
    command("miniature", "cobsat", "--out", tmp_path / "images")
    command("cobsat_eval.py", "run", *"--mini --limit 1 --tasks 1 --shots 2 --steps 2".split(),
            "--images", tmp_path / "images", "--dtype", "bfloat16", "--judge", "clip", "--out",
            tmp_path / "out")
    features = list((tmp_path / "out/vlm_features").rglob("*.safetensors"))
    assert len(features) == 1
    assert all(tensor.isfinite().all() for tensor in load_file(features[0]).values())
    row, = csv.DictReader((tmp_path / "out/results.csv").open())
    assert row["picture"] == "ok" and row["clip_says"]
    # CLIP's logit scale is 100 at most
    assert 0 <= float(row["similarity"]) <= 100
