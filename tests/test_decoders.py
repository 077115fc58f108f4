"""Every decoder of --decoder against its stock pipeline, with tiny random weights."""
import json

import diffusers
import numpy as np
import pytest
import torch
import transformers

import pipelines
from common import MINI, REPO
from helpers import command, complaint

LVLM, CLIP = "thinkdiff_lvlm.py", "thinkdiff_clip.py"
WHITE = "miniature/example/white_car.png"
TEXTS = ["a red car", "A picture of a dog on the beach. The dog is at the beach."]
# those without a text mask draw prompts of equal lengths
EQUAL = ["a red car", "a blue dog"]
# of generate_images: size, steps, guidance
SETTINGS = (64, 3, 2.5)


def clip_text(width):
    """A random CLIP text tower with the miniature's tokenizer."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(f"{MINI['flux']}/tokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=width, eos_token_id=tokenizer.eos_token_id)
    return tokenizer, transformers.CLIPTextModelWithProjection(config)


def image_vae(channels):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1, scaling_factor=0.5)


def new_pixart(t5):
    return diffusers.PixArtSigmaPipeline(
        **t5, vae=image_vae(4), scheduler=diffusers.DPMSolverMultistepScheduler(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, cross_attention_dim=32,
            in_channels=4, out_channels=8, sample_size=8, caption_channels=32))


def new_sd3(t5):
    (tokenizer, clip), (tokenizer_2, clip_2) = clip_text(8), clip_text(16)
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=image_vae(4),
        text_encoder=clip, tokenizer=tokenizer, text_encoder_2=clip_2, tokenizer_2=tokenizer_2,
        text_encoder_3=t5["text_encoder"], tokenizer_3=t5["tokenizer"],
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=24))


def new_chroma(t5):
    return diffusers.ChromaPipeline(
        **t5, vae=image_vae(4), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1))


def new_ltx(t5):
    return diffusers.LTXPipeline(
        **t5, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1)),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, num_layers=1, caption_channels=32))


def new_cogvideox(t5):
    return diffusers.CogVideoXPipeline(
        **t5, scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            time_embed_dim=8, text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8,
            sample_frames=9, use_rotary_positional_embeddings=True),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
            norm_num_groups=2, sample_height=64, sample_width=64))


NEW = {"pixart": new_pixart, "sd3": new_sd3, "chroma": new_chroma, "cogvideox": new_cogvideox,
       "ltx": new_ltx}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{decoder: folder of a tiny random pipeline that reads the miniature's T5}."""
    folders = {}
    for name, new in NEW.items():
        torch.manual_seed(0)
        t5 = {"tokenizer": transformers.T5Tokenizer.from_pretrained(MINI["t5"]),
              "text_encoder": transformers.T5EncoderModel.from_pretrained(
                  f"{MINI['flux']}/text_encoder_2")}
        folders[name] = tmp_path_factory.mktemp(name) / "pipe"
        new(t5).save_pretrained(folders[name])
    return folders


def load(folders, name):
    """The stock pipeline."""
    kind = getattr(diffusers, pipelines.PIPELINES[name])
    pipe = kind.from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode(pipe, text, length=None):
    """T5's outputs (1, n, 32) by the stock model; padded to `length`, unmasked."""
    tokenizer = pipe.components.get("tokenizer_3", pipe.tokenizer)
    encoder = pipe.components.get("text_encoder_3", pipe.text_encoder)
    padding = {"padding": "max_length", "max_length": length} if length else {}
    return encoder(tokenizer(text, return_tensors="pt", **padding).input_ids)[0]


def stock_inputs(name, pipe, texts):
    """What the stock pipeline is called with: texts where it needs no mask."""
    if name in ("sd3", "cogvideox"):
        return {"prompt": texts, "max_sequence_length": {"sd3": 32, "cogvideox": 226}[name]}
    rows = [encode(pipe, text)[0] for text in texts]
    if name == "chroma":
        # the outputs for the first padding token behind the empty prompt
        mask = torch.tensor([[1, 0]])
        ids = pipe.tokenizer("", padding="max_length", max_length=2, return_tensors="pt").input_ids
        with torch.no_grad():
            padding = pipe.text_encoder(ids, attention_mask=mask)[0][0, 1:]
        rows = [torch.cat([row, padding]) for row in rows]
    longest = max(map(len, rows))
    x = torch.zeros(len(rows), longest, 32)
    mask = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        x[i, :len(row)] = row
        mask[i, :len(row)] = 1
    inputs = {"prompt_embeds": x, "prompt_attention_mask": mask}
    if name == "ltx":
        inputs |= {"prompt_attention_mask": mask.bool(), "max_sequence_length": longest}
    return inputs | ({"use_resolution_binning": False} if name == "pixart" else {})


@pytest.mark.parametrize("name", NEW)
def test_equals_the_stock_pipeline(name, folders):
    pipe, texts = load(folders, name), TEXTS if name in pipelines.MASKED else EQUAL
    size, steps, guidance = SETTINGS
    video = {"num_frames": 9} if name in pipelines.VIDEOS else {}
    video |= {"frame_rate": 8} if name == "ltx" else {}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    stock = pipe(**stock_inputs(name, pipe, texts), height=size, width=size, **video,
                 num_inference_steps=steps, guidance_scale=guidance, generator=generators)
    length = {"sd3": 32, "cogvideox": 226}.get(name)
    prompts = [encode(pipe, text, length)[0] for text in texts]
    ours = pipelines.generate_images(pipe, prompts, texts, (5, 6), *SETTINGS, **video)
    for a, b in zip(stock.frames if video else stock.images, ours, strict=True):
        assert np.array_equal(np.stack(a) if video else a, np.stack(b) if video else b)
    # an image does not depend on its batch; a masked prompt not on its padding, up to rounding
    alone = pipelines.generate_images(pipe, prompts[:1], texts[:1], (5,), *SETTINGS, **video)[0]
    a, b = (np.asarray(one[0] if video else one, dtype=float) for one in (alone, ours[0]))
    assert abs(a - b).max() <= 3 and a.std() > 1


@pytest.mark.parametrize("name", NEW)
def test_by_the_command_line(name, folders, tmp_path):
    """The aligner's x' and T5's words arrive; defaults are the decoder's."""
    flags = ("--decoder", name, f"--{name}", folders[name], "--steps", 1, "--size", 64)
    video = name in pipelines.VIDEOS
    flags += ("--frames", 9) if video else ()
    suffix = "mp4" if video else "png"
    for script, extra in ((LVLM, ()), (LVLM, ("--relay",)),
                          (CLIP, ("--image", WHITE, "--text", "a dog")), (CLIP, ("--text", "a"))):
        out = tmp_path / f"{len([*tmp_path.iterdir()])}.{suffix}"
        command(script, "generate", "--mini", *flags, *extra, "--out", out)
        assert out.exists()


def test_unequal_contexts_share_a_batch_if_there_is_a_mask(folders, tmp_path, monkeypatch):
    sizes = {}
    draw = pipelines.generate_images

    def watch(pipe, prompts, *args, **kwargs):
        sizes.setdefault(type(pipe).__name__, []).append(len(prompts))
        return draw(pipe, prompts, *args, **kwargs)
    monkeypatch.setattr(pipelines, "generate_images", watch)
    lines = [{"image": [str(REPO / WHITE)] * k, "text": "a zebra"} for k in (1, 2, 3)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("pixart", "sd3"):
        command(CLIP, "generate", "--mini", "--decoder", name, f"--{name}", folders[name],
                "--steps", 1, "--size", 64, "--batch", tmp_path / "c.jsonl",
                "--out", tmp_path / name)
    assert sizes == {"PixArtSigmaPipeline": [3], "StableDiffusion3Pipeline": [1, 1, 1]}


def test_what_cannot_be(folders, tmp_path):
    g = ("generate", "--mini", "--out", tmp_path / "x.png")
    for name, encoder in (("Wan", "umT5"), ("FLUX.2", "Mistral"), ("Qwen-Image", "Qwen2.5-VL")):
        assert encoder in complaint(LVLM, *g, "--decoder", name, code=2)
    assert "none of flux, pixart" in complaint(LVLM, *g, "--decoder", "dalle", code=2)
    assert "8 k + 1" in complaint(
        LVLM, "generate", "--mini", "--decoder", "ltx", "--frames", 13, "--out", tmp_path / "x.mp4")
    many = [word for _ in range(18) for word in ("--image", WHITE)]
    assert "306 tokens, but pixart reads 300" in complaint(
        CLIP, *g, "--decoder", "pixart", "--pixart", folders["pixart"], *many)
    assert "draws videos" in complaint(
        "cobsat_eval.py", "generate", "--mini", "--decoder", "ltx", "--out", tmp_path / "r")
