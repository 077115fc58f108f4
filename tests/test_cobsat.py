"""cobsat_eval.py: prompts against a second implementation, the judges' reading, and the steps through the command line."""
import csv
import hashlib
import importlib.util
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
from PIL import Image

import cobsat_eval
import common
import miniature
from common import REPO
from helpers import command, complaint

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


def test_a_picture_does_not_depend_on_its_batch(base, images, tmp_path):
    command("generate", *SMALL, "--tasks", 4, "--shots", 4, "--limit", 2, "--batch-size", 1, "--images", images, "--method", *METHODS, "--out", tmp_path)
    drawn = sorted(tmp_path.glob("exps/*/*/*/*/*.jpg"))
    assert len(drawn) == 6
    for path in drawn:
        one, many = (np.asarray(Image.open(file)).astype(int) for file in (path, base / path.relative_to(tmp_path)))
        assert abs(one - many).max() <= 4  # a rounding, magnified by JPEG


def test_killed_three_times_and_restarted_is_identical(base, images, tmp_path):
    """Killed as soon as a random number of the undisturbed run's files is there."""
    steps = ["thoughts/*/*/*.safetensors", "exps/*/*/*/*/*.jpg", "verdicts/*/*.json"]  # in the order in which they come
    count = lambda folder: sum(len(list(folder.glob(pattern))) for pattern in steps)
    total = count(base)
    moments = sorted(random.Random().sample(range(1, total - 2), 2)) + [total - 2]  # the last: when the first judge has begun
    print("killed at", moments, "of", total)
    for moment in moments:
        process = subprocess.Popen([sys.executable, SCRIPT, "run", *SMALL, "--images", images, "--method", *METHODS, "--out", tmp_path], cwd=REPO,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while count(tmp_path) < moment:
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


def test_drawing_flags_act_and_are_settings_where_they_change_the_picture(base, images, tmp_path):
    few = ("generate", *SMALL[:-2], "--tasks", 1, "--shots", 2, "--images", images, "--method", "oracle", "--steps", 4)
    for name, flags in (("plain", []), ("careful", ["--cache", 1e-6]), ("careless", ["--cache", 1e6])):
        command(*few, "--out", tmp_path / name, *flags)
    plain, careful, careless = (next((tmp_path / name).glob("exps/*/*/*/*/*.jpg")).read_bytes() for name in ("plain", "careful", "careless"))
    assert plain == careful != careless
    assert "cache 1e-06, now None" in complaint(*few, "--out", tmp_path / "careful")
    if importlib.util.find_spec("torchao"):
        assert "quantize None, now True" in complaint("generate", *SMALL, "--images", images, "--out", base, "--quantize")


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
        nouns = [row["vlm_says"].split()[-1] == row["wanted"].split()[-1] for row in mine]
        details = [row["vlm_says"].rsplit(" ", 1)[0] == row["wanted"].rsplit(" ", 1)[0] for row in mine]
        textual, visual = (details, nouns) if task == "Style-I" else (nouns, details)
        for metric, values in (("object", nouns), ("detail", details), ("textual", textual), ("visual", visual),
                               ("clip_correct", [row["clip_says"] == row["wanted"] for row in mine]),
                               ("agree", [(row["clip_says"] == row["wanted"]) == ok for row, ok in zip(mine, right)]),
                               ("similarity", [float(row["similarity"]) for row in mine])):
            assert cell[metric] == pytest.approx(sum(values) / 12, abs=1e-4)
            low, high = cell[f"{metric}_95"]
            assert low <= cell[metric] <= high
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
