"""What `explain` prints: sizes of tensors, what T5's decoder reads in them, nearest tokens."""
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from common import pretrained
from models import load_t5

FLAGS = [
    ("--no-picture", bool, False, False, "leave FLUX out"),
    ("--out", Path, "outputs/explain.png", "outputs/explain.png", "the picture"),
]


def print_tensors(tensors):
    """Prints name, shape and root mean square of each of {name: tensor}."""
    print(f"{'tensor':46}{'shape':>14}{'RMS':>10}")
    for name, tensor in tensors.items():
        rms = tensor.float().square().mean().sqrt()
        print(f"{name:46}{str(tuple(tensor.shape)):>14}{rms:10.4f}")


class Reader:
    """A whole T5, to encode texts and to say what its decoder reads in encoder outputs."""

    def __init__(self, path, device, dtype):
        self.model = load_t5(path, device, dtype)
        self.tokenizer = pretrained(AutoTokenizer, path)

    @torch.no_grad()
    def encode(self, text):
        """t (n, d_t5), the encoder's outputs, and the n tokens of the text, EOS included."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids.to(self.model.device)
        tokens = self.tokenizer.convert_ids_to_tokens(ids[0])
        return self.model.encoder(ids).last_hidden_state[0], tokens

    @torch.no_grad()
    def read(self, memory, n_tokens):
        """The decoder's greedy text, at most n_tokens, for encoder outputs `memory` (S, d_t5)."""
        outputs = BaseModelOutput(memory[None].to(self.model.dtype))
        ids = self.model.generate(encoder_outputs=outputs, max_new_tokens=n_tokens,
                                  do_sample=False, use_cache=False)
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)


def print_split(t5, prefix, target, memory, t1):
    """Prints a random split and what T5's decoder writes for `memory`, and for t1, the outputs of
    its own encoder for the prefix."""
    n_tokens = len(t5.encode(target)[1])
    print(f"\na random split\n"
          f"  prefix                                 {prefix}\n"
          f"  target                                 {target.strip()}\n"
          f"  T5's decoder on the aligned features   {t5.read(memory, n_tokens)}\n"
          f"  T5's decoder on t of the prefix alone  {t5.read(t1, n_tokens)}")


def print_nearest(x_aligned, t, tokens):
    """Prints, for each x'_i, the token of the nearest encoder output t_j, and their cosine."""
    cosines = F.normalize(x_aligned.float(), dim=-1) @ F.normalize(t.float(), dim=-1).T
    best, at = cosines.max(-1)
    pairs = zip(best.tolist(), at.tolist(), strict=True)
    line = "  ".join(f"{tokens[j]}({cosine:.2f})" for cosine, j in pairs)
    print("\nnearest t_j of each x'_i, cosine")
    print(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="  "))
