"""`train` of both variants against a loop written here with stock T5, stock CLIP and torch alone.

Imports nothing of the method; the data and every number of the recipe are typed a second time.
Then reading of samples, checkpoints, resuming and complaints."""
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from common import MINI, REPO, UserError
from helpers import command, complaint, read_log, write_tar
from training_data import FeatureDataset, sample_order

# the samples 18 and 19, or 19 alone, are held out
SAMPLES, SEED, BATCH = 20, 5, 8
# warm-up from 1e-6 to 2e-3 in two steps, then the cosine to 2e-4 that ends at step 5
RATES = [1e-6, (1e-6 + 2e-3) / 2, 2e-3, 2e-4 + 1.8e-3 * 0.75]
RECIPE = ("--mini --seed 5 --batch-size 8 --micro-batch 3 --steps 4 --warmup 2 --lr 2e-3 "
          "--lr-end 2e-4 --lr-horizon 5 --weight-decay 0.5 --log-every 1 --eval-every 3 "
          "--save-every 3 --keep 1").split()
# VLM tokens of a sample: few, so that a split at 1 or N - 1 is drawn; many, so that T5's are cut
LENGTHS = {"generated": 9, "input": 160}
WORDS = "a red car on the street photo of an apple painted blue white sleeping cat".split()


def stock(cls, name, **options):
    return cls.from_pretrained(MINI[name], **options)


def text_of(i, length):
    return " ".join(random.Random(i).choices(WORDS, k=length))


# ---------------------------------------------------------------- data
def lvlm_samples(features):
    """20 samples: x (n, 128) bf16, y (N,); x of those held out is 100 times as large."""
    tokenizer, samples = stock(AutoTokenizer, "vlm"), []
    for i in range(SAMPLES):
        y = torch.tensor(tokenizer(text_of(i, 200)).input_ids[:LENGTHS[features]])  # (N,)
        # a special token, which is no part of the target
        y[i % 9] = tokenizer.eos_token_id
        n = len(y) if features == "generated" else 9 + i
        x = torch.randn(n, 128, generator=torch.Generator().manual_seed(i))  # (n, 128)
        samples.append(((x * (100 if i >= 18 else 1)).bfloat16(), y))
    return samples


def write_lvlm_data(folder, features="generated"):
    """The samples as two processes leave them: even numbers in one shard, odd ones in the other."""
    folder.mkdir()
    samples = lvlm_samples(features)
    meta = {"tokens_only": False, "features": features, "tokens": LENGTHS[features], "d_vlm": 128}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "plan.jsonl").write_text("".join(f'["{i}.png"]\n' for i in range(SAMPLES)))
    for rank in (0, 1):
        numbers = range(1 - rank, SAMPLES, 2)
        xs, ys = zip(*[samples[i] for i in numbers], strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)  # (10, n, 128)
        tensors = {"tokens": torch.stack(ys).int(), "features": padded}
        if features == "input":
            tensors["lengths"] = torch.tensor([len(x) for x in xs])
        records = [{"index": i, "prompt": "", "sample": [f"{i}.png"]} for i in numbers]
        stem = folder / f"shard-{rank:02}-00000"
        save_file(tensors, f"{stem}.safetensors")
        Path(f"{stem}.json").write_text(json.dumps({"samples": records, "skipped": []}))


def clip_samples():
    """20 images with captions of 1 to 97 words; those held out have one that no other has."""
    pairs = []
    for i in range(SAMPLES):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        caption = text_of(i, 1 + i * i // 3) if i < 18 else "green dogs " * 9
        pairs.append((Image.fromarray(pixels), caption))
    return pairs


def write_clip_data(folder):
    folder.mkdir()
    for i, (image, caption) in enumerate(clip_samples()):
        image.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption)


WRITE_DATA = {"thinkdiff_lvlm.py": write_lvlm_data, "thinkdiff_clip.py": write_clip_data}


# ---------------------------------------------------------------- the method by hand
def lvlm_source(masking, features):
    """A function of (sample, position in the stream): features of the prefix, no T1, the target."""
    tokenizer, samples = stock(AutoTokenizer, "vlm"), lvlm_samples(features)

    def source(i, position):
        x, y = samples[i]
        if masking == "random" and features == "generated":
            s = random.Random(f"{SEED} {position}").randint(1, 8)
            x, y = x[:s], y[s:]
        return x.float(), None, tokenizer.decode(y, skip_special_tokens=True)
    return source


def clip_source(masking, _):
    """A function of (sample, position in the stream): pooled tokens (17, 96), T1, T2."""
    tower = stock(CLIPModel, "clip", dtype=torch.float32).vision_model
    processor, samples = stock(CLIPImageProcessor, "clip"), clip_samples()

    def source(i, position):
        image, caption = samples[i]
        with torch.no_grad():
            x = tower(**processor(image, return_tensors="pt")).last_hidden_state  # (1, 65, 96)
            x = tower.post_layernorm(x)[0]  # (65, 96)
        grid = x[1:].reshape(4, 2, 4, 2, 96).mean((1, 3)).flatten(0, 1)  # (16, 96)
        words, s = caption.split(), 0
        if masking == "random" and len(words) > 1:
            s = random.Random(f"{SEED} {position}").randint(1, len(words) - 1)
        return torch.cat([x[:1], grid]), " ".join(words[:s]), " ".join(words[s:])
    return source


def characters(pieces):
    """The places in the joined text of each of these pieces of it, without spaces: [{place}]."""
    places, start = [], 0
    for piece in pieces:
        places.append({start + k for k, letter in enumerate(piece) if letter != " "})
        start += len(piece)
    return places


def lvlm_targets(t5, _):
    """A function of (sample, position): [(number of x'_i, target e (32,), weight)]."""
    vlm_tokenizer, tokenizer = stock(AutoTokenizer, "vlm"), stock(AutoTokenizer, "t5")
    samples = lvlm_samples("generated")

    def targets(i, position):
        y = samples[i][1].tolist()
        s = random.Random(f"{SEED} {position}").randint(1, len(y) - 1)
        own = ["" if token == vlm_tokenizer.eos_token_id else vlm_tokenizer.decode([token])
               for token in y]
        ids = tokenizer("".join(own)).input_ids
        pieces = [piece.replace("▁", " ") for piece in tokenizer.convert_ids_to_tokens(ids[:-1])]
        # T5 puts a space in front of a text without one
        if not "".join(own).startswith(" "):
            pieces[0] = pieces[0].lstrip()
        theirs = characters(pieces)
        # a space alone, in front of a word that T5 spells, counts with the word's first letter
        theirs = [places or theirs[j + 1] for j, places in enumerate(theirs)]
        e = t5.encoder(torch.tensor([ids])).last_hidden_state[0]  # (L, 32)
        found = []
        for k, places in enumerate(characters(own)[:s]):
            near = [e[j] for j, other in enumerate(theirs) if places & other]
            if near:
                found.append((k, sum(near) / len(near), 1.0))
        return found
    return targets


def clip_targets(t5, n_train):
    """The same; None in place of the number: the nearest x' counts."""
    tokenizer = stock(AutoTokenizer, "t5")
    captions = [" ".join(caption.split()) for _, caption in clip_samples()]
    ids = [tokenizer(caption, truncation=True, max_length=128).input_ids for caption in captions]
    # those of the training samples, whole
    known = [set(tokenizer(caption).input_ids) for caption in captions[:n_train]]

    def targets(i, position):
        e = t5.encoder(torch.tensor([ids[i]])).last_hidden_state[0]  # (L, 32)
        shares = [sum(token in words for words in known) / n_train for token in ids[i]]
        return [(None, e_j, -np.log(share)) for e_j, share in zip(e, shares, strict=True)]
    return targets


def train_by_hand(source, width, hidden, limit, norm, held_out, find_targets, factor):
    """Weights, AdamW's state, losses, held-out losses after each step. One sample at a time.

    find_targets, factor: of the encoder term; the held-out loss is without it."""
    t5 = stock(T5ForConditionalGeneration, "t5", dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = stock(AutoTokenizer, "t5")
    torch.manual_seed(SEED)
    layers = [torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 32)]
    if norm != "none":
        layers.append(T5LayerNorm(32, 1e-6))
    if norm == "t5":
        layers[3].weight.data = t5.encoder.final_layer_norm.weight.data.clone()
    aligner = torch.nn.Sequential(*layers)
    matrices = [layers[0].weight, layers[2].weight]
    vectors = [layers[0].bias, layers[2].bias] + [layer.weight for layer in layers[3:]]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.5},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.999))

    def ids(text):
        return tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").input_ids

    targets = find_targets(t5, SAMPLES - held_out)

    def mean_loss(places, factor=0):
        """Mean over the tokens of all of [(sample, position)], and factor x the encoder term."""
        total, count, distance, weights = 0, 0, 0, 0
        for i, position in places:
            x, first, rest = source(i, position)
            x = aligner(x)[None]  # (1, n, 32)
            for k, e, weight in targets(i, position) if factor else ():
                squares = (x[0] - e).square().sum(-1)  # (n,)
                square = squares.min() if k is None else squares[k]
                distance, weights = distance + weight * square / (e @ e), weights + weight
            if first is not None:
                t = t5.encoder(ids(first)).last_hidden_state  # (1, L, 32)
                x = torch.cat([x, t], dim=1)  # (1, n + L, 32)
            target = ids(rest)  # (1, T)
            total = total + t5(encoder_outputs=(x,), labels=target).loss * target.shape[1]
            count += target.shape[1]
        return total / count + (factor * distance / weights if factor else 0)

    n_train, order = SAMPLES - held_out, []
    for epoch in (0, 1):
        generator = torch.Generator().manual_seed(SEED + epoch)
        order += torch.randperm(n_train, generator=generator).tolist()
    losses, held_out_losses = [], []
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        stream = range(step * BATCH, (step + 1) * BATCH)
        loss = mean_loss([(order[position], position) for position in stream], factor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            held_out_losses.append(mean_loss([(i, i) for i in range(n_train, SAMPLES)]).item())
    weights = {f"net.{name}": value for name, value in aligner.state_dict().items()}
    state = {f"net.{name}.{key}": value for name, parameter in aligner.named_parameters()
             for key, value in optimizer.state[parameter].items()}
    return weights, state, losses, held_out_losses


# a command line whose second process is killed once, after the checkpoint of step 3
KILLED_ONCE = """
import importlib, os, signal, sys
del sys.argv[0]
module = importlib.import_module(sys.argv[0].removesuffix(".py"))
rate = module.learning_rate
def rate_or_die(step, args):
    if step == 3 and os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"] == "10":
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, args)
module.learning_rate = rate_or_die
module.common.cli_main(module.main)
"""


@pytest.mark.parametrize("script, processes, options", [
    ("thinkdiff_lvlm.py", 1, {}),
    ("thinkdiff_lvlm.py", 2, {}),
    ("thinkdiff_lvlm.py", 1, {"masking": "none", "norm": "none", "log-every": 3}),
    ("thinkdiff_lvlm.py", 1, {"features": "input", "norm": "default", "hidden": 24, "held-out": 1}),
    ("thinkdiff_clip.py", 1, {}),
    ("thinkdiff_clip.py", 2, {}),
    ("thinkdiff_clip.py", 1, {"masking": "none", "norm": "none", "log-every": 3}),
    ("thinkdiff_clip.py", 1, {"norm": "default", "hidden": 24, "held-out": 1}),
    ("thinkdiff_lvlm.py", 2, {"encoder-loss": 0.5}),
    ("thinkdiff_clip.py", 2, {"encoder-loss": 0.5}),
], ids=str)
def test_four_steps_equal_a_loop_by_hand(script, processes, options, tmp_path, monkeypatch):
    """Weights, optimizer state and log; the loop by hand trains on no held-out sample. Of two
    processes one is killed, and torchrun restarts both with the same command."""
    data, out = tmp_path / "data", tmp_path / "out"
    arguments = ["train", *RECIPE, "--data", str(data), "--out", str(out)]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    masking, features = options.get("masking", "random"), options.get("features", "generated")
    if script == "thinkdiff_lvlm.py":
        write_lvlm_data(data, features)
        source, width, limit = lvlm_source(masking, features), 128, 128
    else:
        write_clip_data(data)
        source, width, limit = clip_source(masking, features), 96, 32
    # in fp32, as the loop by hand: a GPU would compute in bf16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if processes == 1:
        command(script, *arguments)
    else:
        (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             "--max-restarts", "1", tmp_path / "killed_once.py", script, *arguments, "--resume"],
            cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert done.stdout.count("starts from the beginning") == 1
        assert done.stderr.count("(exitcode: -9)") == 1

    # at most a tenth of the 20 samples is held out
    held_out = options.get("held-out", 2)
    weights, state, losses, held_out_losses = train_by_hand(
        source, width, options.get("hidden", 512), limit, options.get("norm", "t5"), held_out,
        lvlm_targets if width == 128 else clip_targets, options.get("encoder-loss", 0))
    saved = load_file(out / "aligner" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-5)
    saved = load_file(out / "checkpoint-0000004" / "optimizer.safetensors")
    assert saved.keys() == state.keys()
    for name, value in state.items():
        scale = value.abs().max()
        torch.testing.assert_close(saved[name] / scale, value / scale, rtol=0, atol=1e-4)

    expected = [(step, losses[step - 1]) for step in (1, 2, 3, 4)]
    if "log-every" in options:
        expected = [(3, sum(losses[:3]) / 3), (4, losses[3])]
    held_out_losses = {"3": held_out_losses[2], "4": held_out_losses[3]}
    rows = read_log(out)
    assert [int(row["step"]) for row in rows] == [step for step, _ in expected]
    for row, (step, loss) in zip(rows, expected, strict=True):
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-5)
        assert float(row["lr"]) == pytest.approx(RATES[step - 1], rel=1e-3)
    found = {row["step"]: float(row["held_out_loss"]) for row in rows if row["held_out_loss"]}
    assert found == pytest.approx(held_out_losses, rel=1e-5)
    assert (out / "loss.png").stat().st_size > 1000


# ---------------------------------------------------------------- reading samples
@pytest.mark.parametrize("features", LENGTHS)
def test_rows_are_those_that_safetensors_reads(features, tmp_path):
    """By several threads at once, from two shards; x is cut at its length."""
    write_lvlm_data(tmp_path / "data", features)
    dataset = FeatureDataset(tmp_path / "data")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(dataset.__getitem__, [*range(SAMPLES)] * 5))
    shards = {rank: load_file(tmp_path / f"data/shard-{rank:02}-00000.safetensors")
              for rank in (0, 1)}
    for i, (x, y) in enumerate(found):
        shard, row = shards[1 - i % 2], i % SAMPLES // 2
        n = shard["lengths"][row] if features == "input" else None
        assert torch.equal(x, shard["features"][row][:n]) and x.dtype == torch.bfloat16
        assert torch.equal(y, shard["tokens"][row].long())


def test_a_row_is_read_alone(tmp_path):
    """Linux counts the bytes that a process reads; of a file that is cut later, what is there."""
    def count():
        return int(Path("/proc/self/io").read_text().split()[1])
    write_lvlm_data(tmp_path / "data")
    dataset = FeatureDataset(tmp_path / "data")
    dataset[0]
    read = []
    for i in (2, 4, 6, 8):
        start = count()
        dataset[i]
        end = count()
        read.append(end - start - (count() - end))
    # x (9, 128) bf16, y (9,) int32; more if another thread of the tests reads meanwhile
    assert min(read) == 9 * 128 * 2 + 9 * 4
    file = tmp_path / "data/shard-01-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    dataset[16]
    with pytest.raises(UserError, match="cannot use 18.png: .*safetensors is shorter than it was"):
        dataset[18]


def test_the_order_of_an_epoch_is_an_array():
    n = 10**6
    tracemalloc.start()
    found = [*islice(sample_order(n, 7, n - 3), 5)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    first, second = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
                     for seed in (7, 8))
    assert found == first[-3:] + second[:2] and {*map(type, found)} == {int}
    # of torch's own memory nothing is counted
    assert peak < n


# ---------------------------------------------------------------- batches and checkpoints
@pytest.mark.parametrize("script", WRITE_DATA)
def test_micro_batches_hold_targets_of_like_length(script, tmp_path, monkeypatch):
    module, lengths = importlib.import_module(script.removesuffix(".py")), []
    collate = module.collate

    def watch(samples, *rest):
        lengths.append([len(target) for *_, target in samples])
        return collate(samples, *rest)
    monkeypatch.setattr(module, "collate", watch)
    WRITE_DATA[script](tmp_path / "data")
    command(script, "train", *RECIPE, "--data", tmp_path / "data", "--out", tmp_path / "out")
    for start in (0, 3):
        step = lengths[start:start + 3]
        assert [len(batch) for batch in step] == [3, 3, 2]
        assert sum(step, []) == sorted(sum(step, [])) and len(set(sum(step, []))) > 2


def files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture(scope="module", params=WRITE_DATA)
def run(request, tmp_path_factory):
    """Eight steps of `script`: data, out, the command without --out; and of each folder that was
    renamed to its name: which checkpoints were there, and its files."""
    root, moved, replace = tmp_path_factory.mktemp("run"), {}, os.replace
    run = SimpleNamespace(script=request.param, data=root / "data", out=root / "out", moved=moved)
    WRITE_DATA[run.script](run.data)
    run.train = (run.script, "train", *RECIPE, "--steps", "8", "--keep", "2", "--data",
                 str(run.data), "--out")

    def watch(source, target):
        if Path(source).is_dir():
            existing = sorted(path.name for path in run.out.glob("checkpoint-*"))
            moved[Path(target).name] = existing, files(source)
        replace(source, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watch)
        command(*run.train, run.out)
    return run


FIRST, SECOND, LAST = (f"checkpoint-000000{step}" for step in (3, 6, 8))
# a command line that is killed as it is about to rename its second checkpoint
KILLED = f"""
import importlib, os, signal, sys
replace = os.replace
def replace_or_die(source, target):
    if str(target).endswith("{SECOND}"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
del sys.argv[0]
importlib.import_module(sys.argv[0].removesuffix(".py")).main()
"""


def test_checkpoints_appear_whole(run):
    """A checkpoint is written elsewhere and renamed, and only then the one before it deleted."""
    assert {name: existing for name, (existing, _) in run.moved.items()} == {
        FIRST: [], SECOND: [FIRST], LAST: [FIRST, SECOND], "aligner": [SECOND, LAST]}
    assert sorted(path.name for path in run.out.glob("checkpoint-*")) == [SECOND, LAST]
    for name in (LAST, "aligner"):
        assert run.moved[name][1] == files(run.out / name)
    command(run.script, "explain", "--mini", "--no-picture", "--aligner", run.out / LAST)


def old_state(run):
    """state.json as the first version of this repository wrote it, with its own place."""
    lvlm, home = run.script == "thinkdiff_lvlm.py", "/home/someone/thinkdiff/mini"
    return {"step": 3, "data": str(run.data) if lvlm else [str(run.data)],
            "vlm": f"{home}/{'qwen2-vl' if lvlm else 'clip'}", "t5": f"{home}/t5",
            "batch_size": 8, "lr": 2e-3, "lr_end": 2e-4, "lr_horizon": 5, "warmup": 2,
            "weight_decay": 0.5, "masking": "random", **({"features": "generated"} if lvlm else {}),
            "norm": "t5", "hidden": 512, "seed": 5, "held_out": 512}


def test_resumes_bit_identical(run, tmp_path):
    """A killed run; the same as an older version has left it; one whose models have moved."""
    killed = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, *run.train, killed], cwd=REPO,
                          capture_output=True)
    assert done.returncode == -signal.SIGKILL
    # it has logged the steps since the first checkpoint and written the second one elsewhere
    assert [row["step"] for row in read_log(killed)] == list("123456")
    assert [path.name for path in killed.glob("checkpoint-*")] == [FIRST]
    assert (killed / ".partial").exists()
    old, moved = tmp_path / "old", tmp_path / "moved"
    for other in (old, moved):
        shutil.copytree(killed, other)
    state = json.loads((killed / FIRST / "state.json").read_text())
    models = {name: state[name] for name in ("vlm", "t5")}
    assert {name: state[name] for name in old_state(run)} == {**old_state(run), **models}
    (old / FIRST / "state.json").write_text(json.dumps(old_state(run)))
    elsewhere = []
    for name, path in models.items():
        place = tmp_path / "elsewhere" / Path(path).name
        shutil.copytree(path, place)
        elsewhere += [f"--{name}", place]
    shutil.copytree(models["t5"], tmp_path / "another-t5")
    for name, value, said in (("seed", 6, "5, is 6"), ("batch-size", 4, "8, is 4"),
                              ("t5", tmp_path / "another-t5", f"{models['t5']!r}, is")):
        line = complaint(*run.train, killed, "--resume", f"--{name}", value)
        assert f"with other settings: {name.replace('-', '_')} was {said}" in line

    for out, more in ((killed, []), (old, []), (moved, elsewhere)):
        command(*run.train, out, "--resume", *more)
        found, expected = files(out / LAST), files(run.out / LAST)
        if more:
            del found["state.json"], expected["state.json"]
        assert found == expected
        logs = [[list(row.values())[:4] for row in read_log(path)] for path in (run.out, out)]
        assert logs[0] == logs[1]
        assert files(out / "aligner")["model.safetensors"] == expected["model.safetensors"]


def test_compiled_training_is_the_same_but_for_roundings(run, tmp_path, count_graphs):
    command(*run.train, tmp_path / "x", "--steps", 4, "--compile")
    # LVLM: the decoder with gradient and without; CLIP: its tower, too; not one for every length
    least, most = (1, 4) if run.script == "thinkdiff_lvlm.py" else (2, 6)
    assert least <= len(count_graphs) <= most
    compiled, plain = ([float(row["loss"]) for row in read_log(path)][:4]
                       for path in (tmp_path / "x", run.out))
    assert compiled == pytest.approx(plain, abs=1e-5)


# ---------------------------------------------------------------- faults
def logged(out):
    """The rows of log.csv without the speed."""
    return [list(row.values())[:4] for row in read_log(out)]


def same_end(out, other, last=LAST):
    """Whether two runs have the same log, and bit for bit the same aligner and optimizer."""
    return logged(out) == logged(other) and all(
        files(out / folder)[name] == files(other / folder)[name] for folder, name in
        (("aligner", "model.safetensors"), (last, "optimizer.safetensors")))


@pytest.mark.parametrize("number, during, step, code", [
    (signal.SIGTERM, 4, 4, 143), (signal.SIGINT, 5, 6, 130)])
def test_a_signal_saves_and_stops(run, tmp_path, monkeypatch, number, during, step, code):
    """At the next row of the log, of which there is one for each checkpoint; the first start says
    --resume, too. The same command goes on to the same log and weights."""
    module = importlib.import_module(run.script.removesuffix(".py"))
    every = "--log-every", 7, "--save-every", 2
    rate, handler = module.learning_rate, signal.getsignal(number)
    command(*run.train, tmp_path / "whole", *every)

    def ask(now, args):
        if now == during - 1:
            signal.raise_signal(number)
        return rate(now, args)
    monkeypatch.setattr(module, "learning_rate", ask)
    stopped = (*run.train, tmp_path / "x", *every, "--resume")
    out, err = command(*stopped, code=code)
    assert "starts from the beginning" in out and signal.getsignal(number) == handler
    assert err.splitlines()[-1] == (
        f"stopped by {number.name} at step {step}, checkpoint saved: the same command with "
        "--resume goes on")
    assert f"checkpoint-000000{step}" in os.listdir(tmp_path / "x")
    monkeypatch.undo()
    command(*stopped)
    assert same_end(tmp_path / "x", tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Sample 9 has features so large that the products overflow; sample 4 has a NaN."""
    data, out = tmp_path / "data", tmp_path / "x"
    write_lvlm_data(data)
    for row, shard, value in ((4, 0, 3e38), (2, 1, float("nan"))):
        file = data / f"shard-0{shard}-00000.safetensors"
        tensors = load_file(file)
        tensors["features"][row] = value
        save_file(tensors, file)
    t = ("thinkdiff_lvlm.py", "train", *RECIPE, "--log-every", 50, "--eval-every", 50,
         "--save-every", 1, "--data", data, "--out", out, "--batch-size", 2, "--steps", 50)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(18, generator=generator).tolist()
    bad = order.index(9) // 2 + 1
    names = ", ".join(f"{i}.png" for i in order[2 * bad - 2:2 * bad])
    _, err = command(*t, code=1)
    assert f"error: loss is nan at step {bad}; its samples: {names} (process 0)" in err
    kept = [path.name for path in out.glob("checkpoint-*")]
    assert kept == [f"checkpoint-{bad - 1:07}"] and not (out / "aligner").exists()
    if order.index(4) < order.index(9):
        assert "skipped (1 so far): cannot use 4.png: it has features that are not finite" in err
    # weights that are not finite are never written
    weights = load_file(out / kept[0] / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def flip(file, place):
    """Flips a bit of a file's byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


# their code is the same for both variants
lvlm_only = pytest.mark.parametrize("run", ["thinkdiff_lvlm.py"], indirect=True)


@lvlm_only
@pytest.mark.parametrize("name, place", [("model.safetensors", -3), ("optimizer.safetensors", -3),
                                         ("optimizer.safetensors", 20), ("state.json", 11)])
def test_a_damaged_checkpoint_is_set_aside(run, tmp_path, name, place):
    out = tmp_path / "x"
    shutil.copytree(run.out, out)
    flip(out / LAST / name, place)
    err = command(*run.train, out, "--resume")[1]
    assert f"goes on from {SECOND}" in err and f"moved to damaged-{LAST}-" in err
    assert same_end(out, run.out)
    (damaged,) = out.glob("damaged-*")
    assert files(damaged).keys() == files(out / LAST).keys()
    for checkpoint in (SECOND, LAST):
        flip(out / checkpoint / name, place)
    assert "can be read, choose another --out" in complaint(*run.train, out, "--resume")
    assert {SECOND, LAST} < {*os.listdir(out)}


@lvlm_only
def test_a_damaged_log_and_folders_of_the_user(run, tmp_path):
    out = tmp_path / "x"
    shutil.copytree(run.out, out)
    (out / "checkpoint-mine").mkdir()
    # the second one: its rows are out of order, and one would be dropped
    rows = b"".join(b"%d,1.0,,1.0e-03,5.0\n" % step for step in (9, 4, 8))
    for damaged in (b"step,loss\n3,\xff", b"step\n" + rows, b""):
        (out / "log.csv").write_bytes(damaged)
        line = complaint(*run.train, out, "--resume")
        assert "log.csv is damaged: restore it, or move it away" in line
    (out / "log.csv").unlink()
    command(*run.train, out, "--resume", "--steps", 9, "--keep", 1)
    assert (out / "checkpoint-mine").exists() and not (out / LAST).exists()


@lvlm_only
def test_a_full_disk_is_one_line(run, tmp_path, monkeypatch):
    """The error that safetensors raises for it; what was there stays."""
    out = tmp_path / "x"
    shutil.copytree(run.out, out)
    before = files(out / "aligner")

    def fail(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("aligner.Aligner._save_pretrained", fail)
    line = complaint(*run.train, out, "--resume")
    assert "aligner: I/O error: No space left on device" in line and "Free some space" in line
    assert files(out / "aligner") == before and not (out / ".partial").exists()


# ---------------------------------------------------------------- complaints
def test_training_complaints(run, tmp_path):
    def of(*flags, out=tmp_path / "x", code=1):
        return complaint(*run.train, out, *flags, code=code)
    lvlm = run.script == "thinkdiff_lvlm.py"
    assert ("no training data in" if lvlm else "nothing does not exist") in of(
        "--data", tmp_path / "nothing")
    assert "already holds a training run" in of(out=run.out)
    with FileLock(run.out / ".lock"):
        assert f"another run is writing to {run.out}: wait" in of("--resume", out=run.out)
    for flag in ("--t5", "--vlm"):
        # LVLM's data holds the features, but the text of its tokens needs the VLM's tokenizer
        assert "no/such-model" in of(flag, "no/such-model")
    (tmp_path / "mine" / "aligner").mkdir(parents=True)
    for more in ((), ("--resume",)):
        assert "already holds a training run: choose another" in of(*more, out=tmp_path / "mine")
    # a start that has failed is in the way of none
    assert not (tmp_path / "x").exists() or "pairs.jsonl" in files(tmp_path / "x")
    (tmp_path / "file").write_text("kept")
    of(out=tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "kept"
    of("--batch-size", "many", code=2)


def test_complaints_about_features(tmp_path):
    """Features of the prompt's tokens, and samples too short to be split."""
    write_lvlm_data(tmp_path / "input", "input")
    t = ("thinkdiff_lvlm.py", "train", *RECIPE, "--out", tmp_path / "x", "--data")
    assert "pass --features input" in complaint(*t, tmp_path / "input")
    meta = tmp_path / "input" / "meta.json"
    short = {**json.loads(meta.read_text()), "features": "generated", "tokens": 1}
    meta.write_text(json.dumps(short))
    assert "at least 2" in complaint(*t, tmp_path / "input")


def test_other_samples_are_not_taken(run, tmp_path):
    """Data that is not complete, or has changed since the run began, is refused in one line."""
    data, out = tmp_path / "data", tmp_path / "x"
    shutil.copytree(run.data, data)
    t = (*run.train[:-3], "--data", data, "--out", out)
    if run.script == "thinkdiff_clip.py":
        write_tar(tmp_path / "data.tar", files(data))
        t = (*run.train[:-3], "--data", tmp_path / "data.tar", "--out", out)
        command(*t)
        flip(out / "pairs.jsonl", -9)
        assert "pairs.jsonl is missing or damaged" in complaint(*t, "--resume")
        flip(out / "pairs.jsonl", -9)
        write_tar(tmp_path / "data.tar", files(data) | {"new.png": bytes(20000), "new.txt": b"a"})
        assert "data.tar is missing, or its size has changed" in complaint(*t, "--resume")
        # a run that has no checkpoint looks for its pairs again
        for checkpoint in (*out.glob("checkpoint-*"), out / "aligner"):
            shutil.rmtree(checkpoint)
        assert "found 21 pictures" in command(*t, "--resume", "--steps", 1)[0]
        return
    plan, shard = data / "plan.jsonl", data / "shard-01-00000"
    shutil.copytree(data, tmp_path / "whole")
    command(*t)
    with plan.open("a") as file:
        file.write('["20.png"]\n')
    assert "holds 20 of 21 samples: finish it with the same `prepare_data.py`" in complaint(
        *t, "--resume")
    content = shard.with_suffix(".json").read_text()
    skipped = '"skipped": [{"index": 20, "key": "20.png", "reason": ""}]'
    shard.with_suffix(".json").write_text(content.replace('"skipped": []', skipped))
    assert "the samples in --data have changed" in complaint(*t, "--resume")
    plan.write_text('["0.png"]\n')
    assert "holds 21 of 1 samples" in complaint(*t, "--resume")
    shutil.copytree(tmp_path / "whole", data, dirs_exist_ok=True)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({**meta, "plan_hash": "0"}))
    assert "plan.jsonl is not the one" in complaint(*t, "--resume")
    plan.unlink()
    assert (f"make it with `python prepare_data.py lvlm --mini --images FOLDER --out {data}`"
            in complaint(*t, "--resume"))
