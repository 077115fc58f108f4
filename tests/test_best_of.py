"""--best-of: of N images the one that the VLM's own words fit best."""
import re

import numpy as np
import torch
from PIL import Image

import references as ref
from common import MINI, read_json
from helpers import command

LVLM, COBSAT = "thinkdiff_lvlm.py", "cobsat_eval.py"


@torch.no_grad()
def log_likelihood(model, processor, image, words):
    """log p(words | image, "Describe the image concisely.") by the stock model's loss."""
    content = [{"type": "image", "image": image},
               {"type": "text", "text": "Describe the image concisely."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True,
        add_generation_prompt=True, return_tensors="pt")
    y = processor.tokenizer(words, return_tensors="pt").input_ids
    ids = torch.cat([inputs["input_ids"], y], 1)
    labels = ids.clone()
    labels[:, :-y.shape[1]] = -100
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(y)], 1)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels,
                 pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"],
                 mm_token_type_ids=types).loss
    return -loss.item() * y.shape[1]


def test_the_image_is_kept_that_the_words_fit_best(tmp_path):
    # few steps: the images differ
    line = (LVLM, "generate", "--mini", "--steps", 4, "--seed", 5)
    out, _ = command(*line, "--best-of", 4, "--num-images", 2, "--out", tmp_path / "x.png")
    words = re.search(r"x\.png: (.*)", out)[1]
    model, processor = ref.load_vlm(MINI["vlm"])
    kept = [int(seed) for seed in re.findall(r"seed (\d+), the best of 4", out)]
    command(*line, "--num-images", 8, "--out", tmp_path / "one.png")
    images = [Image.open(tmp_path / f"one-{k + 1}.png").convert("RGB") for k in range(8)]
    scores = [log_likelihood(model, processor, image, words) for image in images]
    assert kept == [5 + int(np.argmax(scores[:4])), 9 + int(np.argmax(scores[4:]))]
    for k, seed in enumerate(kept):
        best = Image.open(tmp_path / f"x-{k + 1}.png")
        # up to rounding, as batches differ
        difference = np.asarray(best, dtype=int) - np.asarray(images[seed - 5], dtype=int)
        assert abs(difference).max() <= 1
        assert f'"seed": {seed}' in best.text["thinkdiff"]


def test_cobsat_keeps_them_apart(tmp_path):
    command("miniature", "cobsat", "--out", tmp_path / "data")
    line = (COBSAT, "run", "--mini", "--images", tmp_path / "data", "--out", tmp_path / "r",
            "--tasks", 1, "--shots", 2, "--limit", 2, "--steps", 2)
    command(*line)
    command(*line, "--best-of", 2)
    settings = read_json(tmp_path / "r/exps/thinkdiff-best-of-2_image/settings.json")
    assert settings["best_of"] == 2 and settings["scale"] == "miniature, best of 2 images"
    command(COBSAT, "table", "--mini", "--images", tmp_path / "data", "--results", tmp_path / "r",
            "--tasks", 1, "--shots", 2, "--limit", 2)
    page = (tmp_path / "r/results.md").read_text()
    single, best = page.split("best of 2 images")[0], page.split("best of 2 images", 1)[1]
    assert "thinkdiff-best-of-2" in best and "thinkdiff-best-of-2" not in single
