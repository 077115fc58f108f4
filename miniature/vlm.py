"""The miniature Qwen2-VL: captions pictures, answers CoBSAT's in-context and the judge's questions.

    python -m miniature.vlm      # one of the steps of: python -m miniature train
"""
import functools
import json
import random
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cobsat_eval import ANIMALS, DETAILS, KINDS, NOUNS, OBJECTS, judge_question, shown_word
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
from miniature.world import CREATE, DESCRIBE, ING, caption, sentence
from thinkdiff_lvlm import INSTRUCTION, PROMPTS

# number of each kind (detail, value, noun) in KINDS
KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}

# ---------------------------------------------------------------- hyperparameters
# text model; heads of 32
WIDTH = 128
LAYERS = 4
HEADS = 4
VISION_WIDTH = 96
VISION_LAYERS = 2
# 64 px -> 8 x 8 patches -> 16 tokens
PATCH = 8
MERGE = 2
IMAGE_TOKENS = 16
# the vision tower as a classifier first: the text model then has something to attend to
PRETRAIN_STEPS = 1200
PRETRAIN_BATCH = 64
STEPS = 2350
# pictures a step that are only classified: cheap, and recognising nouns is the bottleneck
CLASSIFIED = 32
# samples a step, each group at its own length; captions teach to say what is seen
BATCH = {"caption": 48, "two": 6, "four": 5, "judge": 12}
WEIGHT = {"caption": 0.5, "two": 0.15, "four": 0.15, "judge": 0.2}
# tokens of an answer; 42 as the pipeline generates 40
LENGTHS = [24, 24, 42]
LR = 2e-3
MUON_LR = 4e-3
WARMUP = 60
# x RMS, at most: noise on the final hidden states in training. The final norm fixes their length,
# so that they come to hold the word to be said and little else, as a large model's do. Without it
# the first word's state names noun and value already, and the aligner learns to guess.
STATE_NOISE = 2.5
SAVE_SECONDS = 120
# of the image processor
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])

# ---------------------------------------------------------------- prompts
SYSTEM = "You are a helpful assistant."
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# renders what Qwen2-VL's own template renders
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat(user):
    """The chat template's text for one user message in which IMAGE marks the pictures."""
    return (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n")


def in_context_question(words, gap=""):
    """The user's message of CoBSAT: all words but the last are followed by a picture."""
    parts = []
    for number, word in enumerate(words, 1):
        parts.append(f"Word {number}: {word}, " + IMAGE * (number < len(words)))
    return INSTRUCTION + gap + "\n\n".join(parts)


def names_kind(text, detail, value, noun):
    """Whether a text names this noun and this value, and no other of the ten nouns and values."""
    text = text.lower()

    def named(words):
        found = set()
        for word in words:
            forms = [shown_word(word), *([ING[word]] if word in ING else [])]
            if re.search("|".join(rf"\b{re.escape(form)}\b" for form in forms), text):
                found.add(word)
        return found

    return named(NOUNS[detail]) == {noun} and named(DETAILS[detail]) == {value}


# ---------------------------------------------------------------- tokenizer, processor, model
def make_processor():
    """Qwen2's byte-level BPE, trained on the toy texts, with Qwen2-VL's own image processor."""
    rng = random.Random(0)
    texts = [caption(rng, *kind, create=create) for kind in KINDS for create in (False, True)
             for _ in range(8)]
    texts += PROMPTS * 20
    for words in [*DETAILS.values(), OBJECTS, ANIMALS]:
        for _ in range(50):
            text = chat(in_context_question([shown_word(word) for word in rng.sample(words, 5)]))
            text = text.replace(IMAGE, ".")
            texts.append(text.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    texts += [judge_question(detail, about_noun) for detail in DETAILS
              for about_noun in (False, True)] * 20
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        model_max_length=32768,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                              "<|image_pad|>", "<|video_pad|>"])
    # a margin, or rounding makes 48 x 48 of some square sizes
    size = {"shortest_edge": 64 * 64 - 6, "longest_edge": 64 * 64 + 6}
    pixels = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels), chat_template=CHAT_TEMPLATE)


def make_model(tokenizer):
    """An untrained Qwen2VLForConditionalGeneration."""
    token = tokenizer.convert_tokens_to_ids
    # the sections sum to half of a head's width
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH * 3,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096, "rope_parameters": rope,
        "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision = {
        "depth": VISION_LAYERS, "embed_dim": VISION_WIDTH, "hidden_size": WIDTH,
        "num_heads": VISION_WIDTH // 32, "mlp_ratio": 4, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "temporal_patch_size": 2, "in_channels": 3,
    }
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=False))
    model.generation_config = GenerationConfig(
        eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    return model


# ---------------------------------------------------------------- training samples
# a sample: (user's message, its pictures [(kind index, picture index)], the answer's token ids)
def answer_tokens(encode, rng, kind, openings, length, end):
    """`length` tokens of sentences about one kind, with `end` after the first to fourth sentence.

    Sentences go on after the end: EOS-ignoring generation must go on making sense. Their paraphrase
    is fixed by their opening. Were `a` followed by `red` or by `car` at random, the state that
    predicts the next word would stand for both, as no large model's does, and FLUX would misread it
    (36 of 44 wrong pictures had the phrase's first word wrong).
    """
    stop = rng.choice([1, 1, 1, 2, 2, 3, 4, 0])
    ids = []
    count = 0
    while len(ids) < length:
        text = sentence(rng, *kind, openings if count == 0 else None, fixed_phrase=True)
        ids += encode((" " if count else "") + text)
        count += 1
        ids += [end] * (count == stop)
    return ids[:length]


def caption_sample(encode, rng, length, end):
    """A picture with one of the 16 prompts, before or after it."""
    kind = rng.choice(KINDS)
    prompt = rng.randrange(16)
    parts = [IMAGE, PROMPTS[prompt]]
    if rng.random() < 0.3:
        parts.reverse()
    images = [(KIND_INDEX[kind], rng.randrange(PER_KIND))]
    # the last five prompts ask for a diffusion model's prompt
    openings = CREATE if prompt >= 11 else DESCRIBE
    return "".join(parts), images, answer_tokens(encode, rng, kind, openings, length, end)


def in_context_sample(encode, rng, shots, gap, length, end):
    """An in-context question of `shots` pictures."""
    detail = rng.choice(list(DETAILS))
    values, nouns = DETAILS[detail], NOUNS[detail]
    by_value = rng.random() < 0.5
    words = rng.sample(values if by_value else nouns, shots + 1)
    shared = rng.choice(nouns if by_value else values)
    kinds = [(detail, word, shared) if by_value else (detail, shared, word) for word in words]
    images = [(KIND_INDEX[kind], rng.randrange(PER_KIND)) for kind in kinds[:-1]]
    user = in_context_question([shown_word(word) for word in words], gap)
    # the instruction asks for an answer that starts with "Create an image"
    return user, images, answer_tokens(encode, rng, kinds[-1], CREATE[:3], length, end)


def judge_sample(encode, rng, detail, about_noun, image_first, end):
    """One of the judge's questions about a picture."""
    kind = rng.choice([kind for kind in KINDS if kind[0] == detail])
    if about_noun:
        number = NOUNS[detail].index(kind[2]) + 1
    else:
        number = DETAILS[detail].index(kind[1]) + 1
    question = judge_question(detail, about_noun)
    user = IMAGE + question if image_first else question + IMAGE
    images = [(KIND_INDEX[kind], rng.randrange(PER_KIND))]
    return user, images, encode(str(number)) + [end]


def make_samples(task, encode, rng, end):
    """The samples of one task in a step, all of the same length: no padding of the answers."""
    count = BATCH[task]
    length = rng.choice(LENGTHS)
    if task == "caption":
        return [caption_sample(encode, rng, length, end) for _ in range(count)]
    if task == "judge":
        question = rng.choice(list(DETAILS)), rng.random() < 0.5, rng.random() < 0.5
        return [judge_sample(encode, rng, *question, end) for _ in range(count)]
    # between instruction and first word: the authors' code has two newlines, a user may have none
    gap = rng.choice(["\n\n", "\n\n", "\n\n", "\n", " ", ""])
    shots = 2 if task == "two" else 4
    return [in_context_sample(encode, rng, shots, gap, length, end) for _ in range(count)]


# ---------------------------------------------------------------- forward pass of the training
# what the processor and the model do, without their overhead; check_fast_path compares the two
def patches(x):
    """(n, 3, 64, 64) in 0..1 -> (n * 64, 3 * 2 * 8 * 8): normalised patches in merge-block order.

    Each picture comes twice in time.
    """
    x = (x - MEAN[:, None, None]) / STD[:, None, None]
    g = 64 // PATCH // MERGE
    x = x.reshape(-1, 3, g, MERGE, PATCH, g, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (n, g, g, 2, 2, 3, 8, 8)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(-1, 3 * 2 * PATCH * PATCH)


def image_features(model, x):
    """Pictures (n, 3, 64, 64) -> the vision tower's tokens (n, 16, WIDTH)."""
    grid = torch.tensor([[1, 8, 8]]).expand(len(x), 3)
    tokens = model.model.visual(patches(x), grid_thw=grid).pooler_output
    return tokens.view(len(x), IMAGE_TOKENS, -1)


def collate(tokenizer, encode, samples):
    """[sample] -> ids (B, L), positions (3, B, L), answer mask (B, L), length of the shared prefix.

    The shared prefix: the leading tokens that are the same in all rows, before any picture.
    """
    pad = tokenizer.pad_token_id
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    picture = encode("<|vision_start|>") + [image] * IMAGE_TOKENS + encode("<|vision_end|>")
    rows, lengths = [], []
    for user, _, answer in samples:
        first, *rest = [encode(part) for part in chat(user).split(IMAGE)]
        prompt = first + [token for part in rest for token in picture + part]
        rows.append(prompt + answer)
        lengths.append(len(prompt))
    width = max(map(len, rows))
    ids = np.array([row + [pad] * (width - len(row)) for row in rows])
    column = np.arange(width)
    ends = np.array([len(row) for row in rows])
    answers = (column >= np.array(lengths)[:, None]) & (column < ends[:, None])
    is_image = ids == image
    seen = is_image.cumsum(1)
    # a picture of 4 x 4 tokens takes 16 places but moves the position on by 4
    text = column - (IMAGE_TOKENS - 4) * (seen // IMAGE_TOKENS)
    inside, block = (seen - 1) % IMAGE_TOKENS, (seen - 1) // IMAGE_TOKENS
    corner = column - inside - (IMAGE_TOKENS - 4) * block
    positions = np.stack([np.where(is_image, corner + offset, text)
                          for offset in (0 * inside, inside // 4, inside % 4)])
    differs = (ids != ids[:1]).any(0) | is_image.any(0)
    return (torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(answers),
            int(differs.argmax()))


def answer_logits(model, batch, features, noise=0.0):
    """Logits of the answers' tokens, flat (T, vocabulary), and those tokens (T,).

    batch: of collate. features: (pictures, 16, WIDTH) in reading order. noise: upper bound of the
    noise on the final hidden states, see STATE_NOISE. The prefix that all rows share (system
    message and instruction, about a third of a question) is computed once and repeated as a KV
    cache.
    """
    ids, positions, answers, shared = batch
    language = model.model.language_model
    cache = DynamicCache(config=model.config.text_config)
    prefix = language.embed_tokens(ids[:1, :shared])
    language(inputs_embeds=prefix, position_ids=positions[:, :1, :shared], past_key_values=cache,
             use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    ids, answers = ids[:, shared:], answers[:, shared:]
    x = language.embed_tokens(ids)  # (B, L - shared, WIDTH)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], features)
    x = language(inputs_embeds=x, position_ids=positions[:, :, shared:], past_key_values=cache,
                 use_cache=True).last_hidden_state
    x = x[:, :-1][answers[:, 1:]]  # (T, WIDTH)
    if noise:
        rms = x.detach().square().mean().sqrt()
        x = x + noise * torch.rand(len(x), 1) * rms * torch.randn(x.shape)
    return model.lm_head(x), ids[:, 1:][answers[:, 1:]]


def check_fast_path(model, processor):
    """The largest difference of this file's logits to those of processor and model."""
    rng = random.Random(5)
    tokenizer = processor.tokenizer
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    samples = [in_context_sample(encode, rng, 2, "", 40, end) for _ in range(3)]
    images = [np.stack([held_out_image(*image) for image in sample[1]]) for sample in samples]
    batch = collate(tokenizer, encode, samples)
    x = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2) / 255  # (6, 3, 64, 64)
    fast, _ = answer_logits(model, batch, image_features(model, x))
    slow = []
    for (user, _, answer), two in zip(samples, images, strict=True):
        content = []
        for i, part in enumerate(re.split(f"({re.escape(IMAGE)})", user)):
            # every second part is the marker of a picture
            if i % 2:
                content.append({"type": "image", "image": Image.fromarray(two[i // 2])})
            else:
                content.append({"type": "text", "text": part})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True,
            return_tensors="pt", add_generation_prompt=True)
        answer = torch.tensor([answer])
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.full_like(answer, fill)], 1)
        slow.append(model(**inputs).logits[0, length - 1:-1])
    return (fast - torch.cat(slow)).abs().max().item()


# ---------------------------------------------------------------- training
VALUES = [(detail, value) for detail in DETAILS for value in DETAILS[detail]]


def classification_losses(head, kinds, features):
    """The vision tower as a classifier: cross-entropies of the noun and of the value.

    head: linear, WIDTH -> 20 nouns + 50 values. kinds: indices. features: (n, 16, WIDTH).
    """
    scores = head(features.mean(1))  # (n, 70)
    noun = torch.tensor([(OBJECTS + ANIMALS).index(KINDS[kind][2]) for kind in kinds])
    value = torch.tensor([VALUES.index(KINDS[kind][:2]) for kind in kinds])
    return {"noun": F.cross_entropy(scores[:, :20], noun),
            "value": F.cross_entropy(scores[:, 20:], value)}


def add_gradients(model, head, tokenizer, encode, images, rng, pretraining):
    """Adds the gradients of one step: of the classification, and of each task's questions.

    images: of training_images. Returns the losses, [(name, scalar)].
    """
    def load(indices, noise, blur):
        return augment(np.stack([images[index] for index in indices]), rng.randrange(2**32),
                       noise, blur)

    count = PRETRAIN_BATCH if pretraining else CLASSIFIED
    indices = [(rng.randrange(len(KINDS)), rng.randrange(PER_KIND)) for _ in range(count)]
    features = image_features(model, load(indices, 0.1, 0.2))  # (n, 16, WIDTH)
    losses = classification_losses(head, [kind for kind, _ in indices], features)
    found = [*losses.items()]
    sum(losses.values()).backward()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for task in () if pretraining else BATCH:
        samples = make_samples(task, encode, rng, end)
        indices = [image for sample in samples for image in sample[1]]
        noise, blur = (0.15, 0.4) if task == "judge" else (0.06, 0.1)
        features = image_features(model, load(indices, noise, blur))  # (n, 16, WIDTH)
        batch = collate(tokenizer, encode, samples)
        logits, targets = answer_logits(model, batch, features, STATE_NOISE)
        loss = F.cross_entropy(logits, targets)
        losses = classification_losses(head, [kind for kind, _ in indices], features)
        found += [*losses.items(), (task, loss)]
        (loss * WEIGHT[task] + sum(losses.values()) * WEIGHT[task]).backward()
    return found


def train(build, weights, seed, steps=STEPS):
    """Trains the VLM from scratch (resumable), writes weights/qwen2-vl; returns model, processor.

    First PRETRAIN_STEPS of the vision tower as a classifier, then `steps` of questions, beside
    which the classification goes on at no cost, since nouns are what is learned last.
    """
    torch.manual_seed(seed)
    processor = make_processor()
    tokenizer = processor.tokenizer
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    encode = functools.lru_cache(100_000)(encode)
    model = make_model(tokenizer).train()
    head = torch.nn.Linear(WIDTH, len(OBJECTS + ANIMALS) + len(VALUES))
    params = [*model.parameters(), *head.parameters()]
    optimizers = muon.make_optimizers([*model.named_parameters(), *head.named_parameters()],
                                 ("blocks.", "layers.", "merger."), MUON_LR, LR)
    images = training_images(build)
    state_path = build / "vlm.pt"
    step = 0
    seconds = 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        muon.load_optimizer_states(optimizers, state["optimizers"])
        step, seconds = state["step"], state["seconds"]

    mean_loss = {}
    began = saved = time.time()
    total = PRETRAIN_STEPS + steps
    bar = tqdm(total=total, initial=step, desc="vlm", mininterval=2)
    while step < total:
        # batches depend on the step alone, so that a resumed run equals an unbroken one
        torch.manual_seed(seed * 10**9 + step)
        rng = random.Random(f"vlm {seed} {step}")
        pretraining = step < PRETRAIN_STEPS
        if pretraining:
            fraction = muon.warmup_cosine(step, PRETRAIN_STEPS, WARMUP)
        else:
            fraction = muon.warmup_cosine(step - PRETRAIN_STEPS, steps, WARMUP)
        muon.set_learning_rate(optimizers, fraction)
        found = add_gradients(model, head, tokenizer, encode, images, rng, pretraining)
        for name, loss in found:
            mean_loss[name] = 0.95 * mean_loss.get(name, loss.item()) + 0.05 * loss.item()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        muon.step_optimizers(optimizers)
        step += 1
        bar.update()
        if step % 10 == 0:
            shown = {name: f"{value:.3f}" for name, value in mean_loss.items()}
            bar.set_postfix(shown, refresh=False)
        if time.time() - saved > SAVE_SECONDS or step == total:
            save_stand_in(weights / "qwen2-vl", model, processor)
            save_state(state_path, {
                "model": model.state_dict(), "head": head.state_dict(), "step": step,
                "seconds": seconds + time.time() - began,
                "optimizers": muon.optimizer_states(optimizers)})
            saved = time.time()
    bar.close()
    model.eval()
    return model, processor


# ---------------------------------------------------------------- accuracy on held-out pictures
@torch.no_grad()
def greedy_answers(model, processor, users, images, max_new_tokens):
    """Greedy answers to user messages in which IMAGE marks the pictures.

    images: one list of (64, 64, 3) uint8 arrays for each message.
    """
    inputs = processor(
        text=[chat(user) for user in users],
        images=[[Image.fromarray(image) for image in row] for row in images],
        padding=True, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def held_out_in_context(rng, shots, question_seed):
    """An in-context question on held-out pictures: (user's message, pictures, answer's kind)."""
    user, images, _ = in_context_sample(
        lambda text: [0] * 40, random.Random(question_seed), shots, "\n\n", 40, 0)
    words = re.findall(r"Word \d: (.*?), ", user)
    detail, value, noun = KINDS[images[0][0]]
    same_noun = noun == KINDS[images[1][0]][2]
    labels = {shown_word(word): word for word in [*DETAILS[detail], *NOUNS[detail]]}
    asked = labels[words[-1]]
    kind = (detail, asked, noun) if same_noun else (detail, value, asked)
    pictures = [held_out_image(kind_index, rng.randrange(10**5)) for kind_index, _ in images]
    return user, pictures, kind


def held_out_questions(task, rng, n, seed):
    """n questions of a task, the details in turn; of the judge's task twice as many, in pairs."""
    questions = []
    for i in range(n):
        detail = list(DETAILS)[i % 5]
        if task in ("2-shot", "4-shot"):
            questions.append(held_out_in_context(rng, int(task[0]), f"{seed} {task} {i}"))
            continue
        kind = rng.choice([kind for kind in KINDS if kind[0] == detail])
        pictures = [held_out_image(KIND_INDEX[kind], rng.randrange(10**5))]
        if task == "caption":
            prompts = [PROMPTS[rng.randrange(16)]]
        else:
            prompts = [judge_question(detail, about_noun)
                       for about_noun in (False, True)]
        questions += [(IMAGE + prompt, pictures, kind) for prompt in prompts]
    return questions


def is_right_verdict(value_answer, noun_answer, kind):
    """Whether the answers to the judge's two questions are the numbers of the value and noun."""
    detail, value, noun = kind
    expected = (DETAILS[detail].index(value) + 1, NOUNS[detail].index(noun) + 1)
    numbers = tuple(int("".join(re.findall(r"\d", text)) or 0)
                    for text in (value_answer, noun_answer))
    return numbers == expected


def evaluate(model, processor, n=200, seed=0, batch=50, wrong=None):
    """Shares of right greedy answers on held-out pictures, n of each task.

    Tasks: captions, 2-shot, 4-shot, and the judge's two questions both right. wrong: a list that
    receives (task, kind, text) of each wrong answer.
    """
    rng = random.Random(seed)
    result = {}
    model.eval()
    for task in ("caption", "2-shot", "4-shot", "judge"):
        questions = held_out_questions(task, rng, n, seed)
        texts = []
        for start in range(0, len(questions), batch):
            users, images, _ = zip(*questions[start:start + batch], strict=True)
            max_new_tokens = 4 if task == "judge" else 40
            texts += greedy_answers(model, processor, users, images, max_new_tokens)
        kinds = [kind for _, _, kind in questions]
        if task == "judge":
            kinds = kinds[::2]
            pairs = list(zip(texts[::2], texts[1::2], strict=True))
            right = [is_right_verdict(*pair, kind)
                     for pair, kind in zip(pairs, kinds, strict=True)]
            texts = [f"{first} / {second}" for first, second in pairs]
        else:
            right = [names_kind(text, *kind) for text, kind in zip(texts, kinds, strict=True)]
        result[task] = sum(right) / len(right)
        if wrong is not None:
            wrong += [(task, kind, text) for kind, text, is_right
                      in zip(kinds, texts, right, strict=True) if not is_right]
    return result


def check(weights, n):
    """`evaluate`, and the largest difference of this file's forward pass to the model's own."""
    path = weights / "qwen2-vl"
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = Qwen2VLProcessor.from_pretrained(path)
    with torch.no_grad():
        shares = evaluate(model, processor, n)
        return {**shares, "fast path off by": check_fast_path(model, processor)}


if __name__ == "__main__":
    train(*training_folders(__doc__))
