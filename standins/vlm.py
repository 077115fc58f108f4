"""The miniature Qwen2-VL: captions pictures, answers CoBSAT's in-context questions and the judge's questions.

    python miniature.py train vlm       # or, from the repository's root, python -m standins.vlm
"""
import functools
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, Regex, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (DynamicCache, GenerationConfig, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor,
                          Qwen2VLProcessor, Qwen2VLVideoProcessor)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from prepare_data import PROMPTS
from standins.muon import optimizers_for, set_rate
from standins.pictures import PER_KIND, augment, held_out, pictures, save_stand_in, save_state
from thinkdiff_lvlm import INSTRUCTION
from world import ANIMALS, CREATE, DESCRIBE, DETAILS, ING, NOUNS, OBJECTS, PAIRS, caption, sentence, shown

ROOT = Path(__file__).resolve().parent.parent
KIND = {pair: index for index, pair in enumerate(PAIRS)}

# ---------------------------------------------------------------- sizes and schedule
WIDTH, LAYERS, HEADS = 128, 4, 4  # text model: heads of 32
VISION_WIDTH, VISION_LAYERS = 96, 2
PATCH, MERGE = 8, 2  # 64 px -> 8 x 8 patches -> 16 tokens
PICTURE_TOKENS = 16
PRETRAIN_STEPS, PRETRAIN_BATCH = 1200, 64  # vision tower as a classifier first: the text model then has something to look at
STEPS = 2350
LOOKS = 32  # pictures a step that are only classified: cheap, and recognising nouns is the bottleneck
BATCH = {"caption": 48, "two": 6, "four": 5, "judge": 12}  # samples a step, each group at its own length; captions teach to say what is seen
LENGTHS = [24, 24, 42]  # tokens of an answer; 42 as the pipeline generates 40
WEIGHT = {"caption": 0.5, "two": 0.15, "four": 0.15, "judge": 0.2}
LR, MUON_LR, WARMUP = 2e-3, 4e-3, 60
STATE_NOISE = 2.5  # x RMS, at most: noise on the final states in training. The final norm fixes their length, so they come to hold the word to be
# said and little else, as a large model's do; without it the first word's state names noun and value already, and the aligner learns to guess
SAVE_SECONDS = 120

# ---------------------------------------------------------------- what is asked
SYSTEM = "You are a helpful assistant."
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT_TEMPLATE = (  # renders what Qwen2-VL's template renders
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat(user):
    """The chat template's text for one user message in which PICTURE marks the pictures."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def judge_question(detail, about_noun, nouns):
    """One of the CoBSAT judge's two questions (detail or main object), options in the benchmark's order."""
    options = nouns if about_noun else DETAILS[detail]
    asked = "main object" if about_noun else f"{detail} (of the main object)"
    listed = " ".join(f"({number}){shown(word)}" for number, word in enumerate(options, 1))
    return (f"What is the {asked} in this image? Answer from the following options: {listed}. "
            "Answer the number only and do not include any other texts (e.g., 1).")


def in_context(words, gap=""):
    """The user's message of protocol section 6: all words but the last are followed by a picture."""
    return INSTRUCTION + gap + "\n\n".join(f"Word {n}: {w}, " + PICTURE * (n < len(words)) for n, w in enumerate(words, 1))


def said(text, detail, value, noun):
    """Whether a text names this noun and this value, and no other of the ten nouns and ten values."""
    text = text.lower()
    named = lambda words: {w for w in words if re.search(rf"\b{re.escape(shown(w))}\b" + (rf"|\b{ING[w]}\b" if w in ING else ""), text)}
    return named(NOUNS[detail]) == {noun} and named(DETAILS[detail]) == {value}


# ---------------------------------------------------------------- tokenizer, processor, model
def make_processor():
    """Byte-level BPE trained on the world's text, in Qwen2's own tokenizer, image processor and chat template."""
    rng = random.Random(0)
    text = [caption(rng, *pair, create=create) for pair in PAIRS for create in (False, True) for _ in range(8)]
    text += PROMPTS * 20 + [chat(in_context([shown(w) for w in rng.sample(words, 5)])).replace(PICTURE, ".").replace("<|im_start|>", "").replace(
        "<|im_end|>", "") for words in [*DETAILS.values(), OBJECTS, ANIMALS] for _ in range(50)]
    text += [judge_question(d, about, NOUNS[d]) for d in DETAILS for about in (False, True)] * 20
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=2000, min_frequency=2, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        model_max_length=32768,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    size = {"shortest_edge": 64 * 64 - 6, "longest_edge": 64 * 64 + 6}  # a margin, or rounding makes 48 x 48 of some square sizes
    pixels = dict(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    return Qwen2VLProcessor(image_processor=Qwen2VLImageProcessor(**pixels), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(**pixels),
                            chat_template=CHAT_TEMPLATE)


def make_model(tokenizer):
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}  # sums to head_dim / 2
    text = dict(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH * 3, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                num_key_value_heads=HEADS, max_position_embeddings=4096, rope_parameters=rope, bos_token_id=token("<|endoftext|>"),
                eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    vision = dict(depth=VISION_LAYERS, embed_dim=VISION_WIDTH, hidden_size=WIDTH, num_heads=VISION_WIDTH // 32, mlp_ratio=4, patch_size=PATCH,
                  spatial_merge_size=MERGE, temporal_patch_size=2, in_channels=3)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=False))
    model.generation_config = GenerationConfig(eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    return model


# ---------------------------------------------------------------- training samples: (user's message, [(kind, index) pictures], answer's token ids)
def answer(encode, rng, pair, first, length, end):
    """`length` tokens of sentences about one kind, with `end` after the 1st to 4th: EOS-ignoring generation must go on making sense.

    The sentences are `settled`: were `a` followed by `red` or by `car` at random, the state after `a` would stand for both, as no large model's
    does, and FLUX would misread it (36 of 44 wrong pictures had the phrase's first word wrong)."""
    stop, ids, count = rng.choice([1, 1, 1, 2, 2, 3, 4, 0]), [], 0
    while len(ids) < length:
        ids += encode((" " if count else "") + sentence(rng, *pair, first if count == 0 else None, settled=True))
        count += 1
        ids += [end] * (count == stop)
    return ids[:length]


def caption_sample(encode, rng, length, end):
    pair, which = rng.choice(PAIRS), rng.randrange(16)
    parts = [PICTURE, PROMPTS[which]]
    if rng.random() < 0.3:
        parts.reverse()
    return "".join(parts), [(KIND[pair], rng.randrange(PER_KIND))], answer(encode, rng, pair, CREATE if which >= 11 else DESCRIBE, length, end)


def in_context_sample(encode, rng, shots, gap, length, end):
    detail = rng.choice(list(DETAILS))
    values, nouns, by_value = DETAILS[detail], NOUNS[detail], rng.random() < 0.5
    words, shared = rng.sample(values if by_value else nouns, shots + 1), rng.choice(nouns if by_value else values)
    pairs = [(detail, w, shared) if by_value else (detail, shared, w) for w in words]
    seen = [(KIND[pair], rng.randrange(PER_KIND)) for pair in pairs[:-1]]
    return in_context([shown(w) for w in words], gap), seen, answer(encode, rng, pairs[-1], CREATE[:3], length, end)  # "Create an image ..."


def judge_sample(encode, rng, detail, about_noun, picture_first, end):
    pair = rng.choice([p for p in PAIRS if p[0] == detail])
    number = (NOUNS[detail].index(pair[2]) if about_noun else DETAILS[detail].index(pair[1])) + 1
    question = judge_question(detail, about_noun, NOUNS[detail])
    return PICTURE + question if picture_first else question + PICTURE, [(KIND[pair], rng.randrange(PER_KIND))], encode(str(number)) + [end]


# ---------------------------------------------------------------- fast forward: what the processor and the model do, without their overhead
MEAN, STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


def patches(x):
    """(n, 3, 64, 64) in 0..1 -> (n * 64, 3 * 2 * 8 * 8): normalised patches in merge-block order, each picture twice in time."""
    x = (x - MEAN[:, None, None]) / STD[:, None, None]
    g = 64 // PATCH // MERGE
    x = x.reshape(-1, 3, g, MERGE, PATCH, g, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)  # (n, g, g, 2, 2, 3, 8, 8)
    return x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * PATCH * PATCH)


def see(model, x):
    """Pictures (n, 3, 64, 64) -> the vision tower's tokens (n, 16, WIDTH)."""
    grid = torch.tensor([[1, 8, 8]]).expand(len(x), 3)
    return model.model.visual(patches(x), grid_thw=grid).pooler_output.view(len(x), PICTURE_TOKENS, -1)


def collate(tokenizer, encode, samples):
    """ids (B, L), positions (3, B, L), answer mask (B, L) and the number of leading tokens that all rows share before any picture."""
    pad, image = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|image_pad|>")
    start, end = encode("<|vision_start|>"), encode("<|vision_end|>")
    rows, lengths = [], []
    for user, _, reply in samples:
        first, *rest = [encode(part) for part in chat(user).split(PICTURE)]
        prompt = first + [t for part in rest for t in start + [image] * PICTURE_TOKENS + end + part]
        rows.append(prompt + reply)
        lengths.append(len(prompt))
    width = max(map(len, rows))
    ids = np.array([row + [pad] * (width - len(row)) for row in rows])
    column = np.arange(width)
    answers = (column >= np.array(lengths)[:, None]) & (column < np.array([len(row) for row in rows])[:, None])
    is_image = ids == image
    seen = is_image.cumsum(1)
    # a picture of 4 x 4 tokens takes 16 places but moves the position on by 4
    text = column - (PICTURE_TOKENS - 4) * (seen // PICTURE_TOKENS)
    inside, block = (seen - 1) % PICTURE_TOKENS, (seen - 1) // PICTURE_TOKENS
    corner = column - inside - (PICTURE_TOKENS - 4) * block
    positions = np.stack([np.where(is_image, corner + step, text) for step in (0 * inside, inside // 4, inside % 4)])
    differs = (ids != ids[:1]).any(0) | is_image.any(0)
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(answers), int(differs.argmax())


def answer_logits(model, batch, seen, noise=0.0):
    """Logits of the answers' tokens, flat (T, vocabulary), and those tokens (T,). seen: (pictures, 16, WIDTH) in reading order.

    noise: upper bound of the noise on the final states, see STATE_NOISE.
    The prefix that all rows share (system message and instruction, about a third of a question) is computed once and repeated as a KV cache.
    """
    ids, positions, answers, shared = batch
    language, rows = model.model.language_model, len(ids)
    cache = DynamicCache(config=model.config.text_config)
    language(inputs_embeds=language.embed_tokens(ids[:1, :shared]), position_ids=positions[:, :1, :shared], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    ids, answers = ids[:, shared:], answers[:, shared:]
    x = language.embed_tokens(ids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    x = language(inputs_embeds=x, position_ids=positions[:, :, shared:], past_key_values=cache, use_cache=True).last_hidden_state
    x = x[:, :-1][answers[:, 1:]]  # (T, WIDTH)
    if noise:
        x = x + noise * torch.rand(len(x), 1) * x.detach().square().mean().sqrt() * torch.randn(x.shape)
    return model.lm_head(x), ids[:, 1:][answers[:, 1:]]


def check_fast_path(model, processor):
    """The largest difference between the logits of this file's fast forward and those of processor + model."""
    rng, encode = random.Random(5), functools.partial(processor.tokenizer.encode, add_special_tokens=False)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    samples = [in_context_sample(encode, rng, 2, "", 40, end) for _ in range(3)]
    pics = [np.stack([held_out(kind, index) for kind, index in sample[1]]) for sample in samples]
    batch = collate(processor.tokenizer, encode, samples)
    fast, _ = answer_logits(model, batch, see(model, torch.from_numpy(np.concatenate(pics)).permute(0, 3, 1, 2) / 255))
    slow = []
    for (user, _, reply), pic in zip(samples, pics):
        parts = re.split(f"({re.escape(PICTURE)})", user)
        content = [{"type": "image", "image": Image.fromarray(pic[i // 2])} if i % 2 else {"type": "text", "text": part}
                   for i, part in enumerate(parts)]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt",
                                               add_generation_prompt=True)
        reply = torch.tensor([reply])
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], reply], 1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.full_like(reply, fill)], 1)
        slow.append(model(**inputs).logits[0, length - 1:-1])
    return (fast - torch.cat(slow)).abs().max().item()


# ---------------------------------------------------------------- training
def train(build=ROOT / "build", out=ROOT / "mini/qwen2-vl", steps=STEPS):
    torch.manual_seed(0)
    processor = make_processor()
    tokenizer = processor.tokenizer
    encode = functools.lru_cache(100_000)(functools.partial(tokenizer.encode, add_special_tokens=False))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = make_model(tokenizer).train()
    head = torch.nn.Linear(WIDTH, len(OBJECTS + ANIMALS) + sum(map(len, DETAILS.values())))  # only for the vision pre-training
    params = [*model.parameters(), *head.parameters()]
    optimizers = optimizers_for([*model.named_parameters(), *head.named_parameters()], ("blocks.", "layers.", "merger."), MUON_LR, LR)
    store = pictures(build)
    state_path, step, spent = Path(build) / "vlm.pt", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"]), head.load_state_dict(state["head"])
        for optimizer, saved_one in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_one)
        step, spent = state["step"], state["seconds"]

    def save():
        save_stand_in(out, model, processor)
        save_state(state_path, {"model": model.state_dict(), "head": head.state_dict(), "step": step, "seconds": spent + time.time() - began,
                                "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    values = [(d, v) for d in DETAILS for v in DETAILS[d]]

    def classify(kinds, seen):
        """The vision tower as a classifier of noun and value: also beside the questions, at no cost, since nouns are what is learned last."""
        scores = head(seen.mean(1))  # (n, 20 nouns + 50 values)
        noun = torch.tensor([(OBJECTS + ANIMALS).index(PAIRS[kind][2]) for kind, _ in kinds])
        value = torch.tensor([values.index(PAIRS[kind][:2]) for kind, _ in kinds])
        losses = {"noun": F.cross_entropy(scores[:, :20], noun), "value": F.cross_entropy(scores[:, 20:], value)}
        for name, loss in losses.items():
            mean_loss[name] = 0.95 * mean_loss.get(name, loss.item()) + 0.05 * loss.item()
        return sum(losses.values())

    began = saved = time.time()
    mean_loss = {}
    total = PRETRAIN_STEPS + steps
    bar = tqdm(total=total, initial=step, desc="vlm", mininterval=2)
    while step < total:
        torch.manual_seed(step)
        rng = random.Random(f"vlm {step}")  # batches depend on the step alone: a resumed run sees what the unbroken one would
        at, span = (step, PRETRAIN_STEPS) if step < PRETRAIN_STEPS else (step - PRETRAIN_STEPS, steps)
        set_rate(optimizers, min(1, (at + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, at / span)))))
        kinds = [(rng.randrange(len(PAIRS)), rng.randrange(PER_KIND)) for _ in range(PRETRAIN_BATCH if step < PRETRAIN_STEPS else LOOKS)]
        classify(kinds, see(model, augment(np.stack([store[k] for k in kinds]), rng.randrange(2 ** 32), 0.1, 0.2))).backward()
        if step >= PRETRAIN_STEPS:
            for task, count in BATCH.items():
                length = rng.choice(LENGTHS)  # all answers of a group equally long: no padding
                if task == "caption":
                    samples = [caption_sample(encode, rng, length, end) for _ in range(count)]
                elif task == "judge":
                    question = rng.choice(list(DETAILS)), rng.random() < 0.5, rng.random() < 0.5
                    samples = [judge_sample(encode, rng, *question, end) for _ in range(count)]
                else:
                    gap = rng.choice(["", "", "", " ", "\n", "\n\n"])  # between instruction and first word: the paper does not say
                    samples = [in_context_sample(encode, rng, 2 if task == "two" else 4, gap, length, end) for _ in range(count)]
                kinds = [kind for sample in samples for kind in sample[1]]
                x = augment(np.stack([store[k] for k in kinds]), rng.randrange(2 ** 32), *((0.15, 0.4) if task == "judge" else (0.06, 0.1)))
                seen = see(model, x)
                logits, targets = answer_logits(model, collate(tokenizer, encode, samples), seen, STATE_NOISE)
                loss = F.cross_entropy(logits, targets)
                (loss * WEIGHT[task] + classify(kinds, seen) * WEIGHT[task]).backward()
                mean_loss[task] = 0.95 * mean_loss.get(task, loss.item()) + 0.05 * loss.item()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 10 == 0:
            bar.set_postfix({name: f"{value:.3f}" for name, value in mean_loss.items()}, refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == total:
            save()
            saved = time.time()
    bar.close()
    model.eval()
    return model, processor


# ---------------------------------------------------------------- accuracy on held-out pictures
@torch.no_grad()
def reply(model, processor, users, pics, new_tokens):
    """Greedy answers to user messages (PICTURE marks the pictures; pics: a list of lists of (64, 64, 3) uint8)."""
    inputs = processor(text=[chat(user) for user in users], images=[[Image.fromarray(p) for p in row] for row in pics], padding=True,
                       return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def evaluate(model, processor, n=200, seed=0, batch=50, wrong=None):
    """Shares of right greedy answers on held-out pictures, n of each: captions, 2-shot, 4-shot, and the judge's two questions both right.

    wrong: a list that receives (task, kind, text) of each wrong answer.
    """
    rng, result = random.Random(seed), {}
    model.eval()
    for task in ("caption", "2-shot", "4-shot", "judge"):
        asked = []  # (user, pictures, pair, right answers)
        for i in range(n):
            detail = list(DETAILS)[i % 5]
            if task in ("2-shot", "4-shot"):
                user, seen, _ = in_context_sample(lambda t: [0] * 40, random.Random(f"{seed} {task} {i}"), int(task[0]), "", 40, 0)
                words, first, second = re.findall(r"Word \d: (.*?), ", user), PAIRS[seen[0][0]], PAIRS[seen[1][0]]
                label = {shown(w): w for w in [*DETAILS[first[0]], *NOUNS[first[0]]]}[words[-1]]
                pair = (first[0], label, first[2]) if first[2] == second[2] else (first[0], first[1], label)
                asked.append((user, [held_out(kind, rng.randrange(10 ** 5)) for kind, _ in seen], pair))
            else:
                pair = rng.choice([p for p in PAIRS if p[0] == detail])
                pic = [held_out(KIND[pair], rng.randrange(10 ** 5))]
                questions = [PROMPTS[rng.randrange(16)]] if task == "caption" else [judge_question(detail, about, NOUNS[detail]) for about in (0, 1)]
                asked += [(PICTURE + question, pic, pair) for question in questions]
        texts = []
        for at in range(0, len(asked), batch):
            part = asked[at:at + batch]
            texts += reply(model, processor, [a[0] for a in part], [a[1] for a in part], 4 if task == "judge" else 40)
        if task == "judge":
            number = lambda text: int("".join(re.findall(r"\d", text)) or 0)
            right = [number(texts[2 * i]) == DETAILS[p[0]].index(p[1]) + 1 and number(texts[2 * i + 1]) == NOUNS[p[0]].index(p[2]) + 1
                     for i, p in enumerate(a[2] for a in asked[::2])]
            texts, asked = [f"{a} / {b}" for a, b in zip(texts[::2], texts[1::2])], asked[::2]
        else:
            right = [said(text, *a[2]) for text, a in zip(texts, asked)]
        result[task] = sum(right) / len(right)
        if wrong is not None:
            wrong += [(task, a[2], text) for a, text, good in zip(asked, texts, right) if not good]
    return result


def check(mini, n):
    """evaluate, with the largest difference between this file's forward pass and the processor's and model's own."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(mini / "qwen2-vl", dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(mini / "qwen2-vl")
    with torch.no_grad():
        return {**evaluate(model, processor, n), "fast path off by": check_fast_path(model, processor)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train()
