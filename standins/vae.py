"""The miniature's autoencoder: `AutoencoderTiny` (as TAEF1 for FLUX), 64 x 64 pictures -> 16 x 16 latents of 8 channels.

FLUX's 2 x 2 packing makes 64 tokens of 32 numbers of them. 8 x smaller latents (the real FLUX's) would make FLUX 2.4 times
cheaper, but on this world they need an hour of training before a texture is recognised; these need ten minutes.
"""
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from tqdm import tqdm

from standins.pictures import PER_KIND, held_out, pictures, save_state
from world import PAIRS

CHANNELS, LATENT = 32, 8
CROP, BATCH, STEPS, LR, WARMUP, EMA = 32, 16, 2200, 2e-3, 50, 0.995  # it is convolutional: crops teach as much as pictures, at a quarter of the cost
NOISE = 0.1  # on the latents (which have about unit scale), so that the decoder forgives the transformer's errors
EDGES = 1.0  # weight of the L1 loss on differences of neighbouring pixels, which keeps weave and lace sharp
TINT = 5.0  # weight of the L1 loss on 4 x 4 means: without it the third direction of color is learned last, after an hour
SPREAD = 1e-2  # weight of keeping latents near unit scale: AutoencoderTiny's decoder clamps them softly at 3
SAVE_SECONDS = 60


def new_vae():
    return AutoencoderTiny(encoder_block_out_channels=(CHANNELS,) * 3, decoder_block_out_channels=(CHANNELS,) * 3, num_encoder_blocks=(0, 1, 2),
                           num_decoder_blocks=(2, 1, 1), latent_channels=LATENT)


def to_tensor(pics):
    """(n, h, w, 3) uint8 -> (n, 3, h, w) float in -1..1."""
    return torch.from_numpy(np.array(pics)).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae, x, generator):
    """x (B, 3, h, w) in -1..1 -> loss."""
    z = vae.encoder(x)  # (B, 8, h / 4, w / 4)
    y = vae.decoder(z + NOISE * torch.randn(z.shape, generator=generator))
    edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
    tint = torch.nn.functional.avg_pool2d(y - x, 4).abs().mean()
    return (y - x).abs().mean() + (y - x).square().mean() + EDGES * edges + TINT * tint + SPREAD * z.square().mean()


def train_vae(build, steps=STEPS, seed=0):
    """Trains the autoencoder; exports the averaged weights to build/vae, with the latents' shift and scale in the config."""
    torch.manual_seed(seed)
    store, state_path, step = pictures(build), build / "vae-tiny.pt", 0
    vae = new_vae()
    ema = {name: value.clone() for name, value in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vae.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        ema, step = state["ema"], state["step"]
    bar, saved, mean = tqdm(total=steps, initial=step, desc="vae", mininterval=2), time.time(), None
    while step < steps:
        random_, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10 ** 9 + step)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        corners = random_.integers(0, 64 - CROP + 1, (BATCH, 2))
        crops = [store[random_.integers(len(PAIRS)), random_.integers(PER_KIND), a:a + CROP, b:b + CROP] for a, b in corners]
        loss = vae_loss(vae, to_tensor(np.stack(crops)).contiguous(memory_format=torch.channels_last), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        keep = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), list(vae.state_dict().values()), 1 - keep)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == steps:
            saved = time.time()
            save_state(state_path, dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), ema=ema, step=step))
    bar.close()
    export_vae(ema, store, build)


@torch.no_grad()
def export_vae(weights, store, build):
    """Writes build/vae in fp16 with shift and scale measured on 1,000 pictures, and build/vae.png: pictures beside their reconstructions."""
    vae = new_vae()
    vae.load_state_dict(weights)
    z = torch.cat([vae.encoder(to_tensor(pics)) for pics in np.array(store[:, :2])])
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    vae.half().save_pretrained(build / "vae")
    quiet_config(build / "vae/config.json")
    vae = AutoencoderTiny.from_pretrained(build / "vae").eval()
    pick = [i for i, p in enumerate(PAIRS) if p[0] == "texture"][3::7] + list(range(0, len(PAIRS), 17))
    x = to_tensor(np.stack([held_out(kind, 0) for kind in pick[:60]]))
    y = vae.decode(vae.encode(x).latents).sample.clamp(-1, 1)
    print(f"latents: mean {z.mean():.3f}, std {z.std():.3f}, largest {z.abs().max():.2f}; reconstruction of {len(x)} held-out pictures: "
          f"{(-10 * ((x - y) / 2).square().mean(dim=(1, 2, 3)).log10()).mean():.1f} dB PSNR")
    contact_sheet(torch.stack([x, y], 1).flatten(0, 1), build / "vae.png", 12)


def quiet_config(file):
    """Removes what AutoencoderTiny writes to its config and then warns about at every loading."""
    config = json.loads(file.read_text())
    config.pop("block_out_channels", None)
    file.write_text(json.dumps(config, indent=2))


def contact_sheet(x, path, columns):
    """x (n, 3, 64, 64) in -1..1 -> one PNG."""
    pics = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (columns * 66, -(-len(pics) // columns) * 66), "white")
    for i, pic in enumerate(pics):
        sheet.paste(Image.fromarray(pic), (i % columns * 66, i // columns * 66))
    sheet.save(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_vae(Path(__file__).resolve().parent.parent / "build")
