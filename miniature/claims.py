"""`python -m miniature claims`: the claims of the paper, and what features hold, in the miniature.

Everything is a job: a function of this file whose result is one JSON file in OUT/finished. Two
processes work through the jobs; one that is finished is not done again, a training resumes.

    OUT/images, OUT/data       5,000 images, and the features that prepare_data.py makes of them
    OUT/answers/NAME           the VLM's answers (or CLIP's tokens) to one set of questions
    OUT/runs/NAME-seedS        an aligner, trained by the command line of thinkdiff_*.py
    OUT/claims.md, claims.json, *.png, times.json      written at the end (claims_report.py)
"""
import contextlib
import functools
import hashlib
import multiprocessing
import os
import random
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer

import aligner as aligner_module
import common
import encoder_term
import models
import pipelines
import prepare_data
import thinkdiff_clip
import thinkdiff_lvlm
import training_data
from aligner import Aligner, load_aligner
from cobsat_eval import ANIMALS, DETAILS, KINDS, NOUNS, OBJECTS, oracle_text, shown_word
from common import UserError, read_json, write_json, write_tensors
from miniature import clip, flux, vlm
from miniature.__main__ import FAST_MALLOC, run_script
from miniature.check import T5_LENGTH, draw_prompts, in_context_questions, random_held_out
from miniature.pictures import held_out_image
from miniature.world import caption, with_article

# what is measured, and how much of it; all of it decides the figures
SIZES = {
    "images": 5000, "questions": 150, "pictures": 100, "flux_steps": 10, "seeds": 3,
    # training steps of ThinkDiff-LVLM, of its long runs with their checkpoints, of ThinkDiff-CLIP
    "lvlm": 300, "long": 800, "checkpoints": [100, 200, 400], "clip": 750,
    "samples": [250, 1000],
    # beside the default, 40
    "tokens": [16, 64],
    "hard": 100, "noise": [0.3, 0.5, 0.7], "blend": [0.3, 0.4, 0.45],
    "shared": 60, "candidates": 24, "draws": 2, "best_of": 8,
    "captions": 6000, "reader_steps": 1500, "plain_kinds": 200, "per_kind": 8, "redrawn_kinds": 50,
}
# those of the harder questions that are also drawn
DRAWN_LEVELS = ("blend 0.4",)
# paper's and with the encoder term, with the lambdas of the shipped aligners
RECIPES = {"lvlm": ("paper", "encoder-1-long"), "clip": ("clip-paper", "clip-encoder-2")}
# [T5(words) ; x'], laid out as Eq. 5
WORDS_TOO = f"words + {RECIPES['lvlm'][1]}"
STATISTICS = ("brightness", "red", "green", "blue", "area", "place")
# conditions of example images: statistic, and whether the highest or lowest of many draws
CONDITIONS = {"large": ("area", 1), "small": ("area", -1),
              "light": ("brightness", 1), "dark": ("brightness", -1)}
# how far a color, 0..1, differs from the border's where the object is
OBJECT_CONTRAST = 0.15
BATCH = 50


class Place(NamedTuple):
    """Where results go and where the stand-ins are."""
    out: Path
    weights: Path


class Job(NamedTuple):
    """function(place, **arguments) -> what OUT/finished/NAME.json holds."""
    name: str
    function: callable
    arguments: dict


class Run(NamedTuple):
    """A variant of training. data: of data_sets; replacement: of REPLACEMENTS; steps: of SIZES."""
    name: str
    flags: tuple = ()
    data: str = "features"
    replacement: str = ""
    variant: str = "lvlm"
    steps: str = "lvlm"


# ---------------------------------------------------------------- what is compared
def data_sets():
    """{name: flags of prepare_data.py}."""
    sets = {"features": (), "input": ("--features", "input")}
    sets |= {f"tokens-{n}": ("--tokens", n) for n in SIZES["tokens"]}
    return sets | {f"samples-{n}": ("--count", n) for n in SIZES["samples"]}


def training_runs():
    """All variants of training, [Run]."""
    def clip_run(name, *flags):
        return Run(f"clip-{name}", flags, variant="clip", steps="clip")

    runs = [Run("paper"), Run("paper-long", steps="long"),
            Run("encoder-1-long", ("--encoder-loss", 1), steps="long"),
            Run("norm-default", ("--norm", "default")),
            Run("norm-none", ("--norm", "none")), Run("masking-none", ("--masking", "none")),
            Run("input", ("--features", "input"), "input"),
            Run("scattered", replacement="scattered"), Run("sentences", replacement="sentences"),
            Run("deeper", replacement="deeper"),
            clip_run("paper"), clip_run("norm-default", "--norm", "default"),
            clip_run("norm-none", "--norm", "none")]
    runs += [Run(f"tokens-{n}", data=f"tokens-{n}") for n in SIZES["tokens"]]
    runs += [Run(f"hidden-{n}", ("--hidden", n)) for n in (32, 256)]
    runs += [Run(f"encoder-{weight}", ("--encoder-loss", weight)) for weight in (1, 2)]
    runs.append(clip_run("encoder-2", "--encoder-loss", 2))
    return runs + [Run(f"samples-{n}", data=f"samples-{n}") for n in SIZES["samples"]]


def hard_levels():
    """[(name of a set of harder questions, corruption, level)]."""
    return [(f"{corruption} {level}", corruption, level)
            for corruption in ("noise", "blend") for level in SIZES[corruption]]


def all_jobs():
    """Three lists of jobs; each list needs the results of those before it."""
    seeds = range(SIZES["seeds"])
    first = [Job(f"data {name}", prepare, {"name": name, "flags": flags})
             for name, flags in data_sets().items()]
    first += [Job("main", answer_main, {"name": "main"}),
              Job("main-input", answer_main, {"name": "main-input", "features": "input"}),
              Job("pictures", encode_pictures, {}), Job("plain", describe_plain, {}),
              Job("reader", train_reader, {})]
    first += [Job(f"sampled-{k}", answer_main, {"name": f"sampled-{k}", "sample": k})
              for k in range(SIZES["draws"])]
    first += [Job(name, answer_hard, {"name": name, "corruption": corruption, "level": level})
              for name, corruption, level in hard_levels()]
    first += [Job(name, answer_shared, {"condition": name}) for name in CONDITIONS]

    # RECIPES first: what they draw is of interest before the rest is done
    shown = [name for names in RECIPES.values() for name in names]
    runs = sorted(training_runs(), key=lambda run: run.name not in shown)
    second = [Job(f"{run.name}-seed{seed}", train_and_judge, {"run": run, "seed": seed})
              for run in runs for seed in seeds]

    drawn = [("main", "words", 0), ("main", "oracle", 0)]
    drawn += [(name, "words", 0) for name in (*CONDITIONS, *DRAWN_LEVELS)]
    for recipe in RECIPES["lvlm"]:
        drawn += [(name, recipe, seed) for name in (*CONDITIONS, *DRAWN_LEVELS) for seed in seeds]
    drawn += [(name, WORDS_TOO, seed) for name in (*CONDITIONS, "main") for seed in seeds]
    drawn += [("redrawn", recipe, seed) for recipe in RECIPES["clip"] for seed in seeds]
    drawn += [(f"sampled-{k}", method, 0) for k in range(SIZES["draws"])
              for method in ("words", *RECIPES["lvlm"])]
    third = [Job(f"draw {answers}, {method}, seed {seed}", draw_answers,
                 {"answers": answers, "method": method, "seed": seed})
             for answers, method, seed in drawn]
    third.append(Job("best of", draw_best_of, {"recipe": RECIPES["lvlm"][0]}))
    return first, second, [*third, Job("kept", predict_statistics, {})]


# ---------------------------------------------------------------- what is no flag of `train`
def scattered_split(x, y, position, args):
    """As thinkdiff_lvlm.split, but any s tokens are read, in order, and the others written."""
    rng = random.Random(f"{args.seed} {position}")
    s = rng.randint(1, len(y) - 1)
    read = torch.zeros(len(y), dtype=torch.bool)
    read[rng.sample(range(len(y)), s)] = True
    return x[read], y[read], y[~read]


@functools.cache
def sentence_ends(vlm_path):
    """The VLM's tokens (n,) that hold a full stop."""
    tokenizer = AutoTokenizer.from_pretrained(vlm_path)
    return torch.tensor([i for i in range(len(tokenizer)) if "." in tokenizer.decode([i])])


def sentence_split(x, y, position, args):
    """As thinkdiff_lvlm.split, but the prefix ends with a sentence; without one anywhere."""
    ends = torch.isin(y[:-1], sentence_ends(args.vlm)).nonzero()[:, 0].tolist()
    rng = random.Random(f"{args.seed} {position}")
    s = rng.choice(ends) + 1 if ends else rng.randint(1, len(y) - 1)
    return x[:s], y[:s], y[s:]


class DeeperAligner(Aligner):
    """An Aligner with one more linear layer and GELU."""

    def __init__(self, d_vlm: int, d_t5: int, norm="t5", eps=1e-6, hidden: int | None = None):
        super().__init__(d_vlm, d_t5, norm, eps, hidden)
        hidden = hidden or d_t5
        self.net = nn.Sequential(*self.net[:2], nn.Linear(hidden, hidden), nn.GELU(), *self.net[2:])

    def init_norm(self, t5_norm_weight):
        if self.norm == "t5":
            self.net[5].weight.data.copy_(t5_norm_weight)


# {bytes of an image or an answer: what a frozen model makes of it}, for all trainings of a process
KEPT = {}


def kept_image_tokens(clip_tower, pixels, image_tokens=thinkdiff_clip.image_tokens):
    """thinkdiff_clip.image_tokens, computed once for each image."""
    keys = [one.numpy().tobytes() for one in pixels]
    for key, one in zip(keys, pixels, strict=True):
        if key not in KEPT:
            KEPT[key] = image_tokens(clip_tower, one[None])[0]
    return torch.stack([KEPT[key] for key in keys])


def kept_targets(samples, tokenizers, t5, matched_targets=encoder_term.matched_targets):
    """encoder_term.matched_targets, computed once for each answer."""
    targets, weights = [], []
    for x, first, rest in samples:
        y = torch.cat([first, rest])
        key = y.numpy().tobytes()
        if key not in KEPT:
            KEPT[key] = matched_targets([(x, y, y[:0])], tokenizers, t5)
        e, weight, _ = KEPT[key]
        targets.append(e[0, :len(first)])
        weights.append(weight[0, :len(first)])
    return pad_sequence(targets, True), pad_sequence(weights, True), False


def kept_sample(data, i, read=training_data.ImageCaptionDataset.__getitem__):
    """A sample of an ImageCaptionDataset, decoded once."""
    if not hasattr(data, "kept"):
        data.kept = {}
    if i not in data.kept:
        data.kept[i] = read(data, i)
    return data.kept[i]


# {name: [(object, name of its attribute, what takes its place)]}
REPLACEMENTS = {
    "": [],
    "lvlm": [(encoder_term, "matched_targets", kept_targets)],
    "scattered": [(thinkdiff_lvlm, "split", scattered_split)],
    "sentences": [(thinkdiff_lvlm, "split", sentence_split)],
    "deeper": [(thinkdiff_lvlm, "Aligner", DeeperAligner),
               (aligner_module, "Aligner", DeeperAligner)],
    "clip": [(thinkdiff_clip, "image_tokens", kept_image_tokens),
             (training_data.ImageCaptionDataset, "__getitem__", kept_sample)],
}


def replaced(*names):
    """A context in which the functions of REPLACEMENTS take the place of the real ones."""
    stack = contextlib.ExitStack()
    for name in names:
        for of, attribute, replacement in REPLACEMENTS[name]:
            stack.enter_context(mock.patch.object(of, attribute, replacement))
    return stack


def call(script, *arguments):
    """Runs the main() of an imported script with a command line, in this process."""
    argv = [f"{script.__name__}.py", *map(str, arguments)]
    try:
        with mock.patch.object(sys, "argv", argv):
            script.main()
    finally:
        common.release_locks()


def prepare(place, name, flags):
    """Job: a data set of ThinkDiff-LVLM by prepare_data.py."""
    call(prepare_data, "lvlm", "--mini", "--images", place.out / "images", "--out",
         place.out / "data" / name, "--vlm", place.weights / "qwen2-vl", *flags)
    return {}


def train_aligner(place, run, seed):
    """Trains an aligner, unless that is done: its run's folder."""
    folder = place.out / "runs" / f"{run.name}-seed{seed}"
    if (folder / "aligner").exists():
        return folder
    lvlm = run.variant == "lvlm"
    steps = SIZES[run.steps]
    flags = [*run.flags, "--steps", steps, "--lr-horizon", steps, "--eval-every", -(-steps // 15)]
    if run.steps == "long":
        # checkpoints are judged, too
        flags += ["--save-every", min(SIZES["checkpoints"]), "--keep", 10**6]
    with replaced(run.variant, run.replacement):
        call(thinkdiff_lvlm if lvlm else thinkdiff_clip, "train", "--mini", "--resume",
             "--data", place.out / "data" / run.data if lvlm else place.out / "images",
             "--out", folder, "--vlm", place.weights / ("qwen2-vl" if lvlm else "clip"),
             "--t5", place.weights / "t5", "--seed", seed, *flags)
    return folder


# ---------------------------------------------------------------- questions and answers
@functools.cache
def tools(weights):
    """What draws and judges, loaded once a process."""
    t5_tokenizer, vlm_tokenizer = (AutoTokenizer.from_pretrained(weights / name)
                                   for name in ("t5", "qwen2-vl"))
    return SimpleNamespace(
        pipe=pipelines.load_flux(str(weights / "flux"), "cpu", torch.float32, t5_encoder=True),
        judge=clip.load(weights), t5=models.load_t5(str(weights / "t5"), "cpu", torch.float32),
        t5_tokenizer=t5_tokenizer, tokenizers=(vlm_tokenizer, t5_tokenizer))


def save_answers(place, name, kinds, x, y=None, **more):
    """Stores features [x (n, d)] and tokens [y (n,)] of a set; returns its job's result."""
    tensors = {f"x{i:05d}": one.clone() for i, one in enumerate(x)}
    tensors |= {f"y{i:05d}": one.clone() for i, one in enumerate(y or [])}
    write_tensors(place.out / "answers" / f"{name}.safetensors", tensors)
    return {"kinds": kinds, **more}


def read_answers(place, name, job=None):
    """The set `name`: kinds, x, y, and what else the job that made it returned."""
    tensors = common.read_tensors(place.out / "answers" / f"{name}.safetensors")
    result = read_json(place.out / "finished" / f"{job or name}.json")
    result["kinds"] = [tuple(kind) for kind in result["kinds"]]
    for letter in "xy":
        result[letter] = [tensors[key] for key in sorted(tensors) if key[0] == letter]
    return SimpleNamespace(**result)


@torch.no_grad()
def answer(place, name, chats, kinds, features="generated", sample=None, **more):
    """The VLM's answers to chats, greedy, or with temperature 0.6 from seeds of draw `sample`."""
    model, processor = models.load_vlm(str(place.weights / "qwen2-vl"), "cpu", torch.float32)
    words, xs, ys = [], [], []
    for start in range(0, len(chats), BATCH):
        inputs = models.encode_messages(processor, chats[start:start + BATCH])
        seeds = [(sample or 0) * 10**6 + i for i in range(start, start + len(inputs["input_ids"]))]
        y, x, lengths = thinkdiff_lvlm.generate_with_features(
            model, inputs, 64, ignore_eos=False, do_sample=sample is not None, seeds=seeds)
        lengths = lengths.clamp(min=1).tolist()
        ys += [y_c[:n] for y_c, n in zip(y, lengths, strict=True)]
        if features == "input":
            xs += models.prompt_features(model, inputs)
        else:
            xs += [x_c[:n] for x_c, n in zip(x, lengths, strict=True)]
    words = processor.tokenizer.batch_decode(ys, skip_special_tokens=True)
    named = [vlm.names_kind(text, *kind) for text, kind in zip(words, kinds, strict=True)]
    return save_answers(place, name, kinds, xs, ys, words=words, named=named, **more)


def context(words, images):
    """The chat of an in-context question: all words but the last with an image."""
    parts = []
    for i, word in enumerate(words):
        gap = "\n\n" if i else ""
        parts.append(("text", f"{gap}Word {i + 1}: {shown_word(word)}, "))
        parts += [("image", image) for image in images[i:i + 1]]
    return thinkdiff_lvlm.context_messages(parts, thinkdiff_lvlm.INSTRUCTION)


def answer_main(place, name, features="generated", sample=None):
    """Job: the in-context questions of `check`."""
    questions = in_context_questions(SIZES["questions"], 0)
    chats = [thinkdiff_lvlm.context_messages(parts, thinkdiff_lvlm.INSTRUCTION)
             for parts, _ in questions]
    return answer(place, name, chats, [kind for _, kind in questions], features, sample)


def sample_kinds(rng, i, shots):
    """Words and kinds of question i, shots + 1 each: a value is asked for, or a noun."""
    detail = list(DETAILS)[i % 5]
    by_value = i // 5 % 2 == 0
    words = rng.sample(DETAILS[detail] if by_value else NOUNS[detail], shots + 1)
    shared = rng.choice(NOUNS[detail] if by_value else DETAILS[detail])
    return words, [(detail, word, shared) if by_value else (detail, shared, word)
                   for word in words]


def corrupt(rng, image, kind, corruption, level):
    """An image with noise of standard deviation `level` (of 0..1), or blended with the share
    `level` of an image of another kind of the same detail."""
    pixels = np.asarray(image) / 255
    if corruption == "noise":
        noise = np.random.default_rng(rng.randrange(2**32)).standard_normal(pixels.shape)
        pixels = pixels + level * noise
    else:
        others = [other for other in KINDS if other[0] == kind[0]
                  and other[1] != kind[1] and other[2] != kind[2]]
        other = np.asarray(random_held_out(rng, rng.choice(others))) / 255
        pixels = (1 - level) * pixels + level * other
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def answer_hard(place, name, corruption, level):
    """Job: questions with corrupted examples, first all with two examples, then with four.

    The two examples are also among the four."""
    chats, kinds = {2: [], 4: []}, []
    for i in range(SIZES["hard"]):
        rng = random.Random(f"hard {i}")
        words, of_words = sample_kinds(rng, i, 4)
        images = [corrupt(rng, random_held_out(rng, kind), kind, corruption, level)
                  for kind in of_words[:4]]
        for shots in (2, 4):
            chats[shots].append(context(words[4 - shots:], images[4 - shots:]))
        kinds.append(of_words[-1])
    return answer(place, name, chats[2] + chats[4], kinds * 2)


def image_statistics(image):
    """[STATISTICS] of the object: mean colors 0..1, share of the image, middle from left 0..1.

    The object: the pixels whose color differs from the median of the border's."""
    pixels = np.asarray(image.convert("RGB")) / 255  # (64, 64, 3)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    is_object = abs(pixels - background).max(-1) > OBJECT_CONTRAST
    if not is_object.any():
        return [float(background.mean()), *background.tolist(), 0.0, 0.5]
    color = pixels[is_object].mean(0)
    place = np.nonzero(is_object)[1].mean() / (pixels.shape[1] - 1)
    return [float(color.mean()), *color.tolist(), float(is_object.mean()), float(place)]


def answer_shared(place, condition):
    """Job: questions whose examples share what no caption says, chosen among many images.

    Question i has the same words and kinds in all conditions."""
    statistic, sign = CONDITIONS[condition]
    column = STATISTICS.index(statistic)
    chats, kinds, examples = [], [], []
    for i in range(SIZES["shared"]):
        rng = random.Random(f"shared {i}")
        # color and style: the details with plain backgrounds
        words, of_words = sample_kinds(rng, 5 * i + 2 * (i % 4 // 2), 2)
        images = []
        for kind in of_words[:2]:
            candidates = [random_held_out(rng, kind) for _ in range(SIZES["candidates"])]
            images.append(max(candidates, key=lambda one: sign * image_statistics(one)[column]))
        chats.append(context(words, images))
        kinds.append(of_words[-1])
        examples.append(np.mean([image_statistics(one) for one in images], axis=0).tolist())
    return answer(place, condition, chats, kinds, examples=examples)


def tower_tokens(place, images):
    """CLIP's pooled tokens [(17, d_vlm)] of PIL images."""
    tower = models.load_clip(str(place.weights / "clip"), "cpu", torch.float32)
    size = tower.config.image_size
    return [thinkdiff_clip.image_tokens(tower, thinkdiff_clip.preprocess(image, size)[None])[0]
            for image in images]


def encode_pictures(place):
    """Job: held-out images for ThinkDiff-CLIP, with a caption, and another noun to compose with."""
    rng = random.Random("claims pictures")
    kinds = [KINDS[i % len(KINDS)] for i in rng.sample(range(max(SIZES["pictures"], len(KINDS))),
                                                       SIZES["pictures"])]
    others = [rng.choice([noun for noun in NOUNS[kind[0]] if noun != kind[2]]) for kind in kinds]
    captions = [caption(rng, *kind) for kind in kinds]
    images = [random_held_out(rng, kind) for kind in kinds]
    return save_answers(place, "pictures", kinds, tower_tokens(place, images), others=others,
                        captions=captions)


def describe_plain(place):
    """Job: images of the details color and style, as the VLM describes and as CLIP sees them."""
    kinds = [kind for kind in KINDS if kind[0] in ("color", "style")]
    kinds = kinds[::len(kinds) // SIZES["plain_kinds"]]
    kinds = [kind for kind in kinds for _ in range(SIZES["per_kind"])]
    images = [Image.fromarray(held_out_image(KINDS.index(kind), 2 * 10**5 + i))
              for i, kind in enumerate(kinds)]
    statistics = [image_statistics(image) for image in images]
    x = tower_tokens(place, images)
    save_answers(place, "plain-clip", kinds, x)
    # four images of every few kinds
    step = max(1, SIZES["plain_kinds"] // SIZES["redrawn_kinds"])
    chosen = [i for i in range(len(kinds)) if i // SIZES["per_kind"] % step == 0
              and i % SIZES["per_kind"] < 4]
    save_answers(place, "redrawn", kinds, [x[i] for i in chosen])
    chats = [thinkdiff_lvlm.caption_messages(image, 0) for image in images]
    return answer(place, "plain", chats, kinds, statistics=statistics, redrawn=chosen)


# ---------------------------------------------------------------- the reader
class TextReader(nn.Module):
    """Reads noun and value from T5's encoder outputs: attention pooling, one hidden layer."""

    def __init__(self, d_t5):
        super().__init__()
        self.score = nn.Linear(d_t5, 1)
        n_values = len(vlm.VALUES)
        self.net = nn.Sequential(nn.Linear(d_t5, 128), nn.GELU(), nn.Linear(128, 20 + n_values))

    def forward(self, x, mask):
        """x (B, N, d_t5), mask (B, N) bool -> scores (B, 20 nouns + 50 values)."""
        share = self.score(x)[..., 0].masked_fill(~mask, -torch.inf).softmax(-1)
        return self.net((share[..., None] * x).sum(1))


def reads_right(reader, x, kinds):
    """Whether the reader sees noun and value, among ten each, in each of [x (n, d_t5)]."""
    mask = pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in x], batch_first=True)
    with torch.no_grad():
        scores = reader(pad_sequence(x, batch_first=True), mask)
    right = []
    for row, (detail, value, noun) in zip(scores, kinds, strict=True):
        nouns = [(OBJECTS + ANIMALS).index(one) for one in NOUNS[detail]]
        values = [20 + vlm.VALUES.index((detail, one)) for one in DETAILS[detail]]
        right.append(NOUNS[detail][row[nouns].argmax()] == noun
                     and DETAILS[detail][row[values].argmax()] == value)
    return right


@torch.no_grad()
def encode_captions(place, rng, count):
    """Kinds and T5's encoder outputs [(n, d_t5)], without EOS, of random captions."""
    kinds = [rng.choice(KINDS) for _ in range(count)]
    texts = [caption(rng, *kind, create=rng.random() < 0.5) for kind in kinds]
    x = []
    for start in range(0, count, 200):
        outputs, tokens = encoder_term.encode(texts[start:start + 200], tools(place.weights).t5,
                                              tools(place.weights).t5_tokenizer)
        lengths = (tokens["attention_mask"].sum(1) - 1).tolist()
        x += [row[:n].clone() for row, n in zip(outputs, lengths, strict=True)]
    return kinds, x


def train_reader(place):
    """Job: the reader, trained on the encoder outputs of captions; accuracy on other captions."""
    rng = random.Random("reader")
    kinds, x = encode_captions(place, rng, SIZES["captions"])
    nouns = torch.tensor([(OBJECTS + ANIMALS).index(kind[2]) for kind in kinds])
    values = torch.tensor([vlm.VALUES.index(kind[:2]) for kind in kinds])
    torch.manual_seed(0)
    reader = TextReader(x[0].shape[1])
    optimizer = torch.optim.Adam(reader.parameters(), 3e-3)
    for _ in range(SIZES["reader_steps"]):
        batch = rng.sample(range(len(x)), min(128, len(x)))
        rows = [x[i] for i in batch]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True)
        scores = reader(pad_sequence(rows, True), mask)
        loss = (F.cross_entropy(scores[:, :20], nouns[batch])
                + F.cross_entropy(scores[:, 20:], values[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_tensors(place.out / "answers" / "reader.safetensors", reader.state_dict())
    kinds, x = encode_captions(place, rng, 500)
    return {"right": sum(reads_right(reader, x, kinds)) / 500}


def load_reader(place):
    """The trained TextReader."""
    weights = common.read_tensors(place.out / "answers" / "reader.safetensors")
    reader = TextReader(weights["score.weight"].shape[1])
    reader.load_state_dict(weights)
    return reader


# ---------------------------------------------------------------- aligners judged
@torch.no_grad()
def align(folder, x):
    """[x' (n, d_t5)] of [x (n, d_vlm)] by the aligner in a folder."""
    aligner = load_aligner(folder)
    return [aligner(one[None])[0] for one in x]


def draw_and_judge(place, prompts, kinds, texts=None, first=0):
    """Images of prompts [(n, d_t5)], noise of seeds first, first + 1, ..., and whether CLIP sees
    the kinds.

    FLUX's products are in bf16 if the CPU has them."""
    own = tools(place.weights)
    seeds = range(first, first + len(prompts))
    with flux.bf16_products():
        images = draw_prompts(own.pipe, prompts, seeds, texts, BATCH, SIZES["flux_steps"])
    found = clip.judge(*own.judge, images, [kind[0] for kind in kinds])
    return images, [pair == kind[1:] for pair, kind in zip(found, kinds, strict=True)]


@torch.no_grad()
def transfer(place, x_aligned, kinds, targets=None):
    """How near x' are to T5's encoder outputs, and what the reader reads in them.

    targets: of encoder_term, e (B, M, d_t5), weight (B, M) and whether e's nearest x' counts."""
    right = reads_right(load_reader(place), x_aligned, kinds)
    result = {"reader": sum(right) / len(right)}
    if targets:
        e, weight, nearest = targets
        # padding far from all: it is never the nearest
        padded = pad_sequence(x_aligned, batch_first=True, padding_value=1e3 * nearest)
        distance = encoder_term.distance(padded, e, weight, nearest) / weight.sum()
        if nearest:
            at = torch.cdist(e, padded).argmin(-1)
            padded = padded.gather(1, at[..., None].expand_as(e))
        cosine = F.cosine_similarity(padded, e, dim=-1)
        result |= {"cosine": ((weight * cosine).sum() / weight.sum()).item(),
                   "distance": distance.item()}
    return result


def train_and_judge(place, run, seed):
    """Job: an aligner with its curve, what it draws, and how near it is to T5's encoder."""
    folder = train_aligner(place, run, seed)
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]
    curve = [[int(row[0]), float(row[1]), float(row[2]) if row[2] else None] for row in rows]
    judge = judge_lvlm if run.variant == "lvlm" else judge_clip
    with replaced(run.replacement):
        return {"curve": curve, **judge(place, run, folder)}


def judge_lvlm(place, run, folder):
    """Which of the main questions are drawn right, also by the checkpoints of a long run."""
    own = tools(place.weights)
    set_name = "main-input" if run.data == "input" else "main"
    answers = read_answers(place, set_name)
    x_aligned = align(folder / "aligner", answers.x)
    result = {"right": draw_and_judge(place, x_aligned, answers.kinds)[1], "checkpoints": {}}
    targets = None
    if run.data != "input":
        samples = [(x, y, y[:0]) for x, y in zip(answers.x, answers.y, strict=True)]
        targets = encoder_term.matched_targets(samples, own.tokenizers, own.t5)
    result |= transfer(place, x_aligned, answers.kinds, targets)
    for step in SIZES["checkpoints"] if run.steps == "long" else ():
        x_aligned = align(folder / f"checkpoint-{step:07d}", answers.x)
        result["checkpoints"][step] = draw_and_judge(place, x_aligned, answers.kinds)[1]
    return result


def judge_clip(place, run, folder):
    """Which held-out images are redrawn right, and which composed right with another noun."""
    own = tools(place.weights)
    pictures = read_answers(place, "pictures")
    x_aligned = align(folder / "aligner", pictures.x)
    texts = [with_article(noun) for noun in pictures.others]
    composed = [torch.cat(pair) for pair in
                zip(x_aligned, pipelines.t5_embeds(own.pipe, texts, T5_LENGTH), strict=True)]
    wanted = [(*kind[:2], noun) for kind, noun in zip(pictures.kinds, pictures.others, strict=True)]
    captions = SimpleNamespace(caption=pictures.captions.__getitem__)
    weights = encoder_term.token_weights(captions, len(pictures.captions), own.t5_tokenizer, 0)
    samples = [(None, text, "") for text in pictures.captions]
    targets = encoder_term.nearest_targets(samples, own.t5_tokenizer, own.t5, weights)
    return {"right": draw_and_judge(place, x_aligned, pictures.kinds)[1],
            "composed": draw_and_judge(place, composed, wanted, texts)[1],
            **transfer(place, x_aligned, pictures.kinds, targets)}


def draw_answers(place, answers, method, seed):
    """Job: a set drawn by a method: words, oracle, a recipe of RECIPES or WORDS_TOO.

    right: CLIP sees the kind; statistics: of the drawn images."""
    of_set = read_answers(place, answers, "plain" if answers == "redrawn" else None)
    if answers == "redrawn":
        of_set.kinds = [of_set.kinds[i] for i in of_set.redrawn]
    texts = [oracle_text(kind) for kind in of_set.kinds] if method == "oracle" else of_set.words
    recipe = method.removeprefix("words + ")
    prompts = []
    if recipe != method or method in ("words", "oracle"):
        prompts.append([*pipelines.t5_embeds(tools(place.weights).pipe, texts, T5_LENGTH)])
    if method not in ("words", "oracle"):
        prompts.append(align(place.out / "runs" / f"{recipe}-seed{seed}" / "aligner", of_set.x))
    prompts = [torch.cat(parts) for parts in zip(*prompts, strict=True)]
    images, right = draw_and_judge(place, prompts, of_set.kinds)
    return {"right": right, "statistics": [image_statistics(image) for image in images]}


def draw_best_of(place, recipe, seed=0):
    """Job: the main questions drawn several times, each image scored as `--best-of` does."""
    answers = read_answers(place, "main")
    flags = SimpleNamespace(vlm=str(place.weights / "qwen2-vl"), dtype="float32", best_of=2,
                            quantize=False)
    score = pipelines.best_of_score(flags)
    prompts = align(place.out / "runs" / f"{recipe}-seed{seed}" / "aligner", answers.x)
    contexts = [{"words": words} for words in answers.words]
    result = {"right": [], "score": []}
    for draw in range(SIZES["best_of"]):
        images, right = draw_and_judge(place, prompts, answers.kinds, first=draw * 10**6)
        result["right"].append(right)
        result["score"].append([
            one for start in range(0, len(images), BATCH)
            for one in score(images[start:start + BATCH], contexts[start:start + BATCH])])
    return result


# ---------------------------------------------------------------- what is lost or kept
def within_kind(rows, kinds):
    """rows (n, d) minus the mean of all rows of the same kind; kinds: n numbers."""
    _, kinds = kinds.unique(return_inverse=True)
    sums = torch.zeros(int(kinds.max()) + 1, rows.shape[1], dtype=rows.dtype)
    sums.index_add_(0, kinds, rows)
    return rows - (sums / kinds.bincount()[:, None])[kinds]


def ridge_r2(x, y, kinds):
    """Held-out R^2 [a column of y each] of ridge regression within kinds.

    x (n, d), y (n, k) float64. Three fifths of the kinds are fitted, one chooses the penalty, and
    one is tested."""
    x, y = within_kind(x, kinds), within_kind(y, kinds)
    part = kinds.unique(return_inverse=True)[1] % 5
    fit, choose, test = part < 3, part == 3, part == 4
    x = x / x[fit].std(0).clamp(min=1e-6)

    def r2(w, rows):
        return 1 - (y[rows] - x[rows] @ w).square().sum(0) / y[rows].square().sum(0)

    solved = []
    for penalty in (1, 10, 100, 1000, 10_000):
        gram = x[fit].T @ x[fit] + penalty * torch.eye(x.shape[1], dtype=x.dtype)
        w = torch.linalg.solve(gram, x[fit].T @ y[fit])
        solved.append((r2(w, choose), r2(w, test)))
    chosen = torch.stack([one for one, _ in solved])  # (penalties, k)
    tested = torch.stack([one for _, one in solved])
    return tested.gather(0, chosen.argmax(0, keepdim=True))[0].tolist()


def predict_statistics(place):
    """Job: {source: [R^2 of STATISTICS]}, from x, x' and T5's outputs for the VLM's words.

    A row is an answer's first 8 tokens, or an image's 17."""
    plain = read_answers(place, "plain")
    index = torch.tensor([KINDS.index(kind) for kind in plain.kinds])
    y = torch.tensor(plain.statistics, dtype=torch.float64)
    t5_outputs = [*pipelines.t5_embeds(tools(place.weights).pipe, plain.words, T5_LENGTH)]
    clip_x = read_answers(place, "plain-clip", "plain").x
    sources = {"lvlm x": plain.x, "lvlm T5 of the words": t5_outputs, "clip x": clip_x}
    for variant, x in (("lvlm", plain.x), ("clip", clip_x)):
        for recipe in RECIPES[variant]:
            for seed in range(SIZES["seeds"]):
                folder = place.out / "runs" / f"{recipe}-seed{seed}" / "aligner"
                sources[f"{variant} x' {recipe} seed {seed}"] = align(folder, x)
    result = {}
    for name, rows in sources.items():
        n = 8 if name.startswith("lvlm") else len(rows[0])
        flat = torch.stack([F.pad(row[:n], (0, 0, 0, n - len(row[:n]))).flatten() for row in rows])
        result[name] = ridge_r2(flat.double(), y, index)
    return result


# ---------------------------------------------------------------- two processes
def start_worker(sizes):
    """Prepares a process: the sizes of this run, one thread, and an end with its parent."""
    SIZES.update(sizes)
    torch.set_num_threads(1)
    # as common.cli_main: what the libraries warn about is done on purpose
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def finished_file(out, name):
    """Where a job's result is."""
    return out / "finished" / f"{name}.json"


def run_job(place, job):
    """Does a job; what it prints goes to OUT/logs."""
    log = place.out / "logs" / f"{job.name}.log"
    log.parent.mkdir(exist_ok=True)
    with (open(log, "a") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        result = job.function(place, **job.arguments)
    write_json(finished_file(place.out, job.name), result)


def check_settings(place):
    """Raises UserError if OUT holds results of other sizes or weights."""
    hash = hashlib.blake2b(digest_size=8)
    for file in sorted(place.weights.rglob("*.safetensors")):
        if "aligner" not in str(file.relative_to(place.weights)):
            hash.update(file.read_bytes())
    settings, file = {"weights": hash.hexdigest(), **SIZES}, place.out / "settings.json"
    if file.exists() and read_json(file) != settings:
        raise UserError(f"{place.out} holds results of other weights or sizes: delete it, or "
                        "choose another --out")
    write_json(file, settings)


def claims(args):
    """`claims`: does all jobs that are left, then writes the report."""
    from miniature import claims_report
    place = Place(Path(args.out).resolve(), Path(args.weights).resolve())
    common.lock_folder(place.out)
    check_settings(place)
    os.environ.update(FAST_MALLOC)
    run_script("-m", "miniature", "draw", "--out", place.out / "images", "--count",
               SIZES["images"])
    stages = all_jobs()
    done = {job.name for stage in stages for job in stage
            if finished_file(place.out, job.name).exists()}
    processes = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_worker, (SIZES,))
    with processes, tqdm(total=sum(map(len, stages)), initial=len(done), unit="run") as bar:
        for stage in stages:
            running = [processes.submit(run_job, place, job) for job in stage
                       if job.name not in done]
            try:
                for future in as_completed(running):
                    future.result()
                    bar.update()
            except BaseException:
                processes.shutdown(wait=False, cancel_futures=True)
                raise
    claims_report.write(place)
