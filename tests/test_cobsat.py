"""cobsat_eval.py: prompts against a second implementation, the judges' reading, and the steps through the command line."""
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cobsat_eval
import common
import miniature
from common import MINI, REPO
from helpers import command, complaint
from references import (aligner_weights, answer, cobsat_parts, eq1, load_flux, load_vlm, picture,
                        pixels, save_guided_flux, t5_prompt)

SCRIPT = str(REPO / "cobsat_eval.py")
SMALL = "--mini --tasks 1 4 --shots 2 4 --limit 3 --batch-size 8 --steps 1".split()
METHODS = ("thinkdiff", "relay", "oracle")
command, complaint = partial(command, SCRIPT), partial(complaint, SCRIPT)


def rows_of(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def tree(folder):
    """{path: bytes} of the tables and pictures in a results folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".csv", ".md", ".jpg") or path.name == "results.json"}


# ---------------------------------------------------------------- prompts: written again, from protocol section 6 alone
WORDS = {
    "color": ["yellow", "white", "red", "purple", "pink", "orange", "green", "brown", "blue", "black"],
    "object": ["leaf", "hat", "cup", "chair", "car", "box", "book", "ball", "bag", "apple"],
    "animal": ["zebra", "tiger", "sheep", "pig", "monkey", "lion", "dog", "cow", "cat", "bird"],
    "style": ["watercolor", "sketch", "pixel", "origami", "lego", "icon", "graffiti", "futuristic", "3d", "old"],
    "action": ["swim", "sleep", "sing", "run", "read", "fly", "eat", "drink", "cry", "angry"],
    "background": ["beach", "desert", "glacier", "volcano", "park", "gym", "waterfall", "space", "cave", "seafloor"],
    "texture": ["wood", "wicker", "sequined", "plastic", "paper", "metal", "leather", "lace", "denim", "ceramic"]}
X_THETA = {1: ("color", "object"), 2: ("object", "color"), 3: ("background", "animal"), 4: ("animal", "background"), 5: ("style", "object"),
           6: ("object", "style"), 7: ("action", "animal"), 8: ("animal", "action"), 9: ("texture", "object"), 10: ("object", "texture")}
INSTEAD = {"3d": "wireframe", "park": "amusement park"}


def second_implementation():
    """[[task, shots, name, words, pictures, [detail, value, noun]]] of all 20,000 prompts."""
    random.seed(123)
    x, theta, records, out = list(range(10)), list(range(10)), [], []
    for _ in range(1000):
        random.shuffle(x)
        random.shuffle(theta)
        records.append((list(x), list(theta)))
    assert records[0] == ([8, 7, 5, 9, 2, 3, 6, 1, 4, 0], [7, 6, 3, 4, 1, 0, 2, 5, 9, 8])  # the protocol's
    for task, (say, share) in X_THETA.items():
        for k in (2, 4):
            for i, (x, theta) in enumerate(records):
                labels, common_label = [WORDS[say][x[j]] for j in range(k + 1)], WORDS[share][theta[k + 1]]
                shown = [INSTEAD.get(label, label) for label in labels]
                kinds = []
                for label in labels:
                    if say in ("object", "animal"):
                        kinds.append([share, common_label, label])
                    else:
                        kinds.append([say, label, common_label])
                files = [f"datasets/{detail}_{noun}/{value}_{noun}.jpg" for detail, value, noun in kinds[:k]]
                out.append([task, k, f"{i}_{common_label}_" + "_".join(shown), shown, files, kinds[k]])
    return out


def test_all_20000_prompts_equal_the_second_implementation():
    ours = [[p.task, p.shots, p.name, p.words, p.pictures, list(p.answer)] for task in range(1, 11) for shots in (2, 4) for p in cobsat_eval.prompts(task, shots)]
    theirs = second_implementation()
    assert len(ours) == 20000 and ours == theirs
    digest = lambda value: hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert digest(ours) == digest(theirs) == "4a3e69c8a972cb97cece9070b047ad0b6524a24bd6df2db79754b0a5dbcde0a9"
    names = {(task, shots, name) for task, shots, name, *_ in ours}
    assert len(names) == 20000


def test_hand_checked_prompts():
    """The first record by hand: x = 8 7 5 9 2, theta[3] = 4, theta[5] = 0."""
    first = lambda task, shots: cobsat_eval.prompts(task, shots)[0]
    assert first(1, 2).name == "0_car_blue_brown_orange"
    assert first(1, 2).pictures == ["datasets/color_car/blue_car.jpg", "datasets/color_car/brown_car.jpg"] and first(1, 2).answer == ("color", "orange", "car")
    assert first(3, 4).name == "0_zebra_cave_space_gym_seafloor_glacier"
    assert first(4, 4).name == "0_beach_cat_cow_lion_bird_sheep" and first(4, 4).pictures[2] == "datasets/background_lion/beach_lion.jpg"
    assert first(6, 2).name == "0_lego_bag_ball_box" and first(6, 2).answer == ("style", "lego", "box")
    assert first(5, 2).words == ["wireframe", "futuristic", "icon"] and first(5, 2).pictures[0] == "datasets/style_car/3d_car.jpg"  # shown word, label in the file
    assert first(10, 2).name == "0_paper_bag_ball_box"
    parks = [p for p in cobsat_eval.prompts(4, 2) if p.answer[1] == "park"]
    assert parks and all(p.name.split("_")[1] == "park" for p in parks)  # theta keeps its label in the name


# ---------------------------------------------------------------- the judge's question and the reading of its answer
def test_question_is_the_benchmarks_and_what_the_miniature_was_taught():
    assert cobsat_eval.question("background", False) == (
        "What is the background (of the main object) in this image? Answer from the following options: (1)beach (2)desert (3)glacier (4)volcano "
        "(5)amusement park (6)gym (7)waterfall (8)space (9)cave (10)seafloor. Answer the number only and do not include any other texts (e.g., 1).")
    assert cobsat_eval.question("style", True) == (
        "What is the main object in this image? Answer from the following options: (1)leaf (2)hat (3)cup (4)chair (5)car (6)box (7)book (8)ball "
        "(9)bag (10)apple. Answer the number only and do not include any other texts (e.g., 1).")
    from standins.vlm import NOUNS, judge_question
    for detail in NOUNS:
        for about_noun in (False, True):
            assert cobsat_eval.question(detail, about_noun) == judge_question(detail, about_noun, NOUNS[detail])


@pytest.mark.parametrize("text, number", [("3", 3), ("(10)", 10), ("10.", 10), ("1, 2", 12), ("1 0", 10), ("", 0), ("red", 0), ("٣", 0), ("0", 0)])
def test_all_digits_are_one_number(text, number):
    assert cobsat_eval.read_number(text) == number
    ruling = cobsat_eval.ruling({"detail": text, "object": "5"}, ("color", "black", "car"))  # black is (10), car is (5)
    assert ruling["object"] == 1 and ruling["detail"] == ruling["correct"] == int(number == 10)
    assert ruling["says"].startswith({3: "red", 10: "black"}.get(number, "?"))


# ---------------------------------------------------------------- the whole of it
@pytest.fixture(scope="session")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("cobsat")
    miniature.draw_cobsat(Namespace(out=out))
    return out


@pytest.fixture(scope="session")
def base(images, tmp_path_factory):
    """An undisturbed run: 2 tasks x 2 and 4 shots x 3 prompts, all methods."""
    out = tmp_path_factory.mktemp("base")
    command("run", *SMALL, "--images", images, "--method", *METHODS, "--out", out)
    return out


def test_run_writes_the_benchmarks_layout_and_a_report(base, images):
    for method in METHODS:
        for task, shots in ((1, 2), (1, 4), (4, 2), (4, 4)):
            folder = base / "exps" / f"{method}_image" / f"shot_{shots}" / "default" / f"task_{task}"
            expected = cobsat_eval.prompts(task, shots)[:3]
            assert {path.name for path in folder.iterdir()} == {p.name + suffix for p in expected for suffix in (".jpg", ".json")}
            note = json.loads((folder / f"{expected[0].name}.json").read_text())
            assert set(note) == {"description", "text_inputs", "image_inputs", "time"} and note["text_inputs"] == expected[0].words
            assert note["image_inputs"] == [str(images / name) for name in expected[0].pictures] and note["description"] and note["time"] > 0
            assert Image.open(folder / f"{expected[0].name}.jpg").size == (64, 64)
    results = json.loads((base / "results.json").read_text())
    assert set(results) == set(METHODS) and set(results["relay"]) == {"2", "4"} and set(results["relay"]["4"]) == {"Color-I", "Background-II", "mean"}
    assert results["oracle"]["2"]["Color-I"]["n"] == 3 and results["oracle"]["2"]["mean"]["n"] == 6
    judges = json.loads((base / "judges.json").read_text())
    assert all(judges[name]["correct"] > 0.8 for name in ("vlm", "clip"))
    assert any(row["vlm_says"] != row["clip_says"] for row in rows_of(base))  # two judges, not one twice
    markdown = (base / "results.md").read_text()
    for table in markdown.split("### "):  # a table holds published rows or the miniature's, never both
        assert not ("(published)" in table and "(this run)" in table)
    assert "| ThinkDiff-LVLM (published) | 0.638 |" in markdown and "| 0.463 |" in markdown and "| 0.058 |" in markdown
    report = (base / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*.?(?!data:)[\w./:-]*\.\w+", report) and "http" not in report and report.count("<svg") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', report, re.S).group(1))
    assert len(data["cards"]) == 12 and all(set(card["drawn"]) == set(METHODS) for card in data["cards"])
    assert all(url.startswith("data:image/jpeg;base64,") for url in [*data["references"].values(), data["cards"][0]["drawn"]["relay"]["picture"]])
    width, height = Image.open(base / "contact_sheet.png").size
    assert width > (2 + 1 + 3) * 128 and height > 2 * 128


def test_a_finished_run_is_not_run_again(base, images, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")
    for name in ("load_vlm", "load_flux"):
        monkeypatch.setattr(cobsat_eval, name, fail)
    monkeypatch.setattr(cobsat_eval, "LOAD", {"vlm": fail, "clip": fail})
    before = tree(base)
    command("run", *SMALL, "--images", images, "--method", *METHODS, "--out", base)
    assert tree(base) == before


def test_pictures_equal_those_of_stock_models_one_at_a_time(images, tmp_path):
    """Answers that EOS ends and answers that are cut off, all methods, no flag at its default."""
    folder, out = save_guided_flux(tmp_path / "flux"), tmp_path / "out"
    shutil.copytree(MINI["aligner"], tmp_path / "aligner")
    other = {name: 1.2 * weight for name, weight in aligner_weights(MINI["aligner"]).items()}
    save_file({f"net.{name}": weight for name, weight in other.items()},
              tmp_path / "aligner/model.safetensors", metadata={"format": "pt"})
    command("generate", *"--mini --tasks 1 4 --shots 2 --limit 3 --batch-size 4 --seed 3".split(),
            *"--size 32 --steps 3 --guidance 9 --true-cfg 2 --t5-length 12 --cache 1e6".split(),
            "--max-new-tokens", 9, "--method", *METHODS, "--images", images, "--flux", folder,
            "--aligner", tmp_path / "aligner", "--out", out)
    vlm, flux = load_vlm(MINI["vlm"]), load_flux(folder)
    ends = []
    for p in [*cobsat_eval.prompts(1, 2)[:3], *cobsat_eval.prompts(4, 2)[:3]]:
        parts = cobsat_parts(p.words, [images / name for name in p.pictures])
        x, words, ended = answer(vlm, parts, 9)
        ends.append(ended)
        stored = load_file(out / f"thoughts/shot_2/task_{p.task}/{p.name}.safetensors")["x"]
        torch.testing.assert_close(stored, x, rtol=0, atol=1e-4)  # as many states, too
        files = {method: out / f"exps/{method}_image/shot_2/default/task_{p.task}/{p.name}.jpg"
                 for method in METHODS}
        truth = json.loads(files["oracle"].with_suffix(".json").read_text())["description"]
        assert all(word in truth for word in (INSTEAD.get(p.answer[1], p.answer[1]), p.answer[2]))
        prompts = {"thinkdiff": eq1(other, x), "relay": t5_prompt(flux, words, 12),
                   "oracle": t5_prompt(flux, truth, 12)}
        for method, prompt in prompts.items():
            expected = picture(flux, prompt, seed=3 + p.number, size=32, steps=3, guidance=9.0,
                               true_cfg=2.0, cache=1e6)
            jpeg = io.BytesIO()
            Image.fromarray(expected.astype(np.uint8)).save(jpeg, "JPEG", quality=95)
            assert abs(pixels(files[method]) - pixels(jpeg)).max() <= 4  # a rounding before JPEG
    assert set(ends) == {True, False}


def test_mixed_details_in_a_batch_are_judged_as_one_at_a_time(base, images):
    """The reference pictures at the ends of a detail, whose questions are of other lengths."""
    verdicts = json.loads((base / "verdicts/vlm/references.json").read_text())
    names = list(verdicts)
    batches = [names[at:at + 8] for at in range(0, 500, 8)]  # --batch-size of SMALL
    mixed = [name for batch in batches for name in batch
             if len({name.split("_")[0] for name in batch}) > 1]
    assert len(mixed) == 16
    model, processor = load_vlm(MINI["vlm"])
    for name in mixed:
        detail = name.removeprefix("datasets/").split("_")[0]
        for key, about_noun in (("detail", False), ("object", True)):
            asked = {"type": "text", "text": cobsat_eval.question(detail, about_noun)}
            content = [{"type": "image", "image": Image.open(images / name)}, asked]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True,
                add_generation_prompt=True, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            said = processor.decode(tokens[0, inputs["input_ids"].shape[1]:],
                                    skip_special_tokens=True)
            assert verdicts[name][key] == said.strip(), (name, key)


def test_killed_three_times_and_restarted_is_identical(base, images, tmp_path):
    """Killed when the first answers, half of the pictures, and the first verdicts are there."""
    for pattern, number in (("thoughts/*/*/*.safetensors", 1), ("exps/*/*/*/*/*.jpg", 18),
                            ("verdicts/*/references.json", 1)):
        process = subprocess.Popen([sys.executable, SCRIPT, "run", *SMALL, "--images", images, "--method", *METHODS, "--out", tmp_path], cwd=REPO,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.glob(pattern))) < number:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "results.json").exists(), "killed too late to prove anything"
    command("run", *SMALL, "--images", images, "--method", *METHODS, "--out", tmp_path)
    assert tree(tmp_path) == tree(base)


def test_two_processes_equal_one(base, images, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    subprocess.run([*start, "run", *SMALL, "--images", images, "--method", *METHODS, "--out", tmp_path], cwd=REPO, check=True, capture_output=True)
    for ours, theirs in zip(rows_of(tmp_path), rows_of(base), strict=True):
        assert float(ours.pop("similarity")) == pytest.approx(float(theirs.pop("similarity")), abs=0.01)  # other batches: other roundings
        assert ours == theirs


def test_changed_settings_need_overwrite(base, images, tmp_path):
    shutil.copytree(base, tmp_path / "x")
    changed = ("run", *SMALL, "--images", images, "--method", "oracle", "--out", tmp_path / "x", "--steps", 2)
    line = complaint(*changed)
    assert "steps 1, now 2" in line and "--overwrite" in line and tree(tmp_path / "x") == tree(base)
    command(*changed, "--overwrite", "--tasks", 1)
    before, after = tree(base), tree(tmp_path / "x")
    assert all((after.get(name) == data) == ("oracle" not in name) for name, data in before.items() if name.endswith(".jpg"))
    assert json.loads((tmp_path / "x/results.json").read_text()).keys() == {"oracle"}
    judged = ("judge", *SMALL[:-2], "--images", images, "--results", tmp_path / "x", "--judge-clip", "other/clip")
    assert "now other/clip" in complaint(*judged) and tree(tmp_path / "x") == after
    shutil.copytree(common.REPO / "mini/clip", tmp_path / "clip")
    weights = tmp_path / "clip/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))  # retrained, at the end of a path that may be the same
    judged = (*judged[:-1], tmp_path / "clip")
    assert "clip" in complaint(*judged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cobsat_eval, "LOAD", {**cobsat_eval.LOAD, "vlm": None})  # the other judge has nothing to do
        command(*judged, "--overwrite")
    assert json.loads((tmp_path / "x/verdicts/clip/settings.json").read_text())["model"].startswith("clip ")


def test_drawing_flags_that_change_the_picture_are_settings(base, images, monkeypatch):
    find = importlib.util.find_spec  # no weights are quantized here: torchao need not be installed
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name, *rest: name == "torchao" or find(name, *rest))
    again = ("generate", *SMALL, "--images", images, "--out", base, "--method", "oracle")
    assert "quantize None, now True" in complaint(*again, "--quantize")
    assert "cache None, now 0.5" in complaint(*again, "--cache", 0.5)


# ---------------------------------------------------------------- a folder that somebody else made: reference pictures as answers
@pytest.fixture(scope="session")
def copycat(base, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("copycat")
    for task in (5, 8):
        for p in cobsat_eval.prompts(task, 2)[:12]:
            file = out / "exps/copycat_image/shot_2/default" / f"task_{task}" / f"{p.name}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            detail, value, noun = p.answer
            if p.number == 1:  # one wrong value and two wrong nouns, so that no two metrics are the same
                value = WORDS[detail][WORDS[detail].index(value) - 1]
            if p.number in (2, 3):
                nouns = WORDS["object" if task == 5 else "animal"]
                noun = nouns[nouns.index(noun) - 1]
            shutil.copy(images / f"datasets/{detail}_{noun}/{value}_{noun}.jpg", file)
    for name in ("vlm", "clip"):  # the judges have seen the references already
        shutil.copytree(base / "verdicts" / name, out / "verdicts" / name, ignore=shutil.ignore_patterns("*_image"))
    return out


def judge_and_table(folder, images):
    common_args = ("--mini", "--tasks", 5, 8, "--shots", 2, "--limit", 12, "--images", images, "--results", folder)
    command("judge", *common_args)
    return command("table", *common_args)[0]


def test_scores_by_hand_and_swapped_pictures(copycat, images):
    judge_and_table(copycat, images)
    rows, results = rows_of(copycat), json.loads((copycat / "results.json").read_text())
    assert len(rows) == 24 and 0.6 < results["copycat"]["2"]["mean"]["correct"] <= 9 / 12
    for task in ("Style-I", "Action-II"):
        cell, mine = results["copycat"]["2"][task], [row for row in rows if row["task"] == task]
        right = [row["vlm_says"] == row["wanted"] for row in mine]
        assert cell["n"] == len(mine) == 12 and cell["missing"] == 0 and cell["judge"] == "vlm"
        assert cell["correct"] == round(sum(right) / 12, 4) and [int(row["correct"]) for row in mine] == right
        for metric, values in (("clip_correct", [row["clip_says"] == row["wanted"] for row in mine]),
                               ("agree", [(row["clip_says"] == row["wanted"]) == ok for row, ok in zip(mine, right)]),
                               ("similarity", [float(row["similarity"]) for row in mine])):
            assert cell[metric] == pytest.approx(sum(values) / 12, abs=1e-4)
        assert f"{cell['correct']:.3f} [" in (copycat / "results.md").read_text()

    one = next(row for row in rows if row["correct"] == row["clip_correct"] == "1")  # two right pictures that share neither noun nor value
    other = next(row for row in rows if row["task"] == one["task"] and row["correct"] == row["clip_correct"] == "1" and
                 not set(row["wanted"].split()) & set(one["wanted"].split()))
    folder = copycat / "exps/copycat_image/shot_2/default" / f"task_{one['task_id']}"
    files = [folder / f"{row['name']}.jpg" for row in (one, other)]
    pictures = [file.read_bytes() for file in files]
    for file, data in zip(files, reversed(pictures)):
        file.write_bytes(data)
    judge_and_table(copycat, images)
    lowered = [row["name"] for row, before in zip(rows_of(copycat), rows) if row != before]
    assert lowered == [row["name"] for row in (one, other)]
    assert all(row[key] == "0" for row in rows_of(copycat) if row["name"] in lowered and row["task"] == one["task"]
               for key in ("correct", "detail", "object", "clip_correct"))
    for file, data in zip(files, pictures):
        file.write_bytes(data)
    judge_and_table(copycat, images)
    assert rows_of(copycat) == rows


def test_missing_and_broken_pictures_are_wrong_and_listed(copycat, images, tmp_path):
    shutil.copytree(copycat, tmp_path / "x")
    files = sorted((tmp_path / "x/exps/copycat_image/shot_2/default/task_8").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:300])
    files[2].write_bytes(b"")
    out = judge_and_table(tmp_path / "x", images)
    rows = {row["name"]: row for row in rows_of(tmp_path / "x") if row["task_id"] == "8"}
    assert len(rows) == 12 and [row["picture"] == "ok" for row in rows.values()].count(False) == 3
    assert rows[files[0].stem]["picture"] == "missing" and all("cannot read" in rows[file.stem]["picture"] for file in files[1:3])
    for file in files[:3]:
        assert all(rows[file.stem][key] == "0" for key in ("correct", "detail", "object", "clip_correct")) and f"{file.stem}: " in out
    assert json.loads((tmp_path / "x/results.json").read_text())["copycat"]["2"]["Action-II"]["missing"] == 3
    assert "3 missing or broken pictures" in (tmp_path / "x/report.html").read_text()


# ---------------------------------------------------------------- statistics
def test_statistics_and_ranking_of_typed_verdicts(base, images, tmp_path):
    """Of 60 answers to task t, only the detail is right in 2 t, only the noun in t, nothing in t.

    One of the last is missing. Methods a and b have 10 and 20 more with nothing right."""
    (tmp_path / "verdicts/vlm").mkdir(parents=True)
    shutil.copy(base / "verdicts/vlm/references.json", tmp_path / "verdicts/vlm")
    more = {"a": 10, "b": 20, "c": 0}
    for method, task in itertools.product(more, X_THETA):
        nouns = WORDS[next(name for name in X_THETA[task] if name in ("object", "animal"))]
        right = ["detail"] * 2 * task + ["object"] * task + [""] * (task - 1 + more[method])
        right += ["detail object"] * (59 - len(right))
        prompts = cobsat_eval.prompts(task, 2)[:60]
        verdicts = {prompts[59].name: {"file": None, "error": "missing"}}
        for p, keys in zip(prompts, right):
            detail, value, noun = p.answer
            numbers = {"detail": WORDS[detail].index(value), "object": nouns.index(noun)}
            said = {key: f"({(number + (key not in keys)) % 10 + 1})"
                    for key, number in numbers.items()}
            verdicts[p.name] = {"file": "x", **said}
        file = tmp_path / f"verdicts/vlm/{method}_image/shot_2/task_{task}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(verdicts))
        (tmp_path / f"exps/{method}_image/shot_2/default/task_{task}").mkdir(parents=True)
    command("table", *"--mini --judge vlm --shots 2 --limit 60 --gallery 1 --scale".split(),
            "full size", "--images", images, "--results", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())

    rng = np.random.default_rng(1)
    for method, wrong in more.items():
        cells, draws, shares = results[method]["2"], [], []
        mean = cells.pop("mean")
        for task, cell in enumerate(cells.values(), 1):
            detail, noun = 60 - 2 * task - wrong, 60 - 3 * task - wrong
            said, seen = (detail, noun) if task % 2 else (noun, detail)
            shares.append(np.array([60 - 4 * task - wrong, detail, noun, said, seen]) / 60)
            draws.append(rng.binomial(60, shares[-1][0], 4000) / 60)  # (4000,): its bootstrap
        cases = [(cell, 60, 0.02) for cell in cells.values()] + [(mean, 600, 0.004)]
        shares.append(np.mean(shares, 0))
        draws.append(np.mean(draws, 0))
        for (cell, n, error), share, draw in zip(cases, shares, draws, strict=True):
            found = [cell[key] for key in ("correct", "detail", "object", "textual", "visual")]
            assert found == pytest.approx(share, abs=1e-4)
            assert (cell["n"], cell["missing"], cell["judge"]) == (n, n // 60, "vlm")
            ends = np.quantile(draw, [0.025, 0.975])
            assert cell["correct_95"] == pytest.approx(ends, abs=error)  # in steps of 1 / n
    table = (tmp_path / "results.md").read_text().split("### ")[1]
    names = re.findall(r"^\| (\S+) \(", table, re.M)  # best first, with the published ones
    assert names == ["c", "a", "ThinkDiff-LVLM", "SEED-LLaMA", "b", "Emu", "GILL"]
    low, high = results["c"]["2"]["Color-I"]["correct_95"]
    assert f"| c (this run) | 0.933 [{low:.2f}, {high:.2f}] |" in table


# ---------------------------------------------------------------- complaints
def test_complaints(base, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/datasets/color_car/brown_car.jpg").unlink()
    hub = "https://huggingface.co/datasets/yzeng58/CoBSAT"
    for step in (("generate", "--out"), ("judge", "--results"), ("table", "--results")):
        line = complaint(step[0], *SMALL[:-4], "--images", tmp_path / "images", step[1], base)
        assert "color_car/brown_car.jpg is missing" in line and hub in line and "datasets.zip" in line
    (tmp_path / "images/datasets/color_car/brown_car.jpg").write_bytes(b"broken")
    line = complaint("judge", *SMALL[:-2], "--images", tmp_path / "images", "--results", base)
    assert "brown_car.jpg" in line and hub in line
    assert "no results in" in complaint("judge", *SMALL[:-2], "--images", images, "--results", tmp_path / "nothing")
    assert "no pictures of gill" in complaint("table", *SMALL[:-4], "--images", images, "--results", base, "--models", "gill")
    assert "are not judged" in complaint("table", "--mini", "--tasks", 1, "--limit", 5, "--images", images, "--results", base)
    assert "no aligner at" in complaint("generate", *SMALL, "--images", images, "--out", tmp_path / "x", "--aligner", tmp_path / "no/aligner")
    assert not list((tmp_path / "x").rglob("*.jpg"))
    (tmp_path / "theirs/exps/oracle_image/shot_2/default/task_1").mkdir(parents=True)
    assert "made by something else" in complaint("generate", *SMALL, "--images", images, "--method", "oracle", "--out", tmp_path / "theirs")
    for wrong in (("--tasks", 11), ("--tasks", "some"), ("--shots", 9), ("--limit", 0), ("--method", "magic")):
        command("run", "--mini", *wrong, code=2)
    shell = subprocess.run([sys.executable, SCRIPT, "table", "--results", tmp_path / "nothing", "--images", images], cwd=REPO, capture_output=True, text=True)
    assert shell.returncode == 1 and "Traceback" not in shell.stderr and shell.stderr.splitlines()[-1].startswith("error: ")
