"""The miniature CLIP: judges noun and detail of a picture, and is FLUX's pooled text encoder.

    python miniature.py train clip      # or, from the repository's root, python -m standins.clip
"""
import functools
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from standins.muon import optimizers_for, set_rate
from standins.pictures import PER_KIND, augment, held_out, pictures, save_stand_in, save_state
from world import ANIMALS, DETAILS, ING, NOUNS, OBJECTS, PAIRS, caption, label, noun_phrase, shown

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- sizes and schedule
VISION_WIDTH, VISION_LAYERS, TEXT_WIDTH, TEXT_LAYERS, PROJECTION = 96, 4, 64, 2, 64  # FLUX's pooled_projection_dim is TEXT_WIDTH
STEPS, BATCH = 3000, 64
LR, MUON_LR, WARMUP = 1.5e-3, 4e-3, 60
SAVE_SECONDS = 120
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


# ---------------------------------------------------------------- tokenizer, processor, model
def make_processor():
    """CLIP's own lower-casing byte-level BPE, trained on the world's text; pictures resized to 64 px."""
    rng = random.Random(0)
    text = [caption(rng, *pair, create=create) for pair in PAIRS for create in (False, True) for _ in range(8)] + [label(*pair) for pair in PAIRS]
    text += [v for values in DETAILS.values() for v in values] * 4
    empty = CLIPTokenizer()  # its normaliser and pre-tokeniser are used to train the merges
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = empty.backend_tokenizer.normalizer, empty.backend_tokenizer.pre_tokenizer
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1500, min_frequency=2, show_progress=False, initial_alphabet=bytes_,
                                                      end_of_word_suffix="</w>"))
    learned = json.loads(bpe.to_str())["model"]
    vocab = dict(learned["vocab"])
    for token in [b + "</w>" for b in bytes_] + ["<|startoftext|>", "<|endoftext|>"]:  # every byte also as the end of a word: no text is unknown
        vocab.setdefault(token, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in learned["merges"]], model_max_length=77)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def make_model(tokenizer):
    text = dict(vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=TEXT_WIDTH * 4, num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=TEXT_WIDTH // 32, max_position_embeddings=77, projection_dim=PROJECTION, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(hidden_size=VISION_WIDTH, intermediate_size=VISION_WIDTH * 4, num_hidden_layers=VISION_LAYERS,
                  num_attention_heads=VISION_WIDTH // 32, image_size=64, patch_size=8, projection_dim=PROJECTION)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


# ---------------------------------------------------------------- training
def train(build=ROOT / "build", out=ROOT / "mini/clip", steps=STEPS):
    """Contrastive training with several right texts per picture.

    Each step shows the pictures three sets of texts: all nouns, all values (labels and shown words) and one description per picture. A text is right for
    a picture when it is true of it; loss = -log of the softmax mass on the right ones, over the texts of a set and over the pictures.
    """
    torch.manual_seed(0)
    processor = make_processor()
    encode = functools.lru_cache(100_000)(lambda text: processor.tokenizer(text)["input_ids"])
    model = make_model(processor.tokenizer).train()
    params = list(model.parameters())
    optimizers = optimizers_for(model.named_parameters(), ("layers.",), MUON_LR, LR)
    store = pictures(build)
    state_path, step, spent = Path(build) / "clip.pt", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved_one in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_one)
        step, spent = state["step"], state["seconds"]

    def save():
        save_stand_in(out, model, processor)
        save_state(state_path, {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step,
                                "seconds": spent + time.time() - began})

    bank = [(None, None, noun, noun) for noun in OBJECTS + ANIMALS]
    for detail, values in DETAILS.items():
        for value in values:
            bank += [(detail, value, None, word) for word in sorted({value, shown(value), ING.get(value, value)})]
    nouns = len(OBJECTS + ANIMALS)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    began = saved = time.time()
    shown_loss, bar = None, tqdm(total=steps, initial=step, desc="clip", mininterval=2)
    while step < steps:
        rng = random.Random(f"clip {step}")
        set_rate(optimizers, min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))))
        kinds = [rng.randrange(len(PAIRS)) for _ in range(BATCH)]
        x = augment(np.stack([store[kind, rng.randrange(PER_KIND)] for kind in kinds]), rng.randrange(2 ** 32), 0.2, 0.4)
        said = []
        for kind in kinds:
            pair = PAIRS[kind]
            text = rng.choice([f"{pair[1]} {pair[2]}", label(*pair), noun_phrase(rng, *pair), caption(rng, *pair, create=rng.random() < 0.3)])
            said.append((*pair, text))
        texts = bank + said
        ids = [encode(text[3])[:77] for text in texts]
        ids = torch.tensor([row + [processor.tokenizer.pad_token_id] * (max(map(len, ids)) - len(row)) for row in ids])
        true = torch.tensor([[(t[0] in (None, d)) and t[1] in (None, v) and t[2] in (None, n) for t in texts] for d, v, n in (PAIRS[k] for k in kinds)])
        image = torch.nn.functional.normalize(model.get_image_features(pixel_values=(x - mean) / std).pooler_output, dim=-1)
        words = [model.get_text_features(input_ids=part).pooler_output for part in (ids[:len(bank), :6], ids[len(bank):])]  # the bank's are short
        scores = image @ torch.nn.functional.normalize(torch.cat(words), dim=-1).T * model.logit_scale.exp()  # (BATCH, texts)
        mass = lambda s, t, dim: (s.logsumexp(dim) - s.masked_fill(~t, -1e9).logsumexp(dim))[t.any(dim)].mean()
        loss = sum(mass(scores[:, a:b], true[:, a:b], 1) for a, b in ((0, nouns), (nouns, len(bank)), (len(bank), None))) + mass(scores, true, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=math.log(100))
        step += 1
        shown_loss = loss.item() if shown_loss is None else 0.95 * shown_loss + 0.05 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{shown_loss:.3f}", refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == steps:
            save()
            saved = time.time()
    bar.close()
    model.eval()
    return model, processor


# ---------------------------------------------------------------- judging
@torch.no_grad()
def judge(model, processor, images, details, shown_words=False):
    """[(value, noun)] that CLIP sees in PIL images: arg-max over the ten labels of each image's detail and over its ten nouns."""
    unit = lambda features: torch.nn.functional.normalize(features.pooler_output, dim=-1)
    seen = unit(model.get_image_features(**processor(images=images, return_tensors="pt").to(model.device)))
    text = lambda words: unit(model.get_text_features(**processor(text=words, padding=True, return_tensors="pt").to(model.device)))
    values = {d: text([shown(v) if shown_words else v for v in DETAILS[d]]) for d in set(details)}
    nouns = {d: text(NOUNS[d]) for d in set(details)}
    return [(DETAILS[d][(x @ values[d].T).argmax()], NOUNS[d][(x @ nouns[d].T).argmax()]) for x, d in zip(seen, details)]


def evaluate_clip(model, processor, n=1000, seed=0, artefacts=False):
    """Shares of n held-out pictures with value, noun and both right, by the labels; `shown`: value by the shown words. artefacts: noisy, blurred pictures."""
    rng = random.Random(seed)
    model.eval()
    kinds = [rng.randrange(len(PAIRS)) if i >= len(PAIRS) else i for i in rng.sample(range(max(n, len(PAIRS))), n)]
    pics = np.stack([held_out(kind, rng.randrange(10 ** 5)) for kind in kinds])
    if artefacts:
        pics = (augment(pics, seed, 0.2, 0.5).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    images, details = [Image.fromarray(p) for p in pics], [PAIRS[k][0] for k in kinds]
    found, found_shown = judge(model, processor, images, details), judge(model, processor, images, details, True)
    right = np.array([(f[0] == PAIRS[k][1], f[1] == PAIRS[k][2], s[0] == PAIRS[k][1]) for f, s, k in zip(found, found_shown, kinds)])
    result = {"value": right[:, 0].mean(), "noun": right[:, 1].mean(), "both": (right[:, 0] & right[:, 1]).mean(), "shown": right[:, 2].mean()}
    result.update({f"both {d}": (right[:, 0] & right[:, 1])[np.array(details) == d].mean() for d in DETAILS})
    return {name: round(float(share), 4) for name, share in result.items()}


def load(mini):
    """-> CLIPModel in fp32, CLIPProcessor."""
    return CLIPModel.from_pretrained(mini / "clip", dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(mini / "clip")


def check(mini, n):
    """evaluate_clip on clean and on noisy, blurred pictures."""
    model, processor = load(mini)
    return {"held-out pictures": evaluate_clip(model, processor, n), "with noise and blur": evaluate_clip(model, processor, n, artefacts=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train()
