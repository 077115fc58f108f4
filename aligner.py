"""The aligner AN, the only trained part of ThinkDiff (paper Eq. 1), and how it is stored.

    x' = RMSNorm(Linear(GELU(Linear(x))))    x (B, N, d_vlm): VLM features -> x' (B, N, d_t5)

x' lies in the space of T5's encoder outputs: T5's decoder reads it in training, FLUX in inference.

    aligner = Aligner(d_vlm=3584, d_t5=4096)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)    # section 3.2: needed for convergence
    aligner.save_pretrained("runs/lvlm/aligner")             # model.safetensors + config.json
    aligner = load_aligner("runs/lvlm/aligner")              # or a hub name, or an authors' .pth
"""
import contextlib
import os

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from common import UserError, first_line

NORMS = ("t5", "default", "none")  # the paper's initialisation, and the two ablations of Fig. 7
CARD = """---
{{ card_data }}
base_model: {{ base_model | default([], true) }}
---
Aligner of [ThinkDiff]({{ paper_url }}): x' = RMSNorm(Linear(GELU(Linear(x)))) maps the features of
a vision-language model into the prompt space of T5, and so of FLUX. Load it with `load_aligner`.
"""


class Aligner(nn.Module, PyTorchModelHubMixin, license="mit", tags=["thinkdiff", "text-to-image"],
              paper_url="https://arxiv.org/abs/2502.10458", model_card_template=CARD):
    """Two linear layers with GELU and an RMSNorm, applied to each token on its own (Eq. 1).

    d_vlm, d_t5: widths of the VLM's features and of T5. eps: the T5 config's layer_norm_epsilon.
    norm: "t5" (weight to be set by `init_norm`), "default" (weight stays 1) or "none" (no norm).
    hidden: width between the linear layers; None is the paper's, d_t5.
    The hub mixin adds save_pretrained, from_pretrained and push_to_hub (safetensors + JSON)."""

    def __init__(self, d_vlm: int, d_t5: int, norm: str = "t5", eps: float = 1e-6,
                 hidden: int | None = None):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
        self.d_vlm, self.d_t5, self.norm = d_vlm, d_t5, norm
        hidden = hidden or d_t5
        self.net = nn.Sequential(nn.Linear(d_vlm, hidden), nn.GELU(), nn.Linear(hidden, d_t5))
        if norm != "none":
            # nn.RMSNorm is T5's layer norm: no mean subtraction, no bias
            self.net.append(nn.RMSNorm(d_t5, eps=eps))

    def init_norm(self, t5_norm_weight):
        """Sets the RMSNorm's weight to T5's encoder.final_layer_norm.weight (d_t5,) (section 3.2),
        so that x' has the decoder's scale from the first step. No effect on Fig. 7's ablations."""
        if self.norm == "t5":
            with torch.no_grad():
                self.net[3].weight.copy_(t5_norm_weight)

    def forward(self, x):
        """x (B, N, d_vlm) float -> x' (B, N, d_t5) of the aligner's dtype."""
        return self.net(x.to(self.net[0].weight.dtype))


# ---------------------------------------------------- reading aligners: ours and the authors'
RELEASED_KEYS = {f"mm_projector.{k}" for k in "0.weight 0.bias 2.weight 2.bias 3.weight".split()}


def read_released(path):
    """An Aligner (fp32) from an authors' .pth: {"model": {"mm_projector.0.weight": ..}, ..}.
    Unpickles tensors and plain containers only. Raises UserError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no aligner at {path}: give a .pth file, a folder or a hub name") from None
    except Exception as error:  # torch raises many kinds for a damaged or an unsafe file
        reason = str(error).splitlines()[0][:90]
        raise UserError(f"{path} cannot be read as a torch checkpoint with weights_only=True "
                        f"({reason}): download it again") from None
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} has no entry 'model': it is not a released ThinkDiff checkpoint")
    # DDP puts "module." in front
    model = {name.removeprefix("module."): weight for name, weight in model.items()}
    if model.keys() != RELEASED_KEYS:
        raise UserError(f"{path} is not a released ThinkDiff aligner: missing "
                        f"{sorted(RELEASED_KEYS - model.keys())}, unexpected "
                        f"{sorted(model.keys() - RELEASED_KEYS)[:5]}")
    weights = {name.replace("mm_projector", "net"): w.float() for name, w in model.items()}
    d_t5, d_vlm = weights["net.0.weight"].shape
    aligner = Aligner(d_vlm, d_t5)
    try:
        aligner.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: the tensors are of no aligner ({reason})") from None
    return aligner.eval()


def load_aligner(path, d_vlm=None, d_t5=None):
    """An Aligner (eval mode) from a folder, a hub name `repo/name` or an authors' .pth.

    Raises UserError if it cannot be read or its widths are not the caller's d_vlm and d_t5."""
    path = str(path)
    if path.endswith((".pth", ".pt")):
        aligner = read_released(path)
    elif path.count("/") > 1 and not os.path.isdir(path):
        raise UserError(f"no aligner at {path}: train one with thinkdiff_lvlm.py or "
                        "thinkdiff_clip.py, or give a folder, a hub name or a .pth file")
    else:
        try:
            with contextlib.redirect_stdout(None):  # the mixin prints a line
                aligner = Aligner.from_pretrained(path, strict=True)
        except Exception as error:  # damaged files and hub errors are of many kinds
            raise UserError(f"{path} holds no aligner ({first_line(error)[:120]}): give the folder "
                            "that `train` wrote, a name on the hub or a .pth file") from None
    for what, have, want in (("a VLM", aligner.d_vlm, d_vlm), ("a T5", aligner.d_t5, d_t5)):
        if want is not None and have != want:
            raise UserError(f"aligner {path} was made for {what} of width {have}, but the one "
                            f"given has width {want}: use an aligner and models of the same widths")
    return aligner
