"""CoBSAT, in-context image generation (Zeng et al. 2024; paper section 4.2, Tables 1 and 2).

A prompt shows k words, each with an image, and one more word; a method draws the image that
follows; judges are asked for the detail and the object in it. `run` is `generate`, `judge` and
`table` in one go; the last two also take results that other projects wrote in CoBSAT's layout.

    python -m miniature cobsat --out data/cobsat
    python cobsat_eval.py run --mini --images data/cobsat --out results/mini
    torchrun --nproc_per_node 4 cobsat_eval.py run --images data/cobsat --out results/full
    python cobsat_eval.py judge --images data/cobsat --results results/full

Methods: `thinkdiff` (features of the VLM's answer -> aligner -> FLUX), `relay` (the answer's text
-> FLUX's own T5), `oracle` (the true answer's text -> T5: upper bound for this FLUX). Every step
is resumable. In --out:
    exps/METHOD_image/settings.json    how the images were made; other settings are refused
    exps/METHOD_image/shot_K/default/task_T/NAME.jpg, .json    as CoBSAT's own code reads them
    vlm_features/shot_K/task_T/NAME.safetensors    the VLM's answers, 0.7 MB each at full size
    verdicts/JUDGE/references.json, METHOD_image/shot_K/task_T.json    what the judges answered
    results.csv, results.json, results.md, judges.json, report.html, contact_sheet.png
"""
import startup

import base64
import functools
import hashlib
import io
import itertools
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor

from aligner import load_aligner
from common import (
    DTYPE_FLAG,
    MINI,
    MODEL_FLAGS,
    MODELS,
    REPO,
    Parser,
    UserError,
    add_command,
    cli_main,
    count,
    lock_folder,
    pick_device,
    positive,
    pretrained,
    pretrained_model,
    read_json,
    read_tensors,
    shared_store,
    torchrun_ranks,
    write_atomically,
    write_csv,
    write_json,
)
from images import open_image
from models import encode_messages, feature_width, load_vlm
from pipelines import (
    FLUX_FLAGS,
    SPEED,
    VIDEOS,
    add_decoder_flags,
    best_of_score,
    draw_batch,
    int8,
    load_decoder,
    pipeline_options,
    prompt_width,
    text_embeds,
)
from thinkdiff_lvlm import INFERENCE, INSTRUCTION, context_messages, generate_with_features
from training_data import digest

HUB = "https://huggingface.co/datasets/yzeng58/CoBSAT"

# ---------------------------------------------------------------- vocabulary and tasks
# CoBSAT's words. Their order is part of the benchmark: prompts and judges' answers are indices.
DETAILS = {
    "color": "yellow white red purple pink orange green brown blue black".split(),
    "background": "beach desert glacier volcano park gym waterfall space cave seafloor".split(),
    "style": "watercolor sketch pixel origami lego icon graffiti futuristic 3d old".split(),
    "action": "swim sleep sing run read fly eat drink cry angry".split(),
    "texture": "wood wicker sequined plastic paper metal leather lace denim ceramic".split(),
}
OBJECTS = "leaf hat cup chair car box book ball bag apple".split()
ANIMALS = "zebra tiger sheep pig monkey lion dog cow cat bird".split()
NOUNS = {detail: ANIMALS if detail in ("background", "action") else OBJECTS for detail in DETAILS}
# the 500 kinds of image
KINDS = [(detail, value, noun) for detail in DETAILS for value in DETAILS[detail]
         for noun in NOUNS[detail]]
SHOWN = {"3d": "wireframe", "park": "amusement park"}


def shown_word(label):
    """The word that stands for a label in prompts and questions: `3d` is shown as `wireframe`."""
    return SHOWN.get(label, label)


class Task(NamedTuple):
    """words_give_detail: the images then share the noun; otherwise it is the other way round."""
    name: str
    detail: str
    words_give_detail: bool


TASKS = {}
for _i, _detail in enumerate(DETAILS):
    TASKS[2 * _i + 1] = Task(f"{_detail.capitalize()}-I", _detail, True)
    TASKS[2 * _i + 2] = Task(f"{_detail.capitalize()}-II", _detail, False)
# in the order of the paper's tables
COLUMNS = [TASKS[number].name for number in (1, 3, 5, 7, 9, 2, 4, 6, 8, 10)]


# ---------------------------------------------------------------- prompts
class Prompt(NamedTuple):
    """name: of the output file; words: k + 1, as shown; pictures: k paths below --images;
    answer: (detail, value, noun) of the image to be drawn, as labels."""
    task: int
    shots: int
    number: int
    name: str
    words: list
    pictures: list
    answer: tuple


def reference_file(detail, value, noun):
    """Where the dataset keeps its image of a kind."""
    return f"datasets/{detail}_{noun}/{value}_{noun}.jpg"


@functools.cache
def shuffled_orders():
    """CoBSAT's 1,000 pairs of orders (x, theta) of 0..9, the same for all tasks and shots."""
    rng = random.Random(123)
    x, theta, out = list(range(10)), list(range(10)), []
    for _ in range(1000):
        # in place, as CoBSAT's own code does: each order is made from the one before
        rng.shuffle(x)
        rng.shuffle(theta)
        out.append((tuple(x), tuple(theta)))
    return out


def prompts(task_id, shots):
    """CoBSAT's 1,000 prompts [Prompt] of a task (1..10) with `shots` (1..8) demonstrations."""
    _, detail, words_give_detail = TASKS[task_id]
    by_words, by_images = DETAILS[detail], NOUNS[detail]
    if not words_give_detail:
        by_words, by_images = by_images, by_words
    out = []
    for number, (x, theta) in enumerate(shuffled_orders()):
        shared = by_images[theta[shots + 1]]
        labels = [by_words[i] for i in x[:shots + 1]]
        kinds = [(detail, label, shared) if words_give_detail else (detail, shared, label)
                 for label in labels]
        words = [shown_word(label) for label in labels]
        name = "_".join([str(number), shared, *words])
        pictures = [reference_file(*kind) for kind in kinds[:-1]]
        out.append(Prompt(task_id, shots, number, name, words, pictures, kinds[-1]))
    return out


def selected_prompts(args):
    """The prompts that args asks for, sorted so that a batch holds prompts of one shot count and
    number, whose lengths are alike: little of it is padding."""
    selected = []
    for shots, task in itertools.product(args.shots, args.tasks):
        selected += prompts(task, shots)[:args.limit]
    return sorted(selected, key=lambda p: (p.shots, p.number, p.task))


def context_parts(args, p):
    """A prompt as the VLM reads it: "Word 1: white, ", image, "\\n\\nWord 2: blue, ", ..."""
    parts = []
    for i, word in enumerate(p.words):
        parts.append(("text", "\n\n" * (i > 0) + f"Word {i + 1}: {word}, "))
        # the last word has no image
        parts += [("image", open_image(args.images / name)) for name in p.pictures[i:i + 1]]
    return parts


# The oracle's text: one fixed phrase for each detail.
ORACLE = {
    "color": "a {value} {noun}",
    "background": "a {noun} with a {value} background",
    "style": "a {noun} in {value} style",
    "action": "a {noun} that is {value}",
    "texture": "a {noun} made of {value}",
}
# actions that are not label + "ing"
ING = {"swim": "swimming", "run": "running", "angry": "angry"}


def oracle_text(answer):
    """A Prompt's answer as a sentence, such as "Create an image of a red car."."""
    detail, value, noun = answer
    value = ING.get(value, value + "ing") if detail == "action" else shown_word(value)
    phrase = ORACLE[detail].format(value=value, noun=noun)
    return "Create an image of " + re.sub(r"\ba (?=[aeiou])", "an ", phrase) + "."


# ---------------------------------------------------------------- judge's questions
def judge_question(detail, about_noun, caption=None):
    """CoBSAT's question about the main object or the detail of an image, word for word, two spaces
    before (1) included; options in its order. caption: in place of the image (its text mode)."""
    asked, options = f"{detail} (of the main object)", DETAILS[detail]
    if about_noun:
        asked, options = "main object", NOUNS[detail]
    before, where = "", "this image"
    if caption is not None:
        before = f"Image caption: {caption}. "
        where = f"{'this' if about_noun else 'the'} image based on the description"
    listed = "".join(f" ({i}){shown_word(label)}" for i, label in enumerate(options, 1))
    return (f"{before}What is the {asked} in {where}? Answer from the following options: {listed}. "
            "Answer the number only and do not include any other texts (e.g., 1).")


def read_number(text):
    """All digits of an answer as one number, 0 without any, as CoBSAT's own code reads it."""
    # int() takes at most 4300
    return int("".join(filter(str.isdecimal, text))[:4300] or 0)


def wanted_text(answer):
    """The right answer in tables and on the page."""
    return f"{shown_word(answer[1])} {answer[2]}"


# ---------------------------------------------------------------- files and settings
def image_file(args, model, p):
    return args.out / f"exps/{model}_image/shot_{p.shots}/default/task_{p.task}/{p.name}.jpg"


def model_name(args, method):
    """The name of a method's results: those of --best-of stand apart."""
    return method if args.best_of == 1 else f"{method}-best-of-{args.best_of}"


def is_complete(args, model, p):
    """Whether an image is finished: its JSON is written last."""
    file = image_file(args, model, p)
    return file.exists() and file.with_suffix(".json").exists()


def features_file(args, p):
    return args.out / f"vlm_features/shot_{p.shots}/task_{p.task}/{p.name}.safetensors"


@functools.cache
def warn(line):
    """Prints a line on stderr, the same one only once."""
    print(line, file=sys.stderr)


def read_if_sound(read, *args):
    """read(*args); None if there is no file, or, with a warning, if it is damaged or not ours."""
    try:
        return read(*args)
    except FileNotFoundError:
        return None
    except UserError as error:
        return warn(str(error))


def read_object(path, fields=()):
    """The object in a JSON file, with `fields`, {name: type}; {} if there is none."""
    return read_if_sound(read_json, path, dict(fields), "it is ignored") or {}


# what models are loaded from
MODEL_FILES = ".json .safetensors .bin .txt .model .jinja .pth .pt".split()


def fingerprint(path, files=None):
    """Identifies a model or dataset wherever it lies: its name and a hash of its files' names,
    sizes and last 64 kB (hashing a whole model takes minutes; a retrained one differs everywhere).
    What is not on this disk is identified by its name on the hub. files: None: a model's."""
    path = Path(path)
    if not path.exists():
        return str(path)
    if files is None:
        files = [file for file in (path, *path.rglob("*")) if file.suffix in MODEL_FILES
                 and "/." not in str(file)[len(str(path)):]]
    hash = hashlib.blake2b(digest_size=8)
    for file in sorted(file for file in files if file.is_file()):
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - 65536))
            hash.update(f"{file.name} {size} ".encode() + opened.read())
    return f"{path.name} {hash.hexdigest()}"


def check_settings(args, folders):
    """Records {folder: settings} in settings.json of the folders below --out.

    Results made with other settings raise UserError, before anything is written, or with
    --overwrite are deleted. Rank 0 checks, the other ranks wait for it."""
    files = {args.out / folder / "settings.json": settings for folder, settings in folders.items()}
    if torchrun_ranks()[0]:
        wait_until(lambda: all(read_object(file) == files[file] for file in files))
        return
    new = {file: read_object(file) for file in files if read_object(file) != files[file]}
    stale = []
    for file, found in new.items():
        made = [*file.parent.glob("shot_*"), *file.parent.glob("*_image"),
                *file.parent.glob("references.json"),
                *args.out.glob(f"verdicts/*/{file.parent.name}")]
        stale += made
        if made and not args.overwrite:
            now = files[file]
            changed = [f"{name} {found.get(name)}, now {now.get(name)}"
                       for name in {**found, **now} if found.get(name) != now.get(name)]
            made = f"with {'; '.join(changed)}" if found else "by something else"
            raise UserError(f"{file.parent} was made {made}: repeat the settings, choose another "
                            "--out, or --overwrite to make it anew")
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    # last: whatever is killed before leaves the old settings
    for file in new:
        write_json(file, files[file])


def wait_until(ready):
    """Waits for another rank to make ready() true, or for torchrun to end this one."""
    while not ready():
        time.sleep(1)


def wait_for_all(store, step):
    """Waits until all ranks have ended a step; torchrun ends them all if one fails."""
    store.add(step, 1)
    wait_until(lambda: store.add(step, 0) == torchrun_ranks()[1])


def need_references(args, names):
    """Raises UserError if a reference image is missing."""
    for file in (args.images / name for name in names):
        if not file.is_file():
            raise UserError(f"reference picture {file} is missing: unzip datasets.zip from {HUB} "
                            f"in {args.images} (miniature: python -m miniature cobsat --out "
                            f"{args.images})")


def split_batches(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]


def unfinished(batches, is_done):
    """The batches with a gap. They are computed again whole: the last bits of an item depend on its
    batch, and a resumed run ends with the same bits as one that was never stopped."""
    # a list: all the damaged ones of a batch are named
    return [batch for batch in batches if not all([is_done(item) for item in batch])]


def progress(batches, label):
    """The batches behind a progress bar, which rank 0 shows."""
    return tqdm(batches, label, disable=torchrun_ranks()[0] != 0)


# ---------------------------------------------------------------- generate
METHODS = ["thinkdiff", "relay", "oracle"]


def generate_settings(args):
    """{folder below --out: its settings}: all that decides the VLM's answers and the images."""
    vlm = {"vlm": fingerprint(args.vlm), "instruction": INSTRUCTION, "number_images": True,
           "max_new_tokens": args.max_new_tokens, "images": fingerprint(
               args.images / "datasets", [args.images / reference_file(*kind) for kind in KINDS])}
    # the scale decides in which table the results stand
    scale = args.scale if args.best_of == 1 else f"{args.scale}, best of {args.best_of} images"
    flux = {"scale": scale, args.decoder: fingerprint(vars(args)[args.decoder])}
    if args.best_of > 1:
        flux |= {"best_of": args.best_of, "chosen_by": fingerprint(args.vlm)}
    for name in ("size", "steps", "guidance", "true_cfg", "seed"):
        flux[name] = getattr(args, name)
    if args.cache:
        flux["cache"] = args.cache
    if args.quantize:
        vlm["quantize"] = flux["quantize"] = True
    if args.dtype != "auto":
        vlm["dtype"] = flux["dtype"] = args.dtype
    text = {"t5_length": args.t5_length}
    own = {"thinkdiff": {**vlm, "aligner": fingerprint(args.aligner)}, "relay": {**vlm, **text},
           "oracle": {**text, "phrases": "; ".join(ORACLE.values())}}
    folders = {f"exps/{model_name(args, method)}_image": {"method": method, **flux, **own[method]}
               for method in args.method}
    if set(args.method) != {"oracle"}:
        folders["vlm_features"] = vlm
    return folders


def answer_prompts(args, mine):
    """Writes the VLM's greedy answer to each prompt: features (n, d_vlm) and text, a file each."""
    batches = split_batches(mine, args.batch_size)
    batches = unfinished(batches, lambda p: read_if_sound(read_answer, args, p))
    if not batches:
        return
    device, dtype = pick_device(args.dtype)
    model, processor = load_vlm(args.vlm, device, dtype, **int8(args.quantize))
    for batch in progress(batches, "answer"):
        began = time.time()
        conversations = [context_messages(context_parts(args, p), INSTRUCTION) for p in batch]
        inputs = encode_messages(processor, conversations, number_images=True).to(device)
        # tokens (B, N), features (B, N, d_vlm), lengths (B,): tokens before EOS
        tokens, features, lengths = generate_with_features(
            model, inputs, args.max_new_tokens, ignore_eos=False, do_sample=False)
        seconds = (time.time() - began) / len(batch)
        for i, p in enumerate(batch):
            n = lengths[i].item()
            text = processor.tokenizer.decode(tokens[i, :n], skip_special_tokens=True).strip()
            # (n, d_vlm): without the state that predicts EOS, unless the answer is empty
            x = features[i, :max(n, 1)].contiguous().cpu()
            note = {"words": text, "seconds": str(seconds)}
            write_atomically(features_file(args, p), save({"x": x}, note))


def read_answer(args, p):
    """(features (n, d_vlm), text, seconds) of the VLM's answer to a prompt."""
    file, advice = features_file(args, p), "run `generate` again, which makes it anew"
    x = read_tensors(file, advice).get("x", torch.empty(0))
    with safe_open(file, "pt") as opened:
        note = opened.metadata() or {}
    try:
        if x.shape[1:] != (args.d_vlm,) or not len(x):
            raise ValueError
        return x, note["words"], float(note["seconds"])
    except (KeyError, ValueError):
        raise UserError(f"{file} is no answer of {args.vlm}: {advice}") from None


def image_batches(args, method, mine):
    """Batches still to be drawn, each of features, or of texts, of one length."""
    by_length = {}
    for p in mine:
        length = len(read_answer(args, p)[0]) if method == "thinkdiff" else args.t5_length
        by_length.setdefault(length, []).append(p)
    batches = []
    for _, same in sorted(by_length.items()):
        batches += split_batches(same, args.batch_size)
    return unfinished(batches, lambda p: is_complete(args, model_name(args, method), p))


def draw_images(args, method, batches, pipe, aligner, score_by):
    """Draws one method's images and writes them with their JSON. score_by: of --best-of."""
    name = model_name(args, method)
    for batch in progress(batches, f"draw {method}"):
        began = time.time()
        if method == "oracle":
            answers = [(None, oracle_text(p.answer), 0.0) for p in batch]
        else:
            answers = [read_answer(args, p) for p in batch]
        if method == "thinkdiff":
            x = torch.stack([features for features, _, _ in answers])
            with torch.no_grad():
                # (B, n, d_vlm) -> (B, n, d_t5)
                embeds = aligner(x.to(*pick_device(args.dtype)))
        else:
            # B x (n, d_t5)
            embeds = [text_embeds(pipe, text, args) for _, text, _ in answers]
        seeds = [args.seed + p.number for p in batch]
        said = [{"words": text} for _, text, _ in answers]
        images, _ = draw_batch(pipe, embeds, [""] * len(batch), seeds, args,
                               score_by and functools.partial(score_by, contexts=said))
        seconds = (time.time() - began) / len(batch)
        for p, image, (_, text, vlm_seconds) in zip(batch, images, answers, strict=True):
            if is_complete(args, name, p):
                continue
            file = image_file(args, name, p)
            write_atomically(file, functools.partial(image.save, format="JPEG", quality=95))
            write_json(file.with_suffix(".json"), {
                "description": text, "text_inputs": [f"{word}: " for word in p.words],
                "time": round(vlm_seconds + seconds, 3),
                "image_inputs": [str(args.images / name) for name in p.pictures]})


def generate(args):
    """`generate`: each method's images, this rank's share of the prompts."""
    if args.decoder in VIDEOS:
        raise UserError(f"--decoder {args.decoder} draws videos, and CoBSAT judges images")
    pipeline_options(args)
    mine = selected_prompts(args)
    need_references(args, {name for p in mine for name in p.pictures})
    rank, world_size, _ = torchrun_ranks()
    mine = mine[rank::world_size]
    # the folder's name in earlier versions
    if rank == 0 and (args.out / "thoughts").is_dir():
        (args.out / "thoughts").rename(args.out / "vlm_features")
    all_settings = generate_settings(args)
    # wrong models are known before anything is written and before the VLM has worked for hours
    d_t5, aligner = prompt_width(args), None
    if "vlm_features" in all_settings:
        args.d_vlm = feature_width(args.vlm)
    if "thinkdiff" in args.method:
        aligner = load_aligner(args.aligner, args.d_vlm, d_t5).to(*pick_device(args.dtype))
    check_settings(args, all_settings)
    if "vlm_features" in all_settings:
        answer_prompts(args, mine)
    work = {method: image_batches(args, method, mine) for method in args.method}
    work = {method: batches for method, batches in work.items() if batches}
    if not work:
        return
    # T5's encoder is for texts and for the empty prompt of classifier-free guidance
    t5_encoder = args.true_cfg > 1 or set(args.method) != {"thinkdiff"}
    pipe = load_decoder(args, *pick_device(args.dtype), t5_encoder)
    score_by = best_of_score(args)
    for method, batches in work.items():
        draw_images(args, method, batches, pipe, aligner, score_by)


# ---------------------------------------------------------------- judge
# CoBSAT's limit for an answer, which is usually one number
JUDGE_TOKENS = 512
# begins LLaVA-1.5's conversations; its chat template on the hub leaves it out
LLAVA_SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. The "
                "assistant gives helpful, detailed, and polite answers to the human's questions.")


def load_vlm_judge(path, device, dtype):
    """CoBSAT's judge: a function (B PIL images or descriptions, B answers, source of the task) ->
    B x {"detail", "object"}, the texts of its greedy answers to the two questions."""
    model = pretrained_model(AutoModelForImageTextToText, path, dtype=dtype, device_map=device)
    model.eval()
    processor = pretrained(AutoProcessor, path)
    processor.tokenizer.padding_side = "left"
    is_llava = model.config.model_type == "llava"
    system = {"role": "system", "content": [{"type": "text", "text": LLAVA_SYSTEM}]}

    @torch.no_grad()
    def answer_batch(shown, answers, _):
        said = [{} for _ in shown]
        for key, about_noun in (("detail", False), ("object", True)):
            conversations = []
            for item, (detail, _, _) in zip(shown, answers, strict=True):
                is_text = isinstance(item, str)
                question = judge_question(detail, about_noun, item if is_text else None)
                content = [{"type": "image", "image": item}] * (not is_text)
                content += [{"type": "text", "text": question}]
                conversations.append([system] * is_llava + [{"role": "user", "content": content}])
            # input_ids (B, P), padded on the left
            inputs = encode_messages(processor, conversations).to(device, dtype)
            tokens = model.generate(**inputs, max_new_tokens=JUDGE_TOKENS, do_sample=False,
                                    temperature=None, top_p=None, top_k=None)
            tokens = tokens[:, inputs["input_ids"].shape[1]:]
            texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for verdict, text in zip(said, texts, strict=True):
                verdict[key] = text.strip()
        return said
    return answer_batch


def load_clip_judge(path, device, _):
    """CoBSAT's CLIP judge, called like load_vlm_judge's; it answers with the options' numbers and
    the "similarity" to "{value} {noun}": cosine times CLIP's logit scale, at least 0."""
    # fp32, as CoBSAT's: bf16 would round the logit scale by 1 %
    model = pretrained_model(CLIPModel, path, dtype=torch.float32, device_map=device)
    model.eval()
    processor = pretrained(CLIPProcessor, path)

    @functools.cache
    def embed_texts(*texts):
        inputs = processor(text=list(texts), padding=True, return_tensors="pt").to(device)
        # (texts, d_clip)
        return normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    def best_option(x, labels):
        return str(1 + (embed_texts(*labels) @ x).argmax().item())

    @torch.no_grad()
    def answer_batch(images, answers, source):
        # the prompt's words are shown words, what its images share is a label
        shown = shown_word if source and TASKS[source[2]].words_give_detail else str
        inputs = processor(images=images, return_tensors="pt").to(device)
        # (B, d_clip)
        embeds = normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
        if not embeds.isfinite().all():
            raise UserError(f"{path} gives numbers that are not finite: download it again")
        said = []
        for x, (detail, value, noun) in zip(embeds, answers, strict=True):
            cosine = embed_texts(f"{shown(value)} {noun}") @ x
            similarity = (cosine * model.logit_scale.exp()).clamp(min=0).item()
            said.append({"detail": best_option(x, DETAILS[detail]),
                         "object": best_option(x, NOUNS[detail]),
                         "similarity": round(similarity, 4)})
        return said
    return answer_batch


LOAD_JUDGE = {"vlm": load_vlm_judge, "clip": load_clip_judge, "text": load_vlm_judge}
JUDGES = ["vlm", "clip"]


class JudgingTask(NamedTuple):
    """verdict_file: inside a judge's folder; source: (model, shots, task), None for the reference
    images; items: [(name, image file, answer)]."""
    verdict_file: str
    source: tuple
    items: list


def judging_tasks(args):
    """[JudgingTask]: the 500 reference images, then those of --models or of all that are there."""
    items = [(reference_file(*kind), args.images / reference_file(*kind), kind) for kind in KINDS]
    out = [JudgingTask("references.json", None, items)]
    found = sorted(path.parent.name.removesuffix("_image")
                   for path in args.out.glob("exps/*_image/shot_*"))
    if not (args.models or found):
        raise UserError(f"no results in {args.out}: expected {args.out}/exps/MODEL_image/shot_K/"
                        "default/task_T, as `generate` writes them")
    for model in dict.fromkeys(args.models or found):
        tasks = []
        for shots, task in itertools.product(args.shots, args.tasks):
            items = [(p.name, image_file(args, model, p), p.answer)
                     for p in prompts(task, shots)[:args.limit]]
            if items[0][1].parent.is_dir():
                file = f"{model}_image/shot_{shots}/task_{task}.json"
                tasks.append(JudgingTask(file, (model, shots, task), items))
        if not tasks:
            raise UserError(f"no pictures of {model} for these --shots and --tasks in "
                            f"{args.out}/exps/{model}_image")
        out += tasks
    return out


def read_verdicts(args, task):
    """{judge: {name: verdict}}; a verdict holds the hash of what was judged ("file") and "detail"
    and "object", the judge's answers, or "error". What is not as run_judge wrote it is left out."""
    read = {name: read_object(args.out / "verdicts" / name / task.verdict_file)
            for name in args.judge}
    return {judge: {name: verdict for name, verdict in verdicts.items()
                    if isinstance(verdict, dict)
                    and verdict.pop("hash", None) == digest(json.dumps(verdict).encode())}
            for judge, verdicts in read.items()}


def read_item(judge, source, path, answer, decode=True):
    """(verdict without answers, what the judge is shown: a PIL image, or for `text` the description
    beside it); what is missing or broken is None and an "error"."""
    if judge == "text" and source:
        path = path.with_suffix(".json")
    verdict = {"file": None}
    if not path.is_file():
        return {**verdict, "error": "missing"}, None
    try:
        data = path.read_bytes()
        verdict["file"] = digest(data)
        if not decode:
            return verdict, None
        if judge != "text":
            return verdict, open_image(data, path)
        text = oracle_text(answer)
        if source:
            text = read_json(path, {"description": str})["description"]
        return verdict, text.encode(errors="replace").decode()
    except (OSError, UserError) as error:
        return {**verdict, "error": str(error)}, None


def judge_batch(judge, task, batch, verdicts, load):
    """New verdicts on a batch of task.items; {} if `verdicts` are about the same content.

    It is compared by hash, so that an image that was replaced, repaired or deleted since is
    judged again, whatever its date. load() returns the judge."""
    # decoding takes longer than all the rest
    if all(verdicts.get(name, {}).get("file", 0)
           == read_item(judge, task.source, *item, decode=False)[0]["file"]
           for name, *item in batch):
        return {}
    new, readable = {}, []
    for name, *item in batch:
        new[name], shown = read_item(judge, task.source, *item)
        if "error" not in new[name]:
            readable.append((name, shown, item[1]))
        elif not task.source:
            raise UserError(f"{new[name]['error']}: get it again from {HUB}")
    if readable:
        names, shown, answers = zip(*readable, strict=True)
        for name, said in zip(names, load()(shown, answers, task.source), strict=True):
            new[name].update(said)
    return new


def run_judge(args, name, path, tasks):
    """Writes one judge's verdicts; its model is loaded when the first new image is found."""
    @functools.cache
    def load():
        return LOAD_JUDGE[name](path, *pick_device(args.dtype))
    for task in progress(tasks, f"judge {name}"):
        verdicts = read_verdicts(args, task)[name]
        for batch in split_batches(task.items, args.batch_size):
            new = judge_batch(name, task, batch, verdicts, load)
            if new:
                verdicts.update(new)
                write_json(args.out / "verdicts" / name / task.verdict_file, {
                    item: {**verdict, "hash": digest(json.dumps(verdict).encode())}
                    for item, verdict in verdicts.items()})


def judge_paths(args):
    """{judge: its model} for --judge. Raises UserError if one is not there; loads configs alone."""
    paths = {"vlm": args.judge_vlm, "clip": args.judge_clip, "text": args.judge_vlm}
    return {name: paths[name] for name in args.judge if feature_width(paths[name])}


def judge(args):
    """`judge`: each judge's verdicts on the reference images and on this rank's share of tasks."""
    references, *tasks = judging_tasks(args)
    need_references(args, [name for name, _, _ in references.items])
    rank, world_size, _ = torchrun_ranks()
    tasks = tasks[rank::world_size]
    if rank == 0:
        tasks.insert(0, references)
    paths = judge_paths(args)
    # version 2: LLaVA is asked to the character, CLIP's similarity is a logit
    check_settings(args, {f"verdicts/{name}": {"model": fingerprint(path), "version": 2}
                          for name, path in paths.items()})
    for name, path in paths.items():
        run_judge(args, name, path, tasks)


# ---------------------------------------------------------------- score
# of the bootstrap
RESAMPLES = 1000
METRICS = ("correct", "detail", "object")


def score_verdict(verdict, answer):
    """{"correct", "detail", "object"}: 0 or 1, and "says": the options that the judge named, `?`
    where it is none of the ten."""
    detail, value, noun = answer
    named = []
    for key, options in (("detail", DETAILS[detail]), ("object", NOUNS[detail])):
        named.append(dict(enumerate(options, 1)).get(read_number(verdict.get(key, ""))))
    says = " ".join(shown_word(label) if label else "?" for label in named)
    return {"correct": int(named == [value, noun]), "detail": int(named[0] == value),
            "object": int(named[1] == noun), "says": "" if "error" in verdict else says}


def judge_accuracy(verdicts, items):
    """A judge's own accuracies on the reference images: METRICS, and "correct" for each detail."""
    scores = [(answer[0], score_verdict(verdicts[name], answer)) for name, _, answer in items]
    shares = {metric: float(np.mean([s[metric] for _, s in scores])) for metric in METRICS}
    for detail in DETAILS:
        shares[detail] = float(np.mean([s["correct"] for d, s in scores if d == detail]))
    return shares


def result_row(source, name, answer, verdicts):
    """A row of results.csv. verdicts: {judge: its verdict}, the first is the primary judge."""
    model, shots, task = source
    scores = {judge: score_verdict(verdict, answer) for judge, verdict in verdicts.items()}
    primary, *others = scores
    row = {"method": model, "shots": shots, "task_id": task, "task": TASKS[task].name, "name": name,
           "wanted": wanted_text(answer), "picture": verdicts[primary].get("error", "ok")}
    row.update({metric: scores[primary][metric] for metric in METRICS})
    row["textual"], row["visual"] = row["detail"], row["object"]
    if not TASKS[task].words_give_detail:
        row["textual"], row["visual"] = row["object"], row["detail"]
    for judge in others:
        row.update({f"{judge}_{metric}": scores[judge][metric] for metric in METRICS})
    if others:
        row["agree"] = int(len({s["correct"] for s in scores.values()}) == 1)
    if "clip" in verdicts:
        row["similarity"] = verdicts["clip"].get("similarity", 0.0)
    row.update({f"{judge}_says": scores[judge]["says"] for judge in scores})
    return row


def result_rows(args):
    """(rows of results.csv, {judge: its accuracies on the reference images}).

    Raises UserError if a verdict is missing."""
    judged = [(task, read_verdicts(args, task)) for task in judging_tasks(args)]
    for (task, verdicts), judge in itertools.product(judged, args.judge):
        left, n = sum(name not in verdicts[judge] for name, _, _ in task.items), len(task.items)
        if left:
            raise UserError(f"{left} of {n} pictures are not judged in {args.out}/verdicts/{judge}/"
                            f"{task.verdict_file}: run `python cobsat_eval.py judge` with the same "
                            "--shots, --tasks, --limit and --judge first")
    (references, verdicts), *judged = judged
    accuracy = {judge: judge_accuracy(verdicts[judge], references.items) for judge in args.judge}
    rows = []
    for task, verdicts in judged:
        for name, _, answer in task.items:
            on_image = {judge: verdicts[judge][name] for judge in args.judge}
            rows.append(result_row(task.source, name, answer, on_image))
    return rows, accuracy


def score(rows, judge):
    """{method: {shots: score_tasks of its rows}} from the rows of results.csv."""
    groups = {}
    for row in rows:
        groups.setdefault(row["method"], {}).setdefault(str(row["shots"]), []).append(row)
    return {method: {shots: score_tasks(group, judge) for shots, group in by_shots.items()}
            for method, by_shots in groups.items()}


def score_tasks(rows, judge):
    """{task or "mean": {"correct": share, "correct_95": [low, high], ..., "n", "missing",
    "judge"}}.

    Intervals: percentile bootstrap over each task's prompts; a mean weights all tasks alike."""
    metrics = [key for key, value in rows[0].items()
               if isinstance(value, (int, float)) and key not in ("shots", "task_id")]
    rng = np.random.default_rng(0)
    stats, cells = {}, {}
    for task in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == task]
        # (n, metrics)
        values = np.array([[float(row[metric]) for metric in metrics] for row in group])
        n = len(values)
        # (RESAMPLES, metrics)
        resampled = rng.multinomial(n, [1 / n] * n, RESAMPLES) @ values / n
        missing = sum(row["picture"] != "ok" for row in group)
        stats[task] = values.mean(0), resampled, n, missing
    means, resampled, n, missing = zip(*stats.values(), strict=True)
    stats["mean"] = np.mean(means, 0), np.mean(resampled, 0), sum(n), sum(missing)
    for task, (mean, resampled, n, missing) in stats.items():
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0).round(4)
        cell = {metric: round(mean[i], 4) for i, metric in enumerate(metrics)}
        cell.update({f"{metric}_95": [low[i], high[i]] for i, metric in enumerate(metrics)})
        cells[task] = {**cell, "n": n, "missing": missing, "judge": judge}
    return cells


# ---------------------------------------------------------------- tables
# "correct" by CoBSAT's judge in the order of COLUMNS (paper, Tables 1 and 2)
PUBLISHED = {
    2: {
        "SEED-LLaMA": "0.680 0.348 0.203 0.182 0.196 0.287 0.467 0.297 0.261 0.163",
        "Emu": "0.065 0.051 0.057 0.052 0.078 0.062 0.109 0.081 0.092 0.074",
        "GILL": "0.171 0.054 0.069 0.063 0.074 0.010 0.043 0.024 0.022 0.040",
        "ThinkDiff-LVLM": "0.622 0.349 0.237 0.459 0.290 0.511 0.534 0.340 0.534 0.292",
    },
    4: {
        "SEED-LLaMA": "0.482 0.211 0.141 0.053 0.122 0.252 0.076 0.268 0.207 0.105",
        "Emu": "0.063 0.018 0.045 0.048 0.097 0.037 0.122 0.109 0.077 0.088",
        "GILL": "0.106 0.044 0.041 0.073 0.087 0.022 0.059 0.044 0.032 0.067",
        "ThinkDiff-LVLM": "0.638 0.362 0.254 0.434 0.317 0.610 0.590 0.432 0.664 0.332",
    },
}

# Means over the ten tasks (2-shot, 4-shot) that were published since, of which no task's value is
# known to us. They are from summaries of arXiv 2601.06169 (TBDN; the VLM's words are its baseline)
# and 2503.19312 (ImageGen-CoT, whose number of shots they do not say), not from the papers' tables.
# The 0.909 reported for the best of 16 images is chosen by an oracle: no method's accuracy, no row
PUBLISHED_MEANS = {
    "Qwen2-VL-7B's words through FLUX": (0.537, 0.614),
    "TBDN with Qwen2-VL-7B": (0.693, 0.767),
    "TBDN with InternVL3-8B": (0.683, 0.769),
    "ImageGen-CoT, fine-tuned on CoBSAT, shots unknown": (0.658, 0.658),
}


def scale_of(args, model):
    """The scale in a model's settings.json; --scale for one that another project wrote."""
    file = args.out / f"exps/{model}_image/settings.json"
    return read_object(file, {"scale": str}).get("scale", args.scale)


def with_interval(cell, metric):
    return "{:.3f} [{:.2f}, {:.2f}]".format(cell[metric], *cell[f"{metric}_95"])


def comparison_tables(args, scores, shots):
    """A table for each scale, best method first; published rows are full size."""
    columns = [*COLUMNS, "mean"]
    # {scale: [(mean, texts)]}, and the scales with rows of ours
    ranked, ours = {"full size": []}, set()
    for name, text in PUBLISHED.get(shots, {}).items():
        shares = [float(share) for share in text.split()]
        # 0.0575 is printed as 0.058
        shares.append(np.mean(shares) + 1e-9)
        texts = [f"{name} (published)", *(f"{share:.3f}" for share in shares)]
        ranked["full size"].append((shares[-1], texts))
    for name, means in PUBLISHED_MEANS.items() if shots in PUBLISHED else ():
        mean = means[shots == 4]
        texts = [f"{name} (published mean, from a summary)", *[""] * len(COLUMNS), f"{mean:.3f}"]
        ranked["full size"].append((mean, texts))
    for method, by_shots in scores.items():
        cells = dict(by_shots.get(str(shots), {}))
        if not cells:
            continue
        mean = cells["mean"]["correct"]
        # a mean over fewer tasks cannot be compared
        if len(cells) < len(columns):
            mean = 0
            del cells["mean"]
        texts = [with_interval(cells[c], "correct") if c in cells else "" for c in columns]
        scale = scale_of(args, method)
        ranked.setdefault(scale, []).append((mean, [f"{method} (this run)", *texts]))
        ours.add(scale)
    tables = []
    for scale, rows in reversed(ranked.items()):
        judge = "benchmark’s VLM judge"
        if scale in ours:
            judge = f"{args.judge[0].upper()} judge [95 % interval]"
        rows.sort(key=lambda row: -row[0])
        tables.append((f"{shots}-shot, {scale}: correct by the {judge}",
                       [["", *columns], *(texts for _, texts in rows)]))
    return tables


def make_tables(args, scores, accuracy):
    """[(title, [header, row, ...] of texts)]: comparisons, all metrics, and the judges."""
    tables = [table for shots in args.shots for table in comparison_tables(args, scores, shots)]
    rows = []
    for method, shots in ((method, shots) for method, group in scores.items() for shots in group):
        cells = scores[method][shots]
        mean = cells["mean"]
        metrics = [key for key in mean if f"{key}_95" in mean]
        counts = map(str, (len(cells) - 1, mean["n"], mean["missing"]))
        rows.append([method, shots, scale_of(args, method), *counts,
                     *(with_interval(mean, metric) for metric in metrics)])
    head = ["", "shots", "scale", "tasks", "n", "missing", *metrics]
    tables.append(("All metrics, mean over the tasks that were run [95 % interval]", [head, *rows]))
    rows = [["", *accuracy[args.judge[0]]]]
    for judge, shares in accuracy.items():
        name = f"{judge.upper()} judge" + " on their true sentences" * (judge == "text")
        rows.append([name, *(f"{share:.3f}" for share in shares.values())])
    tables.append(("The judges themselves on the 500 reference pictures", rows))
    return tables


def markdown_table(head, *rows):
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


def table(args):
    """`table`: results.csv, .json and .md, judges.json, report.html and contact_sheet.png."""
    if torchrun_ranks()[0]:
        return
    need_references(args, {name for p in selected_prompts(args) for name in p.pictures})
    rows, accuracy = result_rows(args)
    scores = score(rows, args.judge[0])
    tables = make_tables(args, scores, accuracy)
    text = "\n\n".join(f"### {title}\n\n{markdown_table(*lines)}" for title, lines in tables)
    bad = [f"{row['method']} {row['shots']}-shot {row['task']} {row['name']}: {row['picture']}"
           for row in rows if row["picture"] != "ok"]
    if bad:
        title = f"{len(bad)} missing or broken pictures, counted as wrong (all: results.csv)"
        bad = bad[:50]
        text += f"\n\n### {title}\n\n" + "\n".join(f"- {line}" for line in bad)
        tables.append((title, [["picture"], *([line] for line in bad)]))
    write_csv(args.out / "results.csv", rows[0], [row.values() for row in rows])
    write_json(args.out / "results.json", scores)
    write_json(args.out / "judges.json", accuracy)
    write_atomically(args.out / "results.md", text + "\n")
    write_report(args, rows, scores, tables)
    write_contact_sheet(args, rows)
    print(text + f"\n\n{args.out / 'report.html'}")


# ---------------------------------------------------------------- report and contact sheet
def try_open(file):
    """An image, or None if it is missing or broken."""
    try:
        return open_image(file)
    except UserError:
        return None


def data_url(file):
    """An image as a data: URL, at most 128 px long; None if it cannot be read."""
    image = try_open(file)
    if image:
        image.thumbnail((128, 128))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def gallery_card(args, p, rows):
    """What the page shows of a prompt. rows: those of results.csv about it."""
    drawn = {}
    for row in rows:
        file = image_file(args, row["method"], p)
        note = read_object(file.with_suffix(".json"), {"description": str})
        judges = {}
        for judge in args.judge:
            right = row["correct" if judge == args.judge[0] else f"{judge}_correct"]
            judges[judge] = [right, row[f"{judge}_says"] or row["picture"]]
        drawn[row["method"]] = {
            "picture": data_url(file), "right": row["correct"], "judges": judges,
            "said": note.get("description", ""),
            "disagree": row.get("agree") == 0}
    return {"task": TASKS[p.task].name, "shots": str(p.shots), "name": p.name, "words": p.words,
            "pictures": p.pictures, "wanted": wanted_text(p.answer), "drawn": drawn}


def write_report(args, rows, scores, tables):
    """report.html: a gallery of the first --gallery prompts of each task, bar charts and tables,
    in one file that needs no other. cobsat_report.html lays the data out."""
    by_prompt = {}
    for row in rows:
        key = row["task_id"], row["shots"], row["name"]
        by_prompt.setdefault(key, []).append(row)
    shown = [p for p in selected_prompts(args) if p.number < args.gallery]
    data = {
        "tasks": [TASKS[task].name for task in args.tasks],
        "columns": [*COLUMNS, "mean"],
        "shots": [str(shots) for shots in args.shots],
        "methods": {method: scale_of(args, method) for method in scores},
        "scores": scores,
        "tables": tables,
        "cards": [gallery_card(args, p, by_prompt.get((p.task, p.shots, p.name), []))
                  for p in tqdm(shown, "report", unit="prompt")],
        "prompts": len(by_prompt),
        "references": {name: data_url(args.images / name)
                       for name in sorted({name for p in shown for name in p.pictures})},
    }
    # "<" could end the script element that holds the data
    data = json.dumps(data).replace("<", "\\u003c")
    page = (REPO / "cobsat_report.html").read_text(encoding="utf-8")
    write_atomically(args.out / "report.html", page.replace("@@DATA@@", data))


def write_contact_sheet(args, rows):
    """contact_sheet.png: the first prompt of each task, as in the paper's Fig. 5; from six tasks
    on in two columns. rows: those of results.csv, which say what is right by the primary judge."""
    shots, side = min(args.shots), 128
    methods = list(dict.fromkeys(row["method"] for row in rows))
    right = {(row["method"], row["task_id"], row["name"]): row["correct"] for row in rows
             if row["shots"] == shots}
    width, height = side + 8, side + 32
    blocks = 1 + (len(args.tasks) > 5)
    n_rows, block = -(-len(args.tasks) // blocks), 24 + width * (shots + 1 + len(methods))
    sheet = Image.new("RGB", (block * blocks - 16, 8 + height * n_rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i_task, task in enumerate(args.tasks):
        p = prompts(task, shots)[0]
        wanted = f"{TASKS[task].name}\n\nwanted:\n{wanted_text(p.answer)}"
        # (label, its color, image file, text where there is no image)
        cells = [(p.words[i], "black", args.images / p.pictures[i], "") for i in range(shots)]
        cells.append((p.words[-1] + ", ?", "black", None, wanted))
        for method in methods:
            is_right = right.get((method, task, p.name))
            label = f"{method}: {'right' if is_right else 'wrong'}"
            color = "#1c7c37" if is_right else "#b3261e"
            cells.append((label, color, image_file(args, method, p), "no picture"))
        for column, (label, color, file, text) in enumerate(cells):
            left = 8 + block * (i_task // n_rows) + width * column
            top = 8 + height * (i_task % n_rows)
            pen.text((left, top), label, color, font)
            image = file and try_open(file)
            if image:
                sheet.paste(image.resize((side, side)), (left, top + 22))
                if color != "black":
                    box = (left, top + 22, left + side - 1, top + 21 + side)
                    pen.rectangle(box, outline=color, width=3)
            else:
                middle = (left + side / 2, top + 22 + side / 2)
                pen.text(middle, text, "#444444", font, anchor="mm", align="center")
    write_atomically(args.out / "contact_sheet.png", functools.partial(sheet.save, format="PNG"))


# ---------------------------------------------------------------- command line
def run_all(args):
    """`run`: generate, judge and table; each begins when all ranks have ended the one before."""
    judge_paths(args)
    args.models = [model_name(args, method) for method in args.method]
    store = shared_store()
    generate(args)
    wait_for_all(store, "generate")
    judge(args)
    wait_for_all(store, "judge")
    table(args)


# {title: (subcommands, rows of add_flags)}
FLAGS = {
    "questions": ("run generate judge table", [
        ("--images", Path, Path("data/cobsat"), Path("data/cobsat"),
         "folder that holds CoBSAT's `datasets` folder"),
        ("--shots", tuple("12345678"), ["2", "4"], ["2", "4"], "demonstrations in a prompt"),
        ("--tasks", ("all", *map(str, TASKS)), ["all"], ["all"], "1..10, or all"),
        ("--limit", count, 1000, 100, "prompts of each task and shot count"),
        ("--scale", ("full size", "miniature"), "full size", "miniature",
         "ranking for results without settings.json"),
    ]),
    "drawing": ("run generate", [
        ("--out", Path, Path("results/full"), Path("results/mini"), "folder of results"),
        ("--method", tuple(METHODS), METHODS[:1], METHODS[:1], "what to evaluate"),
        *MODEL_FLAGS["lvlm"],
        *(row for row in INFERENCE
          if row[0] in ("--max-new-tokens", "--size", "--t5-length", "--best-of")),
        *FLUX_FLAGS,
    ]),
    "run": ("run generate judge", [
        ("--overwrite", bool, False, False, "delete what was made with other settings"),
        ("--batch-size", positive, 8, 32, "prompts or images computed together"),
        DTYPE_FLAG,
    ]),
    "results": ("judge table", [
        ("--results", Path, Path("results/full"), Path("results/mini"), "folder of results"),
        ("--models", str, [], [], "methods or other projects' models; default: all there are"),
    ]),
    "judges": ("run judge table", [
        ("--judge", tuple(LOAD_JUDGE), JUDGES, JUDGES, "the first is the primary judge; text: the "
         "VLM judge reads the descriptions, CoBSAT's text mode, which the miniature cannot"),
    ]),
    "models of the judges": ("run judge", [
        ("--judge-vlm", str, MODELS["judge-vlm"], MINI["vlm"], "image-text-to-text model"),
        ("--judge-clip", str, MODELS["judge-clip"], MINI["clip"], "CLIP path or hub name"),
    ]),
    "report": ("run table", [
        ("--gallery", count, 100, 100, "prompts of each task and shot count in report.html"),
    ]),
    **{title: ("run generate", rows) for title, rows in SPEED.items()},
}


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in {"run": run_all, "generate": generate, "judge": judge, "table": table}.items():
        groups = {title: rows for title, (names, rows) in FLAGS.items() if name in names.split()}
        p = add_command(commands, name, run, run.__doc__.splitlines()[0], groups)
        if name in ("run", "generate"):
            add_decoder_flags(p, video=False)
    args = parser.parse_args()
    if "results" in args:
        args.out = args.results
    args.shots = sorted({int(shots) for shots in args.shots})
    args.tasks = sorted(TASKS if "all" in args.tasks else {int(task) for task in args.tasks})
    lock_folder(args.out)
    args.run(args)


if __name__ == "__main__":
    cli_main(main, "the same command goes on from what is on disk")
