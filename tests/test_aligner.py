"""aligner.py: Eq. 1 against transformers' own T5 norm, the ablations, checkpoints, the authors' .pth files."""
import json

import pytest
import torch
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5LayerNorm

from aligner import RELEASED_KEYS, Aligner, load_aligner
from common import UserError


def by_hand(aligner, x, norm_weight, eps=1e-6):
    """Eq. 1 from the weights, with the norm of transformers' T5."""
    p = aligner.state_dict()
    norm = T5LayerNorm(len(norm_weight), eps)
    norm.weight.data = norm_weight
    return norm(F.linear(F.gelu(F.linear(x, p["net.0.weight"], p["net.0.bias"])), p["net.2.weight"], p["net.2.bias"]))


def test_equation_1_with_t5s_norm():
    torch.manual_seed(0)
    aligner, weight, x = Aligner(12, 8), torch.rand(8) * 0.2 + 0.1, torch.randn(2, 5, 12)
    aligner.init_norm(weight)
    torch.testing.assert_close(aligner(x), by_hand(aligner, x, weight), rtol=1e-5, atol=1e-6)


def test_ablations_of_figure_7():
    torch.manual_seed(0)
    weight, x = torch.full((8,), 0.2), torch.randn(3, 12)
    default, none = Aligner(12, 8, norm="default"), Aligner(12, 8, norm="none")
    for aligner in (default, none):
        aligner.init_norm(weight)
    assert torch.equal(default.net[3].weight, torch.ones(8))
    assert len(none.net) == 3 and "net.3.weight" not in none.state_dict()
    torch.testing.assert_close(default(x), by_hand(default, x, torch.ones(8)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError):
        Aligner(12, 8, norm="layer")


def test_saved_and_loaded(tmp_path):
    aligner = Aligner(12, 8, norm="none")
    aligner.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["d_vlm"] == 12
    again = load_aligner(tmp_path / "a", d_vlm=12, d_t5=8)
    assert again.norm == "none" and all(torch.equal(v, again.state_dict()[k]) for k, v in aligner.state_dict().items())


@pytest.mark.parametrize("widths, said", [((13, 8), "a VLM of width 12"), ((12, 9), "a T5 of width 8")])
def test_other_width_is_refused(tmp_path, widths, said):
    Aligner(12, 8).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=said):
        load_aligner(tmp_path / "a", *widths)


def released(prefix="", **changes):
    torch.manual_seed(1)
    model = {"mm_projector.0.weight": torch.randn(8, 12), "mm_projector.0.bias": torch.randn(8), "mm_projector.2.weight": torch.randn(8, 8),
             "mm_projector.2.bias": torch.randn(8), "mm_projector.3.weight": torch.rand(8)}
    assert set(model) == RELEASED_KEYS
    model.update(changes)
    return {"model": {prefix + k: v for k, v in model.items() if v is not None}, "optimizer": {}, "config": {"lr": 1e-4}, "scaler": {}, "epoch": 3}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoint(tmp_path, prefix):
    # released() seeds torch for the features below as well
    state = released(prefix)
    torch.save(state, tmp_path / "thinkdiff_lvlm.pth")
    aligner, x = load_aligner(tmp_path / "thinkdiff_lvlm.pth", d_vlm=12, d_t5=8), torch.randn(2, 3, 12)
    p = {k.removeprefix(prefix): v for k, v in state["model"].items()}
    expected = T5LayerNorm(8)
    expected.weight.data = p["mm_projector.3.weight"]
    hidden = F.gelu(x @ p["mm_projector.0.weight"].T + p["mm_projector.0.bias"])
    torch.testing.assert_close(aligner(x), expected(hidden @ p["mm_projector.2.weight"].T + p["mm_projector.2.bias"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state, said", [
    (released(**{"mm_projector.3.weight": None}), "missing mm_projector.3.weight"),
    (released(**{"t5.lm_head.weight": torch.ones(1)}), "unexpected t5.lm_head.weight"),
    (released(**{"mm_projector.2.weight": torch.ones(8, 7)}), "do not fit together"),
    ({"weights": {}}, "no entry 'model'"),
    (torch.ones(3), "no entry 'model'"),
])
def test_wrong_checkpoints_are_named(tmp_path, state, said):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=said):
        load_aligner(tmp_path / "x.pth")


class Unsafe:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name, options", [("x.pth", {}), ("x.pt", {}),
                                           ("x.pth", {"_use_new_zipfile_serialization": False})])
def test_no_code_of_a_pickle_runs(tmp_path, name, options):
    """With the tensors of a good aligner beside it."""
    trace = tmp_path / "trace"
    torch.save({**released(), "config": Unsafe(trace)}, tmp_path / name, **options)
    torch.load(tmp_path / name, weights_only=False)["config"].close()
    assert trace.exists()
    trace.unlink()
    with pytest.raises(UserError, match="cannot be read as a torch checkpoint with weights_only"):
        load_aligner(tmp_path / name)
    assert not trace.exists()
    # a folder: only safetensors are read
    (tmp_path / name).rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"d_vlm": 12, "d_t5": 8}')
    with pytest.raises(UserError, match="holds no aligner"):
        load_aligner(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("name, said", [
    ("half.pth", "half.pth cannot be read as a torch checkpoint"),
    ("missing.pth", "no aligner at .*missing.pth: give the path of"),
    ("empty", "empty holds no aligner .config.json and model.safetensors.: give the folder"),
    ("missing/folder/aligner", "no aligner at .*missing/folder/aligner: train one"),
    ("no/such-repo", "no/such-repo is neither a folder here nor reachable on the hub"),
    ("cut", "cut .*(SafetensorError|does not hold an aligner)"),
    ("config", "config does not hold an aligner of this project"),
])
def test_damaged_and_missing_files_are_named(tmp_path, name, said):
    (tmp_path / "half.pth").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "empty").mkdir()
    for folder in ("cut", "config"):
        Aligner(12, 8).save_pretrained(tmp_path / folder)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "config" / "config.json").write_text("{")
    with pytest.raises(UserError, match=said) as error:
        load_aligner(name if name == "no/such-repo" else tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_hidden_width_is_the_papers_unless_given(tmp_path):
    assert Aligner(6, 4).net[0].weight.shape == (4, 6)
    torch.manual_seed(0)
    aligner = Aligner(6, 4, hidden=9)
    assert [tuple(p.shape) for p in aligner.parameters()] == [(9, 6), (9,), (4, 9), (4,), (4,)]
    aligner.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 6)
    assert torch.equal(load_aligner(tmp_path)(x), aligner(x))
