"""What a script does before torch loads, which takes seconds: it names a mistyped flag, Ctrl-C ends
it without a traceback, and the miniature gets one thread. The scripts import this first; elsewhere
the import does nothing."""
import difflib
import hashlib
import logging
import os
import re
import signal
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent


def unknown_flag(flag, known):
    """What to say about a flag that is not among the `known` ones."""
    name, kind = flag.split("=")[0], "flag" if flag.startswith("-") else "argument"
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name}" + (f": did you mean {near[0]}?" if near else "")


def known_flags():
    """The flags that the sources of the scripts name; which one takes which, argparse knows."""
    sources = [*REPO.glob("*.py"), REPO / "miniature/__main__.py"]
    return {*re.findall(r"--[a-z][a-z0-9-]*", "".join(map(Path.read_text, sources)))}


def print_once(message):
    """Prints a line on stderr. What several processes of torchrun have to say, one of them says."""
    # torchrun deletes the folder when it ends: ATTEMPT/RANK/error.json
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if file:
            name = hashlib.sha256(message.encode(errors="replace")).hexdigest()
            open(Path(file).parents[1] / name, "x").close()
    except FileExistsError:
        return
    except OSError:
        pass
    print(message, file=sys.stderr)


def prepare():
    """Checks the standard streams and the flags, as far as this is possible without argparse."""
    # a file that is opened later would take the place of a closed stream (`2>&-`)
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    # file names can be any bytes
    sys.stdout.reconfigure(errors="backslashreplace")
    # not if the shell has the signal ignored; cli_main sets Python's handler again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # about torchao, where it is installed: nothing that a user could change
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # the miniature's tensors are too small to share: on a busy machine threads that wait for each
    # other took 20 times as long. torch reads the variable when it loads
    if "--mini" in sys.argv or script.parent.name == "miniature":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    known = known_flags()
    for flag in sys.argv[1:]:
        if re.fullmatch(r"--\w[\w-]*(=.*)?", flag) and flag.split("=")[0] not in known:
            print_once(f"{Path(sys.argv[0]).name}: error: {unknown_flag(flag, known)} (see --help)")
            sys.exit(2)


script = Path(sys.argv[0]).resolve()
if script.suffix == ".py" and script.parent in (REPO, REPO / "miniature"):
    prepare()
