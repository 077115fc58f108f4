"""thinkdiff_lvlm.py: T5 loss, skipped samples, complaints; generation against the stock pipelines.

What `train` computes: test_training.py."""
import csv
import io
import json
import os
import random
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from PIL import Image
from transformers import AutoConfig, T5ForConditionalGeneration

import drawing
import thinkdiff_lvlm
from aligner import Aligner
from common import MINI, REPO
from helpers import command, complaint, write_tar
from prepare_data import load_vlm
from references import pixels
from thinkdiff_lvlm import Shards, decode_loss, load_t5_decoder, recompute
from world import PAIRS, draw

SCRIPT = str(REPO / "thinkdiff_lvlm.py")
SMALL = "--mini --batch-size 8 --micro-batch 4 --log-every 1 --eval-every 4 --held-out 4 --warmup 2 --lr-horizon 20".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """40 drawn pictures, described by the mini VLM through the command line."""
    root = tmp_path_factory.mktemp("lvlm")
    members = {}
    for i in range(40):
        file, rng = io.BytesIO(), random.Random(f"test {i}")
        draw(rng, *rng.choice(PAIRS)).save(file, "PNG")
        members[f"{i:03}.png"] = file.getvalue()
    write_tar(root / "a.tar", members)
    for name, more in (("data", []), ("tokens", ["--tokens-only"]), ("input", ["--features", "input"])):
        command(REPO / "prepare_data.py", "lvlm", "--mini", "--images", root / "a.tar", "--out", root / name, "--tokens", 24, *more)
    return root


# ---------------------------------------------------------------- data and loss
def test_t5_is_frozen_and_lacks_its_encoder():
    t5 = load_t5_decoder(MINI["t5"], "cpu", torch.float32)
    assert not any(parameter.requires_grad for parameter in t5.parameters())
    assert len(t5.encoder.block) == 0 and len(t5.decoder.block) > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_either_kind_of_t5(tied, dtype):
    """The first T5 shares embedding and lm_head and scales the decoder's output; v1.1 and Flan do neither."""
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(AutoConfig.from_pretrained(MINI["t5"], scale_decoder_outputs=tied)).eval().requires_grad_(False).to(dtype)
    if not tied:
        t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.lm_head.weight), requires_grad=False)
    labels = torch.randint(2, 400, (6, 50))
    labels[0, 3:] = labels[1, 40:] = -100
    ours, theirs = (torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_() for _ in range(2))
    mask = torch.ones(6, 20).long()
    total, count = decode_loss(t5, ours, mask, labels)
    logits = t5(encoder_outputs=(theirs,), attention_mask=mask, labels=labels).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum")
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 2e-4)
    total.backward(), expected.backward()
    scale = theirs.grad.abs().max()
    torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


# ---------------------------------------------------------------- training through the command line
def train(data, out, *more, name="data"):
    return command(SCRIPT, "train", *SMALL, "--data", data / name, "--out", out, *more)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    train(data, out, "--steps", 8, "--save-every", 4)
    return out


def losses(run):
    return [float(row["loss"]) for row in csv.DictReader((run / "log.csv").open())]


@pytest.fixture
def count_graphs(monkeypatch):
    """A list of the graphs that torch.compile makes. All of it is real but its last stage, the C++ compiler, which takes minutes."""
    graphs, compiler = [], torch.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    yield graphs
    torch.compiler.reset()


def test_compiled_training_is_the_same_but_for_roundings(data, trained, tmp_path, count_graphs):
    train(data, tmp_path / "x", "--steps", 4, "--compile")
    assert 1 <= len(count_graphs) <= 4  # with gradient and without; not one for every length
    assert losses(tmp_path / "x") == pytest.approx(losses(trained)[:4], abs=1e-5)


def test_tokens_only_trains_the_same_aligner(data, trained, tmp_path):
    """Features recomputed from picture and tokens are the stored ones but for a bf16 rounding, whatever is computed with them."""
    stored, tokens = Shards(data / "data"), Shards(data / "tokens")
    vlm = load_vlm(MINI["vlm"], "cpu", torch.float32)
    again = list(recompute(vlm, [(*tokens[i], 10 + i) for i in range(5)], SimpleNamespace(features="generated", micro_batch=2)))
    for i, (x, y, position) in enumerate(again):
        torch.testing.assert_close(x.float(), stored[i][0].float(), rtol=0.02, atol=0.02)
        assert torch.equal(y, stored[i][1]) and position == 10 + i
    train(data, tmp_path / "tokens", "--steps", 8, "--save-every", 4, name="tokens")
    assert losses(tmp_path / "tokens") == pytest.approx(losses(trained), rel=5e-3)


def test_pictures_that_have_gone_are_skipped_named_and_counted(tmp_path):
    for i in range(14):
        draw(random.Random(f"gone {i}"), *PAIRS[i]).save(tmp_path / f"{i:02}.png")
    command(REPO / "prepare_data.py", "lvlm", "--mini", "--images", tmp_path, "--out", tmp_path / "tokens", "--tokens", 8, "--tokens-only")
    (tmp_path / "01.png").unlink()
    (tmp_path / "02.png").write_bytes(b"broken")
    err = train(tmp_path, tmp_path / "x", "--steps", 3, "--micro-batch", 1, name="tokens")[1]  # alone in a micro-batch
    assert "skipped (2 so far)" in err and f"{tmp_path}/01.png" in err and f"{tmp_path}/02.png" in err and (tmp_path / "x" / "aligner").exists()
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert "none of the 8 samples of a step can be read" in complaint(SCRIPT, "train", *SMALL, "--data", tmp_path / "tokens", "--out", tmp_path / "y")


def test_training_complaints(data, trained, tmp_path):
    t = (SCRIPT, "train", *SMALL, "--out", tmp_path / "x", "--steps", 2)
    assert "no training data in" in complaint(*t, "--data", tmp_path / "nothing")
    assert "already holds a training run" in complaint(*t[:-4], "--out", trained, "--data", data / "data")
    assert "nothing to resume" in complaint(*t, "--data", data / "data", "--resume")
    assert "with other settings" in complaint(*t[:-4], "--out", trained, "--data", data / "data", "--resume", "--seed", 5)
    assert "pass --features input" in complaint(*t, "--data", data / "input")
    assert "no/such-t5" in complaint(*t, "--data", data / "data", "--t5", "no/such-t5")
    Aligner(2, 2).save_pretrained(tmp_path / "mine" / "aligner")
    assert "already holds" in complaint(*t[:-4], "--out", tmp_path / "mine", "--data", data / "data")
    (tmp_path / "file").write_text("kept")
    complaint(*t[:-4], "--out", tmp_path / "file" / "x", "--data", data / "data")
    assert (tmp_path / "file").read_text() == "kept"
    command(*t, "--batch-size", "many", code=2)
    one_token = tmp_path / "one-token"
    command(REPO / "prepare_data.py", "lvlm", "--mini", "--images", data / "a.tar", "--out", one_token, "--tokens", 1, "--count", 12)
    assert "at least 2" in complaint(*t, "--data", one_token)


# ---------------------------------------------------------------- generation
def test_lines_that_cannot_be_drawn_are_skipped_and_named(trained, tmp_path):
    Image.open(REPO / "mini/example/white_car.png").save(tmp_path / "a.png")
    long = [{"text": "Word 1: white, "}, {"image": "a.png"}, {"text": "\n\nWord 2: red, "}]
    lines = [{"context": long, "out": str(tmp_path / "1.png")}, {"context": [{"text": "Draw a cat."}], "out": str(tmp_path / "2.png"), "seed": 4},
             {"context": [{"image": "gone.png"}], "out": str(tmp_path / "3.png")}, {"no": "context"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    common = (SCRIPT, "generate", "--mini", "--aligner", trained / "aligner", "--steps", 2, "--max-new-tokens", 12)
    out, err = command(*common, "--batch", tmp_path / "c.jsonl")
    assert "drew 2 pictures, skipped 3 lines" in out and all(f"line {n}" in err for n in (3, 4, 5)) and not (tmp_path / "3.png").exists()
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"context": long, "out": str(tmp_path / name)}) for name in ("1.png", "4.png", "4.png")))
    kept = (tmp_path / "1.png").read_bytes()
    out, err = command(*common, "--batch", tmp_path / "d.jsonl")  # a picture that is there, and one that two lines want
    assert "drew 1 pictures, skipped 2 lines" in out and "line 1" in err and "line 3" in err and (tmp_path / "1.png").read_bytes() == kept
    assert "no context that can be drawn" in complaint(*common, "--batch", tmp_path / "d.jsonl")


def example(folder, *flags):
    """The shipped example's picture."""
    command(SCRIPT, "generate", "--mini", "--steps", 12, "--overwrite", "--out", folder / "x.png", *flags)
    return pixels(folder / "x.png")


def test_cache_skips_blocks(tmp_path, monkeypatch):
    work, forward = [], FluxSingleTransformerBlock.forward
    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", lambda *args, **kwargs: work.append(1) or forward(*args, **kwargs))
    plain = example(tmp_path)
    every = len(work)
    assert every == 4 * 2 * 12  # four such blocks; guidance takes two passes a step
    assert (example(tmp_path, "--cache", 1e-6) == plain).all() and len(work) == 2 * every
    careless = example(tmp_path, "--cache", 1e6)
    assert len(work) == 2 * every + 4 * 2 and abs(careless - plain).mean() > 1  # the first step alone
    work.clear()
    halfway = example(tmp_path, "--cache", 0.25)
    assert 8 < len(work) < every and 0 < abs(halfway - plain).mean() < abs(careless - plain).mean()


def test_quantized_models_draw_nearly_the_same_picture(tmp_path, monkeypatch):
    torchao = pytest.importorskip("torchao.utils", reason="--quantize needs pip install torchao")
    plain, other, loaded, speed_up = example(tmp_path), example(tmp_path, "--seed", 1), [], drawing.speed_up
    monkeypatch.setattr(thinkdiff_lvlm, "load_vlm", lambda *args, **options: loaded.append(load_vlm(*args, **options)) or loaded[0])
    monkeypatch.setattr(drawing, "speed_up", lambda pipe, *rest: loaded.append(pipe) or speed_up(pipe, *rest))
    quantized, ((vlm, _), pipe) = example(tmp_path, "--quantize"), loaded
    for layer in (pipe.transformer.single_transformer_blocks[0].proj_mlp, vlm.model.language_model.layers[0].mlp.up_proj):
        assert isinstance(layer.weight, torchao.TorchAOBaseTensor) and layer.weight.qdata.dtype == torch.int8
    assert 0 < abs(quantized - plain).mean() < abs(other - plain).mean() / 4


def test_compiled_pictures_are_the_same_but_for_roundings(tmp_path, count_graphs):
    for flags in ([], ["--cache", 0.25]):  # with the cache, too, blocks of one class share what is compiled
        plain = example(tmp_path, *flags)
        count_graphs.clear()
        compiled = example(tmp_path, "--compile", *flags)
        assert 2 <= len(count_graphs) <= 4 and abs(compiled - plain).max() <= 1
        torch.compiler.reset()


def test_drawing_flags_that_cannot_work(monkeypatch, tmp_path):
    g = (SCRIPT, "generate", "--mini", "--steps", 2, "--out", tmp_path / "x.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU here" in complaint(*g, "--offload")
    for wrong in ("0", "-1", "nan", "much"):
        command(*g, "--cache", wrong, code=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torchao==" in complaint(*g, "--quantize")
    assert not (tmp_path / "x.png").exists()


def test_generation_complaints(trained, tmp_path):
    g = (SCRIPT, "generate", "--mini", "--steps", 2)
    (tmp_path / "kept.png").write_text("mine")
    (tmp_path / "zero.png").write_bytes(b"")
    assert "exists" in complaint(*g, "--out", tmp_path / "kept.png") and (tmp_path / "kept.png").read_text() == "mine"
    assert "cannot write" in complaint(*g, "--out", tmp_path / "kept.png" / "x.png")
    assert "zero.png" in complaint(*g, "--image", tmp_path / "zero.png", "--out", tmp_path / "x.png")
    assert "gone.png" in complaint(*g, "--image", tmp_path / "gone.png", "--out", tmp_path / "x.png")
    Aligner(48, 32).save_pretrained(tmp_path / "narrow")
    assert "a VLM of width 48" in complaint(*g, "--aligner", tmp_path / "narrow", "--out", tmp_path / "x.png")
    assert "no context" in complaint(SCRIPT, "generate")
    assert "no/such-model" in complaint(*g, "--vlm", "no/such-model", "--out", tmp_path / "x.png")
    assert ".png" in complaint(*g, "--out", tmp_path / "x.gif")
    command(*g, "--size", "large", code=2)
    shell = subprocess.run([sys.executable, SCRIPT, "generate", "--mini", "--image", "gone.png"], cwd=REPO, capture_output=True, text=True)
    assert shell.returncode == 1 and "Traceback" not in shell.stderr and shell.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "x.png").exists()


def test_a_port_in_use_is_one_line(data, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run([sys.executable, SCRIPT, "train", *SMALL, "--data", data / "data", "--out", tmp_path / "x"], cwd=REPO, env=env,
                              capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "port is in use" in done.stderr
