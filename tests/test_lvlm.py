"""thinkdiff_lvlm.py: loss, frozen parts, resume and DDP through the command line; generation against the stock pipelines."""
import csv
import importlib
import io
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration, T5ForConditionalGeneration

import drawing
import thinkdiff_lvlm
from aligner import Aligner
from common import MINI, REPO
from helpers import command, complaint, write_tar
from prepare_data import load_vlm
from thinkdiff_lvlm import Shards, collate, decode_loss, load_t5_decoder, recompute, sample_order, split
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


class Args:
    masking, features, seed = "random", "generated", 0


# ---------------------------------------------------------------- data and loss
def test_split_is_a_uniform_prefix_and_the_rest():
    x, y = torch.arange(8)[:, None].float(), torch.arange(8)
    seen = []
    for position in range(2000):
        x1, y2 = split(x, y, Args, position)
        assert torch.equal(x1[:, 0].long(), y[:len(x1)]) and torch.equal(y2, y[len(x1):])
        seen.append(len(x1))
    counts = np.bincount(seen, minlength=9)
    assert counts[0] == counts[8] == 0 and counts[1:8].min() > 2000 / 7 * 0.75
    assert [len(split(x, y, Args, p)[0]) for p in range(50)] == seen[:50]

    class Whole(Args):
        masking = "none"
    assert split(x, y, Whole, 0) == (x, y)


def test_order_does_not_depend_on_where_it_starts():
    stream = [number for number, _ in zip(sample_order(7, 3, 0), range(30))]
    assert [number for number, _ in zip(sample_order(7, 3, 11), range(19))] == stream[11:]
    assert sorted(stream[:7]) == sorted(stream[7:14]) == list(range(7)) and stream[:7] != stream[7:14]


def test_loss_equals_stock_t5_and_only_the_aligner_learns(data):
    shards, positions = Shards(data / "data"), [0, 1, 2, 3, 4]
    vlm_tokenizer, t5_tokenizer = AutoTokenizer.from_pretrained(MINI["vlm"]), AutoTokenizer.from_pretrained(MINI["t5"])
    t5 = load_t5_decoder(MINI["t5"], "cpu", torch.float32)
    assert len(t5.encoder.block) == 0 and len(t5.decoder.block) > 0
    torch.manual_seed(0)
    aligner = Aligner(shards.meta["d_vlm"], t5.config.d_model)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    before = {k: v.clone() for k, v in t5.state_dict().items()}
    pairs = [split(*shards[i], Args, p) for i, p in zip(range(5), positions)]
    x, mask, labels = collate(pairs, vlm_tokenizer, t5_tokenizer, "cpu")
    memory = aligner(x)
    memory.retain_grad()
    total, count = decode_loss(t5, memory, mask, labels)
    (total / count).backward()

    stock = T5ForConditionalGeneration.from_pretrained(MINI["t5"], dtype=torch.float32).eval()  # whole, encoder and all
    stock.requires_grad_(False)
    losses, tokens = [], []
    for i, p in zip(range(5), positions):  # one at a time, from the shard file, without padding
        features, y = shards.tensor(i, "features"), shards.tensor(i, "tokens").long()
        s = random.Random(f"0 {p}").randint(1, len(y) - 1)
        target = t5_tokenizer(vlm_tokenizer.decode(y[s:], skip_special_tokens=True), truncation=True, max_length=128, return_tensors="pt").input_ids
        assert target[0, -1] == t5_tokenizer.eos_token_id
        alone = aligner(features[None, :s].float()).detach().requires_grad_()
        loss = stock(encoder_outputs=(alone,), labels=target).loss
        loss.backward()
        torch.testing.assert_close(memory.grad[i, :s], alone.grad[0] * target.shape[1] / count, rtol=1e-4, atol=1e-6)
        assert not memory.grad[i, s:].any()
        losses.append(loss.item())
        tokens.append(target.shape[1])
    assert count == sum(tokens)
    assert (total / count).item() == pytest.approx(np.average(losses, weights=tokens), abs=1e-5)

    assert all(p.grad is not None for p in aligner.parameters())
    assert all(p.grad is None and not p.requires_grad for p in t5.parameters())
    assert all(torch.equal(v, before[k]) for k, v in t5.state_dict().items())


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
def train(data, out, *more, name="data", torchrun=False):
    args = ["train", *SMALL, "--data", data / name, "--out", out, *more]
    if not torchrun:
        return command(SCRIPT, *args)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    subprocess.run([*start, *map(str, args)], cwd=REPO, check=True, capture_output=True)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    train(data, out, "--steps", 8, "--save-every", 4)
    return out


def test_training_writes_what_it_promises(trained):
    rows = list(csv.DictReader((trained / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9)) and rows[3]["held_out_loss"] and not rows[2]["held_out_loss"]
    assert (trained / "loss.png").stat().st_size > 1000 and (trained / "aligner" / "model.safetensors").exists()
    initial, final = float(rows[3]["held_out_loss"]), float(rows[7]["held_out_loss"])
    assert final < initial


def test_killed_and_resumed_is_bit_identical(data, trained, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, SCRIPT, "train", *SMALL, "--data", data / "data", "--out", out, "--steps", "8", "--save-every", "4",
                                "--sample-every", "1", "--sample-steps", "2"],  # pictures slow it down enough to be killed in time
                               cwd=REPO, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "checkpoint-0000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "checkpoint-0000008").exists(), "killed too late to prove anything"
    train(data, out, "--steps", 8, "--save-every", 4, "--resume")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (out / "checkpoint-0000008" / file).read_bytes() == (trained / "checkpoint-0000008" / file).read_bytes()
    losses = [[(r["step"], r["loss"], r["held_out_loss"]) for r in csv.DictReader((run / "log.csv").open())] for run in (out, trained)]
    assert losses[0] == losses[1]


def test_two_processes_equal_one(data, trained, tmp_path):
    train(data, tmp_path / "two", "--steps", 8, "--save-every", 4, torchrun=True)
    one, two = (load_file(run / "aligner" / "model.safetensors") for run in (trained, tmp_path / "two"))
    for name in one:  # sums in another order: 1e-5 after eight steps of size up to 2e-3
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def losses(run):
    return [float(row["loss"]) for row in csv.DictReader((run / "log.csv").open())]


def test_micro_batches_hold_like_lengths_and_change_roundings_only(data, trained, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(thinkdiff_lvlm, "collate", lambda pairs, *rest: steps.append([len(y) for _, y in pairs]) or collate(pairs, *rest))
    train(data, tmp_path / "x", "--steps", 3, "--micro-batch", 3, "--eval-every", 4)  # 3 + 3 + 2 a step, then the held-out samples
    assert list(map(len, steps[:9])) == [3, 3, 2] * 3
    for first in (0, 3, 6):
        lengths = sum(steps[first:first + 3], [])
        assert lengths == sorted(lengths) and len(set(lengths)) > 3
    assert losses(tmp_path / "x") == pytest.approx(losses(trained)[:3], abs=1e-5)


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


def test_ablations_run(data, tmp_path):
    for more, name in ((["--masking", "none"], "data"), (["--norm", "none"], "data"), (["--features", "input"], "input")):
        train(data, tmp_path / "-".join(more), "--steps", 2, *more, name=name, torchrun=False)
    command(SCRIPT, "generate", "--mini", "--aligner", tmp_path / "--features-input" / "aligner", "--features", "input", "--steps", 1,
            "--out", tmp_path / "input.png")


def test_pictures_drawn_during_training(data, tmp_path):
    train(data, tmp_path / "x", "--steps", 4, "--sample-every", 2, "--sample-steps", 1)
    first, second = (pixels(tmp_path / "x" / f"sample-000000{step}.png") for step in (2, 4))
    assert first.shape == second.shape == (64, 4 * 64, 3) and (first != second).any()


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
def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_generate_equals_stock_vlm_hand_made_aligner_and_stock_flux(trained, tmp_path):
    """The example context through transformers' own hidden states, Eq. 1, and FluxPipeline called directly."""
    example = REPO / "mini" / "example"
    out, _ = command(SCRIPT, "generate", "--mini", "--aligner", trained / "aligner", "--text", "Word 1: white, ", "--image", example / "white_car.png",
                     "--text", "\n\nWord 2: blue, ", "--image", example / "blue_car.png", "--text", "\n\nWord 3: red, ", "--out", tmp_path / "x.png",
                     "--steps", 4, "--seed", 7)
    model, processor = Qwen2VLForConditionalGeneration.from_pretrained(MINI["vlm"], dtype=torch.float32), AutoProcessor.from_pretrained(MINI["vlm"])
    pictures = [Image.open(example / f"{color}_car.png").convert("RGB") for color in ("white", "blue")]
    see = "<|vision_start|><|image_pad|><|vision_end|>"
    text = (f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{thinkdiff_lvlm.INSTRUCTION}Word 1: white, {see}\n\n"
            f"Word 2: blue, {see}\n\nWord 3: red, <|im_end|>\n<|im_start|>assistant\n")
    inputs = processor(text=[text], images=pictures, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=128, do_sample=False, output_hidden_states=True, return_dict_in_generate=True)
        x = torch.stack([step[-1][0, -1] for step in answer.hidden_states])  # (n, d_vlm): the last is the state that said EOS
        words = processor.tokenizer.decode(answer.sequences[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        prompt = Aligner.from_pretrained(trained / "aligner")(x[:-1])[None]
        pipe = FluxPipeline.from_pretrained(MINI["flux"])
        pipe.set_progress_bar_config(disable=True)
        empty, pooled, _ = pipe.encode_prompt("", None, max_sequence_length=prompt.shape[1])
        expected = pipe(prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=64, width=64, num_inference_steps=4, true_cfg_scale=3,
                        negative_prompt_embeds=empty, negative_pooled_prompt_embeds=pooled, generator=torch.Generator().manual_seed(7)).images[0]
    assert words in out
    assert abs(pixels(tmp_path / "x.png") - np.asarray(expected).astype(int)).max() <= 1

    command(SCRIPT, "generate", "--mini", "--relay", "--steps", 4, "--seed", 7, "--true-cfg", 1, "--out", tmp_path / "relay.png")  # the default context is the same
    with torch.no_grad():
        relay = pipe(prompt="", prompt_2=words, max_sequence_length=48, height=64, width=64, num_inference_steps=4,
                     generator=torch.Generator().manual_seed(7)).images[0]
    assert (pixels(tmp_path / "relay.png") == np.asarray(relay).astype(int)).all()  # bit for bit, without flags


def test_batch_draws_what_single_contexts_draw(trained, tmp_path):
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
    command(*common, "--text", "Draw a cat.", "--seed", 4, "--out", tmp_path / "single.png")
    assert abs(pixels(tmp_path / "2.png") - pixels(tmp_path / "single.png")).max() <= 1
    command(*common, "--text", "Draw a cat.", "--seed", 3, "--num-images", 2, "--out", tmp_path / "many.png")
    assert abs(pixels(tmp_path / "many-2.png") - pixels(tmp_path / "single.png")).max() <= 1
    assert abs(pixels(tmp_path / "many-1.png") - pixels(tmp_path / "single.png")).max() > 1


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
    if not torch.cuda.is_available():
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


# ---------------------------------------------------------------- README
def readme_commands():
    """[(script, arguments)] of all commands in the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), flags=re.S)
    parts = [shlex.split(part) for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [(words[i], words[i + 1:]) for words in parts for i, word in enumerate(words) if word.endswith(".py")]


@pytest.mark.parametrize("script, arguments", readme_commands(), ids=lambda value: value if isinstance(value, str) else value[0])
def test_readme_commands_exist(script, arguments, monkeypatch):
    """Every script, subcommand and flag of the README is accepted; the work itself is not done here."""
    module, called = importlib.import_module(script.removesuffix(".py")), []
    for name in ("train", "generate", "lvlm", "draw_data", "draw_cobsat", "draw_sheet", "check", "run_all", "judge", "table"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, called.append)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module.main()
    assert len(called) == 1
