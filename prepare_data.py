"""Turns pictures into training data for the aligner. `lvlm`: the VLM describes each picture; its tokens and their features are kept.

`fetch` (last section) downloads, of the models, only the files that a script reads.

Miniature, one process:
    python prepare_data.py lvlm --mini --images data/mini --out data/mini-lvlm
Full size, 4 GPUs, a random 1.7 M of the pictures in WebDataset tars and a folder (780 GB of features, or 0.44 GB of tokens with --tokens-only):
    torchrun --nproc_per_node 4 prepare_data.py lvlm --images '/data/cc3m/{00000..00331}.tar' /data/sbu --count 1700000 --out data/lvlm
The same command with --backend vllm before it lets vLLM write the tokens, which the command then only reads (vLLM gives no features).

Started again after a kill, with any number of processes, it goes on where it stopped. What it leaves in --out:
    meta.json                       the settings; a run with others is refused
    plan.jsonl                      the chosen pictures, one [path, tar member, offset, size] a line
    shard-RANK-NUMBER.safetensors   tokens (n, N) int32; unless --tokens-only features (n, N, d_vlm) bf16
                                    (--features input: features (n, L, d_vlm) right-padded, lengths (n,))
    shard-RANK-NUMBER.json          {"samples": [{index, prompt, sample}], "skipped": [{index, key, reason}]}; only with it a shard counts
    tokens-RANK-NUMBER.*            tokens written by --backend vllm, in the same form; they wait for their features
    skipped.csv                     everything left out, and why
"""
import argparse
import csv
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LogitsProcessorList

from common import (MINI, MODELS, UserError, first_line, loading, mini_flag, open_image, pick_device, positive, pretrained, run, t5_decoder,
                    torchrun_ranks, vision_tower, weight_files, write_atomically, write_json)

PROMPTS = [  # appendix B of the paper
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


# ---------------------------------------------------------------- the VLM: tokens, and the states from which they were sampled
def load_vlm(path, device, dtype, **options):
    """(the VLM, its processor) from a folder or hub name: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, frozen, padding on the left as generation needs it.

    options: more arguments of from_pretrained. Raises UserError for another kind of model and for one that lacks weights."""
    model, info = pretrained(AutoModelForImageTextToText, path, dtype=dtype, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise UserError(f"{path} lacks weights of the VLM: {', '.join(sorted(info['missing_keys'])[:4])}; download it again")
    if not hasattr(getattr(getattr(model, "model", None), "language_model", None), "norm"):
        raise UserError(f"{path} is a {model.config.model_type}: give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    processor = pretrained(AutoProcessor, path)
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval().requires_grad_(False), processor


def encode_messages(processor, conversations):
    """What the model is called with, for a batch of B conversations of any length, left-padded to P tokens.

    A conversation is a list of {"role", "content"}; content is text or a list of {"type": "text", "text"} and {"type": "image", "image": PIL}."""
    texts = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in conversations]
    images = [part["image"] for messages in conversations for message in messages if not isinstance(message["content"], str)
              for part in message["content"] if part["type"] == "image"]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


@torch.no_grad()
def generate_with_features(model, inputs, max_new_tokens, *, ignore_eos=True, do_sample=True, temperature=0.6, top_p=0.9, seeds=None):
    """Generates an answer to each conversation in `inputs` (encode_messages, on the model's device) and keeps the features of its tokens.

    Returns tokens (B, N) int64, features (B, N, d_vlm) and lengths (B,), the number of tokens before EOS (N with ignore_eos, where EOS is a
    token like any other). N is max_new_tokens, or less if all rows reached EOS. features[:, i] is x_i, the final-norm state from which y_i
    was sampled (protocol, section 4): it stands one position before y_i, and lm_head(x_i) are y_i's logits.
    seeds: one int a conversation; the same seed draws the same answer whatever else is in the batch (up to rounding)."""
    batch, prompt_length = inputs["input_ids"].shape
    if do_sample:  # one number a token decides, so that a row needs no more than its own seed
        seeds = seeds or torch.randint(2**62, (batch,)).tolist()
        uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        uniform = uniform.to(model.device)  # (B, N)

    def nucleus(input_ids, logits):  # (B, V): -inf everywhere but at the sampled token
        probs, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = probs.cumsum(-1) - probs  # mass of the likelier tokens
        kept = torch.where(below < top_p, probs, 0).sum(-1, keepdim=True)
        rank = (below <= uniform[:, input_ids.shape[1] - prompt_length, None] * kept).sum(-1, keepdim=True) - 1
        return torch.full_like(logits, -torch.inf).scatter(-1, order.gather(-1, rank), 0)

    states = []
    # the prompt's pass ends at the state that yields y_1, each later pass is the state that yields the next token
    hook = model.model.language_model.norm.register_forward_hook(lambda module, args, state: states.append(state[:, -1].clone()))
    end = None if ignore_eos else model.generation_config.eos_token_id
    try:
        sequences = model.generate(
            **inputs, max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList([nucleus] if do_sample else []),
            do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,  # nothing from the model's generation_config
            suppress_tokens=[model.config.image_token_id, model.config.video_token_id],  # placeholders for pictures, not words
            eos_token_id=end)
    finally:
        hook.remove()
    tokens = sequences[:, prompt_length:]
    ended = torch.isin(tokens, torch.tensor([] if end is None else end, dtype=tokens.dtype, device=tokens.device))
    lengths = (ended.cumsum(-1) == 0).sum(-1)
    return tokens, torch.stack(states, dim=1), lengths


@torch.no_grad()
def teacher_forced_features(model, inputs, tokens):
    """generate_with_features' features (B, N, d_vlm) of known `tokens` (B, N) after the prompts in `inputs`, in one pass."""
    added = tokens[:, :-1]  # y_N predicts nothing
    inputs = dict(inputs, input_ids=torch.cat([inputs["input_ids"], added], dim=1),
                  attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(added)], dim=1),
                  mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(added)], dim=1))
    return model.model(**inputs, use_cache=False).last_hidden_state[:, -tokens.shape[1]:]  # positions P-1 .. P+N-2


@torch.no_grad()
def prompt_features(model, inputs):
    """The final-norm states of the prompts themselves, text and picture tokens: a list of B tensors (P_i, d_vlm). Table 3's ablation."""
    states = model.model(**inputs, use_cache=False).last_hidden_state
    return [state[mask.bool()] for state, mask in zip(states, inputs["attention_mask"])]


def caption_messages(image, prompt):
    """The conversation in which the VLM is asked for one picture's description; prompt: an index into PROMPTS."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": PROMPTS[prompt]}]}]


def load_vllm(args):
    """What writes the tokens for --backend vllm: a function of B conversations and their seeds, as generate_with_features takes them, -> tokens
    (B, N) int64. Stock vLLM (checked against 0.33); it does not give the states, so features take a teacher-forced pass later."""
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if (local_rank := torchrun_ranks()[2]) >= len(gpus):
        raise UserError(f"process {local_rank} has no GPU: use torchrun --nproc_per_node {len(gpus)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank]  # vLLM's own processes have no other way to know their GPU
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--backend vllm: {first_line(error)} Install it with `pip install vllm`, in a virtual environment of its own if it wants "
                        "another torch or transformers than is installed here") from error
    processor, config = pretrained(AutoProcessor, args.vlm), pretrained(AutoConfig, args.vlm)
    with loading(args.vlm):
        llm = LLM(args.vlm, seed=args.seed, max_model_len=-1, limit_mm_per_prompt={"image": 1, "video": 0})  # -1: the longest that fits the memory
    placeholders = {config.image_token_id: -100.0, config.video_token_id: -100.0}

    def write(conversations, seeds):
        requests = [{"prompt": processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
                     "multi_modal_data": {"image": messages[0]["content"][0]["image"]}} for messages in conversations]
        params = [SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=args.tokens, ignore_eos=True, seed=seed,
                                 logit_bias=placeholders, detokenize=False) for seed in seeds]
        return torch.tensor([answer.outputs[0].token_ids for answer in llm.generate(requests, params, use_tqdm=False)])

    return write


# ---------------------------------------------------------------- pictures: in folders and in tars
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Sample(NamedTuple):
    """Where a picture is: a file, or `size` bytes at `offset` of a tar. The absolute path and the member tell any two apart."""
    path: str
    member: str = ""
    offset: int = 0
    size: int = 0

    @property
    def key(self):
        return f"{self.path}::{self.member}" if self.member else self.path

    def draw(self, seed, purpose):
        """A random number that depends on the seed, the purpose and the file's name, but not on the process, the order or the folder."""
        text = f"{seed} {purpose} {os.path.basename(self.path)} {self.member}"
        return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=7).digest(), "big")


def load_picture(sample, max_side):
    """The sample's picture, RGB and at most max_side pixels long. Raises UserError if it cannot be had."""
    if not sample.member:
        image = open_image(sample.path, max_side=max_side)
    else:
        try:
            with open(sample.path, "rb") as tar:
                tar.seek(sample.offset)
                image = open_image(tar.read(sample.size), sample.key, max_side)
        except OSError as error:
            raise UserError(f"cannot read {sample.key}: {error.strerror}") from error
    if max(image.size) > 200 * min(image.size):
        raise UserError(f"cannot use {sample.key}: it is a strip, more than 200 times as long as wide")
    return image


def expand_braces(pattern):
    """'a{08..10}{x,y}' -> a08x a08y a09x a09y a10x a10y, as the shell does; a path that exists is left alone."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if os.path.exists(pattern) or not braces:
        return [pattern]
    first, last, words = braces.groups()
    words = words.split(",") if words is not None else [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [path for word in words for path in expand_braces(pattern[:braces.start()] + word + pattern[braces.end():])]


def index_tar(path, suffixes=SUFFIXES):
    """(samples of the members with these suffixes, what is wrong with the tar or None); reads the headers only, of a truncated tar what is whole."""
    samples, size = [], os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(suffixes) and member.offset_data + member.size <= size:
                    samples.append(Sample(path, member.name, member.offset_data, member.size))
        with open(path, "rb") as file:  # tarfile takes a cut between two members for the end
            file.seek(max(0, size - 1024))
            fault = "the end is missing" if file.read().strip(b"\0") else None
    except (tarfile.TarError, EOFError) as error:
        fault = str(error)
    return samples, fault and f"broken tar ({fault}), {len(samples)} pictures of it can be read"


def find_samples(sources):
    """({key: Sample}, [(path, fault)]) of files, folders (searched to the bottom), tars and brace patterns of them."""
    paths = [os.path.abspath(path) for source in sources for path in expand_braces(source)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(f"{missing[0]} does not exist{f' (nor do {len(missing) - 1} more)' if missing[1:] else ''}: check the path")
    files = []
    for path in paths:
        inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        files += inside if os.path.isdir(path) else [path]
    samples, faults = {}, []
    for path in tqdm(files, desc="indexing", unit=" files", leave=False, disable=None):
        found, fault = [Sample(path)] if path.lower().endswith(SUFFIXES) else [], None
        if path.lower().endswith(".tar"):
            found, fault = index_tar(path)
        samples.update((sample.key, sample) for sample in found)
        faults += [(path, fault)] if fault else []
    if not samples:
        raise UserError(f"no pictures in {' '.join(sources)}: expected {' '.join(SUFFIXES)} files, or .tar files of them"
                        + "".join(f"; {path}: {fault}" for path, fault in faults[:1]))
    return samples, faults


# ---------------------------------------------------------------- shards
def read_shards(out, kind="shard"):
    """[(stem, {"samples", "skipped"})] of the finished shards in folder `out`; stem + ".safetensors" holds the tensors.

    kind "tokens": those of --backend vllm, which wait for their features."""
    return [(path.with_suffix(""), json.loads(path.read_text())) for path in sorted(Path(out).glob(f"{kind}-*.json"))]


def write_shard(out, kind, rank, records, tensors, skipped):
    """Writes one shard under this rank's next free number; its JSON last, because only with it a shard counts."""
    stem = out / f"{kind}-{rank:02}-{sum(1 for _ in out.glob(f'{kind}-{rank:02}-*.json')):05}"
    if records:
        write_atomically(f"{stem}.safetensors", safetensors.torch.save(tensors))
    write_atomically(f"{stem}.json", json.dumps({"samples": records, "skipped": skipped}))


def finished(shards):
    """The numbers in the plan of all that the shards hold, samples and skipped ones."""
    return {row["index"] for _, shard in shards for row in shard["samples"] + shard["skipped"]}


def written_tokens(out):
    """The tokens that --backend vllm has left in `out`, which wait for their features: {number in the plan: row}, tokens (rows, N) int32."""
    shards = [(stem, shard["samples"]) for stem, shard in read_shards(out, "tokens") if shard["samples"]]
    rows = {record["index"]: row for row, record in enumerate(record for _, samples in shards for record in samples)}
    tokens = [safetensors.torch.load_file(f"{stem}.safetensors")["tokens"] for stem, _ in shards]
    return rows, torch.cat(tokens) if tokens else None


def make_plan(args, out):
    """The chosen pictures, [Sample]; rank 0 chooses them on the first start. Raises UserError if `out` was begun with other settings."""
    settings = {
        "vlm": args.vlm, "d_vlm": pretrained(AutoConfig, args.vlm).get_text_config().hidden_size,
        "images": [os.path.abspath(path) for path in args.images], "count": args.count, "seed": args.seed, "prompts": PROMPTS,
        "tokens": args.tokens, "temperature": args.temperature, "top_p": args.top_p, "features": args.features,
        "tokens_only": args.tokens_only, "max_side": args.max_side}
    meta, plan = out / "meta.json", out / "plan.jsonl"
    if torchrun_ranks()[0] == 0 and not meta.exists():
        samples, faults = find_samples(args.images)
        for path, fault in faults:
            print(f"{path}: {fault}", file=sys.stderr)
        samples = list(samples.values())
        if args.count and args.count > len(samples):
            raise UserError(f"--count {args.count}, but there are only {len(samples)} pictures: lower it or add --images")
        chosen = random.Random(args.seed).sample(range(len(samples)), args.count or len(samples))
        write_atomically(plan, "".join(json.dumps(samples[i]) + "\n" for i in sorted(chosen)))  # tars are read front to back
        write_json(meta, {**settings, "faults": faults})
    while not meta.exists():  # the other ranks wait for rank 0; torchrun ends them if it fails
        time.sleep(0.5)
    found = json.loads(meta.read_text())
    changed = [f"{name} {json.dumps(found.get(name))}, now {json.dumps(value)}" for name, value in settings.items()
               if found.get(name) != value]
    if changed:
        raise UserError(f"{out} was begun with {'; '.join(changed)}: give the same settings to go on, or another --out")
    return [Sample(*json.loads(line)) for line in plan.read_text().splitlines()]


def check_disk(args, out, plan, number):
    """Prints what is to come and refuses to start what does not fit on the disk."""
    meta = json.loads((out / "meta.json").read_text())
    length, source = args.tokens, ""
    if args.features == "input" and not args.tokens_only:  # as long as the prompt, which depends on the picture
        processor = pretrained(AutoProcessor, args.vlm)
        for sample in plan:
            try:
                length = encode_messages(processor, [caption_messages(load_picture(sample, args.max_side), 0)])["input_ids"].shape[1]
                source = ", judged by the first picture"
                break
            except UserError:
                continue
    need = number * (4 * args.tokens + (0 if args.tokens_only else 2 * length * meta["d_vlm"]))
    free = shutil.disk_usage(out).free
    if torchrun_ranks()[0] == 0:
        print(f"{number} samples to go of {len(plan)}; they need {need / 1e9:.3g} GB on disk{source}, {free / 1e9:.3g} GB are free",
              flush=True)
    if need > free:
        raise UserError(f"{need / 1e9:.3g} GB do not fit in the {free / 1e9:.3g} GB free at {out}: use --tokens-only (training then "
                        "recomputes the features), a smaller --count or another --out")


def summarise(out, plan, kind):
    """Writes skipped.csv and says what became of every picture, once the last process is done."""
    shards = [content for _, content in read_shards(out, kind)]
    samples, skipped = sum(len(shard["samples"]) for shard in shards), [row for shard in shards for row in shard["skipped"]]
    faults = json.loads((out / "meta.json").read_text())["faults"]
    table = io.StringIO()
    csv.writer(table).writerows([("picture", "reason"), *faults, *((row["key"], row["reason"]) for row in skipped)])
    write_atomically(out / "skipped.csv", table.getvalue())
    left = len(plan) - samples - len(skipped)
    if left:
        print(f"this process is done; {left} samples are with the others", flush=True)
        return
    if not samples:
        raise UserError(f"none of the {len(plan)} pictures can be read: see {out / 'skipped.csv'}")
    broken = f", {len(faults)} broken tars" if faults else ""
    see = f" (see {out / 'skipped.csv'})" if skipped or faults else ""
    print(f"wrote {'the tokens of ' if kind == 'tokens' else ''}{samples} samples to {out}, skipped {len(skipped)} pictures{broken}{see}")
    if kind == "tokens":
        print("their features come next: the same command without --backend vllm, where transformers is the one of requirements.txt")


# ---------------------------------------------------------------- lvlm
def read_ahead(plan, indices, args):
    """Yields batches [(index, picture or UserError)]; the next batch is decoded while the caller works on this one."""
    def load(index):
        try:
            return index, load_picture(plan[index], args.max_side)
        except UserError as error:
            return index, error

    with ThreadPoolExecutor(args.workers) as pool:
        coming = []
        for start in range(0, len(indices) + args.batch_size, args.batch_size):
            ready, coming = coming, [pool.submit(load, index) for index in indices[start:start + args.batch_size]]
            if ready:
                yield [future.result() for future in ready]


def lvlm(args):
    rank, world, _ = torchrun_ranks()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plan = make_plan(args, out)
    kind = "tokens" if args.backend == "vllm" and not args.tokens_only else "shard"
    done, (rows, written) = finished(read_shards(out)), written_tokens(out)
    if kind == "tokens":
        done |= finished(read_shards(out, "tokens"))
    todo = [i for i in range(rank, len(plan), world) if i not in done]  # by number in the plan, so that no two processes share a sample
    if todo:
        check_disk(args, out, plan, len(plan) - len(done))
        if args.backend == "vllm":
            write = load_vllm(args)
            args.batch_size = args.shard_size  # vLLM makes its own batches, the better the more there is to choose from
        else:
            device, dtype = pick_device()
            model, processor = load_vlm(args.vlm, device, dtype)

    records, tokens, features, skipped = [], [], [], []

    def flush():
        if skipped and not records and len(skipped) >= args.shard_size:  # not recorded: more likely the disk is at fault
            raise UserError(f"{len(skipped)} pictures in a row cannot be read; is the disk there? The last: {skipped[-1]['reason']}")
        tensors = {"tokens": torch.stack(tokens).to(torch.int32)} if records else {}  # (n, N)
        if features:
            tensors["features"] = pad_sequence(features, batch_first=True)  # (n, N, d_vlm), or (n, longest prompt, d_vlm)
            if args.features == "input":
                tensors["lengths"] = torch.tensor([len(rows) for rows in features])  # (n,)
        write_shard(out, kind, rank, records, tensors, skipped)
        for column in (records, tokens, features, skipped):
            column.clear()

    bar = tqdm(total=len(todo), unit=" samples", desc="describing", disable=rank != 0 or not todo, smoothing=0.05)
    in_batches = (read_ahead(plan, part, args) for part in ([i for i in todo if i in rows], [i for i in todo if i not in rows]))
    for batch in itertools.chain.from_iterable(in_batches):  # first those whose tokens are there
        seen = len(batch)
        for index, error in batch:
            if isinstance(error, UserError):
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                skipped.append({"index": index, "key": plan[index].key, "reason": str(error)})
        batch = [(index, image) for index, image in batch if not isinstance(image, UserError)]
        if batch:
            prompts = [plan[index].draw(args.seed, "prompt") % len(PROMPTS) for index, _ in batch]
            seeds = [plan[index].draw(args.seed, "tokens") for index, _ in batch]
            conversations = [caption_messages(image, prompt) for (_, image), prompt in zip(batch, prompts)]
            if args.backend == "vllm":
                answer = write(conversations, seeds)  # (B, N)
            else:
                inputs = encode_messages(processor, conversations).to(device)
                known = batch[0][0] in rows
                if known:
                    answer = written[[rows[index] for index, _ in batch]].long().to(device)  # (B, N)
                else:
                    answer, states, _ = generate_with_features(  # (B, N), (B, N, d_vlm)
                        model, inputs, args.tokens, temperature=args.temperature, top_p=args.top_p, seeds=seeds)
                if not args.tokens_only:
                    kept = (prompt_features(model, inputs) if args.features == "input" else
                            teacher_forced_features(model, inputs, answer) if known else states)
                    features += [state.to("cpu", torch.bfloat16) for state in kept]
            records += [{"index": index, "prompt": prompt, "sample": plan[index]} for (index, _), prompt in zip(batch, prompts)]
            tokens += answer.cpu()
        bar.update(seen)
        if len(records) + len(skipped) >= args.shard_size:
            flush()
    if records or skipped:
        flush()
    bar.close()
    summarise(out, plan, kind)


# ---------------------------------------------------------------- fetch: the files that a script reads, into the Hugging Face cache
def everything(name):
    """Of a model's tensors or a pipeline's parts: all."""
    return True


def without_t5(name):
    """Of FLUX's parts all but its T5 encoder, which only a text needs that goes through it."""
    return name not in ("text_encoder_2", "tokenizer_2")


FETCH = {  # what is to run: {model flag: of its tensors (of a pipeline: its parts) those that are read; None: no weights, only tokenizer and config}
    "lvlm-data": ("prepare_data.py lvlm", {"vlm": everything}),
    "lvlm-train": ("thinkdiff_lvlm.py train (with --tokens-only data also lvlm-data)", {"vlm": None, "t5": t5_decoder}),
    "lvlm-generate": ("thinkdiff_lvlm.py generate", {"vlm": everything, "flux": without_t5}),
    "lvlm-relay": ("thinkdiff_lvlm.py generate with --relay or --true-cfg", {"vlm": everything, "flux": everything}),
    "clip-train": ("thinkdiff_clip.py train", {"clip": vision_tower, "t5": everything}),
    "clip-generate": ("thinkdiff_clip.py generate", {"clip": vision_tower, "flux": everything}),
    "clip-video": ("thinkdiff_clip.py generate --video", {"clip": vision_tower, "cogvideox": everything}),
    "cobsat": ("cobsat_eval.py", {"vlm": everything, "flux": everything, "judge-vlm": everything, "judge-clip": everything}),
}


def files_on_hub(repo):
    """{name: DryRunFileInfo} of a hub repository's files. Raises UserError if it cannot be had."""
    try:
        disable_progress_bars()
        return {file.filename: file for file in snapshot_download(repo, dry_run=True)}
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            raise UserError(f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo} (an account is needed), log in with "
                            "`hf auth login`, then give the same command again") from error
        raise UserError(f"cannot fetch {repo}: {first_line(error.__cause__ or error)} Check the name and the network, and that HF_HUB_OFFLINE is not "
                        "set") from error
    finally:
        enable_progress_bars()


def files_read(repo, names, wanted):
    """Of the file names of a model, or of a diffusers pipeline with its parts in folders, those that are read for what `wanted` accepts."""
    def kept(name):
        return name.endswith((".json", ".txt", ".model", ".jinja"))  # configs, tokenizers, templates

    if "model_index.json" in names:
        return {name for name in names if name == "model_index.json" or
                name.count("/") == 1 and wanted(name.split("/")[0]) and (kept(name) or name.endswith(".safetensors"))}
    weights = []
    if wanted and {"model.safetensors", "model.safetensors.index.json"} & set(names):
        weights = weight_files(repo, wanted)  # reads the shard index
    elif wanted is everything:  # a pickle is of use only as a whole
        weights = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    elif wanted:
        raise UserError(f"{repo} has no safetensors, of which a part could be fetched: give another model")
    return {name for name in names if "/" not in name and kept(name)} | set(weights)


def fetch(args):
    listed, wants = {}, {}  # {repository: what files_on_hub and files_read say}
    for task in args.task:
        for flag, wanted in FETCH[task][1].items():
            repo = getattr(args, flag.replace("-", "_"))
            if os.path.isdir(repo):
                print(f"{repo} is a folder here: nothing to fetch")
                continue
            listed[repo] = listed.get(repo) or files_on_hub(repo)
            wants.setdefault(repo, set()).update(files_read(repo, listed[repo], wanted))
    to_come = 0
    for repo, names in wants.items():
        print(repo)
        files = [listed[repo][name] for name in sorted(names)]
        for file in files:
            if file.file_size >= 1e6:
                print(f"  {file.file_size / 1e9:8.3f} GB  {file.filename}{'' if file.will_download else '  (here)'}")
        small = [file for file in files if file.file_size < 1e6]
        print(f"  {sum(file.file_size for file in small) / 1e9:8.3f} GB  {len(small)} small files")
        to_come += sum(file.file_size for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    print(f"{to_come / 1e9:.3f} GB to download, {free / 1e9:.3f} GB are free at {cache}", flush=True)
    if to_come > free:
        raise UserError(f"{to_come / 1e9:.3g} GB do not fit: free some space, or set HF_HOME to a folder on a larger disk, here and for the scripts")
    if args.dry_run:
        return
    for repo, names in wants.items():
        try:
            snapshot_download(repo, allow_patterns=sorted(names))
        except (OSError, HTTPError) as error:
            if getattr(error, "errno", None):  # of the disk
                raise
            raise UserError(f"the download of {repo} broke off: {first_line(error)} The same command goes on where it stopped") from error
    print("all here; the scripts find them by name, with HF_HUB_OFFLINE=1 too")


# ---------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("lvlm", help="pictures -> tokens and features of a VLM's descriptions, for thinkdiff_lvlm.py train",
                            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--images", nargs="+", required=True, metavar="SOURCE", help="folders (of pictures or tars), tars, brace patterns of them")
    p.add_argument("--out", required=True, help="folder for the shards")
    p.add_argument("--count", type=positive, help="this many pictures, drawn at random from all sources together (without it: all)")
    p.add_argument("--tokens-only", action="store_true", help="store no features: training recomputes them from picture and tokens")
    p.add_argument("--features", choices=("generated", "input"), default="generated", help="input: the prompt's (Table 3's ablation)")
    p.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="vllm: stock vLLM writes the tokens; "
                   "unless --tokens-only, the same command without this flag then adds their features")
    p.add_argument("--vlm", default=MODELS["vlm"], help="folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    p.add_argument("--tokens", type=positive, default=64, help="tokens to generate for each picture, EOS ignored (paper: 64)")
    p.add_argument("--temperature", type=float, default=0.6, help="of the sampling (paper: 0.6)")
    p.add_argument("--top-p", type=float, default=0.9, help="nucleus of the sampling (paper: 0.9)")
    p.add_argument("--seed", type=int, default=0, help="decides the choice of pictures, their prompts and the sampling")
    p.add_argument("--max-side", type=positive, default=1024, help="longer pictures are shrunk: bounds their tokens (1,369) and the memory")
    p.add_argument("--batch-size", type=positive, default=32, help="pictures at a time")
    p.add_argument("--shard-size", type=positive, default=512, help="samples a file (235 MB at full size); a kill loses at most so many")
    p.add_argument("--workers", type=positive, default=4, help="threads that decode pictures ahead")
    mini_flag(p, vlm=MINI["vlm"], tokens=40, batch_size=128)  # 40: the miniature's answers are short; 128: its passes are small
    p.set_defaults(command=lvlm)

    about = "".join(f"  {task:15}{text}\n" for task, (text, _) in FETCH.items())
    f = commands.add_parser("fetch", help="download, of the models, only the files that a script reads", allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"TASK, what is to run:\n{about}",
                            description="Downloads, of the models on the Hugging Face hub, only the files that a script reads: of a\n"
                            "checkpoint in shards those that hold a tensor it needs. They go to the ordinary cache.\n"
                            "Prints names and sizes first; started again, it goes on where it stopped.")
    f.add_argument("task", nargs="+", choices=FETCH, metavar="TASK", help="see below; several share what they have in common")
    f.add_argument("--dry-run", action="store_true", help="only print")
    for flag in MODELS:
        f.add_argument(f"--{flag}", default=MODELS[flag], metavar="NAME",
                       help=f"hub name{' of what thinkdiff_clip.py calls --vlm' if flag == 'clip' else ''} (default: {MODELS[flag]})")
    f.set_defaults(command=fetch)

    args = parser.parse_args()
    if args.command is lvlm and not (args.temperature > 0 and 0 < args.top_p <= 1):
        p.error("--temperature must be above 0 and --top-p in (0, 1]")
    args.command(args)


if __name__ == "__main__":
    run(main)
