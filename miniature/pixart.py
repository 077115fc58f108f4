"""The miniature PixArt-Sigma: a second decoder that reads T5, on FLUX's latents and texts.

    torchrun --nproc_per_node 2 -m miniature.pixart   # a step of: python -m miniature train
"""
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from miniature import flux
from miniature.pictures import training_folders
from miniature.vae import LATENT_CHANNELS

# ---------------------------------------------------------------- hyperparameters
# of 32 numbers each
HEADS = 4
# as many as FLUX has
BLOCKS = 6
# factors of the text projection's two weights at the start: with them its outputs have an RMS of
# 1, with diffusers' own start 0.04, and then a text's tokens all get almost the same attention
PROJECTION_GAINS = 7.0, 2.7
# latents are 16 x 16
SIDE = 16
STEPS = 5000
# mean of logit t in training (FLUX: 0). What the text decides shows most where there is much noise
T_MEAN = 0.7
# of the blocks' matrices; with FLUX's rate the loss falls more slowly from the first steps on
MUON_LR = 6e-3


def new_pixart(d_t5):
    """An untrained transformer. Its text tokens are only attended to, and may be masked."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=32, num_layers=BLOCKS,
        cross_attention_dim=32 * HEADS, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        sample_size=SIDE, patch_size=2, caption_channels=d_t5, use_additional_conditions=False)
    projection = transformer.caption_projection
    for linear, gain in zip((projection.linear_1, projection.linear_2), PROJECTION_GAINS,
                            strict=True):
        linear.weight.data *= gain
        linear.bias.data.zero_()
    return transformer


def velocity(transformer, x_t, t, condition):
    """PixArt's output for packed latents x_t (B, 64, 32) at t (B,) in 0..1: (B, 64, 32)."""
    text, mask, _ = condition
    # FLUX's packing is undone: (B, 8, 16, 16)
    latents = FluxPipeline._unpack_latents(x_t, 2 * SIDE, 2 * SIDE, 2)
    output = transformer(
        latents, encoder_hidden_states=text, encoder_attention_mask=mask.long(), timestep=1000 * t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample
    return flux.pack(output)


def train(build, weights, seed, steps=STEPS):
    """Trains the transformer (resumable) and writes the whole pipeline to weights/pixart."""
    vae = AutoencoderTiny.load_config(build / "vae")
    # FLUX subtracts it from the latents, PixArt does not
    mean = vae["shift_factor"] * vae["scaling_factor"]
    flux.train_transformer("pixart", new_pixart, velocity, assemble, build, weights, seed, steps,
                           masked=True, mean=mean, muon_lr=MUON_LR, t_mean=T_MEAN)


def assemble(build, weights):
    """Writes the whole pipeline to weights/pixart, in fp16."""
    tokenizer, encoder = flux.load_t5(weights)
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder,
        vae=AutoencoderTiny.from_pretrained(build / "vae"),
        transformer=PixArtTransformer2DModel.from_pretrained(build / "pixart"),
        # no shift, as FLUX
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0))
    flux.save_pipeline(pipe, weights / "pixart")


# ---------------------------------------------------------------- command line
if __name__ == "__main__":
    train(*training_folders(__doc__))
