"""The protocol typed a second time: prompts, instruction, batch sizes, steps and 64 tokens from the
paper, the other figures from its released code; and every default of every command, full size and
--mini. Nothing here is imported from the scripts."""
import functools
import importlib
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor

import cobsat_eval
from common import EXAMPLE, MINI, REPO
from helpers import command
from miniature import vlm

PROMPTS = [
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
    "Generate a prompt that can recreate the image in a 2D diffusion model.",
    "Provide a descriptive prompt to reproduce the given image using a diffusion model.",
    "Create a prompt suitable for a 2D diffusion model to generate the same image.",
    "Summarize the visual details as a prompt for a 2D diffusion model.",
    "Write a clear prompt to guide a 2D diffusion model in recreating the image.",
]
INSTRUCTION = (
    "I give you several words and pictures. First, please analyse what the next picture is. Then "
    "give me a detailed diffusion prompt to describe the next picture. Please only provide me the "
    "detailed prompt and start the answer with 'Create an image'.")
# Qwen2-VL's chat template on the hub, which numbers pictures if asked to
QWEN_TEMPLATE = """\
{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
{% set image_count.value = image_count.value + 1 %}\
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' or 'video' in content %}\
{% set video_count.value = video_count.value + 1 %}\
{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}\
<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# CoBSAT's task 1, prompt 0, as Qwen2-VL reads it
TWO_SHOTS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{INSTRUCTION}\n\n"
    "Word 1: blue, Picture 1: <|vision_start|><|image_pad|><|vision_end|>\n\n"
    "Word 2: brown, Picture 2: <|vision_start|><|image_pad|><|vision_end|>\n\n"
    "Word 3: orange, <|im_end|>\n<|im_start|>assistant\n")
FOUR_SHOTS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{INSTRUCTION}\n\n"
    "Word 1: blue, Picture 1: <|vision_start|><|image_pad|><|vision_end|>\n\n"
    "Word 2: brown, Picture 2: <|vision_start|><|image_pad|><|vision_end|>\n\n"
    "Word 3: orange, Picture 3: <|vision_start|><|image_pad|><|vision_end|>\n\n"
    "Word 4: black, Picture 4: <|vision_start|><|image_pad|><|vision_end|>\n\n"
    "Word 5: red, <|im_end|>\n<|im_start|>assistant\n")
# CoBSAT's labels in its order, and the two that are shown as other words
LABELS = {
    "color": "yellow white red purple pink orange green brown blue black".split(),
    "object": "leaf hat cup chair car box book ball bag apple".split(),
    "animal": "zebra tiger sheep pig monkey lion dog cow cat bird".split(),
    "style": "watercolor sketch pixel origami lego icon graffiti futuristic 3d old".split(),
    "action": "swim sleep sing run read fly eat drink cry angry".split(),
    "background": "beach desert glacier volcano park gym waterfall space cave seafloor".split(),
    "texture": "wood wicker sequined plastic paper metal leather lace denim ceramic".split(),
}
SHOWN = {"3d": "wireframe", "park": "amusement park"}
NOUNS = {"color": "object", "background": "animal", "style": "object", "action": "animal",
         "texture": "object"}

QWEN, EVA = "Qwen/Qwen2-VL-7B-Instruct", "Salesforce/blip2-flan-t5-xxl"
T5, FLUX = "google/flan-t5-xxl", "black-forest-labs/FLUX.1-dev"
MINI_LVLM = dict(mini=True, vlm="miniature/weights/qwen2-vl")
MINI_CLIP = dict(mini=True, vlm="miniature/weights/clip")
LVLM_ALIGNER, CLIP_ALIGNER = (
    dict(aligner=f"miniature/weights/aligner-{variant}") for variant in ("lvlm", "clip"))
TRAIN = dict(
    mini=False, t5=T5, resume=False, workers=8, lr=1e-4, lr_end=8e-5, lr_horizon=200000,
    warmup=2000, weight_decay=0.05, masking="random", norm="t5", hidden=None, held_out=512,
    log_every=10, eval_every=500, save_every=500, keep=2, compile=False, seed=0,
    dtype="auto", encoder_loss=0.0)
MINI_TRAIN = dict(
    t5="miniature/weights/t5", batch_size=64, micro_batch=64, workers=2, lr=2e-3, lr_end=2e-4,
    warmup=50, eval_every=100, save_every=100)
LVLM_TRAIN = TRAIN | dict(
    vlm=QWEN, data="data/lvlm", out="runs/lvlm", features="generated", steps=25000, batch_size=96,
    micro_batch=24)
CLIP_TRAIN = TRAIN | dict(
    vlm=EVA, data=["data/cc3m", "data/cc12m", "data/sbu"], out="runs/clip", steps=100000,
    batch_size=168, micro_batch=42, captions="lower", offload=False)
FLUX_DRAWS = dict(flux=FLUX, seed=0, steps=28, guidance=3.5, true_cfg=1.0, dtype="auto")
DRAW = FLUX_DRAWS | dict(mini=False, offload=False, quantize=False, compile=False, cache=None)
MINI_FLUX = dict(flux="miniature/weights/flux", size=64, true_cfg=3.0)
MINI_DRAW = MINI_FLUX | dict(
    pixart="miniature/weights/pixart", batch_size=32, t5_length=48)
DECODERS = dict(
    decoder="flux", pixart="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    sd3="stabilityai/stable-diffusion-3.5-medium", chroma="lodestones/Chroma1-HD",
    cogvideox="THUDM/CogVideoX-5b", ltx="Lightricks/LTX-Video")
GENERATE = DRAW | DECODERS | dict(
    frames=49, fps=8, batch=None, out=None, overwrite=False, num_images=1, batch_size=1, context=[])
LVLM_GENERATE = GENERATE | dict(
    vlm=QWEN, aligner="runs/lvlm/aligner", instruction=INSTRUCTION, relay=False, size=512,
    features="generated", max_new_tokens=128, temperature=0.0, top_p=0.9, t5_length=512,
    best_of=1)
CLIP_GENERATE = GENERATE | dict(
    vlm=EVA, aligner="runs/clip/aligner", image_weight=[], size=1024, t5_length=128,
    empty_text="pad")
# the last five are those of an aligner that is trained
EXPLAIN = FLUX_DRAWS | dict(
    mini=False, t5=T5, image="image.jpg", no_picture=False, out="outputs/explain.png",
    masking="random", features="generated", norm="t5", hidden=None, captions="raw")
MINI_EXPLAIN = MINI_FLUX | dict(t5="miniature/weights/t5", image="miniature/example/white_car.png")
PREPARE = dict(
    mini=False, images=["x"], out="y", count=None, tokens_only=False, features="generated",
    backend="transformers", vlm=QWEN, tokens=64, temperature=0.6, top_p=0.9, seed=0, max_side=1024,
    batch_size=32, shard_size=512, workers=4, dtype="auto")
TABLE = dict(
    mini=False, images="data/cobsat", out="results/full", shots=[2, 4], limit=1000, models=[],
    results="results/full", tasks=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], scale="full size",
    judge=["vlm", "clip"])
JUDGE = TABLE | dict(
    judge_vlm="llava-hf/llava-1.5-13b-hf", judge_clip="openai/clip-vit-base-patch32",
    overwrite=False, batch_size=8, dtype="auto")
COBSAT = {name: TABLE[name] for name in TABLE if name not in ("models", "results", "judge")}
COBSAT |= DRAW | DECODERS | dict(
    best_of=1, vlm=QWEN, aligner="runs/lvlm/aligner", method=["thinkdiff"], max_new_tokens=128,
    size=512, t5_length=512, overwrite=False, batch_size=8)
RUN = {name: value for name, value in (JUDGE | COBSAT).items() if name not in ("models", "results")}
MINI_COBSAT = dict(mini=True, out="results/mini", scale="miniature", limit=100)
MINI_TABLE = MINI_COBSAT | dict(results="results/mini")
MINI_JUDGES = dict(judge_vlm="miniature/weights/qwen2-vl", judge_clip="miniature/weights/clip",
                   batch_size=32)
MINI_COBSAT |= MINI_DRAW | MINI_LVLM | LVLM_ALIGNER
# command line: what every flag is without --mini, and what --mini changes
DEFAULTS = {
    "thinkdiff_lvlm.py train": (LVLM_TRAIN, MINI_TRAIN | MINI_LVLM | dict(
        data="data/mini-lvlm", out="runs/mini-lvlm", steps=300, lr_horizon=300, hidden=512)),
    "thinkdiff_clip.py train": (CLIP_TRAIN, MINI_TRAIN | MINI_CLIP | dict(
        data=["data/mini"], out="runs/mini-clip", steps=1500, lr_horizon=1500, hidden=512,
        captions="raw")),
    "thinkdiff_lvlm.py generate": (LVLM_GENERATE, MINI_DRAW | MINI_LVLM | LVLM_ALIGNER),
    "thinkdiff_clip.py generate": (
        CLIP_GENERATE, MINI_DRAW | MINI_CLIP | CLIP_ALIGNER | dict(empty_text="none")),
    "thinkdiff_clip.py generate --video": (
        CLIP_GENERATE | dict(decoder="cogvideox", steps=50, guidance=6.0, size=None),
        MINI_DRAW | MINI_CLIP | CLIP_ALIGNER | dict(size=None, empty_text="none")),
    "thinkdiff_lvlm.py explain": (
        EXPLAIN | dict(vlm=QWEN, aligner="runs/lvlm/aligner", prompt=0, tokens=64, size=512),
        MINI_EXPLAIN | MINI_LVLM | LVLM_ALIGNER | dict(tokens=40)),
    "thinkdiff_clip.py explain": (
        EXPLAIN | dict(vlm=EVA, aligner="runs/clip/aligner", text="a caption", size=1024),
        MINI_EXPLAIN | MINI_CLIP | CLIP_ALIGNER | dict(
            text="A picture of a white car. The car is white.")),
    "prepare_data.py lvlm --images x --out y": (
        PREPARE, MINI_LVLM | dict(tokens=40, batch_size=128)),
    "cobsat_eval.py generate": (COBSAT, MINI_COBSAT),
    "cobsat_eval.py judge": (JUDGE, MINI_TABLE | MINI_JUDGES),
    "cobsat_eval.py table": (TABLE | dict(gallery=100), MINI_TABLE),
    "cobsat_eval.py run": (RUN | dict(gallery=100), MINI_COBSAT | MINI_JUDGES),
}
# what the parsers set beside the flags
NOT_FLAGS = {"run", "command", "example"}
COMMANDS = {"train", "generate", "explain", "lvlm", "fetch", "run_all", "judge", "table", "check",
            "draw_data", "draw_cobsat", "draw_sheet", "gallery", "claims", "measure_ceilings"}


def parsed(script, *arguments):
    """The flags {name: value} with which a script (or the package "miniature") calls the function
    that does the work, which is not run; paths in the repository are relative to it."""
    called = []

    def recorder(function):
        @functools.wraps(function)
        def record(args):
            called.append(vars(args))
            raise SystemExit(0)
        return record

    def plain(value):
        return str(value).removeprefix(f"{REPO}/") if isinstance(value, (str, Path)) else value

    name = "miniature.__main__" if script == "miniature" else script.removesuffix(".py")
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        for function in COMMANDS & vars(module).keys():
            patch.setattr(module, function, recorder(getattr(module, function)))
        command(script, *arguments)
    assert len(called) == 1
    return {name: plain(value) for name, value in called[0].items()}


@pytest.mark.parametrize("line", DEFAULTS)
def test_defaults(line):
    """A new flag needs an entry above; every file of the repository that a default names exists."""
    full, mini = DEFAULTS[line]
    flags = parsed(*line.split())
    assert {name: value for name, value in flags.items() if name not in NOT_FLAGS} == full
    flags = parsed(*line.split(), "--mini")
    assert {name: value for name, value in flags.items() if name not in NOT_FLAGS} == full | mini
    named = [value for value in flags.values() if str(value).startswith("miniature/")]
    assert all((REPO / name).exists() for name in named)
    assert named or line.endswith("table")


@pytest.fixture
def read_texts(tmp_path, monkeypatch):
    """A copy of the miniature's VLM with Qwen2-VL's template, and a list of all that it reads."""
    folder, texts, call = tmp_path / "qwen2-vl", [], Qwen2VLProcessor.__call__
    shutil.copytree(MINI["vlm"], folder)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)

    def listen(self, *args, text, **options):
        texts.extend(text)
        return call(self, *args, text=text, **options)
    monkeypatch.setattr(Qwen2VLProcessor, "__call__", listen)
    return folder, texts


def test_contexts_as_qwen2_vl_reads_them(read_texts, tmp_path):
    """CoBSAT's, the same context typed by a user, and one with another instruction."""
    (folder, texts), images = read_texts, tmp_path / "images"
    for detail, nouns in NOUNS.items():
        for value, noun in itertools.product(LABELS[detail], LABELS[nouns]):
            file = images / f"datasets/{detail}_{noun}/{value}_{noun}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), value if detail == "color" else "white").save(file)
    quick = ("--mini", "--vlm", folder, "--steps", 1, "--max-new-tokens", 1, "--out")
    command("cobsat_eval.py", "generate", *quick, tmp_path / "x", "--images", images, "--tasks", 1,
            "--shots", 2, 4, "--limit", 1)
    assert [text for text in texts if "Word 1" in text] == [TWO_SHOTS, FOUR_SHOTS]
    context, car = [], images / "datasets/color_car"
    for word in ("Word 1: blue, ", "\n\nWord 2: brown, "):
        context += ["--text", word, "--image", car / f"{word.split()[-1][:-1]}_car.jpg"]
    context += ["--text", "\n\nWord 3: orange, "]
    for more, expected in (([], TWO_SHOTS),
                           (["--instruction", "Draw."], TWO_SHOTS.replace(INSTRUCTION, "Draw."))):
        texts.clear()
        command("thinkdiff_lvlm.py", "generate", *quick, tmp_path / "x.png", "--overwrite",
                *context, *more)
        assert texts[-1] == expected


def test_an_image_to_be_described_has_no_number(read_texts, tmp_path):
    folder, texts = read_texts
    command("prepare_data.py", "lvlm", "--mini", "--vlm", folder, "--tokens", 2,
            "--images", EXAMPLE / "white_car.png", "--out", tmp_path / "data")
    assert any(prompt in texts[-1] for prompt in PROMPTS)
    assert not any("Picture" in text for text in texts)


@pytest.mark.parametrize("detail", NOUNS)
def test_the_judges_questions(detail):
    """The benchmark's words, in which the miniature's VLM is taught."""
    nouns = LABELS[NOUNS[detail]]
    for about_noun, asked, labels in ((False, f"{detail} (of the main object)", LABELS[detail]),
                                      (True, "main object", nouns)):
        options = " ".join(
            f"({i}){SHOWN.get(label, label)}" for i, label in enumerate(labels, 1))
        question = (f"What is the {asked} in this image? Answer from the following options:  "
                    f"{options}. Answer the number only and do not include any other texts (e.g., "
                    "1).")
        assert cobsat_eval.judge_question(detail, about_noun) == question


def test_the_miniature_is_asked_as_it_was_taught(read_texts):
    """Without LLaVA's system sentence, which changes answers."""
    folder, texts = read_texts
    judge = cobsat_eval.load_vlm_judge(folder, "cpu", torch.float32)
    judge([Image.new("RGB", (64, 64))], [("style", "3d", "car")], None)
    questions = [cobsat_eval.judge_question("style", about_noun) for about_noun in (False, True)]
    assert texts == [vlm.chat(vlm.IMAGE + question) for question in questions]
