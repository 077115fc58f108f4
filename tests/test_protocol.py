"""The protocol typed a second time, from the paper and its released code: prompts, questions and
every default of every command, full size and --mini. Nothing here is imported from the scripts."""
import functools
import importlib
from pathlib import Path

import pytest

import cobsat_eval
from common import REPO
from helpers import command

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
OBJECTS = "leaf hat cup chair car box book ball bag apple"
ANIMALS = "zebra tiger sheep pig monkey lion dog cow cat bird"
# detail: the values as the judge reads them, the nouns
OPTIONS = {
    "color": ("yellow white red purple pink orange green brown blue black", OBJECTS),
    "background": ("beach desert glacier volcano amusement-park gym waterfall space cave seafloor",
                   ANIMALS),
    "style": ("watercolor sketch pixel origami lego icon graffiti futuristic wireframe old",
              OBJECTS),
    "action": ("swim sleep sing run read fly eat drink cry angry", ANIMALS),
    "texture": ("wood wicker sequined plastic paper metal leather lace denim ceramic", OBJECTS),
}

QWEN, EVA = "Qwen/Qwen2-VL-7B-Instruct", "Salesforce/blip2-flan-t5-xxl"
T5, FLUX = "google/flan-t5-xxl", "black-forest-labs/FLUX.1-dev"
TRAIN = dict(
    mini=False, t5=T5, flux=FLUX, resume=False, workers=8, lr=1e-4, lr_end=8e-5, lr_horizon=200000,
    warmup=2000, weight_decay=0.05, masking="random", norm="t5", hidden=None, held_out=512,
    log_every=10, eval_every=500, save_every=500, keep=2, compile=False, sample_every=0,
    sample_steps=28, seed=0)
MINI_TRAIN = dict(
    mini=True, t5="mini/t5", flux="mini/flux", batch_size=64, micro_batch=64, workers=2, lr=2e-3,
    lr_end=2e-4, warmup=50, eval_every=100, save_every=100, size=64)
LVLM_TRAIN = TRAIN | dict(
    vlm=QWEN, data="data/lvlm", out="runs/lvlm", features="generated", steps=25000, batch_size=96,
    micro_batch=24, size=512)
CLIP_TRAIN = TRAIN | dict(
    vlm=EVA, data=["data/cc3m", "data/cc12m", "data/sbu"], out="runs/clip", steps=100000,
    batch_size=168, micro_batch=42, size=1024)
DRAW = dict(
    mini=False, flux=FLUX, seed=0, steps=28, guidance=3.5, true_cfg=1.0, offload=False,
    quantize=False, compile=False, cache=None)
MINI_DRAW = dict(mini=True, flux="mini/flux", size=64, true_cfg=3.0, batch_size=32, t5_length=48)
MINI_CLIP_DRAW = MINI_DRAW | dict(vlm="mini/clip", aligner="mini/aligner-clip")
GENERATE = DRAW | dict(batch=None, out=None, overwrite=False, num_images=1, batch_size=1)
LVLM_GENERATE = GENERATE | dict(
    vlm=QWEN, aligner="runs/lvlm/aligner", instruction=INSTRUCTION, relay=False, size=512,
    features="generated", max_new_tokens=128, temperature=0.0, top_p=0.9, t5_length=512)
CLIP_GENERATE = GENERATE | dict(
    vlm=EVA, aligner="runs/clip/aligner", cogvideox="THUDM/CogVideoX-5b", decoder="flux", image=[],
    text="", image_weight=[], size=1024, frames=49, fps=8, t5_length=128)
PREPARE = dict(
    mini=False, images=["x"], out="y", count=None, tokens_only=False, features="generated",
    backend="transformers", vlm=QWEN, tokens=64, temperature=0.6, top_p=0.9, seed=0, max_side=1024,
    batch_size=32, shard_size=512, workers=4)
TABLE = dict(
    mini=False, images="data/cobsat", out="results/full", shots=[2, 4], limit=1000, models=None,
    tasks=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], scale="full size")
JUDGE = TABLE | dict(
    judge=["vlm", "clip"], judge_vlm="llava-hf/llava-1.5-13b-hf", overwrite=False, batch_size=8,
    judge_clip="openai/clip-vit-base-patch32")
COBSAT = TABLE | DRAW | dict(
    vlm=QWEN, aligner="runs/lvlm/aligner", method=["thinkdiff"], max_new_tokens=128, size=512,
    t5_length=512, overwrite=False, batch_size=8)
MINI_TABLE = dict(mini=True, out="results/mini", scale="miniature", limit=100)
MINI_JUDGE = MINI_TABLE | dict(judge_vlm="mini/qwen2-vl", judge_clip="mini/clip", batch_size=32)
MINI_COBSAT = MINI_TABLE | MINI_DRAW | dict(vlm="mini/qwen2-vl", aligner="mini/aligner-lvlm")
# command line: what every flag is without --mini, and what --mini changes
DEFAULTS = {
    "thinkdiff_lvlm.py train": (LVLM_TRAIN, MINI_TRAIN | dict(
        vlm="mini/qwen2-vl", data="data/mini-lvlm", out="runs/mini-lvlm", steps=1500,
        lr_horizon=1500)),
    "thinkdiff_clip.py train": (CLIP_TRAIN, MINI_TRAIN | dict(
        vlm="mini/clip", data=["data/mini"], out="runs/mini-clip", steps=5000, lr_horizon=5000,
        hidden=512)),
    "thinkdiff_lvlm.py generate": (LVLM_GENERATE, MINI_DRAW | dict(
        vlm="mini/qwen2-vl", aligner="mini/aligner-lvlm")),
    "thinkdiff_clip.py generate": (CLIP_GENERATE, MINI_CLIP_DRAW),
    "thinkdiff_clip.py generate --video": (CLIP_GENERATE | dict(
        decoder="cogvideox", steps=50, guidance=6.0, size=None), MINI_CLIP_DRAW),
    "prepare_data.py lvlm --images x --out y": (PREPARE, dict(
        mini=True, vlm="mini/qwen2-vl", tokens=40, batch_size=128)),
    "cobsat_eval.py generate": (COBSAT, MINI_COBSAT),
    "cobsat_eval.py judge": (JUDGE, MINI_JUDGE),
    "cobsat_eval.py table": (TABLE | dict(judge=["vlm", "clip"], gallery=100), MINI_TABLE),
    "cobsat_eval.py run": (COBSAT | JUDGE | dict(gallery=100), MINI_COBSAT | MINI_JUDGE),
}
# what the parsers set beside the flags
NOT_FLAGS = {"run", "command", "function", "typed", "example"}


def parsed(script, *arguments):
    """The flags {name: value} with which a script calls the function that does the work, which is
    not run; paths in the repository are relative to it."""
    called = []

    def record(args):
        called.append(vars(args))
        raise SystemExit(0)

    def plain(value):
        return str(value).removeprefix(f"{REPO}/") if isinstance(value, (str, Path)) else value

    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train", "generate", "lvlm", "fetch", "run_all", "judge", "table", "check",
                     "draw_data", "draw_cobsat", "draw_sheet", "measure_ceilings"):
            if hasattr(module, name):
                # a function of its own for each name: main() compares them
                patch.setattr(module, name, functools.partial(record))
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
    # --mini also sets names that are no flags of this command
    assert {name: flags[name] for name in full} == full | mini
    named = [value for value in flags.values() if str(value).startswith("mini/")]
    assert named and all((REPO / name).is_dir() for name in named)


@pytest.mark.parametrize("detail", OPTIONS)
def test_the_judges_questions(detail):
    values, nouns = OPTIONS[detail]
    for about_noun, asked, words in ((False, f"{detail} (of the main object)", values),
                                     (True, "main object", nouns)):
        listed = " ".join(f"({i}){word}" for i, word in enumerate(words.split(), 1))
        assert cobsat_eval.question(detail, about_noun) == (
            f"What is the {asked} in this image? Answer from the following options: "
            f"{listed.replace('-', ' ')}. Answer the number only and do not include any other "
            "texts (e.g., 1).")
