"""thinkdiff_clip.py: pooling, towers, pairs of images and captions, bad samples, videos.

What `train` computes and its complaints: test_training.py; `generate`: test_inference.py."""
import io
import json
from operator import ne

import diffusers
import imageio
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import pipelines
from common import EXAMPLE, MINI, UserError
from helpers import command, complaint, read_log, write_tar
from models import load_clip
from references import aligner_weights, clip_tokens, eq1, load_flux, t5_prompt
from test_training import clip_samples, write_clip_data
from thinkdiff_clip import image_tokens, pool, preprocess
from training_data import ImageCaptionDataset

SCRIPT = "thinkdiff_clip.py"
TRAIN = (SCRIPT, "train", "--mini", "--batch-size", 8, "--data")
WHITE, BLUE = (EXAMPLE / f"{color}_car.png" for color in ("white", "blue"))
# of CLIP's and BLIP-2's pixels
MEAN = 0.48145466, 0.4578275, 0.40821073
STD = 0.26862954, 0.26130258, 0.27577711


def tar_members():
    """{"KEY.png": bytes, "KEY.txt": bytes} of the 20 samples."""
    members = {}
    for i, (image, caption) in enumerate(clip_samples()):
        file = io.BytesIO()
        image.save(file, "PNG")
        members |= {f"{i:02}.png": file.getvalue(), f"{i:02}.txt": caption.encode()}
    return members


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
    for row, expected in zip(found, x, strict=True):
        torch.testing.assert_close(row, pooled_by_hand(expected), rtol=0, atol=1e-6)


def seen_by_the_tower(images, dtype=torch.float32):
    """What the mini's tower gets of PIL images, (B, 3, 64, 64)."""
    tower, seen = load_clip(MINI["clip"], "cpu", dtype), []
    pixels = [preprocess(image, 64) for image in images]
    assert {p.dtype for p in pixels} == {torch.uint8} and all(p.is_contiguous() for p in pixels)
    handle = tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image_tokens(tower, torch.stack(pixels))
    handle.remove()
    return seen[0]


def test_images_are_prepared_as_by_the_models_own_processors():
    image = Image.open(WHITE).convert("RGB")
    processor = transformers.CLIPImageProcessor.from_pretrained(MINI["clip"])
    stock = processor(image, return_tensors="pt").pixel_values  # (1, 3, 64, 64)
    torch.testing.assert_close(seen_by_the_tower([image]), stock, rtol=0, atol=1e-5)
    wide = Image.open(BLUE).convert("RGB").resize((300, 200))
    processor = transformers.BlipImageProcessor(size={"height": 64, "width": 64})
    stock = processor(wide, return_tensors="pt").pixel_values  # (1, 3, 64, 64)
    # PIL's bicubic against torch's: a grey level or two
    torch.testing.assert_close(seen_by_the_tower([wide]), stock, rtol=0, atol=2 / 255 / 0.26)


def test_pixels_are_normalised_in_fp32():
    """All 256 values in each channel, as NumPy does it, before they become bf16."""
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert all(len(np.unique(rgb[..., channel])) == 256 for channel in range(3))
    normal = (rgb / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    expected = torch.from_numpy(normal).permute(2, 0, 1)  # (3, 64, 64)
    images = [Image.open(WHITE).convert("RGB"), Image.fromarray(rgb)]
    for dtype in (torch.float32, torch.bfloat16):
        found = seen_by_the_tower(images, dtype)
        torch.testing.assert_close(found[1], expected.to(dtype), rtol=1e-6, atol=0)


def test_the_index_follows_the_sources(tmp_path):
    """A tar of 14 samples, then a folder of 6."""
    root, members = tmp_path / "data", list(tar_members().items())
    (root / "folder").mkdir(parents=True)
    write_tar(root / "a.tar", dict(members[:28]))
    for name, content in members[28:]:
        (root / "folder" / name).write_bytes(content)
    pairs = ImageCaptionDataset([str(root)], tmp_path / "pairs.jsonl", lambda ref: ref.key)
    expected = [(f"{root}/a.tar::{i:02}.png" if i < 14 else f"{root}/folder/{i:02}.png",
                 caption.strip()) for i, (_, caption) in enumerate(clip_samples())]
    assert [pairs[i] for i in range(len(pairs))] == expected


# ---------------------------------------------------------------- BLIP-2's tower
@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """A tiny BLIP-2 of true key names in many shards, of which those without the tower are gone;
    pixels, and what the whole model's tower makes of them."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 56, "patch_size": 14, "initializer_range": 0.2},
        text_config={"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 16,
                     "num_layers": 1, "num_heads": 2},
        qformer_config={**small, "encoder_hidden_size": 32, "vocab_size": 64}, num_query_tokens=2)
    torch.manual_seed(0)
    whole = transformers.Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(whole.vision_model.post_layernorm.weight)
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        seen = whole.vision_model((pixels / 255 - mean) / std).last_hidden_state  # (2, 17, 32)
    folder = tmp_path_factory.mktemp("blip2") / "blip2"
    whole.save_pretrained(folder, max_shard_size="30KB")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {f"vision_model.{name}" for name in (
        "embeddings.class_embedding", "encoder.layers.1.self_attn.qkv.bias",
        "post_layernorm.weight")} < set(names)
    needed = {file for name, file in names.items() if name.startswith("vision_model.")}
    assert len(needed) < len(set(names.values()))
    for file in set(names.values()) - needed:
        (folder / file).unlink()
    return folder, pixels, seen


def test_blip2_tower_comes_from_its_shards_alone(blip2, tmp_path):
    folder, pixels, seen = blip2
    clip = load_clip(str(folder), "cpu", torch.float32)
    assert not any(p.requires_grad for p in clip.parameters())
    # post-norm once: last_hidden_state as the whole model has it
    for row, expected in zip(image_tokens(clip, pixels), seen, strict=True):
        torch.testing.assert_close(row, pooled_by_hand(expected), rtol=0, atol=1e-5)
    write_clip_data(tmp_path / "data")
    t = (*TRAIN, tmp_path / "data", "--steps", 1, "--out")
    command(*t, tmp_path / "x", "--vlm", folder)
    command(SCRIPT, "generate", "--mini", "--vlm", folder, "--aligner", tmp_path / "x" / "aligner",
            "--image", BLUE, "--steps", 1, "--out", tmp_path / "x.png")

    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    weights = load_file(shard)
    del weights[name]
    save_file(weights, shard, metadata={"format": "pt"})
    assert "lacks weights of a " in complaint(*t, tmp_path / "y", "--vlm", folder)
    shard.unlink()
    assert "cannot load" in complaint(*t, tmp_path / "y", "--vlm", folder)
    assert "is a t5, not a BLIP-2 or a CLIP" in complaint(*t, tmp_path / "y", "--vlm", MINI["t5"])


# ---------------------------------------------------------------- training data
def test_bad_samples_are_skipped_named_and_counted(tmp_path):
    """In a tar: no caption, an empty one, a broken picture. With one pair a micro-batch, none of
    them stops the run."""
    members = {**tar_members(), "01.png": b"broken", "02.txt": b" \n"}
    del members["03.txt"]
    tar = tmp_path / "b.tar"
    write_tar(tar, members)
    out, err = command(*TRAIN, tar, "--out", tmp_path / "x", "--steps", 3, "--micro-batch", 1)
    assert "18 samples (1 held out)" in out
    table = tmp_path / "x" / "skipped.csv"
    assert f"found 20 pictures = 19 pairs + 1 skipped (see {table})" in out
    assert f"{tar}::03.png,no caption: neither 03.txt nor 03.json beside it" in table.read_text()
    assert "b.tar::01.png" in err and "b.tar::02.txt is empty" in err
    assert "skipped (2 so far)" in err and (tmp_path / "x" / "aligner").exists()
    write_tar(tmp_path / "c.tar", dict.fromkeys(members, b"broken"))
    assert "100 samples in a row cannot be read: is the disk there?" in complaint(
        *TRAIN, tmp_path / "c.tar", "--out", tmp_path / "y")
    (tmp_path / "lonely.png").write_bytes(BLUE.read_bytes())
    t = (*TRAIN, tmp_path / "lonely.png", "--out", tmp_path / "z")
    assert "has a caption: expected KEY.txt or KEY.json beside KEY.jpg" in complaint(*t)
    (tmp_path / "lonely.txt").write_text("a picture")
    assert "holds only 1 samples" in complaint(*t)


def test_a_step_without_a_sample_is_no_error(tmp_path):
    """One sample a step; its row of the log has no loss. A hold-out without samples is an error."""
    members, out = tar_members(), tmp_path / "x"
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0)).tolist()
    members[f"{order[1]:02}.png"] = members[f"{order[2]:02}.txt"] = b"\xff"
    write_tar(tmp_path / "a.tar", members)
    t = (SCRIPT, "train", "--mini", "--batch-size", 1, "--log-every", 1, "--steps", 4, "--data")
    err = command(*t, tmp_path / "a.tar", "--out", out)[1]
    assert [bool(row["loss"]) for row in read_log(out)] == [True, False, False, True]
    assert f"{order[2]:02}.txt is no text in UTF-8" in err
    assert "could not read 2 of 20 samples" in err
    write_tar(tmp_path / "b.tar", members | {"18.png": b"", "19.png": b""})
    assert "nan: none of its samples can be read" in complaint(
        *t, tmp_path / "b.tar", "--out", tmp_path / "y")


def test_captions_in_json(tmp_path):
    """img2dataset's, with a BOM, and those that hold no text; KEY.txt comes first."""
    captions = {
        "a": b'\xef\xbb\xbf{"caption": " a caf\xc3\xa9 ", "key": 1}', "b": b'{"caption": null}',
        "c": b"[]", "d": b'{"caption": "\\ud800"}', "e": b"[" * 10**5, "f": b'{"caption": " "}',
        "g": b"\xff"}
    members = {"h.png": b"", "h.txt": b"\xef\xbb\xbfwords\n", "h.json": b"{}"}
    for name, caption in captions.items():
        members = {f"{name}.png": b"", f"{name}.json": caption, **members}
    write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    pairs = ImageCaptionDataset([str(tmp_path / "a.tar")], tmp_path / "pairs.jsonl", lambda ref: 0)
    assert len(pairs) == 8 and pairs[0][1] == "a caf\xe9" and pairs[7][1] == "words"
    for i in range(1, 7):
        with pytest.raises(UserError, match=rf"caption {tmp_path}/a.tar::{'abcdefg'[i]}.json is "):
            pairs[i]


# as they are written, and as the authors' code trains on them
CAPTIONS = {
    "A Red CAR, on (the) U.S. street!": "a red car, on the u s street",
    'two\n lines;  of "TEXT" #3: 4*5~6 - ok?': "two lines of text 3 4 5 6 - ok?",
    "One. " * 70: "one " * 50, "BLUE": "blue", "\u00c9clair's D'OR": "\u00e9clair's d'or"}


def test_the_releases_form_of_captions(tmp_path):
    """--captions lower, as training on captions of this form. It belongs to the run."""
    for name, captions in (("written", [*CAPTIONS]), ("lower", [*CAPTIONS.values()])):
        write_clip_data(tmp_path / name)
        for i, file in enumerate(sorted((tmp_path / name).glob("*.txt"))):
            file.write_text(captions[i % 5], "utf-8")
    for out, data, form in (("a", "written", "lower"), ("b", "lower", "raw"),
                            ("c", "written", "raw")):
        t = (*TRAIN, tmp_path / data, "--steps", 3, "--log-every", 1, "--out", tmp_path / out)
        command(*t, "--captions", form)
    losses = [[(row["loss"], row["held_out_loss"]) for row in read_log(tmp_path / out)]
              for out in "abc"]
    assert losses[0] == losses[1] and all(map(ne, losses[0], losses[2]))
    line = complaint(*t, "--captions", "lower", "--resume")
    assert "other settings: captions was 'raw', is 'lower'" in line


def test_a_run_keeps_its_index(tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "x"
    write_clip_data(folder)
    command(*TRAIN, folder, "--out", out, "--steps", 1)
    (folder / "0-new.png").write_bytes(BLUE.read_bytes())
    (folder / "0-new.txt").write_text("new")
    resume = ("--out", out, "--steps", 2, "--resume")
    assert "18 samples (2 held out)" in command(*TRAIN, folder, *resume)[0]
    assert "--data" in complaint(*TRAIN, tmp_path, *resume)
    assert str(folder) in (out / "pairs.jsonl").read_text().splitlines()[0]


# ---------------------------------------------------------------- pictures without a text
@pytest.mark.parametrize("how, length", [("pad", 48), ("pad", 7), ("none", 0)])
def test_t5s_empty_text_behind_images(tmp_path, monkeypatch, how, length):
    """Padded as the stock pipeline does it; without guidance, T5 is loaded for it alone."""
    calls, generate_images = [], pipelines.generate_images

    def watch(*args):
        calls.append(args)
        return generate_images(*args)
    monkeypatch.setattr(pipelines, "generate_images", watch)
    more = ("--t5-length", length) if length else ()
    command(SCRIPT, "generate", "--mini", "--image", WHITE, "--image", BLUE, "--empty-text", how,
            "--true-cfg", 1, "--steps", 1, "--out", tmp_path / "x.png", *more)
    pipe, prompt, texts, *_ = calls[0]
    prompt = torch.stack(prompt)
    assert prompt.shape == (1, 34 + length, 32) and texts == [""]
    aligned = eq1(aligner_weights(MINI["aligner-clip"]),
                  torch.cat([clip_tokens(WHITE), clip_tokens(BLUE)]))
    torch.testing.assert_close(prompt[0, :34], aligned, rtol=0, atol=1e-5)
    assert bool(pipe.text_encoder_2) == bool(length)
    if length:
        empty = t5_prompt(load_flux(MINI["flux"]), "", length)
        torch.testing.assert_close(prompt[0, 34:], empty, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- video
@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    """A tiny random CogVideoX that reads the miniature's T5 (as 5b: rotary positions, 226 prompt
    tokens)."""
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8,
        sample_frames=9, use_rotary_positional_embeddings=True)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        sample_height=64, sample_width=64)
    pipe = diffusers.CogVideoXPipeline(
        vae=vae, transformer=transformer, scheduler=diffusers.CogVideoXDDIMScheduler(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(MINI["t5"]),
        text_encoder=transformers.T5EncoderModel.from_pretrained(f"{MINI['flux']}/text_encoder_2"))
    folder = tmp_path_factory.mktemp("video") / "cogvideox"
    pipe.save_pretrained(folder)
    return folder


def test_a_video_of_the_right_length(cogvideox, tmp_path, monkeypatch):
    calls, generate_images = [], pipelines.generate_images

    def watch(*args, **video):
        calls.append(args)
        return generate_images(*args, **video)
    monkeypatch.setattr(pipelines, "generate_images", watch)
    g = (SCRIPT, "generate", "--mini", "--cogvideox", cogvideox, "--image", WHITE, "--image", BLUE)
    out, _ = command(*g, "--video", "--text", "a dog runs", "--frames", 9, "--steps", 2,
                     "--out", tmp_path / "x.mp4")
    assert "picture:" in out and [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
    with imageio.get_reader(tmp_path / "x.mp4") as video:
        # list() asks for a length, which is infinite
        frames = [frame for frame in video]
        assert len(frames) == 9 and frames[0].shape == (64, 64, 3)
        assert video.get_meta_data()["fps"] == 8
    pipe, prompt, _, seeds, size, steps, guidance, _ = calls[0]
    prompt = torch.stack(prompt)
    assert prompt.shape == (1, 226, 32) and (steps, guidance) == (2, 6.0)
    # in this order, which no picture shows
    x = torch.cat([clip_tokens(WHITE), clip_tokens(BLUE)])
    aligned = eq1(aligner_weights(MINI["aligner-clip"]), x)
    torch.testing.assert_close(prompt[0, :34], aligned, rtol=0, atol=1e-5)
    with torch.no_grad():
        words = pipe.encode_prompt("a dog runs", do_classifier_free_guidance=False,
                                   max_sequence_length=192)[0]  # (1, 192, 32)
    torch.testing.assert_close(prompt[:, 34:], words, rtol=0, atol=1e-5)

    y = ("--out", tmp_path / "y.mp4")
    assert "in steps of 4" in complaint(*g, "--decoder", "cogvideox", "--frames", 8, *y, code=2)
    assert "238 tokens" in complaint(*g, *["--image", WHITE] * 12, "--video", *y)
    assert "x.mp4 exists" in complaint(*g, "--video", "--out", tmp_path / "x.mp4")
    # a context without room does not stop the others
    lines = [{"image": [str(WHITE)] * 14, "out": "z.mp4"}, {"text": "a cat", "out": "t.mp4"}]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out, err = command(*g[:5], "--video", "--frames", 5, "--steps", 1,
                       "--batch", tmp_path / "v.jsonl", "--out", tmp_path)
    assert "drew 1 pictures, skipped 1 lines" in out and "238 tokens" in err
    assert (tmp_path / "t.mp4").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install imageio" in complaint(*g, "--video", *y)
