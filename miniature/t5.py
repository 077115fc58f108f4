"""The miniature T5 and its tokenizer.

    python -m miniature.t5      # one of the steps of: python -m miniature train
"""
import os
import random
import re

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from cobsat_eval import KINDS, shown_word
from miniature.pictures import training_folders
from miniature.world import caption, label, noun_phrase

# ---------------------------------------------------------------- hyperparameters
# narrow: the texts must fill its width, or aligned features could leave the space of texts
D_MODEL = 32
HEADS = 4
D_KV = 16
ENCODER_LAYERS = 2
DECODER_LAYERS = 3
# scale of the encoder's final norm, frozen: far below 1 as in T5-XXL, where the aligner's norm is
# initialised from it
NORM = 0.25
# of the encoder output's RMS, at most, while training: near-by features must mean the same to the
# decoder
NOISE = 1.5
# fraction of the steps on one-sentence texts, while the noise grows from 0
SHORT = 0.5
STEPS = 2400
BATCH = 64
LR = 3e-3
# tokens of a source or a target
MAX_LENGTH = 56
SAVE_STEPS = 100

# ---------------------------------------------------------------- tokenizer
# <extra_id_i>, for span corruption
SENTINELS = 8
# prefixes as T5's "translate English to German: "
TASKS = ["copy", "rephrase", "label"]
# words that a user may type and no caption has
MORE_WORDS = """please photo drawing painting draw paint show make generate with without and or but
of in on at by near next to under over behind beside between two three one four five some many no
not all it its is are was that this these which who what where his her my your i you we they he she
big small large little old new young bright dark light colorful realistic cute happy sad sitting
standing playing background foreground scene style texture material color action main object animal
next word first""".split()


def vocabulary():
    """Every word of the captions and labels, and MORE_WORDS: sorted lower-case list."""
    rng = random.Random(0)
    words = set(MORE_WORDS + TASKS)
    for kind in KINDS:
        texts = [label(*kind), " ".join(kind)]
        texts += [caption(rng, *kind, create=i % 2, sentences=4) for i in range(20)]
        for text in texts:
            words.update(re.findall(r"[a-z0-9]+", text.lower()))
    return sorted(words)


def build_tokenizer(out):
    """Writes a `T5Tokenizer` (Unigram) to the folder `out` and returns it.

    One token per known word, letters for the rest. Known words are tokens in lower case and with a
    capital: `T5Tokenizer` drops a lower-casing normalizer when it is loaded.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    for word in vocabulary():
        # a number has no capital
        spellings = dict.fromkeys([f"▁{word}", f"▁{word.capitalize()}"])
        pieces += [(piece, -1.0) for piece in spellings]
    pieces += [(mark, -1.0) for mark in ".,:;!?'\"()-"]
    pieces += [(letter, -10.0) for letter in letters + letters.upper() + "0123456789"]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=SENTINELS, model_max_length=128)
    tokenizer.save_pretrained(out)
    return tokenizer


# ---------------------------------------------------------------- tasks: source and target ids
# share of each task; "prefix" (write the rest of a text that is cut anywhere) is the task by which
# the aligner is trained
MIX = {"prefix": 0.5, "copy": 0.1, "rephrase": 0.15, "label": 0.1, "span": 0.15}
PAD, EOS = 0, 1


def any_text(rng, kind, most):
    """A text about a kind: a caption of 1 to `most` sentences, a noun phrase, a label, a word."""
    u = rng.random()
    if u < 0.7:
        return caption(rng, *kind, create=rng.random() < 0.5, sentences=rng.randint(1, most))
    if u < 0.8:
        return noun_phrase(rng, *kind)
    if u < 0.95:
        return label(*kind)
    return rng.choice([kind[2], shown_word(kind[1])])


def corrupt_spans(rng, tokenizer, source):
    """T5's pretraining task: spans of 1 to 3 tokens are sentinels in the source, and the target."""
    corrupt, target = [], []
    i = 0
    while i < len(source):
        if len(target) < 24 and rng.random() < 0.12:
            used = sum(t >= len(tokenizer) - SENTINELS for t in target)
            sentinel = f"<extra_id_{min(used, SENTINELS - 1)}>"
            sentinel = tokenizer.convert_tokens_to_ids(sentinel)
            width = rng.randint(1, 3)
            corrupt.append(sentinel)
            target += [sentinel, *source[i:i + width]]
            i += width
        else:
            corrupt.append(source[i])
            i += 1
    return corrupt + [EOS], target + [EOS]


def make_example(rng, tokenizer, most):
    """One (source ids, target ids) of a random kind and task; `most`: sentences of its texts."""
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    kind = rng.choice(KINDS)
    task = rng.choices(list(MIX), list(MIX.values()))[0]
    text = any_text(rng, kind, most)
    # users type in any case
    if task != "prefix" and rng.random() < 0.1:
        text = rng.choice([str.lower, str.title])(text)
    source = ids(text)[:MAX_LENGTH]
    if task == "prefix" and len(source) > 1:
        cut = rng.randrange(1, len(source))
        source, target = source[:cut], source[cut:]
        # a text that starts with punctuation begins with a lone "▁"
        if not tokenizer.convert_ids_to_tokens(target[0]).startswith("▁"):
            target = [tokenizer.convert_tokens_to_ids("▁"), *target]
        # aligned features never end in </s>, prompts always do
        return source + [EOS] * (rng.random() < 0.5), target + [EOS]
    if task == "span":
        return corrupt_spans(rng, tokenizer, source)
    target = source
    if task == "rephrase":
        target = ids(any_text(rng, kind, most) if len(source) > 2 else text)[:MAX_LENGTH]
    elif task == "label" and len(source) > 2:
        target = ids(label(*kind))
    # a text of one token cannot be cut: it is copied
    prefix = "copy" if task == "prefix" else task
    return ids(f"{prefix}:") + source + [EOS], target + [EOS]


def make_batch(tokenizer, seed, size, short=False):
    """A training batch: a pure function of its arguments.

    Returns source (B, S) int64, mask (B, S) int64, labels (B, T) int64 with -100 as padding.
    short: one-sentence texts only, where reading is learned first, at a third of the cost.
    """
    rng = random.Random(seed)
    # sentences; long texts keep to batches of their own, to save padding
    most = 1 if short else rng.choice([2, 2, 5])
    pairs = [make_example(rng, tokenizer, most) for _ in range(size)]
    width = max(len(source) for source, _ in pairs)
    # FluxPipeline pads to a fixed length and passes no mask: the pads are part of the prompt
    padded = rng.random() < 0.5
    if padded:
        if most > 2:
            widths = [0, 32, 64]
        else:
            widths = [0, 24] if short else [0, 24, 32, 48]
        width = max(width, rng.choice(widths))
    source = torch.tensor([s + [PAD] * (width - len(s)) for s, _ in pairs])
    mask = torch.ones_like(source)
    if not padded:
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s, _ in pairs])
    length = max(len(target) for _, target in pairs)
    labels = torch.tensor([target + [-100] * (length - len(target)) for _, target in pairs])
    return source, mask, labels


# ---------------------------------------------------------------- model and training
def new_t5(tokenizer, seed=0):
    """An untrained T5 with an lm_head of its own and a small, frozen final norm of the encoder."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=D_MODEL, d_kv=D_KV, num_heads=HEADS, d_ff=2 * D_MODEL,
        num_layers=ENCODER_LAYERS, num_decoder_layers=DECODER_LAYERS,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_max_distance=64,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS))
    # transformers 5 ties lm_head to the embedding whatever the config says; two different tensors
    # stay two on loading. They start as equals, and cross-attention as the identity: the words it
    # attends to are the words it says, which saves thousands of steps.
    model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
    for block in model.decoder.block:
        cross = block.layer[1].EncDecAttention
        # (heads * d_kv, d_model) with orthonormal columns
        identity = torch.linalg.qr(torch.randn(HEADS * D_KV, D_MODEL)).Q
        cross.v.weight.data = identity.contiguous() / NORM
        cross.o.weight.data = identity.T.contiguous()
        cross.k.weight.data /= NORM
    norm = model.encoder.final_layer_norm
    norm.weight.data = NORM * torch.exp(0.2 * torch.randn(D_MODEL))
    norm.weight.requires_grad_(False)
    return model


def save_training_state(path, step, params, optimizer):
    """Atomically writes {name: parameter} and AdamW's moments as one safetensors file."""
    tensors = {"step": torch.tensor(step)}
    for name, p in params.items():
        tensors[f"model.{name}"] = p.data.contiguous()
    for name, p in params.items():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[p][key]
    save_file(tensors, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_training_state(path, params, optimizer):
    """Restores what save_training_state wrote and returns the step."""
    saved = load_file(path)
    step = int(saved["step"])
    for name, p in params.items():
        p.data.copy_(saved[f"model.{name}"])
        if step:
            moments = {key: saved[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = moments | {"step": torch.tensor(float(step))}
    return step


def train(build, weights, seed, steps=STEPS):
    """Trains T5 from scratch (resumable) and writes it to weights/t5 in fp16, with tokenizer."""
    out = weights / "t5"
    tokenizer = build_tokenizer(out)
    model = new_t5(tokenizer, seed).train()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    rms = model.encoder.final_layer_norm.weight.square().mean().sqrt()

    start = 0
    state_path = build / "t5.safetensors"
    build.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        start = load_training_state(state_path, params, optimizer)
        schedule.last_epoch = start - 1
        schedule.step()
    bar = tqdm(range(start, steps), "T5", initial=start, total=steps, mininterval=1)
    for step in bar:
        progress = step / (SHORT * steps)
        source, mask, labels = make_batch(
            tokenizer, f"t5-{seed}-{step}", BATCH, short=progress < 1)
        hidden = model.encoder(source, attention_mask=mask).last_hidden_state  # (B, S, d_model)
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        sigma = torch.rand(len(source), 1, 1, generator=generator) * NOISE * min(1, progress)
        hidden = hidden + sigma * torch.randn(hidden.shape, generator=generator) * rms
        loss = model(encoder_outputs=(hidden,), attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == steps:
            save_training_state(state_path, step + 1, params, optimizer)
    model.eval().half().save_pretrained(out)
    return model.float(), tokenizer


# ---------------------------------------------------------------- accuracy
@torch.no_grad()
def read_labels(model, tokenizer, texts, task="label", max_new_tokens=60):
    """What encoder and decoder read in `texts`: their labels, or with task "copy" the texts."""
    inputs = tokenizer([f"{task}: {text}" for text in texts], padding=True, return_tensors="pt")
    # no cache: transformers 5.23 sizes the decoder's by the encoder's number of layers and fails
    # when they differ
    ids = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens,
                         do_sample=False, use_cache=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def check(weights, n, seed=1):
    """Share of n captions of random kinds whose noun and value T5 reads (task "label").

    Beside it the same of another caption's encoder output, which must be wrong.
    """
    model = T5ForConditionalGeneration.from_pretrained(weights / "t5", dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(weights / "t5")
    rng = random.Random(seed)
    kinds = [rng.choice(KINDS) for _ in range(n)]
    found = []
    for start in range(0, n, 100):
        captions = [caption(rng, *kind) for kind in kinds[start:start + 100]]
        found += read_labels(model, tokenizer, captions, max_new_tokens=8)
    labels = [label(*kind) for kind in kinds]
    right = sum(text == true for text, true in zip(found, labels, strict=True))
    shifted = sum(text == true for text, true in zip(found[1:], labels, strict=False))
    return {"label read from a caption": right / n, "label read from another caption": shifted / n}


if __name__ == "__main__":
    train(*training_folders(__doc__))
