"""prepare_data.py and common.py: the feature convention for each VLM, backends, resume, ranks, and everything that can be wrong with pictures."""
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
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import (
    AutoConfig, AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor,
    Qwen3VLVideoProcessor, TopPLogitsWarper)

import common
import prepare_data
from common import MINI, REPO, UserError, open_image
from helpers import command, complaint, write_tar
from prepare_data import (
    Sample, caption_messages, encode_messages, expand_braces, generate_with_features, load_vlm,
    read_shards, teacher_forced_features, written_tokens)
from test_protocol import PROMPTS

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
        key = Sample(*record["sample"]).key
        assert key not in data, "sample written twice"
        data[key] = record["prompt"], row["tokens"], row.get("features")
    return data


@torch.no_grad()
def stock_pass(model, processor, record, answer=(), max_side=1024):
    """Stock transformers' outputs for one record's picture and prompt, opened and typed here."""
    path, _, offset, size = record["sample"]
    data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data[offset:offset + size] if size else data)).convert("RGB")
    image.thumbnail((max_side, max_side))
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|><|image_pad|><|vision_end|>{PROMPTS[record['prompt']]}<|im_end|>\n"
            "<|im_start|>assistant\n")
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    answer = torch.tensor([[*map(int, answer)]])  # (1, N)
    for name, added in (("input_ids", answer), ("attention_mask", torch.ones_like(answer)),
                        ("mm_token_type_ids", torch.zeros_like(answer))):
        inputs[name] = torch.cat([inputs[name], added.to(inputs[name].dtype)], dim=1)
    return model(**inputs, output_hidden_states=True)


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
def family(tmp_path_factory):
    """{kind: folder}: the miniature, and a small random model of each later generation with the miniature's tokenizer and patches of pictures."""
    root, mini, processor = tmp_path_factory.mktemp("vlms"), AutoConfig.from_pretrained(MINI["vlm"]), AutoProcessor.from_pretrained(MINI["vlm"])
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            **{name: getattr(mini.text_config, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 48, "patch_size": 8}
    ids = {name: getattr(mini, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "chat_template": processor.chat_template}
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope | {"mrope_section": [2, 2, 2]}},
        vision_config=vision | {"window_size": 32, "fullatt_block_indexes": [1]}, **ids)).save_pretrained(root / "qwen2.5-vl")
    Qwen2_5_VLProcessor(**parts, video_processor=processor.video_processor).save_pretrained(root / "qwen2.5-vl")
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(  # pictures also enter at the second and third layer; lm_head tied, as in the smaller ones
        text_config=text | {"head_dim": 16, "rope_parameters": rope | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        vision_config=vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}, tie_word_embeddings=True,
        **ids)).save_pretrained(root / "qwen3-vl")
    Qwen3VLProcessor(**parts, video_processor=Qwen3VLVideoProcessor(patch_size=8)).save_pretrained(root / "qwen3-vl")
    return {"qwen2-vl": MINI["vlm"], "qwen2.5-vl": str(root / "qwen2.5-vl"), "qwen3-vl": str(root / "qwen3-vl")}


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
@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_features_are_the_states_from_which_tokens_were_sampled(family, inputs, kind):
    model, n = load_vlm(family[kind], "cpu", torch.float32)[0], 9
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
    assert meta["d_vlm"] == vlm[0].config.text_config.hidden_size and meta["tokens"] == 12
    assert meta["prompts"] == PROMPTS
    assert len(data) == 23 and len({prompt for prompt, *_ in data.values()}) > 5  # same member names in both tars: nothing lost
    for prompt, tokens, features in data.values():
        assert tokens.dtype == torch.int32 and tokens.shape == (12,) and features.dtype == torch.bfloat16 and features.shape == (12, meta["d_vlm"])
    for record, row in rows(prepared):  # a picture in a tar is found by its offset
        states = stock_pass(*vlm, record, row["tokens"]).hidden_states[-1][0, -13:-1]
        torch.testing.assert_close(row["features"].float(), states, rtol=2 ** -7, atol=2 ** -7)
        path, member, offset, size = record["sample"]
        if member:
            with tarfile.open(path) as tar:
                data = tar.extractfile(member).read()
            assert data == Path(path).read_bytes()[offset:offset + size]


def test_tokens_only_stores_the_same_tokens_alone(prepared, pictures, tmp_path):
    printed, _ = command(SCRIPT, *OPTIONS, "--images", pictures, "--out", tmp_path, "--tokens-only")
    assert "23 samples to go of 23; they need" in printed and f"wrote 23 samples to {tmp_path}, skipped 0 pictures" in printed
    stored, alone = read_data(prepared), read_data(tmp_path)
    assert all(row.keys() == {"tokens"} for _, row in rows(tmp_path))
    assert stored.keys() == alone.keys()
    assert all(torch.equal(stored[key][1], alone[key][1]) for key in stored)


def test_features_of_the_prompt(vlm, pictures, tmp_path):
    command(SCRIPT, *OPTIONS, "--images", pictures / "below", pictures / "3.png", "--out", tmp_path,
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
    command(SCRIPT, *OPTIONS, "--images", pictures / "below", "--out", tmp_path, "--temperature",
            temperature, "--top-p", top_p)
    answers = [(stock_pass(*vlm, record, row["tokens"]).logits[0, -13:-1].argmax(-1), row["tokens"])
               for record, row in rows(tmp_path)]  # both (12,)
    assert len(answers) == 4
    assert sum(torch.equal(likeliest, tokens) for likeliest, tokens in answers) == greedy


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


def test_a_shard_counts_only_with_its_tensors(prepared, pictures, tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        """As a kill just before the JSON of the first shard would be in its place."""
        if Path(target).match("shard-*.json"):
            monkeypatch.setattr(os, "replace", replace)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    run = (SCRIPT, *OPTIONS, "--images", pictures, "--out", tmp_path)
    command(*run, code=130)
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00-00000.safetensors"]
    assert "23 samples to go of 23" in command(*run)[0]
    assert_same_data(read_data(prepared), read_data(tmp_path))


def test_resume_refuses_other_settings_and_finds_nothing_left(prepared, pictures):
    changed = complaint(SCRIPT, *OPTIONS, "--images", pictures, "--out", prepared, "--seed", 1, "--tokens", 13)
    assert "was begun with seed 0, now 1; tokens 12, now 13: give the same settings" in changed
    assert "wrote 23 samples" in command(SCRIPT, *OPTIONS, "--images", pictures, "--out", prepared)[0]


def test_count_draws_from_all_sources_without_replacement(pictures, tmp_path):
    def draw(name, seed):
        args = prepare_data.argparse.Namespace(
            vlm=MINI["vlm"], images=[str(pictures / "{00008..00009}.tar"), str(pictures / "below"), str(pictures)], count=15, seed=seed, tokens=12,
            temperature=0.6, top_p=0.9, features="generated", tokens_only=False, max_side=1024)
        (tmp_path / name).mkdir()
        return prepare_data.make_plan(args, tmp_path / name)
    a, b, c = draw("a", 0), draw("b", 0), draw("c", 1)
    assert a == b != c and len({sample.key for sample in a}) == 15  # the sources overlap, the pictures do not
    assert {Path(sample.path).suffix for sample in a} == {".tar", ".JPG", ".png"}
    many = complaint(SCRIPT, *OPTIONS, "--images", pictures, "--out", tmp_path / "d", "--count", 24)
    assert "--count 24, but there are only 23 pictures" in many


def test_braces():
    assert expand_braces("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"] and expand_braces("plain") == ["plain"]


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_another_vlm_goes_through_all_scripts(family, pictures, tmp_path, kind):
    command(SCRIPT, *OPTIONS, "--vlm", family[kind], "--images", pictures, "--out", tmp_path / "data")
    model, processor = load_vlm(family[kind], "cpu", torch.float32)
    kept = list(rows(tmp_path / "data"))
    assert len(kept) == 23
    for record, row in kept[::5]:
        whole = stock_pass(model, processor, record, row["tokens"])
        features = row["features"].float()
        torch.testing.assert_close(features, whole.hidden_states[-1][0, -13:-1], rtol=2 ** -7,
                                   atol=2 ** -7)
        torch.testing.assert_close(model.lm_head(features), whole.logits[0, -13:-1], rtol=0.02,
                                   atol=0.02)

    lvlm = REPO / "thinkdiff_lvlm.py"
    command(lvlm, "train", "--mini", "--vlm", family[kind], "--data", tmp_path / "data", "--out", tmp_path / "run", "--steps", 2, "--batch-size", 4,
            "--held-out", 2, "--log-every", 1)
    command(lvlm, "generate", "--mini", "--vlm", family[kind], "--aligner", tmp_path / "run/aligner", "--max-new-tokens", 5, "--steps", 1, "--out",
            tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    assert "made for a VLM of width 48, but the one given has width 128" in complaint(
        lvlm, "generate", "--mini", "--aligner", tmp_path / "run/aligner", "--out", tmp_path / "b.png")


# ---------------------------------------------------------------- vLLM
VLLM = '''"""Stands in for vLLM, which needs a GPU: as much of LLM and SamplingParams as prepare_data.py uses, with transformers underneath.

Names, defaults and outputs are those of the sources of vLLM 0.33.0: vllm/entrypoints/llm.py, sampling_params.py, inputs/llm.py, outputs.py."""
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None


class LLM:
    asked = []  # for the tests

    def __init__(self, model, *, seed=0, max_model_len=None, limit_mm_per_prompt=None):
        assert limit_mm_per_prompt["image"] == 1
        self.model, self.processor = AutoModelForImageTextToText.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        answers = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert prompt.keys() == {"prompt", "multi_modal_data"} and isinstance(prompt["multi_modal_data"]["image"], Image.Image)
            self.asked.append(params)
            inputs = self.processor(text=[prompt["prompt"]], images=[prompt["multi_modal_data"]["image"]], return_tensors="pt")
            torch.manual_seed(params.seed)
            end = {"eos_token_id": None} if params.ignore_eos else {}
            ids = self.model.generate(**inputs, do_sample=True, temperature=params.temperature, top_p=params.top_p, top_k=0,
                                      max_new_tokens=params.max_tokens, **end,
                                      sequence_bias={(token,): bias for token, bias in params.logit_bias.items()})[0].tolist()
            length = inputs["input_ids"].shape[1]
            answers.append(SimpleNamespace(prompt_token_ids=ids[:length], outputs=[SimpleNamespace(index=0, token_ids=ids[length:])]))
        return answers
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
    source = tmp_path / "in"
    shutil.copytree(pictures, source)
    (source / "broken.png").write_bytes(b"no picture")
    greedy = [*OPTIONS, "--images", source, "--temperature", 0.01, "--top-p", 0.01]  # so that both draw the same tokens
    command(SCRIPT, *greedy, "--out", tmp_path / "transformers")

    out, err = command(SCRIPT, *greedy, "--backend", "vllm", "--out", tmp_path / "vllm")
    assert "wrote the tokens of 23 samples" in out and "the same command without --backend vllm" in out and "broken.png" in err
    assert not read_shards(tmp_path / "vllm") and len(read_shards(tmp_path / "vllm", "tokens")) > 3
    asked = sys.modules["vllm"].LLM.asked
    config = AutoConfig.from_pretrained(MINI["vlm"])
    assert len(asked) == 23 == len({params.seed for params in asked}) and all(params.ignore_eos for params in asked)
    assert all(params.logit_bias == {config.image_token_id: -100, config.video_token_id: -100} for params in asked)
    assert "wrote the tokens of 23 samples" in command(SCRIPT, *greedy, "--backend", "vllm", "--out", tmp_path / "vllm")[0] and len(asked) == 23

    sorted((tmp_path / "vllm").glob("tokens-*.json"))[1].unlink()  # as after a kill: transformers writes what is left
    out, _ = command(SCRIPT, *greedy, "--out", tmp_path / "vllm")
    assert "wrote 23 samples" in out and "skipped 1 pictures" in out
    assert_same_data(read_data(tmp_path / "transformers"), read_data(tmp_path / "vllm"))

    command(SCRIPT, *greedy, "--backend", "vllm", "--tokens-only", "--out", tmp_path / "only")
    only, whole = read_data(tmp_path / "only"), read_data(tmp_path / "vllm")
    assert only.keys() == whole.keys() and all(torch.equal(only[key][1], whole[key][1]) and only[key][2] is None for key in only)


def test_vllms_tokens_are_kept_and_may_have_the_prompts_features(vllm, pictures, tmp_path):
    sampled = [*OPTIONS, "--images", pictures / "below", "--out", tmp_path, "--features", "input"]  # transformers would draw others
    command(SCRIPT, *sampled, "--backend", "vllm")
    numbers, tokens = written_tokens(tmp_path)
    command(SCRIPT, *sampled)
    for stem, content in read_shards(tmp_path):
        tensors = load_file(f"{stem}.safetensors")
        assert tensors.keys() == {"tokens", "features", "lengths"} and tensors["features"].shape[1] == tensors["lengths"].max()
        order = [numbers.pop(record["index"]) for record in content["samples"]]
        assert torch.equal(tensors["tokens"], tokens[order])
    assert len(tokens) == 4 and not numbers


# ---------------------------------------------------------------- bad input
def test_bad_pictures_are_skipped_named_and_counted(tmp_path):
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
    stdout, err = command(SCRIPT, *OPTIONS, "--images", source, "--out", out)
    assert "wrote 5 samples" in stdout and "skipped 4 pictures, 2 broken tars (see" in stdout
    assert len(read_data(out)) == 5
    listed = dict(csv.reader((out / "skipped.csv").open()))
    for name in ("zero.png", "cut.png", "text.jpg", "thin.png", "broken.tar", "zero.tar"):
        assert name in err and str(source / name) in listed, name
    assert "4 pictures of it can be read" in listed[str(source / "broken.tar")]


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
    ("good", "out", ["--tokens", "1000000000000"], "use --tokens-only"),
])
def test_one_clear_line(tmp_path, images, out, extra, expected):
    for name in ("empty", "bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "bad.png").touch()
    (tmp_path / "file").touch()
    picture(0).save(tmp_path / "good" / "good.png")
    assert expected in complaint(SCRIPT, *OPTIONS, "--images", tmp_path / images, "--out", tmp_path / out, *extra)


def test_usage_errors_and_defaults():
    complaint(SCRIPT, "lvlm", code=2)
    complaint(SCRIPT, "lvlm", "--images", "x", "--out", "y", "--top-p", "0", code=2)
    complaint(SCRIPT, "fetch", "nothing", code=2)
    assert MINI["vlm"] in "".join(command(SCRIPT, "lvlm", "--mini", "--help")[0].split())
    assert "Qwen/Qwen2-VL-7B-Instruct" in "".join(command(SCRIPT, "lvlm", "--help")[0].split())


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
