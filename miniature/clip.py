"""The miniature CLIP: the CLIP judge of the checks, and FLUX's pooled text encoder.

    python -m miniature.clip      # one of the steps of: python -m miniature train
"""
import functools
import json
import math
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from cobsat_eval import ANIMALS, DETAILS, KINDS, NOUNS, OBJECTS, shown_word
from miniature import muon
from miniature.pictures import (
    PER_KIND,
    augment,
    held_out_image,
    save_stand_in,
    save_state,
    training_folders,
    training_images,
)
from miniature.world import ING, caption, label, noun_phrase

# ---------------------------------------------------------------- hyperparameters
VISION_WIDTH = 96
VISION_LAYERS = 4
# FLUX's pooled_projection_dim
TEXT_WIDTH = 64
TEXT_LAYERS = 2
PROJECTION = 64
STEPS = 3000
BATCH = 64
LR = 1.5e-3
MUON_LR = 4e-3
WARMUP = 60
SAVE_SECONDS = 120
# of CLIP's own image processor
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


# ---------------------------------------------------------------- tokenizer, processor, model
def make_processor():
    """CLIP's own lower-casing byte-level BPE, trained on the toy texts; pictures of 64 px."""
    rng = random.Random(0)
    texts = [caption(rng, *kind, create=create) for kind in KINDS for create in (False, True)
             for _ in range(8)]
    texts += [label(*kind) for kind in KINDS]
    texts += [value for values in DETAILS.values() for value in values] * 4
    # an empty tokenizer of the class: its normaliser and pre-tokeniser are used to train the merges
    backend = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = backend.normalizer
    bpe.pre_tokenizer = backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, min_frequency=2, show_progress=False, initial_alphabet=alphabet,
        end_of_word_suffix="</w>")
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # the trainer's own numbers differ from run to run. Every byte also ends a word, so that no text
    # is unknown
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges),
              "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def make_model(tokenizer):
    """An untrained CLIPModel."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH * 4, "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_WIDTH // 32, "max_position_embeddings": 77,
        "projection_dim": PROJECTION, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": VISION_WIDTH, "intermediate_size": VISION_WIDTH * 4,
        "num_hidden_layers": VISION_LAYERS, "num_attention_heads": VISION_WIDTH // 32,
        "image_size": 64, "patch_size": 8, "projection_dim": PROJECTION,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


# ---------------------------------------------------------------- loss
def fixed_texts():
    """The texts that each step shows: all nouns, then all values (labels and shown words).

    [(detail, value, noun, text)], None where a text says nothing; and the number of nouns.
    """
    nouns = OBJECTS + ANIMALS
    texts = [(None, None, noun, noun) for noun in nouns]
    for detail, values in DETAILS.items():
        for value in values:
            words = sorted({value, shown_word(value), ING.get(value, value)})
            texts += [(detail, value, None, word) for word in words]
    return texts, len(nouns)


def description(rng, kind):
    """One of the texts that describe a kind: labels, a noun phrase or a caption."""
    return rng.choice([f"{kind[1]} {kind[2]}", label(*kind), noun_phrase(rng, *kind),
                       caption(rng, *kind, create=rng.random() < 0.3)])


def is_true(text, kind):
    """Whether (detail, value, noun, text) is true of a picture of this kind."""
    return all(said in (None, label_) for said, label_ in zip(text, kind, strict=False))


def contrastive_loss(scores, true, dim):
    """Mean of -log of the softmax mass on the right ones along `dim`.

    scores (pictures, texts), true (pictures, texts) bool. Rows without a right one are left out.
    """
    right = scores.masked_fill(~true, -1e9).logsumexp(dim)
    return (scores.logsumexp(dim) - right)[true.any(dim)].mean()


def clip_loss(model, x, ids, true, n_nouns, n_fixed):
    """The contrastive loss with several right texts per picture.

    x (B, 3, 64, 64) normalised, ids (texts, L), true (B, texts) bool. A text is right for a picture
    when it is true of it. The loss is taken over the nouns, over the values, over the descriptions,
    and over the pictures.
    """
    image = F.normalize(model.get_image_features(pixel_values=x).pooler_output, dim=-1)
    # the fixed texts are short: no text tower on their padding
    features = [model.get_text_features(input_ids=some).pooler_output
                for some in (ids[:n_fixed, :6], ids[n_fixed:])]
    text = F.normalize(torch.cat(features), dim=-1)
    scores = image @ text.T * model.logit_scale.exp()  # (B, texts)
    loss = 0
    for a, b in ((0, n_nouns), (n_nouns, n_fixed), (n_fixed, None)):
        loss = loss + contrastive_loss(scores[:, a:b], true[:, a:b], 1)
    return loss + contrastive_loss(scores, true, 0)


# ---------------------------------------------------------------- training
def train(build, weights, seed, steps=STEPS):
    """Trains CLIP from scratch (resumable), writes it to weights/clip; returns model, processor."""
    torch.manual_seed(seed)
    processor = make_processor()
    encode = functools.lru_cache(100_000)(lambda text: processor.tokenizer(text)["input_ids"])
    model = make_model(processor.tokenizer).train()
    params = list(model.parameters())
    optimizers = muon.make_optimizers(model.named_parameters(), ("layers.",), MUON_LR, LR)
    images = training_images(build)
    state_path = build / "clip.pt"
    step = 0
    seconds = 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_optimizer_states(optimizers, state["optimizers"])
        step, seconds = state["step"], state["seconds"]

    fixed, n_nouns = fixed_texts()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pad = processor.tokenizer.pad_token_id
    began = saved = time.time()
    mean_loss = None
    bar = tqdm(total=steps, initial=step, desc="clip", mininterval=2)
    while step < steps:
        # batches depend on the step alone, so that a resumed run equals an unbroken one
        rng = random.Random(f"clip {seed} {step}")
        muon.set_learning_rate(optimizers, muon.warmup_cosine(step, steps, WARMUP))
        kinds = [rng.randrange(len(KINDS)) for _ in range(BATCH)]
        batch = np.stack([images[kind, rng.randrange(PER_KIND)] for kind in kinds])
        x = augment(batch, rng.randrange(2**32), 0.2, 0.4)  # (B, 3, 64, 64)
        kinds = [KINDS[kind] for kind in kinds]
        texts = fixed + [(*kind, description(rng, kind)) for kind in kinds]
        rows = [encode(text[3])[:77] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # (texts, L)
        true = torch.tensor([[is_true(text, kind) for text in texts] for kind in kinds])
        loss = clip_loss(model, (x - mean) / std, ids, true, n_nouns, len(fixed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        muon.step_optimizers(optimizers)
        model.logit_scale.data.clamp_(max=math.log(100))
        step += 1
        mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == steps:
            save_stand_in(weights / "clip", model, processor)
            save_state(state_path, {
                "model": model.state_dict(), "optimizers": muon.optimizer_states(optimizers),
                "step": step, "seconds": seconds + time.time() - began})
            saved = time.time()
    bar.close()
    model.eval()
    return model, processor


# ---------------------------------------------------------------- judging
@torch.no_grad()
def judge(model, processor, images, details, shown_words=False):
    """What CLIP sees in pictures: the arg-max over ten values and over ten nouns.

    images: PIL. details: the detail of each. shown_words: values in shown words instead of labels.
    Returns [(value, noun)].
    """
    def text_features(words):
        inputs = processor(text=words, padding=True, return_tensors="pt").to(model.device)
        return F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    inputs = processor(images=images, return_tensors="pt").to(model.device)
    features = F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
    values, nouns = {}, {}
    for detail in set(details):
        words = [shown_word(v) if shown_words else v for v in DETAILS[detail]]
        values[detail] = text_features(words)  # (10, PROJECTION)
        nouns[detail] = text_features(NOUNS[detail])  # (10, PROJECTION)
    found = []
    for x, detail in zip(features, details, strict=True):
        value = (x @ values[detail].T).argmax()
        noun = (x @ nouns[detail].T).argmax()
        found.append((DETAILS[detail][value], NOUNS[detail][noun]))
    return found


def evaluate(model, processor, n=1000, seed=0, artefacts=False):
    """Shares of n held-out pictures with value, noun and both right, by the labels.

    `shown`: the value by the shown words. artefacts: noisy and blurred pictures.
    """
    rng = random.Random(seed)
    model.eval()
    kinds = []
    for i in rng.sample(range(max(n, len(KINDS))), n):
        kinds.append(i if i < len(KINDS) else rng.randrange(len(KINDS)))
    images = np.stack([held_out_image(kind, rng.randrange(10**5)) for kind in kinds])
    if artefacts:
        noisy = augment(images, seed, 0.2, 0.5).permute(0, 2, 3, 1).numpy()  # (n, 64, 64, 3)
        images = (noisy * 255).astype(np.uint8)
    images = [Image.fromarray(image) for image in images]
    kinds = [KINDS[kind] for kind in kinds]
    details = [kind[0] for kind in kinds]
    found = judge(model, processor, images, details)
    found_shown = judge(model, processor, images, details, shown_words=True)
    value = np.array([f[0] == kind[1] for f, kind in zip(found, kinds, strict=True)])
    noun = np.array([f[1] == kind[2] for f, kind in zip(found, kinds, strict=True)])
    shown = np.array([f[0] == kind[1] for f, kind in zip(found_shown, kinds, strict=True)])
    both = value & noun
    shares = {"value": value, "noun": noun, "both": both, "shown": shown}
    for detail in DETAILS:
        shares[f"both {detail}"] = both[np.array(details) == detail]
    return {name: round(float(right.mean()), 4) for name, right in shares.items()}


def load(weights):
    """-> CLIPModel in fp32, CLIPProcessor."""
    model = CLIPModel.from_pretrained(weights / "clip", dtype=torch.float32).eval()
    return model, CLIPProcessor.from_pretrained(weights / "clip")


def check(weights, n):
    """`evaluate` on clean and on noisy, blurred pictures."""
    model, processor = load(weights)
    return {"held-out pictures": evaluate(model, processor, n),
            "with noise and blur": evaluate(model, processor, n, artefacts=True)}


if __name__ == "__main__":
    train(*training_folders(__doc__))
