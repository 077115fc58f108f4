"""The miniature FLUX: transformer, assembly into a `FluxPipeline`, accuracy.

    torchrun --nproc_per_node 2 -m miniature.flux   # one of the steps of: python -m miniature train
"""
import contextlib
import copy
import json
import os
import random
import time
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from cobsat_eval import DETAILS, KINDS, NOUNS, shown_word
from common import torchrun_ranks
from miniature import clip, muon
from miniature.pictures import (
    PER_KIND,
    held_out_image,
    publish,
    save_state,
    training_folders,
    training_images,
)
from miniature.vae import LATENT_CHANNELS, clean_config, contact_sheet, to_tensor, update_ema
from miniature.world import ING, PLACE, caption, label, noun_phrase, sentence, with_article

# ---------------------------------------------------------------- hyperparameters
# of 32 numbers each
HEADS = 4
DOUBLE_BLOCKS = 2
SINGLE_BLOCKS = 4
# width of the mini CLIP's text tower. Training feeds Gaussian noise for its pooled embedding (a
# LayerNorm's output, of about unit scale), so that nothing is to be learned from it: all content
# comes from the T5 tokens, whatever pooled embedding is passed later
D_POOLED = 64
# packed latents: 8 x 8 tokens
SIDE = 8
# share of the samples with Gaussian noise on the T5 output, sigma ~ U(0, NOISE_MAX) x its RMS: the
# aligner's features are not exact either, and the transformer must read them all the same
NOISE_SHARE = 0.75
NOISE_MAX = 1.5
# share of the samples whose tokens are random blends of their prompt's: an aligned token may stand
# for several words at once
BLENDED = 0.3
# share of the samples with the empty prompt as text, for `true_cfg_scale` guidance
EMPTY = 0.1
# share of the batches with two prompts, one behind the other: see two_prompts
TWO_PROMPTS = 0.15
# over all processes
BATCH = 64
STEPS = 12000
LR = 1.5e-3
WARMUP = 100
# fraction of the run over which the learning rate falls to 0
DECAY = 0.25
EMA = 0.998
SAVE_SECONDS = 300


# ---------------------------------------------------------------- latents
def pack(z):
    """Latents (B, 8, 16, 16) -> tokens (B, 64, 32), FLUX's 2 x 2 patches."""
    return FluxPipeline._pack_latents(z, *z.shape)


@torch.no_grad()
def cached_latents(build):
    """Normalised, packed latents, cached in `build`.

    Returns those of all training pictures (500, PER_KIND, 64, 32) fp16, and those of one held-out
    picture of each kind (500, 64, 32) fp32.
    """
    path = build / "latents.safetensors"
    vae_weights = build / "vae/diffusion_pytorch_model.safetensors"
    if not path.exists() or path.stat().st_mtime < vae_weights.stat().st_mtime:
        vae = AutoencoderTiny.from_pretrained(build / "vae").eval()

        def encode(images):
            z = vae.encoder(to_tensor(images).contiguous(memory_format=torch.channels_last))
            return pack((z - vae.config.shift_factor) * vae.config.scaling_factor).half()

        images = tqdm(training_images(build), "encoding", mininterval=2)
        train_latents = torch.stack([encode(of_kind) for of_kind in images])
        held = [np.stack([held_out_image(kind, 0) for kind in kinds])
                for kinds in torch.arange(len(KINDS)).split(50)]
        held_latents = torch.cat([encode(images) for images in held])
        partial = f"{path}.{os.getpid()}"
        save_file({"train": train_latents, "held_out": held_latents}, partial)
        os.replace(partial, path)
    tensors = load_file(path)
    return tensors["train"], tensors["held_out"].float()


# ---------------------------------------------------------------- texts
def cut_captions(rng, kinds, tokenizer, lengths):
    """Captions of [(detail, value, noun)] cut to one of `lengths`, without </s> and padding.

    As aligned features end. Returns a list of equally long lists of token ids.
    """
    texts = [caption(rng, *kind, create=rng.random() < 0.7, sentences=4) for kind in kinds]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    length = min(rng.choice(lengths), min(map(len, rows)))
    return [row[:length] for row in rows]


def empty_prompt(tokenizer, length):
    """Token ids of the empty prompt, padded."""
    return [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - 1)


def one_prompt(rng, kinds, tokenizer):
    """Texts of the kinds (indices) as token ids (B, T).

    As FluxPipeline pads them (it passes no mask), or cut as aligned features end. One sentence or
    less (50 % of the batches), up to four (15 %), or four cut after 10 to 32 tokens (35 %).
    """
    style = rng.random()
    kinds = [KINDS[kind] for kind in kinds]
    if style < 0.35:
        rows = cut_captions(rng, kinds, tokenizer, [10, 12, 14, 16, 24, 32])
        empty = empty_prompt(tokenizer, len(rows[0]))
        return torch.tensor([empty if rng.random() < EMPTY else row for row in rows])
    short = style < 0.85
    texts = []
    for kind in kinds:
        u = rng.random()
        if rng.random() < EMPTY:
            texts.append("")
        elif u < 0.7:
            create = rng.random() < 0.5
            sentences = 1 if short else rng.choice([1, 2, 3, 4])
            texts.append(caption(rng, *kind, create=create, sentences=sentences))
        elif u < 0.8:
            texts.append(label(*kind))
        elif u < 0.9:
            texts.append(noun_phrase(rng, *kind))
        else:
            texts.append(sentence(rng, *kind))
    rows = tokenizer(texts).input_ids
    padded = rng.choice([0, 0, 0, 32] if short else [0, 32, 32, 48])
    length = max(max(map(len, rows)), padded)
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


def two_prompts(rng, kinds, tokenizer):
    """Two prompts for each kind (index), of which the second overrules the first.

    The first is a caption that is wrong in the noun (in 30 % in the value), cut and without </s>;
    the second a short text that names the right one. What the second names holds, the first gives
    the rest. Returns token ids (B, T1), (B, T2).
    """
    first, second = [], []
    for detail, value, noun in (KINDS[kind] for kind in kinds):
        if rng.random() < 0.7:
            first.append((detail, value, rng.choice(NOUNS[detail])))
            template = rng.choice(["{a}", "{a}", "{n}", "A picture of {a}.",
                                   "Create an image of {a}.", "the {n}"])
            second.append(template.format(n=noun, a=with_article(noun)))
        else:
            first.append((detail, rng.choice(DETAILS[detail]), noun))
            if detail == "action":
                word = ING[value]
            else:
                word = PLACE[value] if detail == "background" else shown_word(value)
            template = rng.choice(["{w}", "It is {w}.", "the {n} is {w}"])
            second.append(template.format(w=word, n=noun))
    first = cut_captions(rng, first, tokenizer, [10, 12, 16, 17, 24, 32])
    second = tokenizer(second).input_ids
    length = max(max(map(len, second)), rng.choice([0, 32, 48, 48]))
    second = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in second]
    return torch.tensor(first), torch.tensor(second)


# ---------------------------------------------------------------- conditions
def perturb(text, mask, encoder, generator, noise):
    """T5 outputs (B, T, d_t5) made like aligned features: some are blended, some are noisy.

    A blended token has something of all the others in the mask (B, T), at the scale of T5's final
    norm.
    """
    batch, length, _ = text.shape
    weight = encoder.encoder.final_layer_norm.weight

    def uniform():
        return torch.rand(batch, 1, 1, generator=generator)

    shares = 2 * torch.randn(batch, length, length, generator=generator)
    shares = shares.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    blend = shares @ text / weight  # (B, T, d_t5)
    blend = blend * blend.square().mean(-1, keepdim=True).rsqrt() * weight
    text = torch.where(uniform() < (BLENDED if noise else 0), blend, text)
    sigma = uniform() * NOISE_MAX * (uniform() < noise)
    rms = text.square().mean().sqrt()
    return text + sigma * rms * torch.randn(text.shape, generator=generator)


@torch.no_grad()
def conditions(rng, generator, kinds, tokenizer, encoder, noise=NOISE_SHARE, masked=False):
    """What the transformer is conditioned on for pictures of these kinds (indices).

    Returns T5 encoder outputs (B, T, d_t5), their mask (B, T) bool, and noise (B, d_clip) in the
    place of the pooled CLIP embedding. masked: padding is False, also for T5; else all is True, as
    FLUX has no mask.
    """
    def encode(ids):
        mask = (ids != tokenizer.pad_token_id) | (not masked)
        seen = mask.long() if masked else None
        return encoder(ids, attention_mask=seen).last_hidden_state, mask

    if rng.random() < TWO_PROMPTS:
        first, second = two_prompts(rng, kinds, tokenizer)
        first, first_mask = encode(first)
        second, second_mask = encode(second)
        first = perturb(first, first_mask, encoder, generator, noise)
        text = torch.cat([first, second], dim=1)  # (B, T1 + T2, d_t5)
        mask = torch.cat([first_mask, second_mask], dim=1)
        empty, empty_mask = encode(torch.tensor([empty_prompt(tokenizer, text.shape[1])]))
        is_empty = torch.rand(len(kinds), 1, 1, generator=generator) < EMPTY
        text = torch.where(is_empty, empty, text)
        mask = torch.where(is_empty[..., 0], empty_mask, mask)
    else:
        text, mask = encode(one_prompt(rng, kinds, tokenizer))
        text = perturb(text, mask, encoder, generator, noise)
    return text, mask, torch.randn(len(kinds), D_POOLED, generator=generator)


def load_t5(weights):
    """T5 tokenizer and encoder, fp32."""
    if not (weights / "t5" / "config.json").exists():
        raise SystemExit(f"{weights / 't5'} is missing: FLUX reads text through it; train it first")
    encoder = T5EncoderModel.from_pretrained(weights / "t5", dtype=torch.float32).eval()
    return T5Tokenizer.from_pretrained(weights / "t5"), encoder


# ---------------------------------------------------------------- loss
def position_ids():
    """(64, 3) ids of the 8 x 8 picture tokens, as FluxPipeline makes them."""
    cpu = torch.device("cpu")
    return FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, cpu, torch.float32)


@contextlib.contextmanager
def bf16_products():
    """Matrix products in bf16 if the CPU has them, three times as fast, but attention in fp32.

    The bf16 backward pass of attention is slower than all the rest.
    """
    if not muon.has_bf16():
        yield
        return
    fp32_attention = F.scaled_dot_product_attention

    def attention(query, key, value, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return fp32_attention(query.float(), key.float(), value.float(), **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        with torch.autocast("cpu", torch.bfloat16):
            yield


def flux_velocity(transformer, x_t, t, condition):
    """FLUX's output (B, 64, 32) for latents x_t (B, 64, 32) at t (B,), with `conditions`."""
    text, _, pooled = condition
    return transformer(
        hidden_states=x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=t,
        img_ids=position_ids(), txt_ids=torch.zeros(text.shape[1], 3)).sample


def flow_loss(velocity, transformer, x0, noise, t, condition):
    """Flow matching: x_t = (1 - t) x0 + t noise, target noise - x0.

    velocity: flux_velocity, or another's; x0, noise (B, 64, 32), t (B,) in 0..1.
    """
    x_t = torch.lerp(x0, noise, t[:, None, None])
    return (velocity(transformer, x_t, t, condition) - (noise - x0)).square().mean()


@torch.no_grad()
def held_out_loss(velocity, transformer, held, tokenizer, encoder, masked):
    """Flow loss on one held-out picture of each kind, with fixed texts (no noise), t and noise."""
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for kinds in torch.randperm(len(KINDS), generator=generator).split(50):
        condition = conditions(rng, generator, kinds.tolist(), tokenizer, encoder, 0, masked)
        t = torch.sigmoid(torch.randn(len(kinds), generator=generator))
        noise = torch.randn(held[kinds].shape, generator=generator)
        loss = flow_loss(velocity, transformer, held[kinds], noise, t, condition)
        losses.append(loss.item())
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- training
def new_flux(d_t5):
    """An untrained transformer."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS, attention_head_dim=32, num_attention_heads=HEADS,
        joint_attention_dim=d_t5, pooled_projection_dim=D_POOLED, guidance_embeds=False,
        axes_dims_rope=(8, 12, 12))


def lr_fraction(step, steps):
    """Fraction of the full rate: linear warm-up, constant, linear to 0 at the end of the run."""
    return min(1, (step + 1) / WARMUP) * min(1, (1 - step / steps) / DECAY)


def average_gradients(params, world_size):
    """Averages the gradients over the processes, as one message."""
    flat = torch.cat([p.grad.flatten() for p in params])
    torch.distributed.all_reduce(flat)
    grads = (flat / world_size).split([p.numel() for p in params])
    for p, grad in zip(params, grads, strict=True):
        p.grad.copy_(grad.view_as(p))


def export(model, folder):
    """Writes a copy of a transformer in fp16."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    copy.deepcopy(model).half().save_pretrained(fresh)
    publish(fresh, folder)


def shared_latents(build, rank, world_size):
    """cached_latents, which rank 0 makes and the other processes wait for."""
    if rank == 0:
        cached_latents(build)
    if world_size > 1:
        torch.distributed.barrier()
    return cached_latents(build)


def train(build, weights, seed, steps=STEPS):
    """Trains the transformer (resumable) and writes the whole pipeline to weights/flux."""
    train_transformer("flux", new_flux, flux_velocity, assemble, build, weights, seed, steps)


def train_transformer(name, new, velocity, assemble, build, weights, seed, steps, masked=False,
                      mean=0.0, muon_lr=LR, t_mean=0.0):
    """Trains a transformer new(d_t5) of latents and texts, then calls assemble(build, weights).

    Exports the averaged weights to build/NAME at every save. Under torchrun each process takes its
    share of the batch and the gradients are averaged (gloo). State: build/NAME.pt. masked: of
    `conditions`. mean: added to the latents. t_mean: mean of logit t.
    """
    rank, world_size, _ = torchrun_ranks()
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    latents, held = shared_latents(build, rank, world_size)
    held = held + mean
    tokenizer, encoder = load_t5(weights)
    torch.manual_seed(seed)
    transformer = new(encoder.config.d_model)
    params = list(transformer.parameters())
    ema = {key: value.clone() for key, value in transformer.state_dict().items()}
    optimizers = muon.make_optimizers(transformer.named_parameters(), ("blocks.",), muon_lr, LR)
    state_path = build / f"{name}.pt"
    step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        transformer.load_state_dict(state["model"])
        muon.load_optimizer_states(optimizers, state["optimizers"])
        ema, step = state["ema"], state["step"]
    # holds the averaged weights for the held-out loss
    average = new(encoder.config.d_model).eval()

    def save():
        average.load_state_dict(ema)
        export(average, build / name)
        save_state(state_path, {
            "model": transformer.state_dict(), "optimizers": muon.optimizer_states(optimizers),
            "ema": ema, "step": step})
        loss = held_out_loss(velocity, average, held, tokenizer, encoder, masked)
        row = {"step": step, "loss": round(mean_loss, 4), "held_out": round(loss, 4)}
        with open(build / f"{name}.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        return loss

    saved = time.time()
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=5, disable=rank > 0)
    mean_loss = None
    held_loss = float("nan")
    batch = BATCH // world_size
    while step < steps:
        # batches depend on the step and the process alone: a resumed run equals an unbroken one
        rng = random.Random(f"{seed}-{step}-{rank}")
        generator = torch.Generator().manual_seed(seed * 10**9 + step * 100 + rank)
        kinds = [rng.randrange(len(KINDS)) for _ in range(batch)]
        x0 = latents[kinds, [rng.randrange(PER_KIND) for _ in range(batch)]].float() + mean
        condition = conditions(rng, generator, kinds, tokenizer, encoder, masked=masked)
        t = torch.sigmoid(t_mean + torch.randn(batch, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        with bf16_products():
            loss = flow_loss(velocity, transformer, x0, noise, t, condition)
        loss.backward()
        if world_size > 1:
            average_gradients(params, world_size)
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        muon.set_learning_rate(optimizers, lr_fraction(step, steps))
        muon.step_optimizers(optimizers)
        step += 1
        update_ema(ema, transformer, step, EMA)
        if rank == 0:
            mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{mean_loss:.4f}", held_out=f"{held_loss:.4f}", refresh=False)
            if time.time() - saved > SAVE_SECONDS or step == steps:
                saved, held_loss = time.time(), save()
    bar.close()
    if rank == 0:
        assemble(build, weights)
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- pipeline
def make_pipeline(build, weights):
    """A `FluxPipeline` of the models as they are now in `build` and `weights`, in fp32."""
    tokenizer, encoder = load_t5(weights)
    text_encoder = CLIPTextModel.from_pretrained(weights / "clip", dtype=torch.float32).eval()
    return FluxPipeline(
        # no shift: t is logit-normal in training, and 64 tokens are a small picture
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderTiny.from_pretrained(build / "vae"),
        transformer=FluxTransformer2DModel.from_pretrained(build / "flux"),
        text_encoder=text_encoder, tokenizer=CLIPTokenizer.from_pretrained(weights / "clip"),
        text_encoder_2=encoder, tokenizer_2=tokenizer)


def edit_config(file, **changes):
    """Changes entries of a JSON file; None removes one."""
    config = json.loads(file.read_text()) | changes
    config = {key: value for key, value in config.items()
              if key not in changes or value is not None}
    file.write_text(json.dumps(config, indent=2))


def assemble(build, weights):
    """Writes the whole pipeline to weights/flux, in fp16."""
    save_pipeline(make_pipeline(build, weights), weights / "flux")


def save_pipeline(pipe, out):
    """Writes a pipeline to the folder `out`, in fp16."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    pipe.to(torch.float16).save_pretrained(fresh)
    # transformers loads in the dtype that its config names; diffusers in fp32 by default
    for file in fresh.glob("text_encoder*/config.json"):
        edit_config(file, dtype="float32")
    # the folder in which they were built
    for name in ("transformer", "vae"):
        edit_config(fresh / name / "config.json", _name_or_path=None)
    clean_config(fresh / "vae/config.json")
    publish(fresh, out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


# ---------------------------------------------------------------- accuracy
@torch.no_grad()
def evaluate(pipe, judge, count=200, steps=28, seed=0, length=48, guidance=3.0, sheet=None):
    """Pictures of `count` random kinds from true captions.

    judge(PIL images, details) -> [(value, noun)]. The content comes through T5 alone (CLIP sees the
    empty prompt). sheet: a PNG of the first pictures. Returns {detail: [noun right, value right,
    both right, n]}, with "all".
    """
    rng = random.Random(seed)
    counts = {}
    generated = []
    kinds = rng.sample(range(len(KINDS)), min(count, len(KINDS)))
    kinds += [rng.randrange(len(KINDS)) for _ in range(count - len(KINDS))]
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, count, 50), "flux pictures", unit="x50"):
        batch = [KINDS[kind] for kind in kinds[start:start + 50]]
        texts = [caption(rng, *kind, create=True) for kind in batch]
        images = pipe(
            prompt=[""] * len(batch), prompt_2=texts, height=64, width=64,
            num_inference_steps=steps, max_sequence_length=length,
            negative_prompt=[""] * len(batch), true_cfg_scale=guidance,
            generator=torch.Generator().manual_seed(seed + start)).images
        found = judge(images, [kind[0] for kind in batch])
        for kind, image, (value, noun) in zip(batch, images, found, strict=True):
            right = np.array([noun == kind[2], value == kind[1], (value, noun) == kind[1:], 1])
            for key in (kind[0], "all"):
                counts[key] = counts.get(key, 0) + right
            generated.append((kind, image))
    if sheet:
        generated.sort(key=lambda item: KINDS.index(item[0]))
        arrays = np.stack([np.asarray(image) for _, image in generated[:240]])
        contact_sheet(to_tensor(arrays), sheet, 20)
    return counts


def check(weights, n):
    """`evaluate` of the shipped pipeline, judged by the mini CLIP.

    Also what the baseline through the VLM's words is measured against.
    """
    model, processor = clip.load(weights)
    pipe = FluxPipeline.from_pretrained(weights / "flux")
    counts = evaluate(pipe, lambda images, details: clip.judge(model, processor, images, details),
                      n)
    result = {}
    for key in [*DETAILS, "all"]:
        *right, total = counts[key].tolist()
        shares = [round(number / total, 4) for number in right]
        result[key] = dict(zip(("noun", "value", "both"), shares, strict=True), n=total)
    return result


# ---------------------------------------------------------------- command line
if __name__ == "__main__":
    train(*training_folders(__doc__))
