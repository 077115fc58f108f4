"""What several test files use: the scripts' command lines in this process, and small files."""
import contextlib
import csv
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import common


def command(script, *args, code=0):
    """A command line in this process, as importing takes seconds: (stdout, stderr).

    script: a script, or "miniature". Fails unless the exit code is `code`."""
    name = Path(script).stem
    module = importlib.import_module("miniature.__main__" if name == "miniature" else name)
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr(sys, "argv", [str(script), *map(str, args)])
        try:
            common.cli_main(module.main)
            ended = 0
        except SystemExit as stop:
            ended = stop.code
    assert ended == code, err.getvalue()[-2000:]
    return out.getvalue(), err.getvalue()


def complaint(script, *args, code=1):
    """The one line in which a script complains."""
    _, err = command(script, *args, code=code)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def in_new_process(*calls, **environment):
    """What `command` returns for each of `calls` (script, *args[, {"code": ...}]), in one new
    process with more environment variables: for what is read at import, such as HF_HOME."""
    code = ("import json, sys; sys.path[:0] = sys.argv[1:3]; from helpers import command; "
            "calls = json.loads(sys.argv[3]); "
            "print(json.dumps([command(*call, **options) for call, options in calls]))")
    split = [([str(part) for part in call if not isinstance(part, dict)],
              call[-1] if isinstance(call[-1], dict) else {}) for call in calls]
    done = subprocess.run(
        [sys.executable, "-c", code, common.REPO / "tests", common.REPO, json.dumps(split)],
        env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def write_tar(path, members):
    """Writes a tar of {member name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def read_log(run):
    """The rows of a training run's log.csv."""
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))
