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
    shard-*.json        {"samples": [{index, prompt, sample}], "skipped": [{index, key, reason}]};
                        a shard's number is its lowest index, a line of plan.jsonl
    tokens-*            the same of --backend vllm, without features
    skipped.csv         images left out, and why
"""
import startup

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
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor

import common
import models
from common import MINI, MODELS, UserError, first_line, number, positive, pretrained, torchrun_ranks
from images import ImageRef, find_images, open_image
from thinkdiff_lvlm import PROMPTS, caption_messages, generate_with_features
from training_data import digest, read_shards

# flag, type, full size, miniature, [source] and meaning
FLAGS = {"method": [
    ("--vlm", str, MODELS["vlm"], MINI["vlm"], "[paper] path or hub name of a Qwen-VL"),
    common.DTYPE_FLAG,
    # the miniature's answers are short
    ("--tokens", common.count, 64, 40, "[paper, appendix B] tokens an image, EOS ignored"),
    ("--temperature", number(float, 0, above=True), 0.6, 0.6, "[release] of the sampling"),
    ("--top-p", common.nucleus, 0.9, 0.9, "[release] nucleus of the sampling"),
    ("--features", ("generated", "input"), "generated", "generated",
     "[paper] generated: of the answer's tokens; input: of the prompt's (ablation, table 3)"),
], "run": [
    ("--count", common.count, None, None, "a random subset of so many images; None: all"),
    ("--seed", common.seed, 0, 0, "decides the subset, the prompts and the sampling"),
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
    ("--workers", positive, 4, 4, "threads that decode and preprocess images ahead"),
]}


# ---------------------------------------------------------------- backends
def load_transformers(args):
    """Returns encode(conversation), which threads may call, and describe(B of its results, seeds,
    tokens).

    describe generates tokens (B, N) int64 unless they are given, and returns them with the
    features: B tensors bf16, (N, d_vlm) or with --features input (P, d_vlm); B times None if
    --tokens-only. All on the CPU."""
    device, dtype = common.pick_device(args.dtype)
    model, processor = models.load_vlm(args.vlm, device, dtype)

    def encode(messages):
        return models.encode_messages(processor, [messages]).to(dtype)

    def describe(encoded, seeds, tokens=None):
        inputs = models.join_inputs(encoded, processor.tokenizer.pad_token_id, device)
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

    return encode, describe


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

    def encode(messages):
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image = messages[0]["content"][0]["image"]
        return {"prompt": text, "multi_modal_data": {"image": image}}

    def describe(requests, seeds, tokens=None):
        params = [SamplingParams(
            temperature=args.temperature, top_p=args.top_p, max_tokens=args.tokens,
            ignore_eos=True, seed=seed, logit_bias=bias, detokenize=False) for seed in seeds]
        answers = llm.generate(requests, params, use_tqdm=False)
        tokens = torch.tensor([answer.outputs[0].token_ids for answer in answers])  # (B, N)
        return tokens, [None] * len(tokens)

    return encode, describe


# ---------------------------------------------------------------- plan and shards
# what decides the data, besides images and prompts
SETTINGS = ("vlm", "count", "seed", "tokens", "temperature", "top_p", "features", "tokens_only",
            "max_side", "dtype")


def make_plan(args):
    """(content of meta.json, [ImageRef] of the selected images), which the first process makes.

    Once there is a shard they are fixed: raises UserError if the settings or the files differ."""
    out, first, new = Path(args.out), torchrun_ranks()[0] == 0, False
    settings = {name: vars(args)[name] for name in SETTINGS}
    settings["images"] = [os.path.abspath(path) for path in args.images]
    settings["prompts"] = PROMPTS
    settings["d_vlm"] = models.feature_width(args.vlm)
    while True:
        # before the plan is read, because shards come after it
        begun = any(file for kind in ("shard", "tokens") for file in out.glob(f"{kind}-*.json"))
        meta, plan, changed = read_plan(out, settings)
        if not changed:
            break
        if begun:
            raise UserError(f"{out} was begun with {'; '.join(changed)}: give or restore the same "
                            "to go on, or choose another --out")
        if first:
            write_plan(args, settings)
            new = True
        else:
            # torchrun ends this process if the first one fails
            time.sleep(0.5)
    if first and not new:
        print(f"goes on with {out}/plan.jsonl; pictures added since are not in it")
    return meta, plan


def write_plan(args, settings):
    """Finds the images, selects --count of them and writes plan.jsonl and meta.json."""
    refs, skipped, faults = find_images(args.images)
    for path, reason in faults + skipped:
        print(f"{path}: {reason}", file=sys.stderr)
    count = args.count or len(refs)
    if count > len(refs):
        raise UserError(f"--count {count}, but there are only {len(refs)} pictures: lower it "
                        "or add --images")
    # tars are read front to back
    selected = sorted(random.Random(args.seed).sample(range(len(refs)), count))
    plan = "".join(json.dumps(refs[i]) + "\n" for i in selected).encode()
    common.write_atomically(Path(args.out, "plan.jsonl"), plan)
    common.write_json(Path(args.out, "meta.json"), {
        **settings, "found": len(refs) + len(skipped), "skipped": skipped, "faults": faults,
        "plan_hash": digest(plan)})


def read_plan(out, settings):
    """(content of meta.json, [ImageRef], [what is gone, was changed or differs from settings]).

    Raises UserError for a meta.json that is damaged or not of this script."""
    try:
        meta = common.read_json(out / "meta.json", {"prompts": list, "faults": list},
                                "restore it or choose another --out")
        lines = (out / "plan.jsonl").read_bytes()
        # older folders have no hash, found and skipped
        if meta.get("plan_hash") not in (None, digest(lines)):
            raise ValueError("plan.jsonl was changed")
        plan = [ImageRef(*json.loads(line)) for line in lines.splitlines()]
        if not isinstance(meta.setdefault("found", len(plan)), int):
            raise TypeError("meta.json was changed")
        for name in ("faults", "skipped"):
            meta[name] = [(str(path), str(reason)) for path, reason in meta.get(name, [])]
    except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
        return {}, [], [f"other files ({error})"]
    changed = []
    # older folders have no dtype
    for name, value in settings.items():
        old = {"dtype": "auto", **meta}.get(name)
        # a model may have moved: the name of its folder counts
        moved = name == "vlm" and Path(str(old)).name == Path(value).name
        if old != value and not moved:
            changed.append(f"{name} {json.dumps(old)}, now {json.dumps(value)}")
    return meta, plan, changed


def check_disk(args, d_vlm, plan, n_left):
    """Prints the disk space that n_left samples need. Raises UserError if there is less."""
    length, estimate = 0 if args.tokens_only else args.tokens, ""
    if length and args.features == "input":
        # as long as the prompt, which depends on the image
        length, estimate = first_prompt_length(args, plan), ", judged by the first picture"
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
            messages = caption_messages(open_image(ref, max_side=args.max_side), 0)
            return models.encode_messages(processor, [messages])["input_ids"].shape[1]
        except UserError:
            continue
    return args.tokens


def write_shard(args, kind, samples, skipped):
    """Writes a shard of samples, [(record, tokens (N,), features (L, d_vlm) or None)], and of
    skipped, [record]. Its number is its lowest index, which no other shard has."""
    records = [record for record, *_ in samples]
    first = min(row["index"] for row in records + skipped)
    stem = Path(args.out, f"{kind}-{first:07}")
    if stem.with_suffix(".json").exists():
        raise UserError(f"{stem}.json is in the way of image {first}, which it does not hold: "
                        "move it and its .safetensors away and run the same command again")
    content = json.dumps({"samples": records, "skipped": skipped}).encode()
    if samples:
        _, tokens, features = zip(*samples, strict=True)
        tensors = {"tokens": torch.stack(tokens).to(torch.int32)}  # (n, N)
        if features[0] is not None:
            tensors["features"] = pad_sequence(features, batch_first=True)  # (n, L, d_vlm)
            if args.features == "input":
                tensors["lengths"] = torch.tensor([len(x) for x in features])  # (n,)
        found = digest(content + tensors["tokens"].numpy().tobytes())
        common.write_tensors(f"{stem}.safetensors", tensors, {"hash": found})
    # last, because it marks the shard as complete
    common.write_atomically(f"{stem}.json", content)


def finished(out, plan, with_tokens=False):
    """{index in the plan: row of a shard} of samples, or tokens, and skipped images.

    Raises UserError if a shard is not of this plan."""
    rows = {}
    for kind in ("tokens", "shard"):
        for stem, shard in read_shards(out, kind):
            for row in shard["skipped"] + shard["samples"]:
                index, named = row["index"], row.get("sample", row.get("key"))
                if not any(named in (list(ref), ref.key) for ref in plan[index:index + 1]):
                    raise UserError(f"{stem}.json holds images that {out}/plan.jsonl does not: "
                                    "move its two files away and run the same command again")
                if kind == "shard" or with_tokens:
                    rows[index] = row
    return rows


def load_tokens(out):
    """{index in the plan: tokens (N,) int32} of what --backend vllm has generated."""
    known = {}
    for stem, shard in read_shards(out, "tokens"):
        if shard["samples"]:
            tokens = load_file(f"{stem}.safetensors")["tokens"]
            known.update(zip((row["index"] for row in shard["samples"]), tokens, strict=True))
    return known


def summarise(out, meta, plan, with_tokens):
    """Waits for the other processes, writes skipped.csv, prints what became of all images."""
    rows = finished(out, plan, with_tokens)
    if len(rows) < len(plan) and torchrun_ranks()[1] > 1:
        print(f"this process is done; the others have {len(plan) - len(rows)} pictures left",
              flush=True)
        while len(rows) < len(plan):
            time.sleep(2)
            rows = finished(out, plan, with_tokens)
    skipped = [(plan[index].key, row.get("reason"))
               for index, row in sorted(rows.items()) if "sample" not in row]
    n_written, table, faults = len(rows) - len(skipped), out / "skipped.csv", meta["faults"]
    n_others = meta["found"] - len(meta["skipped"]) - len(plan)
    skipped += meta["skipped"]
    common.write_csv(table, ("picture", "reason"), faults + skipped)
    parts = {"not selected": n_others, "written": n_written, "skipped": len(skipped),
             "left": len(plan) - len(rows)}
    total = " + ".join(f"{n} {what}" for what, n in parts.items() if n or what == "skipped")
    broken = f"; {len(faults)} faults in tars" if faults else ""
    see = f" (see {table})" if skipped or faults else ""
    print(f"found {meta['found']} pictures = {total}{broken}{see}")
    if not n_written:
        raise UserError(f"none of the {len(plan)} pictures can be read: see {table}")
    if with_tokens:
        print("their features come next: the same command without --backend vllm, in the "
              "environment of requirements.txt")


# ---------------------------------------------------------------- lvlm
def load_batches(args, plan, indices, encode):
    """Yields [(record for write_shard, what encode returns, or None for a skipped image)]; threads
    decode and encode the next batch meanwhile."""
    def load(index):
        ref = plan[index]
        prompt = ref.random(args.seed, "prompt") % len(PROMPTS)
        try:
            image = open_image(ref, max_side=args.max_side)
        except UserError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            return {"index": index, "key": ref.key, "reason": str(error)}, None
        record = {"index": index, "prompt": prompt, "sample": ref}
        return record, encode(caption_messages(image, prompt))

    with ThreadPoolExecutor(args.workers) as pool:
        coming = []
        for start in range(0, len(indices) + args.batch_size, args.batch_size):
            batch = indices[start:start + args.batch_size]
            ready, coming = coming, [pool.submit(load, index) for index in batch]
            if ready:
                yield [future.result() for future in ready]


def describe_batch(args, describe, batch, known):
    """The samples, as write_shard takes them, of [(record, encoded)]."""
    records, encoded = zip(*batch, strict=True)
    seeds = [record["sample"].random(args.seed, "tokens") for record in records]
    tokens = None
    if records[0]["index"] in known:
        tokens = torch.stack([known[record["index"]] for record in records]).long()  # (B, N)
    tokens, features = describe(encoded, seeds, tokens)
    return list(zip(records, tokens, features, strict=True))


def describe_images(args, plan, todo, kind):
    """Describes the images of these indices in the plan and writes the shards."""
    encode, describe = (load_vllm if args.backend == "vllm" else load_transformers)(args)
    if args.backend == "vllm":
        # it forms its own batches, the better the more it can choose from
        args.batch_size = args.shard_size
    known = load_tokens(args.out)
    first = [index for index in todo if index in known]
    rest = [index for index in todo if index not in known]
    samples, skipped, n_left, writing = [], [], len(todo), None
    bar = tqdm(total=len(todo), unit=" samples", desc="describing", smoothing=0.05,
               disable=torchrun_ranks()[0] != 0)
    # apart, because a batch is either generated or read
    batches = itertools.chain(*(load_batches(args, plan, part, encode) for part in (first, rest)))
    with ThreadPoolExecutor(1) as writer:
        for loaded in batches:
            batch = [(record, encoded) for record, encoded in loaded if encoded]
            skipped += [record for record, encoded in loaded if not encoded]
            if batch:
                samples += describe_batch(args, describe, batch, known)
            bar.update(len(loaded))
            n_left -= len(loaded)
            if n_left and len(samples) + len(skipped) < args.shard_size:
                continue
            # a disk that has gone is no reason to skip its pictures
            if skipped and not any(os.path.exists(ref.path) for ref in plan):
                raise UserError(f"none of the pictures in {args.out}/plan.jsonl is there any more: "
                                "is the disk?")
            # one shard at a time, and its errors before the next one
            if writing:
                writing.result()
            writing = writer.submit(write_shard, args, kind, samples, skipped)
            samples, skipped = [], []
        writing.result()
    bar.close()


def lvlm(args):
    """Describes the images of args.images that --out lacks (paper section 3.3, appendix B)."""
    rank, world_size, _ = torchrun_ranks()
    out = Path(args.out)
    common.lock_folder(out)
    meta, plan = make_plan(args)
    # what has its features needs no tokens
    with_tokens = args.backend == "vllm" and not args.tokens_only
    done = set(finished(out, plan, with_tokens))
    # each process takes every world_size-th index, so that no two describe the same image
    todo = [index for index in range(rank, len(plan), world_size) if index not in done]
    if todo:
        check_disk(args, meta["d_vlm"], plan, len(plan) - len(done))
        describe_images(args, plan, todo, "tokens" if with_tokens else "shard")
    # the first process ends last, because it holds the lock
    if rank == 0:
        summarise(out, meta, plan, with_tokens)


# ---------------------------------------------------------------- command line
def main():
    if sys.argv[1:2] == ["fetch"]:
        raise UserError(f"fetch is a script of its own: python fetch.py {' '.join(sys.argv[2:])}")
    parser = common.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = common.add_command(commands, "lvlm", lvlm, "describe images, for thinkdiff_lvlm.py", {})
    group = p.add_argument_group("required")
    group.add_argument("--images", nargs="+", required=True, metavar="SOURCE", type=common.text,
                       help="folders (of images or tars), tars, brace patterns of them")
    group.add_argument("--out", required=True, type=common.text, help="folder for the shards")
    common.add_flags(p, FLAGS)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    common.cli_main(main, "the same command goes on from what is on disk")
