"""`generate` of both variants, flag by flag, against stock models and FluxPipeline."""
import json

import pytest
import torch
from PIL import Image

from common import MINI, REPO
from helpers import command
from references import (aligner_weights, answer, clip_tokens, eq1, load_flux, load_vlm, picture, pixels,
                        prompt_states, save_guided_flux, t5_prompt)

WHITE, BLUE = (REPO / f"mini/example/{color}_car.png" for color in ("white", "blue"))
CONTEXT = ["Word 1: white, ", Image.open(WHITE).convert("RGB"), "\n\nWord 2: blue, ",
           Image.open(BLUE).convert("RGB"), "\n\nWord 3: red, "]
FOX = "Draw a green fox."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A FLUX that reads the guidance, the mini's VLM, and the folder of that FLUX."""
    folder = save_guided_flux(tmp_path_factory.mktemp("inference") / "flux")
    return {"flux": load_flux(folder), "vlm": load_vlm(MINI["vlm"]), "folder": folder}


# ---------------------------------------------------------------- prompts by hand
def lvlm_prompt(models, parts=CONTEXT, features="generated", relay=0, **settings):
    """AN(states of the answer), or with relay T5(words of the answer). (N, d_t5)"""
    x, words, _ = answer(models["vlm"], parts, **settings)
    if features == "input":
        x = prompt_states(models["vlm"], parts)
    if relay:
        return t5_prompt(models["flux"], words, relay)
    return eq1(aligner_weights(MINI["aligner"]), x)


def clip_prompt(models, images=(BLUE,), text="a hat", weights=(1, 1), length=48):
    """[AN(image 1) ; ... ; T5(text)]. (N, d_t5)"""
    aligner = aligner_weights(MINI["aligner-clip"])
    aligned = [weight * eq1(aligner, clip_tokens(path)) for path, weight in zip(images, weights)]
    return torch.cat(aligned + [t5_prompt(models["flux"], text, length)] * bool(text))


def lvlm_picture(models, prompt, drawing):
    return picture(models["flux"], lvlm_prompt(models, **prompt), **drawing)


def clip_picture(models, prompt, drawing):
    """Unlike LVLM's, the pooled CLIP embedding is that of the text."""
    text = prompt.get("text", "a hat")
    return picture(models["flux"], clip_prompt(models, **prompt), text, **drawing)


# ---------------------------------------------------------------- one flag at a time
# (flags, what they change in the prompt, what they change in the drawing)
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
    (["--temperature", 2], {"temperature": 2.0}, {}),
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
    ours, default = pixels(tmp_path / "outputs/0002.png"), defaults[variant]
    expected = VARIANTS[variant][0](models, prompt, {**PLAIN, **drawing})
    assert ours.shape == expected.shape and abs(ours - expected).max() <= 1
    assert ours.shape != default.shape or abs(ours - default).max() > 8
    assert (tmp_path / "outputs/0001.png").read_text() == "kept"


LINES = {
    "lvlm": [
        ({"context": [{"text": FOX}]}, {"parts": [FOX]}),
        ({"context": [{"image": "a.png"}, {"text": "red"}], "instruction": FOX, "seed": 5},
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
    command(REPO / f"thinkdiff_{variant}.py", "generate", "--mini", "--flux", models["folder"],
            "--steps", 4, "--batch", "in/c.jsonl", "--num-images", 2, "--seed", 2)
    for line, (item, prompt) in zip((1, 3), LINES[variant]):
        for k in (0, 1):
            file, seed = tmp_path / f"outputs/{line:05}-{k + 1}.png", item.get("seed", 2) + k
            expected = VARIANTS[variant][0](models, prompt, {**PLAIN, "seed": seed})
            assert abs(pixels(file) - expected).max() <= 1
            assert json.loads(Image.open(file).text["thinkdiff"])["seed"] == seed
