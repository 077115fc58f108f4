"""How the code is laid out: imports go one way only, files and functions stay short."""
import ast
import subprocess

import pytest

from common import REPO

# each module may import those of earlier lines only
LAYERS = """
startup
common
aligner
images
training_data
training_run
encoder_term
models
inspection
pipelines
thinkdiff_lvlm thinkdiff_clip
prepare_data fetch cobsat_eval
simulation
bench
""".strip().splitlines()
LAYER = {module: number for number, line in enumerate(LAYERS) for module in line.split()}
REAL = sorted(LAYER)
MINIATURE = sorted(f"miniature/{file.stem}" for file in (REPO / "miniature").glob("*.py"))


def source(module):
    return (REPO / f"{module}.py").read_text()


def functions(module):
    """{name: source} of all functions and methods; a nested one also counts with its outer one."""
    text = source(module)
    return {node.name: ast.get_source_segment(text, node) for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def imports(module):
    """The names of the modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("miniature" if node.level else node.module.split(".")[0])
    return found


def test_every_module_has_its_place():
    assert REAL == sorted(file.stem for file in REPO.glob("*.py"))
    assert len(MINIATURE) > 5


@pytest.mark.parametrize("module", REAL)
def test_imports_go_downwards_only(module):
    """Nothing but the miniature and the tests imports the miniature."""
    project = imports(module) & {*REAL, "miniature"}
    assert project <= {other for other in REAL if LAYER[other] < LAYER[module]}


@pytest.mark.parametrize("module", REAL + MINIATURE)
def test_functions_are_short(module):
    longest = 80 if module in REAL else 100
    lengths = {name: text.count("\n") + 1 for name, text in functions(module).items()}
    assert not {name: lines for name, lines in lengths.items() if lines > longest}


@pytest.mark.parametrize("module, most", [("aligner", 120), ("thinkdiff_lvlm", 520),
                                          ("thinkdiff_clip", 520)])
def test_what_students_read_is_short(module, most):
    assert len(source(module).splitlines()) <= most


def test_the_real_code_stays_short():
    assert sum(len(source(module)) for module in {*REAL} - {"bench", "simulation"}) <= 270_000


def test_the_variants_differ_in_the_method_only():
    """What both have word for word stays so; that it is right: test_training.py."""
    variants = "thinkdiff_lvlm", "thinkdiff_clip"
    ours, theirs = (functions(module) for module in variants)
    for name in ("t5_nll", "learning_rate", "new_aligner", "new_optimizer"):
        assert ours[name] == theirs[name], name
    for line in ("ADAM_BETAS =", "WARMUP_FROM ="):
        ours, theirs = ([row for row in source(module).splitlines() if row.startswith(line)]
                        for module in variants)
        assert len(ours) == 1 and ours == theirs
    diff = subprocess.run(["diff", *(f"{module}.py" for module in variants)], cwd=REPO, text=True,
                          capture_output=True).stdout
    assert 0 < sum(line.startswith(("<", ">")) for line in diff.splitlines()) <= 320
