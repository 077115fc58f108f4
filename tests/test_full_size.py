"""Aligners at their true shapes (d_vlm 3584 and 1408, d_t5 4096): files of the authors' layout through the real command lines.

The models beside them have the full-size widths, one layer and random weights; everything else of them is the miniature's."""
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor, Blip2Config, Blip2VisionModel, Qwen2VLForConditionalGeneration, T5EncoderModel

from common import MINI, REPO
from helpers import command, complaint
from references import answer, eq1, load_flux, load_vlm, picture, pixels, t5_prompt
from thinkdiff_clip import preprocess

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


def test_lvlm_generates(full, tmp_path):
    root, weights, _ = full
    g = (REPO / "thinkdiff_lvlm.py", "generate", "--mini", "--vlm", root / "vlm", "--flux", root / "flux", "--image", EXAMPLE, "--text", "Word 2: blue, ",
         "--max-new-tokens", 5, *FEW, "--out", tmp_path / "x.png")
    command(*g, "--aligner", root / "thinkdiff_lvlm.pth")
    parts = [Image.open(EXAMPLE).convert("RGB"), "Word 2: blue, "]
    x, _, _ = answer(load_vlm(root / "vlm"), parts, 5)
    flux = load_flux(root / "flux")
    expected, wrong = (picture(flux, eq1(weights, sign * x)) for sign in (1, -1))
    assert abs(pixels(tmp_path / "x.png") - expected).max() <= 1 and abs(wrong - expected).mean() > 1.5
    assert "a VLM of width 1408" in complaint(*g, "--overwrite", "--aligner", root / "thinkdiff_clip.pth")


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
    assert pooled.shape == (65, D_EVA)
    flux = load_flux(root / "flux")
    words = t5_prompt(flux, "a hat", 8)  # (8, d_t5)
    expected, wrong = (
        picture(flux, torch.cat([eq1(weights, sign * pooled), words]), "a hat") for sign in (1, -1))
    assert abs(pixels(tmp_path / "x.png") - expected).max() <= 1 and abs(wrong - expected).mean() > 1.5
