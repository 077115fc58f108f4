"""Aligners at their true shapes (d_vlm 3584 and 1408, d_t5 4096): files of the authors' layout
through the real command lines.

The models beside them have the full-size widths, one layer and random weights; everything else of
them is the miniature's."""
import numpy as np
import pytest
import torch
import transformers
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from common import EXAMPLE, MINI
from helpers import command, complaint
from references import answer, eq1, load_flux, load_vlm, picture, pixels, released, t5_prompt

D_QWEN, D_EVA, D_T5 = 3584, 1408, 4096
CAR = EXAMPLE / "white_car.png"
FEW = ("--steps", 2, "--true-cfg", 1, "--t5-length", 8)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with vlm, blip2, flux and both aligners; and the aligners' weights."""
    root = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(MINI["vlm"])
    config.text_config.update({
        "hidden_size": D_QWEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 28, "num_key_value_heads": 4, "layer_types": ["full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [16, 24, 24]}})
    config.vision_config.hidden_size = D_QWEN
    transformers.Qwen2VLForConditionalGeneration(config).bfloat16().save_pretrained(root / "vlm")
    transformers.AutoProcessor.from_pretrained(MINI["vlm"]).save_pretrained(root / "vlm")

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    blip2 = transformers.Blip2Config(
        vision_config={"hidden_size": D_EVA, "intermediate_size": 32, "num_hidden_layers": 1,
                       "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
                       "initializer_range": 0.05},
        qformer_config={**small, "encoder_hidden_size": D_EVA},
        text_config={"model_type": "t5", "d_model": 16, "num_layers": 1})
    tower = transformers.Blip2VisionModel(blip2.vision_config)
    torch.nn.init.normal_(tower.post_layernorm.weight)
    blip2.save_pretrained(root / "blip2")
    save_file({f"vision_model.{name}": weight.bfloat16().contiguous()
               for name, weight in tower.state_dict().items()},
              root / "blip2/model.safetensors", metadata={"format": "pt"})

    t5 = transformers.AutoConfig.from_pretrained(f"{MINI['flux']}/text_encoder_2")
    t5.d_model, t5.num_layers, t5.d_ff = D_T5, 1, 32
    t5 = transformers.T5EncoderModel(t5)
    pipe = FluxPipeline.from_pretrained(MINI["flux"], text_encoder_2=t5)
    # the rest is trained, so that the prompt matters to the picture
    pipe.transformer.context_embedder = torch.nn.Linear(D_T5, pipe.transformer.inner_dim)
    torch.nn.init.normal_(pipe.transformer.context_embedder.weight, std=10 * D_T5 ** -0.5)
    pipe.transformer.register_to_config(joint_attention_dim=D_T5)
    pipe.save_pretrained(root / "flux")

    weights = {}
    for variant, d_vlm, prefix, dtype in (("lvlm", D_QWEN, "module.", torch.float16),
                                          ("clip", D_EVA, "", torch.bfloat16)):
        weights[variant], state = released(d_vlm, D_T5, prefix, dtype)
        torch.save(state, root / f"thinkdiff_{variant}.pth")
    return root, weights


def check_picture(file, flux, prompt, x, text=""):
    """The file is what the stock pipeline draws of prompt(x), but not what it draws of -x."""
    expected, wrong = (picture(flux, prompt(sign * x), text) for sign in (1, -1))
    assert abs(pixels(file) - expected).max() <= 1 and abs(wrong - expected).mean() > 1.5


def test_lvlm_generates(full, tmp_path):
    root, weights = full
    g = ("thinkdiff_lvlm.py", "generate", "--mini", "--vlm", root / "vlm", "--flux", root / "flux",
         "--image", CAR, "--text", "Word 2: blue, ", "--max-new-tokens", 5, *FEW,
         "--out", tmp_path / "x.png")
    command(*g, "--aligner", root / "thinkdiff_lvlm.pth")
    parts = [Image.open(CAR).convert("RGB"), "Word 2: blue, "]
    x, _, _ = answer(load_vlm(root / "vlm"), parts, 5)
    check_picture(tmp_path / "x.png", load_flux(root / "flux"),
                  lambda x: eq1(weights["lvlm"], x), x)
    assert "a VLM of width 1408" in complaint(*g, "--overwrite",
                                              "--aligner", root / "thinkdiff_clip.pth")


def test_clip_generates(full, tmp_path):
    root, weights = full
    command("thinkdiff_clip.py", "generate", "--mini", "--vlm", root / "blip2",
            "--flux", root / "flux", "--aligner", root / "thinkdiff_clip.pth", "--image", CAR,
            "--text", "a hat", *FEW, "--out", tmp_path / "x.png")
    tower, info = transformers.Blip2VisionModel.from_pretrained(
        root / "blip2", key_mapping={r"^vision_model\.": ""}, dtype=torch.float32,
        output_loading_info=True)
    assert not info["missing_keys"]
    rgb = np.asarray(Image.open(CAR).convert("RGB").resize((224, 224), Image.BICUBIC)) / 255
    rgb = (rgb - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD  # (224, 224, 3)
    pixel_values = torch.tensor(rgb).float().permute(2, 0, 1)[None]  # (1, 3, 224, 224)
    with torch.no_grad():
        seen = tower(pixel_values).last_hidden_state[0]  # (257, 1408)
    grid = seen[1:].reshape(8, 2, 8, 2, D_EVA).mean((1, 3)).flatten(0, 1)  # (64, 1408)
    flux = load_flux(root / "flux")
    words = t5_prompt(flux, "a hat", 8)  # (8, 4096)
    check_picture(tmp_path / "x.png", flux,
                  lambda x: torch.cat([eq1(weights["clip"], x), words]),
                  torch.cat([seen[:1], grid]), "a hat")
