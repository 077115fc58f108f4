"""Checkpoints as they lie on the Hugging Face hub (the true names of tensors and files, at tiny
width, in shards), and fetch.py against a small server that speaks the hub's API."""
import hashlib
import http.server
import json
import re
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from common import MINI, UserError, decoder_tensors, part_weights
from helpers import command, in_new_process
from images import expand_braces
from models import encode_messages, load_clip, load_t5, load_t5_decoder, load_vlm
from test_prepare_data import picture
from thinkdiff_lvlm import caption_messages

# ---------------------------------------------------------------- names on the hub; I: a layer
QWEN2_VL = """lm_head.weight model.{embed_tokens,norm}.weight visual.patch_embed.proj.weight
model.layers.I.{input,post_attention}_layernorm.weight model.layers.I.mlp.{down,gate,up}_proj.weight
model.layers.I.self_attn.{q,k,v}_proj.{weight,bias} model.layers.I.self_attn.o_proj.weight"""
QWEN2_VL_TOWER = """visual.merger.{ln_q,mlp.0,mlp.2}.{weight,bias}
visual.blocks.I.{norm1,norm2,attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.{weight,bias}"""
T5 = """{shared,lm_head,encoder.final_layer_norm,decoder.final_layer_norm}.weight
{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight
{encoder,decoder}.block.I.layer.{0,1}.layer_norm.weight decoder.block.I.layer.2.layer_norm.weight
{encoder,decoder}.block.I.layer.0.SelfAttention.{q,k,v,o}.weight
decoder.block.I.layer.1.EncDecAttention.{q,k,v,o}.weight
{encoder.block.I.layer.1,decoder.block.I.layer.2}.DenseReluDense.{wi_0,wi_1,wo}.weight"""
EVA_TOWER = """vision_model.embeddings.{class_embedding,position_embedding}
vision_model.{embeddings.patch_embedding,post_layernorm}.{weight,bias}
vision_model.encoder.layers.I.{self_attn.qkv,self_attn.projection}.{weight,bias}
vision_model.encoder.layers.I.{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.{weight,bias}"""


def names(table, layers):
    """The names that a table stands for, with so many layers."""
    return {re.sub(r"\bI\b", str(layer), name) for pattern in table.split()
            for name in expand_braces(pattern) for layer in range(layers)}


def without(config, *keys):
    """A config's JSON as it was before transformers added these."""
    return {key: value for key, value in config.items() if key not in keys}


def save_sharded(folder, tensors, config, shards):
    """Writes tensors in shards with their index; beside them pickles and other files nobody reads.

    shards: the regular expression of each; a name is in the first whose beginning it matches."""
    folder.mkdir(parents=True)
    parts, weight_map = defaultdict(dict), {}
    for name, tensor in tensors.items():
        number = next(i for i, start in enumerate(shards, 1) if re.match(start, name))
        weight_map[name] = f"model-{number:05}-of-{len(shards):05}.safetensors"
        parts[weight_map[name]][name] = tensor.contiguous()
    assert len(parts) == len(shards)
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
        (folder / f"pytorch_{Path(file).stem}.bin").write_bytes(b"a pickle " * 1000)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": weight_map}
    for file, value in (("model.safetensors.index.json", index), ("config.json", config),
                        ("README.md", "a model card"), ("tf_model.h5", "tensorflow " * 1000)):
        (folder / file).write_text(json.dumps(value))


def make_vlm(folder):
    """The trained miniature VLM under the names, and with the flat config.json, of
    Qwen/Qwen2-VL-7B-Instruct."""
    mini = json.loads(Path(MINI["vlm"], "config.json").read_text())
    text, vision = mini.pop("text_config"), mini.pop("vision_config")
    rope = text["rope_parameters"]
    config = without(text, "rope_parameters", "layer_types", "model_type") | mini | {
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "sliding_window": 32768,
        "max_window_layers": 28, "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": without(vision, "rope_parameters", "model_type", "in_channels") | {
            "in_chans": 3, "spatial_patch_size": vision["patch_size"]}}
    on_hub = {"model.visual": "visual", "model.language_model": "model"}
    tensors = {re.sub(r"^model\.(visual|language_model)\b", lambda m: on_hub[m[0]], name): tensor
               for name, tensor in load_file(f"{MINI['vlm']}/model.safetensors").items()}
    assert tensors.keys() == names(QWEN2_VL, text["num_hidden_layers"]) | names(
        QWEN2_VL_TOWER, vision["depth"])
    save_sharded(folder, tensors, config, ["visual", "model.layers", ""])
    for file in Path(MINI["vlm"]).iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)


def make_t5(folder):
    """google/flan-t5-xxl: fp32, an lm_head of its own; shard 3 holds only encoder blocks."""
    mini = json.loads(Path(MINI["t5"], "config.json").read_text())
    config = without(mini, "dense_act_fn", "dtype", "is_gated_act", "scale_decoder_outputs") | {
        "num_layers": 3, "num_decoder_layers": 3, "tie_word_embeddings": False,
        "dropout_rate": 0.1, "relative_attention_max_distance": 128,
        "transformers_version": "4.24.0.dev0"}
    torch.manual_seed(1)
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).state_dict()
    tensors = {name: 0.1 * torch.randn(made[name].shape) for name in sorted(names(T5, 3))}
    save_sharded(folder, tensors, config, [
        r"decoder(?!\.block\.2)", r"decoder|encoder\.block\.0", r"encoder\.block", ""])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{MINI['t5']}/{name}", folder)


def make_blip2(folder):
    """Salesforce/blip2-flan-t5-xxl: EVA's tower in the first shard, with the Q-Former; the language
    model behind it."""
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=tiny | {"num_hidden_layers": 3, "image_size": 56, "patch_size": 14},
        qformer_config=tiny | {"num_hidden_layers": 2, "encoder_hidden_size": 16},
        text_config={"model_type": "t5", "vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32,
                     "num_layers": 2, "num_heads": 4}, num_query_tokens=4)
    torch.manual_seed(2)
    made = transformers.Blip2ForConditionalGeneration(config).state_dict()
    made = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in made.items()
            if "embed_tokens" not in name}
    save_sharded(folder, made, json.loads(config.to_json_string()), [
        "vision_model|query|qformer", ".*encoder", ""])


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder `OWNER/NAME` for each repository."""
    root = tmp_path_factory.mktemp("hub")
    make_vlm(root / "tiny/qwen2-vl")
    make_t5(root / "tiny/flan-t5")
    make_blip2(root / "tiny/blip2")
    shutil.copytree(MINI["flux"], root / "tiny/flux")
    # as FLUX.1-dev has it
    (root / "tiny/flux/flux1-dev.safetensors").write_bytes(b"the same once more " * 1000)
    for copy, model in (("gated/flux", "flux"), ("tiny/dry", "flux"), ("tiny/huge", "flan-t5"),
                        ("tiny/whole", "flan-t5")):
        shutil.copytree(root / "tiny" / model, root / copy)
    (root / "tiny/pickle").mkdir()  # google/t5-v1_1-xxl
    shutil.copy(root / "tiny/flan-t5/config.json", root / "tiny/pickle")
    (root / "tiny/pickle/pytorch_model.bin").write_bytes(b"a pickle")
    return root


# ---------------------------------------------------------------- loading
def test_the_vlm_under_the_hubs_names_is_the_same_model(hub):
    """All weights; and equal logits, because rope, widths and norms stand in the flat config."""
    model, processor = load_vlm(str(hub / "tiny/qwen2-vl"), "cpu", torch.float32)
    mini, _ = load_vlm(MINI["vlm"], "cpu", torch.float32)
    state = model.state_dict()
    assert state.keys() == mini.state_dict().keys()
    for name, tensor in mini.state_dict().items():
        assert torch.equal(state[name], tensor), name
    inputs = encode_messages(processor, [caption_messages(picture(0), 0)])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, mini(**inputs).logits)


@pytest.mark.parametrize("load, blocks", [(load_t5, 3), (load_t5_decoder, 0)])
def test_t5_with_an_lm_head_of_its_own(hub, load, blocks):
    path = hub / "tiny/flan-t5"
    files = {name: tensor for shard in path.glob("*.safetensors")
             for name, tensor in load_file(shard).items()}
    whole, info = transformers.T5ForConditionalGeneration.from_pretrained(
        path, output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    t5 = load(str(path), "cpu", torch.float32)
    state = t5.state_dict()
    assert not torch.equal(state["lm_head.weight"], state["shared.weight"])
    assert len(t5.encoder.block) == blocks
    expected = {name: tensor for name, tensor in files.items()
                if blocks or not name.startswith("encoder.block.")}
    copies = {f"{part}.embed_tokens.weight" for part in ("encoder", "decoder")}
    assert state.keys() - copies == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(state["decoder.embed_tokens.weight"], files["shared.weight"])
    memory, labels = torch.randn(2, 5, t5.config.d_model), torch.randint(2, 400, (2, 7))
    # v1.1 does not scale the decoder's outputs, which its config says by "tie_word_embeddings"
    with torch.no_grad():
        logits = [model(encoder_outputs=(memory,), labels=labels).logits for model in (t5, whole)]
    assert torch.equal(*logits)


def test_blip2s_tower_alone(hub, tmp_path):
    """Only the index and the tower's shard are there: the others are not even opened."""
    path = tmp_path / "tower"
    shutil.copytree(hub / "tiny/blip2", path,
                    ignore=shutil.ignore_patterns("model-00002*", "model-00003*", "*.bin"))
    files = load_file(path / "model-00001-of-00003.safetensors")
    state = load_clip(str(path), "cpu", torch.float32).state_dict()
    assert {f"vision_model.{name}" for name in state} == names(EVA_TOWER, 3)
    for name, tensor in state.items():
        assert torch.equal(tensor, files[f"vision_model.{name}"]), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("load, model", [(load_t5, "flan-t5"), (load_t5_decoder, "flan-t5"),
                                         (load_clip, "blip2"), (load_vlm, "qwen2-vl")])
def test_tensors_of_fp32_go_to_the_device_one_by_one(hub, monkeypatch, load, model, device):
    """Converted to bf16, and not by way of a whole model in main memory. meta, which keeps no
    numbers, stands in for a GPU."""
    moved, move = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **options: (
        moved.append(self), move(self, *args, **options))[1])
    # the trial of a VLM's template needs numbers
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda self, **_: None)
    loaded = load(str(hub / "tiny" / model), torch.device(device), torch.bfloat16)
    loaded = loaded[0] if load is load_vlm else loaded
    assert {(x.device.type, x.dtype) for x in loaded.parameters()} == {(device, torch.bfloat16)}
    assert not moved and not loaded.training
    whole = load(str(hub / "tiny" / model), "cpu", torch.float32)
    whole = (whole[0] if load is load_vlm else whole).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert device == "meta" or torch.equal(tensor, whole[name].bfloat16()), name


def test_part_weights_complains(hub, tmp_path):
    path, last = hub / "tiny/flan-t5", "model-00004-of-00004.safetensors"
    read = {name: part[...] for name, part in part_weights(path, decoder_tensors).items()}
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    for folder in ("index", "shard", "gone"):
        shutil.copytree(path, tmp_path / folder)
    (tmp_path / "index/model.safetensors.index.json").write_text("{")
    (tmp_path / "shard" / last).write_bytes(b"half a shard")
    (tmp_path / "gone" / last).unlink()
    for bad, message in ((tmp_path / "index", "cannot load"), (tmp_path / "shard", "cannot load"),
                         (tmp_path / "gone", last), (tmp_path / "none", "is no folder"),
                         (hub / "tiny/pickle", "has only pytorch_model.bin"),
                         ("nobody/nothing", "cannot load")):
        with pytest.raises(UserError, match=message):
            part_weights(bad, decoder_tensors)


# ---------------------------------------------------------------- fetch
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """GET /api/models/REPO/revision/REV and .../tree/REV, HEAD and GET /REPO/resolve/REV/FILE."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if len(parts) < 3:
            return self.answer(404)
        api = parts[:2] == ["api", "models"]
        owner, name, kind, *rest = parts[2:] if api else parts
        repo, file = f"{owner}/{name}", "/".join(rest[1:])
        folder = self.server.root / repo
        if not folder.is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        sizes = {str(path.relative_to(folder)): path.stat().st_size
                 for path in folder.rglob("*") if path.is_file()}
        if repo == "tiny/huge":
            sizes |= {name: 10 ** 16 for name in sizes if name.endswith(".safetensors")}
        tags = {name: hashlib.sha1(name.encode()).hexdigest() for name in sizes}
        if api and kind == "revision":
            return self.json({"id": repo, "sha": COMMIT, "private": False,
                              "siblings": [{"rfilename": name} for name in sizes]})
        if api and kind == "tree":
            return self.json([{"type": "file", "path": name, "size": size, "oid": tags[name]}
                              for name, size in sizes.items()])
        if repo.startswith("gated"):
            return self.answer(403, X_Error_Code="GatedRepo")
        if file not in sizes:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = b""
        if self.command == "GET":
            self.server.sent.append(f"{repo}/{file}")
            data = (folder / file).read_bytes()
        self.answer(200, data, Content_Length=sizes[file], ETag=f'"{tags[file]}"',
                    X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture(scope="session")
def server(hub):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.sent = hub, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


LVLM = "--vlm tiny/qwen2-vl --t5 tiny/flan-t5"
FETCHES = [
    f"lvlm-train lvlm-generate {LVLM} --flux tiny/flux",
    f"lvlm-train lvlm-generate {LVLM} --flux tiny/flux",
    "lvlm-relay --vlm tiny/qwen2-vl --flux tiny/dry --dry-run",
    f"clip-train lvlm-data --clip tiny/blip2 --t5 tiny/whole --vlm {MINI['vlm']}",
]
FAILURES = {
    "clip-generate --clip tiny/blip2 --flux gated/flux":
        "gated/flux is gated: accept its licence at http",
    "clip-train --clip tiny/blip2 --t5 tiny/huge":
        "GB do not fit: free some space, or set HF_HOME",
    "lvlm-train --vlm tiny/qwen2-vl --t5 tiny/pickle": "tiny/pickle has no safetensors",
    "lvlm-data --vlm tiny/none": "cannot fetch tiny/none",
}


def test_fetch_gets_what_the_scripts_read_and_they_work_offline(server, tmp_path):
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done, again, dry, clip, *failed = in_new_process(
        *(("fetch.py", *line.split()) for line in FETCHES),
        *(("fetch.py", *line.split(), {"code": 1}) for line in FAILURES),
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", **home)

    weights = [name for name in server.sent if not name.endswith((".json", ".jinja"))]
    read = ("qwen2-vl/model-0000{1..3}-of-00003", "flan-t5/model-0000{1,2,4}-of-00004",
            "flux/text_encoder/model", "flux/{transformer,vae}/diffusion_pytorch_model",
            "blip2/model-00001-of-00003", "whole/model-0000{1..4}-of-00004")
    assert sorted(weights) == sorted(
        f"tiny/{name}.safetensors" for pattern in read for name in expand_braces(pattern))
    assert not [name for name in server.sent if name.startswith("tiny/flux/") and "_2/" in name]
    size = sum((server.root / name).stat().st_size for name in set(server.sent)
               if name.startswith(("tiny/qwen2-vl/", "tiny/flan-t5/", "tiny/flux/")))
    largest = "transformer/diffusion_pytorch_model.safetensors"
    assert f"{size / 1e9:.3f} GB to download" in done[0] and f"{largest}\n" in done[0]
    assert "0.000 GB to download" in again[0] and f"{largest}  (here)" in again[0]
    assert "tiny/dry\n" in dry[0] and "is a folder here" in clip[0]
    for (_, err), expected in zip(failed, FAILURES.values(), strict=True):
        assert err.count("error: ") == 1 and expected in err and "Traceback" not in err, err
    assert "`hf auth login`" in failed[0][1]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        picture(i).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a white car on a road")
    command("prepare_data.py", "lvlm", "--mini", "--images", pictures, "--out", tmp_path / "data",
            "--tokens", 8)
    train = "train --mini --steps 2 --batch-size 4 --micro-batch 4 --held-out 2".split()
    draw = "--mini --vlm tiny/qwen2-vl --flux tiny/flux --true-cfg 1 --steps 1 --out".split()
    _, (words, _), _ = in_new_process(
        ("thinkdiff_lvlm.py", *train, *LVLM.split(), "--data", tmp_path / "data", "--out",
         tmp_path / "lvlm"),
        ("thinkdiff_lvlm.py", "generate", *draw, tmp_path / "car.png"),
        ("thinkdiff_clip.py", *train, "--vlm", "tiny/blip2", "--t5", "tiny/whole", "--data",
         pictures, "--out", tmp_path / "clip"), HF_HUB_OFFLINE="1", **home)
    # rope, widths and norms of the renamed VLM are read from the flat config
    assert "Create an image of a red car" in words and (tmp_path / "car.png").exists()
    for name in ("lvlm", "clip"):
        assert (tmp_path / name / "aligner/model.safetensors").exists()
