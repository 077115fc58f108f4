"""`python -m miniature gallery`: contexts, and what each recipe draws from them over four seeds."""
import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import models
import thinkdiff_clip
from aligner import load_aligner
from cobsat_eval import DETAILS, NOUNS, shown_word, wanted_text
from common import EXAMPLE, write_atomically
from miniature import clip
from miniature.check import (
    answer_questions,
    draw_prompts,
    load_drawing,
    random_held_out,
    text_prompts,
)
from miniature.world import with_article

# px of an image, and between blocks of them
IMAGE, GAP = 120, 20
SEEDS = range(4)
# seeds of the README's example
EXAMPLE_SEEDS = range(24)
RIGHT, WRONG, TEXT = "#1c7c37", "#b3261e", "#222222"
# {label of a block: (decoder, folder of an aligner)}; None: the words
RECIPES = {"paper's recipe": ("flux", "aligner-lvlm"),
           "with encoder term": ("flux", "aligner-lvlm-encoder"),
           "the VLM's words": ("flux", None)}
DECODERS = {"FLUX, paper's": ("flux", "aligner-lvlm"),
            "PixArt, paper's": ("pixart", "aligner-lvlm"),
            "FLUX, enc. term": ("flux", "aligner-lvlm-encoder"),
            "PixArt, enc. term": ("pixart", "aligner-lvlm-encoder")}
CLIP_RECIPES = {"paper's recipe": "aligner-clip", "with encoder term": "aligner-clip-encoder"}


# ---------------------------------------------------------------- what is drawn
def example_question():
    """The README's example: ([parts of the context], kind of the answer)."""
    line = json.loads((EXAMPLE / "lvlm.jsonl").read_text().splitlines()[0])
    parts = [(kind, Image.open(EXAMPLE / value).convert("RGB") if kind == "image" else value)
             for part in line["context"] for kind, value in part.items()]
    return parts, ("color", "red", "car")


def held_out_questions():
    """Five questions on held-out images, one for each detail, not selected: by fixed seeds."""
    questions = []
    for number, detail in enumerate(DETAILS):
        rng = random.Random(f"gallery {detail}")
        by_value = number % 2 == 1
        words = rng.sample(DETAILS[detail] if by_value else NOUNS[detail], 3)
        shared = rng.choice(NOUNS[detail] if by_value else DETAILS[detail])
        kinds = [(detail, word, shared) if by_value else (detail, shared, word) for word in words]
        parts = []
        for i, (word, kind) in enumerate(zip(words, kinds, strict=True), 1):
            gap = "\n\n" if i > 1 else ""
            parts.append(("text", f"{gap}Word {i}: {shown_word(word)}, "))
            if i < 3:
                parts.append(("image", random_held_out(rng, kind)))
        questions.append((parts, kinds[-1]))
    return questions


def draw_row(pipe, judge, prompt, kind, seeds, text=""):
    """[(image, whether it shows the kind)] of one prompt (n, d_t5) for each seed; with kind None
    [(image, None)]."""
    seeds = list(seeds)
    images = draw_prompts(pipe, [prompt] * len(seeds), seeds, [text] * len(seeds))
    if kind is None:
        return [(image, None) for image in images]
    found = clip.judge(*judge, images, [kind[0]] * len(seeds))
    return [(image, pair == kind[1:]) for image, pair in zip(images, found, strict=True)]


@torch.no_grad()
def lvlm_rows(weights, pipes, judge, seed, blocks=RECIPES):
    """[(context's cells, {label: images})] for the README's example and five other contexts."""
    questions = [example_question(), *held_out_questions()]
    words, features = answer_questions(weights / "qwen2-vl", questions, len(questions))
    rows, shares = [], {}
    for number, ((parts, kind), text, x) in enumerate(zip(questions, words, features, strict=True)):
        shown = [*parts[1::2], (None, "?\n\nwanted:\n" + wanted_text(kind).replace(" ", "\n"))]
        cells = [[said.strip().rstrip(",").split(": ")[-1], image] for (_, said), (_, image)
                 in zip(parts[::2], shown, strict=True)]
        drawn = {}
        for label, (decoder, folder) in blocks.items():
            if folder:
                prompt = load_aligner(weights / folder)(x[None])[0]  # (n, d_t5)
            else:
                prompt = text_prompts(pipes[decoder], [text], decoder)[0]  # (n, d_t5)
            seeds = [seed + i for i in (SEEDS if number else EXAMPLE_SEEDS)]
            images = draw_row(pipes[decoder], judge, prompt, kind, seeds)
            if not number:
                shares[label] = sum(right for _, right in images)
            drawn[label] = images[:len(SEEDS)]
        rows.append((cells, drawn))
    for label, n in shares.items():
        print(f"the README's red car, {label}: right with {n} of {len(EXAMPLE_SEEDS)} seeds")
    return rows


def compose_requests():
    """[(cells of the row, images, text, kind that is wanted)] for ThinkDiff-CLIP: a held-out image
    of each detail, in turn redrawn or composed with a text; then two composed, not judged."""
    requests = []
    for number, detail in enumerate(DETAILS):
        rng = random.Random(f"gallery {detail}")
        kind = (detail, rng.choice(DETAILS[detail]), rng.choice(NOUNS[detail]))
        noun = rng.choice([other for other in NOUNS[detail] if other != kind[2]])
        image, text, asked, wanted = random_held_out(rng, kind), "", "redrawn", kind
        if number % 2:
            text = with_article(noun)
            asked, wanted = f"+ {text}", (*kind[:2], noun)
        requests.append(([[wanted_text(kind), image], ["", asked]], [image], text, wanted))
    first, (label, second) = requests[1][0][0], requests[3][0][0]
    return [*requests, ([first, [f"+ {label}", second]], [first[1], second], "", None)]


def decoder_rows(weights, pipes, judge, seed):
    """Those of lvlm_rows through FLUX and through PixArt, with the same aligners."""
    return lvlm_rows(weights, pipes, judge, seed, DECODERS)


@torch.no_grad()
def clip_rows(weights, pipes, judge, seed):
    """The same for ThinkDiff-CLIP, of compose_requests."""
    tower, rows = models.load_clip(str(weights / "clip"), "cpu", torch.float32), []
    pipe = pipes["flux"]
    for cells, images, text, wanted in compose_requests():
        pixels = [thinkdiff_clip.preprocess(image, tower.config.image_size) for image in images]
        x = thinkdiff_clip.image_tokens(tower, torch.stack(pixels))  # (n, 17, d_vlm)
        drawn = {}
        for label, folder in CLIP_RECIPES.items():
            prompt = [*load_aligner(weights / folder)(x)]  # (17, d_t5) each
            if text:
                prompt.append(text_prompts(pipe, [text])[0])
            seeds = [seed + i for i in SEEDS]
            drawn[label] = draw_row(pipe, judge, torch.cat(prompt), wanted, seeds, text)
        rows.append((cells, drawn))
    return rows


# ---------------------------------------------------------------- the page
def count_right(rows):
    """{label: "3 of 4 right"} over the images of all rows that are judged."""
    lines = {}
    for label in rows[0][1]:
        judged = [right for _, drawn in rows for _, right in drawn[label] if right is not None]
        lines[label] = f"{sum(judged)} of {len(judged)} right"
    return lines


def mark(pen, left, top, is_right):
    """A frame, and a tick or a cross in its corner: legible without color, too. None: neither."""
    if is_right is None:
        return
    color = RIGHT if is_right else WRONG
    pen.rectangle((left, top, left + IMAGE - 1, top + IMAGE - 1), outline=color, width=3)
    pen.rectangle((left, top, left + 18, top + 18), fill=color)
    if is_right:
        pen.line([(left + 4, top + 9), (left + 8, top + 14), (left + 15, top + 4)], "white", 3)
    else:
        pen.line([(left + 4, top + 4), (left + 14, top + 14)], "white", 3)
        pen.line([(left + 4, top + 14), (left + 14, top + 4)], "white", 3)


def draw_page(rows, seed):
    """A row for each context: its images, then for each recipe a block of 2 x 2 seeds."""
    font, step = ImageFont.load_default(18), IMAGE + 4
    n_context = max(len(cells) for cells, _ in rows)
    labels = list(rows[0][1])
    starts = [n_context * step + 2 * GAP + i * (2 * step + GAP) for i in range(len(labels))]
    row_height = 2 * step + GAP
    page = Image.new("RGB", (starts[-1] + 2 * step, 60 + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(page)

    def paste(image, left, top):
        page.paste(image.resize((IMAGE, IMAGE), Image.LANCZOS), (left, top))

    pen.text((GAP, 8), f"context;\nseeds {seed} to {seed + len(SEEDS) - 1}", TEXT, font)
    for (label, line), left in zip(count_right(rows).items(), starts, strict=True):
        pen.text((left, 8), f"{label}:\n{line}", TEXT, font)
    for number, (cells, drawn) in enumerate(rows):
        top = 60 + number * row_height
        for i, (word, shown) in enumerate(cells):
            left, middle = GAP + i * step, top + step // 2
            center = left + IMAGE / 2
            pen.text((center, middle - 10), word, TEXT, font, anchor="ms")
            if isinstance(shown, str):
                pen.text((center, middle + IMAGE / 2), shown, TEXT, font, anchor="mm",
                         align="center")
            else:
                paste(shown, left, middle)
        for label, start in zip(labels, starts, strict=True):
            for i, (image, is_right) in enumerate(drawn[label]):
                place = start + i % 2 * step, top + i // 2 * step
                paste(image, *place)
                mark(pen, *place, is_right)
    return page


def gallery(args):
    """`gallery`: a PNG of ThinkDiff-LVLM, NAME-clip.png of ThinkDiff-CLIP, and NAME-decoders.png of
    FLUX and PixArt side by side."""
    weights, out = Path(args.weights), Path(args.out)
    pipes = {name: load_drawing(weights, name) for name in ("flux", "pixart")}
    judge = clip.load(weights)
    for rows, name in ((lvlm_rows, ""), (clip_rows, "-clip"), (decoder_rows, "-decoders")):
        path = out.with_stem(out.stem + name)
        found = rows(weights, pipes, judge, args.seed)
        print(*(f"{label}: {line}" for label, line in count_right(found).items()), sep="\n")
        page = draw_page(found, args.seed)
        write_atomically(path, lambda temporary, page=page: page.save(temporary, "PNG"))
        print(path)
