"""Training data of ThinkDiff-LVLM: a VLM describes images; its tokens and features are stored.

    python prepare_data.py lvlm --mini --images data/mini --out data/mini-lvlm

Full size, 4 GPUs, a random 1.7 M of the images in WebDataset tars and a folder (780 GB of
features, or 0.44 GB of tokens with --tokens-only):

    torchrun --nproc_per_node 4 prepare_data.py lvlm --images '/data/cc3m/{00000..00331}.tar' \\
        /data/sbu --count 1700000 --out data/lvlm

With --backend vllm, vLLM generates the tokens; the same command without it adds the features.
An interrupted run is resumed by the same command, with any number of processes. It writes:

    meta.json           the settings; a run with others is refused
    plan.jsonl          the selected images, [path, tar member, offset, size] a line
    shard-*.safetensors tokens (n, N) int32; unless --tokens-only features (n, N, d_vlm) bf16, or
                        with --features input (n, L, d_vlm) right-padded and lengths (n,)
    shard-*.json        {"samples": [{index, prompt, sample}], "skipped": [{index, key, reason}]}
    tokens-*            the same of --backend vllm, without features
    skipped.csv         images left out, and why
"""
import argparse
import itertools
import json
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor

import common
import models
from common import MINI, MODELS, UserError, first_line, positive, pretrained, torchrun_ranks
from images import ImageRef, find_images, load_image
from thinkdiff_lvlm import PROMPTS, caption_messages, generate_with_features
from training_data import read_shards

# flag, type, full size, miniature, [source] and meaning
FLAGS = [
    ("--vlm", str, MODELS["vlm"], MINI["vlm"], "[paper] path or hub name of a Qwen-VL"),
    # the miniature's answers are short
    ("--tokens", positive, 64, 40, "[paper, appendix B] tokens an image, EOS ignored"),
    ("--temperature", float, 0.6, 0.6, "[release] of the sampling"),
    ("--top-p", float, 0.9, 0.9, "[release] nucleus of the sampling"),
    ("--features", ("generated", "input"), "generated", "generated",
     "[paper] generated: of the answer's tokens; input: of the prompt's (ablation, table 3)"),
    ("--count", positive, None, None, "a random subset of so many images; None: all"),
    ("--seed", int, 0, 0, "decides the subset, the prompts and the sampling"),
    ("--max-side", positive, 1024, 1024,
     "[ours] longer images are shrunk: bounds their tokens (1,369) and the memory"),
    ("--tokens-only", bool, False, False,
     "store no features: training recomputes them from image and tokens"),
    ("--backend", ("transformers", "vllm"), "transformers", "transformers",
     "vllm: generates the tokens only; run again without this flag for the features"),
    # the miniature's passes are small
    ("--batch-size", positive, 32, 128, "images in one forward pass"),
    ("--shard-size", positive, 512, 512,
     "samples a file (235 MB at full size); an interruption loses at most so many"),
    ("--workers", positive, 4, 4, "threads that decode images ahead"),
]


# ---------------------------------------------------------------- backends
def load_transformers(args):
    """Returns describe(conversations, seeds, tokens), a function of B conversations.

    It generates tokens (B, N) int64 unless they are given, and returns them with the features:
    B tensors bf16, (N, d_vlm) or with --features input (P, d_vlm); B times None if
    --tokens-only. All on the CPU."""
    device, dtype = common.pick_device()
    model, processor = models.load_vlm(args.vlm, device, dtype)

    def describe(conversations, seeds, tokens=None):
        inputs = models.encode_messages(processor, conversations).to(device)
        features = None
        if tokens is None:
            tokens, features, _ = generate_with_features(
                model, inputs, args.tokens, temperature=args.temperature, top_p=args.top_p,
                seeds=seeds)  # (B, N), (B, N, d_vlm)
        if args.tokens_only:
            return tokens.cpu(), [None] * len(tokens)
        if args.features == "input":
            features = models.prompt_features(model, inputs)
        elif features is None:
            features = models.teacher_forced_features(model, inputs, tokens.to(device))
        return tokens.cpu(), [x.to("cpu", torch.bfloat16) for x in features]

    return describe


def load_vllm(args):
    """The same with vLLM (checked against the sources of 0.33), which gives no features."""
    n_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    gpus, local_rank = visible.split(","), torchrun_ranks()[2]
    if local_rank >= len(gpus):
        raise UserError(
            f"process {local_rank} has no GPU: use torchrun --nproc_per_node {len(gpus)}")
    # the only way to tell vLLM's own processes their GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank]
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--backend vllm: {first_line(error)} Install it with `pip install vllm`, "
                        "in its own virtual environment if it wants another torch") from error
    processor, config = pretrained(AutoProcessor, args.vlm), pretrained(AutoConfig, args.vlm)
    with common.loading(args.vlm):
        # -1: the longest context that fits the memory
        llm = LLM(args.vlm, seed=args.seed, max_model_len=-1,
                  limit_mm_per_prompt={"image": 1, "video": 0})
    # placeholders of images are no words
    bias = {config.image_token_id: -100.0, config.video_token_id: -100.0}

    def describe(conversations, seeds, tokens=None):
        requests, params = [], []
        for messages, seed in zip(conversations, seeds, strict=True):
            text = processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True)
            image = messages[0]["content"][0]["image"]
            requests.append({"prompt": text, "multi_modal_data": {"image": image}})
            params.append(SamplingParams(
                temperature=args.temperature, top_p=args.top_p, max_tokens=args.tokens,
                ignore_eos=True, seed=seed, logit_bias=bias, detokenize=False))
        answers = llm.generate(requests, params, use_tqdm=False)
        tokens = torch.tensor([answer.outputs[0].token_ids for answer in answers])  # (B, N)
        return tokens, [None] * len(tokens)

    return describe


# ---------------------------------------------------------------- plan and shards
# what decides the data, besides images and prompts
SETTINGS = ("vlm", "count", "seed", "tokens", "temperature", "top_p", "features", "tokens_only",
            "max_side")


def make_plan(args):
    """[ImageRef] of the selected images. Raises UserError if --out has other settings."""
    out = Path(args.out)
    meta, plan = out / "meta.json", out / "plan.jsonl"
    settings = {name: vars(args)[name] for name in SETTINGS}
    settings["images"] = [os.path.abspath(path) for path in args.images]
    settings["prompts"] = PROMPTS
    settings["d_vlm"] = models.feature_width(args.vlm)
    if torchrun_ranks()[0] == 0 and not meta.exists():
        refs, faults = find_images(args.images)
        for path, fault in faults:
            print(f"{path}: {fault}", file=sys.stderr)
        refs = list(refs.values())
        count = args.count or len(refs)
        if count > len(refs):
            raise UserError(f"--count {count}, but there are only {len(refs)} pictures: lower it "
                            "or add --images")
        # tars are read front to back
        selected = sorted(random.Random(args.seed).sample(range(len(refs)), count))
        common.write_atomically(plan, "".join(json.dumps(refs[i]) + "\n" for i in selected))
        common.write_json(meta, {**settings, "faults": faults})
    # the other processes wait; torchrun ends them if the first one fails
    while not meta.exists():
        time.sleep(0.5)
    found = json.loads(meta.read_text())
    changed = []
    for name, value in settings.items():
        old = found.get(name)
        # a model may have moved: the name of its folder counts
        moved = name == "vlm" and old and Path(old).name == Path(value).name
        if old != value and not moved:
            changed.append(f"{name} {json.dumps(old)}, now {json.dumps(value)}")
    if changed:
        raise UserError(f"{out} was begun with {'; '.join(changed)}: give the same settings to go "
                        "on, or another --out")
    return [ImageRef(*json.loads(line)) for line in plan.read_text().splitlines()]


def check_disk(args, plan, n_left):
    """Prints the disk space that n_left samples need. Raises UserError if there is less."""
    length, estimate = 0 if args.tokens_only else args.tokens, ""
    if length and args.features == "input":
        # as long as the prompt, which depends on the image
        length, estimate = first_prompt_length(args, plan), ", judged by the first picture"
    d_vlm = json.loads(Path(args.out, "meta.json").read_text())["d_vlm"]
    need = n_left * (4 * args.tokens + 2 * length * d_vlm) / 1e9
    free = shutil.disk_usage(args.out).free / 1e9
    if torchrun_ranks()[0] == 0:
        print(f"{n_left} samples to go of {len(plan)}; they need {need:.3g} GB on disk{estimate}, "
              f"{free:.3g} GB are free", flush=True)
    if need > free:
        raise UserError(f"{need:.3g} GB do not fit in the {free:.3g} GB free at {args.out}: use "
                        "--tokens-only (training then recomputes the features), a smaller "
                        "--count or another --out")


def first_prompt_length(args, plan):
    """Tokens of the prompt with the first readable image; --tokens if there is none."""
    processor = pretrained(AutoProcessor, args.vlm)
    for ref in plan:
        try:
            messages = caption_messages(load_image(ref, args.max_side), 0)
            return models.encode_messages(processor, [messages])["input_ids"].shape[1]
        except UserError:
            continue
    return args.tokens


def write_shard(args, kind, samples, skipped):
    """Writes a shard of samples, [(record, tokens (N,), features (L, d_vlm) or None)], and of
    skipped, [record], under this process's next free number."""
    name = f"{kind}-{torchrun_ranks()[0]:02}"
    out = Path(args.out)
    stem = out / f"{name}-{sum(1 for _ in out.glob(f'{name}-*.json')):05}"
    records = []
    if samples:
        records, tokens, features = zip(*samples, strict=True)
        tensors = {"tokens": torch.stack(tokens).to(torch.int32)}  # (n, N)
        if features[0] is not None:
            tensors["features"] = pad_sequence(features, batch_first=True)  # (n, L, d_vlm)
            if args.features == "input":
                tensors["lengths"] = torch.tensor([len(x) for x in features])  # (n,)
        common.write_atomically(f"{stem}.safetensors", save(tensors))
    # last, because it marks the shard as complete
    common.write_atomically(f"{stem}.json", json.dumps({"samples": records, "skipped": skipped}))


def finished(out, kind="shard"):
    """The set of the indices in the plan that the shards hold, samples and skipped."""
    rows = [shard["samples"] + shard["skipped"] for _, shard in read_shards(out, kind)]
    return {row["index"] for row in itertools.chain.from_iterable(rows)}


def load_tokens(out):
    """{index in the plan: tokens (N,) int32} of what --backend vllm has generated."""
    known = {}
    for stem, shard in read_shards(out, "tokens"):
        if shard["samples"]:
            tokens = load_file(f"{stem}.safetensors")["tokens"]
            known.update(zip((row["index"] for row in shard["samples"]), tokens, strict=True))
    return known


def summarise(out, plan, kind):
    """Writes skipped.csv; once the last process is done, prints what became of all images."""
    shards = [shard for _, shard in read_shards(out, kind)]
    n_samples = sum(len(shard["samples"]) for shard in shards)
    skipped = [(row["key"], row["reason"]) for shard in shards for row in shard["skipped"]]
    faults = json.loads((out / "meta.json").read_text())["faults"]
    table = out / "skipped.csv"
    common.write_csv(table, ("picture", "reason"), faults + skipped)
    n_left = len(plan) - n_samples - len(skipped)
    if n_left:
        print(f"this process is done; the others have {n_left} samples left", flush=True)
        return
    if not n_samples:
        raise UserError(f"none of the {len(plan)} pictures can be read: see {table}")
    what = "the tokens of " if kind == "tokens" else ""
    broken = f", {len(faults)} broken tars" if faults else ""
    see = f" (see {table})" if skipped or faults else ""
    print(f"wrote {what}{n_samples} samples to {out}, skipped {len(skipped)} pictures{broken}{see}")
    if kind == "tokens":
        print("their features come next: the same command without --backend vllm, in the "
              "environment of requirements.txt")


# ---------------------------------------------------------------- lvlm
def load_batches(args, plan, indices):
    """Yields [(index, image or UserError)], while the next batch is decoded in the background."""
    def load(index):
        try:
            return index, load_image(plan[index], args.max_side)
        except UserError as error:
            return index, error

    with ThreadPoolExecutor(args.workers) as pool:
        coming = []
        for start in range(0, len(indices) + args.batch_size, args.batch_size):
            batch = indices[start:start + args.batch_size]
            ready, coming = coming, [pool.submit(load, index) for index in batch]
            if ready:
                yield [future.result() for future in ready]


def describe_batch(args, describe, plan, batch, tokens):
    """The samples, as write_shard takes them, of [(index, image)]; tokens (B, N) or None."""
    records, conversations, seeds = [], [], []
    for index, image in batch:
        prompt = plan[index].random(args.seed, "prompt") % len(PROMPTS)
        records.append({"index": index, "prompt": prompt, "sample": plan[index]})
        conversations.append(caption_messages(image, prompt))
        seeds.append(plan[index].random(args.seed, "tokens"))
    tokens, features = describe(conversations, seeds, tokens)
    return list(zip(records, tokens, features, strict=True))


def describe_images(args, plan, todo, kind):
    """Describes the images of these indices in the plan and writes the shards."""
    describe = load_vllm(args) if args.backend == "vllm" else load_transformers(args)
    if args.backend == "vllm":
        # it forms its own batches, the better the more it can choose from
        args.batch_size = args.shard_size
    known = load_tokens(args.out)
    first = [index for index in todo if index in known]
    rest = [index for index in todo if index not in known]
    samples, skipped = [], []
    bar = tqdm(total=len(todo), unit=" samples", desc="describing", smoothing=0.05,
               disable=torchrun_ranks()[0] != 0)
    # apart, because a batch is either generated or read
    batches = itertools.chain(load_batches(args, plan, first), load_batches(args, plan, rest))
    for loaded in batches:
        batch, tokens = [], None
        for index, image in loaded:
            if isinstance(image, UserError):
                tqdm.write(f"skipped: {image}", file=sys.stderr)
                key, reason = plan[index].key, str(image)
                skipped.append({"index": index, "key": key, "reason": reason})
            else:
                batch.append((index, image))
        if batch:
            if batch[0][0] in known:
                tokens = torch.stack([known[index] for index, _ in batch]).long()  # (B, N)
            samples += describe_batch(args, describe, plan, batch, tokens)
        bar.update(len(loaded))
        if not samples and len(skipped) >= args.shard_size:
            # not recorded: more likely the disk is at fault
            raise UserError(f"{len(skipped)} pictures in a row cannot be read; is the disk there? "
                            f"The last: {skipped[-1]['reason']}")
        if len(samples) + len(skipped) >= args.shard_size:
            write_shard(args, kind, samples, skipped)
            samples, skipped = [], []
    if samples or skipped:
        write_shard(args, kind, samples, skipped)
    bar.close()


def lvlm(args):
    """Describes the images of args.images that --out lacks (paper section 3.3, appendix B)."""
    rank, world_size, _ = torchrun_ranks()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plan = make_plan(args)
    done, kind = finished(out), "shard"
    if args.backend == "vllm" and not args.tokens_only:
        done, kind = done | finished(out, "tokens"), "tokens"
    # each process takes every world_size-th index, so that no two describe the same image
    todo = [index for index in range(rank, len(plan), world_size) if index not in done]
    if todo:
        check_disk(args, plan, len(plan) - len(done))
        describe_images(args, plan, todo, kind)
    summarise(out, plan, kind)


# ---------------------------------------------------------------- command line
def main():
    if sys.argv[1:2] == ["fetch"]:
        raise UserError(f"fetch is a script of its own: python fetch.py {' '.join(sys.argv[2:])}")
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = common.add_command(commands, "lvlm", lvlm, "describe images, for thinkdiff_lvlm.py", FLAGS)
    p.add_argument("--images", nargs="+", required=True, metavar="SOURCE",
                   help="folders (of images or tars), tars, brace patterns of them")
    p.add_argument("--out", required=True, help="folder for the shards")
    args = parser.parse_args()
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        p.error("--temperature must be above 0 and --top-p in (0, 1]")
    args.run(args)


if __name__ == "__main__":
    common.cli_main(main)
