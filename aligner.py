"""The aligner AN: the only trained part of ThinkDiff (paper Eq. 1) and how it is stored.

    x' = RMSNorm(Linear(GELU(Linear(x))))         x: (B, N, d_vlm) features of a VLM  ->  x': (B, N, d_t5)

x' lives where the outputs of T5's encoder live: T5's decoder reads it in training, FLUX reads it in generation.

    aligner = Aligner(d_vlm=3584, d_t5=4096)
    aligner.init_norm(t5.encoder.final_layer_norm.weight)   # section 3.2: without it training does not converge
    aligner.save_pretrained("runs/lvlm/aligner")            # model.safetensors + config.json
    aligner = load_aligner("runs/lvlm/aligner")             # or "repo/name" on the hub, or the authors' thinkdiff_lvlm.pth
"""
import contextlib
import json
import os

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from common import UserError

NORMS = ("t5", "default", "none")  # the paper's, and the two ablations of Fig. 7


class Aligner(nn.Module, PyTorchModelHubMixin):
    """Two linear layers with GELU and an RMSNorm, applied to every token by itself (Eq. 1).

    d_vlm, d_t5: widths of the VLM's features and of T5. eps: the T5 config's `layer_norm_epsilon`.
    hidden: width between the two linear layers; None is the paper's, d_t5.
    norm: "t5" (weight to be set with `init_norm`), "default" (weight stays 1) or "none" (no norm at all).
    The hub mixin adds `save_pretrained`, `from_pretrained` and `push_to_hub` (safetensors + JSON).
    """

    def __init__(self, d_vlm: int, d_t5: int, norm: str = "t5", eps: float = 1e-6, hidden: int | None = None):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
        self.d_vlm, self.d_t5, self.norm = d_vlm, d_t5, norm
        layers = [nn.Linear(d_vlm, hidden or d_t5), nn.GELU(), nn.Linear(hidden or d_t5, d_t5)]
        # nn.RMSNorm is T5's layer norm: no mean subtraction, no bias
        self.net = nn.Sequential(*layers, *([] if norm == "none" else [nn.RMSNorm(d_t5, eps=eps)]))

    def init_norm(self, t5_norm_weight):
        """Starts the RMSNorm from T5's encoder.final_layer_norm.weight (d_t5,), so that x' has the scale that the
        decoder expects from the first step (section 3.2). Does nothing for the ablations."""
        if self.norm == "t5":
            with torch.no_grad():
                self.net[3].weight.copy_(t5_norm_weight)

    def forward(self, x):
        """x (B, N, d_vlm) float -> x' (B, N, d_t5) of the aligner's dtype."""
        return self.net(x.to(self.net[0].weight.dtype))


# ---------------------------------------------------------------- reading aligners, ours and the authors'
RELEASED_KEYS = {f"mm_projector.{i}" for i in ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight")}


def read_released(path):
    """Reads the authors' `thinkdiff_lvlm.pth` / `thinkdiff_clip.pth` (a torch.save'd dict whose `model` holds mm_projector.*).

    Returns an Aligner (float32). Only tensors and plain containers are unpickled (weights_only=True).
    Raises UserError when the file is no such checkpoint, naming the missing and the unexpected keys."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no aligner at {path}: give the path of a .pth file, a folder with model.safetensors or a hub name") from None
    except Exception as e:  # torch raises many kinds for a damaged or an unsafe file
        raise UserError(f"{path} cannot be read as a torch checkpoint with weights_only=True "
                        f"({str(e).splitlines()[0][:90]}): download it again") from None
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} has no entry 'model': it is not a released ThinkDiff checkpoint")
    model = {k.removeprefix("module."): v for k, v in model.items()}  # DDP's prefix
    if model.keys() != RELEASED_KEYS:
        missing, extra = sorted(RELEASED_KEYS - model.keys()), sorted(model.keys() - RELEASED_KEYS)
        raise UserError(f"{path} is not a released ThinkDiff aligner: "
                        + "; ".join(f"{what} {', '.join(keys[:5])}" for what, keys in (("missing", missing), ("unexpected", extra)) if keys))
    model = {k.replace("mm_projector", "net"): v.float() for k, v in model.items()}
    d_t5, d_vlm = model["net.0.weight"].shape
    aligner = Aligner(d_vlm, d_t5)
    try:
        aligner.load_state_dict(model)
    except RuntimeError as e:
        raise UserError(f"{path}: the tensors do not fit together as an aligner ({str(e).splitlines()[-1].strip()})") from None
    return aligner.eval()


def load_aligner(path, d_vlm=None, d_t5=None):
    """Loads an aligner from a folder, a hub name `repo/name` or an authors' `.pth` file: an Aligner in eval mode.

    d_vlm, d_t5: widths that the caller's VLM and T5 have; another width is a UserError, as are a missing or damaged file."""
    path = str(path)
    if path.endswith((".pth", ".pt")):
        aligner = read_released(path)
    elif os.path.isdir(path) and not all(os.path.exists(os.path.join(path, f)) for f in ("config.json", "model.safetensors")):
        raise UserError(f"{path} holds no aligner (config.json and model.safetensors): give the folder that `train` wrote")
    elif os.path.sep in path and path.count("/") != 1 and not os.path.exists(path):
        raise UserError(f"no aligner at {path}: train one with thinkdiff_lvlm.py or thinkdiff_clip.py, or give a folder, a hub name or a .pth file")
    else:
        try:
            with contextlib.redirect_stdout(None):  # the mixin announces local folders
                aligner = Aligner.from_pretrained(path, strict=True)
        except (TypeError, RuntimeError, json.JSONDecodeError, ValueError) as e:
            raise UserError(f"{path} does not hold an aligner of this project ({str(e).splitlines()[0][:120]})") from None
        except Exception as e:  # hub errors are of many kinds
            raise UserError(f"aligner {path} is neither a folder here nor reachable on the hub ({type(e).__name__}): check the path or the network") from None
    for what, have, want in (("a VLM", aligner.d_vlm, d_vlm), ("a T5", aligner.d_t5, d_t5)):
        if want is not None and have != want:
            raise UserError(f"aligner {path} was made for {what} of width {have}, but the one given has width {want}: "
                            "use the aligner and the models that belong together")
    return aligner
