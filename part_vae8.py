"""The miniature's autoencoder: `AutoencoderKL` with the real FLUX's proportions, 64 x 64 pictures -> 8 x 8 latents of 16 channels.

    python part_vae8.py --build build/eight     # twelve minutes; goes on after a kill
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from part_pictures import PER_KIND, held_out, pictures, save_state
from world import PAIRS

SAVE_SECONDS = 120


def progress_lr(progress, step, warmup, decay):
    """Share of the full learning rate: linear warm-up by step, constant, linear to 0 over the last `decay` of the run."""
    return min(1, (step + 1) / warmup) * min(1, max(0, 1 - progress) / decay)


@torch.no_grad()
def update_ema(ema, model, step, most):
    keep = min(most, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - keep)


def export(model_class, config, weights, folder):
    """Writes a diffusers model with these weights, in fp16, file by file: a reader finds each file whole."""
    model = model_class.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict(weights)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.half().save_pretrained(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for file in fresh.iterdir():
        os.replace(file, folder / file.name)
    fresh.rmdir()


# ---------------------------------------------------------------- optimiser
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in fp32 and on stacks of matrices of one shape; torch.optim.Muon works in bf16, which is slow on CPUs."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                x = torch.stack([torch.lerp(p.grad, self.state[p]["momentum"], group["momentum"]).flatten(1) for p in params])  # Nesterov
                x = x.mT if shape[0] > shape[1] else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values towards 1
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                x = x.mT if shape[0] > shape[1] else x
                for p, update in zip(params, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)  # AdamW's RMS


# ---------------------------------------------------------------- autoencoder
# 8x smaller, 16 channels as the real FLUX: 16 tokens of 64 numbers a picture. 4x would be 64 tokens and 2.5 times dearer for the transformer.
# Its encoder is principal components in closed form (nothing to train, and latents that are easy to predict); only the decoder is trained.
VAE_CHANNELS, VAE_LATENT = (8, 16, 32, 64), 16
VAE_STAGES = [(500, 32), (400, 16), (1500, 8)]  # (steps, batch): the decoder up to 16 x 16, up to 32 x 32, whole; early stages are cheap
VAE_LR, VAE_MUON, VAE_EMA = 3e-3, 2e-2, 0.99
VAE_NOISE = 0.15  # at most, on the latents (of standard deviation 1) while the decoder is trained: it must forgive the transformer's errors
EDGES = 1.0  # weight of the L1 loss on differences of neighbouring pixels, which keeps weave and lace sharp
CONSTANT = 300.0  # see linear_encoder


def to_tensor(pics):
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) float in -1..1."""
    return torch.from_numpy(np.array(pics)).permute(0, 3, 1, 2).float() / 127.5 - 1


def principal_maps(x):
    """Pictures (n, 3, 64, 64) -> three maps (c', c, 2, 2) of 2 x 2 blocks to their first c' components, and the last map (16, 31, 1, 1), (16,).

    The last one scales each component by its standard deviation to the power -1/2: half-way to equal variances.
    """
    maps = []
    for width in (*VAE_CHANNELS[:2], CODE):
        blocks = torch.nn.functional.pixel_unshuffle(x, 2).transpose(0, 1).flatten(1)  # (4 c, n h w)
        vectors = torch.linalg.eigh(blocks @ blocks.T / blocks.shape[1])[1].flip(1).T[:width]
        maps.append(vectors.unflatten(1, (-1, 2, 2)))
        x = torch.nn.functional.conv2d(x, maps[-1], stride=2)
    code = x.transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(code))
    last = vectors.flip(1).T[:VAE_LATENT] * values.flip(0)[:VAE_LATENT, None] ** -0.25
    return maps, last, -last @ code.mean(1)


CODE = VAE_CHANNELS[3] // 2 - 1  # numbers an 8 x 8 block is reduced to before the last map


def encode_fast(x, maps, last, shift):
    """What the autoencoder's encoder computes, without its idle layers: (n, 3, 64, 64) -> (n, 16, 8, 8)."""
    for weight in maps:
        x = torch.nn.functional.conv2d(x, weight, stride=2)
    return torch.nn.functional.conv2d(x, last[:, :, None, None], shift)


@torch.no_grad()
def new_vae(maps, last, shift):
    """An `AutoencoderKL` whose encoder computes encode_fast and whose decoder is to be trained.

    The residual branches are idle, the strided convolutions apply the maps. Before conv_out stand a group norm and a SiLU; they are made linear by
    doubling the code to (code, C, -code, -C): the big constant C fixes the norm's scale, and silu(a) - silu(-a) = a.
    """
    blocks = len(VAE_CHANNELS)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, block_out_channels=VAE_CHANNELS,
        layers_per_block=1, latent_channels=VAE_LATENT, norm_num_groups=1, sample_size=64, mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False)
    for name, p in vae.named_parameters():
        if name.endswith("conv2.weight"):  # the decoder's residual blocks too begin as the identity
            p.zero_()
        elif "upsamplers" in name and p.ndim == 4:  # and its upsampling as nearest neighbour
            torch.nn.init.dirac_(p)
        elif name.startswith("encoder") and "norm" not in name:
            p.zero_()
    encoder = vae.encoder
    torch.nn.init.dirac_(encoder.conv_in.weight)
    for i, weight in enumerate(maps):
        encoder.down_blocks[i].downsamplers[0].conv.weight[:len(weight), :weight.shape[1], :2, :2] = weight
        if i:
            torch.nn.init.dirac_(encoder.down_blocks[i].resnets[0].conv_shortcut.weight)
    half = CODE + 1
    double = encoder.down_blocks[3].resnets[0].conv_shortcut
    double.weight[:CODE, :CODE, 0, 0], double.weight[half:-1, :CODE, 0, 0] = torch.eye(CODE), -torch.eye(CODE)
    double.bias[CODE], double.bias[-1] = CONSTANT, -CONSTANT
    scale = CONSTANT * half ** -0.5  # what the norm divides by
    encoder.conv_out.weight[:VAE_LATENT, :CODE, 1, 1], encoder.conv_out.weight[:VAE_LATENT, half:-1, 1, 1] = last * scale, -last * scale
    encoder.conv_out.bias[:VAE_LATENT], encoder.conv_out.bias[VAE_LATENT:] = shift, -8.0  # posterior noise of e^-4
    return vae


def decode_to(decoder, heads, z, stage):
    """Latents (B, 16, 8, 8) -> pictures (B, 3, 64, 64); stages 0 and 1 leave the decoder at 16 x 16 or 32 x 32, each point giving its block of pixels."""
    h = decoder.mid_block(decoder.conv_in(z))
    for block in decoder.up_blocks[:stage + 1] if stage < 2 else decoder.up_blocks:
        h = block(h)
    if stage < 2:
        return torch.nn.functional.pixel_shuffle(heads[stage](h), 4 >> stage)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))


def train_vae(build, seed=0):
    """Sets the encoder, trains the decoder, exports the averaged weights to build/vae with the latents' shift and scale."""
    torch.manual_seed(seed)
    store, state_path = pictures(build), build / "vae.pt"
    sample = to_tensor(store[:, :6].reshape(-1, 64, 64, 3))
    maps = principal_maps(sample)
    z = encode_fast(sample, *maps)
    mean, std = z.mean().item(), z.std().item()
    vae = new_vae(*maps)
    decoder, heads = vae.decoder, torch.nn.ModuleList([torch.nn.Conv2d(VAE_CHANNELS[3], 48, 1), torch.nn.Conv2d(VAE_CHANNELS[2], 12, 1)])
    ema = {name: value.clone() for name, value in decoder.state_dict().items()}
    convs = [p for n, p in decoder.named_parameters() if p.ndim == 4 and n not in ("conv_in.weight", "conv_out.weight")]
    inside = set(map(id, convs))
    rest = [p for p in [*decoder.parameters(), *heads.parameters()] if id(p) not in inside]
    optimizers, rates = [torch.optim.AdamW(rest, lr=VAE_LR, betas=(0.9, 0.98), weight_decay=0.0, foreach=True), Muon(convs, lr=VAE_MUON)], [VAE_LR, VAE_MUON]
    step, total = 0, sum(steps for steps, _ in VAE_STAGES)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        decoder.load_state_dict(state["model"]), heads.load_state_dict(state["heads"])
        for optimizer, saved_one in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_one)
        ema, step = state["ema"], state["step"]
    saved, bar, shown_loss = time.time(), tqdm(total=total, initial=step, desc="vae", mininterval=2), None
    while step < total:
        first = [0, VAE_STAGES[0][0], VAE_STAGES[0][0] + VAE_STAGES[1][0]]
        stage = sum(step >= f for f in first) - 1
        batch = VAE_STAGES[stage][1]
        random_, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 10 ** 9 + step)
        x = to_tensor(store[random_.integers(0, len(PAIRS), batch), random_.integers(0, PER_KIND, batch)])
        z = encode_fast(x, *maps)
        z = z + std * VAE_NOISE * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(z.shape, generator=generator)
        y = decode_to(decoder, heads, z, stage)
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (y - x).abs().mean() + (y - x).square().mean() + EDGES * edges
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in [*decoder.parameters(), *heads.parameters()] if p.grad is not None], 1.0)
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * progress_lr(step / total, step - first[stage], 30, 0.5)
            optimizer.step(), optimizer.zero_grad()
        step += 1
        update_ema(ema, decoder, step, VAE_EMA)
        shown_loss = loss.item() if shown_loss is None else 0.97 * shown_loss + 0.03 * loss.item()
        bar.update()
        bar.set_postfix(stage=stage, loss=f"{shown_loss:.4f}", refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == total:
            saved = time.time()
            vae.decoder.eval()
            weights = {**vae.state_dict(), **{f"decoder.{name}": value for name, value in ema.items()}}
            export(AutoencoderKL, dict(vae.config) | dict(shift_factor=mean, scaling_factor=1 / std), weights, build / "vae")
            save_state(state_path, dict(model=decoder.state_dict(), heads=heads.state_dict(), optimizers=[one.state_dict() for one in optimizers],
                                        ema=ema, step=step))
    bar.close()
    reconstruct(build)


def reconstruct(build, count=60):
    """Writes build/vae.png, held-out pictures beside their reconstructions (textures first); prints their PSNR."""
    vae = AutoencoderKL.from_pretrained(build / "vae").eval()
    pick = [i for i, p in enumerate(PAIRS) if p[0] == "texture"][3::7] + list(range(0, len(PAIRS), 17))
    x = to_tensor(np.stack([held_out(kind, 0) for kind in pick[:count]]))
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    print(f"reconstruction of {len(x)} held-out pictures: {(-10 * mse.log10()).mean():.1f} dB PSNR")
    contact_sheet(torch.stack([x, y], 1).flatten(0, 1), build / "vae.png", 12)


def contact_sheet(x, path, columns):
    """x (n, 3, 64, 64) in -1..1 -> one PNG, at twice the size."""
    pics = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (columns * 66, -(-len(pics) // columns) * 66), "white")
    for i, pic in enumerate(pics):
        sheet.paste(Image.fromarray(pic), (i % columns * 66, i // columns * 66))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.NEAREST).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path(__file__).parent / "build")
    torch.set_num_threads(1)
    train_vae(parser.parse_args().build)
