"""`python -m miniature check`: how good the stand-ins and ThinkDiff are on held-out pictures."""
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import models
import pipelines
import thinkdiff_clip
import thinkdiff_lvlm
from aligner import load_aligner
from cobsat_eval import DETAILS, KINDS, NOUNS, shown_word
from common import write_atomically, write_json
from miniature import clip, flux, t5, vlm
from miniature.pictures import held_out_image
from miniature.world import SIZE, with_article

# T5 tokens of a text, and the guidance that the miniature FLUX ignores and PixArt has
T5_LENGTH = 48
GUIDANCE = 3.0
WRONG = "#d0021b"


def check(args):
    """Prints the accuracies of the stand-ins and of ThinkDiff, and writes them to --json."""
    stand_ins = {"t5": t5, "clip": clip, "vlm": vlm, "flux": flux}
    weights = Path(args.weights)
    results = {}
    for name in (*stand_ins, "lvlm", "compose"):
        if args.names and name not in args.names:
            continue
        if name == "lvlm":
            paths = args.aligner or sorted(weights.glob("aligner-lvlm*"))
            results[name] = check_lvlm(weights, paths, args.count, decoder=args.decoder)
        elif name == "compose":
            paths = args.clip_aligner or sorted(weights.glob("aligner-clip*"))
            results[name] = check_compose(weights, paths, args.count, decoder=args.decoder)
        else:
            results[name] = stand_ins[name].check(weights, args.count)
        print(name, json.dumps(results[name], indent=1), flush=True)
    if args.json:
        write_json(args.json, {"count": args.count, **results})


def aligner_name(path):
    """What an aligner's folder is called: aligner-lvlm, or of a run, reference-aligner."""
    path = Path(path).resolve()
    return path.name if path.name.startswith("aligner-") else "-".join(path.parts[-2:])


def share(right):
    """Share of true values in a list, rounded."""
    return round(sum(right) / len(right), 4)


def save_grid(images, right, path):
    """Writes PIL images of SIZE px on one page, 20 a row; the wrong ones have a red cross."""
    cell = SIZE + 4
    grid = Image.new("RGB", (20 * cell, -(-len(images) // 20) * cell), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, is_right) in enumerate(zip(images, right, strict=True)):
        left, top = i % 20 * cell + 2, i // 20 * cell + 2
        grid.paste(image, (left, top))
        if not is_right:
            box = (left - 2, top - 2, left + SIZE + 1, top + SIZE + 1)
            pen.rectangle(box, outline=WRONG, width=2)
            for lean in (1, -1):
                pen.line((left + 5 - 4 * lean, top + 1, left + 5 + 4 * lean, top + 9), WRONG, 2)
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


def load_drawing(weights, decoder):
    """The FLUX or PixArt of a folder of stand-ins."""
    if decoder == "flux":
        return pipelines.load_flux(str(weights / "flux"), "cpu", torch.float32, t5_encoder=True)
    return pipelines.load_pipeline("PixArtSigmaPipeline", str(weights / "pixart"), "cpu",
                                   torch.float32)


def text_prompts(pipe, texts, decoder="flux"):
    """Prompts [(n, d_t5)] of texts: T5's outputs, for FLUX padded to T5_LENGTH."""
    flags = SimpleNamespace(decoder=decoder, t5_length=T5_LENGTH)
    return [pipelines.text_embeds(pipe, text, flags) for text in texts]


def draw_prompts(pipe, prompts, seeds, texts=None, batch=50, steps=28, true_cfg=3.0, desc="draw"):
    """A PIL image for each of the prompts (n, d_t5), of any lengths.

    texts: of the pooled CLIP embedding, empty if not given."""
    texts = texts or [""] * len(prompts)
    images = [None] * len(prompts)
    decoder = "flux" if type(pipe).__name__ == "FluxPipeline" else "pixart"
    for equal in pipelines.equal_lengths([*zip(prompts, range(len(prompts)), strict=True)], batch,
                                         desc, decoder):
        numbers = [i for _, i in equal]
        drawn = pipelines.generate_images(
            pipe, [prompt for prompt, _ in equal], [texts[i] for i in numbers],
            [seeds[i] for i in numbers], SIZE, steps, GUIDANCE, true_cfg)
        for i, image in zip(numbers, drawn, strict=True):
            images[i] = image
    return images


def shares_by_detail(right):
    """Share of true values, in all and for each detail; those take turns in `right`."""
    return {"all": share(right),
            **{detail: share(right[k::5]) for k, detail in enumerate(DETAILS) if right[k::5]}}


def check_lvlm(weights, aligner_paths, count, seed=0, batch=50, decoder="flux", **drawing):
    """ThinkDiff-LVLM on held-out in-context questions, judged by the mini CLIP: {name: shares}.

    A picture is right if CLIP sees the answer's noun and value, among ten each. vlm: the VLM's
    words name them. words: its words through T5's encoder (`--relay`). Then each aligner on its
    features; "of words": of the pictures that the words draw right, how many it draws right too.
    """
    questions = in_context_questions(count, seed)
    kinds = [kind for _, kind in questions]
    words, features = answer_questions(weights / "qwen2-vl", questions, batch)
    pipe = load_drawing(weights, decoder)
    judge = clip.load(weights)
    named = [vlm.names_kind(text, *kind) for text, kind in zip(words, kinds, strict=True)]
    result = {"n": count, "vlm": shares_by_detail(named)}
    by_words = None
    for path in (None, *aligner_paths):
        name = aligner_name(path) if path else "words"
        if path:
            aligner = load_aligner(path)
            with torch.no_grad():
                prompts = [aligner(x[None])[0] for x in features]  # (n, d_t5) each
        else:
            prompts = text_prompts(pipe, words, decoder)
        images = draw_prompts(pipe, prompts, range(count), batch=batch, desc=name, **drawing)
        found = clip.judge(*judge, images, [kind[0] for kind in kinds])
        right = [pair == kind[1:] for pair, kind in zip(found, kinds, strict=True)]
        result[name] = shares_by_detail(right)
        if path:
            both = [a and b for a, b in zip(by_words, right, strict=True)]
            result[name]["of words"] = round(sum(both) / max(1, sum(by_words)), 4)
        else:
            by_words = right
        save_grid(images, right, f"outputs/check-{decoder}-{name}.png")
    return result


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


def check_compose(weights, aligner_paths, count, seed=0, batch=50, decoder="flux", **drawing):
    """ThinkDiff-CLIP on held-out pictures, judged by the mini CLIP: {name: {prompt: shares}}.

    I: a picture alone, redrawn with its noun and its value. I + T: with the text "a NOUN" of
    another noun; `noun` counts where that noun is seen, `value` where the picture's value is.
    Beside it the picture alone and the text alone by the same two counts.
    """
    rng = random.Random(seed)
    tower = models.load_clip(str(weights / "clip"), "cpu", torch.float32)
    kinds = [KINDS[i % len(KINDS)] for i in rng.sample(range(max(count, len(KINDS))), count)]
    others = [rng.choice([noun for noun in NOUNS[detail] if noun != own])
              for detail, _, own in kinds]
    size = tower.config.image_size
    pixels = [thinkdiff_clip.preprocess(random_held_out(rng, kind), size) for kind in kinds]
    x = [thinkdiff_clip.image_tokens(tower, one[None])[0] for one in pixels]  # (17, d_vlm) each
    pipe = load_drawing(weights, decoder)
    judge = clip.load(weights)
    texts = [with_article(noun) for noun in others]
    t = text_prompts(pipe, texts, decoder)

    def judged(prompts, texts, nouns, name):
        """Draws the prompts; shares of pictures with these nouns, and with the pictures' own."""
        images = draw_prompts(pipe, prompts, range(count), texts, batch, desc=name, **drawing)
        found = clip.judge(*judge, images, [kind[0] for kind in kinds])
        wanted = [(kind[1], noun) for kind, noun in zip(kinds, nouns, strict=True)]
        right = [a == b for a, b in zip(found, wanted, strict=True)]
        save_grid(images[:200], right[:200], f"outputs/check-{decoder}-{name.replace(' ', '')}.png")
        return count_right(found, nouns, kinds), count_right(found, others, kinds)

    own = [kind[2] for kind in kinds]
    result = {"n": count, "T alone": judged(t, texts, others, "T alone")[0]}
    for path in aligner_paths:
        name, aligner = aligner_name(path), load_aligner(path)
        with torch.no_grad():
            x_aligned = [aligner(one[None])[0] for one in x]  # (17, d_t5) each
        both = [torch.cat(pair) for pair in zip(x_aligned, t, strict=True)]  # (65, d_t5) each
        alone, as_composed = judged(x_aligned, None, own, f"{name} I")
        result[name] = {"I": alone, "I, as I + T is counted": as_composed,
                        "I + T": judged(both, texts, others, f"{name} I + T")[0]}
    return result
