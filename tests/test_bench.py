"""bench.py: its arithmetic against torch's own counter, its baselines against ours, and its command
line, at the miniature and at shrunken full size."""
import argparse
import csv
import importlib.util
import json
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2VisionConfig, Blip2VisionModel

import bench
from aligner import Aligner
from common import MINI
from helpers import command
from models import encode_messages, load_vlm, teacher_forced_features
from thinkdiff_lvlm import caption_messages, generate_with_features

SMALLEST = ["--tokens", 4, "--feature-batches", 2, "--flux-batches", 1, 2, "--flux-steps", 2,
            "--rounds", 1, "--repeats", 1, "--batch-size", 6]
SMALL_T5 = dict(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
                num_heads=4)


def settings(size="mini", device="cpu", dtype=torch.float32, **more):
    """What bench.py's functions read of its flags."""
    defaults = dict(
        size=size, device=torch.device(device), dtype=dtype, seed=0, batch=8, tokens=16,
        picture=64, masking="random", features="generated", norm="t5", hidden=None,
        weight_decay=0.05, flux_steps=2)
    return argparse.Namespace(**{**defaults, **more})


def counted(step, without="nothing"):
    """FLOPs of step() by torch's counter, leaving out modules whose names end in `without`."""
    # the counter does not know sdpa's kernel for the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    left_out = sum(sum(flops.values()) for name, flops in counter.get_flop_counts().items()
                   if name.endswith(without))
    return counter.get_total_flops() - left_out


def parameters(module):
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- arithmetic
def check_t5(t5, memory, target):
    """A forward and backward of one unpadded sample."""
    shape = 1, memory, t5.config.d_model
    x = torch.zeros(shape, dtype=t5.dtype, device=t5.device, requires_grad=True)
    ids = torch.zeros(1, target, dtype=torch.long, device=t5.device)

    def step():
        t5(encoder_outputs=(x,), decoder_input_ids=ids).logits.float().sum().backward()

    assert counted(step) == bench.t5_training_flops(t5.config, memory, target)


@torch.no_grad()
def check_flux(transformer, image, text):
    """One pass of FLUX's transformer."""
    def new(*shape):
        return torch.zeros(shape, dtype=transformer.dtype, device=transformer.device)

    c = transformer.config
    flops = counted(lambda: transformer(
        hidden_states=new(1, image, c.in_channels), timestep=new(1), img_ids=new(image, 3),
        encoder_hidden_states=new(1, text, c.joint_attention_dim), txt_ids=new(text, 3),
        pooled_projections=new(1, c.pooled_projection_dim),
        guidance=new(1) if c.guidance_embeds else None))
    assert flops == bench.flux_flops(c, image, text)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_t5_are_those_that_torch_counts(attention):
    t5 = bench.t5_for(settings(), ours=False, encoder=True)
    t5.set_attn_implementation(attention)
    check_t5(t5, 5, 9)
    ids = torch.zeros(1, 7, dtype=torch.long)
    assert counted(lambda: t5.encoder(input_ids=ids)) == bench.t5_encoder_flops(t5.config, 7) > 0


def test_flops_of_the_aligner_are_those_that_torch_counts():
    aligner = Aligner(12, 20)
    flops = counted(lambda: aligner(torch.zeros(1, 3, 12)).sum().backward())
    assert flops == bench.aligner_training_flops(12, 20, 3)


@torch.no_grad()
def test_flops_of_the_towers_are_those_that_torch_counts():
    clip = bench.clip_for(settings())
    assert counted(lambda: clip(torch.zeros(1, 3, 64, 64))) == bench.tower_flops(clip.config)
    blip = Blip2VisionModel(Blip2VisionConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=56))
    assert counted(lambda: blip(torch.zeros(1, 3, 56, 56))) == bench.tower_flops(blip.config)


@torch.no_grad()
def test_flops_of_a_description_are_those_that_torch_counts():
    args = settings()
    model, inputs = bench.vlm_for(args), bench.vlm_inputs(args, 1)
    prompt = inputs["input_ids"].shape[1]
    prefill, decoding, forced = bench.describe_flops(bench.vlm_config(args), prompt, 5, 64)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    assert prefill + decoding == counted(
        lambda: generate_with_features(model, inputs, 5, do_sample=False), "rotary_emb")
    assert forced == counted(lambda: teacher_forced_features(model, inputs, tokens), "rotary_emb")


def test_flops_of_flux_are_those_that_torch_counts():
    check_flux(bench.flux_for(settings()).transformer, 16, 10)
    # with guidance
    check_flux(FluxTransformer2DModel(**{
        **bench.FLUX_DEV, **dict(num_layers=2, num_single_layers=3, num_attention_heads=2,
                                 joint_attention_dim=24, pooled_projection_dim=20)}), 16, 10)


def test_full_size_is_the_true_architectures():
    args = settings("full", "meta", torch.bfloat16)
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
    check_t5(t5, 32, 33)
    assert t5.decoder.config._attn_implementation == "sdpa" and t5.dtype == torch.bfloat16
    assert 96 * bench.t5_training_flops(t5.config, 32, 32) == pytest.approx(77e12, rel=0.02)
    check_flux(pipe.transformer, 1024, 128)


# ---------------------------------------------------------------- ours and the baseline
VARIANTS = [(bench.lvlm_job, bench.thinkdiff_lvlm), (bench.clip_job, bench.thinkdiff_clip)]


@pytest.mark.parametrize("job, script", VARIANTS)
def test_baseline_has_the_same_loss_and_gradient(job, script, monkeypatch):
    aligners, new = [], script.new_aligner
    monkeypatch.setattr(
        script, "new_aligner", lambda *args: aligners.append(new(*args)) or aligners[-1])
    jobs = [job(3, settings()), job(8, settings(), ours=False)]
    losses = [each.step(update=False).item() for each in jobs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # the baseline is what it is said to be
    for size, device in (("mini", "cpu"), ("full", "meta")):
        t5 = bench.t5_for(settings(size, device), ours=False, encoder=True)
        clip = bench.clip_for(settings(), ours=False)
        modules = (t5.encoder, t5.decoder, clip)
        assert {module.config._attn_implementation for module in modules} == {"eager"}
        assert len(t5.encoder.block) > 0 and t5.dtype == torch.float32
    for ours, theirs in zip(*(aligner.parameters() for aligner in aligners), strict=True):
        assert ours.grad.abs().max() > 0
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert jobs[0].tokens == jobs[1].tokens and jobs[0].flops == jobs[1].flops
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
    ours = job(3, settings())
    ours.step()
    assert ours.samples == 8 and ours.tokens == sum(seen)
    # no padding
    alone = job(1, settings(), ours=False)
    assert counted(alone.step) == alone.flops


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

    def large(micro_batch, args, size=None):
        tried.append(micro_batch)
        if (size or micro_batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return bench.Job(lambda: "done", 12, 24, 1e12, 1e9)

    def broken(micro_batch, args):
        raise ValueError("no such thing\nand more")

    rows = bench.measure("part", [
        bench.Way("large", large, {}, micro_batch=12), bench.Way("broken", broken, {}),
        bench.Way("full", large, {"size": 9}), bench.Way("last", large, {"size": 1}, "large"),
    ], args, report)
    assert rows["large"]["micro_batch"] == 3 and "6" in rows["large"]["note"]
    assert rows["large"]["steps"] == 6 and rows["broken"]["failed"] == "no such thing."
    assert rows["full"]["failed"] == "out of memory"
    last = rows["last"]
    assert last["speedup"] == rows["large"]["ms"] / last["ms"]
    assert [n for n in tried if n] == [12, 6, 3, 3]
    assert last["of_matmul"] == pytest.approx(1e3 / last["ms"])
    assert last["samples_s"] == pytest.approx(12e3 / last["ms"])
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [*rows.values()]


def test_figures_and_bars_by_hand():
    """The median of the steps; the smallest card of which the peak takes less than 95 %."""
    job, ceilings = bench.Job(None, 4, 24, 1e12, 1e9), {"matmul_tflop_s": 1000, "copy_gb_s": 1000}
    for peak, card in ((24.0, 24), (25.0, 48), (90.0, None)):
        row = {}
        bench.add_figures(row, job, [2.0, 9.0, 1.0], peak, ceilings)
        assert (row["ms"], row["ms_min"], row["ms_max"], row["fits_gb"]) == (2.0, 1.0, 9.0, card)
        assert (row["samples_s"], row["tokens_s"], row["of_matmul"]) == (2000, 12000, 0.5)
    report = {"bars": []}
    for value, sign in ((3, ">="), (1, ">="), (3, "<="), (1, "<="), (None, ">=")):
        bench.check_bar(report, "what", value, sign, 2)
    assert [bar["met"] for bar in report["bars"]] == [True, False, False, True, None]


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
    met = [bar["met"] for bar in bars if "bit for bit" in bar["bar"]]
    assert met == [True] * ("flux" in parts)


def test_command_line_at_shrunken_full_size(tmp_path, monkeypatch):
    """The code of --size full, in bf16, with a layer or two of narrow models, and compiled but for
    the last stage, the C++ compiler, which takes minutes."""
    graphs, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(
        function, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, **options))
    clip = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])
    for name, smaller in {
            "T5_XXL": SMALL_T5,
            "EVA_CLIP_G": dict(**clip, image_size=56),
            "FLUX_DEV": dict(num_layers=1, num_single_layers=1, num_attention_heads=1,
                             joint_attention_dim=32, pooled_projection_dim=32),
            "FLUX_VAE": dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
            "FLUX_CLIP": dict(**clip, vocab_size=1000),
            "QWEN2_VL_7B": dict(
                text_config=dict(
                    vocab_size=152064, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope),
                vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2)),
    }.items():
        monkeypatch.setattr(bench, name, {**getattr(bench, name), **smaller})
    command("bench.py", *SMALLEST, "--size", "full", "--dtype", "bfloat16", "--picture", 56,
            "--flux-sizes", 64, "--flux-batches", 2, "--out", tmp_path / "bench")
    _, rows = check_report(
        tmp_path, "full", ["train-lvlm", "train-clip", "features", "flux", "memory"])
    assert len(graphs) > 5
    assert rows["flux", "64 px, batch 2: ours"]["note"] == "the same picture, bit for bit"


def test_random_weights_are_the_same_in_ours_and_the_baseline(monkeypatch):
    monkeypatch.setattr(bench, "T5_XXL", {**bench.T5_XXL, **SMALL_T5})
    mini = bench.vlm_config(settings())
    monkeypatch.setattr(bench, "vlm_config", lambda args: mini)
    ours = bench.t5_for(settings("full", dtype=torch.bfloat16))
    baseline = bench.t5_for(settings("full"), ours=False, encoder=True)
    theirs = dict(baseline.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, theirs[name].bfloat16()) and weight.isfinite().all()
    losses = [bench.lvlm_job(micro_batch, settings("full"), ours=is_ours).step().item()
              for micro_batch, is_ours in ((4, True), (8, False))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
