"""Stock models and pipelines, called directly: what the command lines are compared with."""
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPModel,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from common import MINI
from thinkdiff_lvlm import INSTRUCTION


def pixels(path):
    """A picture file as numbers (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# ---------------------------------------------------------------- Eq. 1
def eq1(weights, x):
    """The aligner by hand, with the norm of transformers' T5. x (n, d_vlm) -> (n, d_t5)."""
    hidden = F.gelu(F.linear(x, weights["0.weight"], weights["0.bias"]))  # (n, hidden)
    norm = T5LayerNorm(len(weights["3.weight"]))
    norm.weight.data = weights["3.weight"]
    return norm(F.linear(hidden, weights["2.weight"], weights["2.bias"])).detach()


def aligner_weights(folder):
    """The weights that `train` has left in a folder, under the names of the released files."""
    stored = load_file(f"{folder}/model.safetensors")
    return {name.removeprefix("net."): weight for name, weight in stored.items()}


def released(d_vlm, d_t5, prefix="", dtype=torch.float32):
    """({name: weight} in fp32, what torch.load reads in a .pth of the authors' training)."""
    shapes = {"0.weight": (d_t5, d_vlm), "0.bias": (d_t5,), "2.weight": (d_t5, d_t5),
              "2.bias": (d_t5,), "3.weight": (d_t5,)}
    weights = {name: (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)
               for name, shape in shapes.items()}
    weights["3.weight"] = (torch.rand(d_t5) * 0.2).to(dtype)
    state = {"model": {f"{prefix}mm_projector.{name}": w for name, w in weights.items()},
             "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
             "config": {"run": {"batch_size_train": 24}}, "scaler": {"scale": 65536.0}, "epoch": 0}
    return {name: weight.float() for name, weight in weights.items()}, state


# ---------------------------------------------------------------- Qwen2-VL and CLIP
def load_vlm(path):
    """(model, processor) in float32."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(path)


def vlm_inputs(processor, parts, instruction=INSTRUCTION):
    """The chat of a context, spelled out; parts are texts and PIL images."""
    see = "<|vision_start|><|image_pad|><|vision_end|>"
    said = "".join(part if isinstance(part, str) else see for part in parts)
    gap = "\n\n" if instruction else ""
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{instruction}{gap}{said}<|im_end|>\n<|im_start|>assistant\n")
    images = [part for part in parts if not isinstance(part, str)]
    return processor(text=[text], images=images or None, return_tensors="pt")


@torch.no_grad()
def prompt_states(vlm, parts):
    """The final states (P, d_vlm) of the chat itself."""
    return vlm[0].model(**vlm_inputs(vlm[1], parts)).last_hidden_state[0]


@torch.no_grad()
def answer(vlm, parts, tokens=128, instruction=INSTRUCTION, **sampling):
    """The states (n, d_vlm) that predict the answer's tokens, its words, and whether EOS ended it.

    EOS is neither among the states nor among the words. sampling: sample()'s; none: greedy."""
    model, processor = vlm
    inputs = vlm_inputs(processor, parts, instruction)
    if sampling:
        x, y = sample(model, inputs, tokens, **sampling)
    else:
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False,
                             output_hidden_states=True, return_dict_in_generate=True)
        y = out.sequences[0, inputs["input_ids"].shape[1]:]  # (n,), with EOS (n + 1,)
        x = torch.stack([step[-1][0, -1] for step in out.hidden_states])  # as long as y
    ended = bool(y[-1] == model.generation_config.eos_token_id)
    n = len(y) - ended
    return x[:n], processor.tokenizer.decode(y[:n]), ended


@torch.no_grad()
def sample(model, inputs, tokens, seed=0, temperature=1.0, top_p=0.9, ignore_eos=False):
    """(states (n, d_vlm), tokens (n,)) up to EOS, each from a pass over the whole sequence.

    Each token takes one uniform number, a share of the nucleus of the sorted probabilities; with
    top_p 0 it is the likeliest one."""
    states, y = [], []
    for share in torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).tolist():
        states.append(model.model(**inputs, use_cache=False).last_hidden_state[0, -1])  # (d_vlm,)
        logits = model.lm_head(states[-1]).double()  # (V,)
        logits[[model.config.image_token_id, model.config.video_token_id]] = -torch.inf
        p = (logits / temperature).softmax(0).numpy()  # (V,)
        order = np.argsort(-p, kind="stable")
        sums = np.cumsum(p[order])
        # the fewest tokens whose probabilities reach top_p
        nucleus = sums[:np.searchsorted(sums, top_p) + 1]
        y.append(int(order[np.searchsorted(nucleus, share * nucleus[-1], side="right")]))
        if y[-1] == model.generation_config.eos_token_id and not ignore_eos:
            break
        for name, value in (("input_ids", y[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = F.pad(inputs[name], (0, 1), value=value)  # (1, P + 1)
    return torch.stack(states), torch.tensor(y)


def cobsat_parts(words, paths):
    """The context of a CoBSAT prompt: words with pictures, and the word to be drawn."""
    parts = []
    for n, (word, path) in enumerate(zip(words, paths, strict=False), 1):
        before = "\n\n" if n > 1 else ""
        parts += [f"{before}Word {n}: {word}, ", Image.open(path).convert("RGB")]
    return [*parts, f"\n\nWord {len(words)}: {words[-1]}, "]


@torch.no_grad()
def clip_tokens(path):
    """What the mini's CLIP sees in a picture: CLS and the means of 2 x 2 patches. (17, d_vlm)"""
    tower = CLIPModel.from_pretrained(MINI["clip"], dtype=torch.float32).vision_model
    processor = CLIPImageProcessor.from_pretrained(MINI["clip"])
    inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt")
    x = tower.post_layernorm(tower(**inputs).last_hidden_state)[0]  # (65, d_vlm)
    patches = x[1:].reshape(4, 2, 4, 2, -1).mean((1, 3)).flatten(0, 1)  # (16, d_vlm)
    return torch.cat([x[:1], patches])


# ---------------------------------------------------------------- FLUX
def save_guided_flux(folder):
    """The miniature's pipeline with a transformer that reads the guidance, as FLUX.1-dev's does."""
    trained = FluxTransformer2DModel.from_pretrained(f"{MINI['flux']}/transformer")
    torch.manual_seed(0)
    guided = FluxTransformer2DModel.from_config({**trained.config, "guidance_embeds": True})
    missing, unexpected = guided.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected and all("guidance_embedder" in name for name in missing)
    FluxPipeline.from_pretrained(MINI["flux"], transformer=guided).save_pretrained(folder)
    return folder


def load_flux(path):
    """The stock pipeline."""
    pipe = FluxPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_prompt(pipe, text, length):
    """What the pipeline's own T5 encoder makes of a text. (length, d_t5)"""
    return pipe.encode_prompt("", text, max_sequence_length=length)[0][0].detach()


@torch.no_grad()
def picture(pipe, prompt, text="", seed=0, size=64, steps=2, guidance=3.5, true_cfg=1.0,
            cache=None):
    """What the stock pipeline draws from a prompt (N, d_t5), as numbers (size, size, 3)."""
    pooled = pipe.encode_prompt(text, None, max_sequence_length=8)[1]
    empty, empty_pooled, _ = pipe.encode_prompt("", None, max_sequence_length=len(prompt))
    if cache:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=cache))
    drawn = pipe(
        prompt_embeds=prompt[None], pooled_prompt_embeds=pooled, height=size, width=size,
        num_inference_steps=steps, guidance_scale=guidance, true_cfg_scale=true_cfg,
        negative_prompt_embeds=empty, negative_pooled_prompt_embeds=empty_pooled,
        generator=torch.Generator().manual_seed(seed))
    pipe.transformer.disable_cache()
    return np.asarray(drawn.images[0]).astype(int)
