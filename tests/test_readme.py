"""README and docs: their commands are accepted, those of the miniature run with fewer steps, and
the files, tests and functions that they name exist."""
import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from common import REPO
from helpers import command
from test_protocol import parsed

PAGES = {page: page.read_text() for page in (
    REPO / "README.md", *sorted(REPO.glob("docs/*.md")), *REPO.glob("miniature/**/README.md"))}
README, METHOD = PAGES[REPO / "README.md"], PAGES[REPO / "docs/METHOD.md"]
# what is appended to a command of the miniature: less of the same work
FEWER = {
    "thinkdiff_lvlm.py generate": "--steps 1 --true-cfg 1",
    "thinkdiff_lvlm.py explain": "--steps 1 --true-cfg 1",
    "miniature draw": "--count 30",
    "prepare_data.py lvlm": "--tokens 4",
    "thinkdiff_lvlm.py train": "--steps 2 --batch-size 4",
    "thinkdiff_clip.py train": "--steps 1 --batch-size 4",
    "thinkdiff_clip.py generate": "--steps 1 --true-cfg 1",
    "miniature cobsat": "",
    "cobsat_eval.py run": "--steps 1 --tasks 1 --limit 1 --judge clip",
}


def commands_in(text):
    """[[script or "miniature", argument, ...]] of the commands in code, in a page's order."""
    code = re.findall(r"^```\w*\n(.*?)^```|`((?:python|torchrun) [^`]*)`", text, flags=re.S | re.M)
    lines = []
    for block, inline in code:
        lines += block.replace("\\\n", " ").splitlines() + [inline.replace("\n", " ")]
    found = []
    for part in (part.strip() for line in lines for part in line.split("&&")):
        if (re.match("(python|torchrun) .*(-m miniature|[.]py)", part)
                and not re.search("[.]{3}|tests/", part)):
            words = shlex.split(part, comments=True)
            found.append(words[next(
                i for i, word in enumerate(words) if word.endswith((".py", "miniature"))):])
    return found


# how the scripts' docstrings start them; [--dry-run] may be left out
STARTS = "\n".join(ast.get_docstring(ast.parse(path.read_text())) for path in (
    *REPO.glob("*.py"), REPO / "miniature/__main__.py")).replace("[--dry-run]", "--dry-run")
TYPED = {" ".join(line): line for page in (*PAGES.values(), f"```\n{STARTS}\n```")
         for line in commands_in(page)}


def test_the_pages_have_commands():
    """So that the tests below cannot pass because a change of form hides the commands."""
    assert len(commands_in(README)) >= 16 and len(TYPED) >= 40
    assert {script for script, *_ in TYPED.values()} == {
        "thinkdiff_lvlm.py", "thinkdiff_clip.py", "prepare_data.py", "cobsat_eval.py", "fetch.py",
        "miniature", "bench.py"}


@pytest.mark.parametrize("line", TYPED)
def test_commands_are_accepted(line):
    """And the pictures that they name exist."""
    parsed(*TYPED[line])
    pairs = zip(TYPED[line], TYPED[line][1:], strict=False)
    assert all((REPO / value).exists() for flag, value in pairs if flag == "--image")


def test_commands_of_the_miniature_run(tmp_path, monkeypatch):
    """The README's, in its order in one folder, where each leaves what it is said to leave."""
    (tmp_path / "miniature").symlink_to(REPO / "miniature")
    monkeypatch.chdir(tmp_path)
    small = [line for line in commands_in(README) if "--mini" in line or line[0] == "miniature"]
    for line in small:
        name = " ".join(line[:2])
        command(*line, *FEWER[name].split())
        default = "outputs/explain.png" if "explain" in name else "outputs/0001.png"
        out = line[line.index("--out") + 1] if "--out" in line else default
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
    named = []
    for page, text in PAGES.items():
        named += [page.parent / link for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
        # KEY.txt is a caption, any KEY's
        words = re.findall(r"(?<![\w./-])(?:miniature|docs|tests|weights)/[\w./-]*|"
                           r"\b(?!KEY)\w+\.(?:py|txt|cff)\b", text)
        named += [page.parent / word if (page.parent / word).exists() else REPO / word
                  for word in words]
    for path in REPO.glob("miniature/example/*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            images = [part["image"] for part in line.get("context", []) if "image" in part]
            named += [path.parent / image for image in [*images, *line.get("image", [])]]
    for script in ("thinkdiff_lvlm.py", "thinkdiff_clip.py"):
        named.append(REPO / parsed(script, "generate", "--mini")["example"])
    assert len(named) >= 80
    assert not {str(path) for path in named if not path.exists()}


def test_functions_and_tests_that_the_method_names_exist():
    """The last two columns of the table of details."""
    source = "\n".join(path.read_text() for path in REPO.glob("*.py"))
    tests = "\n".join(path.read_text() for path in REPO.glob("tests/*.py"))
    rows = [line.split("|") for line in METHOD.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) >= 15
    for *_, code, test, _ in rows:
        functions = [name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", code)]
        names = re.findall(r"`(\w+)`", test)
        assert functions and names
        assert not [name for name in functions if not re.search(rf"\b{name}\b", source)]
        assert not [name for name in names if f"def {name}(" not in tests]
