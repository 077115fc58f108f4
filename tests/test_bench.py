"""bench.py: its baselines against ours, its figures, and its command line, at the miniature and at
shrunken full size. What it counts: test_simulation.py."""
import csv
import importlib.util
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import simulation
from common import MINI
from helpers import command, complaint
from models import encode_messages, load_vlm, teacher_forced_features
from test_simulation import SHRUNK, settings, shrunk  # noqa: F401
from thinkdiff_lvlm import caption_messages, generate_with_features

SMALLEST = ["--tokens", 4, "--feature-batches", 2, "--flux-batches", 1, 2, "--flux-steps", 2,
            "--rounds", 1, "--repeats", 1, "--batch-size", 6]


def parameters(module):
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- models
def test_full_size_is_the_true_architectures(monkeypatch):
    # fake weights cannot be moved
    monkeypatch.setattr(torch.nn.Module, "_apply", lambda module, *_, **__: module)
    args = settings("full", torch.bfloat16, fake=FakeTensorMode(allow_non_fake_inputs=True))
    t5 = bench.t5_for(args)
    embedding = t5.shared.weight
    assert parameters(t5.decoder) - embedding.numel() == pytest.approx(6.24e9, rel=1e-3)
    assert parameters(t5.lm_head) == pytest.approx(0.13e9, rel=2e-2)
    assert t5.lm_head.weight is not embedding and t5.decoder.embed_tokens.weight is embedding
    assert len(t5.encoder.block) == 0 and not t5.config.scale_decoder_outputs
    # with the embedding, 0.26 GB, which is only looked up
    assert bench.weight_bytes(t5) == pytest.approx(12.7e9, rel=0.03)
    # google/flan-t5-xxl, Qwen/Qwen2-VL-7B-Instruct
    assert parameters(bench.t5_for(args, ours=False, encoder=True)) == 11_135_332_352
    assert parameters(bench.vlm_for(args)) == 8_291_375_616
    pipe = bench.flux_for(args, t5_encoder=True)
    assert parameters(pipe.transformer) == 11_901_408_320
    assert parameters(pipe.vae) == 83_819_683 and parameters(pipe.text_encoder) == 123_060_480
    assert parameters(pipe.text_encoder_2) == pytest.approx(4.76e9, rel=1e-3)
    assert parameters(bench.clip_for(args)) == pytest.approx(0.986e9, rel=1e-3)
    assert t5.decoder.config._attn_implementation == "sdpa" and t5.dtype == torch.bfloat16
    # THUDM/CogVideoX-5b, llava-hf/llava-1.5-13b-hf
    assert parameters(bench.decoder_for("cogvideox", args).transformer) == pytest.approx(
        5.57e9, rel=2e-3)
    assert parameters(simulation.judge_for(args)) == pytest.approx(13.35e9, rel=1e-3)


# ---------------------------------------------------------------- ours and the baseline
VARIANTS = [(bench.lvlm_job, bench.thinkdiff_lvlm), (bench.clip_job, bench.thinkdiff_clip)]


@pytest.mark.parametrize("job, script", VARIANTS)
def test_baseline_has_the_same_loss_and_gradient(job, script, monkeypatch):
    aligners, new = [], script.new_aligner
    monkeypatch.setattr(
        script, "new_aligner", lambda *args: aligners.append(new(*args)) or aligners[-1])
    jobs = [job(3, settings(), 8), job(8, settings(), 8, ours=False)]
    losses = [each.step(update=False).item() for each in jobs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # the baseline is what it is said to be
    for size, fake in (("mini", None), ("full", FakeTensorMode())):
        t5 = bench.t5_for(settings(size, fake=fake), ours=False, encoder=True)
        clip = bench.clip_for(settings(), ours=False)
        modules = (t5.encoder, t5.decoder, clip)
        assert {module.config._attn_implementation for module in modules} == {"eager"}
        assert len(t5.encoder.block) > 0 and t5.dtype == torch.float32
    for ours, theirs in zip(*(aligner.parameters() for aligner in aligners), strict=True):
        assert ours.grad.abs().max() > 0
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert jobs[0].tokens == jobs[1].tokens
    jobs[0].step()
    # it trains
    assert jobs[0].step(update=False).item() < losses[0]


@pytest.mark.parametrize("job, script", VARIANTS)
def test_work_of_a_training_step_is_what_is_counted(job, script, monkeypatch):
    seen, loss = [], script.t5_nll

    def t5_nll(t5, memory, mask, labels):
        seen.append(mask.sum() + (labels != -100).sum())
        return loss(t5, memory, mask, labels)

    monkeypatch.setattr(script, "t5_nll", t5_nll)
    ours = job(3, settings(), 8)
    ours.step()
    assert ours.samples == 8 and ours.tokens == sum(seen)


def test_the_longest_samples_are_as_long_as_they_can_be():
    """One word is a token of the VLM and one of T5."""
    shapes = []
    for job, of_sample in ((bench.lvlm_job, 15 + 16), (bench.clip_job, 16 + 1 + 32 + 32)):
        shapes.append((job(2, settings(), 2, longest=True).tokens, 2 * of_sample))
    assert shapes[0][0] == shapes[0][1] and shapes[1][0] == shapes[1][1]


def test_random_vlm_inputs_are_laid_out_as_the_processors():
    args = settings()
    model, processor = load_vlm(MINI["vlm"], "cpu", torch.float32)
    true = encode_messages(processor, [caption_messages(Image.new("RGB", (64, 64)), 0)] * 2)
    ours = bench.vlm_inputs(args, 2)
    assert ours.keys() == true.keys()
    for name in ("pixel_values", "image_grid_thw"):
        assert ours[name].shape == true[name].shape and ours[name].dtype == true[name].dtype
    for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        token = getattr(model.config, name)
        assert (ours["input_ids"] == token).sum() == (true["input_ids"] == token).sum() > 0


def test_all_ways_to_features_give_the_same_features():
    args = settings()
    model, inputs = bench.vlm_for(args), bench.vlm_inputs(args, 2)
    tokens, features, _ = generate_with_features(model, inputs, 4, do_sample=False)
    stock_tokens, stock = bench.stock_features(model, inputs, 4, do_sample=False)
    assert torch.equal(tokens, stock_tokens) and torch.allclose(features, stock, atol=1e-4)
    assert torch.allclose(teacher_forced_features(model, inputs, tokens), stock, atol=1e-3)


# ---------------------------------------------------------------- measuring
def test_a_way_that_does_not_fit_is_tried_with_less_and_one_that_fails_stops_no_other(tmp_path):
    args = settings(out=tmp_path / "r", rounds=2, repeats=3, seconds=9)
    args.ceilings = {"matmul_tflop_s": 1, "copy_gb_s": 1}
    report = {"rows": [], "bars": []}
    tried = []

    a = torch.ones(100, 100)

    def step():
        return a @ a

    def large(micro_batch, args, size=None):
        tried.append(micro_batch)
        if (size or micro_batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return bench.Job(step, 12, 24, 1e9)

    def broken(micro_batch, args):
        raise ValueError("no such thing\nand more")

    bench.measure("part", [
        bench.Way("large", large, {}, micro_batch=12), bench.Way("broken", broken, {}),
        bench.Way("full", large, {"size": 9}), bench.Way("last", large, {"size": 1}, "large"),
    ], args, report)
    rows = {row["way"]: row for row in report["rows"]}
    assert rows["large"]["micro_batch"] == 3 and "6" in rows["large"]["note"]
    assert rows["large"]["steps"] == 6 and rows["broken"]["failed"] == "no such thing."
    assert rows["full"]["failed"] == "out of memory"
    last = rows["last"]
    assert last["speedup"] == rows["large"]["ms"] / last["ms"]
    assert [n for n in tried if n] == [12, 6, 3, 3]
    assert last["of_matmul"] == pytest.approx(2e6 / 1e9 / last["ms"])
    assert last["samples_s"] == pytest.approx(12e3 / last["ms"])
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [*rows.values()]


def test_figures_and_bars_by_hand():
    """The median of the steps; the smallest card of which the peak takes less than 95 %."""
    job = bench.Job(None, 4, 24, read=1e9, decoding=2e11, flops=1e12)
    ceilings = {"matmul_tflop_s": 1000, "copy_gb_s": 1000}
    for peak, card in ((24.0, 24), (25.0, 48), (90.0, None)):
        row = {}
        bench.add_figures(row, job, [2.0, 9.0, 1.0], peak, ceilings)
        assert (row["ms"], row["ms_min"], row["ms_max"], row["fits_gb"]) == (2.0, 1.0, 9.0, card)
        assert (row["samples_s"], row["tokens_s"], row["of_matmul"]) == (2000, 12000, 0.5)
        # 0.8 TFLOP at 1,000 TFLOP/s, then 1 GB at 1,000 GB/s
        assert row["of_floor"] == pytest.approx(2.0 / 1.8)
    for figures, met in (([2.9, None], False), ([2.9, 3.1], True), ([None], None)):
        report = {"bars": []}
        rows = [{"way": "ours", "speedup": figure} for figure in figures]
        bench.check_bars("train-lvlm", rows, settings(), report)
        assert [bar["met"] for bar in report["bars"]] == [met, None]


def test_difference_of_pictures():
    a, b = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    same = bench.difference([Image.fromarray(a)], [Image.fromarray(b)])
    assert same == "the same picture, bit for bit"
    b[0, 0, 0] = 255
    other = bench.difference([Image.fromarray(a)], [Image.fromarray(b)])
    assert other == "differs by 5.3 of 255 on average, PSNR 16.8 dB"


def check_report(out, size, parts):
    """Checks the two files of a report; returns its bars and {(part, way): row} of its rows, of
    which only those of --quantize may have failed, and only where torchao is not installed."""
    report = json.loads((out / "bench.json").read_text())
    with open(out / "bench.csv") as file:
        ways = [row["way"] for row in csv.DictReader(file)]
    assert ways == [row["way"] for row in report["rows"]]
    assert report["about"]["size"] == size and min(report["ceilings"].values()) > 0
    assert report["ceilings"].keys() == {"matmul_tflop_s", "copy_gb_s"}
    assert {row["part"] for row in report["rows"]} == set(parts)
    rows = {(row["part"], row["way"]): row for row in report["rows"]}
    failed = {way: row["failed"] for way, row in rows.items() if "failed" in row}
    if not importlib.util.find_spec("torchao"):
        quantized = {way for way in rows if "--quantize" in way[1]}
        assert failed.keys() == quantized and all("torchao" in why for why in failed.values())
        warnings.warn("the rows of --quantize were not measured: pip install torchao==0.18.0",
                      stacklevel=2)
    else:
        assert not failed
    return report["bars"], {way: row for way, row in rows.items() if way not in failed}


@pytest.mark.parametrize("parts", ["train-lvlm train-clip memory", "features flux"])
def test_command_line_at_the_miniature(tmp_path, parts):
    out, _ = command("bench.py", *SMALLEST, "--no-compile", "--size", "mini", "--flux-sizes", 64,
                     "--out", tmp_path / "bench", "--parts", *parts.split())
    bars, rows = check_report(tmp_path, "mini", parts.split())
    for (_, way), row in rows.items():
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and way in out
        assert row["samples_s"] > 0 and row["tokens_s"] > 0
    lines = [line for line in out.splitlines() if "bar:" in line]
    assert lines and all(re.search("PASS|miss|[?]", line) for line in lines)
    same = [row["note"] for (_, way), row in rows.items() if way.endswith(": ours") and "px" in way]
    assert same == ["the same picture, bit for bit"] * 2 * ("flux" in parts)
    assert len(bars) == len(lines)


def test_full_size_without_a_gpu_is_refused():
    assert "--simulate" in complaint("bench.py", "--size", "full")


def test_command_line_at_shrunken_full_size(tmp_path, monkeypatch, shrunk):  # noqa: F811
    """The code of --size full, in bf16, with a layer or two of narrow models, and compiled but for
    the last stage, the C++ compiler, which takes minutes."""
    graphs, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(
        function, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, **options))
    monkeypatch.setattr(bench, "require_gpu", lambda device: None)
    command("bench.py", *SMALLEST, "--size", "full", "--dtype", "bfloat16", "--picture", 56,
            "--flux-sizes", 64, "--flux-batches", 2, "--out", tmp_path / "bench")
    _, rows = check_report(
        tmp_path, "full", ["train-lvlm", "train-clip", "features", "flux", "memory"])
    assert len(graphs) > 5
    assert rows["flux", "64 px, batch 2: ours"]["note"] == "the same picture, bit for bit"


def test_random_weights_are_the_same_in_ours_and_the_baseline(monkeypatch):
    monkeypatch.setattr(simulation, "T5_XXL", {**simulation.T5_XXL, **SHRUNK["T5_XXL"]})
    mini = bench.vlm_config(settings())
    monkeypatch.setattr(bench, "vlm_config", lambda args: mini)
    ours = bench.t5_for(settings("full", dtype=torch.bfloat16))
    baseline = bench.t5_for(settings("full"), ours=False, encoder=True)
    theirs = dict(baseline.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, theirs[name].bfloat16()) and weight.isfinite().all()
    losses = [bench.lvlm_job(micro_batch, settings("full"), 8, ours=is_ours).step().item()
              for micro_batch, is_ours in ((4, True), (8, False))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
