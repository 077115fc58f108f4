"""thinkdiff_clip.py: pooling, towers, skipped samples, complaints; generation against the stock models.

What `train` computes: test_training.py."""
import csv
import inspect
import io
import json
import random
from functools import partial

import imageio
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor, CLIPImageProcessor,
                          T5EncoderModel)

import thinkdiff_clip
import thinkdiff_lvlm
from aligner import Aligner
from common import MINI, REPO
from helpers import command, complaint, write_tar
from references import aligner_weights, clip_tokens, eq1
from thinkdiff_clip import Pairs, image_tokens, load_clip, load_t5, pool, preprocess
from world import PAIRS, caption, draw

SCRIPT = str(REPO / "thinkdiff_clip.py")
CLIP = REPO / "mini/clip"
SMALL = "--mini --batch-size 8 --micro-batch 4 --log-every 1 --eval-every 4 --held-out 4 --warmup 2 --lr-horizon 20".split()
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
def pooled_by_hand(x):
    """CLS, and the means of the 2 x 2 neighbours in the grid, row by row; x (1 + g*g, d)."""
    g = round((len(x) - 1) ** 0.5)
    grid = np.asarray(x[1:]).reshape(g, g, -1)
    means = [grid[i:i + 2, j:j + 2].mean((0, 1)) for i in range(0, g, 2) for j in range(0, g, 2)]
    return torch.tensor(np.stack([np.asarray(x[0]), *means]))


@pytest.mark.parametrize("tokens, pooled", [(257, 65), (65, 17)])
def test_pooling_is_the_mean_of_2x2_tokens_and_leaves_cls(tokens, pooled):
    x = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(0))
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


def test_the_index_follows_the_sources_and_t5_is_frozen(data, drawn, tmp_path):
    pairs = Pairs([str(data)], tmp_path / "pairs.jsonl", 64)
    assert [pairs[i][1] for i in range(len(pairs))] == [text for _, text in drawn]
    t5 = load_t5(MINI["t5"], "cpu", torch.float32)
    assert not any(parameter.requires_grad for parameter in t5.parameters())


def test_what_both_scripts_have_word_for_word_stays_so():
    """That their code is right: test_training.py, and the comparisons with stock pipelines."""
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
def train(data, out, *more):
    return command("train", *SMALL, "--data", data, "--out", out, *more)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    train(data, out, "--steps", 8, "--save-every", 4)
    return out


def losses(run):
    return [float(row["loss"]) for row in csv.DictReader((run / "log.csv").open())]


def test_compiled_training_is_the_same_but_for_roundings(data, trained, tmp_path, monkeypatch):
    """All of torch.compile but its last stage, the C++ compiler, which takes minutes."""
    graphs, compiler = [], torch.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    train(data, tmp_path / "x", "--steps", 4, "--compile")
    torch.compiler.reset()
    assert 2 <= len(graphs) <= 6  # tower and decoder; not one for every length
    assert losses(tmp_path / "x") == pytest.approx(losses(trained)[:4], abs=1e-5)


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
@pytest.fixture(scope="session")
def pictures(drawn, tmp_path_factory):
    """A folder with a picture, a.png."""
    root = tmp_path_factory.mktemp("pictures")
    drawn[0][0].save(root / "a.png")
    return root


def test_lines_that_cannot_be_drawn_are_skipped_and_named(trained, pictures, tmp_path):
    lines = [{"image": ["a.png"], "text": "a cat", "out": str(tmp_path / "1.png")}, {"image": ["a.png"], "out": str(tmp_path / "2.png"), "seed": 4},
             {"image": ["gone.png"], "out": str(tmp_path / "3.png")}, {"no": "context"}, {"image": "a.png"}, {"image": ["a.png"], "image_weight": [1, 2]},
             {"image": ["a.png"], "out": str(tmp_path / "1.png")}]
    (pictures / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    common = ("generate", "--mini", "--aligner", trained / "aligner", "--steps", 1)
    out, err = command(*common, "--batch", pictures / "d.jsonl")
    assert "drew 2 pictures, skipped 6 lines" in out and all(f"line {n}" in err for n in range(3, 9)) and not (tmp_path / "3.png").exists()
    kept = (tmp_path / "1.png").read_bytes()
    (pictures / "e.jsonl").write_text(json.dumps({"image": ["a.png"], "out": str(tmp_path / "1.png")}))
    assert "no context that can be drawn" in complaint(*common, "--batch", pictures / "e.jsonl") and (tmp_path / "1.png").read_bytes() == kept


def test_generation_complaints(trained, pictures, tmp_path):
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
    command(*g, "--cache", 0, code=2)
    assert "1 image weights for 2 pictures" in complaint(*g, "--out", tmp_path / "x.png", "--image-weight", 1.0,
                                                         *("--image", pictures / "a.png") * 2)
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


def test_a_video_of_the_right_length(trained, pictures, cogvideox, tmp_path, monkeypatch):
    prompts, film = [], thinkdiff_clip.film
    monkeypatch.setattr(thinkdiff_clip, "film", lambda pipe, prompt, *rest: prompts.append((pipe, prompt, rest)) or film(pipe, prompt, *rest))
    g = ("generate", "--mini", "--cogvideox", cogvideox, "--aligner", trained / "aligner", "--image", pictures / "a.png",
         "--image", REPO / "mini/example/blue_car.png")
    out, _ = command(*g, "--video", "--text", "a dog runs", "--frames", 9, "--steps", 2, "--out", tmp_path / "x.mp4")
    assert "picture:" in out and [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
    with imageio.get_reader(tmp_path / "x.mp4") as video:
        frames = [frame for frame in video]  # list() asks for a length, which is infinite
        assert len(frames) == 9 and frames[0].shape == (64, 64, 3) and video.get_meta_data()["fps"] == 8
    pipe, prompt, (seeds, size, n_frames, steps, guidance) = prompts[0]
    assert prompt.shape == (1, 226, 32) and (steps, guidance) == (2, 6.0)
    x = torch.cat([clip_tokens(pictures / "a.png"), clip_tokens(REPO / "mini/example/blue_car.png")])
    aligned = eq1(aligner_weights(trained / "aligner"), x)  # in this order, which no picture shows
    torch.testing.assert_close(prompt[0, :34], aligned, rtol=0, atol=1e-5)
    with torch.no_grad():
        words = pipe.encode_prompt("a dog runs", do_classifier_free_guidance=False, max_sequence_length=192)[0]
    torch.testing.assert_close(prompt[:, 34:], words, rtol=0, atol=1e-5)

    assert "make" in complaint(*g, "--decoder", "cogvideox", "--frames", 8, "--out", tmp_path / "y.mp4")
    many = [part for _ in range(12) for part in ("--image", pictures / "a.png")]
    assert "238 tokens" in complaint(*g, *many, "--video", "--out", tmp_path / "y.mp4")
    (pictures / "v.jsonl").write_text("\n".join(map(json.dumps, [{"image": ["a.png"] * 14, "out": str(tmp_path / "z.mp4")}, {"text": "a cat", "out": str(tmp_path / "t.mp4")}])))
    out, err = command(*g[:-4], "--video", "--frames", 5, "--steps", 1, "--batch", pictures / "v.jsonl")  # a context without room does not stop the others
    assert "drew 1 pictures, skipped 1 lines" in out and "238 tokens" in err and (tmp_path / "t.mp4").exists()
    assert "x.mp4 exists" in complaint(*g, "--video", "--out", tmp_path / "x.mp4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install imageio" in complaint(*g, "--video", "--out", tmp_path / "y.mp4")
