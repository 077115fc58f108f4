"""The frozen models: loading a VLM, a CLIP or a T5; the VLM's inputs, sampling and features."""
import math

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2VisionModel,
    CLIPVisionModel,
    T5ForConditionalGeneration,
)
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5LayerNorm

from common import (
    UserError,
    decoder_tensors,
    loading,
    part_weights,
    pretrained,
    pretrained_model,
    vision_tensors,
)

TOWERS = {"blip-2": Blip2VisionModel, "clip": CLIPVisionModel}


def feature_width(path):
    """d_vlm of a VLM; loads the config alone."""
    with loading(path):
        return AutoConfig.from_pretrained(path).get_text_config().hidden_size


# -------------------------------------------------------------------------------------------- T5
def save_memory(t5):
    """Replaces layers of a T5 by equal ones that keep less for the backward pass [ours].

    transformers' norm and GELU keep what each of their steps reads, the norm in fp32; on a GPU
    torch's keep their input. Computed: 0.22 GiB a full-size sample of 63 + 64 tokens, not 0.39."""
    for module in t5.modules():
        for name, child in module.named_children():
            if isinstance(child, T5LayerNorm):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
            elif name == "EncDecAttention":
                # of its zero position bias, which would be expanded to (B, heads, L, S)
                child.n_heads = 1
    return t5


def load_t5(path, device, dtype, offload=False):
    """A frozen T5ForConditionalGeneration in eval mode.

    offload: the encoder's layers stay in main memory, and each comes to the GPU to run."""
    t5 = pretrained_model(T5ForConditionalGeneration, path, dtype=dtype,
                          device_map="cpu" if offload else device)
    t5 = save_memory(t5).requires_grad_(False).eval()
    if offload:
        # not installed everywhere (prepare_data.py --backend vllm)
        from accelerate import cpu_offload
        blocks, t5.encoder.block = t5.encoder.block, None
        # pinned memory crosses to the GPU at the bus's full rate
        for weight in blocks.parameters():
            weight.data = weight.data.pin_memory()
        t5.to(device).encoder.block = cpu_offload(blocks, device)
    return t5


def load_t5_decoder(path, device, dtype):
    """load_t5 without the encoder's blocks: decoder, lm_head and the encoder's final norm.

    Half of the memory; of a sharded checkpoint only the shards that hold them are fetched."""
    config = pretrained(AutoConfig, path)
    # of the encoder; num_decoder_layers stays
    config.num_layers = 0
    weights = part_weights(path, decoder_tensors)
    t5 = pretrained_model(T5ForConditionalGeneration, path, config=config, state_dict=weights,
                          dtype=dtype, device_map=device)
    return save_memory(t5).requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------ CLIP
def vision_tower(path):
    """(class, config) of the vision tower of a BLIP-2 (EVA-CLIP ViT-g/14) or of a CLIP."""
    config = pretrained(AutoConfig, path)
    if config.model_type not in TOWERS:
        raise UserError(f"{path} is a {config.model_type}, not a BLIP-2 or a CLIP: give a model "
                        "with one of their vision towers")
    return TOWERS[config.model_type], config.vision_config


def load_clip(path, device, dtype):
    """The frozen vision tower; only the shards that hold it are fetched and read.

    Raises UserError if a weight is missing."""
    tower, config = vision_tower(path)
    weights = part_weights(path, vision_tensors)
    clip = pretrained_model(tower, path, config=config, state_dict=weights, dtype=dtype,
                            device_map=device, key_mapping={r"^vision_model\.": ""})
    return clip.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------- VLM
def load_vlm(path, device, dtype, **options):
    """(model, processor) of a frozen Qwen2-VL, Qwen2.5-VL or Qwen3-VL, from a folder or the hub.

    options: of from_pretrained. Raises UserError for another model or missing weights."""
    model = pretrained_model(AutoModelForImageTextToText, path, dtype=dtype, device_map=device,
                             **options)
    if not hasattr(getattr(getattr(model, "model", None), "language_model", None), "norm"):
        kind = model.config.model_type
        raise UserError(f"{path} is a {kind}: give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    with loading(path):
        processor = AutoProcessor.from_pretrained(path)
        # generation continues at the right end of each row
        processor.tokenizer.padding_side = "left"
        model = model.eval().requires_grad_(False)
        # some damage to templates and configs shows only in use
        content = [{"type": "image", "image": Image.new("RGB", (64, 64))}]
        inputs = encode_messages(processor, [[{"role": "user", "content": content}]])
        model.generate(**inputs.to(device), max_new_tokens=1, do_sample=False)
    return model, processor


def encode_messages(processor, conversations, longest=math.inf, number_images=False):
    """The VLM's inputs for B conversations of any length, left-padded to P tokens.

    number_images: "Picture 1: " before the first image, and so on, where the chat template can.
    Raises UserError for texts that hold a token of the chat's format, or if P > longest."""
    options = {"add_vision_id": True} if number_images else {}
    texts = [processor.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **options) for chat in conversations]
    contents = [message["content"] for chat in conversations for message in chat
                if not isinstance(message["content"], str)]
    # joined, as parts of a token could stand in two texts
    said = "\n".join("".join(part["text"] for part in content if part["type"] == "text")
                     for content in contents)
    for token in processor.tokenizer.all_special_tokens:
        if token in said:
            raise UserError(f"a text holds {token}, which the VLM does not read as text")
    images = [part["image"] for content in contents for part in content if part["type"] == "image"]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    n_tokens = inputs["input_ids"].shape[1]
    if n_tokens > longest:
        raise UserError(f"it is {n_tokens} tokens long, but the VLM has room for {longest} besides "
                        "an answer of --max-new-tokens")
    return inputs


def join_inputs(inputs, pad_token, device):
    """The inputs of B conversations, left-padded to P tokens, from encode_messages' of each one."""
    joined = {}
    for name in inputs[0]:
        parts = [x[name].to(device) for x in inputs]
        if name in ("pixel_values", "image_grid_thw"):
            joined[name] = torch.cat(parts)
            continue
        padding = pad_token if name == "input_ids" else 0
        joined[name] = pad_sequence([part[0] for part in parts], batch_first=True,
                                    padding_value=padding, padding_side="left")  # (B, P)
    return joined


class NucleusSampler(transformers.LogitsProcessor):
    """Sampling in which each of the B rows has a seed of its own, for model.generate.

    So an answer does not depend on the rest of its batch, up to rounding. One uniform number
    decides a token: the logits (B, V) become -inf everywhere but at the sampled one."""

    def __init__(self, input_ids, max_new_tokens, temperature, top_p, seeds):
        batch, self.prompt_length = input_ids.shape
        seeds = seeds or torch.randint(2**62, (batch,)).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators])
        self.uniform = uniform.to(input_ids.device)  # (B, N)
        # in fp32 a smaller one is 0, and 0 / 0 no number
        self.temperature, self.top_p = max(temperature, 1e-30), top_p

    def __call__(self, input_ids, logits):
        probs = (logits.float() / self.temperature).softmax(-1)
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = probs.cumsum(-1) - probs  # (B, V): of the likelier tokens
        nucleus = torch.where(mass_before < self.top_p, probs, 0).sum(-1, keepdim=True)  # (B, 1)
        u = self.uniform[:, input_ids.shape[1] - self.prompt_length, None]  # (B, 1)
        rank = (mass_before <= u * nucleus).sum(-1, keepdim=True) - 1  # (B, 1)
        return torch.full_like(logits, -torch.inf).scatter(-1, order.gather(-1, rank), 0)


@torch.no_grad()
def teacher_forced_features(model, inputs, y):
    """The features x (B, N, d_vlm) of known answers y (B, N) in one forward pass of the VLM.

    The same states as those of thinkdiff_lvlm.generate_with_features, up to rounding."""
    # y_N predicts nothing that is needed
    added = y[:, :-1]
    appended = {"input_ids": added, "attention_mask": torch.ones_like(added),
                "mm_token_type_ids": torch.zeros_like(added)}
    longer = {name: torch.cat([inputs[name], tokens], dim=1) for name, tokens in appended.items()}
    states = model.model(**{**inputs, **longer}, use_cache=False).last_hidden_state
    # positions P-1 .. P+N-2 of prompt and answer
    return states[:, -y.shape[1]:]


@torch.no_grad()
def log_likelihoods(model, processor, chats, answers):
    """log p(answer | chat) by the VLM for B chats and B texts: [float]."""
    scores = []
    for chat, answer in zip(chats, answers, strict=True):
        inputs = encode_messages(processor, [chat]).to(model.device, model.dtype)
        y = processor.tokenizer(answer, return_tensors="pt").input_ids.to(model.device)  # (1, N)
        logits = model.lm_head(teacher_forced_features(model, inputs, y))  # (1, N, V)
        scores.append(-F.cross_entropy(logits[0].float(), y[0], reduction="sum").item())
    return scores


@torch.no_grad()
def prompt_features(model, inputs):
    """Table 3's ablation: the final states of the prompts' own tokens, a list of (P_i, d_vlm)."""
    states = model.model(**inputs, use_cache=False).last_hidden_state
    masks = inputs["attention_mask"].bool()
    return [state[mask] for state, mask in zip(states, masks, strict=True)]


def load_for_recomputing(data, args, device, dtype):
    """(VLM, id of its padding token) for --tokens-only data, whose samples then hold the VLM's
    inputs, made by the threads that read them; None for data with features."""
    if not data.meta["tokens_only"]:
        return None
    model, processor = load_vlm(args.vlm, device, dtype)
    messages = data.messages
    data.messages = lambda *of: encode_messages(processor, [messages(*of)]).to(dtype)
    return model, processor.tokenizer.pad_token_id


def recompute_features(vlm, samples, args):
    """Of --tokens-only data: [(position, inputs, y)] -> [(position, x (N, d_vlm), y)]."""
    model, pad_token = vlm
    recomputed = []
    for start in range(0, len(samples), args.micro_batch):
        group = samples[start:start + args.micro_batch]
        positions, inputs, ys = zip(*group, strict=True)
        inputs = join_inputs(inputs, pad_token, model.device)
        if args.features == "input":
            x = prompt_features(model, inputs)
        else:
            x = teacher_forced_features(model, inputs, torch.stack(ys).to(model.device))
        recomputed += zip(positions, (x_i.bfloat16() for x_i in x), ys, strict=True)
    return recomputed
