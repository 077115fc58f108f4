"""thinkdiff_lvlm.py: the T5 loss, data of tokens only, images that have gone, a port in use.

What `train` computes and its complaints: test_training.py; `generate`: test_inference.py."""
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, T5ForConditionalGeneration

from common import MINI, REPO
from helpers import command, complaint, read_log
from models import load_for_recomputing, load_t5, load_t5_decoder, recompute_features
from test_training import write_clip_data, write_lvlm_data
from thinkdiff_lvlm import caption_messages, t5_nll
from training_data import FeatureDataset

TRAIN = ("thinkdiff_lvlm.py", "train", "--mini", "--batch-size", 8, "--micro-batch", 4,
         "--log-every", 1, "--warmup", 2, "--data")


def test_t5_is_frozen_and_lacks_its_encoder_here():
    for load, has_encoder in ((load_t5_decoder, False), (load_t5, True)):
        t5 = load(MINI["t5"], "cpu", torch.float32)
        assert not any(parameter.requires_grad for parameter in t5.parameters())
        assert bool(len(t5.encoder.block)) == has_encoder and len(t5.decoder.block) > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float32, 1e-6, 1e-5),
                                               (torch.bfloat16, 2e-4, 3e-2)])
def test_loss_of_either_kind_of_t5(tied, dtype, rtol, atol):
    """The first T5 shares embedding and lm_head and scales the decoder's output; v1.1 and Flan do
    neither."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MINI["t5"], scale_decoder_outputs=tied)
    t5 = T5ForConditionalGeneration(config).eval().requires_grad_(False).to(dtype)
    if not tied:
        weight = torch.randn_like(t5.lm_head.weight)
        t5.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    labels = torch.randint(2, 400, (6, 50))
    labels[0, 3:] = labels[1, 40:] = -100
    ours = torch.randn(6, 20, 32).to(dtype).requires_grad_()
    theirs, mask = ours.detach().clone().requires_grad_(), torch.ones(6, 20).long()
    total, count = t5_nll(t5, ours, mask, labels)
    logits = t5(encoder_outputs=(theirs,), attention_mask=mask, labels=labels).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum")
    assert total.dtype == torch.float32 and count == (labels != -100).sum()
    assert total.item() == pytest.approx(expected.item(), rel=rtol)
    total.backward()
    expected.backward()
    scale = theirs.grad.abs().max()
    torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=0, atol=atol)


def test_tokens_only_trains_the_same_aligner(tmp_path):
    """Features recomputed from image and tokens are the stored ones but for a bf16 rounding,
    whatever is computed with them. Images that have gone are skipped, named and counted."""
    images = tmp_path / "images"
    write_clip_data(images)
    for name, more in (("stored", []), ("tokens", ["--tokens-only"])):
        command("prepare_data.py", "lvlm", "--mini", "--images", images, "--out", tmp_path / name,
                "--tokens", 24, *more)
        command(*TRAIN, tmp_path / name, "--out", tmp_path / f"run-{name}", "--steps", 8)
    stored = FeatureDataset(tmp_path / "stored")
    tokens = FeatureDataset(tmp_path / "tokens", caption_messages)
    args = SimpleNamespace(features="generated", micro_batch=2, vlm=MINI["vlm"])
    assert load_for_recomputing(stored, args, "cpu", torch.float32) is None
    vlm = load_for_recomputing(tokens, args, "cpu", torch.float32)
    again = recompute_features(vlm, [(10 + i, *tokens[i]) for i in range(5)], args)
    assert len(again) == 5
    for i, (position, x, y) in enumerate(again):
        torch.testing.assert_close(x.float(), stored[i][0].float(), rtol=0.02, atol=0.02)
        assert torch.equal(y, stored[i][1]) and position == 10 + i
    losses, expected = ([float(row["loss"]) for row in read_log(tmp_path / f"run-{name}")]
                        for name in ("tokens", "stored"))
    assert len(losses) == 8 and losses == pytest.approx(expected, rel=5e-3)

    (images / "01.png").unlink()
    (images / "02.png").write_bytes(b"broken")
    # alone in a micro-batch
    err = command(*TRAIN, tmp_path / "tokens", "--out", tmp_path / "x", "--steps", 3,
                  "--micro-batch", 1)[1]
    assert "skipped (2 so far)" in err and (tmp_path / "x" / "aligner").exists()
    assert f"{images}/01.png" in err and f"{images}/02.png" in err
    for file in images.glob("*.png"):
        file.unlink()
    assert "none of its samples can be read" in complaint(
        *TRAIN, tmp_path / "tokens", "--out", tmp_path / "y", "--steps", 2)
    assert "100 samples in a row cannot be read: is the disk there?" in complaint(
        *TRAIN, tmp_path / "tokens", "--out", tmp_path / "y", "--resume")


def test_a_port_in_use_is_one_line(tmp_path):
    write_lvlm_data(tmp_path / "data")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, *map(str, TRAIN), tmp_path / "data", "--out", tmp_path / "x"],
            cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the port is in use")
