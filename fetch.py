"""Downloads, of the models on the Hugging Face hub, only the files that a script reads: of a
checkpoint in shards those that hold a tensor it needs. They go to the ordinary cache.

Prints names and sizes first. The same command resumes an interrupted download. --vlm,
--t5, --clip and so on name other models.

    python fetch.py lvlm-data lvlm-train lvlm-generate [--dry-run]
"""
import startup

import os
import re
import shutil
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from common import (
    MODELS,
    Parser,
    UserError,
    cli_main,
    decoder_tensors,
    first_line,
    text,
    vision_tensors,
    weight_files,
)

# configs, tokenizers, templates
CONFIGS = (".json", ".txt", ".model", ".jinja")


def everything(name):
    """All of a model's tensors, all parts of a pipeline."""
    return True


def without_t5(name):
    """The parts of FLUX except its T5 encoder, which only a text prompt needs."""
    return name not in ("text_encoder_2", "tokenizer_2")


# {task: (script, {model flag: wanted})}; wanted(name): whether the script reads this tensor or
# part of a pipeline; None: no weights, only tokenizer and config
TASKS = {
    "lvlm-data": ("prepare_data.py lvlm", {"vlm": everything}),
    "lvlm-train": ("thinkdiff_lvlm.py train (with --tokens-only data also lvlm-data)",
                   {"vlm": None, "t5": decoder_tensors}),
    "lvlm-encoder": ("thinkdiff_lvlm.py train --encoder-loss", {"vlm": None, "t5": everything}),
    "lvlm-generate": ("thinkdiff_lvlm.py generate", {"vlm": everything, "flux": without_t5}),
    "lvlm-relay": ("thinkdiff_lvlm.py generate with --relay or --true-cfg",
                   {"vlm": everything, "flux": everything}),
    "clip-train": ("thinkdiff_clip.py train", {"clip": vision_tensors, "t5": everything}),
    "clip-generate": ("thinkdiff_clip.py generate", {"clip": vision_tensors, "flux": everything}),
    "clip-video": ("thinkdiff_clip.py generate --video",
                   {"clip": vision_tensors, "cogvideox": everything}),
    "pixart": ("generate --decoder pixart", {"pixart": everything}),
    "sd3": ("generate --decoder sd3", {"sd3": everything}),
    "chroma": ("generate --decoder chroma", {"chroma": everything}),
    "ltx": ("generate --decoder ltx", {"ltx": everything}),
    "cobsat": ("cobsat_eval.py", {"vlm": everything, "flux": everything,
                                  "judge-vlm": everything, "judge-clip": everything}),
}


def list_files(repo):
    """{name: DryRunFileInfo} of a hub repository's files. Raises UserError if it is not there."""
    try:
        disable_progress_bars()
        return {file.filename: file for file in snapshot_download(repo, dry_run=True)}
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            raise UserError(f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, "
                            "log in with `hf auth login`, then try again") from error
        raise UserError(f"cannot fetch {repo}: {first_line(error.__cause__ or error)} Check the "
                        "name and the network, and that HF_HUB_OFFLINE is not set") from error
    finally:
        enable_progress_bars()


def select_files(repo, names, wanted):
    """The file names of a model or a diffusers pipeline that are read."""
    if "model_index.json" in names:
        parts = {name for name in names if name.count("/") == 1 and wanted(name.split("/")[0])}
        read = {name for name in parts if name.endswith((*CONFIGS, ".safetensors"))}
        return read | {"model_index.json"}
    weights = []
    if wanted and {"model.safetensors", "model.safetensors.index.json"} & set(names):
        weights = weight_files(repo, wanted)
    elif wanted is everything:
        # a pickle can only be read as a whole
        weights = [name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name)]
    elif wanted:
        raise UserError(f"{repo} has no safetensors, of which a part could be fetched: give "
                        "another model")
    configs = {name for name in names if "/" not in name and name.endswith(CONFIGS)}
    return configs | set(weights)


def print_files(files):
    """Prints sizes and names."""
    small = [file for file in files if file.file_size < 1e6]
    for file in files:
        if file.file_size >= 1e6:
            here = "" if file.will_download else "  (here)"
            print(f"  {file.file_size / 1e9:8.3f} GB  {file.filename}{here}")
    total = sum(file.file_size for file in small)
    print(f"  {total / 1e9:8.3f} GB  {len(small)} small files")


def fetch(args):
    """Lists, checks and downloads the files of args.task; with args.dry_run only lists them."""
    listed, selected = {}, {}
    for task in args.task:
        for flag, wanted in TASKS[task][1].items():
            repo = getattr(args, flag.replace("-", "_"))
            if os.path.isdir(repo):
                print(f"{repo} is a folder here: nothing to fetch")
                continue
            if repo not in listed:
                listed[repo] = list_files(repo)
            files = select_files(repo, listed[repo], wanted)
            selected[repo] = selected.get(repo, set()) | files
    size = 0
    for repo, names in selected.items():
        files = [listed[repo][name] for name in sorted(names)]
        print(repo)
        print_files(files)
        size += sum(file.file_size for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    print(f"{size / 1e9:.3f} GB to download, {free / 1e9:.3f} GB are free at {cache}", flush=True)
    if size > free:
        raise UserError(f"{size / 1e9:.3g} GB do not fit: free some space, or set HF_HOME to a "
                        "folder on a larger disk, here and for the scripts")
    if args.dry_run:
        return
    for repo, names in selected.items():
        try:
            snapshot_download(repo, allow_patterns=sorted(names))
        # hf_xet, which downloads large files, raises RuntimeError for all it meets
        except (OSError, HTTPError, RuntimeError) as error:
            # an error of the disk, not of the network
            if getattr(error, "errno", None):
                raise
            raise UserError(f"the download of {repo} broke off: {first_line(error)} The same "
                            "command resumes it") from error
    print("all here; the scripts find the models by name, with HF_HUB_OFFLINE=1 too")


def main():
    tasks = "".join(f"  {task:15}{script}\n" for task, (script, _) in TASKS.items())
    parser = Parser(description=__doc__, epilog=f"TASK, what is to run:\n{tasks}")
    parser.add_argument("task", nargs="+", choices=TASKS, metavar="TASK",
                        help="see below; shared files are downloaded once")
    parser.add_argument("--dry-run", action="store_true", help="only print names and sizes")
    for flag, name in MODELS.items():
        parser.add_argument(f"--{flag}", default=name, metavar="NAME", type=text,
                            help=f"hub name (default: {name})")
    fetch(parser.parse_args())


if __name__ == "__main__":
    cli_main(main, "the same command goes on from what is on disk")
