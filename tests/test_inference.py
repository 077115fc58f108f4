"""`generate` and `explain` of both variants against stock models and FluxPipeline: each flag, the
lines of a batch, flags for memory and speed, complaints, and all that `explain` prints."""
import json
import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import models as loaders
import pipelines
import references as ref
from aligner import Aligner
from common import EXAMPLE, MINI, REPO, UserError
from helpers import command, complaint

WHITE, BLUE = (EXAMPLE / f"{color}_car.png" for color in ("white", "blue"))
CONTEXT = ["Word 1: white, ", Image.open(WHITE).convert("RGB"), "\n\nWord 2: blue, ",
           Image.open(BLUE).convert("RGB"), "\n\nWord 3: red, "]
FOX = "Draw a green fox."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A FLUX that reads the guidance, the mini's VLM, and the folder of that FLUX."""
    folder = ref.save_guided_flux(tmp_path_factory.mktemp("inference") / "flux")
    return {"flux": ref.load_flux(folder), "vlm": ref.load_vlm(MINI["vlm"]), "folder": folder}


# ---------------------------------------------------------------- prompts by hand
def lvlm_prompt(models, parts=CONTEXT, features="generated", relay=0, **settings):
    """AN(states of the answer), or with relay T5(words of the answer). (N, d_t5)"""
    x, words, _ = ref.answer(models["vlm"], parts, **settings)
    if features == "input":
        x = ref.prompt_states(models["vlm"], parts)
    if relay:
        return ref.t5_prompt(models["flux"], words, relay)
    return ref.eq1(ref.aligner_weights(MINI["aligner"]), x)


def clip_prompt(models, images=(BLUE,), text="a hat", weights=(1, 1), length=48):
    """[AN(image 1) ; ... ; T5(text)]. (N, d_t5)"""
    aligner = ref.aligner_weights(MINI["aligner-clip"])
    aligned = [weight * ref.eq1(aligner, ref.clip_tokens(path))
               for path, weight in zip(images, weights, strict=False)]
    return torch.cat(aligned + [ref.t5_prompt(models["flux"], text, length)] * bool(text))


def lvlm_picture(models, prompt, drawing):
    return ref.picture(models["flux"], lvlm_prompt(models, **prompt), **drawing)


def clip_picture(models, prompt, drawing):
    """Unlike LVLM's, the pooled CLIP embedding is that of the text."""
    text = prompt.get("text", "a hat")
    return ref.picture(models["flux"], clip_prompt(models, **prompt), text, **drawing)


# ---------------------------------------------------------------- one flag at a time
# flags, what they change in the prompt, what they change in the drawing
DRAWING = [
    (["--seed", 7], {}, {"seed": 7}),
    (["--size", 32], {}, {"size": 32}),
    (["--steps", 2], {}, {"steps": 2}),
    (["--guidance", 9], {}, {"guidance": 9.0}),
    (["--true-cfg", 6], {}, {"true_cfg": 6.0}),
    (["--cache", 1e6], {}, {"cache": 1e6})]
LVLM = [
    (["--text", FOX], {"parts": [FOX]}, {}),
    (["--image", WHITE, "--text", "red"], {"parts": [CONTEXT[1], "red"]}, {}),
    (["--instruction", FOX], {"instruction": FOX}, {}),
    (["--max-new-tokens", 5], {"tokens": 5}, {}),
    # seeds of which no sampled token is near the next one's share: a rounding changes nothing
    (["--temperature", 2, "--seed", 2], {"temperature": 2.0, "seed": 2}, {"seed": 2}),
    (["--temperature", 2, "--top-p", 0.3, "--seed", 1],
     {"temperature": 2.0, "top_p": 0.3, "seed": 1}, {"seed": 1}),
    (["--features", "input"], {"features": "input"}, {}),
    (["--relay"], {"relay": 48}, {}),
    (["--relay", "--t5-length", 12], {"relay": 12}, {})]
TWO = ["--image", WHITE, "--image", BLUE, "--text", "a cat"]
CLIP = [
    (["--text", "a cat"], {"images": (), "text": "a cat"}, {}),
    (["--image", WHITE], {"images": (WHITE,), "text": ""}, {}),
    (TWO, {"images": (WHITE, BLUE), "text": "a cat"}, {}),
    (["--image", BLUE, "--image", WHITE], {"images": (BLUE, WHITE), "text": ""}, {}),
    ([*TWO, "--image-weight", 0.5, "--image-weight", 0],
     {"images": (WHITE, BLUE), "text": "a cat", "weights": (0.5, 0)}, {}),
    (["--image", BLUE, "--text", "a hat", "--t5-length", 12], {"length": 12}, {})]
VARIANTS = {"lvlm": (lvlm_picture, LVLM), "clip": (clip_picture, CLIP)}
PLAIN = {"steps": 4, "true_cfg": 3.0}  # the mini's guidance away from the empty prompt


@pytest.fixture(scope="module")
def defaults(models):
    """Each variant's picture without the flags."""
    return {name: stock(models, {}, PLAIN) for name, (stock, _) in VARIANTS.items()}


@pytest.mark.parametrize(
    "variant, flags, prompt, drawing",
    [pytest.param(name, *case, id=f"{name} {' '.join(map(str, case[0]))}".replace(str(REPO), ""))
     for name, (_, own) in VARIANTS.items() for case in DRAWING + own])
def test_each_flag_arrives(models, defaults, tmp_path, monkeypatch, variant, flags, prompt,
                           drawing):
    """Under the next free default name lies the stock pipeline's picture with that setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/0001.png").write_text("kept")
    command(REPO / f"thinkdiff_{variant}.py", "generate", "--mini", "--flux", models["folder"],
            "--steps", 4, *flags)
    ours, default = ref.pixels(tmp_path / "outputs/0002.png"), defaults[variant]
    expected = VARIANTS[variant][0](models, prompt, {**PLAIN, **drawing})
    assert ours.shape == expected.shape and abs(ours - expected).max() <= 1
    assert ours.shape != default.shape or abs(ours - default).max() > 8
    assert (tmp_path / "outputs/0001.png").read_text() == "kept"


LINES = {
    "lvlm": [
        ({"context": [{"text": FOX}]}, {"parts": [FOX]}),
        ({"context": [{"image": "a.png"}, {"text": "red"}], "instruction": FOX, "seed": 4},
         {"parts": [CONTEXT[1], "red"], "instruction": FOX})],
    "clip": [
        ({"image": ["a.png"], "text": "a cat"}, {"images": (WHITE,), "text": "a cat"}),
        ({"image": ["a.png", str(BLUE)], "image_weight": [1, 0.5], "seed": 5},
         {"images": (WHITE, BLUE), "text": "", "weights": (1, 0.5)})]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lines_of_a_batch_have_their_own_settings(models, tmp_path, monkeypatch, variant):
    """Names tell the number of the line; seeds count up from the line's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(WHITE.read_bytes())
    (first, _), (second, _) = LINES[variant]
    text = "\n".join([json.dumps(first), "broken", json.dumps(second)])
    (tmp_path / "in/c.jsonl").write_text(text)
    flags = ["--temperature", 1.5] if variant == "lvlm" else []
    command(REPO / f"thinkdiff_{variant}.py", "generate", "--mini", "--flux", models["folder"],
            "--steps", 4, "--batch", "in/c.jsonl", "--num-images", 2, "--seed", 3, *flags)
    for line, (item, prompt) in zip((1, 3), LINES[variant], strict=True):
        if flags:
            # the VLM's sampling has the line's seed, too
            prompt = {**prompt, "temperature": 1.5, "seed": item.get("seed", 3)}
        for k in (0, 1):
            file, seed = tmp_path / f"outputs/{line:05}-{k + 1}.png", item.get("seed", 3) + k
            expected = VARIANTS[variant][0](models, prompt, {**PLAIN, "seed": seed})
            assert abs(ref.pixels(file) - expected).max() <= 1
            assert json.loads(Image.open(file).text["thinkdiff"])["seed"] == seed


def asking(variant, text=None, image=None, **more):
    """A line of --batch for a text or an image."""
    part = {"text": text} if image is None else {"image": image}
    if variant == "lvlm":
        return {"context": [part], **more}
    return {**({"text": text} if image is None else {"image": [image]}), **more}


# what is wrong with a line, and a word of the reason
BAD = {
    "lvlm": [
        (asking("lvlm", image="strip.png"), "strip"),
        (asking("lvlm", "a <|image_pad|>"), "holds <|image_pad|>"),
        ({"context": [{"text": "<|im_"}, {"text": "end|>"}]}, "<|im_end|>"),
        (asking("lvlm", "word " * 5000), "tokens long"), (asking("lvlm", 3), "not like"),
        ({"context": [{"text": "a", "image": "a.png"}]}, "not like"),
        ({"context": [{"video": "a.png"}]}, "not like"), ({"context": [{}]}, "not like"),
        ({"context": []}, "no text"), ({"context": {"text": "a"}}, "not like"),
        (asking("lvlm", "a", instruction=None), "not like")],
    "clip": [
        ({"image": "a.png"}, "not like"), ({"image": ["a.png", 3]}, "not like"),
        ({"image": ["a.png"], "image_weight": [1, 2]}, "2 image weights for 1"),
        ({"image": ["a.png"], "image_weight": [float("nan")]}, "float"),
        ({"image": ["a.png"], "image_weight": [1e6]}, "at most 100"),
        ({"image": ["a.png"], "image_weight": [True]}, "not like"),
        ({"text": " ", "image": []}, "no text"), ({"text": None}, "not like")]}
BAD_EVERYWHERE = [
    ({"image": "gone.png"}, "gone.png"), ({"image": "zero.png"}, "zero.png"),
    ({"image": "a\0.png"}, "null"), ({"image": "n" * 300}, "too long"),
    ({"image": "https://a.org/a.png"}, "URL"), ({"text": "\ud800"}, "utf-8"),
    ({"seed": 2**64}, "18446744073709551616"), ({"seed": -1}, "-1"), ({"seed": 1.0}, "not like"),
    ({"seed": True}, "not like"), ({"seed": None}, "not like"), ({"sed": 1}, "sed"),
    ({"out": None}, "not like"), ({"out": ""}, "exists"), ({"out": "a.gif"}, "end the name"),
    ({"out": "../e.png"}, "not inside"), ({"out": "/tmp/e.png"}, "not inside"),
    ({"out": "link/e.png"}, "not inside"), ({"out": "n" * 300 + ".png"}, "too long"),
    ({"out": "n" * 250 + ".png"}, "too long"), ({"out": "a\0.png"}, "null"),
    ({"out": "00003.png"}, "earlier line"), ({"out": "sub/../00003.png"}, "earlier line"),
    ({"out": "00003.png/a.png"}, "earlier line"), ({"out": "kept.png"}, "exists")]
NO_LINES = [b"not json", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000]


@pytest.mark.parametrize("variant", VARIANTS)
def test_lines_that_cannot_be_drawn_are_skipped_and_named(tmp_path, variant):
    """The pictures of the others are those of a batch without them, also with --overwrite."""
    for folder in ("in", "out/sub", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/kept.png").write_text("kept")
    (tmp_path / "in/a.png").write_bytes(WHITE.read_bytes())
    (tmp_path / "in/zero.png").write_bytes(b"")
    Image.new("RGB", (2010, 10)).save(tmp_path / "in/strip.png")
    # U+2028 is no end of a line
    good = [asking(variant, image="a.png"),
            asking(variant, "a red\u2028 car", out="sub/x.png", seed=5)]
    first, last = (json.dumps(line, ensure_ascii=False).encode() for line in good)
    bad = BAD[variant] + [(asking(variant, **{"text": "a", **item}), word)
                          for item, word in BAD_EVERYWHERE]
    lines = [json.dumps(line).encode() for line, _ in bad] + NO_LINES
    # blank lines count, and there may be a byte order mark
    text = b"\n".join([b"", b" \r", first, *lines, last, b""])
    (tmp_path / "in/mixed.jsonl").write_bytes(text)
    (tmp_path / "in/good.jsonl").write_bytes(b"\n\n\xef\xbb\xbf" + first + b"\n" + last)
    g = (f"thinkdiff_{variant}.py", "generate", "--mini", "--steps", 2, "--size", 32)
    command(*g, "--batch", tmp_path / "in/good.jsonl", "--out", tmp_path / "good")
    before = sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts)

    out, err = command(*g, "--batch", tmp_path / "in/mixed.jsonl", "--out", tmp_path / "out")
    assert f"drew 2 pictures, skipped {len(lines)} lines of" in out
    skipped = dict(re.findall(r"^skipped .* line (\d+): (.*)$", err, re.MULTILINE))
    assert sorted(map(int, skipped)) == [*range(4, 4 + len(lines))]
    assert "it is no JSON object like" in "".join(skipped.values())
    assert not [(line, skipped[str(n)]) for n, (line, word) in enumerate(bad, 4)
                if word not in skipped[str(n)]]
    drawn = {name: (tmp_path / "good" / name).read_bytes() for name in ("00003.png", "sub/x.png")}
    for name, picture in drawn.items():
        assert (tmp_path / "out" / name).read_bytes() == picture
    assert before == sorted(path for path in tmp_path.rglob("*") if "out" not in path.parts)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [
        "00003.png", "kept.png", "link", "sub", "x.png"]

    # what is there stays, unless --overwrite; then, too, no line takes the name of another one
    m = (*g, "--batch", tmp_path / "in/mixed.jsonl", "--out", tmp_path / "out")
    assert "no context that can be drawn" in complaint(*m)
    assert (tmp_path / "out/kept.png").read_text() == "kept"
    out, err = command(*m, "--overwrite")
    assert "drew 3 pictures" in out and "00003.png is the image of an earlier line" in err
    # a batch of three rounds otherwise than one of two
    for name in drawn:
        assert abs(ref.pixels(tmp_path / "out" / name)
                   - ref.pixels(tmp_path / "good" / name)).max() <= 1


def test_no_picture_is_lost(tmp_path, monkeypatch):
    """A name that was free at the start may be another program's when the picture is there."""
    monkeypatch.chdir(tmp_path)
    draw, clashes = pipelines.generate_images, []

    def slow(*args, **options):
        for name in clashes:
            Path(name).write_text("another's")
        return draw(*args, **options)
    monkeypatch.setattr(pipelines, "generate_images", slow)
    Path("outputs").mkdir()
    g = ("thinkdiff_clip.py", "generate", "--mini", "--text", "a cat", "--steps", 1)
    clashes += ["outputs/0001.png", "outputs/0002.png"]
    out, err = command(*g)
    assert "picture: outputs/0003.png" in out and "outputs/0001.png was written" in err
    clashes[:] = ["x.png"]
    out, err = command(*g, "--out", "x.png")
    assert "picture: x2.png" in out and "x.png was written" in err
    e = ("thinkdiff_clip.py", "explain", "--mini", "--steps", 1, "--out", "x.png")
    assert "picture: x3.png" in command(*e)[0]
    for name in ("outputs/0001.png", "outputs/0002.png", "x.png"):
        assert Path(name).read_text() == "another's"
    for name in ("outputs/0003.png", "x2.png", "x3.png"):
        assert Image.open(name).size == (64, 64)
    for out in ("x.gif", "x.png/y.png"):
        complaint(*e[:-1], out)
    # two batches could not tell whose lines the names are
    Path("c.jsonl").write_text('{"text": "a cat"}')
    lock = FileLock("outputs/.lock")
    with lock:
        assert "another run is writing to outputs" in complaint(*g[:3], "--batch", "c.jsonl")


def test_what_was_asked_and_what_is_cut_is_said(tmp_path):
    def generate(variant, *flags):
        out, err = command(f"thinkdiff_{variant}.py", "generate", "--mini", "--steps", 1, *flags,
                           "--overwrite", "--out", tmp_path / "x.png")
        return out, [line for line in err.splitlines() if "are cut" in line]
    text = "a red car and " * 30
    n_tokens = len(AutoTokenizer.from_pretrained(MINI["t5"])(text).input_ids)
    (line,) = generate("clip", "--text", text, "--t5-length", 20)[1]
    assert f"has {n_tokens} T5 tokens, the last {n_tokens - 20} are cut" in line
    assert "T5 tokens" in generate("lvlm", "--relay", "--t5-length", 3)[1][0]
    assert "(cut at --max-new-tokens)" in generate("lvlm", "--max-new-tokens", 3)[0]
    out, cut = generate("lvlm")
    assert not cut and "(cut at --max-new-tokens)" not in out
    assert out.startswith('context: {"context": [{"text": "Word 1: white, "}, {"image": ')
    out, cut = generate("clip")
    assert not cut and out.startswith('context: {"image": ["blue_car.png"], "text": "a hat"}\n')


# ---------------------------------------------------------------- memory and speed
def example(folder, *flags):
    """The picture of the shipped context."""
    command("thinkdiff_lvlm.py", "generate", "--mini", "--steps", 12, "--overwrite",
            "--out", folder / "x.png", *flags)
    return ref.pixels(folder / "x.png")


def test_cache_skips_blocks(tmp_path, monkeypatch):
    work, forward = [], FluxSingleTransformerBlock.forward

    def counted(*args, **kwargs):
        work.append(1)
        return forward(*args, **kwargs)
    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", counted)
    plain = example(tmp_path)
    every = len(work)
    # four such blocks; guidance takes two passes a step
    assert every == 4 * 2 * 12
    assert (example(tmp_path, "--cache", 1e-6) == plain).all() and len(work) == 2 * every
    careless = example(tmp_path, "--cache", 1e6)
    # the first step alone
    assert len(work) == 2 * every + 4 * 2 and abs(careless - plain).mean() > 1
    work.clear()
    halfway = example(tmp_path, "--cache", 0.25)
    assert 8 < len(work) < every
    assert 0 < abs(halfway - plain).mean() < abs(careless - plain).mean()


def test_quantized_models_draw_nearly_the_same_picture(tmp_path, monkeypatch):
    torchao = pytest.importorskip("torchao.utils", reason="--quantize needs pip install torchao")
    plain, other, loaded = example(tmp_path), example(tmp_path, "--seed", 1), []
    load, speed_up = loaders.load_vlm, pipelines.speed_up

    def watched_load(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[0]

    def watched_speed_up(pipe, *rest):
        loaded.append(pipe)
        return speed_up(pipe, *rest)
    monkeypatch.setattr(loaders, "load_vlm", watched_load)
    monkeypatch.setattr(pipelines, "speed_up", watched_speed_up)
    quantized, ((vlm, _), pipe) = example(tmp_path, "--quantize"), loaded
    for layer in (pipe.transformer.single_transformer_blocks[0].proj_mlp,
                  vlm.model.language_model.layers[0].mlp.up_proj):
        assert isinstance(layer.weight, torchao.TorchAOBaseTensor)
        assert layer.weight.qdata.dtype == torch.int8
    assert 0 < abs(quantized - plain).mean() < abs(other - plain).mean() / 4


def test_quantize_reaches_the_t5_encoder():
    torchao = pytest.importorskip("torchao.utils", reason="--quantize needs pip install torchao")
    plain, quantized = (
        pipelines.load_flux(MINI["flux"], "cpu", torch.float32, t5_encoder=True, quantize=quantize)
        for quantize in (False, True))
    layer = quantized.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    assert isinstance(layer.weight, torchao.TorchAOBaseTensor)
    expected, found = (pipelines.t5_embeds(pipe, ["a red car"], 48)[0]
                       for pipe in (plain, quantized))
    # int8 rounds a row to 1 of 127 of its largest
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("flags", [[], ["--cache", 0.25]], ids=str)
def test_compiled_pictures_are_the_same_but_for_roundings(tmp_path, count_graphs, flags):
    """With the cache, too, blocks of one class share what is compiled."""
    plain = example(tmp_path, *flags)
    compiled = example(tmp_path, "--compile", *flags)
    assert 2 <= len(count_graphs) <= 4 and abs(compiled - plain).max() <= 1


# ---------------------------------------------------------------- complaints
@pytest.mark.parametrize("variant", VARIANTS)
def test_complaints(tmp_path, monkeypatch, variant):
    def of(*flags, out="x.png", code=1, mini=("--mini",)):
        return complaint(f"thinkdiff_{variant}.py", "generate", *mini, "--steps", 2,
                         "--out", tmp_path / out, *flags, code=code)
    (tmp_path / "kept.png").write_text("mine")
    (tmp_path / "zero.png").write_bytes(b"")
    assert "exists" in of(out="kept.png") and (tmp_path / "kept.png").read_text() == "mine"
    assert "cannot write" in of(out="kept.png/x.png")
    assert ".png" in of(out="x.gif") and ".png" in of(out="x.mp4")
    for name in ("zero.png", "gone.png"):
        assert name in of("--image", tmp_path / name)
    Aligner(48, 32).save_pretrained(tmp_path / "narrow")
    Aligner(128 if variant == "lvlm" else 96, 16).save_pretrained(tmp_path / "thin")
    for folder, said in (("narrow", "was made for a VLM of width 48"), ("a/b", "no aligner"),
                         ("thin", "was made for a T5 of width 16")):
        assert said in of("--aligner", tmp_path / folder)
    assert "no context: give --text and --image, --batch FILE.jsonl, or --mini" in of(mini=())
    assert "no/such-model" in of("--vlm", "no/such-model")
    assert "gone.jsonl" in of("--batch", "gone.jsonl")
    for flag, wrong in (("size", "large"), ("seed", "much"), ("cache", "0"), ("cache", "-1"),
                        ("cache", "nan"), ("cache", "much")):
        of(f"--{flag}={wrong}", code=2)
    if variant == "lvlm":
        for wrong in ("--prompt=16", "--tokens=1"):
            command("thinkdiff_lvlm.py", "explain", "--mini", wrong, code=2)
    if variant == "clip":
        # without an image no CLIP is asked for
        command("thinkdiff_clip.py", "generate", "--mini", "--vlm", "no/such-clip", "--steps", 1,
                "--text", "a cat", "--out", tmp_path / "text.png")
        assert "1 image weights for 2 pictures" in of("--image-weight", 1, *TWO)
        assert ".mp4" in of("--video")
        of("--image-weight", "much", code=2)
        of("--decoder", "paint", code=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU here" in of("--offload")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torchao==" in of("--quantize")
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------- damaged models
def without_weight(number):
    """Takes a weight out of a safetensors file."""
    def damage(path):
        weights = load_file(path)
        del weights[sorted(weights)[number]]
        save_file(weights, path, {"format": "pt"})
    return damage


def other(*keys, value):
    """Gives an entry of a JSON file another value."""
    def damage(path):
        config = entry = json.loads(path.read_text())
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value
        path.write_text(json.dumps(config))
    return damage


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


LOADERS = {
    "vlm": lambda path: loaders.load_vlm(path, "cpu", torch.float32),
    "clip": lambda path: loaders.load_clip(path, "cpu", torch.float32),
    "t5": lambda path: loaders.load_t5(path, "cpu", torch.float32),
    "decoder": lambda path: loaders.load_t5_decoder(path, "cpu", torch.float32),
    "flux": lambda path: pipelines.load_flux(path, "cpu", torch.float32, t5_encoder=True)}
WIDE = "more weights than the files can hold"
DAMAGE = [
    ("vlm", "config.json", other("text_config", "hidden_size", value=100_000), WIDE),
    ("vlm", "config.json", other("text_config", "hidden_size", value="x"), "hidden_size"),
    ("vlm", "config.json", other("text_config", "intermediate_size", value=385), "other sizes"),
    ("vlm", "config.json", other("image_token_id", value=10**9), "cannot load"),
    ("vlm", "config.json", cut, "valid JSON"), ("vlm", "tokenizer.json", cut, "cannot load"),
    ("vlm", "chat_template.jinja", cut, "cannot load"),
    ("vlm", "generation_config.json", other("eos_token_id", value={}), "cannot load"),
    ("vlm", "processor_config.json", other("image_processor", "merge_size", value=0), "division"),
    ("vlm", "model.safetensors", without_weight(0), "lacks weights"),
    ("clip", "config.json", other("vision_config", "image_size", value=10**6), WIDE),
    ("clip", "config.json", other("vision_config", "num_hidden_layers", value=10**9), WIDE),
    ("t5", "config.json", other("num_layers", value=10**9), WIDE),
    ("t5", "config.json", other("d_ff", value=10**7), WIDE),
    ("t5", "config.json", other("relative_attention_num_buckets", value=[]), "cannot load"),
    ("decoder", "config.json", other("d_ff", value=10**7), WIDE),
    ("decoder", "config.json", other("d_ff", value=65), "other sizes"),
    ("decoder", "model.safetensors", cut, "cannot load"),
    ("flux", "model_index.json", other("text_encoder", value=None), "cannot load"),
    ("flux", "transformer/config.json", other("num_attention_heads", value=10**4), WIDE),
    ("flux", "text_encoder_2/config.json", other("d_ff", value=10**7), WIDE),
    ("flux", "vae/config.json", other("latent_channels", value=True), "cannot load"),
    *(("flux", f"{part}/model.safetensors", without_weight(3), "lacks weights")
      for part in ("text_encoder", "text_encoder_2")),
    *(("flux", f"{part}/diffusion_pytorch_model.safetensors", without_weight(3), "cannot load")
      for part in ("transformer", "vae"))]


@pytest.mark.parametrize("model, file, damage, said", DAMAGE)
def test_damaged_models_are_named(tmp_path, model, file, damage, said):
    """In one line, without random weights and without the memory that a config.json claims."""
    folder = tmp_path / "model"
    shutil.copytree(MINI[model.replace("decoder", "t5")], folder)
    damage(folder / file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=said) as caught:
        LOADERS[model](str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


# ---------------------------------------------------------------- explain
@torch.no_grad()
def check_explained(out, x, weights, text, prefix, target, s=None):
    """The printed figures of a sample: x (n, d_vlm), its text, the split. Returns x' (n, d_t5).

    T5's decoder reads x'_1..x'_s, or, without s, [x' ; t1]."""
    t5 = T5ForConditionalGeneration.from_pretrained(MINI["t5"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MINI["t5"])

    def encode(text):
        ids = tokenizer(text, return_tensors="pt").input_ids  # (1, m)
        return t5.encoder(ids).last_hidden_state[0], ids[0]

    def read(memory):
        ids = t5.generate(encoder_outputs=BaseModelOutput(memory[None]),
                          max_new_tokens=len(encode(target)[1]), do_sample=False,
                          use_cache=False)
        return tokenizer.decode(ids[0], skip_special_tokens=True)
    torch.manual_seed(4)
    first, last = torch.nn.Linear(x.shape[1], 32), torch.nn.Linear(32, 32)
    new = {"0.weight": first.weight, "0.bias": first.bias, "2.weight": last.weight,
           "2.bias": last.bias, "3.weight": t5.encoder.final_layer_norm.weight.data}
    aligned, (t, ids), (t1, _) = ref.eq1(weights, x), encode(text), encode(prefix)
    ones = ref.eq1({**new, "3.weight": torch.ones(32)}, x)
    tensors = {"x   features": x, "t   T5 encoder's outputs for the same text": t,
               "x'  aligned": aligned,
               "x'  new aligner, norm from T5 (section 3.2)": ref.eq1(new, x),
               "x'  new aligner, norm of ones": ones}
    # name, shape, RMS
    rows = re.findall(r"^(\w'? .*?) +\((\d+), (\d+)\) +([\d.]+)$", out, re.MULTILINE)
    assert [(name, int(n), int(d)) for name, n, d, _ in rows] == [
        (name, *tensor.shape) for name, tensor in tensors.items()]
    assert [float(rms) for *_, rms in rows] == pytest.approx(
        [tensor.square().mean().sqrt().item() for tensor in tensors.values()], abs=1.1e-4)

    memory = aligned[:s] if s else torch.cat([aligned, t1])
    for label, said in (("prefix", prefix), ("target", target.strip()),
                        ("T5's decoder on the aligned features", read(memory)),
                        ("T5's decoder on t of the prefix alone", read(t1))):
        assert re.search(f"^  {label} +{re.escape(said)}$", out, re.MULTILINE)
    nearest = out.split("\nnearest t_j of each x'_i, cosine\n")[1].split("\n\n")[0]
    printed = [word.rstrip(")").rsplit("(", 1) for word in nearest.split()]
    cosines, at = F.cosine_similarity(aligned[:, None], t, dim=-1).max(-1)  # (n,)
    assert [token for token, _ in printed] == tokenizer.convert_ids_to_tokens(ids[at])
    assert [float(cosine) for _, cosine in printed] == pytest.approx(cosines.tolist(), abs=0.0051)
    return aligned


def explain_of(variant, models, tmp_path, *flags):
    """Its output; the picture lies in x.png. The same without FLUX, but for the picture."""
    e = (f"thinkdiff_{variant}.py", "explain", "--mini", "--image", BLUE, "--seed", 4,
         "--out", tmp_path / "x.png", *flags)
    without = command(*e, "--no-picture", "--flux", "no/such-flux")[0]
    assert not (tmp_path / "x.png").exists()
    assert "no/such-flux" in complaint(*e, "--flux", "no/such-flux")
    out = command(*e, "--flux", models["folder"], "--steps", 2, "--guidance", 9)[0]
    assert out == f"{without}\npicture: {tmp_path / 'x.png'}\n"
    assert out.startswith(f"image    {BLUE}\n")
    return out


def check_explained_picture(models, tmp_path, aligned):
    expected = ref.picture(models["flux"], aligned, seed=4, guidance=9.0, true_cfg=3.0)
    assert abs(ref.pixels(tmp_path / "x.png") - expected).max() <= 1


def test_explain_lvlm(models, tmp_path):
    """The answer goes on after EOS, as those of prepare_data.py do."""
    out = explain_of("lvlm", models, tmp_path, "--prompt", 3, "--tokens", 12)
    prompt, (vlm, processor) = "Summarize the visual content of the image.", models["vlm"]
    inputs = ref.vlm_inputs(processor, [CONTEXT[3], prompt], instruction="")
    x, y = ref.sample(vlm, inputs, 12, top_p=0, ignore_eos=True)  # (12, d_vlm), (12,)
    assert torch.equal(vlm.lm_head(x).argmax(-1), y) and vlm.generation_config.eos_token_id in y

    def decode(y):
        return processor.tokenizer.decode(y, skip_special_tokens=True)
    assert f"\nprompt   {prompt}\nanswer   {decode(y)}\n" in out
    assert "\nargmax lm_head(x_i) = y_i for 12 of 12 tokens\n" in out
    # 3 of 12 tokens, in which T5 reads something else than in all
    s = random.Random("4 2").randint(1, 11)
    weights = ref.aligner_weights(MINI["aligner"])
    aligned = check_explained(out, x, weights, decode(y), decode(y[:s]), decode(y[s:]), s)
    check_explained_picture(models, tmp_path, aligned)


def test_explain_clip(models, tmp_path):
    caption = "A blue car on the grass. It is photographed."
    out = explain_of("clip", models, tmp_path, "--text", caption)
    assert f"\ncaption  {caption}\n\nCLIP's 65 tokens, pooled: 17 (section 3.4)\n" in out
    words = caption.split()
    s = random.Random("4 2").randint(1, len(words) - 1)
    aligned = check_explained(out, ref.clip_tokens(BLUE), ref.aligner_weights(MINI["aligner-clip"]),
                              caption, " ".join(words[:s]), " ".join(words[s:]))
    check_explained_picture(models, tmp_path, aligned)
