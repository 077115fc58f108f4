"""`python -m miniature check`: how good the stand-ins and ThinkDiff are on held-out pictures."""
import json
import os
import random
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import models
import pipelines
import thinkdiff_clip
import thinkdiff_lvlm
from aligner import load_aligner
from cobsat_eval import DETAILS, KINDS, NOUNS, shown_word
from common import REPO, write_atomically, write_json
from miniature import clip, flux, t5, vlm
from miniature.pictures import held_out_image
from miniature.world import SIZE, with_article

# T5 tokens of a text, and the guidance that the miniature FLUX ignores
T5_LENGTH = 48
GUIDANCE = 3.5


def check(args):
    """Prints the accuracies of the stand-ins and of ThinkDiff, and writes them to --json."""
    stand_ins = {"t5": t5, "clip": clip, "vlm": vlm, "flux": flux}
    weights = Path(args.weights)
    results = {}
    for name in (*stand_ins, "lvlm", "compose"):
        if args.names and name not in args.names:
            continue
        if name == "lvlm":
            results[name] = check_lvlm(
                weights, args.aligner or weights / "aligner-lvlm", args.count)
        elif name == "compose":
            results[name] = check_compose(
                weights, args.clip_aligner or weights / "aligner-clip", args.count)
        else:
            results[name] = stand_ins[name].check(weights, args.count)
        print(name, json.dumps(results[name], indent=1), flush=True)
    if args.json:
        write_json(args.json, {"count": args.count, **results})


def share(right):
    """Share of true values in a list, rounded."""
    return round(sum(right) / len(right), 4)


def save_grid(images, path):
    """Writes PIL images of SIZE px on one page, 20 a row."""
    grid = Image.new("RGB", (20 * SIZE, -(-len(images) // 20) * SIZE))
    for i, image in enumerate(images):
        grid.paste(image, (i % 20 * SIZE, i // 20 * SIZE))
    write_atomically(path, lambda temporary: grid.save(temporary, "PNG"))


def random_held_out(rng, kind):
    """A held-out picture of a kind (detail, value, noun), PIL."""
    return Image.fromarray(held_out_image(KINDS.index(kind), rng.randrange(10**5)))


# ---------------------------------------------------------------- ThinkDiff-LVLM
def in_context_questions(count, seed):
    """In-context questions on held-out pictures: [(parts of the context, kind of the answer)].

    2 and 4 shots in turn, the five details in turn; half ask for a value of a fixed noun, half for
    a noun with a fixed value (the ten tasks of CoBSAT). Not the benchmark's fixed list of prompts:
    that is cobsat_eval.py's.
    """
    questions = []
    for i in range(count):
        rng = random.Random(f"contexts {seed} {i}")
        detail = list(DETAILS)[i % 5]
        shots = 2 + 2 * (i // 5 % 2)
        by_value = i // 10 % 2 == 0
        words = rng.sample(DETAILS[detail] if by_value else NOUNS[detail], shots + 1)
        shared = rng.choice(NOUNS[detail] if by_value else DETAILS[detail])
        kinds = [(detail, word, shared) if by_value else (detail, shared, word) for word in words]
        parts = []
        for number, (word, kind) in enumerate(zip(words, kinds, strict=True), 1):
            separator = "\n\n" if number > 1 else ""
            parts.append(("text", f"{separator}Word {number}: {shown_word(word)}, "))
            if number <= shots:
                parts.append(("image", random_held_out(rng, kind)))
        questions.append((parts, kinds[-1]))
    return questions


@torch.no_grad()
def answer_questions(path, questions, batch):
    """The VLM's answers: their words, and their features [x (n, d_vlm)]."""
    model, processor = models.load_vlm(str(path), "cpu", torch.float32)
    words, features = [], []
    for start in tqdm(range(0, len(questions), batch), "answering"):
        chats = [thinkdiff_lvlm.context_messages(parts, thinkdiff_lvlm.INSTRUCTION)
                 for parts, _ in questions[start:start + batch]]
        inputs = models.encode_messages(processor, chats)
        y, x, lengths = thinkdiff_lvlm.generate_with_features(
            model, inputs, 64, ignore_eos=False, do_sample=False)
        for y_c, x_c, n in zip(y, x, lengths.tolist(), strict=True):
            words.append(processor.tokenizer.decode(y_c[:n], skip_special_tokens=True))
            features.append(x_c[:n])
    return words, features


def check_lvlm(weights, aligner_path, count, seed=0, batch=50, steps=28, true_cfg=3.0):
    """ThinkDiff-LVLM on held-out in-context questions, judged by the mini CLIP: {name: shares}.

    A picture is right if CLIP sees the answer's noun and value, among ten each. vlm: the VLM's
    words name them. relay: its words through T5's encoder. thinkdiff: its features through the
    aligner. "thinkdiff of relay": of the relay's right pictures, how many ThinkDiff gets right too.
    """
    questions = in_context_questions(count, seed)
    kinds = [kind for _, kind in questions]
    words, features = answer_questions(weights / "qwen2-vl", questions, batch)
    aligner = load_aligner(aligner_path)
    pipe = pipelines.load_flux(str(weights / "flux"), "cpu", torch.float32, t5_encoder=True)
    prompts = {"relay": [], "thinkdiff": []}
    for start in range(0, count, batch):
        texts = words[start:start + batch]
        prompts["relay"] += list(pipelines.t5_embeds(pipe, texts, T5_LENGTH))
    with torch.no_grad():
        prompts["thinkdiff"] = [aligner(x[None])[0] for x in features]  # (n, d_t5) each

    judge = clip.load(weights)
    right = {"vlm": [vlm.names_kind(text, *kind) for text, kind in zip(words, kinds, strict=True)]}
    for name, embeds in prompts.items():
        images = [None] * count
        jobs = list(zip(embeds, range(count), strict=True))
        for equal in pipelines.equal_lengths(jobs, batch, f"generating {name}"):
            seeds = [i for _, i in equal]
            generated = pipelines.generate_images(
                pipe, torch.stack([prompt for prompt, _ in equal]), [""] * len(equal), seeds,
                SIZE, steps, GUIDANCE, true_cfg)
            for i, image in zip(seeds, generated, strict=True):
                images[i] = image
        found = clip.judge(*judge, images, [kind[0] for kind in kinds])
        right[name] = [pair == kind[1:] for pair, kind in zip(found, kinds, strict=True)]
        save_grid(images, f"outputs/check-{name}.png")

    result = {name: share(values) for name, values in right.items()}
    both = [a and b for a, b in zip(right["relay"], right["thinkdiff"], strict=True)]
    result["thinkdiff of relay"] = round(sum(both) / max(1, sum(right["relay"])), 4)
    for k, detail in enumerate(DETAILS):
        result[detail] = {name: share(values[k::5]) for name, values in right.items()}
    return {**result, "n": count, "aligner": os.path.relpath(aligner_path, REPO)}


# ---------------------------------------------------------------- ThinkDiff-CLIP
def count_right(found, nouns, kinds):
    """Shares of pictures with the noun, the picture's value and both right; also for each detail.

    found: [(value, noun)] that CLIP sees. nouns: the noun expected of each. kinds: those of the
    pictures in the prompts.
    """
    rows = []
    for (value, noun), expected, kind in zip(found, nouns, kinds, strict=True):
        rows.append((noun == expected, value == kind[1], (value, noun) == (kind[1], expected)))

    def shares(rows):
        if not rows:
            return {}
        columns = [share(column) for column in zip(*rows, strict=True)]
        return dict(zip(("noun", "value", "both"), columns, strict=True))

    result = shares(rows)
    for detail in DETAILS:
        of_detail = [row for row, kind in zip(rows, kinds, strict=True) if kind[0] == detail]
        result[detail] = shares(of_detail)
    return result


def check_compose(weights, aligner_path, count, seed=0, batch=50, steps=28, true_cfg=3.0):
    """ThinkDiff-CLIP on held-out pictures, judged by the mini CLIP: {prompt: shares}.

    I: a picture alone, redrawn with its noun and its value. I + T: with the text "a NOUN" of
    another noun; `noun` counts where that noun is seen, `value` where the picture's value is.
    Beside it the picture alone and the text alone by the same two counts.
    """
    rng = random.Random(seed)
    tower = models.load_clip(str(weights / "clip"), "cpu", torch.float32)
    kinds = [KINDS[i % len(KINDS)] for i in rng.sample(range(max(count, len(KINDS))), count)]
    others = [rng.choice([noun for noun in NOUNS[detail] if noun != own])
              for detail, _, own in kinds]
    aligner = load_aligner(aligner_path)
    pipe = pipelines.load_flux(str(weights / "flux"), "cpu", torch.float32, t5_encoder=True)
    judge = clip.load(weights)
    size = tower.config.image_size
    pixels = [thinkdiff_clip.preprocess(random_held_out(rng, kind), size) for kind in kinds]

    def generate(name):
        """One picture for each kind, from the image, the text or both."""
        images = []
        for start in tqdm(range(0, count, batch), f"generating {name}"):
            seeds = list(range(start, min(start + batch, count)))
            words = ["" if name == "I" else with_article(others[i]) for i in seeds]
            prompt = []
            with torch.no_grad():
                if name != "T alone":
                    x = torch.stack([pixels[i] for i in seeds])  # (B, 3, 64, 64)
                    x = thinkdiff_clip.image_tokens(tower, x)  # (B, 17, d_vlm)
                    prompt.append(aligner(x))  # (B, 17, d_t5)
                if name != "I":
                    prompt.append(pipelines.t5_embeds(pipe, words, T5_LENGTH))
            images += pipelines.generate_images(
                pipe, torch.cat(prompt, 1), words, seeds, SIZE, steps, GUIDANCE, true_cfg)
        return images

    result = {}
    for name in ("I", "I + T", "T alone"):
        images = generate(name)
        found = clip.judge(*judge, images, [kind[0] for kind in kinds])
        if name == "I":
            result["I"] = count_right(found, [kind[2] for kind in kinds], kinds)
            result["I, as I + T is counted"] = count_right(found, others, kinds)
        else:
            result[name] = count_right(found, others, kinds)
        save_grid(images[:200], Path("outputs") / f"check-{name.replace(' ', '')}.png")
    return {**result, "n": count, "aligner": os.path.relpath(aligner_path, REPO)}
