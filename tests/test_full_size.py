"""Aligners at their true shapes (d_vlm 3584 and 1408, d_t5 4096): files of the authors' layout through the real command lines.

The models beside them have the full-size widths, one layer and random weights; everything else of them is the miniature's."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, Blip2Config, Blip2VisionModel, Qwen2VLForConditionalGeneration, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

import cobsat_eval
from common import MINI, REPO
from helpers import command, complaint
from thinkdiff_clip import preprocess
from thinkdiff_lvlm import INSTRUCTION

D_QWEN, D_EVA, D_T5 = 3584, 1408, 4096
EXAMPLE = REPO / "mini/example/white_car.png"
FEW = ("--steps", 2, "--true-cfg", 1, "--t5-length", 8)


def released(path, d_vlm, dtype, prefix):
    """A .pth file as the authors' training leaves it. Returns its `model`, without prefix, in float32."""
    model = {"0.weight": torch.randn(D_T5, d_vlm) * d_vlm ** -0.5, "0.bias": torch.randn(D_T5) * 0.1, "2.weight": torch.randn(D_T5, D_T5) * D_T5 ** -0.5,
             "2.bias": torch.randn(D_T5) * 0.1, "3.weight": torch.rand(D_T5) * 0.2}
    model = {name: weight.to(dtype) for name, weight in model.items()}
    torch.save({"model": {f"{prefix}mm_projector.{name}": weight for name, weight in model.items()}, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
                "config": {"run": {"batch_size_train": 24}}, "scaler": {"scale": 65536.0}, "epoch": 0}, path)
    return {name: weight.float() for name, weight in model.items()}


def by_hand(p, x):
    """Eq. 1 with the norm of transformers' T5."""
    norm = T5LayerNorm(D_T5)
    norm.weight.data = p["3.weight"]
    return norm(F.linear(F.gelu(F.linear(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])).detach()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with vlm, blip2, flux and both aligners; and the aligners' weights."""
    root = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MINI["vlm"])
    config.text_config.update(dict(hidden_size=D_QWEN, intermediate_size=32, num_hidden_layers=1, num_attention_heads=28, num_key_value_heads=4,
                                   layer_types=["full_attention"], rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])))
    config.vision_config.hidden_size = D_QWEN
    Qwen2VLForConditionalGeneration(config).bfloat16().save_pretrained(root / "vlm")
    AutoProcessor.from_pretrained(MINI["vlm"]).save_pretrained(root / "vlm")

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    blip2 = Blip2Config(vision_config=dict(hidden_size=D_EVA, intermediate_size=32, num_hidden_layers=1, num_attention_heads=16, image_size=224, patch_size=14,
                                            initializer_range=0.05),
                        qformer_config=dict(**small, encoder_hidden_size=D_EVA), text_config=dict(model_type="t5", d_model=16, num_layers=1))
    tower = Blip2VisionModel(blip2.vision_config)
    torch.nn.init.normal_(tower.post_layernorm.weight)
    blip2.save_pretrained(root / "blip2")
    save_file({f"vision_model.{name}": weight.bfloat16().contiguous() for name, weight in tower.state_dict().items()}, root / "blip2/model.safetensors",
              metadata={"format": "pt"})

    t5 = AutoConfig.from_pretrained(f"{MINI['flux']}/text_encoder_2")
    t5.d_model, t5.num_layers, t5.d_ff = D_T5, 1, 32
    pipe = FluxPipeline.from_pretrained(MINI["flux"], text_encoder_2=T5EncoderModel(t5))
    pipe.transformer.context_embedder = torch.nn.Linear(D_T5, pipe.transformer.inner_dim)  # the rest is trained, so that the prompt matters to the picture
    torch.nn.init.normal_(pipe.transformer.context_embedder.weight, std=10 * D_T5 ** -0.5)
    pipe.transformer.register_to_config(joint_attention_dim=D_T5)
    pipe.save_pretrained(root / "flux")
    return (root, released(root / "thinkdiff_lvlm.pth", D_QWEN, torch.float16, "module."),
            released(root / "thinkdiff_clip.pth", D_EVA, torch.bfloat16, ""))


@torch.no_grad()
def stock_picture(root, prompt, text, seed=0):
    """What FluxPipeline draws from the prompt (N, d_t5), by itself."""
    pipe = FluxPipeline.from_pretrained(root / "flux")
    pipe.set_progress_bar_config(disable=True)
    pooled = pipe.encode_prompt(text, None, max_sequence_length=8)[1]
    return np.asarray(pipe(prompt_embeds=prompt[None], pooled_prompt_embeds=pooled, height=64, width=64, num_inference_steps=2,
                           generator=torch.Generator().manual_seed(seed)).images[0]).astype(int)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@torch.no_grad()
def answer(root, parts, tokens):
    """The features (n, d_vlm) of the stock VLM's greedy answer to text and pictures in the chat's own words."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(root / "vlm", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(root / "vlm")
    text = "".join(part if isinstance(part, str) else "<|vision_start|><|image_pad|><|vision_end|>" for part in parts)
    inputs = processor(text=[f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{INSTRUCTION}{text}<|im_end|>\n"
                             "<|im_start|>assistant\n"], images=[part for part in parts if not isinstance(part, str)], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, output_hidden_states=True, return_dict_in_generate=True)
    ended = int(out.sequences[0, -1] == model.generation_config.eos_token_id)
    return torch.stack([step[-1][0, -1] for step in out.hidden_states])[:tokens - ended]


def test_lvlm_generates(full, tmp_path):
    root, weights, _ = full
    g = (REPO / "thinkdiff_lvlm.py", "generate", "--mini", "--vlm", root / "vlm", "--flux", root / "flux", "--image", EXAMPLE, "--text", "Word 2: blue, ",
         "--max-new-tokens", 5, *FEW, "--out", tmp_path / "x.png")
    command(*g, "--aligner", root / "thinkdiff_lvlm.pth")
    x = answer(root, [Image.open(EXAMPLE).convert("RGB"), "Word 2: blue, "], 5)
    assert x.shape[1] == D_QWEN
    expected = stock_picture(root, by_hand(weights, x), "")
    wrong = stock_picture(root, by_hand(weights, -x), "")
    assert abs(pixels(tmp_path / "x.png") - expected).max() <= 1 and abs(wrong - expected).mean() > 1.5
    assert "a VLM of width 1408" in complaint(*g, "--overwrite", "--aligner", root / "thinkdiff_clip.pth")


def test_cobsat_generates(full, tmp_path):
    root, weights, _ = full
    p = cobsat_eval.prompts(1, 2)[0]
    for name, car in zip(p.pictures, ("white", "blue")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(REPO / f"mini/example/{car}_car.png").convert("RGB").save(tmp_path / name)
    command(REPO / "cobsat_eval.py", "generate", "--mini", "--images", tmp_path, "--tasks", 1, "--shots", 2, "--limit", 1, "--vlm", root / "vlm", "--flux",
            root / "flux", "--aligner", root / "thinkdiff_lvlm.pth", "--method", "thinkdiff", "relay", "--max-new-tokens", 5, *FEW, "--out", tmp_path / "out")
    folder = tmp_path / "out/exps/thinkdiff_image/shot_2/default/task_1"
    parts = [part for n, (word, name) in enumerate(zip(p.words, p.pictures), 1)
             for part in ("\n\n" * (n > 1) + f"Word {n}: {word}, ", Image.open(tmp_path / name).convert("RGB"))] + [f"\n\nWord 3: {p.words[2]}, "]
    expected = stock_picture(root, by_hand(weights, answer(root, parts, 5)), "")
    assert abs(pixels(folder / f"{p.name}.jpg") - expected).mean() < 3  # JPEG
    assert json.loads((folder / f"{p.name}.json").read_text())["text_inputs"] == p.words
    assert abs(pixels(tmp_path / f"out/exps/relay_image/shot_2/default/task_1/{p.name}.jpg") - expected).mean() > 6


def test_clip_generates(full, tmp_path):
    root, _, weights = full
    command(REPO / "thinkdiff_clip.py", "generate", "--mini", "--vlm", root / "blip2", "--flux", root / "flux", "--aligner", root / "thinkdiff_clip.pth",
            "--image", EXAMPLE, "--text", "a hat", *FEW, "--out", tmp_path / "x.png")
    tower, info = Blip2VisionModel.from_pretrained(root / "blip2", key_mapping={r"^vision_model\.": ""}, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        seen = tower(preprocess(Image.open(EXAMPLE).convert("RGB"), 224)[None]).last_hidden_state[0]  # (257, 1408)
    grid = seen[1:].reshape(16, 16, D_EVA)
    pooled = torch.cat([seen[:1], (grid[::2, ::2] + grid[1::2, ::2] + grid[::2, 1::2] + grid[1::2, 1::2]).flatten(0, 1) / 4])
    pipe = FluxPipeline.from_pretrained(root / "flux")
    with torch.no_grad():
        words = pipe.encode_prompt("a hat", None, max_sequence_length=8)[0][0]
    prompt = torch.cat([by_hand(weights, pooled), words])
    assert prompt.shape == (65 + 8, D_T5)
    expected = stock_picture(root, prompt, "a hat")
    wrong = stock_picture(root, torch.cat([by_hand(weights, -pooled), words]), "a hat")
    assert abs(pixels(tmp_path / "x.png") - expected).max() <= 1 and abs(wrong - expected).mean() > 1.5
