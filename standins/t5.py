"""The miniature T5 and its tokenizer.

    python miniature.py train t5        # or, from the repository's root, python -m standins.t5
"""
import os
import random
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

import world

# ---------------------------------------------------------------- tokenizer
SENTINELS = 8  # <extra_id_i>, for span corruption
TASKS = ["copy", "rephrase", "label"]  # T5's "translate English to German: ", in words of this world
TYPED = """please photo drawing painting draw paint show make generate with without and or but of in on at by near next to
under over behind beside between two three one four five some many no not all it its is are was that this these which who what
where his her my your i you we they he she big small large little old new young bright dark light colorful realistic cute happy
sad sitting standing playing background foreground scene style texture material color action main object animal next word first""".split()


def vocabulary():
    """Every word of the captions and labels, with the words a user may type: sorted lower-case list."""
    rng, words = random.Random(0), set(TYPED + TASKS)
    for kind in world.PAIRS:
        for text in [world.label(*kind), " ".join(kind)] + [world.caption(rng, *kind, create=i % 2, sentences=4) for i in range(20)]:
            words.update(re.findall(r"[a-z0-9]+", text.lower()))
    return sorted(words)


def build_t5_tokenizer(out):
    """Writes a `T5Tokenizer` (Unigram) to the folder `out` and returns it: one token per known word, letters for the rest.

    Known words are tokens in lower case and with a capital: `T5Tokenizer` drops a lower-casing normalizer when it is loaded.
    """
    words, chars = vocabulary(), "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    pieces += [(p, -1.0) for w in words for p in dict.fromkeys(["▁" + w, "▁" + w.capitalize()])]
    pieces += [(p, -1.0) for p in ".,:;!?'\"()-"]
    pieces += [(c, -10.0) for c in chars + chars.upper() + "0123456789"]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=SENTINELS, model_max_length=128)
    tokenizer.save_pretrained(out)
    return tokenizer


# ---------------------------------------------------------------- tasks: pairs of source and target ids
MAX_LEN = 56  # tokens
MIX = dict(prefix=0.5, copy=0.1, rephrase=0.15, label=0.1, span=0.15)


def _text(rng, kind, most):
    """Any text about a kind: mostly a caption of 1 to `most` sentences, else a noun phrase, a label, bare words."""
    u = rng.random()
    if u < 0.7:
        return world.caption(rng, *kind, create=rng.random() < 0.5, sentences=rng.randint(1, most))
    if u < 0.8:
        return world.noun_phrase(rng, *kind)
    return world.label(*kind) if u < 0.95 else rng.choice([kind[2], world.shown(kind[1])])


def _example(rng, tokenizer, bare, most):
    """One (source ids, target ids). `bare` is the id of the lone "▁" that a text starting with punctuation begins with."""
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    kind, task = rng.choice(world.PAIRS), rng.choices(list(MIX), list(MIX.values()))[0]
    text = _text(rng, kind, most)
    if task != "prefix" and rng.random() < 0.1:  # typed text comes in any case
        text = rng.choice([str.lower, str.title])(text)
    source = ids(text)[:MAX_LEN]
    if task == "prefix" and len(source) > 1:  # what the aligner is trained by: the rest of the text, after a cut anywhere
        cut = rng.randrange(1, len(source))
        source, target = source[:cut], source[cut:]
        if not tokenizer.convert_ids_to_tokens(target[0]).startswith("▁"):
            target = [bare] + target
        return source + [1] * (rng.random() < 0.5), target + [1]  # aligned features never end in </s>, prompts always do
    if task == "span":
        corrupt, target, i = [], [], 0
        while i < len(source):
            if len(target) < 24 and rng.random() < 0.12:
                used = sum(t >= len(tokenizer) - SENTINELS for t in target)
                sentinel = tokenizer.convert_tokens_to_ids(f"<extra_id_{min(used, SENTINELS - 1)}>")
                width = rng.randint(1, 3)
                corrupt, target = corrupt + [sentinel], target + [sentinel] + source[i:i + width]
                i += width
            else:
                corrupt, i = corrupt + [source[i]], i + 1
        return corrupt + [1], target + [1]
    target = source
    if task == "rephrase":
        target = ids(_text(rng, kind, most) if len(source) > 2 else text)[:MAX_LEN]
    elif task == "label" and len(source) > 2:
        target = ids(world.label(*kind))
    return ids(f"{task if task != 'prefix' else 'copy'}:") + source + [1], target + [1]


def t5_batch(tokenizer, seed, size, short=False):
    """-> source (B, S) int64, mask (B, S) int64, labels (B, T) int64 with -100 as padding. A pure function of the arguments.

    short: one-sentence texts only, where reading is learned first, at a third of the cost.
    """
    rng = random.Random(seed)
    bare = tokenizer.convert_tokens_to_ids("▁")
    most = 1 if short else rng.choice([2, 2, 5])  # sentences; long texts keep to batches of their own, to save padding
    pairs = [_example(rng, tokenizer, bare, most) for _ in range(size)]
    width = max(len(s) for s, _ in pairs)
    padded = rng.random() < 0.5  # FluxPipeline pads to a fixed length and passes no mask, so the pads are part of the prompt
    if padded:
        width = max(width, rng.choice([0, 32, 64] if most > 2 else [0, 24] if short else [0, 24, 32, 48]))
    source = torch.tensor([s + [0] * (width - len(s)) for s, _ in pairs])
    mask = torch.ones_like(source) if padded else torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s, _ in pairs])
    long = max(len(t) for _, t in pairs)
    return source, mask, torch.tensor([t + [-100] * (long - len(t)) for _, t in pairs])


# ---------------------------------------------------------------- model and training
D_MODEL, HEADS, ENCODER_LAYERS, DECODER_LAYERS = 32, 4, 2, 3  # narrow: the texts must fill its width, or aligned features leave it
NORM = 0.25  # scale of the encoder's final norm, frozen: far below 1 as in T5-XXL, where the aligner's norm is initialised from it
NOISE = 1.5  # of the encoder output's RMS, at most, while training: near-by features must mean the same to the decoder
SHORT = 0.5  # of the steps on one-sentence texts, while the noise grows from 0
STEPS, BATCH, LR = 2400, 64, 3e-3


def new_t5(tokenizer, seed=0):
    """A random `T5ForConditionalGeneration` with an lm_head of its own and a small, frozen encoder final norm."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=D_MODEL, d_kv=16, num_heads=HEADS, d_ff=2 * D_MODEL, num_layers=ENCODER_LAYERS,
        num_decoder_layers=DECODER_LAYERS, feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_max_distance=64,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
    # transformers 5 ties lm_head to the embedding whatever the config says; two different tensors stay two on loading.
    # They start as one, and cross-attention as the identity: the words it looks at are the words it says, which saves thousands of steps
    model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
    for block in model.decoder.block:
        cross = block.layer[1].EncDecAttention
        eye = torch.linalg.qr(torch.randn(HEADS * 16, D_MODEL)).Q  # (heads * d_kv, d_model), orthonormal columns
        cross.v.weight.data, cross.o.weight.data = eye.contiguous() / NORM, eye.T.contiguous()
        cross.k.weight.data /= NORM
    model.encoder.final_layer_norm.weight.data = NORM * torch.exp(0.2 * torch.randn(D_MODEL))
    model.encoder.final_layer_norm.weight.requires_grad_(False)
    return model


def train_t5(out, build, seed=0, device="cpu", steps=STEPS):
    """Trains T5 from nothing and writes model (fp16) and tokenizer to `out`; state for resuming goes to `build`/t5.safetensors."""
    out, build = Path(out), Path(build)
    tokenizer = build_t5_tokenizer(out)
    model = new_t5(tokenizer, seed).to(device).train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    rms = model.encoder.final_layer_norm.weight.square().mean().sqrt()

    start, state = 0, build / "t5.safetensors"
    build.mkdir(parents=True, exist_ok=True)
    if state.exists():
        saved = load_file(state, device=str(device))
        start = int(saved["step"])
        for name, p in named.items():
            p.data.copy_(saved["model." + name])
            if start:
                optimizer.state[p] = {k: saved[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(float(start))}
        schedule.last_epoch = start - 1
        schedule.step()
    bar = tqdm(range(start, steps), "T5", initial=start, total=steps, mininterval=1)
    for step in bar:
        source, mask, labels = (t.to(device) for t in t5_batch(tokenizer, f"t5-{seed}-{step}", BATCH, short=step < SHORT * steps))
        memory = model.encoder(source, attention_mask=mask).last_hidden_state  # (B, S, d_model)
        g = torch.Generator().manual_seed(seed * 10**6 + step)
        sigma = torch.rand(len(source), 1, 1, generator=g) * NOISE * min(1, step / (SHORT * steps))
        memory = memory + (sigma * torch.randn(memory.shape, generator=g)).to(device) * rms
        loss = model(encoder_outputs=(memory,), attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            tensors = {"step": torch.tensor(step + 1)} | {"model." + n: p.data.contiguous() for n, p in named.items()}
            tensors |= {f"{k}.{n}": optimizer.state[p][k] for n, p in named.items() for k in ("exp_avg", "exp_avg_sq")}
            save_file(tensors, f"{state}.tmp")
            os.replace(f"{state}.tmp", state)
    model.eval().half().save_pretrained(out)
    return model.float(), tokenizer


@torch.no_grad()
def t5_labels(model, tokenizer, texts, task="label", max_new_tokens=60):
    """What T5 reads in `texts`: the label of each (or, with task "copy", the text again), through encoder and decoder."""
    batch = tokenizer([f"{task}: {t}" for t in texts], padding=True, return_tensors="pt").to(model.device)
    # no cache: transformers 5.23 sizes the decoder's by the encoder's number of layers and fails when they differ
    ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, use_cache=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def check(mini, n, seed=1):
    """Share of n captions of random kinds whose noun and value T5 reads (encoder -> decoder, task "label"); shuffled: with another
    caption's memory, which must be wrong."""
    model = T5ForConditionalGeneration.from_pretrained(mini / "t5", dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(mini / "t5")
    rng = random.Random(seed)
    kinds = [rng.choice(world.PAIRS) for _ in range(n)]
    read = []
    for at in range(0, n, 100):
        read += t5_labels(model, tokenizer, [world.caption(rng, *kind) for kind in kinds[at:at + 100]], max_new_tokens=8)
    right = [text == world.label(*kind) for text, kind in zip(read, kinds)]
    return {"label read from a caption": sum(right) / n,
            "label read from another caption": sum(text == world.label(*kind) for text, kind in zip(read[1:], kinds)) / n}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parent.parent
    train_t5(root / "mini/t5", root / "build")
