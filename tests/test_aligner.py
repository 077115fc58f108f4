"""aligner.py: Eq. 1 and its ablations against T5's own norm, stored aligners, authors' files."""
import pytest
import torch
from safetensors.torch import load_file, save_file

from aligner import RELEASED_KEYS, Aligner, load_aligner
from common import UserError
from references import aligner_weights, eq1, released


@pytest.mark.parametrize("norm", ["t5", "default", "none"])
@pytest.mark.parametrize("hidden, width", [(None, 8), (9, 9)])
def test_equation_1_and_the_ablations_of_figure_7(tmp_path, norm, hidden, width):
    """Also when stored and loaded again. Random features here, trained ones in test_training."""
    torch.manual_seed(0)
    aligner = Aligner(12, 8, norm, hidden=hidden)
    t5_weight, x = torch.rand(8), torch.randn(2, 5, 12)
    aligner.init_norm(t5_weight)
    aligner.save_pretrained(tmp_path)
    again, weights = load_aligner(tmp_path, d_vlm=12, d_t5=8), aligner_weights(tmp_path)
    shapes = [(width, 12), (width,), (8, width), (8,)] + [(8,)] * (norm != "none")
    assert [tuple(parameter.shape) for parameter in again.parameters()] == shapes
    assert again.norm == norm and torch.equal(again(x), aligner(x))
    if norm == "none":
        expected = torch.nn.functional.linear(aligner.net[:2](x), *aligner.net[2].parameters())
    else:
        assert torch.equal(weights["3.weight"], t5_weight if norm == "t5" else torch.ones(8))
        expected = eq1(weights, x)
    torch.testing.assert_close(aligner(x), expected, rtol=1e-5, atol=1e-6)


def test_no_other_norm():
    with pytest.raises(ValueError):
        Aligner(12, 8, norm="layer")


# ---------------------------------------------------------------- the authors' .pth files
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("changes, said", [
    ({}, None),
    ({"3.weight": None}, "missing .*mm_projector.3.weight"),
    ({"4.weight": torch.ones(1)}, "unexpected .*mm_projector.4.weight"),
    ({"2.weight": torch.ones(8, 7)}, "the tensors are of no aligner"),
])
def test_released_checkpoint(tmp_path, prefix, changes, said):
    """Wrong tensors are named. test_full_size: the true shapes, through `generate`."""
    torch.manual_seed(1)
    weights, state = released(12, 8, prefix)
    assert {name.removeprefix(prefix) for name in state["model"]} == RELEASED_KEYS
    for name, weight in changes.items():
        state["model"][f"{prefix}mm_projector.{name}"] = weight
        if weight is None:
            del state["model"][f"{prefix}mm_projector.{name}"]
    torch.save(state, tmp_path / "thinkdiff_lvlm.pth")
    if said:
        with pytest.raises(UserError, match=said):
            load_aligner(tmp_path / "thinkdiff_lvlm.pth")
    else:
        x = torch.randn(2, 3, 12)
        aligner = load_aligner(tmp_path / "thinkdiff_lvlm.pth", d_vlm=12, d_t5=8)
        torch.testing.assert_close(aligner(x), eq1(weights, x), rtol=1e-5, atol=1e-5)


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
    torch.save({**released(12, 8)[1], "config": Unsafe(trace)}, tmp_path / name, **options)
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
    ("tensor.pth", "no entry 'model'"),
    ("other.pth", "no entry 'model'"),
    ("half.pth", "half.pth cannot be read as a torch checkpoint"),
    ("missing.pth", "no aligner at .*missing.pth: give a .pth file"),
    ("empty", "empty holds no aligner .*: give the folder that `train` wrote"),
    ("missing/folder/aligner", "no aligner at .*missing/folder/aligner: train one"),
    ("no/such-repo", "no/such-repo holds no aligner .*a name on the hub"),
    ("cut", "cut holds no aligner"),
    ("config", "config holds no aligner"),
    ("partial", "partial holds no aligner"),
])
def test_damaged_and_missing_files_are_named(tmp_path, name, said):
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "empty").mkdir()
    for folder in ("cut", "config", "partial"):
        Aligner(12, 8).save_pretrained(tmp_path / folder)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "config" / "config.json").write_text("{")
    # a missing weight would stay random
    weights = tmp_path / "partial" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["net.2.bias"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=said) as error:
        load_aligner(name if name == "no/such-repo" else tmp_path / name)
    assert len(str(error.value).splitlines()) == 1
