"""Full size without the weights: each model's true architecture, with random weights on a GPU or
with fake ones, which have shapes and no memory, and a meter of what a step costs.

A simulated step is the real code on a CPU. Operations on fake tensors compute nothing; those on
real ones (token ids, positions, schedules) do, so that what depends on their values goes its way.
Left out are CUDA's context, workspaces of its kernels and the allocator's fragments.
"""
import startup

import contextlib
import copy
import gc
import weakref
import zlib
from functools import partial
from unittest import mock

import accelerate
import diffusers
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.initialization import no_init_weights

import models
import pipelines
from common import MINI, pretrained

# ------------------------------- full size: the numbers of each model's config.json on the hub
# google/flan-t5-xxl and t5-v1_1-xxl
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_decoder_layers=24,
    num_heads=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    decoder_start_token_id=0)
# Qwen/Qwen2-VL-7B-Instruct; the vision tower's are the defaults of transformers
QWEN2_VL_7B = dict(vision_config=dict(), text_config=dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])))
# the vision tower of Salesforce/blip2-flan-t5-xxl: the defaults of transformers
EVA_CLIP_G = dict()
# black-forest-labs/FLUX.1-dev; the transformer's other numbers are the defaults of diffusers
FLUX_DEV = dict(joint_attention_dim=4096, guidance_embeds=True)
FLUX_VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16,
    scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
FLUX_CLIP = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    eos_token_id=2)
FLUX_SCHEDULER = dict(base_shift=0.5, max_shift=1.15, shift=3.0, use_dynamic_shifting=True)
# THUDM/CogVideoX-5b
COGVIDEOX = dict(
    num_attention_heads=48, num_layers=42, sample_frames=49, use_rotary_positional_embeddings=True)
COGVIDEOX_VAE = dict(scaling_factor=0.7)
# PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, stabilityai/stable-diffusion-3.5-medium,
# lodestones/Chroma1-HD, Lightricks/LTX-Video; other numbers are the defaults of diffusers
PIXART = dict(caption_channels=4096, interpolation_scale=2, use_additional_conditions=False)
PIXART_VAE = {**FLUX_VAE, "latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None}
SD3_MEDIUM = dict(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, out_channels=16,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
SD3_CLIP_L = {**FLUX_CLIP, "projection_dim": 768}
SD3_CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280, eos_token_id=2)
CHROMA, LTX, LTX_VAE = {}, dict(caption_channels=4096), {}
# llava-hf/llava-1.5-13b-hf; the vision tower's are the defaults of transformers
LLAVA_13B = dict(text_config=dict(
    model_type="llama", vocab_size=32064, hidden_size=5120, intermediate_size=13824,
    num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40))


# ------------------------------ models: the miniature's, or at full size with random weights
@torch.no_grad()
def random_model(kind, config, args, dtype=None, attention=None):
    """A frozen model of class `kind` on args.device, with random weights; fake ones if args.fake.

    They depend on their names alone: ours and the baseline have the same ones. Matrices have a
    standard deviation of fan_in ** -0.5, so that no layer blows up; norms are 1, biases 0."""
    is_transformer, dtype = issubclass(kind, transformers.PreTrainedModel), dtype or args.dtype
    torch.set_default_dtype(dtype)
    try:
        with args.device, args.fake or contextlib.nullcontext(), no_init_weights():
            if is_transformer:
                model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
            else:
                model = kind(**config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    if is_transformer:
        model.tie_weights()
    # transformers ties the lm_head of a new T5, the checkpoints have one of its own
    if kind is T5ForConditionalGeneration:
        lm_head = torch.empty_like(model.shared.weight)
        model.lm_head.weight = torch.nn.Parameter(lm_head, requires_grad=False)
    for name, weight in model.named_parameters() if not args.fake else ():
        if weight.ndim == 1:
            weight.fill_(0 if name.endswith("bias") else 1)
        else:
            g = torch.Generator(args.device).manual_seed(zlib.crc32(name.encode()))
            # T5's weights of q include the 1 / sqrt(64) of its attention
            scale = weight[0].numel() ** -0.5 / (8 if name.endswith(".q.weight") else 1)
            weight.copy_(torch.randn(weight.shape, generator=g, device=args.device) * scale)
    return model


def model_for(args, ours, load, path, kind, config):
    """load(path) or a random model; ours: args.dtype, sdpa; the baseline's: fp32, eager."""
    dtype, attention = (args.dtype, "sdpa") if ours else (torch.float32, "eager")
    if args.size == "full":
        return random_model(kind, config, args, dtype, attention)
    model = load(path, args.device, dtype)
    model.set_attn_implementation(attention)
    return model


def stock_t5(path, device, dtype):
    """T5 as transformers loads it."""
    t5 = pretrained(T5ForConditionalGeneration, path, dtype=dtype)
    return t5.requires_grad_(False).to(device)


def t5_for(args, ours=True, encoder=False):
    """T5, with or without its encoder's blocks."""
    load = (models.load_t5 if encoder else models.load_t5_decoder) if ours else stock_t5
    config = T5Config(**T5_XXL if encoder else {**T5_XXL, "num_layers": 0})
    t5 = model_for(args, ours, load, MINI["t5"], T5ForConditionalGeneration, config)
    return models.save_memory(t5) if ours and args.size == "full" else t5


def clip_for(args, ours=True):
    """The vision tower of ThinkDiff-CLIP."""
    config = transformers.Blip2VisionConfig(**EVA_CLIP_G)
    kind = transformers.Blip2VisionModel
    return model_for(args, ours, models.load_clip, MINI["clip"], kind, config)


def vlm_config(args):
    """The config of the VLM, a Qwen2-VL."""
    if args.size == "mini":
        return pretrained(transformers.Qwen2VLConfig, MINI["vlm"])
    # a copy, as it changes what it is given
    return transformers.Qwen2VLConfig(**copy.deepcopy(QWEN2_VL_7B))


def vlm_for(args, quantize=False):
    """The VLM."""
    if args.size == "mini":
        options = pipelines.int8(quantize)
        return models.load_vlm(MINI["vlm"], args.device, args.dtype, **options)[0]
    kind = transformers.Qwen2VLForConditionalGeneration
    vlm = random_model(kind, vlm_config(args), args)
    if quantize:
        # all but lm_head, as loading does it
        quantize_weights(vlm.model)
    return vlm


def flux_for(args, t5_encoder=False, quantize=False, **options):
    """FluxPipeline as load_flux leaves it."""
    if args.size == "mini":
        return pipelines.load_flux(
            MINI["flux"], args.device, args.dtype, t5_encoder, quantize=quantize, **options)
    new = partial(random_model, args=args)
    t5 = new(transformers.T5EncoderModel, T5Config(**T5_XXL)) if t5_encoder else None
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=new(diffusers.AutoencoderKL, FLUX_VAE),
        transformer=new(diffusers.FluxTransformer2DModel, FLUX_DEV),
        text_encoder=new(transformers.CLIPTextModel, transformers.CLIPTextConfig(**FLUX_CLIP)),
        # any tokenizer will do for the empty text
        tokenizer=AutoTokenizer.from_pretrained(f"{MINI['flux']}/tokenizer"),
        text_encoder_2=t5, tokenizer_2=None)
    return finish(pipe, args, quantize, options)


def decoder_for(name, args, quantize=False, **options):
    """A pipeline other than FLUX's as load_decoder leaves it, at full size."""
    new = partial(random_model, args=args)
    t5 = new(transformers.T5EncoderModel, T5Config(**T5_XXL))
    # any tokenizer will do
    tokenizers = [AutoTokenizer.from_pretrained(path)
                  for path in (MINI["t5"], f"{MINI['flux']}/tokenizer")]
    parts = {"tokenizer": tokenizers[0], "text_encoder": t5,
             "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    if name == "sd3":
        kind = transformers.CLIPTextModelWithProjection
        clip_l, clip_g = (new(kind, transformers.CLIPTextConfig(**config))
                          for config in (SD3_CLIP_L, SD3_CLIP_G))
        parts |= {"tokenizer": tokenizers[1], "text_encoder": clip_l, "text_encoder_2": clip_g,
                  "tokenizer_2": tokenizers[1], "text_encoder_3": t5, "tokenizer_3": tokenizers[0]}
    schedulers = {"pixart": diffusers.DPMSolverMultistepScheduler,
                  "cogvideox": diffusers.CogVideoXDDIMScheduler}
    if name in schedulers:
        parts["scheduler"] = schedulers[name]()
    transformer, config, vae, vae_config = {
        "pixart": (diffusers.PixArtTransformer2DModel, PIXART, diffusers.AutoencoderKL, PIXART_VAE),
        "sd3": (diffusers.SD3Transformer2DModel, SD3_MEDIUM, diffusers.AutoencoderKL, FLUX_VAE),
        "chroma": (diffusers.ChromaTransformer2DModel, CHROMA, diffusers.AutoencoderKL, FLUX_VAE),
        "cogvideox": (diffusers.CogVideoXTransformer3DModel, COGVIDEOX,
                      diffusers.AutoencoderKLCogVideoX, COGVIDEOX_VAE),
        "ltx": (diffusers.LTXVideoTransformer3DModel, LTX,
                diffusers.AutoencoderKLLTXVideo, LTX_VAE)}[name]
    pipe = getattr(diffusers, pipelines.PIPELINES[name])(
        transformer=new(transformer, config), vae=new(vae, vae_config), **parts)
    return finish(pipe, args, quantize, options)


def judge_for(args):
    """CoBSAT's judge, LLaVA-1.5-13B."""
    config = transformers.LlavaConfig(**copy.deepcopy(LLAVA_13B))
    return random_model(transformers.LlavaForConditionalGeneration, config, args)


def finish(pipe, args, quantize, options):
    """What loading does to a pipeline. options: of speed_up."""
    pipe.set_progress_bar_config(disable=True)
    if quantize:
        for part in pipe.components.values():
            if part is pipe.transformer or isinstance(part, transformers.T5EncoderModel):
                quantize_weights(part)
    return pipelines.speed_up(pipe, args.device, **options)


def quantize_weights(model):
    """Does what loading with a TorchAoConfig does to a model's matrices."""
    from torchao.quantization import quantize_
    quantize_(model, pipelines.int8_weights())


def weight_bytes(*modules):
    """Bytes of the parameters, quantized ones too."""
    weights = [p for module in modules for p in module.parameters()]
    return sum(getattr(w, name).nbytes if name else w.nbytes for w in weights for name in
               (w.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(w) else [None]))


# -------------------------------------------------------------------------- the simulated device
# FLOP/s of dense matrix products in bf16 and in fp32 (no TF32), bytes/s: the vendor's data sheets
DEVICES = {
    "H100": (989.4e12, 66.9e12, 3.35e12),
    "A100": (312e12, 19.5e12, 2.039e12),
    "RTX 4090": (165.2e12, 82.6e12, 1.008e12),
}
PLAIN = (torch.Tensor, torch.nn.Parameter)
aten = torch.ops.aten
# torch's counter knows the kernels of GPUs only
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop


class Meter(TorchDispatchMode):
    """While it is active: `live` bytes of the tensors made and not yet freed, their `peak`, the
    FLOPs of matrix products, convolutions and attention, and the `seconds` on each of DEVICES if
    an operation takes the larger of FLOPs / peak and bytes / bandwidth, and no time else."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.loaded = {}, 0, 0
        self.start()

    def start(self):
        """Forgets all but the tensors that are alive."""
        self.peak, self.flops, self.seconds = self.live, 0, dict.fromkeys(DEVICES, 0.0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # quantized weights are taken apart first
        if not all(issubclass(kind, FakeTensor) or kind in PLAIN for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.ops.prim.device.default:
            return result
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in made:
            self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        packet, flops = function.overloadpacket, 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            self.flops += flops
        if function.is_view or packet is aten._unsafe_view:
            return result
        # of a table only the rows that are looked up
        moved = made * 2 if packet is aten.embedding else made + read
        n_bytes = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in moved)
        is_fp32 = made and made[0].dtype == torch.float32
        for name, (bf16, fp32, bandwidth) in DEVICES.items():
            self.seconds[name] += max(flops / (fp32 if is_fp32 else bf16), n_bytes / bandwidth)
        return result

    def add(self, storage):
        """Counts a storage that is new, until nothing refers to it."""
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self.remove, key).atexit = False

    def remove(self, key):
        """Ends it."""
        self.live -= self.sizes.pop(key)

    def offload(self, parts):
        """Counts each part, a module, only from its use until the next one's."""
        def load(module, *args, **kwargs):
            self.live += weight_bytes(module) - self.loaded
            self.loaded = weight_bytes(module)
            return args, kwargs

        for part in parts:
            self.live -= weight_bytes(part)
            hook = ModelHook()
            hook.pre_forward = load
            add_hook_to_module(part, hook)
        return parts


# CUDA's products take bf16 and give fp32; for a CPU's, the loss copies lm_head in fp32
cuda_loss_options = partial(torch.nn.LinearCrossEntropyOptions, acc_dtype=torch.bfloat16)


def cuda_norm(module, x, forward=torch.nn.RMSNorm.forward):
    """RMSNorm as CUDA runs it: in one kernel, unless the weight is of another dtype."""
    fused = x.dtype == module.weight.dtype
    return FusedNorm.apply(x, module.weight) if fused else forward(module, x)


class FusedNorm(torch.autograd.Function):
    """What CUDA's kernels of RMSNorm read, write and keep, of fake tensors."""

    @staticmethod
    def forward(ctx, x, weight):
        # a factor for each row
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.saved_tensors[0], None


def simulate(build):
    """The figures of a step of build(), a Job whose models have fake weights: {"weights_gb",
    "peak_gb", "tflop", NAME of DEVICES: ms}."""
    def offload(pipe, device):
        meter.offload([part for part in pipe.components.values()
                       if isinstance(part, torch.nn.Module)])

    patch = mock.patch.object
    with (Meter() as meter,
          # fake weights cannot be moved, nor can their images be looked at
          patch(torch.nn.Module, "_apply", lambda module, *_, **__: module),
          patch(VaeImageProcessor, "postprocess", lambda _, images, **__: images),
          patch(VideoProcessor, "postprocess_video", lambda _, video, **__: video),
          patch(torch.nn.RMSNorm, "forward", cuda_norm),
          patch(torch.nn, "LinearCrossEntropyOptions", cuda_loss_options),
          patch(diffusers.DiffusionPipeline, "enable_model_cpu_offload", offload),
          patch(accelerate, "cpu_offload", lambda blocks, device: meter.offload(blocks))):
        job = build()
        gc.collect()
        meter.start()
        weights = meter.live
        job.step()
    return {"weights_gb": weights / 1e9, "peak_gb": meter.peak / 1e9,
            "tflop": meter.flops / 1e12,
            **{name: seconds * 1e3 for name, seconds in meter.seconds.items()}}
