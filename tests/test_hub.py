"""Checkpoints as they lie on the Hugging Face hub (the true names of tensors and files, at tiny width, in shards), and `prepare_data.py fetch`
against a small server that speaks as much of the hub's API as that takes."""
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
from safetensors.torch import load_file, save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, Qwen2VLForConditionalGeneration, T5Config, T5ForConditionalGeneration

from common import MINI, REPO, UserError, part_weights, t5_decoder, weight_files
from helpers import command, in_new_process
from prepare_data import caption_messages, encode_messages, load_vlm
from test_prepare_data import picture
from thinkdiff_clip import load_clip, load_t5
from thinkdiff_lvlm import load_t5_decoder


# ---------------------------------------------------------------- the names on the hub; {i} is a layer
QWEN2_VL = """lm_head.weight model.embed_tokens.weight model.norm.weight
model.layers.{i}.input_layernorm.weight model.layers.{i}.post_attention_layernorm.weight
model.layers.{i}.mlp.down_proj.weight model.layers.{i}.mlp.gate_proj.weight model.layers.{i}.mlp.up_proj.weight
model.layers.{i}.self_attn.q_proj.weight model.layers.{i}.self_attn.q_proj.bias model.layers.{i}.self_attn.k_proj.weight
model.layers.{i}.self_attn.k_proj.bias model.layers.{i}.self_attn.v_proj.weight model.layers.{i}.self_attn.v_proj.bias
model.layers.{i}.self_attn.o_proj.weight
visual.patch_embed.proj.weight visual.merger.ln_q.weight visual.merger.ln_q.bias visual.merger.mlp.0.weight visual.merger.mlp.0.bias
visual.merger.mlp.2.weight visual.merger.mlp.2.bias
visual.blocks.{j}.norm1.weight visual.blocks.{j}.norm1.bias visual.blocks.{j}.norm2.weight visual.blocks.{j}.norm2.bias
visual.blocks.{j}.attn.qkv.weight visual.blocks.{j}.attn.qkv.bias visual.blocks.{j}.attn.proj.weight visual.blocks.{j}.attn.proj.bias
visual.blocks.{j}.mlp.fc1.weight visual.blocks.{j}.mlp.fc1.bias visual.blocks.{j}.mlp.fc2.weight visual.blocks.{j}.mlp.fc2.bias"""
T5 = """shared.weight lm_head.weight encoder.final_layer_norm.weight decoder.final_layer_norm.weight
encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
encoder.block.{i}.layer.0.layer_norm.weight encoder.block.{i}.layer.1.layer_norm.weight
encoder.block.{i}.layer.0.SelfAttention.q.weight encoder.block.{i}.layer.0.SelfAttention.k.weight
encoder.block.{i}.layer.0.SelfAttention.v.weight encoder.block.{i}.layer.0.SelfAttention.o.weight
encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight
encoder.block.{i}.layer.1.DenseReluDense.wo.weight
decoder.block.{i}.layer.0.layer_norm.weight decoder.block.{i}.layer.1.layer_norm.weight decoder.block.{i}.layer.2.layer_norm.weight
decoder.block.{i}.layer.0.SelfAttention.q.weight decoder.block.{i}.layer.0.SelfAttention.k.weight
decoder.block.{i}.layer.0.SelfAttention.v.weight decoder.block.{i}.layer.0.SelfAttention.o.weight
decoder.block.{i}.layer.1.EncDecAttention.q.weight decoder.block.{i}.layer.1.EncDecAttention.k.weight
decoder.block.{i}.layer.1.EncDecAttention.v.weight decoder.block.{i}.layer.1.EncDecAttention.o.weight
decoder.block.{i}.layer.2.DenseReluDense.wi_0.weight decoder.block.{i}.layer.2.DenseReluDense.wi_1.weight
decoder.block.{i}.layer.2.DenseReluDense.wo.weight"""
EVA_TOWER = """vision_model.embeddings.class_embedding vision_model.embeddings.position_embedding
vision_model.embeddings.patch_embedding.weight vision_model.embeddings.patch_embedding.bias
vision_model.post_layernorm.weight vision_model.post_layernorm.bias
vision_model.encoder.layers.{i}.self_attn.qkv.weight vision_model.encoder.layers.{i}.self_attn.qkv.bias
vision_model.encoder.layers.{i}.self_attn.projection.weight vision_model.encoder.layers.{i}.self_attn.projection.bias
vision_model.encoder.layers.{i}.layer_norm1.weight vision_model.encoder.layers.{i}.layer_norm1.bias
vision_model.encoder.layers.{i}.layer_norm2.weight vision_model.encoder.layers.{i}.layer_norm2.bias
vision_model.encoder.layers.{i}.mlp.fc1.weight vision_model.encoder.layers.{i}.mlp.fc1.bias
vision_model.encoder.layers.{i}.mlp.fc2.weight vision_model.encoder.layers.{i}.mlp.fc2.bias"""


def names(table, i, j=0):
    layers = lambda name: range(i if "{i}" in name else j if "{j}" in name else 1)
    return {name.format(i=layer, j=layer) for name in table.split() for layer in layers(name)}


def save_sharded(folder, tensors, config, shard_of):
    """Writes tensors in shards, shard_of(name) = 1..n, with their index, as the hub has them; beside them pickles and other files nobody reads."""
    folder.mkdir(parents=True)
    shards = defaultdict(dict)
    for name, tensor in tensors.items():
        shards[shard_of(name)][name] = tensor.contiguous()
    files = {number: f"model-{number:05}-of-{len(shards):05}.safetensors" for number in shards}
    assert sorted(shards) == list(range(1, len(shards) + 1))
    for number, part in shards.items():
        save_file(part, folder / files[number], {"format": "pt"})
        (folder / f"pytorch_model-{number:05}-of-{len(shards):05}.bin").write_bytes(b"a pickle " * 1000)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": total, "weight_map": {name: files[shard_of(name)] for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("a model card")
    (folder / "tf_model.h5").write_bytes(b"tensorflow " * 1000)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder `OWNER/NAME` for each repository."""
    root = tmp_path_factory.mktemp("hub")

    # the trained miniature VLM under the names of Qwen/Qwen2-VL-7B-Instruct, with that repository's flat config.json
    mini = json.loads((Path(MINI["vlm"]) / "config.json").read_text())
    text, vision = mini["text_config"], mini["vision_config"]
    rope = text["rope_parameters"]
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
        **{key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                                      "hidden_act", "rms_norm_eps", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
                                      "pad_token_id", "use_cache")},
        **{key: mini[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
        "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "sliding_window": 32768,
        "use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": False,
        "vision_config": {"depth": vision["depth"], "embed_dim": vision["embed_dim"], "mlp_ratio": 4, "num_heads": vision["num_heads"], "in_chans": 3,
                          "hidden_size": vision["hidden_size"], "patch_size": vision["patch_size"], "spatial_merge_size": 2,
                          "spatial_patch_size": vision["patch_size"], "temporal_patch_size": 2}}
    renamed = {re.sub(r"^model\.(visual|language_model)\b", lambda m: {"visual": "visual", "language_model": "model"}[m[1]], name): tensor
               for name, tensor in load_file(f"{MINI['vlm']}/model.safetensors").items()}
    assert renamed.keys() == names(QWEN2_VL, text["num_hidden_layers"], vision["depth"])
    save_sharded(root / "tiny/qwen2-vl", renamed, config, lambda name: 1 if name.startswith("visual") else 2 if ".layers." in name else 3)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(f"{MINI['vlm']}/{name}", root / "tiny/qwen2-vl")

    # google/flan-t5-xxl: fp32, an lm_head of its own; shard 3 holds nothing but encoder blocks
    mini = json.loads((Path(MINI["t5"]) / "config.json").read_text())
    config = {key: mini[key] for key in ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size", "relative_attention_num_buckets",
                                         "decoder_start_token_id", "eos_token_id", "pad_token_id", "feed_forward_proj", "is_encoder_decoder",
                                         "layer_norm_epsilon")}
    config |= {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "num_layers": 3, "num_decoder_layers": 3,
               "tie_word_embeddings": False, "dropout_rate": 0.1, "relative_attention_max_distance": 128,
               "transformers_version": "4.24.0.dev0"}
    torch.manual_seed(1)
    made = T5ForConditionalGeneration(T5Config(**config)).state_dict()
    tensors = {name: 0.1 * torch.randn(made[name].shape) for name in sorted(names(T5, 3))}
    save_sharded(root / "tiny/flan-t5", tensors, config, lambda name: (
        3 if "encoder.block.2" in name or "encoder.block.1" in name else 2 if "encoder.block.0" in name or "decoder.block.2" in name else
        1 if "decoder" in name else 4))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{MINI['t5']}/{name}", root / "tiny/flan-t5")

    # Salesforce/blip2-flan-t5-xxl: EVA's tower in the first shard, with the Q-Former; the language model behind it
    config = Blip2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56,
                       "patch_size": 14},
        qformer_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "encoder_hidden_size": 16},
        text_config={"model_type": "t5", "vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}, num_query_tokens=4)
    torch.manual_seed(2)
    made = {name: tensor for name, tensor in Blip2ForConditionalGeneration(config).state_dict().items() if "embed_tokens" not in name}
    assert {name for name in made if name.startswith("vision_model.")} == names(EVA_TOWER, 3)
    assert {name.split(".")[0] for name in made} == {"query_tokens", "vision_model", "qformer", "language_projection", "language_model"}
    save_sharded(root / "tiny/blip2", {name: 0.1 * torch.randn(tensor.shape) for name, tensor in made.items()}, json.loads(config.to_json_string()),
                 lambda name: 1 if name.startswith(("vision_model", "query", "qformer")) else 2 if "encoder" in name else 3)

    shutil.copytree(MINI["flux"], root / "tiny/flux")
    (root / "tiny/flux/flux1-dev.safetensors").write_bytes(b"the same once more " * 1000)  # as FLUX.1-dev has it
    for copy in ("gated/flux", "tiny/dry"):
        shutil.copytree(root / "tiny/flux", root / copy)
    (root / "tiny/pickle").mkdir()  # google/t5-v1_1-xxl
    shutil.copy(root / "tiny/flan-t5/config.json", root / "tiny/pickle")
    (root / "tiny/pickle/pytorch_model.bin").write_bytes(b"a pickle")
    return root


# ---------------------------------------------------------------- loading
def test_the_vlm_under_the_hubs_names_is_the_same_model(hub):
    path = hub / "tiny/qwen2-vl"
    _, info = Qwen2VLForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    (model, processor), (mini, _) = load_vlm(str(path), "cpu", torch.float32), load_vlm(MINI["vlm"], "cpu", torch.float32)
    for name, tensor in mini.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    inputs = encode_messages(processor, [caption_messages(picture(0), 0)])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, mini(**inputs).logits)  # rope, widths and norms are read from the flat config


def test_t5_with_an_lm_head_of_its_own(hub):
    path = hub / "tiny/flan-t5"
    files = {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    whole, info = T5ForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for t5, blocks in ((load_t5(str(path), "cpu", torch.float32), 3), (load_t5_decoder(str(path), "cpu", torch.float32), 0)):
        state = t5.state_dict()
        assert not torch.equal(state["lm_head.weight"], state["shared.weight"]) and len(t5.encoder.block) == blocks
        expected = files if blocks else {name: tensor for name, tensor in files.items() if not name.startswith("encoder.block.")}
        assert state.keys() - {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
        assert torch.equal(state["decoder.embed_tokens.weight"], files["shared.weight"])
        memory, labels = torch.randn(2, 5, t5.config.d_model), torch.randint(2, 400, (2, 7))
        with torch.no_grad():  # v1.1 does not scale the decoder's outputs, which its config says by "tie_word_embeddings": false
            logits = [model(encoder_outputs=(memory,), labels=labels).logits for model in (t5, whole.eval())]
        assert torch.equal(*logits)


def test_blip2s_tower_alone(hub, tmp_path):
    path = hub / "tiny/blip2"
    files = load_file(path / "model-00001-of-00003.safetensors")
    state = load_clip(str(path), "cpu", torch.float32).state_dict()
    assert {f"vision_model.{name}" for name in state} == names(EVA_TOWER, 3)
    for name, tensor in state.items():
        assert torch.equal(tensor, files[f"vision_model.{name}"]), name
    without = tmp_path / "without"  # only the index and the tower's shard: the others are not even opened
    shutil.copytree(path, without, ignore=shutil.ignore_patterns("model-00002*", "model-00003*", "*.bin"))
    load_clip(str(without), "cpu", torch.float32)


def test_part_weights(hub, tmp_path):
    path = hub / "tiny/flan-t5"
    assert weight_files(path, t5_decoder) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 4)]
    part = part_weights(path, t5_decoder, torch.bfloat16)
    files = {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert part.keys() == {name for name in files if not name.startswith("encoder.block.")}
    assert all(torch.equal(tensor, files[name].bfloat16()) for name, tensor in part.items())
    assert {t.dtype for t in part_weights(path, t5_decoder).values()} == {torch.float32}
    one = part_weights(MINI["t5"], lambda name: name == "shared.weight")  # a checkpoint in one file
    assert one.keys() == {"shared.weight"}

    for broken, message in (("index", "cannot load"), ("shard", "cannot load"), ("gone", "model-00004-of-00004.safetensors")):
        copy = tmp_path / broken
        shutil.copytree(path, copy)
        if broken == "index":
            (copy / "model.safetensors.index.json").write_text("{")
        elif broken == "shard":
            (copy / "model-00004-of-00004.safetensors").write_bytes(b"half a shard")
        else:
            (copy / "model-00004-of-00004.safetensors").unlink()
        with pytest.raises(UserError, match=message):
            part_weights(copy, t5_decoder)
    for missing, message in ((hub / "tiny/pickle", "has only pytorch_model.bin"), (tmp_path / "none", "is no folder"),
                             ("nobody/nothing", "cannot load")):
        with pytest.raises(UserError, match=message):
            part_weights(missing, t5_decoder)


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
        repo, kind, file = ("/".join(parts[2:4]), *parts[4:5], "") if api else ("/".join(parts[:2]), parts[2], "/".join(parts[4:]))
        folder = self.server.root / repo
        if not folder.is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        sizes |= {name: 10 ** 16 for name in sizes if repo == "tiny/huge" and name.endswith(".safetensors")}
        if api and kind == "revision":
            return self.json({"id": repo, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in sizes]})
        if api and kind == "tree":
            return self.json([{"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
                              for name, size in sizes.items()])
        if repo.startswith("gated"):
            return self.answer(403, X_Error_Code="GatedRepo")
        if file not in sizes:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        if self.command == "GET":
            self.server.sent.append(f"{repo}/{file}")
        data = (folder / file).read_bytes() if self.command == "GET" else b""
        self.answer(200, data, Content_Length=sizes[file], ETag=f'"{hashlib.sha1(file.encode()).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture(scope="session")
def server(hub):
    for copy in ("tiny/huge", "tiny/whole"):
        shutil.copytree(hub / "tiny/flan-t5", hub / copy)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.sent = hub, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_fetch_gets_what_the_scripts_read_and_they_work_offline(server, tmp_path):
    fetch = (REPO / "prepare_data.py", "fetch")
    lvlm = "lvlm-train lvlm-generate --vlm tiny/qwen2-vl --t5 tiny/flan-t5 --flux tiny/flux".split()
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done, again, clip, dry, gated, huge, pickle, none, folder = in_new_process(
        (*fetch, *lvlm), (*fetch, *lvlm), (*fetch, "clip-train", "--clip", "tiny/blip2", "--t5", "tiny/whole"),
        (*fetch, "lvlm-relay", "--vlm", "tiny/qwen2-vl", "--flux", "tiny/dry", "--dry-run"),
        (*fetch, "clip-generate", "--clip", "tiny/blip2", "--flux", "gated/flux", {"code": 1}),
        (*fetch, "clip-train", "--clip", "tiny/blip2", "--t5", "tiny/huge", {"code": 1}),
        (*fetch, "lvlm-train", "--vlm", "tiny/qwen2-vl", "--t5", "tiny/pickle", {"code": 1}),
        (*fetch, "lvlm-data", "--vlm", "tiny/none", {"code": 1}),
        (*fetch, "lvlm-data", "--vlm", MINI["vlm"]),
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", **home)

    weights = [name for name in server.sent if not name.endswith((".json", ".jinja"))]
    assert sorted(weights) == sorted([
        *(f"tiny/qwen2-vl/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        *(f"tiny/flan-t5/model-0000{n}-of-00004.safetensors" for n in (1, 2, 4)),
        *(f"tiny/flux/{name}.safetensors" for name in ("text_encoder/model", "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")),
        "tiny/blip2/model-00001-of-00003.safetensors", *(f"tiny/whole/model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4))])
    assert not [name for name in server.sent if name.startswith("tiny/flux/") and "_2/" in name]
    sizes = [(server.root / name).stat().st_size for name in set(server.sent) if name.startswith(("tiny/qwen2-vl/", "tiny/flan-t5/", "tiny/flux/"))]
    assert f"{sum(sizes) / 1e9:.3f} GB to download" in done[0] and "transformer/diffusion_pytorch_model.safetensors\n" in done[0]
    assert "0.000 GB to download" in again[0] and "diffusion_pytorch_model.safetensors  (here)" in again[0] and "tiny/dry\n" in dry[0]
    for (_, err), expected in ((gated, "gated/flux is gated: accept its licence at http"), (huge, "GB do not fit: free some space, or set HF_HOME"),
                               (pickle, "tiny/pickle has no safetensors"), (none, "cannot fetch tiny/none")):
        assert err.count("error: ") == 1 and expected in err and "Traceback" not in err, err
    assert "`hf auth login`" in gated[1] and "is a folder here" in folder[0]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        picture(i).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a white car on a road")
    command(REPO / "prepare_data.py", "lvlm", "--mini", "--images", pictures, "--out", tmp_path / "data", "--tokens", 8)
    short = "--mini --steps 2 --batch-size 4 --micro-batch 4 --held-out 2 --log-every 1".split()
    trained, (words, _), _ = in_new_process(
        (REPO / "thinkdiff_lvlm.py", "train", *short, "--vlm", "tiny/qwen2-vl", "--t5", "tiny/flan-t5", "--data", tmp_path / "data", "--out",
         tmp_path / "lvlm"),
        (REPO / "thinkdiff_lvlm.py", "generate", "--mini", "--vlm", "tiny/qwen2-vl", "--flux", "tiny/flux", "--true-cfg", 1, "--steps", 1, "--out",
         tmp_path / "car.png"),
        (REPO / "thinkdiff_clip.py", "train", *short, "--vlm", "tiny/blip2", "--t5", "tiny/whole", "--data", pictures, "--out", tmp_path / "clip"),
        HF_HUB_OFFLINE="1", **home)
    assert "Create an image of a red car" in words and (tmp_path / "car.png").exists()  # the renamed VLM still knows what it has learned
    assert all((tmp_path / name / "aligner/model.safetensors").exists() for name in ("lvlm", "clip"))
