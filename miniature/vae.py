"""The miniature's autoencoder: `AutoencoderTiny`, the class of TAEF1 for FLUX.

64 x 64 pictures -> 16 x 16 latents of 8 channels, of which FLUX's 2 x 2 packing makes 64 tokens of
32 numbers. Latents 8 times smaller, as the real FLUX has them, would make FLUX 2.4 times cheaper,
but they need an hour of training before a texture can be recognised; these need a quarter of it.

    python -m miniature.vae      # one of the steps of: python -m miniature train
"""
import itertools
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from PIL import Image
from tqdm import tqdm

from cobsat_eval import KINDS
from miniature import muon
from miniature.pictures import (
    PER_KIND,
    held_out_image,
    save_state,
    training_folders,
    training_images,
)

# ---------------------------------------------------------------- hyperparameters
CHANNELS = 64
# blocks at 64, 32 and 16 px, and at 16, 32 and 64 px: none at 64 px, where they cost most
ENCODER_BLOCKS = (0, 2, 2)
DECODER_BLOCKS = (3, 2, 0)
LATENT_CHANNELS = 8
# px. The model is convolutional: crops teach as much as pictures, at a quarter of the cost
CROP = 32
BATCH = 16
# three rounds of the learning rate's cosine: the second one from half the rate, with less noise and
# a larger weight of the squared error; in the third one, from a third, the encoder is fixed
STEPS = (11000, 7000, 4000)
LR = 2e-3
MUON_LR = 6e-3
WARMUP = 50
EMA = 0.995
# on the latents (of about unit scale), so that the decoder forgives the transformer's errors
NOISE = (0.08, 0.05, 0.05)
# weight of the squared error beside L1
SQUARED = (5.0, 20.0, 20.0)
# weight of the L1 loss on differences of neighbouring pixels, which keeps weave and lace sharp
EDGES = 0.3
# weight of the L1 loss on 4 x 4 means, so that the third direction of color is not learned last
TINT = 1.0
# weight of keeping latents near unit scale: AutoencoderTiny's decoder clamps them softly at 3
SPREAD = 1e-2
SAVE_SECONDS = 60


# ---------------------------------------------------------------- model and loss
def new_vae():
    """An untrained autoencoder."""
    return AutoencoderTiny(
        encoder_block_out_channels=(CHANNELS,) * 3, decoder_block_out_channels=(CHANNELS,) * 3,
        num_encoder_blocks=ENCODER_BLOCKS, num_decoder_blocks=DECODER_BLOCKS,
        latent_channels=LATENT_CHANNELS)


@torch.no_grad()
def initialise(vae):
    """Weights that keep the signal's scale: with torch's own, color is not learned for minutes."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            module.conv[-1].weight *= 0.2
    vae.encoder.layers[-1].weight *= 0.5
    vae.decoder.layers[-1].weight *= 0.1
    vae.decoder.layers[-1].bias.fill_(0.5)


def to_tensor(images):
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float in -1..1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae, x, generator, phase):
    """x (B, 3, h, w) in -1..1 -> L1 and L2 with the terms of the hyperparameters above."""
    # bf16: 1.7 times as fast on CPUs that have it
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encoder(x)  # (B, 8, h / 4, w / 4)
        noise = NOISE[phase] * torch.randn(z.shape, generator=generator)
        y = vae.decoder(z + noise)  # (B, 3, h, w)
    z, y = z.float(), y.float()
    pixels = (y - x).abs().mean() + SQUARED[phase] * (y - x).square().mean()
    edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
    tint = F.avg_pool2d(y - x, 4).abs().mean()
    return pixels + EDGES * edges + TINT * tint + SPREAD * z.square().mean()


# ---------------------------------------------------------------- training
def train(build, weights, seed, steps=STEPS):
    """Trains the autoencoder (resumable) and exports it to build/vae."""
    torch.manual_seed(seed)
    images = training_images(build)
    state_path = build / "vae-tiny.pt"
    step = 0
    vae = new_vae().to(memory_format=torch.channels_last)
    initialise(vae)
    ema = {name: value.clone() for name, value in vae.state_dict().items()}
    kernels = [name for name, p in vae.named_parameters() if p.shape[:2] == (CHANNELS, CHANNELS)]
    optimizers = muon.make_optimizers(vae.named_parameters(), kernels, MUON_LR, LR)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vae.load_state_dict(state["model"])
        muon.load_optimizer_states(optimizers, state["optimizers"])
        ema, step = state["ema"], state["step"]
    total = sum(steps)
    bar = tqdm(total=total, initial=step, desc="vae", mininterval=2)
    saved = time.time()
    mean_loss = None
    while step < total:
        # batches depend on the step alone, so that a resumed run equals an unbroken one
        random_ = np.random.default_rng([seed, step])
        generator = torch.Generator().manual_seed(seed * 10**9 + step)
        phase = sum(step >= end for end in itertools.accumulate(steps[:-1]))
        if step == sum(steps[:2]):
            # the encoder that FLUX is trained with
            vae.load_state_dict(ema)
        vae.encoder.requires_grad_(phase < 2)
        fraction = muon.warmup_cosine(step - sum(steps[:phase]), steps[phase], WARMUP)
        muon.set_learning_rate(optimizers, fraction / (1 + phase))
        crops = []
        for a, b in random_.integers(0, 64 - CROP + 1, (BATCH, 2)):
            kind, index = random_.integers(len(KINDS)), random_.integers(PER_KIND)
            crops.append(images[kind, index, a:a + CROP, b:b + CROP])
        x = to_tensor(np.stack(crops)).contiguous(memory_format=torch.channels_last)
        loss = vae_loss(vae, x, generator, phase)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        muon.step_optimizers(optimizers)
        step += 1
        update_ema(ema, vae, step, EMA)
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == total:
            saved = time.time()
            save_state(state_path, {"model": vae.state_dict(), "ema": ema, "step": step,
                                    "optimizers": muon.optimizer_states(optimizers)})
    bar.close()
    export(ema, images, build)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moves the averaged weights {name: tensor} towards the model's; faster in the first steps."""
    keep = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - keep)


@torch.no_grad()
def export(weights, images, build):
    """Writes build/vae in fp16, with the latents' shift and scale measured on 1,000 pictures.

    Also build/vae.png: held-out pictures beside their reconstructions.
    """
    vae = new_vae()
    vae.load_state_dict(weights)
    z = torch.cat([vae.encoder(to_tensor(two)) for two in np.array(images[:, :2])])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    vae.half().save_pretrained(build / "vae")
    clean_config(build / "vae/config.json")
    vae = AutoencoderTiny.from_pretrained(build / "vae").eval()
    textures = [i for i, kind in enumerate(KINDS) if kind[0] == "texture"]
    kinds = textures[3::7] + list(range(0, len(KINDS), 17))
    x = to_tensor(np.stack([held_out_image(kind, 0) for kind in kinds[:60]]))  # (n, 3, 64, 64)
    y = vae.decode(vae.encode(x).latents).sample.clamp(-1, 1)
    psnr = -10 * ((x - y) / 2).square().mean(dim=(1, 2, 3)).log10()
    print(f"latents: mean {z.mean():.3f}, std {z.std():.3f}, largest {z.abs().max():.2f}; "
          f"reconstruction of {len(x)} held-out pictures: {psnr.mean():.1f} dB PSNR")
    contact_sheet(torch.stack([x, y], 1).flatten(0, 1), build / "vae.png", 12)


def clean_config(file):
    """Removes the entry that AutoencoderTiny writes and then warns about at every loading."""
    config = json.loads(file.read_text())
    config.pop("block_out_channels", None)
    file.write_text(json.dumps(config, indent=2))


def contact_sheet(x, path, columns):
    """Writes pictures x (n, 3, 64, 64) in -1..1 as one PNG."""
    images = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (columns * 66, -(-len(images) // columns) * 66), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (i % columns * 66, i // columns * 66))
    sheet.save(path)


if __name__ == "__main__":
    train(*training_folders(__doc__))
