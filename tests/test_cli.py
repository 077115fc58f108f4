"""The command lines: every flag of every script has a range, errors are one line, also before torch
has loaded and when nobody reads the output."""
import startup

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import common
import models
from common import REPO, UserError
from helpers import command, complaint
from test_protocol import parsed

SCRIPTS = ("thinkdiff_lvlm.py", "thinkdiff_clip.py", "prepare_data.py", "cobsat_eval.py",
           "fetch.py", "bench.py", "miniature")


def parsers(script):
    """{words: parser} of a script and its subcommands."""
    found = []

    def stop(parser, args=None, namespace=None):
        found.append(parser)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Parser, "parse_known_args", stop)
        command(script)
    choices = [action.choices for action in found[0]._actions if action.dest == "command"]
    if script == "miniature":
        choices = [found[0]._subparsers._group_actions[0].choices]
    if not choices:
        return {(script,): found[0]}
    return {(script, name): parser for name, parser in choices[0].items()}


PARSERS = {words: parser for script in SCRIPTS for words, parser in parsers(script).items()}
# every flag that takes a value: (words of the command, flag, its argparse action)
VALUES = [(words, action.option_strings[0], action) for words, parser in PARSERS.items()
          for action in parser._actions if action.option_strings and action.nargs != 0]


def is_number(action):
    return getattr(action.type, "__name__", "") in ("int", "float")


def refused(words, flag, value):
    """The one line that refuses a value."""
    _, err = command(*words, f"{flag}={value}", code=2)
    assert err.count("\n") == 1 and f"error: argument {flag}: " in err, (words, flag, value, err)
    return err


def test_every_command_is_seen():
    assert len(PARSERS) == 3 + 3 + 1 + 4 + 1 + 1 + 7
    assert len(VALUES) > 200 and sum(is_number(action) for *_, action in VALUES) > 100


def test_every_value_has_a_type_of_its_own():
    """int, float and str would accept inf, 10**400 and the empty string."""
    assert not [(words, flag) for words, flag, action in VALUES
                if not action.choices and action.type in (None, int, float, str, Path)]


def test_no_number_is_outside_of_its_range():
    for words, flag, action in VALUES:
        if is_number(action):
            for value in ("nan", "inf", "-inf", "x", "1e999", "1" + "0" * 30, "1" + "0" * 5000):
                refused(words, flag, value)
            if flag != "--image-weight":
                refused(words, flag, "-1")


def test_no_value_is_empty():
    for words, flag, action in VALUES:
        refused(words, flag, "")
        if not action.choices and not is_number(action):
            assert "the value is empty" in refused(words, flag, " ")


LVLM, CLIP, PREPARE = "thinkdiff_lvlm.py", "thinkdiff_clip.py", "prepare_data.py"


@pytest.mark.parametrize("line, wrong, right", [
    ("thinkdiff_lvlm.py train --lr", ["0", "-1e-4"], ["1e-6"]),
    ("thinkdiff_lvlm.py train --lr-end", ["-1e-9"], ["0", "8e-5"]),
    ("thinkdiff_lvlm.py train --warmup", ["1.5"], ["0"]),
    ("thinkdiff_lvlm.py train --weight-decay", ["-0.1"], ["0"]),
    ("thinkdiff_lvlm.py train --batch-size", ["0", "1000000"], ["1"]),
    ("thinkdiff_lvlm.py train --seed", ["9223372036854775808"], ["0", "4294967296"]),
    ("thinkdiff_lvlm.py generate --top-p", ["0", "2"], ["1", "0.01"]),
    ("thinkdiff_lvlm.py generate --temperature", ["-0.1"], ["0", "2"]),
    ("thinkdiff_lvlm.py generate --true-cfg", ["0.5"], ["1", "3"]),
    ("thinkdiff_lvlm.py generate --guidance", ["-1"], ["0"]),
    ("thinkdiff_lvlm.py generate --size", ["0", "8", "100", "16384"], ["16", "96", "1024"]),
    ("thinkdiff_lvlm.py generate --t5-length", ["0", "513"], ["1", "512"]),
    ("thinkdiff_lvlm.py generate --cache", ["0"], ["0.1"]),
    ("thinkdiff_lvlm.py generate --instruction", ["caf\udce9"], ["café"]),
    ("thinkdiff_lvlm.py explain --prompt", ["16"], ["0", "15"]),
    ("thinkdiff_lvlm.py explain --tokens", ["1"], ["2"]),
    ("thinkdiff_clip.py generate --frames", ["0", "48"], ["1", "49"]),
    ("prepare_data.py lvlm --images=x --out=y --temperature", ["0"], ["0.001"]),
    ("prepare_data.py lvlm --images=x --out=y --top-p", ["0", "1.01"], ["1"]),
    ("cobsat_eval.py run --size", ["100"], ["112"]),
    ("cobsat_eval.py run --limit", ["0"], ["1"]),
])
def test_ranges(line, wrong, right):
    *words, flag = line.split()
    for value in wrong:
        refused(words, flag, value)
    for value in right:
        assert str(parsed(*words, f"{flag}={value}")[flag[2:].replace("-", "_")]) in (
            value, str(float(value)) if flag != "--instruction" else value)


def test_image_weights():
    assert parsed(CLIP, "generate", "--image-weight=-0.5", "--image-weight", "2")[
        "image_weight"] == [-0.5, 2]
    refused((CLIP, "generate"), "--image-weight", "101")


@pytest.mark.parametrize("words, said", [
    ((LVLM, "generate", "--temprature", "0.5"),
     "thinkdiff_lvlm.py generate: error: unknown flag --temprature: did you mean --temperature?"),
    # of another subcommand
    ((LVLM, "train", "--top-p=0.5"), "unknown flag --top-p"),
    (("cobsat_eval.py", "judge", "--judge-vml", "x"), "did you mean --judge-vlm?"),
    (("fetch.py", "cobsat", "--dry-rum"), "did you mean --dry-run?"),
    (("bench.py", "--repeat", "2"), "did you mean --repeats?"),
    (("miniature", "draw", "--cuont", "2"), "did you mean --count?"),
    ((LVLM, "generate", "white_car.png"), "unknown argument white_car.png"),
    # no abbreviation: with --mini, defaults change before argparse sees the flag
    ((LVLM, "generate", "--min"), "did you mean --mini?"),
])
def test_unknown_flags_are_named_with_the_nearest_one(words, said):
    line = complaint(*words, code=2)
    assert said in line and line.endswith("(see --help)")


def test_usage_errors_are_one_line():
    for words in ((LVLM,), (LVLM, "trian"), (PREPARE, "lvlm"), (LVLM, "train", "--norm", "x")):
        _, err = command(*words, code=2)
        assert err.count("\n") == 1 and "error: " in err


def test_help_is_in_groups():
    """No flag stands among argparse's own, and the switch --mini."""
    for words, parser in PARSERS.items():
        if words[0] not in ("fetch.py", "bench.py", "miniature"):
            options, titled = parser._optionals._group_actions, parser._action_groups[2:]
            assert {action.dest for action in options} == {"help", "mini"}
            assert max(len(group._group_actions) for group in titled) <= 13
        out, _ = command(*words, "--help")
        assert words[-1] in out and "(default: " in out or words[-1] in ("train", "fetch.py")


# ---------------------------------------------------------------- before torch loads
def run(script, *args, torch="raise SystemExit('torch was imported')", tmp_path, shell="", **env):
    """Runs a script with this instead of torch."""
    (tmp_path / "torch").mkdir(exist_ok=True)
    (tmp_path / "torch/__init__.py").write_text(torch)
    line = f'"$0" "$@" {shell}'
    return subprocess.run(["sh", "-c", line, sys.executable, script, *args], cwd=REPO, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": tmp_path} | env)


def test_a_mistyped_flag_does_not_wait_for_torch(tmp_path):
    done = run(LVLM, "generate", "--mini", "--temprature=1", tmp_path=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == (
        "thinkdiff_lvlm.py: error: unknown flag --temprature: did you mean --temperature? (see "
        "--help)\n")
    for script in SCRIPTS[1:-1]:
        done = run(script, "--resmue", tmp_path=tmp_path)
        assert done.returncode == 2 and "did you mean --resume?" in done.stderr
    done = run("-m", "miniature", "draw", "--cuont", "3", tmp_path=tmp_path)
    assert done.returncode == 2 and "did you mean --count?" in done.stderr
    # values are not flags
    for known in (("--mini",), ("--text", "a --strange text"), ("--text=--strange",)):
        assert run(LVLM, *known, tmp_path=tmp_path).stderr == "torch was imported\n"


def test_no_flag_of_a_script_is_unknown_to_it():
    flags = {flag for parser in PARSERS.values() for flag in parser._option_string_actions}
    assert len(flags) > 80 and not flags - startup.known_flags() - {"-h"}


def test_ctrl_c_before_torch_has_loaded_is_silent(tmp_path):
    torch = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    done = run(LVLM, torch=torch, tmp_path=tmp_path, shell="; echo $?")
    assert (done.stdout, done.stderr) == ("130\n", "")


def test_closed_streams_are_not_taken_by_files(tmp_path):
    """A file that is opened while stdout is closed would get what is printed."""
    torch = ("import sys; open(sys.argv[1], 'w').write("
             "str([s.fileno() for s in (sys.stdin, sys.stdout, sys.stderr)])); raise SystemExit")
    run(LVLM, tmp_path / "seen", torch=torch, tmp_path=tmp_path, shell="<&- >&- 2>&-")
    assert (tmp_path / "seen").read_text() == "[0, 1, 2]"


def test_importing_it_elsewhere_changes_nothing():
    """In a notebook, or in these tests."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done = subprocess.run([sys.executable, "-c", "import startup, signal; "
                           "print(signal.getsignal(signal.SIGINT))", "--strange"], cwd=REPO,
                          capture_output=True, text=True)
    assert "default_int_handler" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("words, given, threads", [
    (("thinkdiff_lvlm.py", "train", "--mini"), None, "1"),
    (("miniature/__main__.py", "check"), None, "1"),
    (("thinkdiff_lvlm.py", "train", "--mini"), "2", "2"),
    (("thinkdiff_lvlm.py", "train"), "2", "2"),
    (("thinkdiff_lvlm.py", "train"), None, "None"),
], ids=str)
def test_the_miniature_uses_one_thread(words, given, threads):
    """More of them wait for each other on a busy machine; OMP_NUM_THREADS decides if it is set."""
    show = "os.environ.get('OMP_NUM_THREADS')" if threads == "None" else "torch.get_num_threads()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys; sys.argv[:] = sys.argv[1:]; import startup, torch; "
         f"print({show})", *words], cwd=REPO, env=environment,
        capture_output=True, text=True)
    assert done.stdout.strip() == threads


# ---------------------------------------------------------------- how a script ends
@pytest.mark.parametrize("error, code, line", [
    (SafetensorError("Error while deserializing header"), 1, "error: Error while deserializing"),
    (KeyboardInterrupt(), 130, "error: interrupted; go on"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
     1, "No space left on device (os error 28). Free some space"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nto"), 1,
     "out of memory: use a smaller --batch-size"),
    (BrokenPipeError(32, "Broken pipe"), 1, None),
])
def test_errors_that_are_no_bugs(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.cli_main(main, "go on")
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert err == "" if line is None else line in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [RecursionError(), KeyError("x"), RuntimeError("shapes")])
def test_a_bug_stays_a_bug(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        common.cli_main(main)


# each is run in a fork with stdout (and stderr) as it is named
ENDS = {
    "pipe": "[print('x' * 100) for _ in range(10000)]",
    "pipe, little": "print('x')",
    "full": "print('x')",
    "interrupted": "os.kill(os.getpid(), signal.SIGINT)",
}
FORK = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import common
import models
for name, code in json.loads(sys.argv[2]).items():
    sys.stdout.flush()
    if not os.fork():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stderr = open(os.path.join(sys.argv[3], name), "w")
        os.dup2(sys.stderr.fileno(), 2)
        reader, writer = os.pipe()
        os.close(reader)
        out = os.open("/dev/full", os.O_WRONLY) if name == "full" else writer
        os.dup2(out, 1)
        sys.argv = ["x"]
        common.cli_main(lambda: eval(code), "go on")
        sys.exit(0)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), sep=": ")
"""


def test_the_end_is_quiet_when_nobody_reads(tmp_path):
    # -E: PYTHONUNBUFFERED would leave nothing to be written at the end
    done = subprocess.run([sys.executable, "-E", "-c", FORK, REPO, json.dumps(ENDS), tmp_path],
                          capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "pipe: 1", "pipe, little: 1", "full: 1", "interrupted: 130"]
    said = {name: (tmp_path / name).read_text() for name in ENDS}
    assert said["pipe"] == said["pipe, little"] == ""
    assert said["full"].startswith("error: No space left on device.")
    assert said["interrupted"] == "error: interrupted; go on\n"
    assert said["full"].count("\n") == 1


def test_the_processes_of_a_machine_say_it_once(monkeypatch, capsys, tmp_path):
    def end(rank, message):
        (tmp_path / f"attempt_0/{rank}").mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/attempt_0/{rank}/error.json")
        with pytest.raises(SystemExit) as stop:
            common.cli_main(failing(message))
        assert stop.value.code == 1
        return capsys.readouterr().err

    assert [end(rank, "no data") for rank in range(3)] == ["error: no data\n", "", ""]
    assert end(1, "another") == "error: another\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/gone/0/error.json")
    assert startup.print_once("here") is None and capsys.readouterr().err == "here\n"


def failing(message):
    def main():
        raise UserError(message)
    return main


def test_a_tiny_temperature_is_greedy():
    """1e-300 is 0 in fp32."""
    logits = torch.tensor([[0.0, 5.0, 3.0]])
    for temperature in (1e-300, 1e-3):
        sampler = models.NucleusSampler(torch.zeros(1, 2), 1, temperature, 0.9, [1])
        assert sampler(torch.zeros(1, 2), logits).tolist() == [[-torch.inf, 0, -torch.inf]]
