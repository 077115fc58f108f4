"""The aligner AN, the only trained part of ThinkDiff (paper Eq. 1), and how it is stored.

    x' = RMSNorm(Linear(GELU(Linear(x))))    x (B, N, d_vlm): VLM features -> x' (B, N, d_t5)

x' lies in the space of T5's encoder outputs: T5's decoder reads it in training, FLUX in inference.

    aligner = Aligner(d_vlm=3584, d_t5=4096)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)    # section 3.2: needed for convergence
    aligner.save_pretrained("runs/lvlm/aligner")             # model.safetensors + config.json
    aligner = load_aligner("runs/lvlm/aligner")              # or a hub name, or an authors' .pth
"""
import os

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers.utils import cached_file

from common import UserError, first_line, read_json, read_pth, read_tensors, write_atomically

NORMS = ("t5", "default", "none")  # the paper's initialisation, and the two ablations of Fig. 7
RELEASED_KEYS = {f"mm_projector.{k}" for k in "0.weight 0.bias 2.weight 2.bias 3.weight".split()}
CARD = ("---\n{{ card_data }}\nbase_model: {{ base_model | default([], true) }}\n---\n"
        "Aligner of [ThinkDiff]({{ paper_url }}): x' = RMSNorm(Linear(GELU(Linear(x)))) maps the\n"
        "features of a vision-language model into the prompt space of T5, and so of FLUX.\n"
        "Load it with `load_aligner`.\n")


class Aligner(nn.Module, PyTorchModelHubMixin, license="mit", tags=["thinkdiff", "text-to-image"],
              paper_url="https://arxiv.org/abs/2502.10458", model_card_template=CARD):
    """Two linear layers with GELU and an RMSNorm, applied to each token on its own (Eq. 1).

    d_vlm, d_t5: widths of the VLM's features and of T5. eps: the T5 config's layer_norm_epsilon.
    norm: "t5" (weight to be set by `init_norm`), "default" (weight stays 1) or "none" (no norm).
    hidden: width between the linear layers; None is the paper's, d_t5.
    The hub mixin adds save_pretrained, from_pretrained and push_to_hub (safetensors + JSON)."""

    def __init__(self, d_vlm: int, d_t5: int, norm="t5", eps=1e-6, hidden: int | None = None):
        super().__init__()
        if norm not in NORMS or not 0 < eps < 1:
            raise ValueError(f"norm must be one of {NORMS} and 0 < eps < 1: {norm!r}, {eps!r}")
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
            self.net[3].weight.data.copy_(t5_norm_weight)

    def forward(self, x):
        """x (B, N, d_vlm) float -> x' (B, N, d_t5) of the aligner's dtype."""
        return self.net(x.to(self.net[0].weight.dtype))

    def save_released(self, path):
        """Writes a .pth that the authors' code loads. UserError: it knows no aligner like this."""
        if self.norm == "none" or self.net[0].out_features != self.d_t5:
            raise UserError(f"cannot write {path}: the authors' code has no aligner without a norm "
                            "or with another hidden width than T5's")
        model = {k.replace("net", "mm_projector"): w.cpu() for k, w in self.state_dict().items()}
        write_atomically(path, lambda temporary: torch.save({"model": model}, temporary))


# ---------------------------------------------------- reading aligners: ours and the authors'
def assemble(path, config, weights):
    """The Aligner(**config) (fp32, eval mode) with `weights`, {name: tensor}.

    Raises UserError unless they fit together and all numbers are finite."""
    try:
        # absurd widths cost no memory on "meta"
        with torch.device("meta"):
            aligner = Aligner(**config)
        # copies, because the file may change; other numbers than floats are no weights
        copies = {k: w.float().clone() for k, w in weights.items() if w.is_floating_point()}
        aligner.load_state_dict(copies, assign=True)
        if not all(weight.isfinite().all() for weight in aligner.parameters()):
            raise ValueError("not all numbers are finite")
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise UserError(f"{path} holds no aligner ({reason}): train or download it again") from None
    return aligner.eval()


def read_released(path):
    """The Aligner of an authors' .pth: {"model": {"mm_projector.0.weight": ..}, ..}."""
    # DDP puts "module." in front; their trainer saves T5's tied embeddings, too
    model = {name.removeprefix("module."): w for name, w in read_pth(path, "model").items()}
    model = {name: w for name, w in model.items() if not name.startswith("language_model.")}
    if model.keys() != RELEASED_KEYS:
        raise UserError(f"{path} is not a released ThinkDiff aligner: missing or unexpected "
                        f"{sorted(model.keys() ^ RELEASED_KEYS)[:5]}")
    config = dict(zip(("d_t5", "d_vlm"), model["mm_projector.0.weight"].shape, strict=False))
    return assemble(path, config, {k.replace("mm_projector", "net"): w for k, w in model.items()})


def load_aligner(path, d_vlm=None, d_t5=None):
    """An Aligner (eval mode) from a folder, a hub name `repo/name` or an authors' .pth.

    Raises UserError if it cannot be read or its widths are not the caller's d_vlm and d_t5."""
    path = str(path)
    if path.endswith((".pth", ".pt")) and os.path.isfile(path):
        aligner = read_released(path)
    else:
        try:
            files = [cached_file(path, name) for name in ("config.json", "model.safetensors")]
        except (OSError, ValueError) as error:
            advice = "train one, or give its folder, its name on the hub or an authors' .pth file"
            if os.path.isdir(f"{path}/aligner"):
                advice = f"did you mean {path}/aligner?"
            raise UserError(f"no aligner at {path}: {advice} ({first_line(error)})") from None
        aligner = assemble(path, read_json(files[0]), read_tensors(files[1]))
    for what, have, want in (("a VLM", aligner.d_vlm, d_vlm), ("a T5", aligner.d_t5, d_t5)):
        if want is not None and have != want:
            raise UserError(f"aligner {path} was made for {what} of width {have}, but the one "
                            f"given has width {want}: use an aligner and models of the same widths")
    return aligner
