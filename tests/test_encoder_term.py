"""The encoder term: which tokens are matched, distances by hand. test_training.py trains."""
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import encoder_term
from common import MINI, UserError
from helpers import complaint
from test_training import write_lvlm_data


def test_spans_of_words_special_tokens_and_bytes():
    """A character of four bytes, each of them a token, belongs to all four."""
    tokenizer = AutoTokenizer.from_pretrained(MINI["vlm"])
    pieces = [*"a", " red", tokenizer.eos_token, " car", " ", "🍎", " ", "é", "."]
    y, expected, start = [], [], 0
    for piece in pieces:
        ids = tokenizer(piece).input_ids
        length = 0 if piece == tokenizer.eos_token else len(piece)
        assert len(ids) == {"🍎": 4, "é": 2}.get(piece, 1)
        expected += [[start, start + length]] * len(ids)
        y += ids
        start += length
    assert encoder_term.character_spans(torch.tensor(y), tokenizer).tolist() == expected


def test_distances_by_hand():
    """Relative to |e|^2 and weighted; padding, of weight 0 and zeros, adds nothing."""
    x = torch.tensor([[[3.0, 4], [0, 1], [9, 9]]], requires_grad=True)  # (1, 3, 2)
    e = torch.tensor([[[3.0, 0], [0, 2], [0, 0]]])  # (1, 3, 2)
    weight = torch.tensor([[1.0, 10, 0]])
    # 16 / 9 and 10 * 1 / 4
    matched = encoder_term.distance(x, e, weight, False)
    assert matched.item() == pytest.approx(16 / 9 + 10 / 4)
    # nearest to (3, 0) is (0, 1): 10 / 9
    nearest = encoder_term.distance(x, e, weight, True)
    assert nearest.item() == pytest.approx(10 / 9 + 10 / 4)
    nearest.backward()
    # x'_2 alone is pulled, towards both
    gradient = [2 * (0 - 3) / 9, 2 * (1 - 0) / 9 + 10 * 2 * (1 - 2) / 4]
    assert torch.allclose(x.grad, torch.tensor([[[0, 0], gradient, [0, 0]]]))


def test_rare_tokens_weigh_more(monkeypatch):
    """By hand over 3 of 4 captions, the order's first ones; one cannot be read."""
    tokenizer = AutoTokenizer.from_pretrained(MINI["t5"])

    class Captions:
        def caption(self, i):
            if i == 2:
                raise UserError("no text")
            return ["red car", "a red red dog", "", "red zebra"][i]

    monkeypatch.setattr(encoder_term, "N_CAPTIONS", 4)
    monkeypatch.setattr(encoder_term, "sample_order", lambda n, seed, start: iter([1, 2, 0, 3]))
    weights = encoder_term.token_weights(Captions(), 4, tokenizer, seed=0)
    red, car, eos, unseen = tokenizer.convert_tokens_to_ids(["▁red", "▁car", "</s>", "▁blue"])
    assert weights[[red, eos]].tolist() == [0, 0]
    assert weights[[car, unseen]].tolist() == pytest.approx([math.log(3)] * 2)
    monkeypatch.setattr(encoder_term, "sample_order", lambda n, seed, start: iter([2]))
    with pytest.raises(UserError, match="no caption can be read"):
        encoder_term.token_weights(Captions(), 4, tokenizer, seed=0)


def test_no_term_by_default():
    args = SimpleNamespace(encoder_loss=0.0)
    assert encoder_term.target_finder(args, None, None)(["any"]) is None


def test_input_tokens_have_no_words(tmp_path):
    write_lvlm_data(tmp_path / "data", "input")
    message = complaint("thinkdiff_lvlm.py", "train", "--mini", "--data", tmp_path / "data",
                        "--out", tmp_path / "out", "--features", "input", "--encoder-loss", 1)
    assert "features of input tokens have none: leave it out" in message
