"""ThinkDiff-CLIP: images and words compose one prompt, FLUX draws it (paper section 3.4).

Training. An image has a caption, of which T1 are the first words, T2 the others. The aligned tokens
x of a frozen CLIP and the outputs t1 of a frozen T5 encoder for T1 are the memory of a frozen T5
decoder, which is to write T2. t are the T5 tokens of T2; only the aligner AN learns.

    x'   = AN(x) = RMSNorm(Linear(GELU(Linear(x))))                               (Eq. 1)
    loss = - mean_j log p_T5(t_j | t_<j, [x' ; t1])                               (Eq. 4)

Inference (Eq. 5). The aligned tokens of any number of images, then the T5 encoder's outputs for a
text, are the prompt_embeds of FLUX, or of CogVideoX for a video (appendix D).

    x   (N, d_vlm)   N = 65 tokens of an image: CLS and the 16 x 16 grid pooled to 8 x 8
    x'  (N, d_t5)    aligned features, in the space of the T5 encoder's outputs
    t1  (n, d_t5)    the T5 encoder's outputs for T1
    B, S, L          batch size; lengths of the batch's longest memory and longest target

    python thinkdiff_clip.py generate --mini
    python thinkdiff_clip.py explain --mini
    torchrun --nproc_per_node 4 thinkdiff_clip.py train --data data/cc3m --out runs/clip
"""
import startup

import functools
import itertools
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize, pil_to_tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import common
import encoder_term
import inspection
import models
import pipelines
import training_data
import training_run
from aligner import NORMS, Aligner, load_aligner
from common import DTYPE_FLAG, MODEL_FLAGS, T5_FLAG, number, pick_device, positive, pretrained
from images import open_image

# --------------------------------------------------------------------------- hyperparameters
VARIANT = "clip"
# Flag, type, full size, miniature, meaning: of the [paper], the authors' [release], or [ours].
# The miniature's toy vocabulary is learned in far fewer steps than English, at a higher rate.
TRAINING = [
    ("--steps", common.count, 100_000, 1_500, "[paper] optimizer steps"),
    ("--batch-size", positive, 168, 64, "[paper] samples a step, over all processes: 4 x 42"),
    ("--micro-batch", positive, 42, 64, "[ours] samples a process holds in memory at once"),
    ("--lr", number(float, 0, above=True), 1e-4, 2e-3, "[release] peak learning rate"),
    ("--lr-end", number(float, 0), 8e-5, 2e-4, "[release] learning rate at the end of the cosine"),
    ("--lr-horizon", common.count, 200_000, 1_500, "[release] step at which the cosine ends"),
    ("--warmup", number(int, 0), 2_000, 50, "[release] steps of linear warm-up from 1e-6"),
    ("--weight-decay", number(float, 0), 0.05, 0.05, "[release] AdamW's, on matrices only"),
    ("--masking", ("random", "none"), "random", "random",
     "[paper] random: first words in, the rest as target; none: no words in, all as target"),
    ("--norm", NORMS, "t5", "t5",
     "[paper] the RMSNorm's weight starts from T5's or from 1 (default); none: no norm (Fig. 7)"),
    ("--captions", ("lower", "raw"), "lower", "raw",
     "[release] lower: lower case, at most 50 words, a space for each of . ! \" ( ) * # : ; ~"),
    # T5-XXL is wide enough for either encoder's features, the miniature's T5 is not
    ("--hidden", positive, None, 512, "[paper] width between the aligner's layers: T5's"),
    ("--encoder-loss", number(float, 0), 0.0, 0.0,
     "[ours] weight of the encoder term (encoder_term.py, docs/METHOD.md); 0: the paper's loss"),
]
ADAM_BETAS = (0.9, 0.999)  # [release]
WARMUP_FROM = 1e-6  # [release] learning rate at step 0
MAX_TEXT = 32  # [release] T5 tokens of T1 and of T2, EOS included
MAX_WORDS = 50  # [release] of --captions lower
MAX_SIDE = 512  # [ours] px; larger JPEGs are decoded at a fraction, the CLIP sees 224
INFERENCE = [
    ("--size", common.image_size, 1024, 64, "[release] width and height of an image in px"),
    ("--t5-length", common.t5_length, 128, 48, "[release] T5 tokens of the padded text (FLUX)"),
    ("--empty-text", ("pad", "none"), "pad", "none",
     "[release] behind images without a text (FLUX); pad: T5's empty text, padded; none: nothing"),
]
EXAMPLE_LINE = '{"image": ["a.png", "b.png"], "text": "...", "image_weight": [1, 0.5]}'


# ------------------------------------------------------------- features x of the frozen encoder
def preprocess(image, size):
    """PIL RGB image -> pixels (3, size, size) uint8: resized, not cropped, as BLIP-2 does."""
    return pil_to_tensor(image.resize((size, size), Image.BICUBIC)).contiguous()


@torch.no_grad()
def image_tokens(clip, pixels):
    """x = CLIP(I), pooled (section 3.4): pixels (B, 3, size, size) uint8 -> x (B, 65, d_vlm)."""
    pixels = normalize(pixels / 255, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)  # fp32
    x = clip(pixels.to(clip.dtype)).last_hidden_state  # (B, 1 + 16 * 16, d_vlm)
    # BLIP-2's has been through its post-layernorm already
    if isinstance(clip, CLIPVisionModel):
        x = clip.post_layernorm(x)
    return pool(x)


def pool(x):
    """Halves the grid: x (B, 1 + g * g, d) -> (B, 1 + g/2 * g/2, d) (section 3.4); keeps CLS.

    Bilinear with factor 2 [release] is the mean of 2 x 2 neighbours."""
    g = math.isqrt(x.shape[1] - 1)
    grid = x[:, 1:].transpose(1, 2).unflatten(2, (g, g))  # (B, d, g, g)
    grid = F.interpolate(grid, scale_factor=0.5, mode="bilinear", align_corners=False)
    return torch.cat([x[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


# ----------------------------------------------------------------------------------- masking
def split(caption, position, args):
    """T1 and T2: the words before and after an inner boundary; of one word, "" and the word.

    The split depends on the seed and the sample's position in the training stream.
    --masking none: T1 is empty, T2 the caption. --captions lower: the release's form of it."""
    words = caption.split()
    if args.captions == "lower":
        words = re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:MAX_WORDS]
    if args.masking == "none" or len(words) < 2:
        return "", " ".join(words)
    s = random.Random(f"{args.seed} {position}").randint(1, len(words) - 1)
    return " ".join(words[:s]), " ".join(words[s:])


@torch.no_grad()
def collate(triples, t5_tokenizer, clip, t5):
    """[(pixels, T1, T2)] -> x (B, 65, d_vlm), t1 (B, n, d_t5), mask of [x' ; t1], labels (B, L).

    T1 and T2 are cut at MAX_TEXT T5 tokens; an empty T1 is T5's EOS alone. Padding of
    the labels is -100, which the loss ignores."""
    pixels, *texts = zip(*triples, strict=True)
    first, target = (t5_tokenizer(text, padding=True, truncation=True, max_length=MAX_TEXT,
                                  return_tensors="pt") for text in texts)
    labels = target.input_ids.masked_fill(target.attention_mask == 0, -100)  # (B, L)
    pixels, ids, t1_mask, labels = common.to_device(
        (torch.stack(pixels), first.input_ids, first.attention_mask, labels), t5.device)
    x = image_tokens(clip, pixels)
    t1 = t5.encoder(input_ids=ids, attention_mask=t1_mask).last_hidden_state
    return x, t1, torch.cat([t1_mask.new_ones(x.shape[:2]), t1_mask], dim=1), labels


# -------------------------------------------------------------------------------------- loss
def t5_nll(t5, x_aligned, mask, labels):
    """Sum of -log p of the target tokens, and their number (Eq. 2, 4).

    x_aligned (B, S, d_t5) takes the place of the T5 encoder's outputs, with mask (B, S);
    labels (B, L), -100 ignored. The loss is the mean over all target tokens of a step."""
    hidden = t5.decoder(
        input_ids=t5._shift_right(labels), encoder_hidden_states=x_aligned.to(t5.dtype),
        encoder_attention_mask=mask, use_cache=False).last_hidden_state  # (B, L, d_t5)
    # T5 1.0 shares lm_head and embedding and scales; v1.1 and Flan-T5 do not
    if t5.config.scale_decoder_outputs:
        hidden = hidden * t5.model_dim ** -0.5
    # bf16, on a GPU: in chunks, so that the logits (B * L, V) are never in memory as a whole. fp32,
    # on a CPU: whole, which is faster and takes 0.6 GB for 24 samples of 64 tokens at full size
    options = None if t5.dtype == torch.float32 else torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(
        hidden.flatten(0, 1), t5.lm_head.weight, labels.flatten(), reduction="none",
        options=options)
    # summed in fp32
    return losses.float().sum(), (labels != -100).sum()


# ------------------------------------------------------------------------------------- train
def learning_rate(step, args):
    """Linear warm-up from 1e-6, then a cosine from --lr to --lr-end at --lr-horizon [release]."""
    if step < args.warmup:
        return WARMUP_FROM + (args.lr - WARMUP_FROM) * step / args.warmup
    done = min(1.0, (step - args.warmup) / max(1, args.lr_horizon - args.warmup))
    return args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


def new_aligner(t5, d_vlm, args):
    """A fresh aligner in fp32, its RMSNorm started from T5's (section 3.2)."""
    torch.manual_seed(args.seed)
    aligner = Aligner(d_vlm, t5.config.d_model, norm=args.norm, hidden=args.hidden,
                      eps=t5.config.layer_norm_epsilon)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)
    return aligner.to(t5.device)


def new_optimizer(aligner, args):
    """AdamW, with weight decay on matrices only [release]."""
    # a group for each parameter, in the module's order: checkpoints name the states by it
    groups = [{"params": [p], "weight_decay": args.weight_decay if p.ndim > 1 else 0.0}
              for p in aligner.parameters()]
    # in a step without a readable sample there is no other gradient
    for p in aligner.parameters():
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=groups[0]["params"][0].is_cuda)


def train(args):
    """Random masked training: everything but the aligner is frozen (section 3.3, 3.4)."""
    training_run.check_run_folder(args)
    device, dtype = pick_device(args.dtype)
    size = models.vision_tower(args.vlm)[1].image_size
    data = training_data.ImageCaptionDataset(
        args.data, Path(args.out) / "pairs.jsonl",
        lambda ref: preprocess(open_image(ref, max_side=MAX_SIDE, exact=False), size), args.resume)
    n_train = training_data.train_size(data, args.held_out)
    common.start_processes(device)

    t5_tokenizer = pretrained(AutoTokenizer, args.t5)
    clip = models.load_clip(args.vlm, device, dtype)
    t5 = models.load_t5(args.t5, device, dtype, args.offload)
    if args.compile:
        clip.compile()
        t5.decoder.compile(dynamic=True)
    find_targets = encoder_term.target_finder(args, t5, t5_tokenizer, data, n_train)
    aligner = new_aligner(t5, clip.config.hidden_size, args)
    optimizer = new_optimizer(aligner, args)
    run = training_run.TrainingRun(args, data, n_train, aligner, optimizer)
    # the aligner's weights stay fp32; its products are in bf16 where the models are
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def decoder_batches(batches):
        """Reads ahead, splits and collates: for each batch a list of micro-batches."""
        for samples in training_data.read_ahead(data, batches, args.workers):
            splits = [(pixels, *split(text, position, args)) for position, pixels, text in samples]
            yield [(find_targets(group), *collate(group, t5_tokenizer, clip, t5))
                   for group in training_data.micro_batches(splits, args.micro_batch)]

    @torch.no_grad()
    def held_out_loss():
        """Mean cross-entropy of a token in the held-out samples, always with the same splits."""
        batches = training_data.held_out_batches(data, n_train, args.batch_size)
        total = torch.zeros(2)
        for _, x, t1, mask, labels in itertools.chain.from_iterable(decoder_batches(batches)):
            with autocast:
                x_aligned = torch.cat([aligner(x), t1], dim=1)
            total += torch.stack(t5_nll(t5, x_aligned, mask, labels)).cpu()
        return (total[0] / total[1]).item()

    batches = training_data.training_batches(n_train, args, run.step)
    for micro_batches in run.steps(decoder_batches(batches)):
        lr = learning_rate(run.step, args)
        n_tokens, n_targets = torch.zeros(2, device=device)
        for targets, *_, labels in micro_batches:
            n_tokens += (labels != -100).sum()
            n_targets += targets[1].sum() if targets else 1
        # the mean is over the tokens of the whole step, however they are spread
        common.sum_over_processes(n_tokens, n_targets)
        loss = torch.zeros((), device=device)
        for targets, x, t1, mask, labels in micro_batches:
            with autocast:
                x_aligned = torch.cat([aligner(x), t1], dim=1)  # Eq. 1, [x' ; t1]: (B, S, d_t5)
            nll, _ = t5_nll(t5, x_aligned, mask, labels)  # Eq. 4
            part = nll / n_tokens
            if targets:
                distance = encoder_term.distance(x_aligned[:, :x.shape[1]], *targets)
                part = part + args.encoder_loss * distance / n_targets
            part.backward()
            loss += part.detach()
        common.sum_over_processes(*(p.grad for p in aligner.parameters()))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        run.add(loss, lr)
        if run.is_due(args.eval_every):
            run.add_held_out(held_out_loss())
        if run.every(args.save_every):
            run.save()
    run.finish()


# --------------------------------------------------------------------------------- inference
def read_context(item, folder, args):
    """A context: {"images": PIL images, "weights": one for each image, "text"}."""
    paths, text = item.get("image", []), item.get("text", "")
    weights = item.get("image_weight") or args.image_weight or [1.0] * len(paths)
    weights = [*map(pipelines.image_weight, weights)]
    if len(weights) != len(paths):
        raise common.UserError(f"{len(weights)} image weights for {len(paths)} pictures: give one "
                               "for each, in the same order, or none")
    metadata = {"images": paths, "weights": weights, "text": text}
    images = [open_image(folder / path, max_side=MAX_SIDE, exact=False) for path in paths]
    return {**metadata, "images": images, "metadata": metadata}


def encode_contexts(contexts, args, device, dtype):
    """Adds the tokens of its images to each context: "x", a list of (65, d_vlm)."""
    clip = None
    for c in tqdm(contexts, "encode", disable=len(contexts) == 1):
        c["x"] = []
        if c["images"]:
            clip = clip or models.load_clip(args.vlm, device, dtype)
            pixels = [preprocess(image, clip.config.image_size) for image in c["images"]]
            c["x"] = image_tokens(clip, torch.stack(pixels).to(device))
    return contexts


@torch.no_grad()
def build_prompt_embeds(pipe, context, aligner, args):
    """The prompt of Eq. 5: [x'_1 ; x'_2 ; ... ; LLM_E(T)] (N, d_t5); weights multiply the x'."""
    prompt = [weight * aligner(x[None])[0]
              for x, weight in zip(context["x"], context["weights"], strict=True)]
    if context["text"] or args.empty_text == "pad":
        n_image_tokens = sum(map(len, prompt))
        prompt.append(pipelines.text_embeds(pipe, context["text"], args, n_image_tokens))
    return torch.cat(prompt)


def generate(args):
    """Images -> CLIP -> aligner, text -> T5 encoder, both -> FLUX (Eq. 5) or another decoder."""
    pipelines.pipeline_options(args)
    contexts = pipelines.read_contexts(args, read_context, EXAMPLE_LINE)
    device, dtype = pick_device(args.dtype)
    aligner = None
    if any(c["images"] for c in contexts):
        d_vlm = models.vision_tower(args.vlm)[1].hidden_size
        aligner = load_aligner(args.aligner, d_vlm, pipelines.prompt_width(args))
        aligner.to(device, dtype)
    # the frozen encoder has left memory when FLUX comes
    contexts = encode_contexts(contexts, args, device, dtype)
    needs_t5 = args.true_cfg > 1 or args.empty_text == "pad" or any(c["text"] for c in contexts)
    pipe = pipelines.load_decoder(args, device, dtype, needs_t5)
    build_prompt = functools.partial(build_prompt_embeds, pipe, aligner=aligner, args=args)
    pipelines.draw_contexts(pipe, contexts, build_prompt, args)


# ----------------------------------------------------------------------------------- explain
@torch.no_grad()
def explain(args):
    """Walks one sample through the method and prints each step."""
    device, dtype = pick_device(args.dtype)
    clip = models.load_clip(args.vlm, device, dtype)
    image, text = open_image(args.image, max_side=MAX_SIDE, exact=False), args.text
    pixels = preprocess(image, clip.config.image_size)[None].to(device)
    x = image_tokens(clip, pixels)[0]  # (65, d_vlm)
    print(f"image    {args.image}\ncaption  {text}\n\n"
          f"CLIP's {clip.embeddings.num_positions} tokens, pooled: {len(x)} (section 3.4)\n")
    del clip

    t5 = inspection.Reader(args.t5, device, dtype)
    aligner = load_aligner(args.aligner, x.shape[-1], t5.model.config.d_model).to(device)
    x_aligned, (t, tokens) = aligner(x), t5.encode(text)
    inspection.print_tensors({
        "x   features": x,
        "t   T5 encoder's outputs for the same text": t,
        "x'  aligned": x_aligned,
        "x'  new aligner, norm from T5 (section 3.2)": new_aligner(t5.model, x.shape[-1], args)(x),
        "x'  new aligner, norm of ones": Aligner(x.shape[-1], t.shape[-1]).to(device)(x)})
    prefix, target = split(text, 2, args)
    t1 = t5.encode(prefix)[0]
    inspection.print_split(t5, prefix, target, torch.cat([x_aligned, t1]), t1)
    inspection.print_nearest(x_aligned, t, tokens)
    if not args.no_picture:
        pipelines.draw_features(x_aligned, args, device, dtype)


# ------------------------------------------------------------------------------ command line
def main():
    parser = common.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    vlm, aligner = MODEL_FLAGS[VARIANT]
    common.add_command(commands, "train", train, "train the aligner", {"data and models": [
        ("--data", str, ["data/cc3m", "data/cc12m", "data/sbu"], ["data/mini"],
         "folders (of KEY.jpg and KEY.txt, or of tars), WebDataset tars, brace patterns of them"),
        ("--out", str, f"runs/{VARIANT}", f"runs/mini-{VARIANT}", "checkpoints, log and aligner"),
        ("--offload", bool, False, False, "T5's encoder in main memory: 9.3 GB less, slower"),
        vlm, T5_FLAG, DTYPE_FLAG], "method": TRAINING, "run": common.RUN_FLAGS})

    p = common.add_command(commands, "generate", generate, "draw the image of a context", {})
    pipelines.add_context_flags(p, VARIANT, EXAMPLE_LINE)
    common.add_flags(p, {
        "output": pipelines.OUTPUT_FLAGS, "models": [vlm, aligner, DTYPE_FLAG],
        "method": INFERENCE, "drawing": pipelines.FLUX_FLAGS, **pipelines.SPEED})
    pipelines.add_decoder_flags(p)
    pipelines.add_composition_flags(p)

    common.add_command(commands, "explain", explain, "walk one sample through the method", {
        "sample": [
            ("--image", str, "image.jpg", f"{common.EXAMPLE}/white_car.png", "the sample's image"),
            ("--text", common.utf8, "a caption", "A picture of a white car. The car is white.",
             "its caption"),
            *inspection.FLAGS],
        "models": [vlm, T5_FLAG, aligner, DTYPE_FLAG],
        "drawing": [*INFERENCE[:1], *pipelines.FLUX_FLAGS]},
        masking="random", features="generated", norm="t5", hidden=None, captions="raw")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    common.cli_main(main)
