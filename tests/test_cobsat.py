"""cobsat_eval.py: all prompts, the judges, the statistics, and the steps by the command line."""
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import cobsat_eval
import helpers
import references as ref
from common import MINI, REPO
from test_protocol import LABELS, NOUNS
from training_data import digest

SCRIPT = str(REPO / "cobsat_eval.py")
SMALL = "--mini --tasks 1 4 --shots 2 4 --limit 3 --batch-size 8 --steps 1".split()
METHODS = ("thinkdiff", "relay", "oracle")
command, complaint = partial(helpers.command, SCRIPT), partial(helpers.complaint, SCRIPT)


def read_rows(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def read_json(path):
    return json.loads(path.read_text())


def tree(folder):
    """{path: bytes} of the tables and pictures in a results folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".csv", ".md", ".jpg") or path.name == "results.json"}


# ---------------------------------------------------------------- prompts and answers
def test_all_20000_prompts():
    """The first by hand: x = 8 7 5 9 2, theta[3] = 4, theta[5] = 0; shown words, but labels in the
    files. All by their hash, that of a second implementation."""
    found = [[p.task, p.shots, p.name, p.words, p.pictures, list(p.answer)]
             for task in range(1, 11) for shots in (2, 4)
             for p in cobsat_eval.prompts(task, shots)]
    first = {(p[0], p[1]): p[2:] for p in reversed(found)}
    assert first[1, 2] == [
        "0_car_blue_brown_orange", ["blue", "brown", "orange"],
        ["datasets/color_car/blue_car.jpg", "datasets/color_car/brown_car.jpg"],
        ["color", "orange", "car"]]
    assert first[3, 4][0] == "0_zebra_cave_space_gym_seafloor_glacier"
    assert first[4, 4][0] == "0_beach_cat_cow_lion_bird_sheep"
    assert first[4, 4][2][2] == "datasets/background_lion/beach_lion.jpg"
    assert first[5, 2][1:3] == [["wireframe", "futuristic", "icon"], [
        "datasets/style_car/3d_car.jpg", "datasets/style_car/futuristic_car.jpg"]]
    assert len({(task, shots, name) for task, shots, name, *_ in found}) == len(found) == 20000
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "4a3e69c8a972cb97cece9070b047ad0b6524a24bd6df2db79754b0a5dbcde0a9")


@pytest.mark.parametrize("text, number", [
    ("3", 3), ("(10)", 10), ("10.", 10), ("1, 2", 12), ("1 0", 10), ("", 0), ("red", 0), ("٣", 3),
    ("²", 0), ("0", 0)])
def test_all_digits_are_one_number(text, number):
    assert cobsat_eval.read_number(text) == number
    # black is (10), car is (5)
    verdict = cobsat_eval.score_verdict({"detail": text, "object": "5"}, ("color", "black", "car"))
    assert verdict["object"] == 1
    assert verdict["detail"] == verdict["correct"] == int(number == 10)
    assert verdict["says"].startswith({3: "red", 10: "black"}.get(number, "?"))


# ---------------------------------------------------------------- the whole of it
@pytest.fixture(scope="session")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("cobsat")
    helpers.command("miniature", "cobsat", "--out", out)
    return out


@pytest.fixture(scope="session")
def all_methods(images):
    """The command line of a run: 2 tasks x 2 and 4 shots x 3 prompts, all methods; --out lacks."""
    return ("run", *SMALL, "--images", str(images), "--method", *METHODS, "--out")


@pytest.fixture(scope="session")
def base(all_methods, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("base")
    command(*all_methods, out)
    return out


def test_run_writes_the_benchmarks_layout_and_a_report(base, images):
    for method, task, shots in itertools.product(METHODS, (1, 4), (2, 4)):
        folder = base / f"exps/{method}_image/shot_{shots}/default/task_{task}"
        expected = cobsat_eval.prompts(task, shots)[:3]
        assert {path.name for path in folder.iterdir()} == {
            p.name + suffix for p in expected for suffix in (".jpg", ".json")}
        note = read_json(folder / f"{expected[0].name}.json")
        assert note.pop("description") and note.pop("time") > 0
        assert note == {"text_inputs": [f"{word}: " for word in expected[0].words],
                        "image_inputs": [str(images / name) for name in expected[0].pictures]}
        assert Image.open(folder / f"{expected[0].name}.jpg").size == (64, 64)
    results, judges = read_json(base / "results.json"), read_json(base / "judges.json")
    assert set(results) == set(METHODS) and set(results["relay"]) == {"2", "4"}
    assert set(results["relay"]["4"]) == {"Color-I", "Background-II", "mean"}
    oracle = results["oracle"]["2"]
    assert oracle["Color-I"]["n"] == 3 and oracle["mean"]["n"] == 6
    assert all(judges[name]["correct"] > 0.8 for name in ("vlm", "clip"))
    # two judges, not one twice
    assert any(row["vlm_says"] != row["clip_says"] for row in read_rows(base))
    markdown = (base / "results.md").read_text()
    for table in markdown.split("### "):  # published rows or the miniature's, never both
        assert not ("(published)" in table and "(this run)" in table)
    assert "| ThinkDiff-LVLM (published) | 0.638 |" in markdown
    assert "| 0.463 |" in markdown and "| 0.058 |" in markdown
    # means alone, ranked among the rest
    means = re.findall(r"^\| (.*) \(published mean, from a summary\) (?:\|  ){10}\| (\S+) \|$",
                       markdown, re.M)
    assert [mean for _, mean in means] == "0.693 0.683 0.658 0.537 0.769 0.767 0.658 0.614".split()
    assert means[4][0] == "TBDN with InternVL3-8B"
    report = (base / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*.?(?!data:)[\w./:-]*\.\w+", report)
    assert "http" not in report and "@@" not in report
    data = json.loads(re.search(r'id="data">(.*?)</script>', report, re.S).group(1))
    cards = data["cards"]
    assert len(cards) == 12 and all(set(card["drawn"]) == set(METHODS) for card in cards)
    urls = [*data["references"].values(), cards[0]["drawn"]["relay"]["picture"]]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    width, height = Image.open(base / "contact_sheet.png").size
    assert width > (2 + 1 + 3) * 128 and height > 2 * 128


def test_finished_work_and_a_folder_of_an_earlier_version_go_on(base, all_methods, tmp_path,
                                                                monkeypatch):
    """Nothing is done again. Earlier, vlm_features was called thoughts, and the oracle's sentences
    were others, which its settings did not name."""
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_vlm", "load_decoder"):
        monkeypatch.setattr(cobsat_eval, name, fail)
    monkeypatch.setattr(cobsat_eval, "LOAD_JUDGE", {"vlm": fail, "clip": fail})
    before = tree(base)
    command(*all_methods, base)
    assert tree(base) == before
    with monkeypatch.context() as patch:
        # nor is an image decoded that has been judged
        patch.setattr(cobsat_eval, "open_image", fail)
        command("judge", *SMALL[:-2], *all_methods[all_methods.index("--images"):][:2],
                "--results", base)

    old = tmp_path / "old"
    shutil.copytree(base, old)
    (old / "vlm_features").rename(old / "thoughts")
    settings = read_json(old / "exps/oracle_image/settings.json")
    assert "Create" not in settings.pop("phrases")
    (old / "exps/oracle_image/settings.json").write_text(json.dumps(settings))
    refused = complaint(*all_methods, old)
    assert "oracle_image was made with phrases None, now a {value} {noun}; " in refused
    assert "--overwrite" in refused and tree(old) == before
    own = [word for word in all_methods if word != "oracle"]
    for name, key in (("verdicts/clip", "version"), ("vlm_features", "number_images")):
        settings = read_json(base / name / "settings.json")
        now = settings.pop(key)
        (old / name / "settings.json").write_text(json.dumps(settings))
        assert f"made with {key} None, now {now}: repeat" in complaint(*own, old)
        shutil.copy(base / name / "settings.json", old / name)
    assert tree(old) == before
    command(*own, old)
    assert not (old / "thoughts").exists()
    files = [[path.relative_to(out) for path in sorted((out / "vlm_features").rglob("*"))]
             for out in (old, base)]
    assert files[0] == files[1] and len(files[0]) > 12


def test_pictures_equal_those_of_stock_models_one_at_a_time(images, tmp_path):
    """Answers that EOS ends and answers that are cut off, all methods, no flag at its default."""
    folder, out = ref.save_guided_flux(tmp_path / "flux"), tmp_path / "out"
    shutil.copytree(MINI["aligner"], tmp_path / "aligner")
    other = {name: 1.2 * weight for name, weight in ref.aligner_weights(MINI["aligner"]).items()}
    save_file({f"net.{name}": weight for name, weight in other.items()},
              tmp_path / "aligner/model.safetensors", metadata={"format": "pt"})
    command("generate", *"--mini --tasks 1 4 --shots 2 --limit 3 --batch-size 4 --seed 3".split(),
            *"--size 32 --steps 3 --guidance 9 --true-cfg 2 --t5-length 12 --cache 1e6".split(),
            "--max-new-tokens", 9, "--method", *METHODS, "--images", images, "--flux", folder,
            "--aligner", tmp_path / "aligner", "--out", out)
    vlm, flux = ref.load_vlm(MINI["vlm"]), ref.load_flux(folder)
    ends = []
    for p in [*cobsat_eval.prompts(1, 2)[:3], *cobsat_eval.prompts(4, 2)[:3]]:
        parts = ref.cobsat_parts(p.words, [images / name for name in p.pictures])
        x, words, ended = ref.answer(vlm, parts, 9)
        ends.append(ended)
        stored = load_file(out / f"vlm_features/shot_2/task_{p.task}/{p.name}.safetensors")["x"]
        torch.testing.assert_close(stored, x, rtol=0, atol=1e-4)  # as many states, too
        files = {method: out / f"exps/{method}_image/shot_2/default/task_{p.task}/{p.name}.jpg"
                 for method in METHODS}
        truth = read_json(files["oracle"].with_suffix(".json"))["description"]
        assert truth == cobsat_eval.oracle_text(p.answer)
        prompts = {"thinkdiff": ref.eq1(other, x), "relay": ref.t5_prompt(flux, words, 12),
                   "oracle": ref.t5_prompt(flux, truth, 12)}
        for method, prompt in prompts.items():
            expected = ref.picture(flux, prompt, seed=3 + p.number, size=32, steps=3, guidance=9.0,
                               true_cfg=2.0, cache=1e6)
            jpeg = io.BytesIO()
            Image.fromarray(expected.astype(np.uint8)).save(jpeg, "JPEG", quality=95)
            # a rounding before JPEG
            assert abs(ref.pixels(files[method]) - ref.pixels(jpeg)).max() <= 4
    assert set(ends) == {True, False}


@pytest.mark.parametrize("kind, sentence", [
    (("color", "orange", "car"), "an orange car"),
    (("background", "park", "zebra"), "a zebra with an amusement park background"),
    (("style", "3d", "apple"), "an apple in wireframe style"),
    (("action", "swim", "cat"), "a cat that is swimming"),
    (("action", "angry", "bird"), "a bird that is angry"),
    (("action", "cry", "dog"), "a dog that is crying"),
    (("texture", "wood", "box"), "a box made of wood")])
def test_the_oracles_sentences(kind, sentence):
    assert cobsat_eval.oracle_text(kind) == f"Create an image of {sentence}."


def test_mixed_details_in_a_batch_are_judged_as_one_at_a_time(base, images):
    """The reference pictures at the ends of a detail, whose questions are of other lengths."""
    verdicts = read_json(base / "verdicts/vlm/references.json")
    names = list(verdicts)
    batches = [names[at:at + 8] for at in range(0, 500, 8)]  # --batch-size of SMALL
    mixed = [name for batch in batches for name in batch
             if len({name.split("_")[0] for name in batch}) > 1]
    assert len(mixed) == 16
    model, processor = ref.load_vlm(MINI["vlm"])
    for name in mixed:
        detail = name.removeprefix("datasets/").split("_")[0]
        for key, about_noun in (("detail", False), ("object", True)):
            question = cobsat_eval.judge_question(detail, about_noun)
            asked = {"type": "text", "text": question}
            content = [{"type": "image", "image": Image.open(images / name)}, asked]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True,
                add_generation_prompt=True, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            said = processor.decode(tokens[0, inputs["input_ids"].shape[1]:],
                                    skip_special_tokens=True)
            assert verdicts[name][key] == said.strip(), (name, key)


# the chat template of llava-hf/llava-1.5-13b-hf
LLAVA_TEMPLATE = """\
{% for message in messages %}\
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] + ' '}}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
LLAVA_ASKED = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: {} Answer the number "
    "only and do not include any other texts (e.g., 1). ASSISTANT:")
COLORS = ("(1)yellow (2)white (3)red (4)purple (5)pink (6)orange (7)green (8)brown (9)blue "
          "(10)black.")
OBJECTS = "(1)leaf (2)hat (3)cup (4)chair (5)car (6)box (7)book (8)ball (9)bag (10)apple."
BACKGROUNDS = ("(1)beach (2)desert (3)glacier (4)volcano (5)amusement park (6)gym (7)waterfall "
               "(8)space (9)cave (10)seafloor.")
ANIMALS = "(1)zebra (2)tiger (3)sheep (4)pig (5)monkey (6)lion (7)dog (8)cow (9)cat (10)bird."
FROM = "Answer from the following options:  "
CAPTION = "Image caption: a red, red car. What is the "
# about a picture and about the description "a red, red car", tasks 1 and 4
LLAVA_QUESTIONS = {
    ("vlm", 1, "detail"):
        f"<image>\nWhat is the color (of the main object) in this image? {FROM}{COLORS}",
    ("vlm", 1, "object"): f"<image>\nWhat is the main object in this image? {FROM}{OBJECTS}",
    ("vlm", 4, "detail"):
        f"<image>\nWhat is the background (of the main object) in this image? {FROM}{BACKGROUNDS}",
    ("vlm", 4, "object"): f"<image>\nWhat is the main object in this image? {FROM}{ANIMALS}",
    ("text", 1, "detail"): f"{CAPTION}color (of the main object) in the image based on the "
                           f"description? {FROM}{COLORS}",
    ("text", 1, "object"):
        f"{CAPTION}main object in this image based on the description? {FROM}{OBJECTS}",
    ("text", 4, "detail"): f"{CAPTION}background (of the main object) in the image based on the "
                           f"description? {FROM}{BACKGROUNDS}",
    ("text", 4, "object"):
        f"{CAPTION}main object in this image based on the description? {FROM}{ANIMALS}",
}


def save_llava(folder):
    """A LLaVA with random weights; every third token ends its answer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MINI["vlm"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=16)
    text = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=len(tokenizer))
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=len(tokenizer) - 1))
    model.generation_config = GenerationConfig(
        eos_token_id=list(range(0, len(tokenizer), 3)), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE)
    processor.save_pretrained(folder)
    return model.eval(), processor


def test_llava_is_asked_to_the_character(images, tmp_path, monkeypatch):
    """About pictures and, as a judge named text, about the descriptions beside them: what it reads
    are the strings above, and the verdicts are its answers to them."""
    model, processor = save_llava(tmp_path / "llava")
    texts, call, photo = [], LlavaProcessor.__call__, Image.new("RGB", (40, 40), "red")
    names = {task: cobsat_eval.prompts(task, 2)[0].name for task in (1, 4)}
    for task, name in names.items():
        folder = tmp_path / f"exps/theirs_image/shot_2/default/task_{task}"
        folder.mkdir(parents=True)
        photo.save(folder / f"{name}.jpg")
        # as another project, or an earlier version, writes it
        (folder / f"{name}.json").write_text('{"description": "a red, red car", "text_inputs": []}')

    def listen(self, *args, text, **options):
        texts.append(text)
        return call(self, *args, text=text, **options)
    monkeypatch.setattr(LlavaProcessor, "__call__", listen)
    small = (*"--mini --shots 2 --tasks 1 4 --limit 1 --judge text vlm --images".split(), images,
             "--results", tmp_path)
    judged = ("judge", *small, "--batch-size", 500, "--judge-vlm", tmp_path / "llava")
    command(*judged)
    # 500 references, then the two tasks, both questions each
    assert [len(text) for text in texts] == [500, 500, 1, 1, 1, 1] * 2
    assert texts[1][0] == LLAVA_ASKED.format(
        "Image caption: Create an image of a yellow leaf.. What is the main object in this image "
        f"based on the description? {FROM}{OBJECTS}")
    monkeypatch.undo()
    asked = {key: LLAVA_ASKED.format(text) for key, text in LLAVA_QUESTIONS.items()}
    keys = itertools.product(("text", "vlm"), (1, 4), ("detail", "object"))
    read = dict(zip(keys, [text for text, in [t for t in texts if len(t) == 1]], strict=True))
    assert read == asked
    for (judge, task, key), text in asked.items():
        photos = [Image.open(tmp_path / f"exps/theirs_image/shot_2/default/task_{task}"
                             f"/{names[task]}.jpg")] * (judge == "vlm")
        inputs = processor(text=text, images=photos or None, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1]:]
        verdict = read_json(tmp_path / f"verdicts/{judge}/theirs_image/shot_2/task_{task}.json")
        said = processor.decode(tokens, skip_special_tokens=True).strip()
        assert verdict[names[task]][key] == said
    # a new description is judged again, a missing one is wrong
    notes = {task: tmp_path / f"exps/theirs_image/shot_2/default/task_{task}/{name}.json"
             for task, name in names.items()}
    notes[1].write_text('{"description": "black \\ud800 apple"}')
    notes[4].unlink()
    command(*judged)
    verdicts = [read_json(tmp_path / f"verdicts/text/theirs_image/shot_2/task_{task}.json")[name]
                for task, name in names.items()]
    command("table", *small)
    rows = read_rows(tmp_path)
    assert verdicts[1].items() >= {"file": None, "error": "missing"}.items()
    assert "detail" in verdicts[0] and "detail" not in verdicts[1]
    assert [row["picture"] for row in rows] == ["ok", "missing"]
    assert rows[1]["correct"] == "0" and {"vlm_correct", "text_says"} <= rows[0].keys()


def test_killed_three_times_and_restarted_is_identical(base, all_methods, tmp_path):
    """Killed when the first answers, half of the pictures, and the first verdicts are there."""
    for pattern, number in (("vlm_features/*/*/*.safetensors", 1), ("exps/*/*/*/*/*.jpg", 18),
                            ("verdicts/*/references.json", 1)):
        process = subprocess.Popen([sys.executable, SCRIPT, *all_methods, tmp_path],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.glob(pattern))) < number:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "results.json").exists(), "killed too late to prove anything"
    # as a kill between a picture and its JSON would leave it
    notes = sorted(path.relative_to(base) for path in base.glob("exps/*/*/*/*/*.json"))
    (tmp_path / notes[0]).unlink()
    command(*all_methods, tmp_path)
    assert tree(tmp_path) == tree(base) and all((tmp_path / note).exists() for note in notes)


def test_two_processes_equal_one(base, all_methods, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    subprocess.run([sys.executable, *torchrun, SCRIPT, *all_methods, tmp_path], check=True,
                   capture_output=True)
    for ours, theirs in zip(read_rows(tmp_path), read_rows(base), strict=True):
        # other batches: other roundings
        similarity = float(theirs.pop("similarity"))
        assert float(ours.pop("similarity")) == pytest.approx(similarity, abs=0.01)
        assert ours == theirs


def test_changed_settings_need_overwrite(base, images, tmp_path, monkeypatch):
    out, clip = tmp_path / "x", tmp_path / "clip"
    shutil.copytree(base, out)
    changed = ("run", *SMALL, "--images", images, "--method", "oracle", "--out", out)
    # no weights are quantized here: torchao need not be installed
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name, *rest: name == "torchao" or find(name, *rest))
    for flag, line in (("--steps 2", "steps 1, now 2"), ("--quantize", "quantize None, now True"),
                       ("--cache 0.5", "cache None, now 0.5"), ("--seed 1", "seed 0, now 1"),
                       ("--size 32", "size 64, now 32"), ("--guidance 4", "guidance 3.5, now 4"),
                       ("--true-cfg 2", "true_cfg 3.0, now 2"), ("--t5-length 9", "48, now 9")):
        refused = complaint(*changed, *flag.split())
        assert line in refused and "--overwrite" in refused and tree(out) == tree(base)
    command(*changed, "--steps", 2, "--overwrite", "--tasks", 1)
    before, after = tree(base), tree(out)
    for name in before:
        if name.endswith(".jpg"):
            assert (after.get(name) == before[name]) == ("oracle" not in name)
    assert read_json(out / "results.json").keys() == {"oracle"}
    judged = ("judge", *SMALL[:-2], "--images", images, "--results", out, "--judge-clip")
    assert "cannot load other/clip" in complaint(*judged, "other/clip") and tree(out) == after
    shutil.copytree(MINI["clip"], clip)
    weights = clip / "model.safetensors"
    # retrained, at the end of a path that may be the same
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert "clip" in complaint(*judged, clip)
    # the other judge has nothing to do
    monkeypatch.setitem(cobsat_eval.LOAD_JUDGE, "vlm", None)
    command(*judged, clip, "--overwrite")
    assert read_json(out / "verdicts/clip/settings.json")["model"].startswith("clip ")


def old_fingerprint(folder):
    """As it was, with all files but .md files: what was made then is still accepted."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if file.suffix != ".md":
            data = file.read_bytes()
            digest.update(f"{file.name} {len(data)} ".encode() + data[-65536:])
    return f"{folder.name} {digest.hexdigest()}"


def test_hidden_and_foreign_files_do_not_decide(base, images, all_methods, tmp_path):
    """Those that file managers and downloads leave; also what an earlier version made goes on."""
    settings = read_json(base / "exps/thinkdiff_image/settings.json")
    for name in ("vlm", "flux", "aligner"):
        assert settings[name] == old_fingerprint(Path(MINI[name])), name
    assert settings["images"] == old_fingerprint(images / "datasets")
    out, dataset, vlm = (tmp_path / name for name in ("out", "images", Path(MINI["vlm"]).name))
    for source, copy in ((base, out), (images, dataset), (MINI["vlm"], vlm)):
        shutil.copytree(source, copy)
    for folder in (out / "exps", out / "exps/oracle_image", out / "verdicts/vlm", vlm,
                   dataset / "datasets", dataset / "datasets/color_car"):
        for name in (".DS_Store", "._config.json", "Thumbs.db", "notes.docx"):
            (folder / name).write_bytes(b"not ours")
    (vlm / ".cache").mkdir()
    (vlm / ".cache/config.json").write_text("{}")
    (dataset / "datasets/color_car/._red_car.jpg").write_bytes(b"not ours")
    at = all_methods.index(str(images))
    command(*all_methods[:at], dataset, *all_methods[at + 1:], out, "--vlm", vlm)
    assert tree(out) == tree(base)


def test_damaged_files_are_made_again_or_named(base, images, all_methods, tmp_path):
    """What a model has made is made again, bit for bit; a description is left out; settings.json
    alone cannot be made again."""
    out = tmp_path / "out"
    shutil.copytree(base, out)
    answers = sorted(out.glob("vlm_features/*/*/*.safetensors"))[:6]
    good = load_file(answers[0])["x"]
    answers[0].write_bytes(answers[0].read_bytes()[:-1])
    answers[1].write_bytes(b"")
    note = {"words": "a car", "seconds": "1"}
    save_file({"x": good}, answers[2], note | {"seconds": "long"})
    save_file({"x": good[:, :9].contiguous()}, answers[3], note)
    save_file({"x": torch.full_like(good, torch.nan)}, answers[4], note)
    save_file({"x": good}, answers[5], {"words": "a car"})
    one, two, three, four = sorted(out.glob("verdicts/*/*_image/*/*.json"))[:4]
    one.write_bytes(one.read_bytes()[:-9])
    two.write_text("[]")
    three.write_text(json.dumps({name: 1 for name in read_json(three)}))
    # like ours, but not what the judge said
    four.write_text(json.dumps({name: {**verdict, "detail": verdict["object"]}
                                for name, verdict in read_json(four).items()}))
    (out / "verdicts/vlm/references.json").write_text('{"x": NaN}')
    names = [path.name for path in (*answers, one, two)]
    _, err = command("generate", *all_methods[1:], out)
    assert [err.count(name) for name in names[:6]] == [1] * 6, err
    assert tree(out) == tree(base) and "Traceback" not in err
    for path in answers:
        expected = load_file(base / path.relative_to(out))["x"]
        assert torch.equal(load_file(path)["x"], expected)
    notes = sorted(out.glob("exps/oracle_image/*/*/*/*.json"))[:4]
    for path, text in zip(notes, ("[", "[]", '{"description": 3}', "{}"), strict=True):
        path.write_text(text)
    table = ("table", *SMALL[:-4], "--images", images, "--models", *METHODS, "--results", out)
    _, err = command(*table, code=1)
    assert all(f"{path} is damaged" in err for path in (one, two))
    assert "are not judged" in err and "Traceback" not in err
    judged = ("judge", *SMALL[:-2], "--images", images, "--results", out)
    command(*judged)
    _, err = command(*table)
    assert tree(out) == tree(base)
    assert all(err.count(f"/{path.name} is damaged") == 1 for path in notes)
    for folder in ("exps/oracle_image", "verdicts/clip"):
        (out / folder / "settings.json").write_bytes(b"{\xff")
    for call in (("generate", *all_methods[1:], out), judged):
        line = complaint(*call)
        assert "made by something else" in line and tree(out) == tree(base)


def test_a_failed_start_leaves_nothing(base, all_methods, tmp_path):
    """Nothing that would be in the way of the corrected command; nor does it delete anything."""
    for flag in ("--vlm", "--flux", "--aligner", "--judge-vlm", "--judge-clip", "--images"):
        for wrong in ("nobody/nothing", tmp_path / "nothing"):
            complaint(*all_methods, tmp_path / "out", flag, wrong)
            assert not list(tmp_path.iterdir()), flag
    out = tmp_path / "out"
    shutil.copytree(base, out)
    before = sorted(out.rglob("*"))
    for flag in ("--flux", "--aligner", "--judge-clip"):
        complaint(*all_methods, out, "--steps", 2, "--overwrite", flag, "nobody/nothing")
        assert sorted(out.rglob("*")) == before and tree(out) == tree(base)
    # one of three methods was made otherwise: the other two are not touched either
    settings = out / "exps/relay_image/settings.json"
    settings.write_text(json.dumps(read_json(settings) | {"seed": 9}))
    for folder in (*out.glob("verdicts/*/thinkdiff_image"), out / "exps/thinkdiff_image"):
        shutil.rmtree(folder)
    assert "seed 9, now 0" in complaint(*all_methods, out)
    assert not (out / "exps/thinkdiff_image").exists()


def test_a_second_run_in_a_folder_is_refused(base, images):
    before = tree(base)
    with FileLock(base / ".lock"):
        for step, flag in (("run", "--out"), ("generate", "--out"), ("judge", "--results"),
                           ("table", "--results")):
            assert "another run is writing to" in complaint(
                step, *SMALL[:-4], "--images", images, flag, base)
    (base / ".lock").unlink()
    assert tree(base) == before


# ---------------------------------------------------------------- results that somebody else made
@pytest.fixture(scope="session")
def copycat(base, images, tmp_path_factory):
    """Reference pictures as answers: of 12 one with a wrong value, two with wrong nouns, so that no
    two metrics are the same."""
    out = tmp_path_factory.mktemp("copycat")
    for task in (5, 8):
        for p in cobsat_eval.prompts(task, 2)[:12]:
            file = out / f"exps/copycat_image/shot_2/default/task_{task}/{p.name}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            detail, value, noun = p.answer
            values, nouns = LABELS[detail], LABELS[NOUNS[detail]]
            if p.number == 1:
                value = values[values.index(value) - 1]
            if p.number in (2, 3):
                noun = nouns[nouns.index(noun) - 1]
            shutil.copy(images / f"datasets/{detail}_{noun}/{value}_{noun}.jpg", file)
    for name in ("vlm", "clip"):  # the judges have seen the references already
        shutil.copytree(base / "verdicts" / name, out / "verdicts" / name,
                        ignore=shutil.ignore_patterns("*_image"))
    return out


def judge_and_table(folder, images):
    shared = (*"--mini --tasks 5 8 --shots 2 --limit 12 --images".split(), images, "--results",
              folder)
    command("judge", *shared)
    return command("table", *shared)[0]


def test_scores_by_hand_and_swapped_pictures(copycat, images):
    judge_and_table(copycat, images)
    rows, results = read_rows(copycat), read_json(copycat / "results.json")["copycat"]["2"]
    assert len(rows) == 24 and 0.6 < results["mean"]["correct"] <= 9 / 12
    for task in ("Style-I", "Action-II"):
        cell, mine = results[task], [row for row in rows if row["task"] == task]
        right = [row["vlm_says"] == row["wanted"] for row in mine]
        by_clip = [row["clip_says"] == row["wanted"] for row in mine]
        assert (cell["n"], cell["missing"], cell["judge"]) == (len(mine), 0, "vlm")
        assert [int(row["correct"]) for row in mine] == right
        for metric, values in {
                "correct": right, "clip_correct": by_clip, "agree": np.equal(right, by_clip),
                "similarity": [float(row["similarity"]) for row in mine]}.items():
            assert cell[metric] == pytest.approx(sum(values) / 12, abs=1e-4)
    # number 5 of task 5, with its own value and noun, by stock CLIP
    p, clip = cobsat_eval.prompts(5, 2)[5], CLIPModel.from_pretrained(MINI["clip"])
    file = copycat / f"exps/copycat_image/shot_2/default/task_5/{p.name}.jpg"
    inputs = CLIPProcessor.from_pretrained(MINI["clip"])(
        text=[" ".join(p.answer[1:])], images=Image.open(file), return_tensors="pt")
    similarity = clip(**inputs).logits_per_image.item()
    assert similarity > 1 and float(rows[5]["similarity"]) == pytest.approx(similarity, abs=1e-3)

    # two right pictures that share neither noun nor value
    good = [row for row in rows if row["correct"] == row["clip_correct"] == "1"]
    one, other = next((a, b) for a, b in itertools.combinations(good, 2) if a["task"] == b["task"]
                      and not set(a["wanted"].split()) & set(b["wanted"].split()))
    folder = copycat / f"exps/copycat_image/shot_2/default/task_{one['task_id']}"
    files = [folder / f"{row['name']}.jpg" for row in (one, other)]
    pictures = [file.read_bytes() for file in files]
    judged = []
    for order in (reversed(pictures), pictures):
        for file, data in zip(files, order, strict=True):
            file.write_bytes(data)
        judge_and_table(copycat, images)
        judged.append(read_rows(copycat))
    swapped, back = judged
    lowered = [row for row, before in zip(swapped, rows, strict=True) if row != before]
    assert back == rows
    assert [row["name"] for row in lowered] == [one["name"], other["name"]]
    assert all(row[key] == "0" for row in lowered
               for key in ("correct", "detail", "object", "clip_correct"))


def test_clips_similarity_is_the_benchmarks(images):
    """To the shown word of what the prompt's words say, the label of what its images share; times
    the logit scale, at least 0."""
    image = Image.open(images / "datasets/background_dog/park_dog.jpg")
    judge = cobsat_eval.load_clip_judge(MINI["clip"], "cpu", torch.bfloat16)
    clip, processor = CLIPModel.from_pretrained(MINI["clip"]), CLIPProcessor.from_pretrained(
        MINI["clip"])
    negative = 0
    for source, kind, text in (
            (("m", 2, 3), ("background", "park", "dog"), "amusement park dog"),
            (("m", 2, 4), ("background", "park", "dog"), "park dog"),
            (("m", 4, 5), ("style", "3d", "car"), "wireframe car"),
            (("m", 4, 6), ("style", "3d", "car"), "3d car"),
            (("m", 2, 1), ("color", "blue", "hat"), "blue hat"),
            (None, ("texture", "wood", "box"), "wood box")):
        inputs = processor(text=[text], images=image, return_tensors="pt")
        with torch.no_grad():
            logit = clip(**inputs).logits_per_image.item()
        negative += logit < 0
        verdict, = judge([image], [kind], source)
        assert verdict["similarity"] == pytest.approx(max(logit, 0), abs=1e-3), text
    assert negative


def test_missing_and_broken_pictures_are_wrong_and_listed(copycat, images, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(copycat, folder)
    files = sorted((folder / "exps/copycat_image/shot_2/default/task_8").iterdir())[:6]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:300])
    files[2].write_bytes(b"")
    for file in files[3:5]:
        file.unlink()
    files[3].mkdir()
    os.mkfifo(files[4])
    Image.new("RGB", (1, 250)).save(files[5])
    # what other projects leave beside their pictures
    for name in ("settings.json", "shot_2/default/task_8/notes.json"):
        (folder / "exps/copycat_image" / name).write_text('["?"]')
    out = judge_and_table(folder, images)
    rows = {row["name"]: row for row in read_rows(folder) if row["task_id"] == "8"}
    assert len(rows) == 12 and sum(row["picture"] != "ok" for row in rows.values()) == 6
    reasons = ("missing", "cannot read", "cannot read", "missing", "missing", "is a strip")
    for file, reason in zip(files, reasons, strict=True):
        row = rows[file.stem]
        assert reason in row["picture"] and f"{file.stem}: " in out
        assert all(row[key] == "0" for key in ("correct", "detail", "object", "clip_correct"))
    assert read_json(folder / "results.json")["copycat"]["2"]["Action-II"]["missing"] == 6
    assert "6 missing or broken pictures" in (folder / "report.html").read_text()


def test_a_mean_weights_all_tasks_alike():
    """However many prompts a task has: 1 of 1 right and 0 of 3 right are a half."""
    row = {"method": "m", "shots": 2, "task_id": 1, "picture": "ok"}
    rows = [{**row, "task": "Color-I", "correct": 1}]
    rows += [{**row, "task": "Color-II", "correct": 0}] * 3
    assert cobsat_eval.score(rows, "vlm")["m"]["2"]["mean"]["correct"] == 0.5


def test_statistics_and_ranking_of_typed_verdicts(base, images, tmp_path):
    """Of 60 answers to task t, only the detail is right in 2 t, only the noun in t, nothing in t.

    One of the last is missing. Methods a and b have 10 and 20 more with nothing right."""
    (tmp_path / "verdicts/vlm").mkdir(parents=True)
    shutil.copy(base / "verdicts/vlm/references.json", tmp_path / "verdicts/vlm")
    more = {"a": 10, "b": 20, "c": 0}
    for method, task in itertools.product(more, range(1, 11)):
        right = ["detail"] * 2 * task + ["object"] * task + [""] * (task - 1 + more[method])
        right += ["detail object"] * (59 - len(right))
        prompts = cobsat_eval.prompts(task, 2)[:60]
        verdicts = {prompts[59].name: {"file": None, "error": "missing"}}
        for p, keys in zip(prompts[:59], right, strict=True):
            detail, value, noun = p.answer
            numbers = {"detail": LABELS[detail].index(value),
                       "object": LABELS[NOUNS[detail]].index(noun)}
            said = {key: f"({(number + (key not in keys)) % 10 + 1})"
                    for key, number in numbers.items()}
            verdicts[p.name] = {"file": "x", **said}
        file = tmp_path / f"verdicts/vlm/{method}_image/shot_2/task_{task}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({
            name: {**verdict, "hash": digest(json.dumps(verdict).encode())}
            for name, verdict in verdicts.items()}))
        (tmp_path / f"exps/{method}_image/shot_2/default/task_{task}").mkdir(parents=True)
    command("table", *"--mini --judge vlm --shots 2 --limit 60 --gallery 1 --scale".split(),
            "full size", "--images", images, "--results", tmp_path)
    results = read_json(tmp_path / "results.json")

    rng = np.random.default_rng(1)
    for method, wrong in more.items():
        cells, draws, shares = results[method]["2"], [], []
        mean = cells.pop("mean")
        for task in range(1, 11):
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
    hub, copy = "https://huggingface.co/datasets/yzeng58/CoBSAT", tmp_path / "images"
    shutil.copytree(images, copy)
    brown = copy / "datasets/color_car/brown_car.jpg"
    brown.unlink()
    for step, folder in (("generate", "--out"), ("judge", "--results"), ("table", "--results")):
        line = complaint(step, *SMALL[:-4], "--images", copy, folder, base)
        assert "color_car/brown_car.jpg is missing" in line
        assert hub in line and "datasets.zip" in line
    brown.write_bytes(b"broken")
    line = complaint("judge", *SMALL[:-2], "--images", copy, "--results", base)
    assert "brown_car.jpg" in line and hub in line
    small, nothing = (*SMALL[:-4], "--images", images), tmp_path / "nothing"
    assert "no results in" in complaint("judge", *small, "--results", nothing)
    table = ("table", *small, "--results", base)
    assert "no pictures of gill" in complaint(*table, "--models", "gill")
    assert "are not judged" in complaint(*table, "--tasks", 1, "--limit", 5)
    drawn = ("generate", *small, "--out", tmp_path / "x", "--aligner", tmp_path / "no/aligner")
    assert "no aligner at" in complaint(*drawn) and not list(tmp_path.glob("x/**/*.jpg"))
    (tmp_path / "theirs/exps/oracle_image/shot_2/default/task_1").mkdir(parents=True)
    assert "made by something else" in complaint(
        "generate", *small, "--method", "oracle", "--out", tmp_path / "theirs")
    for wrong in ("--tasks 11", "--tasks some", "--shots 9", "--limit 0", "--method magic"):
        command("run", "--mini", *wrong.split(), code=2)
    shell = subprocess.run([sys.executable, SCRIPT, *map(str, table[:-1]), nothing],
                           capture_output=True, text=True)
    assert shell.returncode == 1 and "Traceback" not in shell.stderr
    assert shell.stderr.splitlines()[-1].startswith("error: ")
