"""ThinkDiff-LVLM: a vision-language model reasons, FLUX draws (paper section 3.3).

Training. A frozen VLM has described an image in N tokens y (`prepare_data.py lvlm`). The features x
of a random prefix, aligned, are the memory of a frozen T5 decoder, which is to write the text of
the other tokens. t are the T5 tokens of that text; only the aligner AN learns.

    x'   = AN(x) = RMSNorm(Linear(GELU(Linear(x))))                               (Eq. 1)
    loss = - mean_j log p_T5(t_j | t_<j, x'_1..x'_s)                              (Eq. 2)

Inference (Eq. 3). The VLM answers a context of interleaved texts and images; the aligned features
of its answer replace the T5 encoder's prompt_embeds in FLUX.

    y   (N,)         tokens of the VLM's answer
    x   (N, d_vlm)   their features: x_i is the final-RMSNorm state that predicts y_i
    x'  (N, d_t5)    aligned features, in the space of the T5 encoder's outputs
    s                length of the prefix, uniform in [1, N-1]
    B, S, L          batch size; lengths of the batch's longest memory and longest target

    python thinkdiff_lvlm.py generate --mini
    python thinkdiff_lvlm.py explain --mini
    torchrun --nproc_per_node 4 thinkdiff_lvlm.py train --data data/lvlm --out runs/lvlm
"""
import startup

import functools
import itertools
import math
import random

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, LogitsProcessorList

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
VARIANT = "lvlm"
# Flag, type, full size, miniature, meaning: of the [paper], the authors' [release], or [ours].
# The miniature's toy vocabulary is learned in far fewer steps than English, at a higher rate.
FEATURES = ("--features", ("generated", "input"), "generated", "generated",
            "[paper] input: of the prompt's tokens (Table 3), for data prepared with this flag")
TRAINING = [
    ("--steps", common.count, 25_000, 300, "[paper] optimizer steps"),
    ("--batch-size", positive, 96, 64, "[paper] samples a step, over all processes: 4 x 24"),
    ("--micro-batch", positive, 24, 64, "[ours] samples a process holds in memory at once"),
    ("--lr", number(float, 0, above=True), 1e-4, 2e-3, "[release] peak learning rate"),
    ("--lr-end", number(float, 0), 8e-5, 2e-4, "[release] learning rate at the end of the cosine"),
    ("--lr-horizon", common.count, 200_000, 300, "[release] step at which the cosine ends"),
    ("--warmup", number(int, 0), 2_000, 50, "[release] steps of linear warm-up from 1e-6"),
    ("--weight-decay", number(float, 0), 0.05, 0.05, "[release] AdamW's, on matrices only"),
    ("--masking", ("random", "none"), "random", "random",
     "[paper] random: a prefix in, the rest as target; none: all in, all as target (Table 3)"),
    FEATURES,
    ("--norm", NORMS, "t5", "t5",
     "[paper] the RMSNorm's weight starts from T5's or from 1 (default); none: no norm (Fig. 7)"),
    # T5-XXL is wide enough for either encoder's features, the miniature's T5 is not
    ("--hidden", positive, None, 512, "[paper] width between the aligner's layers: T5's"),
    ("--encoder-loss", number(float, 0), 0.0, 0.0,
     "[ours] weight of the encoder term (encoder_term.py, docs/METHOD.md); 0: the paper's loss"),
]
ADAM_BETAS = (0.9, 0.999)  # [release]
WARMUP_FROM = 1e-6  # [release] learning rate at step 0
MAX_TARGET = 128  # [release] T5 tokens of a target, EOS included
INSTRUCTION = (  # [paper] appendix B, for CoBSAT
    "I give you several words and pictures. First, please analyse what the next picture is. Then "
    "give me a detailed diffusion prompt to describe the next picture. Please only provide me the "
    "detailed prompt and start the answer with 'Create an image'.")
INFERENCE = [
    ("--size", common.image_size, 512, 64, "[release] width and height of an image in px"),
    ("--max-new-tokens", positive, 128, 128, "[release] longest answer of the VLM"),
    ("--temperature", number(float, 0), 0.0, 0.0, "[ours] of the VLM's sampling; 0: greedy"),
    ("--top-p", common.nucleus, 0.9, 0.9, "[release] nucleus of the VLM's sampling"),
    ("--instruction", common.utf8, INSTRUCTION, INSTRUCTION, "read before the context"),
    ("--best-of", positive, 1, 1, "[ours] images drawn for each that is kept; the VLM chooses"),
    ("--relay", bool, False, False, "baseline without aligner: the VLM's words through T5"),
    ("--t5-length", common.t5_length, 512, 48, "[ours] of --relay: T5 tokens of the padded words"),
    FEATURES,
]
EXAMPLE_LINE = '{"context": [{"text": "..."}, {"image": "a.png"}], "instruction": "..."}'
PROMPTS = [  # [paper] appendix B
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
    "Generate a prompt that can recreate the image in a 2D diffusion model.",
    "Provide a descriptive prompt to reproduce the given image using a diffusion model.",
    "Create a prompt suitable for a 2D diffusion model to generate the same image.",
    "Summarize the visual details as a prompt for a 2D diffusion model.",
    "Write a clear prompt to guide a 2D diffusion model in recreating the image.",
]


# ------------------------------------------------------------- features x of the frozen encoder
def caption_messages(image, prompt):
    """The chat that asks for a description of a PIL image; prompt: an index into PROMPTS."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": PROMPTS[prompt]}]
    return [{"role": "user", "content": content}]


def context_messages(parts, instruction):
    """The chat of an interleaved context; parts: ("text", str) or ("image", PIL), in order."""
    parts = [("text", f"{instruction}\n\n"), *parts]  # [release] the two newlines
    content = [{"type": kind, kind: value} for kind, value in parts]
    return [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": content}]


@torch.no_grad()
def generate_with_features(model, inputs, max_new_tokens, *, ignore_eos=True, do_sample=True,
                           temperature=0.6, top_p=0.9, seeds=None):
    """Answers the B conversations in `inputs` and keeps the features of the generated tokens.

    Returns y (B, N) int64, x (B, N, d_vlm) and lengths (B,): tokens before EOS (with ignore_eos N,
    and EOS is a token like any other). x[:, i] is the final-RMSNorm state that predicts y[:, i]:
    it stands one position before y_i, and lm_head(x_i) are the logits of y_i [release].
    N is max_new_tokens, or less if all rows reached EOS. seeds: see models.NucleusSampler."""
    sampler = models.NucleusSampler(inputs["input_ids"], max_new_tokens, temperature, top_p, seeds)
    # the prompt's forward pass ends at the state that predicts y_1, each later one at y_2, ...
    states = []
    hook = model.model.language_model.norm.register_forward_hook(
        lambda module, inputs, state: states.append(state[:, -1].clone()))
    eos = None if ignore_eos else model.generation_config.eos_token_id
    try:
        sequences = model.generate(
            **inputs, max_new_tokens=max_new_tokens, eos_token_id=eos,
            logits_processor=LogitsProcessorList([sampler] * do_sample),
            # nothing from the model's generation_config
            do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            # placeholders of images are no words
            suppress_tokens=[model.config.image_token_id, model.config.video_token_id])
    finally:
        hook.remove()
    y = sequences[:, inputs["input_ids"].shape[1]:]
    ends = torch.isin(y, torch.tensor([] if eos is None else eos, dtype=y.dtype, device=y.device))
    return y, torch.stack(states, dim=1), (ends.cumsum(-1) == 0).sum(-1)


# ----------------------------------------------------------------------------------- masking
def split(x, y, position, args):
    """The features x_1..x_s, their tokens, and y_{s+1}..y_N to be written; x (N, d_vlm), y (N,).

    The split depends on the seed and the sample's position in the training stream.
    --masking none (Table 3): all features, all tokens; so too for features of the prompt's tokens,
    none of which is to be written."""
    if args.masking == "none" or args.features == "input":
        return x, y, y
    s = random.Random(f"{args.seed} {position}").randint(1, len(y) - 1)
    return x[:s], y[:s], y[s:]


def collate(triples, tokenizers, device):
    """Of split's -> x (B, S, d_vlm) right-padded, its mask (B, S), labels (B, L).

    The target is text: decoded by the VLM's tokenizer, encoded by T5's, which adds EOS. Padding of
    the labels is -100, which the loss ignores."""
    xs, _, ys = zip(*triples, strict=True)
    vlm_tokenizer, t5_tokenizer = tokenizers
    x = pad_sequence(xs, batch_first=True)  # (B, S, d_vlm)
    mask = pad_sequence([torch.ones(len(x), dtype=torch.long) for x in xs], batch_first=True)
    texts = vlm_tokenizer.batch_decode(ys, skip_special_tokens=True)
    target = t5_tokenizer(texts, padding=True, truncation=True, max_length=MAX_TARGET,
                          return_tensors="pt")
    labels = target.input_ids.masked_fill(target.attention_mask == 0, -100)  # (B, L)
    return common.to_device((x, mask, labels), device)


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
    data = training_data.FeatureDataset(args.data, caption_messages, args)
    n_train = training_data.train_size(data, args.held_out)
    common.start_processes(device)

    tokenizers = pretrained(AutoTokenizer, args.vlm), pretrained(AutoTokenizer, args.t5)
    vlm = models.load_for_recomputing(data, args, device, dtype)
    load_t5 = models.load_t5 if args.encoder_loss else models.load_t5_decoder
    t5 = load_t5(args.t5, device, dtype)
    if args.compile:
        t5.decoder.compile(dynamic=True)
    find_targets = encoder_term.target_finder(args, t5, tokenizers)
    aligner = new_aligner(t5, data.meta["d_vlm"], args)
    optimizer = new_optimizer(aligner, args)
    run = training_run.TrainingRun(args, data, n_train, aligner, optimizer)
    # the aligner's weights stay fp32; its products are in bf16 where the models are
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def decoder_batches(batches):
        """Reads ahead, splits and collates: for each batch a list of micro-batches."""
        for samples in training_data.read_ahead(data, batches, args.workers):
            if vlm:
                samples = models.recompute_features(vlm, samples, args)
            splits = [split(x, y, position, args) for position, x, y in samples]
            yield [(find_targets(group), *collate(group, tokenizers, device))
                   for group in training_data.micro_batches(splits, args.micro_batch)]

    @torch.no_grad()
    def held_out_loss():
        """Mean cross-entropy of a token in the held-out samples, always with the same splits."""
        batches = training_data.held_out_batches(data, n_train, args.batch_size)
        total = torch.zeros(2)
        for _, x, mask, labels in itertools.chain.from_iterable(decoder_batches(batches)):
            with autocast:
                x_aligned = aligner(x)
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
        for targets, x, mask, labels in micro_batches:
            with autocast:
                x_aligned = aligner(x)  # Eq. 1: (B, S, d_t5)
            nll, _ = t5_nll(t5, x_aligned, mask, labels)  # Eq. 2
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
    """A context: {"chat": as the VLM reads it}."""
    parts = [(kind, open_image(folder / value) if kind == "image" else value)
             for part in item["context"] for kind, value in part.items()]
    return {"chat": context_messages(parts, item.get("instruction", args.instruction))}


def encode_contexts(contexts, args, device, dtype):
    """The contexts that the VLM can read, with its answer: "words" and features "x" (n, d_vlm)."""
    model, processor = models.load_vlm(args.vlm, device, dtype, **pipelines.int8(args.quantize))
    room = model.config.get_text_config().max_position_embeddings - args.max_new_tokens
    encode = functools.partial(models.encode_messages, processor, longest=room, number_images=True)
    contexts = pipelines.usable(contexts, lambda c: encode([c["chat"]]), args)
    starts = range(0, len(contexts), args.batch_size)
    for start in tqdm(starts, "answer", disable=len(contexts) == 1):
        group = contexts[start:start + args.batch_size]
        inputs = encode([c["chat"] for c in group]).to(device)
        y, x, lengths = generate_with_features(
            model, inputs, args.max_new_tokens, ignore_eos=False, do_sample=args.temperature > 0,
            temperature=args.temperature, top_p=args.top_p, seeds=[c["seed"] for c in group])
        # the state that predicts EOS stands for no word; it is kept only if there is no other
        x = [x_c[:max(n, 1)] for x_c, n in zip(x, lengths, strict=True)]
        if args.features == "input":
            x = models.prompt_features(model, inputs)
        for c, x_c, y_c, n in zip(group, x, y, lengths, strict=True):
            words = processor.tokenizer.decode(y_c[:n], skip_special_tokens=True).strip()
            cut = " (cut at --max-new-tokens)" if n == args.max_new_tokens else ""
            print(f"{c['out']}: {words}{cut}")
            # FLUX's pooled CLIP embedding is that of the empty text
            c |= {"x": x_c, "words": words, "text": "",
                  "metadata": {"words": words, "relay": args.relay}}
    return contexts


@torch.no_grad()
def build_prompt_embeds(pipe, context, aligner, args):
    """The prompt of Eq. 3: x' (n, d_t5); with --relay the words through T5's encoder instead."""
    if args.relay:
        return pipelines.text_embeds(pipe, context["words"], args)
    return aligner(context["x"][None])[0]


def generate(args):
    """Context -> VLM -> aligner -> FLUX (Eq. 3) or another decoder."""
    pipelines.pipeline_options(args)
    contexts = pipelines.read_contexts(args, read_context, EXAMPLE_LINE)
    device, dtype = pick_device(args.dtype)
    aligner = None
    if not args.relay:
        d_vlm = models.feature_width(args.vlm)
        aligner = load_aligner(args.aligner, d_vlm, pipelines.prompt_width(args))
        aligner.to(device, dtype)
    # the frozen encoder has left memory when FLUX comes
    contexts = encode_contexts(contexts, args, device, dtype)
    needs_t5 = args.true_cfg > 1 or args.relay
    pipe = pipelines.load_decoder(args, device, dtype, needs_t5)
    build_prompt = functools.partial(build_prompt_embeds, pipe, aligner=aligner, args=args)
    pipelines.draw_contexts(pipe, contexts, build_prompt, args)


# ----------------------------------------------------------------------------------- explain
@torch.no_grad()
def explain(args):
    """Walks one sample through the method and prints each step."""
    device, dtype = pick_device(args.dtype)
    model, processor = models.load_vlm(args.vlm, device, dtype)
    decode = functools.partial(processor.tokenizer.decode, skip_special_tokens=True)
    chat = caption_messages(open_image(args.image), args.prompt)
    inputs = models.encode_messages(processor, [chat]).to(device)
    y, x, _ = generate_with_features(model, inputs, args.tokens, do_sample=False)
    y, x = y[0], x[0]  # (N,), (N, d_vlm)
    text, n_equal = decode(y), (model.lm_head(x).argmax(-1) == y).sum()
    print(f"image    {args.image}\nprompt   {PROMPTS[args.prompt]}\nanswer   {text}\n\n"
          f"argmax lm_head(x_i) = y_i for {n_equal} of {len(y)} tokens\n")
    del model

    t5 = inspection.Reader(args.t5, device, dtype)
    aligner = load_aligner(args.aligner, x.shape[-1], t5.model.config.d_model).to(device)
    x_aligned, (t, tokens) = aligner(x), t5.encode(text)
    inspection.print_tensors({
        "x   features": x,
        "t   T5 encoder's outputs for the same text": t,
        "x'  aligned": x_aligned,
        "x'  new aligner, norm from T5 (section 3.2)": new_aligner(t5.model, x.shape[-1], args)(x),
        "x'  new aligner, norm of ones": Aligner(x.shape[-1], t.shape[-1]).to(device)(x)})
    x_prefix, _, y_rest = split(x, y, 2, args)
    prefix, target = decode(y[:len(x_prefix)]), decode(y_rest)
    t1 = t5.encode(prefix)[0]
    inspection.print_split(t5, prefix, target, aligner(x_prefix), t1)
    inspection.print_nearest(x_aligned, t, tokens)
    if not args.no_picture:
        pipelines.draw_features(x_aligned, args, device, dtype)


# ------------------------------------------------------------------------------ command line
def main():
    parser = common.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    vlm, aligner = MODEL_FLAGS[VARIANT]
    common.add_command(commands, "train", train, "train the aligner", {"data and models": [
        ("--data", str, "data/lvlm", "data/mini-lvlm", "folder of `prepare_data.py lvlm`"),
        ("--out", str, f"runs/{VARIANT}", f"runs/mini-{VARIANT}", "checkpoints, log and aligner"),
        vlm, T5_FLAG, DTYPE_FLAG], "method": TRAINING, "run": common.RUN_FLAGS})

    p = common.add_command(commands, "generate", generate, "draw the image of a context", {})
    pipelines.add_context_flags(p, VARIANT, EXAMPLE_LINE)
    common.add_flags(p, {
        "output": pipelines.OUTPUT_FLAGS, "models": [vlm, aligner, DTYPE_FLAG],
        "method": INFERENCE, "drawing": pipelines.FLUX_FLAGS, **pipelines.SPEED})
    pipelines.add_decoder_flags(p)

    common.add_command(commands, "explain", explain, "walk one sample through the method", {
        "sample": [
            ("--image", str, "image.jpg", f"{common.EXAMPLE}/white_car.png", "the sample's image"),
            ("--prompt", number(int, 0, len(PROMPTS) - 1), 0, 0, "number of the prompt"),
            ("--tokens", number(int, 2, 10_000), 64, 40, "[paper] N, as in prepare_data.py"),
            *inspection.FLAGS],
        "models": [vlm, T5_FLAG, aligner, DTYPE_FLAG],
        "drawing": [*INFERENCE[:1], *pipelines.FLUX_FLAGS]},
        masking="random", features="generated", norm="t5", hidden=None, captions="raw")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    common.cli_main(main)
