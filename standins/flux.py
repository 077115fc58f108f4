"""The miniature FLUX: transformer, assembly into a `FluxPipeline`, accuracy.

    python miniature.py train flux      # or, from the repository's root, torchrun --nproc_per_node 2 -m standins.flux

Goes on from its state in build/ after a kill; more --minutes prolong it.
"""
import argparse
import contextlib
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from standins.muon import optimizers_for, set_rate
from standins.pictures import PER_KIND, held_out, pictures, publish, save_state
from standins.vae import LATENT, contact_sheet, quiet_config, to_tensor
from world import DETAILS, ING, NOUNS, PAIRS, PLACE, an, caption, label, noun_phrase, sentence, shown

ROOT = Path(__file__).resolve().parent.parent
SAVE_SECONDS = 120


def progress_lr(progress, step, warmup, decay):
    """Share of the full learning rate: linear warm-up by step, constant, linear to 0 over the last `decay` of the run."""
    return min(1, (step + 1) / warmup) * min(1, max(0, 1 - progress) / decay)


@torch.no_grad()
def update_ema(ema, model, step, most):
    keep = min(most, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - keep)


def export(model_class, config, weights, folder):
    """Writes a diffusers model with these weights, in fp16."""
    model = model_class.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict(weights)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.half().save_pretrained(fresh)
    publish(fresh, folder)


# ---------------------------------------------------------------- transformer: what it is trained on
NOISE_SHARE, NOISE_MAX = 0.75, 1.5  # of the samples: Gaussian noise on the T5 output, sigma ~ U(0, NOISE_MAX) x its RMS; the aligner's features
# are not exact either, and the transformer must read them all the same
BLENDED = 0.3  # share of the samples whose tokens are random blends of their prompt's: an aligned token may stand for several words at once
EMPTY = 0.1  # share of samples with the empty prompt as text, for `true_cfg_scale` guidance
COMPOSED = 0.15  # share of the batches with two prompts, one behind the other, as big models know them: see `composed`
D_POOLED = 64  # width of the mini CLIP's text tower. Training feeds Gaussian noise for its pooled embedding (LayerNorm output, about unit
# scale), so nothing is to be learned from it: all content comes from the T5 tokens, whatever pooled embedding is passed later
SIDE = 8  # packed latents: 8 x 8 tokens


def pack(z):
    """Latents (B, 8, 16, 16) -> tokens (B, 64, 32), FLUX's 2 x 2 patches."""
    return FluxPipeline._pack_latents(z, *z.shape)


@torch.no_grad()
def cached_latents(build):
    """Normalised, packed latents of all training pictures (500, PER_KIND, 64, 32) and of one held-out picture a kind (500, 64, 32), fp16."""
    path, source = build / "latents.safetensors", build / "vae/diffusion_pytorch_model.safetensors"
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        vae = AutoencoderTiny.from_pretrained(build / "vae").eval()

        def encode(pics):
            z = vae.encoder(to_tensor(pics).contiguous(memory_format=torch.channels_last))
            return pack((z - vae.config.shift_factor) * vae.config.scaling_factor).half()
        train = torch.stack([encode(pics) for pics in tqdm(pictures(build), "encoding", mininterval=2)])
        held = torch.cat([encode(np.stack([held_out(kind, 0) for kind in part])) for part in torch.arange(len(PAIRS)).split(50)])
        save_file(dict(train=train, held_out=held), f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    tensors = load_file(path)
    return tensors["train"], tensors["held_out"].float()


def prompts(rng, kinds, tokenizer):
    """Texts of the kinds as token ids (B, T): as FluxPipeline pads them (it passes no mask), or cut as aligned features end.

    One sentence or less (50 % of the batches), up to two (15 %), or four cut after 10 to 32 tokens, without </s> and padding (35 %).
    """
    style, pairs = rng.random(), [PAIRS[kind] for kind in kinds]
    if style < 0.35:
        rows = tokenizer([caption(rng, *pair, create=rng.random() < 0.7, sentences=4) for pair in pairs], add_special_tokens=False).input_ids
        length = min(rng.choice([10, 12, 14, 16, 24, 32]), min(map(len, rows)))
        empty = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - 1)
        return torch.tensor([empty if rng.random() < EMPTY else row[:length] for row in rows])
    texts = []
    for pair in pairs:
        u = rng.random()
        if rng.random() < EMPTY:
            texts.append("")
        elif u < 0.7:
            texts.append(caption(rng, *pair, create=rng.random() < 0.5, sentences=1 if style < 0.85 else rng.choice([1, 2])))
        else:
            texts.append(label(*pair) if u < 0.8 else noun_phrase(rng, *pair) if u < 0.9 else sentence(rng, *pair))
    rows = tokenizer(texts).input_ids
    length = max(max(map(len, rows)), rng.choice([0, 0, 0, 32] if style < 0.85 else [0, 32, 32, 48]))
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


def composed(rng, kinds, tokenizer):
    """Two prompts for each kind as token ids (B, T1), (B, T2): a caption that is wrong in the noun (in 30 % in the value), cut and without </s>; then
    a short text that names the right one. What the second prompt names holds, the first gives the rest."""
    first, second = [], []
    for detail, value, noun in (PAIRS[kind] for kind in kinds):
        if rng.random() < 0.7:
            first.append((detail, value, rng.choice(NOUNS[detail])))
            second.append(rng.choice(["{a}", "{a}", "{n}", "A picture of {a}.", "Create an image of {a}.", "the {n}"]).format(n=noun, a=an(noun)))
        else:
            first.append((detail, rng.choice(DETAILS[detail]), noun))
            word = ING[value] if detail == "action" else PLACE[value] if detail == "background" else shown(value)
            second.append(rng.choice(["{w}", "It is {w}.", "the {n} is {w}"]).format(w=word, n=noun))
    rows = tokenizer([caption(rng, *pair, create=rng.random() < 0.7, sentences=4) for pair in first], add_special_tokens=False).input_ids
    length = min(rng.choice([10, 12, 16, 17, 24, 32]), min(map(len, rows)))
    ends = tokenizer(second).input_ids
    padded = max(max(map(len, ends)), rng.choice([0, 32, 48, 48]))
    return torch.tensor([row[:length] for row in rows]), torch.tensor([row + [tokenizer.pad_token_id] * (padded - len(row)) for row in ends])


@torch.no_grad()
def conditions(rng, generator, kinds, tokenizer, encoder, noise=NOISE_SHARE):
    """T5 encoder outputs (B, T, d_t5) for pictures of these kinds, and noise (B, d_clip) in the place of the pooled CLIP embedding."""
    def smeared(text):
        """As aligned features come: each token with something of the others, at the scale of T5's final norm, and not exact."""
        weight, length = encoder.encoder.final_layer_norm.weight, text.shape[1]
        blend = (2 * torch.randn(len(kinds), length, length, generator=generator)).softmax(-1) @ text / weight  # (B, T, d_t5)
        blend = blend * blend.square().mean(-1, keepdim=True).rsqrt() * weight
        text = torch.where(torch.rand(len(kinds), 1, 1, generator=generator) < (BLENDED if noise else 0), blend, text)
        sigma = torch.rand(len(kinds), 1, 1, generator=generator) * NOISE_MAX * (torch.rand(len(kinds), 1, 1, generator=generator) < noise)
        return text + sigma * text.square().mean().sqrt() * torch.randn(text.shape, generator=generator)
    encode = lambda ids: encoder(ids).last_hidden_state
    if rng.random() < COMPOSED:
        first, second = composed(rng, kinds, tokenizer)
        text = torch.cat([smeared(encode(first)), encode(second)], dim=1)
        empty = torch.tensor([[tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (text.shape[1] - 1)])
        text = torch.where(torch.rand(len(kinds), 1, 1, generator=generator) < EMPTY, encode(empty), text)
    else:
        text = smeared(encode(prompts(rng, kinds, tokenizer)))
    return text, torch.randn(len(kinds), D_POOLED, generator=generator)


def load_t5(mini):
    """T5 tokenizer and encoder, fp32."""
    if not (mini / "t5" / "config.json").exists():
        raise SystemExit(f"{mini / 't5'} is missing: FLUX reads text through it; train it first")
    return T5Tokenizer.from_pretrained(mini / "t5"), T5EncoderModel.from_pretrained(mini / "t5", dtype=torch.float32).eval()


def position_ids():
    """(64, 3) ids of the 8 x 8 picture tokens, as FluxPipeline makes them."""
    return FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, torch.device("cpu"), torch.float32)


@contextlib.contextmanager
def half_products():
    """bf16 matrix products, three times as fast on CPUs that have them, but attention in fp32: its bf16 backward is slower than all the rest."""
    def attention(query, key, value, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return dispatch(query.float(), key.float(), value.float(), **kwargs)
    dispatch, transformer_flux.dispatch_attention_fn = transformer_flux.dispatch_attention_fn, attention
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        transformer_flux.dispatch_attention_fn = dispatch


def flow_loss(transformer, x0, noise, t, text, pooled):
    """Flow matching: x_t = (1 - t) x0 + t noise, target noise - x0. x0, noise (B, 64, 32), t (B,), text (B, T, d_t5), pooled (B, d_clip)."""
    x_t = torch.lerp(x0, noise, t[:, None, None])
    velocity = transformer(hidden_states=x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, img_ids=position_ids(),
                           txt_ids=torch.zeros(text.shape[1], 3)).sample
    return (velocity - (noise - x0)).square().mean()


@torch.no_grad()
def held_out_loss(transformer, held, tokenizer, encoder):
    """Flow loss on one held-out picture a kind, with fixed texts (no noise on them), t and noise."""
    rng, generator, losses = random.Random(1), torch.Generator().manual_seed(1), []
    for kinds in torch.randperm(len(PAIRS), generator=generator).split(50):
        text, clip = conditions(rng, generator, kinds.tolist(), tokenizer, encoder, noise=0)
        t = torch.sigmoid(torch.randn(len(kinds), generator=generator))
        losses.append(flow_loss(transformer, held[kinds], torch.randn(held[kinds].shape, generator=generator), t, text, clip).item())
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- transformer: training
HEADS, DOUBLE, SINGLE = 4, 2, 4  # 32 numbers a head
FLUX_BATCH, FLUX_LR, FLUX_WARMUP, FLUX_DECAY, FLUX_EMA, FLUX_MINUTES = 32, 1.5e-3, 100, 0.25, 0.998, 134


def new_flux(d_text):
    return FluxTransformer2DModel(
        in_channels=4 * LATENT, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=32, num_attention_heads=HEADS,
        joint_attention_dim=d_text, pooled_projection_dim=D_POOLED, guidance_embeds=False, axes_dims_rope=(8, 12, 12))


def train_flux(build, mini, minutes=FLUX_MINUTES, seed=0):
    """Trains the transformer for `minutes` of wall time in all; exports the averaged weights to build/flux at every save.

    Under torchrun each process adds a batch of its own and the gradients are averaged (gloo). State: build/flux.pt.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    if rank == 0:
        cached_latents(build)
    if world_size > 1:
        torch.distributed.barrier()
    latents, held = cached_latents(build)
    tokenizer, encoder = load_t5(mini)
    torch.manual_seed(seed)
    transformer = new_flux(encoder.config.d_model)
    ema = {key: value.clone() for key, value in transformer.state_dict().items()}
    optimizers = optimizers_for(transformer.named_parameters(), ("blocks.",), FLUX_LR, FLUX_LR)
    params, step, spent, state_path = list(transformer.parameters()), 0, 0.0, build / "flux.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        transformer.load_state_dict(state["model"])
        for one, saved_one in zip(optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved_one)
        ema, step, spent = state["ema"], state["step"], state["seconds"]
    average = new_flux(encoder.config.d_model).eval()  # holds the averaged weights for the held-out loss

    def save():
        average.load_state_dict(ema)
        export(FluxTransformer2DModel, transformer.config, ema, build / "flux")
        save_state(state_path, dict(model=transformer.state_dict(), optimizers=[one.state_dict() for one in optimizers], ema=ema, step=step, seconds=spent))
        loss = held_out_loss(average, held, tokenizer, encoder)
        with open(build / "flux.jsonl", "a") as log:
            log.write(json.dumps(dict(step=step, minutes=round(spent / 60, 2), loss=round(shown_loss, 4), held_out=round(loss, 4))) + "\n")
        return loss

    began = saved = time.time()
    began -= spent
    total = round(minutes * 60)  # s
    bar = tqdm(total=total, initial=round(spent), desc="flux", unit="s", mininterval=5, disable=rank > 0)
    shown_loss, held_loss, progress = None, float("nan"), spent / total
    while progress < 1:
        rng, generator = random.Random(f"{seed}-{step}-{rank}"), torch.Generator().manual_seed(seed * 10 ** 9 + step * 100 + rank)
        kinds = [rng.randrange(len(PAIRS)) for _ in range(FLUX_BATCH)]
        x0 = latents[kinds, [rng.randrange(PER_KIND) for _ in range(FLUX_BATCH)]].float()  # (B, 64, 32)
        text, clip_pooled = conditions(rng, generator, kinds, tokenizer, encoder)
        t = torch.sigmoid(torch.randn(FLUX_BATCH, generator=generator))
        with half_products():
            loss = flow_loss(transformer, x0, torch.randn(x0.shape, generator=generator), t, text, clip_pooled)
        loss.backward()
        now = (time.time() - began) / total
        if world_size > 1:  # one buffer: the gradients, and the time, on which all processes must agree
            flat = torch.cat([p.grad.flatten() for p in params] + [torch.tensor([now])])
            torch.distributed.all_reduce(flat)
            *grads, now = (flat / world_size).split([p.numel() for p in params] + [1])
            now = now.item()
            for p, grad in zip(params, grads):
                p.grad.copy_(grad.view_as(p))
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        set_rate(optimizers, progress_lr(progress, step, FLUX_WARMUP, FLUX_DECAY))
        for one in optimizers:
            one.step(), one.zero_grad()
        step, progress = step + 1, now
        update_ema(ema, transformer, step, FLUX_EMA)
        before, spent = spent, time.time() - began
        if rank == 0:
            shown_loss = loss.item() if shown_loss is None else 0.98 * shown_loss + 0.02 * loss.item()
            bar.update(int(spent) - int(before))
            bar.set_postfix(step=step, loss=f"{shown_loss:.4f}", held_out=f"{held_loss:.4f}", refresh=False)
            if time.time() - saved > SAVE_SECONDS or progress >= 1:
                saved, held_loss = time.time(), save()
    bar.close()
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- pipeline
def load_parts(build, mini):
    """A `FluxPipeline` of the parts as they are now in build/ and mini/, in fp32."""
    tokenizer, encoder = load_t5(mini)
    clip_tokenizer, clip = CLIPTokenizer.from_pretrained(mini / "clip"), CLIPTextModel.from_pretrained(mini / "clip", dtype=torch.float32).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # no shift: t is drawn logit-normal, and 64 tokens are a small picture
        vae=AutoencoderTiny.from_pretrained(build / "vae"), transformer=FluxTransformer2DModel.from_pretrained(build / "flux"),
        text_encoder=clip, tokenizer=clip_tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer)


def assemble(build, mini):
    """Writes mini/flux, weights in fp16."""
    pipe, fresh, out = load_parts(build, mini), mini / f".flux.{os.getpid()}", mini / "flux"
    pipe.to(torch.float16).save_pretrained(fresh)
    for part in ("text_encoder", "text_encoder_2"):  # transformers loads in the dtype its config names; diffusers in fp32 by default
        config = json.loads((fresh / part / "config.json").read_text())
        (fresh / part / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
    for part in ("transformer", "vae"):  # where they were built is nobody's business
        config = json.loads((fresh / part / "config.json").read_text())
        config.pop("_name_or_path", None)
        (fresh / part / "config.json").write_text(json.dumps(config, indent=2))
    quiet_config(fresh / "vae/config.json")
    publish(fresh, out)
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate_flux(pipe, judge, count=200, steps=28, seed=0, length=48, guidance=3.0, sheet=None):
    """Draws `count` random kinds from true captions; -> {detail: [noun right, value right, both right, n]}, with "all".

    judge(PIL images, details) -> [(value, noun)]; the content comes through T5 alone (CLIP sees the empty prompt).
    """
    rng, counts, drawn = random.Random(seed), {}, []
    kinds = rng.sample(range(len(PAIRS)), min(count, len(PAIRS))) + [rng.randrange(len(PAIRS)) for _ in range(count - len(PAIRS))]
    pipe.set_progress_bar_config(disable=True)
    for part in tqdm(range(0, count, 50), "flux pictures", unit="x50"):
        pairs = [PAIRS[kind] for kind in kinds[part:part + 50]]
        texts = [caption(rng, *pair, create=True) for pair in pairs]
        images = pipe(prompt=[""] * len(pairs), prompt_2=texts, height=64, width=64, num_inference_steps=steps, max_sequence_length=length,
                      negative_prompt=[""] * len(pairs), true_cfg_scale=guidance,
                      generator=torch.Generator().manual_seed(seed + part)).images
        for pair, image, (value, noun) in zip(pairs, images, judge(images, [pair[0] for pair in pairs])):
            right = np.array([noun == pair[2], value == pair[1], (value, noun) == pair[1:], 1])
            for key in (pair[0], "all"):
                counts[key] = counts.get(key, 0) + right
            drawn.append((pair, image))
    if sheet:
        drawn.sort(key=lambda item: PAIRS.index(item[0]))
        contact_sheet(to_tensor(np.stack([np.asarray(image) for _, image in drawn[:240]])), sheet, 20)
    return counts


def check(mini, n):
    """evaluate_flux of the shipped pipeline, judged by the mini CLIP; also what the VLM's relay is measured against."""
    from standins import clip
    model, processor = clip.load(mini)
    pipe = FluxPipeline.from_pretrained(mini / "flux")
    counts = evaluate_flux(pipe, lambda images, details: clip.judge(model, processor, images, details), n)
    return {key: dict(zip(("noun", "value", "both"), (counts[key][:3] / counts[key][3]).round(4).tolist()), n=int(counts[key][3])) for key in [*DETAILS, "all"]}


# ---------------------------------------------------------------- command line
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=FLUX_MINUTES, help="wall time of the training in all, over resumes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_flux(ROOT / "build", ROOT / "mini", args.minutes)
