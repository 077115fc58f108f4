"""simulation.py: its counting of memory and FLOPs against numbers by hand and against real memory,
and the simulated table at shrunken full size."""
import argparse
import contextlib
import functools
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import simulation
from helpers import command

TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])
# a layer or two of narrow models
SHRUNK = {
    "T5_XXL": dict(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
                   num_heads=4),
    "EVA_CLIP_G": dict(**TOWER, image_size=56),
    "FLUX_DEV": dict(num_layers=1, num_single_layers=1, num_attention_heads=1,
                     joint_attention_dim=32, pooled_projection_dim=32),
    "FLUX_VAE": dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    "FLUX_CLIP": dict(**TOWER, vocab_size=1000),
    "QWEN2_VL_7B": dict(
        text_config=dict(
            vocab_size=152064, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, rope_parameters=ROPE),
        vision_config=dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2)),
    "COGVIDEOX": dict(num_attention_heads=1, num_layers=1, text_embed_dim=32),
    "COGVIDEOX_VAE": dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    "PIXART": dict(num_attention_heads=1, cross_attention_dim=72, num_layers=1,
                   caption_channels=32),
    "PIXART_VAE": dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    "SD3_MEDIUM": dict(num_layers=1, num_attention_heads=1, caption_projection_dim=64,
                       joint_attention_dim=32, dual_attention_layers=()),
    "SD3_CLIP_L": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                       num_attention_heads=1),
    "SD3_CLIP_G": dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                       num_attention_heads=1),
    "CHROMA": dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=32,
                   approximator_hidden_dim=16, approximator_layers=1),
    "LTX": dict(num_layers=1, num_attention_heads=1, cross_attention_dim=64, caption_channels=32),
    "LTX_VAE": dict(block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)),
    "LLAVA_13B": dict(
        text_config=dict(**TOWER, num_key_value_heads=2, model_type="llama", vocab_size=32064),
        vision_config=dict(**TOWER, image_size=56, patch_size=14, model_type="clip_vision_model")),
}


@pytest.fixture
def shrunk(monkeypatch):
    """Full size with tiny models."""
    for name, smaller in SHRUNK.items():
        monkeypatch.setattr(simulation, name, {**getattr(simulation, name), **smaller})


def settings(size="mini", dtype=torch.float32, **more):
    """What bench.py's functions read of its flags."""
    defaults = dict(
        size=size, device=torch.device("cpu"), dtype=dtype, fake=None, seed=0, tokens=16,
        picture=64, masking="random", features="generated", norm="t5", hidden=None,
        captions="raw", weight_decay=0.05, flux_steps=2)
    return argparse.Namespace(**{**defaults, **more})


def work(step):
    """The Meter of step()."""
    with simulation.Meter() as meter:
        step()
    return meter


# ---------------------------------------------------------------- FLOPs and time
def test_flops_by_hand():
    m, k, n = 6, 20, 10
    x, a = torch.randn(m, k, requires_grad=True), torch.randn(k, n)
    # forward and the gradient of x; a is frozen
    assert work(lambda: (x @ a).sum().backward()).flops == 2 * 2 * m * k * n
    q, key = torch.randn(2, 4, m, 8), torch.randn(2, 4, k, 8)
    attend = functools.partial(F.scaled_dot_product_attention, q, key, key)
    # the CPU's kernel, which torch's own counter does not know
    assert work(attend).flops == 2 * 2 * 2 * 4 * m * k * 8
    q.requires_grad_()
    forward, backward = 2, 5
    assert work(lambda: attend().sum().backward()).flops == (
        (forward + backward) * 2 * 2 * 4 * m * k * 8)


@pytest.mark.parametrize("job, batch", [(bench.lvlm_job, 3), (bench.clip_job, 2)])
def test_flops_of_a_training_step_are_those_of_torchs_counter(job, batch):
    step = job(batch, settings(), batch).step
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            step()
        assert work(step).flops == counter.get_total_flops()
    # the fused kernel computes the scores again
    assert 1 <= work(step).flops / counter.get_total_flops() < 1.1


def test_the_least_time_by_hand():
    a = torch.ones(64, 32, dtype=torch.bfloat16)
    tall, wide = torch.ones(4096, 4096, dtype=torch.bfloat16), torch.ones(4096, 4096)
    bf16, fp32, bandwidth = simulation.DEVICES["A100"]
    # bound by reading and writing, by bf16's rate, by fp32's; a view takes no time
    for step, seconds in ((lambda: a + a, 3 * 64 * 32 * 2 / bandwidth),
                          (lambda: tall @ tall, 2 * 4096**3 / bf16),
                          (lambda: wide @ wide, 2 * 4096**3 / fp32), (lambda: a.T[3:], 0)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert work(step).seconds["A100"] == pytest.approx(seconds)


# ---------------------------------------------------------------- memory
def test_live_storages():
    kept = []

    def step():
        a = torch.ones(100)
        # a view shares, a sum in place makes nothing
        view = a[10:].view(9, 10)
        view += 1
        kept.append(view)
        del a
        b = torch.ones(1000) * 2

        del b

    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode, simulation.Meter() as meter:
            step()
            assert meter.live == 400 and meter.peak == 400 + 8000
            meter.start()
            assert meter.peak == 400
            kept.clear()
            assert meter.live == 0 and not meter.sizes


def test_offloaded_parts_are_counted_while_they_are_used():
    with simulation.Meter() as meter:
        parts = torch.nn.ModuleList([torch.nn.Linear(10, 10, bias=False) for _ in range(3)])
        x = torch.ones(1, 10)
        meter.offload(parts)
        assert meter.live == 40
        parts[0](x)
        assert meter.live == 40 + 400
        meter.start()
        parts[2](parts[1](x))
        assert meter.live == 40 + 400 and meter.peak == 40 + 400 + 2 * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudas_norm_has_the_shapes_of_torchs(dtype):
    found = []
    norm = torch.nn.RMSNorm(8).to(dtype).requires_grad_(False)
    for forward in (simulation.cuda_norm, torch.nn.RMSNorm.forward):
        x, saved = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True), []
        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = forward(norm, x * 1)
        y.sum().backward()
        found.append((y.shape, y.dtype, x.grad.shape, x.grad.dtype))
        if forward is simulation.cuda_norm:
            # beside x * 1 and the weight, which are there anyway: a factor for each row
            assert [t.shape for t in saved] == [x.shape, (8,), (2, 3, 1)]
            assert saved[2].dtype == torch.float32
    assert found[0] == found[1]


def real_peak(step):
    """Bytes that step() takes beyond what is there before, by torch's profiler: the largest sum of
    the allocator's own reports."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("job, dtype", [(bench.lvlm_job, torch.float32),
                                        (bench.lvlm_job, torch.bfloat16),
                                        (bench.clip_job, torch.float32)])
def test_simulated_memory_is_real_memory(job, dtype, shrunk, monkeypatch):
    """A training step with a T5 of 10 M parameters, on this CPU."""
    monkeypatch.setattr(simulation, "T5_XXL", {
        **simulation.T5_XXL, "vocab_size": 4000, "d_model": 256, "d_kv": 32, "d_ff": 512,
        "num_heads": 8, "num_layers": 3, "num_decoder_layers": 5})
    monkeypatch.setattr(simulation, "cuda_norm", torch.nn.RMSNorm.forward)
    monkeypatch.setattr(simulation, "cuda_loss_options", torch.nn.LinearCrossEntropyOptions)
    args = settings("full", dtype, tokens=32)
    real = job(6, args, 6, longest=True)
    # afterwards AdamW's moments are there
    real.step()
    args.fake = FakeTensorMode(allow_non_fake_inputs=True)
    figures = simulation.simulate(lambda: job(6, args, 6, longest=True))
    simulated = (figures["peak_gb"] - figures["weights_gb"]) * 1e9
    assert simulated == pytest.approx(real_peak(real.step), rel=0.1)


def test_quantized_weights_are_counted_as_bytes(shrunk):
    pytest.importorskip("torchao")
    args = settings("full", torch.bfloat16)
    model = simulation.random_model(FluxTransformer2DModel, simulation.FLUX_DEV, args)
    weights = sum(p.numel() for p in model.parameters())
    assert simulation.weight_bytes(model) == 2 * weights
    simulation.quantize_weights(model)
    assert weights < simulation.weight_bytes(model) < 1.1 * weights


def test_the_simulated_table(tmp_path, shrunk):
    out, _ = command("bench.py", "--simulate", "--parts", "train-lvlm", "flux", "memory",
                     "--flux-sizes", 64, "--picture", 56, "--batch-size", 32, "--out",
                     tmp_path / "s")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    failed = {row["way"] for row in rows if "failed" in row}
    assert failed == {"64 px, batch 1: ours --cache 0.1", "64 px, batch 1: ours --compile",
                      "64 px, batch 1: ours --compile --cache 0.1"}
    rows = {row["way"]: row for row in rows if "failed" not in row}
    for way, row in rows.items():
        assert way in out and 0 <= row["weights_gb"] < row["peak_gb"] and row["fits_gb"] == 24
        assert row["tflop"] > 0 and row["H100"] < row["A100"] < row["RTX 4090"]
    peaks = [rows[f"ours, {n} longest samples"]["peak_gb"] for n in (4, 8, 24, 32)]
    assert peaks == sorted(peaks) and len({*peaks}) == 4
    plain, less = (rows[f"FLUX, 64 px{flag}"]["peak_gb"] for flag in ("", " --quantize --offload"))
    assert less < plain
