"""thinkdiff_clip.py: loss, frozen parts, resume and DDP through the command line; generation against the stock models and pipelines."""
import csv
import inspect
import io
import json
import random
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel, FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor, CLIPImageProcessor, CLIPModel,
                          T5EncoderModel, T5ForConditionalGeneration)

import thinkdiff_clip
import thinkdiff_lvlm
from aligner import Aligner
from common import MINI, REPO
from helpers import command, complaint, write_tar
from thinkdiff_clip import Pairs, collate, decode_loss, encode, image_tokens, load_clip, load_t5, pool, preprocess, split
from world import PAIRS, caption, draw

SCRIPT = str(REPO / "thinkdiff_clip.py")
CLIP = REPO / "mini/clip"
SMALL = "--mini --batch-size 8 --micro-batch 4 --log-every 1 --eval-every 4 --held-out 4 --warmup 2 --lr-horizon 20".split()
ARGS = SimpleNamespace(masking="random", seed=0)
command, complaint = partial(command, SCRIPT), partial(complaint, SCRIPT)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def drawn():
    """40 (picture, caption) of the drawn world."""
    pairs = []
    for i in range(40):
        rng = random.Random(f"test {i}")
        pair = rng.choice(PAIRS)
        pairs.append((draw(rng, *pair), caption(rng, *pair)))
    return pairs


@pytest.fixture(scope="session")
def data(drawn, tmp_path_factory):
    """The pairs in one tar of 30 and a folder of 10; the folder comes later in the index."""
    root = tmp_path_factory.mktemp("clip") / "data"
    (root / "folder").mkdir(parents=True)
    write_tar(root / "a.tar", {name: content for i, (image, text) in enumerate(drawn[:30])
                               for name, content in ((f"{i:03}.png", png(image)), (f"{i:03}.txt", text.encode()))})
    for i, (image, text) in enumerate(drawn[30:]):
        image.save(root / "folder" / f"{i}.png")
        (root / "folder" / f"{i}.txt").write_text(text)
    return root


# ---------------------------------------------------------------- the method's steps
def test_split_is_at_a_uniform_inner_word_boundary():
    words = "a b c d e f g".split()
    seen = []
    for position in range(1200):
        t1, t2 = split("a b  c d\ne f g ", ARGS, position)
        assert t1.split() + t2.split() == words and t1 and t2
        seen.append(len(t1.split()))
    counts = np.bincount(seen, minlength=8)
    assert counts[0] == counts[7] == 0 and counts[1:7].min() > 1200 / 6 * 0.75
    assert [len(split("a b c d e f g", ARGS, p)[0].split()) for p in range(50)] == seen[:50]
    assert split("word", ARGS, 0) == ("", "word")
    assert split("two words", SimpleNamespace(masking="none", seed=0), 0) == ("", "two words")


def pooled_by_hand(x):
    """CLS, and the means of the 2 x 2 neighbours in the grid, row by row; x (1 + g*g, d)."""
    g = round((len(x) - 1) ** 0.5)
    grid = np.asarray(x[1:]).reshape(g, g, -1)
    means = [grid[i:i + 2, j:j + 2].mean((0, 1)) for i in range(0, g, 2) for j in range(0, g, 2)]
    return torch.tensor(np.stack([np.asarray(x[0]), *means]))


@pytest.mark.parametrize("tokens, pooled", [(257, 65), (65, 17)])
def test_pooling_is_the_mean_of_2x2_tokens_and_leaves_cls(tokens, pooled):
    x = torch.randn(2, tokens, 5)
    found = pool(x)
    assert found.shape == (2, pooled, 5) and torch.equal(found[:, 0], x[:, 0])
    for row, expected in zip(found, x):
        torch.testing.assert_close(row, pooled_by_hand(expected), rtol=0, atol=1e-6)


def test_pictures_are_prepared_as_by_the_models_own_processors(drawn):
    stock = CLIPImageProcessor.from_pretrained(CLIP)(drawn[0][0], return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess(drawn[0][0], 64), stock, rtol=0, atol=1e-5)
    wide = drawn[1][0].resize((300, 200))
    stock = BlipImageProcessor(size={"height": 224, "width": 224}, image_mean=list(thinkdiff_clip.MEAN), image_std=list(thinkdiff_clip.STD))(
        wide, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess(wide, 224), stock, rtol=0, atol=2 / 255 / 0.26)  # PIL's bicubic against torch's: a grey level or two


def test_loss_equals_stock_t5_and_only_the_aligner_learns(data, drawn, tmp_path):
    pairs = Pairs([str(data)], tmp_path / "pairs.jsonl", 64)
    assert len(pairs) == 40 and [pairs[i][1] for i in range(40)] == [text for _, text in drawn]
    clip, t5 = load_clip(str(CLIP), "cpu", torch.float32), load_t5(MINI["t5"], "cpu", torch.float32)
    t5_tokenizer = AutoTokenizer.from_pretrained(MINI["t5"])
    torch.manual_seed(0)
    aligner = Aligner(clip.config.hidden_size, t5.config.d_model)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    before = {k: v.clone() for model in (clip, t5) for k, v in model.state_dict().items()}
    numbers = [0, 1, 2, 3, 35]
    samples = [(pairs[i][0], *split(pairs[i][1], ARGS, i)) for i in numbers] + [(pairs[4][0], "", "dog")]
    pixels, ids, first_mask, labels = collate(samples, t5_tokenizer, "cpu")
    x, t = image_tokens(clip, pixels), encode(t5, ids, first_mask)
    mask = torch.cat([torch.ones(x.shape[:2]), first_mask], dim=1)
    memory = torch.cat([aligner(x), t], dim=1)
    memory.retain_grad()
    total, count = decode_loss(t5, memory, mask, labels)
    (total / count).backward()
    assert x.shape == (6, 17, clip.config.hidden_size) and (first_mask == 0).any()

    stock, whole = T5ForConditionalGeneration.from_pretrained(MINI["t5"], dtype=torch.float32).eval(), CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    processor, losses, tokens = CLIPImageProcessor.from_pretrained(CLIP), [], []
    for i in [*numbers, 4]:  # one at a time, from the picture itself, without padding
        words = drawn[i][1].split()
        s = random.Random(f"0 {i}").randint(1, len(words) - 1)
        t1, t2 = (" ".join(words[:s]), " ".join(words[s:])) if i != 4 else ("", "dog")
        first, target = (t5_tokenizer(text, truncation=True, max_length=32, return_tensors="pt").input_ids for text in (t1, t2))
        assert first[0, -1] == target[0, -1] == t5_tokenizer.eos_token_id
        with torch.no_grad():
            tower = whole.vision_model
            seen = tower.post_layernorm(tower(**processor(drawn[i][0], return_tensors="pt")).last_hidden_state)[0]
            alone = torch.cat([aligner(pooled_by_hand(seen)[None]), stock.get_encoder()(first).last_hidden_state], dim=1)
        loss = stock(encoder_outputs=(alone.requires_grad_(),), labels=target).loss
        loss.backward()
        torch.testing.assert_close(memory.grad[len(tokens), :alone.shape[1]], alone.grad[0] * target.shape[1] / count, rtol=1e-4, atol=1e-6)
        losses.append(loss.item())
        tokens.append(target.shape[1])
    assert count == sum(tokens)
    assert (total / count).item() == pytest.approx(np.average(losses, weights=tokens), abs=1e-5)

    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aligner.parameters())
    assert all(p.grad is None and not p.requires_grad for model in (clip, t5) for p in model.parameters())
    assert all(torch.equal(v, before[k]) for model in (clip, t5) for k, v in model.state_dict().items())


def test_what_both_scripts_have_word_for_word_stays_so():
    for name in ("sample_order", "decode_loss", "learning_rate", "save_checkpoint", "load_checkpoint", "load_flux", "text_embeds", "draw"):
        assert inspect.getsource(getattr(thinkdiff_clip, name)) == inspect.getsource(getattr(thinkdiff_lvlm, name)), name
    assert thinkdiff_clip.BETAS == thinkdiff_lvlm.BETAS and thinkdiff_clip.WARMUP_FROM == thinkdiff_lvlm.WARMUP_FROM


# ---------------------------------------------------------------- BLIP-2's tower
@pytest.fixture(scope="session")
def blip2(tmp_path_factory):
    """A tiny BLIP-2 of true key names in many shards, of which those without the tower are gone, and what its tower makes of `pixels`."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    config = Blip2Config(vision_config={**small, "image_size": 56, "patch_size": 14, "initializer_range": 0.2}, text_config=text, num_query_tokens=2,
                         qformer_config={**small, "encoder_hidden_size": 32, "vocab_size": 64})
    torch.manual_seed(0)
    whole = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(whole.vision_model.post_layernorm.weight)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        seen = whole.vision_model(pixels).last_hidden_state
    folder = tmp_path_factory.mktemp("blip2") / "blip2"
    whole.save_pretrained(folder, max_shard_size="30KB")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"vision_model.embeddings.class_embedding", "vision_model.encoder.layers.1.self_attn.qkv.bias", "vision_model.post_layernorm.weight"} < set(names)
    needed = {file for name, file in names.items() if name.startswith("vision_model.")}
    assert len(needed) < len(set(names.values()))
    for file in set(names.values()) - needed:
        (folder / file).unlink()
    return folder, pixels, seen


def test_blip2_tower_comes_from_its_shards_alone(blip2, data, tmp_path):
    folder, pixels, seen = blip2
    clip = load_clip(str(folder), "cpu", torch.float32)
    assert not any(p.requires_grad for p in clip.parameters())
    for row, expected in zip(image_tokens(clip, pixels), seen):  # post-norm once: last_hidden_state as the whole model has it
        torch.testing.assert_close(row, pooled_by_hand(expected), rtol=0, atol=1e-5)
    t = ("train", *SMALL, "--data", data, "--steps", 1, "--vlm", folder, "--out")
    command(*t, tmp_path / "x")
    command("generate", "--mini", "--vlm", folder, "--aligner", tmp_path / "x" / "aligner", "--image", data / "folder" / "0.png", "--steps", 1,
            "--out", tmp_path / "x.png")

    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    kept, weights = shard.read_bytes(), load_file(shard)
    del weights[name]
    save_file(weights, shard, metadata={"format": "pt"})
    assert "lacks weights of its vision tower: encoder.layers.1.mlp.fc1.weight" in complaint(*t, tmp_path / "y")
    shard.unlink()
    assert "cannot load" in complaint(*t, tmp_path / "y")
    shard.write_bytes(kept)
    assert "not a BLIP-2 or a CLIP" in complaint(*t[:-3], "--vlm", MINI["t5"], "--out", tmp_path / "y")


# ---------------------------------------------------------------- training through the command line
def train(data, out, *more, torchrun=False):
    args = ["train", *SMALL, "--data", data, "--out", out, *more]
    if not torchrun:
        return command(*args)
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
    assert float(rows[7]["held_out_loss"]) < float(rows[3]["held_out_loss"])


def test_killed_and_resumed_is_bit_identical(data, trained, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, SCRIPT, "train", *SMALL, "--data", data, "--out", out, "--steps", "8", "--save-every", "4",
                                "--sample-every", "1", "--sample-steps", "2"],  # pictures slow it down enough to be killed in time
                               cwd=REPO, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "checkpoint-0000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "checkpoint-0000008").exists(), "killed too late to prove anything"
    drawn = [np.asarray(Image.open(out / f"sample-000000{step}.png")) for step in (1, 4)]
    assert drawn[0].shape == (64, 4 * 64, 3) and (drawn[0] != drawn[1]).any()
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
    monkeypatch.setattr(thinkdiff_clip, "collate", lambda triples, *rest: steps.append([len(rest) for *_, rest in triples]) or collate(triples, *rest))
    train(data, tmp_path / "x", "--steps", 3, "--micro-batch", 3, "--eval-every", 4)  # 3 + 3 + 2 a step, then the held-out samples
    assert list(map(len, steps[:9])) == [3, 3, 2] * 3
    for first in (0, 3, 6):
        lengths = sum(steps[first:first + 3], [])
        assert lengths == sorted(lengths) and len(set(lengths)) > 3
    assert losses(tmp_path / "x") == pytest.approx(losses(trained)[:3], abs=1e-5)


def test_compiled_training_is_the_same_but_for_roundings(data, trained, tmp_path, monkeypatch):
    """All of torch.compile but its last stage, the C++ compiler, which takes minutes."""
    graphs, compiler = [], torch.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    train(data, tmp_path / "x", "--steps", 4, "--compile")
    torch.compiler.reset()
    assert 2 <= len(graphs) <= 6  # tower and decoder; not one for every length
    assert losses(tmp_path / "x") == pytest.approx(losses(trained)[:4], abs=1e-5)


def test_ablations_run_and_weight_decay_acts(data, trained, tmp_path):
    for more in (["--masking", "none"], ["--norm", "none"], ["--weight-decay", "50"]):
        train(data, tmp_path / "-".join(more), "--steps", 8, *more)
    decayed, kept = (load_file(run / "aligner" / "model.safetensors") for run in (tmp_path / "--weight-decay-50", trained))
    assert decayed["net.2.weight"].norm() < 0.9 * kept["net.2.weight"].norm()


def test_bad_samples_are_skipped_named_and_counted(drawn, tmp_path):
    """In a tar: no caption, an empty one, a broken picture. With one pair a micro-batch, none of them stops the run."""
    members = [(f"{i:02}.png", png(image)) for i, (image, _) in enumerate(drawn[:14])] + [(f"{i:02}.txt", text.encode()) for i, (_, text) in enumerate(drawn[:14])]
    members = [(name, b"broken" if name == "01.png" else b" \n" if name == "02.txt" else content) for name, content in members if name != "03.txt"]
    write_tar(tmp_path / "b.tar", dict(members))
    out, err = command("train", *SMALL, "--data", tmp_path / "b.tar", "--out", tmp_path / "x", "--steps", 3, "--micro-batch", 1)
    assert "12 samples (1 held out)" in out
    assert f"skipped 1 of 14: {tmp_path}/b.tar::03.png: no caption: 03.txt" in err and "03.png" in (tmp_path / "x" / "skipped.csv").read_text()
    assert "b.tar::01.png" in err and "b.tar::02.txt is empty" in err and "skipped (2 so far)" in err
    assert (tmp_path / "x" / "aligner").exists()
    write_tar(tmp_path / "c.tar", {f"{i}.{end}": b"broken" for i in range(12) for end in ("png", "txt")})
    assert "none of the 8 samples of a step can be read" in complaint("train", *SMALL, "--data", tmp_path / "c.tar", "--out", tmp_path / "y")


def test_a_run_keeps_its_index(data, drawn, tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "x"
    folder.mkdir()
    for i, (image, text) in enumerate(drawn[:12]):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    train(folder, out, "--steps", 1)
    drawn[13][0].save(folder / "0-new.png")
    (folder / "0-new.txt").write_text("new")
    assert "11 samples (1 held out)" in train(folder, out, "--steps", 2, "--resume")[0]
    assert "--data" in complaint("train", *SMALL, "--data", data, "--out", out, "--resume")
    assert str(folder) in (out / "pairs.jsonl").read_text().splitlines()[0]


def test_training_complaints(data, trained, tmp_path):
    t = ("train", *SMALL, "--out", tmp_path / "x", "--steps", 2)
    assert "nothing does not exist" in complaint(*t, "--data", tmp_path / "nothing")
    assert "already holds a training run" in complaint(*t[:-4], "--out", trained, "--data", data)
    assert "nothing to resume" in complaint(*t, "--data", data, "--resume")
    assert "with other settings" in complaint(*t[:-4], "--out", trained, "--data", data, "--resume", "--seed", 5)
    assert "no/such-t5" in complaint(*t, "--data", data, "--t5", "no/such-t5")
    assert "no/such-clip" in complaint(*t, "--data", data, "--vlm", "no/such-clip")
    Image.new("RGB", (9, 9)).save(tmp_path / "lonely.png")
    assert "has a caption: expected KEY.txt beside KEY.jpg" in complaint(*t, "--data", tmp_path / "lonely.png")
    (tmp_path / "lonely.txt").write_text("a picture")
    assert "holds only 1 samples" in complaint(*t, "--data", tmp_path / "lonely.png")
    command(*t, "--batch-size", "many", code=2)


# ---------------------------------------------------------------- generation
def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def difference(a, b):
    return abs(pixels(a) - pixels(b)).max()


@pytest.fixture(scope="session")
def two(drawn, tmp_path_factory):
    """Two pictures."""
    root = tmp_path_factory.mktemp("two")
    drawn[0][0].save(root / "a.png")
    drawn[1][0].resize((90, 90)).save(root / "b.png")
    return root


def aligned_by_hand(trained, path):
    tower, image = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval().vision_model, Image.open(path).convert("RGB")
    with torch.no_grad():
        seen = tower.post_layernorm(tower(preprocess(image, 64)[None]).last_hidden_state)[0]
        return Aligner.from_pretrained(trained / "aligner")(pooled_by_hand(seen)[None])[0]


def test_generate_equals_stock_clip_hand_made_prompt_and_stock_flux(trained, two, tmp_path):
    """I, I + T, 2I, 2I + T and T in one batch; each against FluxPipeline called directly with [AN(image) ; ... ; T5(text)]."""
    cases = [(["a.png"], ""), (["a.png"], "a red hat"), (["a.png", "b.png"], ""), (["b.png", "a.png"], ""), (["a.png", "b.png"], "a cat"), ([], "a cat")]
    lines = [{"image": image, "text": text, "out": f"{tmp_path}/{i}.png", "seed": i} for i, (image, text) in enumerate(cases)]
    (two / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "drew 6 pictures, skipped 0 lines" in command("generate", "--mini", "--aligner", trained / "aligner", "--steps", 2, "--batch", two / "c.jsonl")[0]
    pipe = FluxPipeline.from_pretrained(MINI["flux"])
    pipe.set_progress_bar_config(disable=True)
    for i, (image, text) in enumerate(cases):
        parts = [aligned_by_hand(trained, two / path)[None] for path in image]
        with torch.no_grad():
            words, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=48)
            prompt = torch.cat(parts + ([words] if text else []), dim=1)
            empty, empty_pooled, _ = pipe.encode_prompt("", None, max_sequence_length=prompt.shape[1])
            expected = pipe(prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=64, width=64, num_inference_steps=2, true_cfg_scale=3,
                            negative_prompt_embeds=empty, negative_pooled_prompt_embeds=empty_pooled, generator=torch.Generator().manual_seed(i)).images[0]
        assert prompt.shape[1] == 17 * len(image) + (48 if text else 0)
        assert abs(pixels(tmp_path / f"{i}.png") - np.asarray(expected).astype(int)).max() <= 1, cases[i]


def test_drawing_flags_act(trained, two, tmp_path):
    g = ("generate", "--mini", "--aligner", trained / "aligner", "--image", two / "a.png", "--text", "a cat", "--steps", 8)
    for name, flags in (("plain", []), ("careful", ["--cache", 1e-6]), ("careless", ["--cache", 1e6])):
        command(*g, *flags, "--out", tmp_path / f"{name}.png")
    assert difference(tmp_path / "plain.png", tmp_path / "careful.png") == 0 < difference(tmp_path / "plain.png", tmp_path / "careless.png")
    command(*g, "--cache", 0, code=2)


def composed(patch, *args):
    """The prompt that the command line composes, without drawing it."""
    prompts = []
    patch.setattr(thinkdiff_clip, "draw", lambda pipe, prompt, *rest: prompts.append(prompt) or [Image.new("RGB", (8, 8))] * len(prompt))
    command("generate", "--mini", "--overwrite", *args)
    return prompts[0][0]


def test_order_and_weights_of_pictures(trained, two, tmp_path, monkeypatch):
    g = ("--aligner", trained / "aligner", "--out", tmp_path / "x.png", "--text", "a cat")
    a, b = (aligned_by_hand(trained, two / name) for name in ("a.png", "b.png"))
    ab = composed(monkeypatch, *g, "--image", two / "a.png", "--image", two / "b.png")
    torch.testing.assert_close(ab[:34], torch.cat([a, b]), rtol=0, atol=1e-5)
    ba = composed(monkeypatch, *g, "--image", two / "b.png", "--image", two / "a.png")
    assert torch.equal(ba[:17], ab[17:34]) and torch.equal(ba[17:34], ab[:17]) and torch.equal(ba[34:], ab[34:])
    same = composed(monkeypatch, *g, "--image", two / "a.png", "--image", two / "b.png", "--image-weight", 1.0, "--image-weight", 1.0)
    assert torch.equal(same, ab)
    muted = composed(monkeypatch, *g, "--image", two / "a.png", "--image-weight", 0, "--image", two / "b.png", "--image-weight", 0.5)
    assert (muted[:17] == 0).all() and torch.equal(muted[17:34], 0.5 * ab[17:34]) and torch.equal(muted[34:], ab[34:])
    assert "1 image weights for 2 pictures" in complaint("generate", "--mini", *g[:2], "--out", tmp_path / "y.png", "--image", two / "a.png", "--image",
                                                         two / "b.png", "--image-weight", 1.0)


def test_batch_draws_what_single_contexts_draw(trained, two, tmp_path):
    lines = [{"image": ["a.png"], "text": "a cat", "out": str(tmp_path / "1.png")}, {"image": ["a.png"], "out": str(tmp_path / "2.png"), "seed": 4},
             {"image": ["gone.png"], "out": str(tmp_path / "3.png")}, {"no": "context"}, {"image": "a.png"}, {"image": ["a.png"], "image_weight": [1, 2]},
             {"image": ["a.png"], "out": str(tmp_path / "1.png")}]
    (two / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    common = ("generate", "--mini", "--aligner", trained / "aligner", "--steps", 1)
    out, err = command(*common, "--batch", two / "d.jsonl")
    assert "drew 2 pictures, skipped 6 lines" in out and all(f"line {n}" in err for n in range(3, 9)) and not (tmp_path / "3.png").exists()
    kept = (tmp_path / "1.png").read_bytes()
    (two / "e.jsonl").write_text(json.dumps({"image": ["a.png"], "out": str(tmp_path / "1.png")}))
    assert "no context that can be drawn" in complaint(*common, "--batch", two / "e.jsonl") and (tmp_path / "1.png").read_bytes() == kept
    command(*common, "--image", two / "a.png", "--seed", 3, "--num-images", 2, "--out", tmp_path / "many.png")
    assert difference(tmp_path / "2.png", tmp_path / "many-2.png") <= 1 < difference(tmp_path / "2.png", tmp_path / "many-1.png")
    assert json.loads(Image.open(tmp_path / "many-2.png").text["thinkdiff"])["seed"] == 4


def test_generation_complaints(trained, two, tmp_path):
    g = ("generate", "--mini", "--aligner", trained / "aligner", "--steps", 1)
    (tmp_path / "kept.png").write_text("mine")
    (tmp_path / "zero.png").write_bytes(b"")
    assert "exists" in complaint(*g, "--out", tmp_path / "kept.png") and (tmp_path / "kept.png").read_text() == "mine"
    assert "zero.png" in complaint(*g, "--image", tmp_path / "zero.png", "--out", tmp_path / "x.png")
    assert "gone.png" in complaint(*g, "--image", tmp_path / "gone.png", "--out", tmp_path / "x.png")
    Aligner(48, 32).save_pretrained(tmp_path / "narrow")
    Aligner(96, 16).save_pretrained(tmp_path / "thin")
    assert "a VLM of width 48" in complaint(*g[:2], "--aligner", tmp_path / "narrow", "--out", tmp_path / "x.png")
    assert "makes prompts of width 16" in complaint(*g[:2], "--aligner", tmp_path / "thin", "--out", tmp_path / "x.png")
    assert "no aligner" in complaint(*g[:2], "--aligner", tmp_path / "a" / "b", "--out", tmp_path / "x.png")
    assert "no context" in complaint("generate")
    assert "no/such-model" in complaint(*g, "--vlm", "no/such-model", "--out", tmp_path / "x.png")
    assert "is a t5, not a BLIP-2 or a CLIP" in complaint(*g, "--vlm", MINI["t5"], "--out", tmp_path / "x.png")
    assert ".png" in complaint(*g, "--out", tmp_path / "x.mp4") and ".mp4" in complaint(*g, "--video", "--out", tmp_path / "x.png")
    command(*g, "--image-weight", "much", code=2)
    command(*g, "--decoder", "paint", code=2)
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------- video
@pytest.fixture(scope="session")
def cogvideox(tmp_path_factory):
    """A tiny random CogVideoX that reads the mini T5 (as 5b: rotary positions, 226 prompt tokens)."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32, num_layers=1, sample_width=8,
        sample_height=8, sample_frames=9, use_rotary_positional_embeddings=True)
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=64, sample_width=64)
    pipe = CogVideoXPipeline(tokenizer=AutoTokenizer.from_pretrained(MINI["t5"]), vae=vae, transformer=transformer, scheduler=CogVideoXDDIMScheduler(),
                             text_encoder=T5EncoderModel.from_pretrained(f"{MINI['flux']}/text_encoder_2", dtype=torch.float32))
    folder = tmp_path_factory.mktemp("video") / "cogvideox"
    pipe.save_pretrained(folder)
    return folder


def test_a_video_of_the_right_length(trained, two, cogvideox, tmp_path, monkeypatch):
    prompts, film = [], thinkdiff_clip.film
    monkeypatch.setattr(thinkdiff_clip, "film", lambda pipe, prompt, *rest: prompts.append((pipe, prompt, rest)) or film(pipe, prompt, *rest))
    g = ("generate", "--mini", "--cogvideox", cogvideox, "--aligner", trained / "aligner", "--image", two / "b.png")
    out, _ = command(*g, "--video", "--text", "a dog runs", "--frames", 9, "--steps", 2, "--out", tmp_path / "x.mp4")
    assert "picture:" in out and [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
    with imageio.get_reader(tmp_path / "x.mp4") as video:
        frames = [frame for frame in video]  # list() asks for a length, which is infinite
        assert len(frames) == 9 and frames[0].shape == (64, 64, 3) and video.get_meta_data()["fps"] == 8
    pipe, prompt, (seeds, size, n_frames, steps, guidance) = prompts[0]
    assert prompt.shape == (1, 226, 32) and (steps, guidance) == (2, 6.0)
    torch.testing.assert_close(prompt[0, :17], aligned_by_hand(trained, two / "b.png"), rtol=0, atol=1e-5)
    with torch.no_grad():
        words = pipe.encode_prompt("a dog runs", do_classifier_free_guidance=False, max_sequence_length=209)[0]
    torch.testing.assert_close(prompt[:, 17:], words, rtol=0, atol=1e-5)

    assert "make" in complaint(*g, "--decoder", "cogvideox", "--frames", 8, "--out", tmp_path / "y.mp4")
    many = [part for _ in range(13) for part in ("--image", two / "a.png")]
    assert "238 tokens" in complaint(*g, *many, "--video", "--out", tmp_path / "y.mp4")
    (two / "v.jsonl").write_text("\n".join(map(json.dumps, [{"image": ["a.png"] * 14, "out": str(tmp_path / "z.mp4")}, {"text": "a cat", "out": str(tmp_path / "t.mp4")}])))
    out, err = command(*g[:-2], "--video", "--frames", 5, "--steps", 1, "--batch", two / "v.jsonl")  # a context without room does not stop the others
    assert "drew 1 pictures, skipped 1 lines" in out and "238 tokens" in err and (tmp_path / "t.mp4").exists()
    assert "x.mp4 exists" in complaint(*g, "--video", "--out", tmp_path / "x.mp4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install imageio" in complaint(*g, "--video", "--out", tmp_path / "y.mp4")
