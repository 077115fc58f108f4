"""README: its commands run in its own words with fewer steps, and the files that it names exist."""
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from common import REPO
from helpers import command
from test_protocol import parsed

README = (REPO / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
INLINE = [code for code in re.findall(r"`(python [^`\n]*)`", README) if "..." not in code]
# what is appended to a command of the miniature: less of the same work, with the shipped aligner
FEWER = {
    "miniature.py draw": "--count 30",
    "miniature.py cobsat": "",
    "prepare_data.py lvlm": "--tokens 4",
    "thinkdiff_lvlm.py train": "--steps 2 --batch-size 4",
    "thinkdiff_clip.py train": "--steps 1 --batch-size 4",
    "thinkdiff_lvlm.py generate": "--steps 1 --true-cfg 1 --aligner mini/aligner-lvlm",
    "thinkdiff_clip.py generate": "--steps 1 --true-cfg 1",
    "cobsat_eval.py run": "--steps 1 --tasks 1 --limit 1 --judge clip",
}


def commands_in(text):
    """[[script, argument, ...]] of all commands in lines of shell."""
    parts = [shlex.split(part) for line in text.splitlines() for part in line.split("&&")]
    return [words[i:] for words in parts for i, word in enumerate(words) if word.endswith(".py")]


IN_BLOCKS, TYPED = commands_in(BLOCKS), commands_in("\n".join([BLOCKS, *INLINE]))


def test_the_readme_has_commands():
    """So that the tests below cannot pass because a change of form hides the commands."""
    assert len(IN_BLOCKS) >= 16 and len(TYPED) >= 24
    assert {script for script, *_ in TYPED} >= {
        "thinkdiff_lvlm.py", "thinkdiff_clip.py", "prepare_data.py", "cobsat_eval.py",
        "miniature.py", "bench.py"}


@pytest.mark.parametrize("line", TYPED, ids=" ".join)
def test_commands_are_accepted(line):
    parsed(*line)


def test_commands_of_the_miniature_run(tmp_path, monkeypatch):
    """In the README's order in one folder, where each leaves what it is said to leave."""
    (tmp_path / "mini").symlink_to(REPO / "mini")
    monkeypatch.chdir(tmp_path)
    small = [line for line in IN_BLOCKS if "--mini" in line or line[0] == "miniature.py"]
    for line in small:
        command(*line, *FEWER[" ".join(line[:2])].split())
        out = line[line.index("--out") + 1] if "--out" in line else "outputs/0001.png"
        assert Path(out).exists(), line
        if out.endswith(".png"):
            assert Image.open(out).size == (64, 64)
    assert {" ".join(line[:2]) for line in small} == FEWER.keys()
    assert len(list(Path("outputs/compose").glob("*.png"))) == 15
    assert len(list(Path("data/cobsat/datasets").glob("*/*.jpg"))) == 500
    for name in ("color_car/white_car.jpg", "background_dog/park_dog.jpg", "style_hat/3d_hat.jpg"):
        assert Image.open(f"data/cobsat/datasets/{name}").size == (64, 64)
    assert all(Path(f"runs/mini-{name}/aligner/model.safetensors").exists()
               for name in ("lvlm", "clip"))
    assert {path.name for path in Path("results/mini").iterdir()} >= {
        "report.html", "contact_sheet.png", "results.md"}


def test_files_that_are_named_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    folders = r"(?<![\w./-])(?:mini|docs|standins|tests)/[\w./-]*"
    words = re.findall(rf"{folders}|\b\w+\.(?:py|txt)\b", README)
    examples = sorted(REPO.glob("mini/example/*.jsonl"))
    lines = [json.loads(line) for path in examples for line in path.read_text().splitlines()]
    pictures = [f"mini/example/{name}" for line in lines for name in line["image"]]
    context = parsed("thinkdiff_lvlm.py", "generate", "--mini")["example"]
    pictures += [part for kind, part in context if kind == "image"]
    pictures += parsed("thinkdiff_clip.py", "generate", "--mini")["example"]["image"]
    assert len(links) >= 4 and len(words) >= 20 and len(pictures) >= 20
    missing = {name for name in [*links, *words, *pictures] if not (REPO / name).exists()}
    assert not missing
