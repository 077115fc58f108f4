"""prepare_data.py, images.py, and common.py's errors and files: the features of each VLM, backends,
resume, processes, and everything that can be wrong with pictures."""
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
from common import MINI, REPO, UserError
from helpers import command, complaint, write_tar
from images import ImageRef, open_image
from models import encode_messages, join_inputs, load_vlm, teacher_forced_features
from prepare_data import load_tokens
from references import vlm_inputs
from test_protocol import PROMPTS
from thinkdiff_lvlm import caption_messages, context_messages, generate_with_features
from training_data import read_shards

SCRIPT = str(REPO / "prepare_data.py")
LVLM = (SCRIPT, *"lvlm --mini --tokens 12 --batch-size 3 --shard-size 4".split())
# of bf16 numbers: one rounding
BF16 = dict(rtol=2 ** -7, atol=2 ** -7)


# ---------------------------------------------------------------- helpers
def picture(seed, size=(64, 64)):
    rng = random.Random(seed)
    ground, colour = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(2)]
    image = Image.new("RGB", size, ground)
    ImageDraw.Draw(image).ellipse([rng.randrange(20), rng.randrange(20), 40, 50], fill=colour)
    return image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rows(out):
    """(record, {tensor's name: its row}) of every sample in the shards."""
    for stem, content in read_shards(out):
        tensors = load_file(f"{stem}.safetensors") if content["samples"] else {}
        assert all(len(column) == len(content["samples"]) for column in tensors.values())
        for i, record in enumerate(content["samples"]):
            yield record, {name: column[i] for name, column in tensors.items()}


def read_data(out):
    """{key: (prompt, tokens, features or None)}; fails on a sample that is there twice."""
    data = {}
    for record, row in rows(out):
        key = ImageRef(*record["sample"]).key
        assert key not in data, "sample written twice"
        data[key] = record["prompt"], row["tokens"], row.get("features")
    return data


def assert_same_data(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key][0] == b[key][0]
        assert torch.equal(a[key][1], b[key][1])
        torch.testing.assert_close(a[key][2], b[key][2], **BF16)


@torch.no_grad()
def stock_pass(model, processor, record, answer=(), max_side=1024):
    """Stock transformers' outputs for one record's picture and prompt, opened and typed here."""
    path, _, offset, size = record["sample"]
    data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data[offset:offset + size] if size else data)).convert("RGB")
    image.thumbnail((max_side, max_side))
    inputs = vlm_inputs(processor, [image, PROMPTS[record["prompt"]]], instruction="")
    answer = torch.tensor([[*map(int, answer)]])  # (1, N)
    for name, added in (("input_ids", answer), ("attention_mask", torch.ones_like(answer)),
                        ("mm_token_type_ids", torch.zeros_like(answer))):
        inputs[name] = torch.cat([inputs[name], added.to(inputs[name].dtype)], dim=1)
    return model(**inputs, output_hidden_states=True)


@pytest.fixture(scope="session")
def vlm():
    return load_vlm(MINI["vlm"], "cpu", torch.float32)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """{kind: folder}: the miniature, and a small random model of each later generation with the
    miniature's tokenizer and patches of pictures."""
    root = tmp_path_factory.mktemp("vlms")
    mini = transformers.AutoConfig.from_pretrained(MINI["vlm"])
    processor = transformers.AutoProcessor.from_pretrained(MINI["vlm"])
    parts = {name: getattr(processor, name)
             for name in ("image_processor", "tokenizer", "chat_template", "video_processor")}
    ids = {f"{name}_token_id": getattr(mini, f"{name}_token_id")
           for name in ("image", "video", "vision_start", "vision_end")}
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {name: getattr(mini.text_config, name)
             for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
              "out_hidden_size": 48, "patch_size": 8}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    models = {
        "Qwen2_5_VL": transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope | {"mrope_section": [2, 2, 2]}},
            vision_config=vision | {"window_size": 32, "fullatt_block_indexes": [1]}, **ids),
        # pictures also enter at the second and third layer; lm_head tied, as in the smaller ones
        "Qwen3VL": transformers.Qwen3VLConfig(
            text_config=text | {"head_dim": 16, "rope_parameters": rope | {
                "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
            vision_config=vision | {
                "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            tie_word_embeddings=True, **ids)}
    torch.manual_seed(0)
    for name, config in models.items():
        if name == "Qwen3VL":
            parts["video_processor"] = transformers.Qwen3VLVideoProcessor(patch_size=8)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        for part in (model, getattr(transformers, f"{name}Processor")(**parts)):
            part.save_pretrained(root / name)
    return {"Qwen2VL": MINI["vlm"]} | {name: str(root / name) for name in models}


@pytest.fixture(scope="session")
def inputs(vlm):
    """Prompts of unequal length: one picture, two pictures among texts, no picture."""
    two = [("text", "Word 1: white, "), ("image", picture(1)), ("text", "Word 2: blue, "),
           ("image", picture(2)), ("text", "Word 3: red, ")]
    batch = encode_messages(vlm[1], [
        caption_messages(picture(0), 0), context_messages(two, ""), context_messages([], "Hi.")])
    # unequal, padded on the left
    assert len(set(batch["attention_mask"].sum(-1).tolist())) == 3
    assert batch["attention_mask"][0, 0] == 0
    return batch


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """23 pictures: in a folder, a folder in it, and two tars with the same member names."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "below").mkdir()
    for i in range(4):
        picture(i).save(root / f"{i}.png")
        picture(10 + i, (80, 60)).save(root / "below" / f"{i}.JPG")
    for t, count in ((8, 7), (9, 8)):
        members = {f"{i:03}.jpg": encoded(picture(100 * t + i), "JPEG") for i in range(count)}
        members |= {f"{i:03}.txt": b"a caption" for i in range(count)}
        write_tar(root / f"{t:05}.tar", members)
    return root


@pytest.fixture(scope="session")
def prepared(pictures, tmp_path_factory):
    """What one process makes of `pictures`."""
    out = tmp_path_factory.mktemp("data") / "one"
    command(*LVLM, "--images", pictures, "--out", out)
    return out


# ---------------------------------------------------------------- features
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_features_are_the_states_that_predict_the_tokens(family, inputs, kind):
    model, n = load_vlm(family[kind], "cpu", torch.float32)[0], 9
    tokens, features, lengths = generate_with_features(model, inputs, n, do_sample=False)
    assert features.shape == (3, n, model.config.text_config.hidden_size)
    assert tokens.shape == (3, n) and lengths.tolist() == [n] * 3

    stock = model.generate(
        **inputs, max_new_tokens=n, do_sample=False, eos_token_id=None, output_logits=True,
        output_hidden_states=True, return_dict_in_generate=True)
    expected = torch.stack([step[-1][:, -1] for step in stock.hidden_states], dim=1)
    assert torch.equal(tokens, stock.sequences[:, -n:])
    # fp32, of states of size ~1: a cached step and a whole pass sum in different orders
    for states in (features, teacher_forced_features(model, inputs, tokens)):
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)

    logits = model.lm_head(features)
    torch.testing.assert_close(logits, torch.stack(stock.logits, dim=1), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits.argmax(-1), tokens)


def test_eos_ends_an_answer_only_if_it_may(vlm, inputs, monkeypatch):
    model = vlm[0]
    free, _, _ = generate_with_features(model, inputs, 6, do_sample=False)
    end = free[0, 2].item()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    first = [row.index(end) if end in row else len(row) for row in free.tolist()]
    tokens, features, lengths = generate_with_features(
        model, inputs, 6, ignore_eos=False, do_sample=False)
    assert lengths.tolist() == first and features.shape[:2] == tokens.shape
    # Qwen2-VL's generation_config on the hub penalises repetitions and samples
    for name, value in {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert torch.equal(generate_with_features(model, inputs, 6, do_sample=False)[0], free)


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_inputs_joined_are_those_of_the_processor(family, kind):
    """Each conversation encoded by itself, by several threads, and then padded: as the processor
    makes them of all at once, to the bit."""
    processor = transformers.AutoProcessor.from_pretrained(family[kind])
    processor.tokenizer.padding_side = "left"
    chats = [caption_messages(picture(i, (64 + 16 * (i % 5), 64)), i % 16) for i in range(40)]
    whole = encode_messages(processor, chats)
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(lambda chat: encode_messages(processor, [chat]), chats))
    joined = join_inputs(encoded, processor.tokenizer.pad_token_id, "cpu")
    assert joined.keys() == whole.keys() and not whole["attention_mask"].all()
    for name, tensor in joined.items():
        assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]), name


# ---------------------------------------------------------------- data through the command line
def test_shards_hold_what_the_docstring_says(prepared, pictures, vlm):
    meta, data = json.loads((prepared / "meta.json").read_text()), read_data(prepared)
    assert meta["d_vlm"] == vlm[0].config.text_config.hidden_size and meta["tokens"] == 12
    assert meta["prompts"] == PROMPTS
    # same member names in both tars: nothing lost
    assert len(data) == 23 and len({prompt for prompt, *_ in data.values()}) > 5
    for _, tokens, features in data.values():
        assert tokens.dtype == torch.int32 and tokens.shape == (12,)
        assert features.dtype == torch.bfloat16 and features.shape == (12, meta["d_vlm"])
    for record, row in rows(prepared):  # a picture in a tar is found by its offset
        states = stock_pass(*vlm, record, row["tokens"]).hidden_states[-1][0, -13:-1]
        torch.testing.assert_close(row["features"].float(), states, **BF16)
        path, member, offset, size = record["sample"]
        if member:
            with tarfile.open(path) as tar:
                data = tar.extractfile(member).read()
            assert data == Path(path).read_bytes()[offset:offset + size]


def test_tokens_only_stores_the_same_tokens_alone(prepared, pictures, tmp_path):
    printed, _ = command(*LVLM, "--images", pictures, "--out", tmp_path, "--tokens-only")
    assert "23 samples to go of 23; they need" in printed
    assert "found 23 pictures = 23 written + 0 skipped\n" in printed
    stored, alone = read_data(prepared), read_data(tmp_path)
    assert stored.keys() == alone.keys()
    assert all(row.keys() == {"tokens"} for _, row in rows(tmp_path))
    assert all(torch.equal(stored[key][1], alone[key][1]) for key in stored)


def test_features_of_the_prompt(vlm, pictures, tmp_path):
    command(*LVLM, "--images", pictures / "below", pictures / "3.png", "--out", tmp_path,
            "--features", "input", "--max-side", 32, "--count", 4)
    kept = list(rows(tmp_path))
    assert len(kept) == 4
    for record, row in kept:
        expected = stock_pass(*vlm, record, max_side=32).hidden_states[-1][0]  # (P, d_vlm)
        length = row["lengths"]
        assert length == len(expected) and not row["features"][length:].any()
        torch.testing.assert_close(row["features"][:length].float(), expected, rtol=2 ** -6,
                                   atol=2 ** -6)


@pytest.mark.parametrize("temperature, top_p, greedy", [(3, 1, 0), (3, 1e-3, 4), (1e-3, 1, 4)])
def test_temperature_and_top_p_act(vlm, pictures, tmp_path, temperature, top_p, greedy):
    command(*LVLM, "--images", pictures / "below", "--out", tmp_path, "--temperature", temperature,
            "--top-p", top_p)
    answers = [(stock_pass(*vlm, record, row["tokens"]).logits[0, -13:-1].argmax(-1), row["tokens"])
               for record, row in rows(tmp_path)]  # both (12,)
    assert len(answers) == 4
    assert sum(torch.equal(likeliest, tokens) for likeliest, tokens in answers) == greedy


def test_killed_and_resumed_with_two_processes_equals_one_process(prepared, pictures, tmp_path):
    line = [*LVLM, "--images", pictures, "--out", tmp_path]
    killed = subprocess.Popen([sys.executable, *line], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while killed.poll() is None and not list(tmp_path.glob("shard-*.json")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.json")}
    assert 0 < len(read_data(tmp_path)) < 23, "the kill came too late to test anything"
    # as a kill between the two files of a shard leaves it
    half = tmp_path / f"shard-{len(read_data(tmp_path)):07}.safetensors"
    half.write_bytes(b"half a shard")

    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = subprocess.run([sys.executable, *torchrun, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("found 23 pictures = 23 written + 0 skipped") == 1
    # the second process's first one
    assert list(tmp_path.glob(f"shard-{int(half.stem[-7:]) + 1:07}.json"))
    # nothing is done twice
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert_same_data(read_data(prepared), read_data(tmp_path))


def test_a_shard_counts_only_once_its_tensors_are_written(prepared, pictures, tmp_path,
                                                          monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        """As a kill just before the JSON of the first shard would be in its place."""
        if Path(target).match("shard-*.json"):
            monkeypatch.setattr(os, "replace", replace)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    line = (*LVLM, "--images", pictures, "--out", tmp_path)
    command(*line, code=130)
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-0000000.safetensors"]
    assert "23 samples to go of 23" in command(*line)[0]
    assert_same_data(read_data(prepared), read_data(tmp_path))


def test_a_full_disk_is_one_line_and_ends_the_run(prepared, pictures, tmp_path, monkeypatch):
    """A thread writes the shard while the next one is described: its error comes through, and no
    later shard is written."""
    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    line = (*LVLM, "--images", pictures, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_tensors", full)
        assert "No space left on device. Free some space" in complaint(*line)
    assert not list(tmp_path.glob("shard-*"))
    assert "23 samples to go of 23" in command(*line)[0]
    assert_same_data(read_data(prepared), read_data(tmp_path))


def files(out, pattern="*-*.*"):
    """{path: its bytes} of the shards."""
    return {path: path.read_bytes() for path in out.glob(pattern)}


@pytest.fixture
def resumed(prepared, pictures, tmp_path):
    """A copy of `prepared` in four shards, and the command that goes on with it."""
    out = tmp_path / "copy"
    shutil.copytree(prepared, out)
    assert len(read_shards(out)) == 4
    return out, (*LVLM, "--images", pictures, "--out", out)


@pytest.mark.parametrize("gap, suffixes", [
    (0, [".json", ".safetensors"]), (1, [".json"]), (3, [".json", ".safetensors"])])
def test_a_gap_in_the_shards_is_filled_and_nothing_overwritten(prepared, resumed, gap, suffixes):
    out, line = resumed
    stems = [stem for stem, _ in read_shards(out)]
    for suffix in suffixes:
        Path(f"{stems[gap]}{suffix}").unlink()
    # as the first version of this repository named them
    for suffix in (".json", ".safetensors"):
        Path(f"{stems[2]}{suffix}").rename(out / f"shard-00-00003{suffix}")
    # what is unfinished may be replaced
    kept = {path: content for path, content in files(out).items() if not path.match(
        f"{stems[gap].name}.*")}
    printed, _ = command(*line)
    assert "found 23 pictures = 23 written + 0 skipped" in printed
    assert kept.items() <= files(out).items()
    assert_same_data(read_data(prepared), read_data(out))


def test_a_shard_in_the_way_is_not_overwritten(resumed):
    out, line = resumed
    first, second = (stem for stem, _ in read_shards(out)[:2])
    for suffix in (".json", ".safetensors"):
        Path(f"{second}{suffix}").replace(f"{first}{suffix}")
    before = files(out)
    assert f"{first}.json is in the way of image 0" in complaint(*line)
    assert files(out) == before


def test_a_second_run_in_the_folder_is_refused(resumed):
    out, line = resumed
    for file in out.glob("shard-*"):
        file.unlink()
    with FileLock(out / ".lock"):
        assert "another run is writing" in complaint(*line)
    assert not files(out)


def test_other_processes_wait_until_the_first_one_holds_the_lock(tmp_path, monkeypatch):
    """Else those of a second torchrun would write shards before their first one is refused."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0/1/error.json"))
    (tmp_path / "0").mkdir()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    second = threading.Thread(target=common.lock_folder, args=(tmp_path / "out",), daemon=True)
    second.start()
    second.join(0.5)
    assert second.is_alive()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    try:
        common.lock_folder(tmp_path / "out")
        second.join(60)
        assert not second.is_alive()
    finally:
        common.release_locks()


# what can become of a file
DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:len(data) // 2],
    "two bytes too few": lambda data: data[:-2],
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "list": lambda data: b"[]",
    "number": lambda data: b"7",
    "null": lambda data: b"null",
    "NaN": lambda data: b'{"samples": NaN, "skipped": []}',
    "deep": lambda data: b"[" * 100_000,
    "foreign": lambda data: b'{"samples": [{"a": 1}], "skipped": [3], "faults": [2], "vlm": 1}',
    "indices": lambda data: b'{"samples": [], "skipped": [{"index": "a"}, {"index": null}]}',
    "no such index": lambda data: b'{"samples": [], "skipped": [{"index": 99, "key": "a"}]}',
    "other image": lambda data: b'{"samples": [], "skipped": [{"index": 6, "key": "a"}]}',
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["shard-0000006.json", "shard-0000006.safetensors", "meta.json",
                                  "plan.jsonl"])
def test_damaged_files_are_named(resumed, name, damage):
    out, line = resumed
    (out / name).write_bytes(DAMAGE[damage]((out / name).read_bytes()))
    before = files(out, "*")
    assert (out / name).stem in complaint(*line)
    assert files(out, "*") == before


def test_files_that_do_not_belong_together_are_named(resumed, pictures, tmp_path):
    out, line = resumed
    a, b = (f"{stem}.safetensors" for stem, _ in read_shards(out)[1:3])
    os.replace(a, tmp_path / "a")
    assert "0000006.json is damaged (No such file" in complaint(*line)
    shutil.copy(b, a)
    assert "the .safetensors does not belong to the .json" in complaint(*line)
    tensors, note = load_file(tmp_path / "a"), safe_open(tmp_path / "a", "pt").metadata()
    save_file(tensors | {"features": tensors["features"].half()}, a, note)
    assert "its tensors are {'features': 'F16'" in complaint(*line)
    os.replace(tmp_path / "a", a)
    twin = out / "shard-0000007"
    for suffix in (".json", ".safetensors"):
        shutil.copy(f"{out}/shard-0000006{suffix}", f"{twin}{suffix}")
    assert f"{twin}.json is damaged (an index is there twice" in complaint(*line)
    # a shard of other data
    command(*LVLM, "--images", pictures / "below", "--out", tmp_path / "other")
    for file in (tmp_path / "other").glob("shard-*"):
        shutil.copy(file, out)
    for file in out.glob("shard-0000007.*"):
        file.unlink()
    assert "move its two files away" in complaint(*line)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_flipped_bits_in_a_shard_are_noticed(prepared, tmp_path, suffix):
    """In all of the JSON, and in the tensors' header and tokens: the features are not read."""
    whole, rng = read_shards(prepared)[1][1], random.Random(0)
    for file in prepared.glob("shard-0000006.*"):
        shutil.copy(file, tmp_path)
    file = tmp_path / f"shard-0000006{suffix}"
    data = file.read_bytes()
    # header, then 6 x 12 tokens of 4 bytes, then features
    end = 8 + int.from_bytes(data[:8], "little") + 6 * 12 * 4
    for place in rng.sample(range(len(data) if suffix == ".json" else end), 150):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        try:
            # taken for an older shard, which has no hash
            assert read_shards(tmp_path)[0][1] == whole and b'"hash"' not in flipped
        except UserError as error:
            assert "0000006.json is damaged" in str(error)


def test_the_plan_is_fixed_once_there_is_a_shard(prepared, resumed, tmp_path):
    out, (*line, source, _, _) = resumed
    shutil.copytree(source, tmp_path / "in")
    data, meta = tmp_path / "data", json.loads((out / "meta.json").read_text())
    go_on = (*line, tmp_path / "in", "--out", data)
    command(*go_on)
    picture(99).save(tmp_path / "in/new.png")
    next(iter(data.glob("shard-*.json"))).unlink()
    printed, _ = command(*go_on)
    assert f"goes on with {data}/plan.jsonl; pictures added since are not in it" in printed
    assert "found 23 pictures = 23 written + 0 skipped" in printed and len(read_data(data)) == 23

    plan = (out / "plan.jsonl").read_bytes()
    lines = plan.splitlines(keepends=True)
    for changed in (b"".join(lines[:-1]), b"".join(lines[::-1]), plan + lines[0], b""):
        (out / "plan.jsonl").write_bytes(changed)
        assert "plan.jsonl was changed" in complaint(*line, source, "--out", out)
        assert (out / "plan.jsonl").read_bytes() == changed
    for name in ("plan.jsonl", "meta.json"):
        (out / name).rename(tmp_path / name)
        assert f"{name}'" in complaint(*line, source, "--out", out)
        (tmp_path / name).rename(out / name)
    # of older versions, which kept no hash
    (out / "meta.json").write_text(json.dumps(
        {name: meta[name] for name in meta.keys() - {"plan_hash", "found", "skipped"}}))
    for changed in (b"".join(lines[:-1]), b"".join(lines[::-1])):
        (out / "plan.jsonl").write_bytes(changed)
        assert "holds images that" in complaint(*line, source, "--out", out)
    (out / "plan.jsonl").write_bytes(plan)
    assert "found 23 pictures = 23 written" in command(*line, source, "--out", out)[0]


@pytest.mark.parametrize("wrong, expected", [
    (["--tokens", 10**9], "use --tokens-only"), (["--vlm", MINI["clip"]], "cannot load"),
    (["--vlm", "./nothing"], "is no folder"), (["--count", 24], "only 23 pictures"),
    (["--backend", "vllm"], "`pip install vllm`")])
def test_a_start_that_fails_leaves_nothing_in_the_way(pictures, tmp_path, wrong, expected):
    line = (*LVLM, "--images", pictures, "--out", tmp_path / "x")
    assert expected in complaint(*line, *wrong)
    assert "found 23 pictures = 23 written" in command(*line, "--tokens", 2)[0]


def test_a_foreign_meta_json_is_not_overwritten(pictures, tmp_path):
    (tmp_path / "meta.json").write_text('{"mine": 1}')
    assert "meta.json is damaged" in complaint(*LVLM, "--images", pictures, "--out", tmp_path)
    assert (tmp_path / "meta.json").read_text() == '{"mine": 1}'


def test_a_run_of_unreadable_pictures_is_skipped_but_a_missing_disk_is_not(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(9):
        (source / f"{i}.png").write_bytes(b"no picture")
    for i in range(90, 93):
        picture(i).save(source / f"{i}.png")
    line = (*LVLM, "--images", source, "--out", out)
    printed, _ = command(*line)
    assert "found 12 pictures = 3 written + 9 skipped (see" in printed
    assert len(list(csv.reader((out / "skipped.csv").open()))) == 1 + 9

    before = files(out, "*")
    for file in out.glob("shard-*.json"):
        file.unlink()
    source.rename(tmp_path / "unplugged")
    assert "is the disk?" in complaint(*line)
    assert not list(out.glob("shard-*.json"))
    (tmp_path / "unplugged").rename(source)
    assert "found 12 pictures = 3 written + 9 skipped (see" in command(*line)[0]
    assert files(out, "*") == before


def test_resume_refuses_other_settings_and_finds_nothing_left(prepared, pictures, tmp_path):
    line = (*LVLM, "--images", pictures, "--out", prepared)
    changed = complaint(*line, "--seed", 1, "--tokens", 13)
    assert "was begun with seed 0, now 1; tokens 12, now 13: give or restore the same" in changed
    # a model may have moved
    (tmp_path / "qwen2-vl").symlink_to(MINI["vlm"])
    for moved in ((), ("--vlm", tmp_path / "qwen2-vl")):
        out, _ = command(*line, *moved)
        assert "found 23 pictures = 23 written" in out and "to go" not in out


def test_count_draws_from_all_sources_without_replacement(pictures, tmp_path):
    sources = [pictures / "{00008..00009}.tar", pictures / "below", pictures]

    def draw(name, seed):
        out, _ = command(*LVLM, "--images", *sources, "--out", tmp_path / name, "--count", 15,
                         "--seed", seed, "--tokens", 1)
        assert "found 23 pictures = 8 not selected + 15 written + 0 skipped\n" in out
        lines = (tmp_path / name / "plan.jsonl").read_text().splitlines()
        return [ImageRef(*json.loads(line)) for line in lines]

    a, b, c = draw("a", 0), draw("b", 0), draw("c", 1)
    # the sources overlap, the pictures do not
    assert a == b != c and len({ref.key for ref in a}) == 15
    assert {Path(ref.path).suffix for ref in a} == {".tar", ".JPG", ".png"}
    many = complaint(*LVLM, "--images", pictures, "--out", tmp_path / "d", "--count", 24)
    assert "--count 24, but there are only 23 pictures" in many


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Qwen3VL"])
def test_another_vlm_goes_through_all_scripts(family, pictures, tmp_path, kind):
    data, aligner, vlm = tmp_path / "data", tmp_path / "run/aligner", ("--vlm", family[kind])
    command(*LVLM, *vlm, "--images", pictures, "--out", data)
    assert len(read_data(data)) == 23
    command("thinkdiff_lvlm.py", "train", "--mini", *vlm, "--data", data, "--out", tmp_path / "run",
            *"--steps 2 --batch-size 4 --held-out 2 --log-every 1".split())
    generate = ("thinkdiff_lvlm.py", "generate", "--mini", "--aligner", aligner, "--out")
    command(*generate, tmp_path / "a.png", *vlm, "--max-new-tokens", 5, "--steps", 1)
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    assert "made for a VLM of width 48, but the one given has width 128" in complaint(
        *generate, tmp_path / "b.png")


# ---------------------------------------------------------------- vLLM
VLLM = '''"""Stands in for vLLM, which needs a GPU: as much of LLM and SamplingParams as
prepare_data.py uses, with transformers underneath. Names, defaults and outputs are those of vLLM
0.33.0: vllm/entrypoints/llm.py, sampling_params.py, inputs/llm.py, outputs.py."""
from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class SamplingParams:
    def __init__(self, *, temperature=1.0, top_p=1.0, seed=None, ignore_eos=False, max_tokens=16,
                 detokenize=True, logit_bias=None):
        vars(self).update(locals())


class LLM:
    asked = []  # for the tests

    def __init__(self, model, *, seed=0, max_model_len=None, limit_mm_per_prompt=None):
        assert limit_mm_per_prompt["image"] == 1
        self.model = AutoModelForImageTextToText.from_pretrained(model).eval()
        self.processor = AutoProcessor.from_pretrained(model)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        return [self.answer(params, **prompt)
                for prompt, params in zip(prompts, sampling_params, strict=True)]

    def answer(self, params, prompt, multi_modal_data):
        self.asked.append(params)
        inputs = self.processor(
            text=[prompt], images=[multi_modal_data["image"]], return_tensors="pt")
        torch.manual_seed(params.seed)
        ids = self.model.generate(
            **inputs, do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=0,
            max_new_tokens=params.max_tokens,
            sequence_bias={(token,): bias for token, bias in params.logit_bias.items()},
            **({"eos_token_id": None} if params.ignore_eos else {}))[0].tolist()
        answer = ids[inputs["input_ids"].shape[1]:]
        return SimpleNamespace(outputs=[SimpleNamespace(index=0, token_ids=answer)])
'''


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/vllm.py").write_text(VLLM)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    sys.modules.pop("vllm", None)


def test_vllms_tokens_get_the_features_that_transformers_tokens_have(vllm, pictures, tmp_path):
    source, out, only = tmp_path / "in", tmp_path / "vllm", tmp_path / "only"
    shutil.copytree(pictures, source)
    (source / "broken.png").write_bytes(b"no picture")
    # so that both draw the same tokens
    greedy = [*LVLM, "--images", source, "--temperature", 0.01, "--top-p", 0.01, "--out"]
    command(*greedy, tmp_path / "transformers")

    printed, err = command(*greedy, out, "--backend", "vllm")
    assert "the same command without --backend vllm" in printed and "broken.png" in err
    assert "found 24 pictures = 23 written + 1 skipped" in printed
    assert not read_shards(out) and len(read_shards(out, "tokens")) > 3
    asked = sys.modules["vllm"].LLM.asked
    config = transformers.AutoConfig.from_pretrained(MINI["vlm"])
    placeholders = {config.image_token_id: -100, config.video_token_id: -100}
    assert len(asked) == 23 == len({params.seed for params in asked})
    assert all(params.ignore_eos and params.logit_bias == placeholders for params in asked)
    again, _ = command(*greedy, out, "--backend", "vllm")
    assert "found 24 pictures = 23 written + 1 skipped" in again and len(asked) == 23

    # as after a kill: transformers writes what is left
    sorted(out.glob("tokens-*.json"))[1].unlink()
    printed, _ = command(*greedy, out)
    assert "found 24 pictures = 23 written + 1 skipped" in printed
    whole = read_data(out)
    assert_same_data(read_data(tmp_path / "transformers"), whole)

    command(*greedy, only, "--backend", "vllm", "--tokens-only")
    only = read_data(only)
    assert only.keys() == whole.keys()
    assert all(torch.equal(only[key][1], whole[key][1]) and only[key][2] is None for key in only)


def test_vllms_tokens_are_kept_and_may_have_the_prompts_features(vllm, pictures, tmp_path):
    sampled = [*LVLM, "--images", pictures / "below", "--out", tmp_path, "--features", "input"]
    command(*sampled, "--backend", "vllm")
    known = load_tokens(tmp_path)
    assert len(known) == 4
    # which would draw others
    command(*sampled)
    for stem, content in read_shards(tmp_path):
        tensors = load_file(f"{stem}.safetensors")
        assert tensors.keys() == {"tokens", "features", "lengths"}
        assert tensors["features"].shape[1] == tensors["lengths"].max()
        kept = [known.pop(record["index"]) for record in content["samples"]]
        assert torch.equal(tensors["tokens"], torch.stack(kept))
    assert not known


# ---------------------------------------------------------------- bad input
def test_bad_pictures_are_skipped_named_and_counted(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    good = encoded(picture(0))
    for name, data in {"zero.png": b"", "cut.png": good[:len(good) // 2], "text.jpg": b"no picture",
                       "thin.png": encoded(Image.new("RGB", (1000, 2))), "good.png": good,
                       "zero.tar": b""}.items():
        (source / name).write_bytes(data)
    write_tar(source / "broken.tar", {f"{i}.png": encoded(picture(i)) for i in range(5)})
    with tarfile.open(source / "broken.tar") as tar:
        end = tar.getmember("4.png").offset_data + 50
    os.truncate(source / "broken.tar", end)
    stdout, err = command(*LVLM, "--images", source, "--out", out)
    assert "= 5 written + 5 skipped; 2 faults in tars (see" in stdout
    assert len(read_data(out)) == 5
    listed = dict(csv.reader((out / "skipped.csv").open()))
    for name in ("zero.png", "cut.png", "text.jpg", "thin.png", "broken.tar", "zero.tar"):
        assert name in err and str(source / name) in listed, name
    assert "the end is missing after 4.png" in listed[str(source / "broken.tar")]
    assert f"{source}/broken.tar::4.png" in listed


@pytest.mark.parametrize("images, out, extra, expected", [
    ("missing", "out", [], "missing does not exist"),
    ("{0..2}.tar", "out", [], "0.tar does not exist (nor do 2 more)"),
    ("empty", "out", [], "no pictures in"),
    ("bad", "out", [], "none of the 1 pictures can be read"),
    ("good", "file/out", [], "Not a directory"),
    ("good", "out", ["--vlm", "nobody/nothing"], "cannot load nobody/nothing"),
    ("good", "out", ["--vlm", "./nothing"], "./nothing is no folder"),
    ("good", "out", ["--vlm", MINI["clip"]], "cannot load"),
    ("good", "out", ["--backend", "vllm"], "`pip install vllm`"),
    ("good", "out", ["--tokens", "1000000000"], "use --tokens-only"),
])
def test_one_clear_line(tmp_path, images, out, extra, expected):
    for name in ("empty", "bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "bad.png").touch()
    (tmp_path / "file").touch()
    picture(0).save(tmp_path / "good" / "good.png")
    assert expected in complaint(*LVLM, "--images", tmp_path / images, "--out", tmp_path / out,
                                 *extra)


def test_usage_errors():
    complaint(SCRIPT, "lvlm", code=2)
    complaint(SCRIPT, *"lvlm --images x --out y --top-p 0".split(), code=2)
    complaint("fetch.py", "nothing", code=2)
    assert "python fetch.py lvlm-data --dry-run" in complaint(
        SCRIPT, "fetch", "lvlm-data", "--dry-run")


# ---------------------------------------------------------------- images.py and common.py
def test_pictures_of_every_kind():
    def colour(image, kind="PNG", **options):
        opened = open_image(io.BytesIO(encoded(image, kind, **options)))
        assert opened.mode == "RGB"
        return opened.getpixel((1, 1))

    white, grey = (255, 255, 255), (128, 128, 128)
    assert colour(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[0] > 240  # red
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert colour(palette) == (200, 0, 0) and colour(palette, transparency=1) == white
    assert colour(Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == white
    assert colour(Image.new("LA", (8, 8), (0, 127))) == grey
    assert colour(Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))) == grey
    assert colour(Image.new("1", (8, 8), 1)) == white
    assert colour(Image.new("L", (8, 8), 9)) == (9, 9, 9)

    turned = Image.new("RGB", (20, 10))
    turned.paste("white", (0, 0, 10, 10))  # left half
    exif = turned.getexif()
    exif[0x112] = 6  # to be turned clockwise: left becomes top
    upright = open_image(encoded(turned, exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == white and upright.getpixel((5, 17)) == (0, 0, 0)


def test_huge_pictures_are_shrunk_and_enormous_ones_refused():
    assert open_image(encoded(Image.new("1", (20_000, 2_000)))).size == (4096, 410)
    wide = encoded(Image.new("L", (20_000, 200)), "JPEG")
    assert open_image(wide, max_side=1000).size == (1000, 10)
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (30_000).to_bytes(4, "big") * 2  # claims 30,000 x 30,000
    with pytest.raises(UserError, match="bomb.png"):
        open_image(bytes(header), "bomb.png")


@pytest.mark.parametrize("error, code, line", [
    (UserError("do this"), 1, "error: do this"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "use a smaller --batch-size"),
    (OSError(28, "No space left on device", "x.json"), 1,
     "x.json: No space left on device. Free some space"),
    (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied. Choose a path"),
    (torch.distributed.DistNetworkError("... port: 29500 ... EADDRINUSE"), 1,
     "another --master-port"),
])
def test_cli_main_turns_errors_into_one_line(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.cli_main(main)
    err = capsys.readouterr().err
    assert stop.value.code == code and line in err and err.count("\n") == 1


def test_atomic_writes_leave_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    common.write_json(file, {"a": 1})

    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        common.write_atomically(file, fails)
    assert json.loads(file.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]
