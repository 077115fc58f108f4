"""The encoder term: a second loss, ours and not the paper's, off by default (`--encoder-loss 0`).

Eq. 2 and Eq. 4 ask only that T5's decoder can read x'; where it does not look, x' is free, but FLUX
looks there. What FLUX was trained on are the outputs e of T5's *encoder*, so for the same text they
are what x' should be:

    loss = Eq. 2 (or 4) + lambda * sum_j w_j |x'_m(j) - e_j|^2 / |e_j|^2 / sum_j w_j

    ThinkDiff-LVLM  each token y_j of the answer has an x'_j, so m(j) = j; e_j is the mean encoder
                    output of the T5 tokens that overlap y_j in the text; w_j is 1, or 0 without any
    ThinkDiff-CLIP  e_j is the encoder output of a token of the caption, m(j) its nearest x'; w_j is
                    -log of the share of the captions that hold the token

No image, no diffusion model and no other data take part. See docs/METHOD.md.
"""
import functools
import itertools

import torch

from common import UserError
from training_data import sample_order

# tokens of a text that are encoded
MAX_TEXT = 128
# captions from which the shares of tokens are counted
N_CAPTIONS = 5000


def distance(x_aligned, e, weight, nearest):
    """Weighted sum of squared distances between x' and T5's encoder outputs, relative to |e|^2.

    x_aligned (B, S, d_t5); e (B, M, d_t5) fp32; weight (B, M) fp32, 0 for padding. nearest: each
    e_j is compared with its nearest x'; otherwise M is S, and with x'_j."""
    x_aligned = x_aligned.float()
    if nearest:
        nearest_x = torch.cdist(e, x_aligned.detach()).argmin(-1)  # (B, M)
        x_aligned = x_aligned.gather(1, nearest_x[..., None].expand_as(e))  # (B, M, d_t5)
    squared = (x_aligned - e).square().sum(-1) / e.square().sum(-1).clamp(min=1e-9)  # (B, M)
    return (weight * squared).sum()


def encode(texts, t5, t5_tokenizer):
    """T5's encoder outputs of B texts, at most MAX_TEXT tokens each, and the tokenizer's output.

    Returns e (B, M, d_t5) in T5's dtype and {"input_ids", "attention_mask", "offset_mapping"}."""
    tokens = t5_tokenizer(texts, padding=True, truncation=True, max_length=MAX_TEXT,
                          return_offsets_mapping=True, return_tensors="pt").to(t5.device)
    return t5.encoder(input_ids=tokens.input_ids,
                      attention_mask=tokens.attention_mask).last_hidden_state, tokens


# ----------------------------------------------------------------- ThinkDiff-LVLM: token by token
def character_spans(y, vlm_tokenizer):
    """(N, 2) int64: the characters, from and to, that each token of y (N,) adds to the text.

    Empty for special tokens. A character of several tokens (of bytes) belongs to each of them."""
    prefixes = vlm_tokenizer.batch_decode(
        [y[:n] for n in range(1, len(y) + 1)], skip_special_tokens=True)
    ends = torch.tensor([*map(len, prefixes)])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    # bytes that are no whole character yet are decoded as one, which the next token only changes
    goes_on = torch.tensor([False] + [text.endswith("\N{REPLACEMENT CHARACTER}")
                                      for text in prefixes[:-1]])
    return torch.stack([starts - goes_on.long(), ends], dim=1)


@torch.no_grad()
def matched_targets(samples, tokenizers, t5):
    """What x'_1..x'_s should be, for samples [(x_1..x_s, y_1..y_s, y_{s+1}..y_N)].

    Returns e (B, S, d_t5) fp32, weight (B, S), 1 for tokens that overlap a T5 token, and False."""
    vlm_tokenizer, t5_tokenizer = tokenizers
    answers = [torch.cat([first, rest]) for _, first, rest in samples]
    outputs, tokens = encode(vlm_tokenizer.batch_decode(answers, skip_special_tokens=True), t5,
                             t5_tokenizer)
    n_tokens = max(len(first) for _, first, _ in samples)
    share = torch.zeros(len(samples), n_tokens, outputs.shape[1])  # (B, S, M)
    offsets = tokens["offset_mapping"].cpu()  # (B, M, 2), empty for EOS and padding
    for row, answer, (_, first, _), span in zip(share, answers, samples, offsets, strict=True):
        own = character_spans(answer, vlm_tokenizer)[:len(first), None]  # (s, 1, 2)
        overlap = torch.minimum(own[..., 1], span[:, 1]) > torch.maximum(own[..., 0], span[:, 0])
        row[:len(first)] = overlap.float()
    weight = (share.sum(-1) > 0).float()
    share = (share / share.sum(-1, keepdim=True).clamp(min=1)).to(t5.device)
    return share @ outputs.float(), weight.to(t5.device), False


# ----------------------------------------------------------------------- ThinkDiff-CLIP: as a set
def token_weights(data, n_train, t5_tokenizer, seed):
    """-log of the share of captions that hold a token, for each token of T5's vocabulary (V,) fp32.

    Counted in N_CAPTIONS captions of the ImageCaptionDataset `data`; a token in none of them counts
    as if in one. UserError: none can be read."""
    counts, n = torch.zeros(len(t5_tokenizer)), 0
    for i in itertools.islice(sample_order(n_train, seed, 0), min(n_train, N_CAPTIONS)):
        try:
            ids = t5_tokenizer(data.caption(i)).input_ids
        except UserError:
            # named where the sample is trained on
            continue
        counts[list(set(ids))] += 1
        n += 1
    if not n:
        raise UserError("no caption can be read to count tokens: see --data")
    return -(counts.clamp(min=1) / n).log()


@torch.no_grad()
def nearest_targets(samples, t5_tokenizer, t5, weights):
    """What some x' should be near to, for samples [(pixels, T1, T2)]; weights: token_weights'.

    Returns e (B, M, d_t5) fp32, the encoder's outputs for the captions, weight (B, M), and True."""
    captions = [f"{first} {rest}".strip() for _, first, rest in samples]
    outputs, tokens = encode(captions, t5, t5_tokenizer)
    weight = weights.to(t5.device)[tokens["input_ids"]] * tokens["attention_mask"]
    return outputs.float(), weight, True


# ----------------------------------------------------------------------------- what `train` calls
def target_finder(args, t5, tokenizers, data=None, n_train=None):
    """The function samples -> targets of `distance`; with --encoder-loss 0 targets are None.

    tokenizers: (VLM's, T5's) for ThinkDiff-LVLM, T5's for ThinkDiff-CLIP, with data and n_train."""
    if not args.encoder_loss:
        return lambda samples: None
    if data is None:
        return functools.partial(matched_targets, tokenizers=tokenizers, t5=t5)
    weights = token_weights(data, n_train, tokenizers, args.seed)
    return functools.partial(nearest_targets, t5_tokenizer=tokenizers, t5=t5, weights=weights)
