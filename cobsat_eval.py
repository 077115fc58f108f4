"""CoBSAT (Zeng et al. 2024; paper section 4.2, protocol section 6): draws the benchmark's answers, judges them, and reports.

Miniature, everything in one go (reference pictures first), and the same on two processes:
    python miniature.py cobsat --out data/cobsat
    python cobsat_eval.py run --mini --images data/cobsat --shots 2 4 --tasks all --limit 100 --out results/mini
    torchrun --nproc_per_node 2 cobsat_eval.py run --mini --images data/cobsat --method thinkdiff relay oracle --out results/mini
Full size (datasets.zip of https://huggingface.co/datasets/yzeng58/CoBSAT unzipped in data/cobsat), 4 GPUs:
    torchrun --nproc_per_node 4 cobsat_eval.py run --images data/cobsat --aligner runs/lvlm/aligner --out results/full
One step at a time; `judge` and `table` also take a folder that another project wrote in the benchmark's layout:
    python cobsat_eval.py generate --mini --images data/cobsat --out results/mini
    python cobsat_eval.py judge --mini --images data/cobsat --results results/mini
    python cobsat_eval.py table --mini --images data/cobsat --results results/mini

Methods: `thinkdiff` (the features of the VLM's answer through the aligner), `relay` (its words through FLUX's own T5), `oracle` (the true answer
in words through T5: the most that FLUX can do). Started again after a kill, each step does what is missing. In --out:
    exps/METHOD_image/settings.json                                    how the pictures were made; a run with other settings is refused
    exps/METHOD_image/shot_K/default/task_T/NAME.jpg and .json         as `evaluation_icl.py` of the benchmark wants them
    thoughts/shot_K/task_T/NAME.safetensors                            the VLM's features and words (0.7 MB a prompt at full size)
    verdicts/JUDGE/METHOD_image/shot_K/task_T.json, references.json    what a judge said to each picture, by the picture's hash
    results.csv, results.json, results.md, judges.json, report.html, contact_sheet.png   written anew by each `table`
"""
import argparse
import base64
import csv
import functools
import hashlib
import html
import io
import json
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor

from aligner import load_aligner
from common import (MINI, MODELS, UserError, mini_flag, open_image, pick_device, positive, pretrained, run, torchrun_ranks,
                    write_atomically, write_json)
from drawing import drawing_flags, drawing_options, equal_lengths, vlm_options
from prepare_data import encode_messages, generate_with_features, load_vlm
from thinkdiff_lvlm import INSTRUCTION, context_message, draw, load_flux, text_embeds
from world import CREATE, DETAILS, NOUNS, PAIRS, sentence, shown

# ---------------------------------------------------------------- constants (protocol section 6)
HUB = "https://huggingface.co/datasets/yzeng58/CoBSAT"
TASKS = {2 * i + j: (f"{detail.capitalize()}-{'I' * j}", detail, j == 1)  # id: (name, detail, do the words say the detail?)
         for i, detail in enumerate(DETAILS) for j in (1, 2)}
COLUMNS = (1, 3, 5, 7, 9, 2, 4, 6, 8, 10)  # task ids in the order of the paper's tables
PUBLISHED = {  # the benchmark's judge's "correct" in that order; the paper's Tables 1 and 2
    2: {"SEED-LLaMA": "0.680 0.348 0.203 0.182 0.196 0.287 0.467 0.297 0.261 0.163", "Emu": "0.065 0.051 0.057 0.052 0.078 0.062 0.109 0.081 0.092 0.074",
        "GILL": "0.171 0.054 0.069 0.063 0.074 0.010 0.043 0.024 0.022 0.040",
        "ThinkDiff-LVLM": "0.622 0.349 0.237 0.459 0.290 0.511 0.534 0.340 0.534 0.292"},
    4: {"SEED-LLaMA": "0.482 0.211 0.141 0.053 0.122 0.252 0.076 0.268 0.207 0.105", "Emu": "0.063 0.018 0.045 0.048 0.097 0.037 0.122 0.109 0.077 0.088",
        "GILL": "0.106 0.044 0.041 0.073 0.087 0.022 0.059 0.044 0.032 0.067",
        "ThinkDiff-LVLM": "0.638 0.362 0.254 0.434 0.317 0.610 0.590 0.432 0.664 0.332"}}
JUDGE_TOKENS = 32  # of the judge's answer, usually one number: more costs nothing unless it rambles
RESAMPLES = 1000  # of the bootstrap
LISTED = 50  # missing or broken pictures named on the page; all are in results.csv


# ---------------------------------------------------------------- prompts
class Prompt(NamedTuple):
    """One question of the benchmark: k shown words with pictures, one more word, and the (detail, value, noun) to be drawn."""
    task: int
    shots: int
    number: int
    name: str
    words: list  # k + 1, as shown
    pictures: list  # k paths inside the folder of reference pictures
    answer: tuple  # labels


def reference(detail, value, noun):
    """Where the dataset keeps its picture of a kind."""
    return f"datasets/{detail}_{noun}/{value}_{noun}.jpg"


@functools.cache
def orders():
    """The benchmark's 1,000 pairs of orders (x, theta) of 0..9, the same for all tasks and shots."""
    rng, x, theta, out = random.Random(123), list(range(10)), list(range(10)), []
    for _ in range(1000):
        rng.shuffle(x), rng.shuffle(theta)  # in place: each order is made from the last one
        out.append((tuple(x), tuple(theta)))
    return out


def prompts(task_id, shots):
    """The official 1,000 prompts [Prompt] of a task (1..10) for `shots` (1..8) demonstrations; protocol section 6."""
    _, detail, by_value = TASKS[task_id]
    said, shared = (DETAILS[detail], NOUNS[detail]) if by_value else (NOUNS[detail], DETAILS[detail])
    out = []
    for number, (x, theta) in enumerate(orders()):
        common = shared[theta[shots + 1]]
        labels = [said[i] for i in x[:shots + 1]]
        kinds = [(detail, label, common) if by_value else (detail, common, label) for label in labels]
        words = [shown(label) for label in labels]
        out.append(Prompt(task_id, shots, number, "_".join([str(number), common, *words]), words, [reference(*kind) for kind in kinds[:-1]], kinds[-1]))
    return out


def chosen(args):
    """The prompts that args asks for, all shot counts and tasks; alike ones together, so that a batch needs little padding."""
    out = [p for shots in args.shots for task in args.tasks for p in prompts(task, shots)[:args.limit]]
    return sorted(out, key=lambda p: (p.shots, p.number, p.task))


def question(detail, about_noun):
    """The judge's question about the main object or about the detail, options in the benchmark's order and in shown words."""
    asked, options = ("main object", NOUNS[detail]) if about_noun else (f"{detail} (of the main object)", DETAILS[detail])
    listed = "".join(f" ({number}){shown(word)}" for number, word in enumerate(options, 1))
    return (f"What is the {asked} in this image? Answer from the following options:{listed}. "
            "Answer the number only and do not include any other texts (e.g., 1).")


def truth(prompt):
    """The oracle's text: one sentence that says the answer, such as "Create an image of a red car."; the same for every run."""
    return sentence(random.Random(f"oracle {prompt.task} {prompt.name}"), *prompt.answer, CREATE[:3])


# ---------------------------------------------------------------- folders and settings
def picture_file(args, model, p):
    return args.out / "exps" / f"{model}_image" / f"shot_{p.shots}" / "default" / f"task_{p.task}" / f"{p.name}.jpg"


def thought_file(args, p):
    return args.out / "thoughts" / f"shot_{p.shots}" / f"task_{p.task}" / f"{p.name}.safetensors"


def drawn(args, model, p):
    """Whether a picture is finished: its JSON is written last."""
    file = picture_file(args, model, p)
    return file.exists() and file.with_suffix(".json").exists()


def fingerprint(path):
    """What a model or data set is, wherever it lies: a name with a hash of its files' names, sizes and last 64 kB (whole models take minutes
    to hash, and a retrained one differs everywhere); of what is not on this disk, its name on the hub."""
    path = Path(path)
    if not path.exists():
        return str(path)
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(f for f in [path, *path.rglob("*")] if f.is_file() and f.suffix != ".md"):
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - 65536))
            digest.update(f"{file.name} {size} ".encode() + opened.read())
    return f"{path.name} {digest.hexdigest()}"


def settle(args, folder, settings, made):
    """Keeps `settings` in folder/settings.json. Where others are found and anything matches the patterns `made` (under --out), that is a UserError,
    or with --overwrite the end of what matches. Rank 0 does it, the others wait for it."""
    file = args.out / folder / "settings.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if torchrun_ranks()[0]:
        wait_until(lambda: file.exists() and json.loads(file.read_text()) == settings)
        return
    if found == settings:
        return
    old = [path for pattern in made for path in args.out.glob(pattern)]
    if old and not args.overwrite:
        changed = [f"{name} {found.get(name)}, now {value}" for name, value in {**dict.fromkeys(found), **settings}.items() if found.get(name) != value]
        raise UserError(f"{file.parent} was made with {'; '.join(changed)}: give the same settings to go on, another --out, or --overwrite to make "
                        "it anew" if found else f"{file.parent} holds results without settings.json, made by something else: choose another --out, or "
                        "--overwrite to replace them")
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(file, settings)  # last: killed before this, the next run still sees the old settings


def wait_until(ready):
    """Returns when ready() is true; another rank makes it so, or torchrun ends this one."""
    while not ready():
        time.sleep(1)


def need_references(args, names):
    """Raises UserError, with the file's name and where to get it, if one of the reference pictures is not there."""
    for name in names:
        if not (args.images / name).is_file():
            raise UserError(f"reference picture {args.images / name} is missing: get datasets.zip from {HUB} and unzip it in {args.images} "
                            f"(the miniature's: python miniature.py cobsat --out {args.images})")


# ---------------------------------------------------------------- generate: the VLM thinks, FLUX draws
def think(args, mine):
    """The VLM's answer to each prompt of `mine`: features (n, d_vlm) and words, in a file each. A batch with a gap is done again as a whole, so that
    a run that was killed computes bit for bit what an undisturbed one does."""
    batches = [mine[at:at + args.batch_size] for at in range(0, len(mine), args.batch_size)]
    batches = [batch for batch in batches if not all(thought_file(args, p).exists() for p in batch)]
    if not batches:
        return
    device, dtype = pick_device()
    model, processor = load_vlm(args.vlm, device, dtype, **vlm_options(args.quantize))
    picture = functools.lru_cache(64)(lambda name: open_image(args.images / name))
    bar = tqdm(total=sum(map(len, batches)), desc="think", unit="prompt", disable=torchrun_ranks()[0] != 0)
    for batch in batches:
        began = time.time()
        contexts = []
        for p in batch:
            texts = [("text", "\n\n" * (n > 1) + f"Word {n}: {word}, ") for n, word in enumerate(p.words, 1)]
            images = [("image", picture(name)) for name in p.pictures]
            contexts.append([part for pair in zip(texts, images) for part in pair] + texts[-1:])
        inputs = encode_messages(processor, [context_message(parts, INSTRUCTION) for parts in contexts]).to(device)
        tokens, x, lengths = generate_with_features(model, inputs, args.max_new_tokens, ignore_eos=False, do_sample=False)
        seconds = (time.time() - began) / len(batch)
        for p, x_p, y, n in zip(batch, x, tokens, lengths.tolist()):
            words = processor.tokenizer.decode(y[:n], skip_special_tokens=True).strip()
            features = x_p[:max(n, 1)].contiguous()  # (n, d_vlm): without the state that said EOS, unless the answer is empty
            write_atomically(thought_file(args, p), save({"x": features.cpu()}, {"words": words, "seconds": str(seconds)}))
        bar.update(len(batch))
    bar.close()


def read_thought(args, p):
    """(features (n, d_vlm), words, seconds) of a prompt."""
    with safe_open(thought_file(args, p), "pt") as file:
        return file.get_tensor("x"), file.metadata()["words"], float(file.metadata()["seconds"])


def generate(args):
    """`generate`: pictures and their JSON for each method, shot count and task, this rank's share of them."""
    options, mine = drawing_options(args), chosen(args)
    need_references(args, {name for p in mine for name in p.pictures})
    rank, world, _ = torchrun_ranks()
    mine = mine[rank::world]
    thinking = {"vlm": fingerprint(args.vlm), "instruction": INSTRUCTION, "max_new_tokens": args.max_new_tokens,
                "images": fingerprint(args.images / "datasets"), **({"quantize": True} if args.quantize else {})}
    drawing = {"scale": args.scale, "flux": fingerprint(args.flux), "size": args.size, "steps": args.steps, "guidance": args.guidance,
               "true_cfg": args.true_cfg, "seed": args.seed, **{name: options[name] for name in ("quantize", "cache") if options[name]}}
    own = {"thinkdiff": {**thinking, "aligner": fingerprint(args.aligner)}, "relay": {**thinking, "t5_length": args.t5_length},
           "oracle": {"t5_length": args.t5_length}}
    for method in args.method:  # all of them before any work is done
        settle(args, f"exps/{method}_image", {"method": method, **drawing, **own[method]},
               [f"exps/{method}_image/shot_*", f"verdicts/*/{method}_image"])
    if "thinkdiff" in args.method:  # read now, so that a wrong one is known before the VLM has worked for hours
        load_aligner(args.aligner, d_vlm=pretrained(AutoConfig, args.vlm).get_text_config().hidden_size)
    if set(args.method) != {"oracle"}:
        settle(args, "thoughts", thinking, ["thoughts/shot_*"])
        think(args, mine)

    device, dtype = pick_device()
    pipe = aligner = None
    for method in args.method:
        def length(p):
            with safe_open(thought_file(args, p), "pt") as file:
                return file.get_slice("x").get_shape()[0]
        jobs = [(range(length(p) if method == "thinkdiff" else args.t5_length), p) for p in mine]  # the range stands for a prompt of that length
        batches = [[p for _, p in same] for same in equal_lengths(jobs, args.batch_size)]
        batches = [batch for batch in batches if not all(drawn(args, method, p) for p in batch)]  # one with a gap is drawn again whole, as in think
        if batches and not pipe:
            pipe = load_flux(args.flux, device, dtype, t5_encoder=args.true_cfg > 1 or set(args.method) != {"thinkdiff"}, **options)
        if batches and method == "thinkdiff":
            aligner = load_aligner(args.aligner, d_t5=pipe.transformer.config.joint_attention_dim).to(device, dtype)
        bar = tqdm(total=sum(map(len, batches)), desc=f"draw {method}", unit="picture", disable=rank != 0 or not batches)
        for batch in batches:
            began = time.time()
            thoughts = [(None, truth(p), 0.0) if method == "oracle" else read_thought(args, p) for p in batch]
            if method == "thinkdiff":
                with torch.no_grad():
                    prompt = aligner(torch.stack([x for x, _, _ in thoughts]).to(device, dtype))  # (B, n, d_t5)
            else:
                prompt = text_embeds(pipe, [words for _, words, _ in thoughts], args.t5_length)  # (B, t5_length, d_t5)
            images = draw(pipe, prompt, [""] * len(batch), [args.seed + p.number for p in batch], args.size, args.steps, args.guidance, args.true_cfg)
            seconds = (time.time() - began) / len(batch)
            for p, image, (_, words, thought) in zip(batch, images, thoughts):
                file = picture_file(args, method, p)
                if not drawn(args, method, p):
                    write_atomically(file, lambda temporary: image.save(temporary, "JPEG", quality=95))
                    write_json(file.with_suffix(".json"), {"description": words, "text_inputs": p.words, "time": round(thought + seconds, 3),
                                                           "image_inputs": [str(args.images / name) for name in p.pictures]})
            bar.update(len(batch))
        bar.close()


# ---------------------------------------------------------------- judge
def load_vlm_judge(path, device, dtype):
    """The benchmark's judge as a function: (B PIL images, B answers) -> B x {"detail", "object"}, the text of its two greedy answers."""
    model = pretrained(AutoModelForImageTextToText, path, dtype=dtype).to(device).eval()
    processor = pretrained(AutoProcessor, path)
    processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def look(images, answers):
        said = []
        for about_noun in (False, True):
            asked = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question(detail, about_noun)}]}]
                     for image, (detail, _, _) in zip(images, answers)]
            inputs = encode_messages(processor, asked).to(device, dtype)  # input_ids (B, P), padded on the left
            tokens = model.generate(**inputs, max_new_tokens=JUDGE_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None)
            said.append(processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
        return [{"detail": first.strip(), "object": second.strip()} for first, second in zip(*said)]
    return look


def load_clip_judge(path, device, dtype):
    """The benchmark's CLIP judge, as load_vlm_judge's; its answers are the options' numbers, with the "similarity" to "{value} {noun}"."""
    model, processor = pretrained(CLIPModel, path, dtype=dtype).to(device).eval(), pretrained(CLIPProcessor, path)

    def unit(features):
        return torch.nn.functional.normalize(features.pooler_output.float(), dim=-1)

    @functools.cache
    def texts(*words):
        return unit(model.get_text_features(**processor(text=list(words), padding=True, return_tensors="pt").to(device)))  # (words, d_clip)

    @torch.no_grad()
    def look(images, answers):
        seen = unit(model.get_image_features(**processor(images=images, return_tensors="pt").to(device, dtype)))  # (B, d_clip)
        return [{"detail": str(1 + (texts(*DETAILS[detail]) @ x).argmax().item()), "object": str(1 + (texts(*NOUNS[detail]) @ x).argmax().item()),
                 "similarity": round((texts(f"{value} {noun}") @ x).item(), 4)} for x, (detail, value, noun) in zip(seen, answers)]
    return look


LOAD = {"vlm": load_vlm_judge, "clip": load_clip_judge}


def find_models(args):
    """The models whose pictures are judged: those asked for, or all that have a folder."""
    found = sorted(path.name.removesuffix("_image") for path in args.out.glob("exps/*_image"))
    if not (args.models or found):
        raise UserError(f"no results in {args.out}: expected {args.out}/exps/MODEL_image/shot_K/default/task_T, as `generate` writes them")
    return args.models or found


def rounds(args):
    """What is judged: [(verdict file inside a judge's folder, (model, shots, task), [(name, picture, answer)])], the 500 reference pictures first."""
    out = [("references.json", None, [(reference(*pair), args.images / reference(*pair), pair) for pair in PAIRS])]
    for model in find_models(args):
        folders = [(shots, task) for shots in args.shots for task in args.tasks]
        here = [(shots, task) for shots, task in folders if picture_file(args, model, prompts(task, shots)[0]).parent.is_dir()]
        if not here:
            raise UserError(f"no pictures of {model} for these --shots and --tasks in {args.out}/exps/{model}_image")
        out += [(f"{model}_image/shot_{shots}/task_{task}.json", (model, shots, task),
                 [(p.name, picture_file(args, model, p), p.answer) for p in prompts(task, shots)[:args.limit]]) for shots, task in here]
    return out


def read_verdicts(args, judge, file):
    path = args.out / "verdicts" / judge / file
    return json.loads(path.read_text()) if path.exists() else {}


def judge(args):
    """`judge`: asks each judge about the reference pictures, then about the pictures of this rank's share of folders; only about new or changed ones."""
    work = rounds(args)
    need_references(args, [name for name, _, _ in work[0][2]])
    rank, world, _ = torchrun_ranks()
    work = work[:1] * (rank == 0) + work[1:][rank::world]
    paths = {"vlm": args.judge_vlm, "clip": args.judge_clip}
    for name in args.judge:
        settle(args, f"verdicts/{name}", {"model": fingerprint(paths[name])}, [f"verdicts/{name}/*_image", f"verdicts/{name}/references.json"])
    for name in args.judge:
        look = None
        bar = tqdm(total=sum(len(pictures) for _, _, pictures in work), desc=f"judge {name}", unit="picture", disable=rank != 0)
        for file, _, pictures in work:
            verdicts = read_verdicts(args, name, file)
            for at in range(0, len(pictures), args.batch_size):
                batch, new = pictures[at:at + args.batch_size], {}
                for key, path, _ in batch:
                    try:
                        data = path.read_bytes()
                        new[key] = {"file": hashlib.blake2b(data, digest_size=8).hexdigest(), "picture": open_image(data, path)}
                    except FileNotFoundError:
                        new[key] = {"file": None, "error": "missing"}
                    except UserError as error:
                        if file == "references.json":
                            raise UserError(f"{error}: get it again from {HUB}") from None
                        new[key] = {"file": hashlib.blake2b(data, digest_size=8).hexdigest(), "error": str(error)}
                bar.update(len(batch))
                if all(verdicts.get(key, {}).get("file", 0) == verdict["file"] for key, verdict in new.items()):
                    continue
                whole = [(key, answer) for key, _, answer in batch if "error" not in new[key]]
                if whole:
                    look = look or LOAD[name](paths[name], *pick_device())
                    for (key, _), said in zip(whole, look([new[key].pop("picture") for key, _ in whole], [answer for _, answer in whole])):
                        new[key].update(said)
                verdicts.update(new)
                write_json(args.out / "verdicts" / name / file, verdicts)
        bar.close()


# ---------------------------------------------------------------- table
def read_number(text):
    """A judge's answer: all its digits as one number, 0 without any (the benchmark's reading; outside 1..10 is wrong)."""
    return int("".join(c for c in text if c in "0123456789") or 0)


def ruling(verdict, answer):
    """{"detail", "object", "correct"}: 0 or 1, and "says": the options that were named, `?` where it is none of the ten."""
    detail, value, noun = answer
    said = [dict(enumerate(options, 1)).get(read_number(verdict.get(key, ""))) for key, options in (("detail", DETAILS[detail]), ("object", NOUNS[detail]))]
    return {"detail": int(said[0] == value), "object": int(said[1] == noun), "correct": int(said == [value, noun]),
            "says": " ".join(shown(word) if word else "?" for word in said) if "error" not in verdict else ""}


def make_rows(args):
    """(rows of results.csv, {judge: its own accuracies on the reference pictures}). The first judge of --judge has the say (the benchmark's is the VLM)."""
    work, rows, accuracy = rounds(args), [], {}
    for file, folder, pictures in work:
        found = {name: read_verdicts(args, name, file) for name in args.judge}
        for name, verdicts in found.items():
            if left := sum(key not in verdicts for key, _, _ in pictures):
                raise UserError(f"{left} of {len(pictures)} pictures are not judged in {args.out}/verdicts/{name}/{file}: run `python cobsat_eval.py judge` with "
                                "the same --shots, --tasks, --limit and --judge first")
        if not folder:
            for name, verdicts in found.items():
                right = [(answer[0], ruling(verdicts[key], answer)) for key, _, answer in pictures]
                accuracy[name] = {key: float(np.mean([r[key] for _, r in right])) for key in ("correct", "detail", "object")}
                accuracy[name].update({detail: float(np.mean([r["correct"] for d, r in right if d == detail])) for detail in DETAILS})
            continue
        model, shots, task = folder
        _, _, by_value = TASKS[task]
        for key, _, answer in pictures:
            rulings = {name: ruling(found[name][key], answer) for name in args.judge}
            first = rulings[args.judge[0]]
            row = {"method": model, "shots": shots, "task_id": task, "task": TASKS[task][0], "name": key, "wanted": f"{shown(answer[1])} {answer[2]}",
                   "picture": found[args.judge[0]][key].get("error", "ok"), "correct": first["correct"], "detail": first["detail"], "object": first["object"],
                   "textual": first["detail" if by_value else "object"], "visual": first["object" if by_value else "detail"]}
            for name in args.judge[1:]:
                row.update({f"{name}_{part}": rulings[name][part] for part in ("correct", "detail", "object")})
            if len(rulings) > 1:
                row["agree"] = int(len({r["correct"] for r in rulings.values()}) == 1)
            if "clip" in args.judge:
                row["similarity"] = found["clip"][key].get("similarity", 0.0)
            rows.append({**row, **{f"{name}_says": rulings[name]["says"] for name in args.judge}})
    return rows, accuracy


def score(rows, judge):
    """{method: {shots: {task name or "mean": {"correct": share, "correct_95": [low, high], .., "n", "missing", "judge"}}}} from the rows of results.csv.

    Intervals: percentile bootstrap over the prompts of each task; a "mean" is over tasks, each with equal weight."""
    metrics = [key for key, value in rows[0].items() if isinstance(value, (int, float)) and key not in ("shots", "task_id")]
    out, groups = {}, {}
    for row in rows:
        groups.setdefault((row["method"], str(row["shots"])), {}).setdefault(row["task"], []).append(row)
    for (method, shots), tasks in groups.items():
        cells, means, draws, rng = {}, [], [], np.random.default_rng(0)
        for task, group in tasks.items():
            values = np.array([[float(row[metric]) for metric in metrics] for row in group])  # (n, metrics)
            n = len(values)
            again = rng.multinomial(n, [1 / n] * n, RESAMPLES) @ values / n  # (RESAMPLES, metrics)
            means.append(values.mean(0)), draws.append(again)
            cells[task] = (values.mean(0), again, n, sum(row["picture"] != "ok" for row in group))
        cells["mean"] = (np.mean(means, 0), np.mean(draws, 0), sum(cell[2] for cell in cells.values()), sum(cell[3] for cell in cells.values()))
        for task, (mean, again, n, missing) in cells.items():
            low, high = np.percentile(again, [2.5, 97.5], axis=0)
            cell = {metric: round(mean[i], 4) for i, metric in enumerate(metrics)}
            cell.update({f"{metric}_95": [round(low[i], 4), round(high[i], 4)] for i, metric in enumerate(metrics)})
            out.setdefault(method, {}).setdefault(shots, {})[task] = {**cell, "n": n, "missing": missing, "judge": judge}
    return out


def scale_of(args, model):
    """What a model's folder says of its size; for one that another project wrote, what --scale says."""
    file = args.out / "exps" / f"{model}_image" / "settings.json"
    return json.loads(file.read_text())["scale"] if file.exists() else args.scale


def make_tables(args, scores, accuracy):
    """[(title, [header, row, ...] of texts)]: for each shot count, one table a scale, best first; then all metrics, and the judges themselves."""
    names = {"vlm": "VLM judge", "clip": "CLIP judge"}
    tables = []
    head = ["", *(TASKS[task][0] for task in COLUMNS), "mean"]
    for shots in args.shots:
        ranked = {"full size": [(f"{name} (published)", [*map(float, text.split()), np.mean([*map(float, text.split())]) + 1e-9], None)  # .0575 is .058
                                for name, text in PUBLISHED.get(shots, {}).items()]}
        for method, by_shots in scores.items():
            if cells := by_shots.get(str(shots)):
                complete = all(name in cells for name in head[1:-1])  # a mean over fewer tasks is no mean to be ranked by
                values = [cells[name]["correct"] if name in cells and (name != "mean" or complete) else None for name in head[1:]]
                ranked.setdefault(scale_of(args, method), []).append((f"{method} (this run)", values, cells))
        for scale, rows in reversed(ranked.items()):
            rows.sort(key=lambda row: -(row[1][-1] or 0))
            text = [[name, *("" if value is None else f"{value:.3f}" + (" [{:.2f}, {:.2f}]".format(*cells[column]["correct_95"]) if cells else "")
                             for value, column in zip(values, head[1:]))] for name, values, cells in rows]
            tables.append((f"{shots}-shot, {scale}: correct by the {names[args.judge[0]] if any(r[2] for r in rows) else 'benchmark’s VLM judge'}"
                           + (" [95 % interval]" if any(r[2] for r in rows) else ""), [head, *text]))
    some = next(iter(next(iter(scores.values())).values()))["mean"]
    metrics = [key for key in some if f"{key}_95" in some]
    tables.append(("All metrics, mean over the tasks that were run [95 % interval]", [["", "shots", "scale", "tasks", "n", "missing", *metrics]] + [
        [method, shots, scale_of(args, method), str(len(cells) - 1), str(cells["mean"]["n"]), str(cells["mean"]["missing"]),
         *("{:.3f} [{:.2f}, {:.2f}]".format(cells["mean"][m], *cells["mean"][f"{m}_95"]) for m in metrics)]
        for method, by_shots in scores.items() for shots, cells in by_shots.items()]))
    tables.append(("The judges themselves on the 500 reference pictures: a judge that cannot score these cannot score us",
                   [["", *next(iter(accuracy.values()))]] + [[names[name], *(f"{v:.3f}" for v in shares.values())] for name, shares in accuracy.items()]))
    return tables


def table(args):
    """`table`: results.csv, results.json, results.md, judges.json, report.html and contact_sheet.png from the verdicts."""
    if torchrun_ranks()[0]:
        return
    need_references(args, {name for p in chosen(args) for name in p.pictures})
    rows, accuracy = make_rows(args)
    scores = score(rows, args.judge[0])
    tables = make_tables(args, scores, accuracy)
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, list(rows[0]))
    writer.writeheader(), writer.writerows(rows)
    bad = [f"{row['method']} {row['shots']}-shot {row['task']} {row['name']}: {row['picture']}" for row in rows if row["picture"] != "ok"]
    bad_title = f"{len(bad)} missing or broken pictures, counted as wrong"
    bad = bad[:LISTED] + [f"and {len(bad) - LISTED} more, see results.csv"] * (len(bad) > LISTED)
    text = "\n\n".join(f"### {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" + ("\n|" + "---|" * len(line)) * (i == 0) for i, line in enumerate(lines))
                       for title, lines in tables)
    if bad:
        text += f"\n\n### {bad_title}\n\n" + "\n".join(f"- {line}" for line in bad)
        tables.append((bad_title, [["picture"], *([line] for line in bad)]))
    write_atomically(args.out / "results.csv", sheet.getvalue())
    write_json(args.out / "results.json", scores)
    write_json(args.out / "judges.json", accuracy)
    write_atomically(args.out / "results.md", text + "\n")
    write_report(args, rows, scores, tables)
    write_contact_sheet(args, list(scores))
    print(text + f"\n\n{args.out / 'report.html'}")


# ---------------------------------------------------------------- report
COLORS = ("#2563a8", "#d0812b", "#4d9a57", "#8c5aa6", "#777777")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>CoBSAT</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto } th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
h1 { font-size: 24px } h2 { font-size: 17px; margin: 1.6em 0 .4em } svg { max-width: 100%; height: auto } select { font: inherit; margin: 0 1em 0 .3em }
.card { border: 1px solid #ddd; border-radius: 6px; padding: 8px 10px; margin: 8px 0; display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start }
figure { margin: 0; width: 112px; font-size: 12px } figure img, .none { width: 112px; height: 112px; display: block; object-fit: contain; background: #eee }
.next { text-align: center; font-weight: 600; padding-top: 44px; width: 84px } .drawn { width: 190px; padding-left: 10px; border-left: 3px solid #c33 } .drawn.right { border-color: #2a9d4a }
.yes { color: #1c7c37 } .no { color: #b3261e } .said { color: #555; font-style: italic } .none { text-align: center; line-height: 112px }
</style>
<h1>CoBSAT: context in, next picture out</h1>
@@TABLES@@
<h2>Pictures</h2>
<p>Show <label>task<select id="task"></select></label><label>shots<select id="shots"></select></label><label>method<select id="method"></select></label>
<label>pictures<select id="show"><option>all<option>right<option>wrong<option>judges disagree</select></label><span id="count"></span></p>
<div id="gallery"></div>
<script type="application/json" id="data">@@DATA@@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id)
const el = (parent, tag, text, cls) => { const e = document.createElement(tag); e.textContent = text || ""; e.className = cls || ""; parent.append(e); return e }
const picture = (parent, src) => { if (src) el(parent, "img").src = src; else el(parent, "div", "no picture", "none") }
el($("task"), "option", "first of every task")
data.tasks.forEach(t => el($("task"), "option", t)); data.shots.forEach(s => el($("shots"), "option", s)); data.methods.forEach(m => el($("method"), "option", m))
function draw() {
  const [task, shots, method, show] = ["task", "shots", "method", "show"].map(id => $(id).value), every = $("task").selectedIndex == 0
  $("gallery").replaceChildren(); let count = 0
  data.tasks.filter(t => every || t == task).forEach(t => {
    const fits = data.cards.filter(c => { const d = c.drawn[method]; return c.task == t && c.shots == shots && d &&
      (show == "all" || show == "right" && d.right || show == "wrong" && !d.right || show == "judges disagree" && d.disagree) })
    el($("gallery"), "h2", t + " (" + fits.length + ")"); count += fits.length
    fits.slice(0, every ? 3 : fits.length).forEach(c => {
      const card = el($("gallery"), "div", "", "card"); card.title = c.name
      c.pictures.forEach((p, i) => { const f = el(card, "figure"); picture(f, data.references[p]); el(f, "figcaption", "Word " + (i + 1) + ": " + c.words[i]) })
      el(card, "div", "Word " + c.words.length + ": " + c.words.at(-1) + " → " + c.wanted, "next")
      Object.entries(c.drawn).sort((a, b) => (b[0] == method) - (a[0] == method)).forEach(([name, d]) => {
        const f = el(card, "figure", "", "drawn" + (d.right ? " right" : "")); picture(f, d.picture); el(f, "b", name)
        el(f, "div", d.said, "said")
        Object.entries(d.judges).forEach(([j, [right, says]]) => el(f, "div", (right ? "✓ " : "✗ ") + j + ": " + says, right ? "yes" : "no")) }) })
  })
  $("count").textContent = count + " prompts"
}
document.querySelectorAll("select").forEach(s => s.onchange = draw); draw()
</script>
</html>
"""


def data_url(file, side=128):
    """A picture as a data: URL, at most `side` px long; None if it cannot be read."""
    try:
        image = open_image(file)
    except UserError:
        return None
    image.thumbnail((side, side))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def bar_chart(scores, shots):
    """An inline SVG: for each task and for the mean, a bar a method with its 95 % interval."""
    names = [task for task in [*(TASKS[t][0] for t in COLUMNS), "mean"] if any(task in by.get(shots, {}) for by in scores.values())]
    methods = [method for method in scores if shots in scores[method]]
    wide, high, margin = 1180, 240, 34  # the margin keeps the scale's numbers clear of the bars
    step = (wide - margin) / len(names)
    bar = min(60, step * 0.8 / len(methods))
    y = lambda share: 20 + high * (1 - share)
    out = [f'<text x="4" y="{y(s) - 3}" fill="#777">{s}</text><line x1="0" x2="{wide}" y1="{y(s)}" y2="{y(s)}" stroke="#ddd"/>' for s in (0, 0.25, 0.5, 0.75, 1)]
    for i, name in enumerate(names):
        left = margin + step * (i + 0.5) - bar * len(methods) / 2
        out.append(f'<text x="{left + bar * len(methods) / 2}" y="{high + 38}" text-anchor="middle">{name}</text>')
        for j, method in enumerate(methods):
            if cell := scores[method][shots].get(name):
                x, (low, up) = left + j * bar, cell["correct_95"]
                out.append(f'<rect x="{x}" y="{y(cell["correct"])}" width="{bar * 0.92}" height="{high * cell["correct"]}" fill="{COLORS[j % len(COLORS)]}">'
                           f'<title>{html.escape(method)} {name}: {cell["correct"]:.3f} [{low:.3f}, {up:.3f}]</title></rect>'
                           f'<line x1="{x + bar * 0.46}" x2="{x + bar * 0.46}" y1="{y(low)}" y2="{y(up)}" stroke="#222"/>')
    legend = "".join(f'<tspan fill="{COLORS[j % len(COLORS)]}" dx="12">■ {html.escape(method)}</tspan>' for j, method in enumerate(methods))
    return f'<svg viewBox="0 0 {wide} {high + 70}" width="{wide}" font-size="12" role="img">{"".join(out)}<text x="0" y="{high + 62}">{legend}</text></svg>'


def write_report(args, rows, scores, tables):
    """report.html: tables, bars and a gallery of the first --gallery prompts of each task, in one file that needs no other."""
    parts = [f"<p>Drawn at: {html.escape(', '.join(f'{m}: {scale_of(args, m)}' for m in scores))}. Miniature and full size are different worlds: "
             "they are never in one ranking.</p>"]
    parts += [f"<h2>{shots}-shot, correct, a bar a method</h2>{bar_chart(scores, str(shots))}" for shots in args.shots
              if any(str(shots) in by for by in scores.values())]
    for title, (head, *lines) in tables:
        cells = lambda tag, line: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        parts.append(f"<h2>{html.escape(title)}</h2><table>{cells('th', head)}{''.join(cells('td', line) for line in lines)}</table>")
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault((row["task_id"], row["shots"], row["name"]), {})[row["method"]] = row
    cards = []
    for p in tqdm([p for p in chosen(args) if p.number < args.gallery], "report", unit="prompt"):
        card = {"task": TASKS[p.task][0], "shots": str(p.shots), "name": p.name, "words": p.words, "pictures": p.pictures,
                "wanted": f"{shown(p.answer[1])} {p.answer[2]}", "drawn": {}}
        for method, row in by_prompt.get((p.task, p.shots, p.name), {}).items():
            file = picture_file(args, method, p)
            said = json.loads(file.with_suffix(".json").read_text()).get("description") if file.with_suffix(".json").exists() else ""
            right = {name: row["correct" if name == args.judge[0] else f"{name}_correct"] for name in args.judge}
            card["drawn"][method] = {"picture": data_url(file), "said": said, "right": row["correct"], "disagree": len(set(right.values())) > 1,
                                     "judges": {name: [right[name], row[f"{name}_says"] or row["picture"]] for name in args.judge}}
        cards.append(card)
    data = {"tasks": [TASKS[task][0] for task in args.tasks], "shots": [str(shots) for shots in args.shots], "methods": list(scores), "cards": cards,
            "references": {name: data_url(args.images / name) for name in sorted({name for card in cards for name in card["pictures"]})}}
    write_atomically(args.out / "report.html", PAGE.replace("@@TABLES@@", "\n".join(parts)).replace(
        "@@DATA@@", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")))


def write_contact_sheet(args, methods):
    """contact_sheet.png: the first prompt of each task, not a chosen one, in a row as in the paper's Fig. 5: context, question, answers."""
    shots, side, text = min(args.shots), 128, 22
    columns = shots + 1 + len(methods)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, len(args.tasks) * (side + text + 10) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, task in enumerate(args.tasks):
        p, top = prompts(task, shots)[0], 8 + row * (side + text + 10)
        files = [args.images / name for name in p.pictures] + [None] + [picture_file(args, method, p) for method in methods]
        for column, (file, label) in enumerate(zip(files, [*p.words, *methods])):
            left = 8 + column * (side + 8)
            try:
                if file:
                    sheet.paste(open_image(file).resize((side, side)), (left, top + text))
                else:
                    pen.multiline_text((left + side / 2, top + text + side / 2), f"{TASKS[task][0]}\n\nwanted:\n{shown(p.answer[1])} {p.answer[2]}", "#b3261e",
                                       font, anchor="mm", align="center")
            except UserError:
                pen.text((left + side / 2, top + text + side / 2), "no picture", "#777777", font, anchor="mm")
            pen.text((left, top), label + (", ?" if not file else ""), "black", font)
    write_atomically(args.out / "contact_sheet.png", lambda temporary: sheet.save(temporary, "PNG"))


# ---------------------------------------------------------------- command line
def run_all(args):
    """`run`: generate, judge and table; a rank goes on when the others have made what it needs."""
    generate(args)
    items = chosen(args)
    wait_until(lambda: all(drawn(args, method, p) for method in args.method for p in items))
    args.models = args.method
    judge(args)
    if torchrun_ranks()[0] == 0:
        wait_until(lambda: all(key in verdicts for file, _, pictures in rounds(args) for name in args.judge
                               for verdicts in [read_verdicts(args, name, file)] for key, _, _ in pictures))
        table(args)


def task_id(text):
    """An argparse type: a task's number, or `all`."""
    if text != "all" and int(text) not in TASKS:
        raise argparse.ArgumentTypeError(f"{text} is none of 1..10")
    return text if text == "all" else int(text)


def shot_count(text):
    """An argparse type: demonstrations a prompt; the benchmark's lists of ten allow up to eight."""
    if not 1 <= int(text) <= 8:
        raise argparse.ArgumentTypeError(f"{text} is not in 1..8")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, about in (("run", run_all, "generate, judge and table in one go"), ("generate", generate, "draw the answers"),
                                  ("judge", judge, "judge pictures in the benchmark's layout"), ("table", table, "tables and report from the verdicts")):
        p = commands.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=function, models=None)
        draws, judges = name in ("run", "generate"), name in ("run", "judge")
        p.add_argument("--images", type=Path, default=Path("data/cobsat"), help="folder that holds the benchmark's `datasets` folder of reference pictures")
        p.add_argument("--out" if draws else "--results", dest="out", type=Path, default=Path("results/full"), help="folder of results, see above")
        p.add_argument("--shots", type=shot_count, nargs="+", default=[2, 4], help="demonstrations in a prompt")
        p.add_argument("--tasks", type=task_id, nargs="+", default=["all"], help="1..10, or all")
        p.add_argument("--limit", type=positive, default=1000, help="the first so many prompts of each task and shot count")
        p.add_argument("--scale", choices=("full size", "miniature"), default="full size", help="which ranking the results belong to"
                       + ("" if draws else " (only for folders without settings.json)"))
        if name != "table":
            p.add_argument("--overwrite", action="store_true", help="where settings have changed, make what depends on them anew")
            p.add_argument("--batch-size", type=positive, default=8, help="prompts or pictures computed together")
        if draws:
            p.add_argument("--method", nargs="+", choices=("thinkdiff", "relay", "oracle"), default=["thinkdiff"], help="relay: the VLM's words through T5; "
                           "oracle: the true answer through T5")
            p.add_argument("--vlm", default=MODELS["vlm"], help="Qwen2-VL path or hub name")
            p.add_argument("--aligner", default="runs/lvlm/aligner", help="folder, hub name, or the authors' thinkdiff_lvlm.pth")
            p.add_argument("--flux", default=MODELS["flux"], help="FLUX path or hub name")
            p.add_argument("--max-new-tokens", type=positive, default=128, help="longest answer of the VLM (it answers greedily)")
            p.add_argument("--seed", type=int, default=0, help="of the noise of prompt 0 of each task; the next ones count up")
            p.add_argument("--steps", type=positive, default=28, help="FLUX steps")
            p.add_argument("--guidance", type=float, default=3.5, help="FLUX's distilled guidance (the miniature FLUX has none and ignores it)")
            p.add_argument("--true-cfg", type=float, default=1.0, help="classifier-free guidance away from the empty prompt, at twice the cost; 1: none, as "
                           "FLUX.1-dev has its guidance built in")
            p.add_argument("--size", type=positive, default=512, help="px")
            p.add_argument("--t5-length", type=positive, default=512, help="only for relay and oracle: T5 tokens the words are padded to")
            drawing_flags(p)
        elif name != "run":
            p.add_argument("--models", nargs="+", help="the models to take, folder names without `_image` (default: all there are)")
        if name != "generate":
            p.add_argument("--judge", nargs="+", choices=("vlm", "clip"), default=["vlm", "clip"], help="the first one's verdict is `correct`")
        if judges:
            p.add_argument("--judge-vlm", default=MODELS["judge-vlm"], help="any image-text-to-text model: path or hub name")
            p.add_argument("--judge-clip", default=MODELS["judge-clip"], help="CLIP path or hub name")
        if name in ("run", "table"):
            p.add_argument("--gallery", type=positive, default=100, help="prompts of each task and shot count shown in report.html")
        mini = {"out": Path("results/mini"), "scale": "miniature", "limit": 100, "batch_size": 32, "vlm": MINI["vlm"], "flux": MINI["flux"],
                "aligner": MINI["aligner"], "size": 64, "true_cfg": 3.0, "t5_length": 48, "judge_vlm": MINI["vlm"], "judge_clip": MINI["clip"]}
        mini_flag(p, **mini)

    args = parser.parse_args()
    args.tasks = sorted(TASKS if "all" in args.tasks else set(args.tasks))
    args.shots = sorted(set(args.shots))
    for several in ("method", "judge"):
        if hasattr(args, several):
            setattr(args, several, list(dict.fromkeys(getattr(args, several))))
    args.run(args)


if __name__ == "__main__":
    run(main)
