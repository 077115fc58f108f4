"""prepare_data.py and common.py: the feature convention, resume, ranks, and everything that can be wrong with pictures."""
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import TopPLogitsWarper

import common
import prepare_data
from common import MINI, REPO, UserError, open_image
from prepare_data import PROMPTS, Sample, caption_messages, encode_messages, expand_braces, generate_with_features, load_picture, load_vlm
from prepare_data import prompt_features, read_shards, teacher_forced_features

SCRIPT = str(REPO / "prepare_data.py")
TOLERANCE = dict(rtol=1e-4, atol=1e-4)  # fp32, of states of size ~1: a cached step and a whole pass sum in different orders


# ---------------------------------------------------------------- helpers
def picture(seed, size=(64, 64)):
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    ImageDraw.Draw(image).ellipse([rng.randrange(20), rng.randrange(20), 40, 50], fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def cli(monkeypatch, capsys, *args):
    """Runs the script's command line in this process (its imports take seconds). Returns exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, args)])
    try:
        common.run(prepare_data.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def read_data(out):
    """{key: (prompt, tokens, features or None)}; fails on a sample that is there twice."""
    data = {}
    for stem, content in read_shards(out):
        tensors = load_file(f"{stem}.safetensors") if content["samples"] else {}
        assert all(len(rows) == len(content["samples"]) for rows in tensors.values())
        for row, record in enumerate(content["samples"]):
            key = Sample(*record["sample"]).key
            assert key not in data, "sample written twice"
            data[key] = record["prompt"], tensors["tokens"][row], tensors["features"][row] if "features" in tensors else None
    return data


def assert_same_data(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key][0] == b[key][0]
        assert torch.equal(a[key][1], b[key][1])
        torch.testing.assert_close(a[key][2], b[key][2], rtol=2 ** -7, atol=2 ** -7)  # one bf16 rounding apart


@pytest.fixture(scope="session")
def vlm():
    return load_vlm(MINI["vlm"], "cpu", torch.float32)


@pytest.fixture(scope="session")
def inputs(vlm):
    """Prompts of unequal length: one picture, two pictures among texts, no picture."""
    two = [{"type": "text", "text": "Word 1: white, "}, {"type": "image", "image": picture(1)}, {"type": "text", "text": "\n\nWord 2: blue, "},
           {"type": "image", "image": picture(2)}, {"type": "text", "text": "\n\nWord 3: red, "}]
    batch = encode_messages(vlm[1], [caption_messages(picture(0), 0), [{"role": "user", "content": two}], [{"role": "user", "content": "Hello."}]])
    assert len(set(batch["attention_mask"].sum(-1).tolist())) == 3 and batch["attention_mask"][0, 0] == 0  # unequal, padded on the left
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
        write_tar(root / f"{t:05}.tar", {name: data for i in range(count) for name, data in (
            (f"{i:03}.jpg", encoded(picture(100 * t + i), "JPEG")), (f"{i:03}.txt", b"a caption"))})
    return root


OPTIONS = "lvlm --mini --tokens 12 --batch-size 3 --shard-size 4".split()


@pytest.fixture(scope="session")
def prepared(pictures, tmp_path_factory):
    """What one process makes of `pictures`."""
    out = tmp_path_factory.mktemp("data") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT, *OPTIONS, "--images", str(pictures), "--out", str(out)])
        prepare_data.main()
    return out


# ---------------------------------------------------------------- features
def test_features_are_the_states_from_which_tokens_were_sampled(vlm, inputs):
    model, n = vlm[0], 9
    tokens, features, lengths = generate_with_features(model, inputs, n, do_sample=False)
    assert tokens.shape == (3, n) and features.shape == (3, n, model.config.text_config.hidden_size) and lengths.tolist() == [n] * 3

    stock = model.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=None, output_hidden_states=True, return_dict_in_generate=True,
                           output_logits=True)
    expected = torch.stack([step[-1][:, -1] for step in stock.hidden_states], dim=1)
    assert torch.equal(tokens, stock.sequences[:, -n:])
    torch.testing.assert_close(features, expected, **TOLERANCE)
    torch.testing.assert_close(teacher_forced_features(model, inputs, tokens), expected, **TOLERANCE)

    logits = model.lm_head(features)
    torch.testing.assert_close(logits, torch.stack(stock.logits, dim=1), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits.argmax(-1), tokens)


def test_sampled_tokens_have_their_own_states_too(vlm, inputs):
    model = vlm[0]
    tokens, features, _ = generate_with_features(model, inputs, 9, temperature=1.5, top_p=1.0, seeds=[1, 2, 3])
    torch.testing.assert_close(teacher_forced_features(model, inputs, tokens), features, **TOLERANCE)
    assert not torch.equal(model.lm_head(features).argmax(-1), tokens)  # or the test above would have shown as much


def test_a_seed_draws_the_same_answer_in_any_batch(vlm):
    model, processor = vlm
    conversations = [caption_messages(picture(i), i) for i in range(3)]
    together, *_ = generate_with_features(model, encode_messages(processor, conversations), 9, temperature=1.5, seeds=[5, 6, 7])
    alone, *_ = generate_with_features(model, encode_messages(processor, conversations[2:]), 9, temperature=1.5, seeds=[7])
    other, *_ = generate_with_features(model, encode_messages(processor, conversations[2:]), 9, temperature=1.5, seeds=[8])
    assert torch.equal(together[2:], alone) and not torch.equal(alone, other)


def test_sampling_is_temperature_and_nucleus(vlm):
    model, processor = vlm
    inputs = encode_messages(processor, [caption_messages(picture(0), 0)] * 200)
    tokens, features, _ = generate_with_features(model, inputs, 1, temperature=1.8, top_p=0.8, seeds=list(range(200)))
    probs = TopPLogitsWarper(0.8)(None, model.lm_head(features[:1, 0]) / 1.8).softmax(-1)[0]  # transformers' own
    drawn = torch.bincount(tokens[:, 0], minlength=len(probs)) / 200
    assert (probs[tokens] > 0).all() and (drawn - probs).abs().max() < 0.12  # 3.4 sigma at p = 0.5


def test_eos_ends_an_answer_only_if_it_may(vlm, inputs, monkeypatch):
    model = vlm[0]
    free, _, _ = generate_with_features(model, inputs, 6, do_sample=False)
    end = free[0, 2].item()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    first = [row.index(end) if end in row else len(row) for row in free.tolist()]
    tokens, features, lengths = generate_with_features(model, inputs, 6, ignore_eos=False, do_sample=False)
    assert lengths.tolist() == first and features.shape[:2] == tokens.shape
    assert torch.equal(generate_with_features(model, inputs, 6, do_sample=False)[0], free)


# ---------------------------------------------------------------- data through the command line
def test_shards_hold_what_the_readme_says(prepared, pictures, vlm):
    meta, data = json.loads((prepared / "meta.json").read_text()), read_data(prepared)
    assert meta["d_vlm"] == vlm[0].config.text_config.hidden_size and meta["tokens"] == 12 and meta["prompts"] == PROMPTS and len(PROMPTS) == 16
    assert len(data) == 23 and len({prompt for prompt, *_ in data.values()}) > 5  # same member names in both tars: nothing lost
    for prompt, tokens, features in data.values():
        assert tokens.dtype == torch.int32 and tokens.shape == (12,) and features.dtype == torch.bfloat16 and features.shape == (12, meta["d_vlm"])
    for _, content in read_shards(prepared):  # a picture in a tar is found by its offset
        for path, member, offset, size in (record["sample"] for record in content["samples"]):
            if member:
                with tarfile.open(path) as tar:
                    assert tar.extractfile(member).read() == Path(path).read_bytes()[offset:offset + size]


def test_tokens_only_gives_the_same_features_when_recomputed(prepared, pictures, vlm, tmp_path, monkeypatch, capsys):
    code, printed, _ = cli(monkeypatch, capsys, *OPTIONS, "--images", pictures, "--out", tmp_path, "--tokens-only")
    assert code == 0 and "23 samples to go of 23; they need" in printed and f"wrote 23 samples to {tmp_path}, skipped 0 pictures" in printed
    model, processor = vlm
    stored, recomputed = read_data(prepared), {}
    for stem, content in read_shards(tmp_path):
        tensors = load_file(f"{stem}.safetensors")
        assert tensors.keys() == {"tokens"}
        for record, tokens in zip(content["samples"], tensors["tokens"]):
            sample = Sample(*record["sample"])
            inputs = encode_messages(processor, [caption_messages(load_picture(sample, 1024), record["prompt"])])
            features = teacher_forced_features(model, inputs, tokens[None].long())[0]
            recomputed[sample.key] = record["prompt"], tokens, features.to(torch.bfloat16)
    assert_same_data(stored, recomputed)


def test_features_of_the_prompt(vlm, pictures, tmp_path, monkeypatch, capsys):
    code, *_ = cli(monkeypatch, capsys, *OPTIONS, "--images", pictures / "below", pictures / "3.png", "--out", tmp_path, "--features", "input")
    assert code == 0
    model, processor = vlm
    for stem, content in read_shards(tmp_path):
        tensors = load_file(f"{stem}.safetensors")
        for record, features, length in zip(content["samples"], tensors["features"], tensors["lengths"]):
            image = load_picture(Sample(*record["sample"]), 1024)
            expected, = prompt_features(model, encode_messages(processor, [caption_messages(image, record["prompt"])]))
            assert length == len(expected) and not features[length:].any()
            torch.testing.assert_close(features[:length].float(), expected, rtol=2 ** -6, atol=2 ** -6)


def test_killed_and_resumed_with_two_processes_equals_one_process(prepared, pictures, tmp_path):
    out = tmp_path / "two"
    command = [*OPTIONS, "--images", pictures, "--out", out]
    killed = subprocess.Popen([sys.executable, SCRIPT, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while killed.poll() is None and not list(out.glob("shard-*.json")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert 0 < len(read_data(out)) < 23, "the kill came too late to test anything"
    (out / "shard-07-00000.safetensors").write_bytes(b"half a shard")  # as a kill between the two files of a shard leaves it

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, SCRIPT, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote 23 samples" in done.stdout
    assert any(path.name.startswith("shard-01") for path in out.iterdir())
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())  # nothing is done twice
    assert_same_data(read_data(prepared), read_data(out))


def test_resume_refuses_other_settings_and_finds_nothing_left(prepared, pictures, monkeypatch, capsys):
    code, _, err = cli(monkeypatch, capsys, *OPTIONS, "--images", pictures, "--out", prepared, "--seed", 1, "--tokens", 13)
    assert code == 1 and "was begun with seed 0, now 1; tokens 12, now 13: give the same settings" in err and err.count("\n") == 1
    code, out, _ = cli(monkeypatch, capsys, *OPTIONS, "--images", pictures, "--out", prepared)
    assert code == 0 and "wrote 23 samples" in out


def test_count_draws_from_all_sources_without_replacement(pictures, tmp_path, monkeypatch, capsys):
    def draw(name, seed):
        args = prepare_data.argparse.Namespace(
            vlm=MINI["vlm"], images=[str(pictures / "{00008..00009}.tar"), str(pictures / "below"), str(pictures)], count=15, seed=seed, tokens=12,
            temperature=0.6, top_p=0.9, features="generated", tokens_only=False, max_side=1024)
        (tmp_path / name).mkdir()
        return prepare_data.make_plan(args, tmp_path / name)
    a, b, c = draw("a", 0), draw("b", 0), draw("c", 1)
    assert a == b != c and len({sample.key for sample in a}) == 15  # the sources overlap, the pictures do not
    assert {Path(sample.path).suffix for sample in a} == {".tar", ".JPG", ".png"}
    code, _, err = cli(monkeypatch, capsys, *OPTIONS, "--images", pictures, "--out", tmp_path / "d", "--count", 24)
    assert code == 1 and "--count 24, but there are only 23 pictures" in err


def test_braces():
    assert expand_braces("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"] and expand_braces("plain") == ["plain"]


# ---------------------------------------------------------------- bad input
def test_bad_pictures_are_skipped_named_and_counted(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    good = encoded(picture(0))
    (source / "zero.png").touch()
    (source / "cut.png").write_bytes(good[:len(good) // 2])
    (source / "text.jpg").write_text("no picture")
    (source / "thin.png").write_bytes(encoded(Image.new("RGB", (1000, 2))))
    (source / "good.png").write_bytes(good)
    write_tar(source / "broken.tar", {f"{i}.png": encoded(picture(i)) for i in range(5)})
    with tarfile.open(source / "broken.tar") as tar:
        end = tar.getmember("4.png").offset_data + 50
    os.truncate(source / "broken.tar", end)
    (source / "zero.tar").touch()
    code, stdout, err = cli(monkeypatch, capsys, *OPTIONS, "--images", source, "--out", out)
    assert code == 0 and "wrote 5 samples" in stdout and "skipped 4 pictures, 2 broken tars (see" in stdout
    assert len(read_data(out)) == 5
    rows = dict(csv.reader((out / "skipped.csv").open()))
    for name in ("zero.png", "cut.png", "text.jpg", "thin.png", "broken.tar", "zero.tar"):
        assert name in err and str(source / name) in rows, name
    assert "4 pictures of it can be read" in rows[str(source / "broken.tar")]


@pytest.mark.parametrize("images, out, extra, expected", [
    ("missing", "out", [], "missing does not exist"),
    ("{0..2}.tar", "out", [], "0.tar does not exist (nor do 2 more)"),
    ("empty", "out", [], "no pictures in"),
    ("bad", "out", [], "none of the 1 pictures can be read"),
    ("good", "file/out", [], "Not a directory"),
    ("good", "out", ["--vlm", "nobody/nothing"], "cannot load nobody/nothing"),
    ("good", "out", ["--vlm", "./nothing"], "./nothing is no folder"),
    ("good", "out", ["--tokens", "1000000000000"], "use --tokens-only"),
])
def test_one_clear_line(tmp_path, monkeypatch, capsys, images, out, extra, expected):
    for name in ("empty", "bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "bad.png").touch()
    (tmp_path / "file").touch()
    picture(0).save(tmp_path / "good" / "good.png")
    code, _, err = cli(monkeypatch, capsys, *OPTIONS, "--images", tmp_path / images, "--out", tmp_path / out, *extra)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and expected in errors[0] and "Traceback" not in err


def test_usage_errors_and_defaults(monkeypatch, capsys):
    assert cli(monkeypatch, capsys, "lvlm")[0] == 2
    assert cli(monkeypatch, capsys, "lvlm", "--images", "x", "--out", "y", "--top-p", "0")[0] == 2
    assert MINI["vlm"] in "".join(cli(monkeypatch, capsys, "lvlm", "--mini", "--help")[1].split())
    assert "Qwen/Qwen2-VL-7B-Instruct" in "".join(cli(monkeypatch, capsys, "lvlm", "--help")[1].split())


# ---------------------------------------------------------------- common.py
def test_pictures_of_every_kind():
    def colour(data, at=(1, 1), **options):
        image = open_image(data, **options)
        assert image.mode == "RGB"
        return image.getpixel(at)

    assert colour(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0] > 240  # red
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert colour(encoded(palette)) == (200, 0, 0) and colour(encoded(palette, transparency=1)) == (255, 255, 255)
    assert colour(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))) == (255, 255, 255)
    assert colour(encoded(Image.new("LA", (8, 8), (0, 127)))) == (128, 128, 128)
    assert colour(encoded(Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)))) == (128, 128, 128)
    assert colour(encoded(Image.new("1", (8, 8), 1))) == (255, 255, 255)
    assert colour(io.BytesIO(encoded(Image.new("L", (8, 8), 9)))) == (9, 9, 9)

    turned = Image.new("RGB", (20, 10))
    turned.paste("white", (0, 0, 10, 10))  # left half
    exif = turned.getexif()
    exif[0x112] = 6  # to be turned clockwise: left becomes top
    upright = open_image(encoded(turned, exif=exif))
    assert upright.size == (10, 20) and upright.getpixel((5, 2)) == (255, 255, 255) and upright.getpixel((5, 17)) == (0, 0, 0)


def test_huge_pictures_are_shrunk_and_enormous_ones_refused():
    assert open_image(encoded(Image.new("1", (20_000, 2_000)))).size == (4096, 410)
    assert open_image(encoded(Image.new("L", (20_000, 200)), "JPEG"), max_side=1000).size == (1000, 10)
    header = bytearray(encoded(Image.new("1", (8, 8))))
    header[16:24] = (30_000).to_bytes(4, "big") * 2  # claims 30,000 x 30,000
    with pytest.raises(UserError, match="bomb.png"):
        open_image(bytes(header), "bomb.png")


@pytest.mark.parametrize("error, code, line", [
    (UserError("do this"), 1, "error: do this"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "use a smaller --batch-size"),
    (OSError(28, "No space left on device", "x.json"), 1, "x.json: No space left on device. Free some space"),
    (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied. Choose a path"),
    (torch.distributed.DistNetworkError("... port: 29500 ... EADDRINUSE"), 1, "another --master-port"),
])
def test_run_turns_errors_into_one_line(capsys, error, code, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        common.run(main)
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
