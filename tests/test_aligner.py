"""aligner.py: Eq. 1 and its ablations against T5's own norm, stored aligners, authors' files."""
import json
import resource
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5LayerNorm

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
    ({"2.weight": torch.ones(8, 7)}, "pth holds no aligner .*size mismatch"),
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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_t5s_embeddings_in_a_released_checkpoint(tmp_path, prefix):
    """The authors' trainer saves them, too: they are left in the file, and no others."""
    weights, state = released(12, 8, prefix)
    # zeros that nobody has written to take no memory
    tied = torch.zeros(50_000_000)
    x, before, file = torch.randn(2, 3, 12), gigabytes(), tmp_path / "x.pth"
    for name in ("encoder.embed_tokens.weight", "lm_head.weight"):
        state["model"][f"{prefix}language_model.{name}"] = tied
    torch.save(state, file)
    torch.testing.assert_close(load_aligner(file)(x), eq1(weights, x), rtol=1e-5, atol=1e-5)
    assert file.stat().st_size > 2e8 and gigabytes() < before + 0.1
    for name in ("language_model", "language_models.x", "x.language_model.x", "shared.weight"):
        torch.save({"model": {**released(12, 8, prefix)[1]["model"], prefix + name: x}}, file)
        with pytest.raises(UserError, match=f"missing or unexpected .'{name}'"):
            load_aligner(file)


class Release(torch.nn.Module):
    """What the authors' code loads a .pth into."""

    def __init__(self, d_vlm, d_t5):
        super().__init__()
        self.mm_projector = torch.nn.Sequential(
            torch.nn.Linear(d_vlm, d_t5), torch.nn.GELU(), torch.nn.Linear(d_t5, d_t5),
            T5LayerNorm(d_t5))


def test_save_released(tmp_path):
    torch.manual_seed(0)
    file, x = tmp_path / "new" / "thinkdiff_lvlm.pth", torch.randn(2, 3, 12)
    for norm in ("t5", "default"):
        aligner, release = Aligner(12, 8, norm), Release(12, 8)
        aligner.init_norm(torch.rand(8))
        aligner.save_released(file)
        saved = torch.load(file, weights_only=True)
        release.load_state_dict(saved["model"])
        assert [*saved] == ["model"] and saved["model"].keys() == RELEASED_KEYS
        torch.testing.assert_close(release.mm_projector(x), aligner(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(load_aligner(file, d_vlm=12, d_t5=8)(x), aligner(x))
    file.unlink()
    for other in ({"norm": "none"}, {"hidden": 9}):
        with pytest.raises(UserError, match="without a norm or with another hidden width"):
            Aligner(12, 8, **other).save_released(file)
        assert not file.exists()


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
    with pytest.raises(UserError, match="cannot read 'model' of .* with weights_only=True"):
        load_aligner(tmp_path / name)
    assert not trace.exists()
    # a folder: only safetensors are read
    (tmp_path / name).rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"d_vlm": 12, "d_t5": 8}')
    with pytest.raises(UserError, match="no aligner at .*model.safetensors"):
        load_aligner(tmp_path)
    assert not trace.exists()


def gigabytes():
    """The most memory that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@pytest.mark.parametrize("kind, said", [
    ("view", "0.weight is larger than the file"), ("bytes", "it refers to .* bytearray"),
    ("nan", "not all numbers are finite"), ("whole", "Missing key.*net.0.bias"),
    ("scalar", "missing 1 required"), ("number", "no attribute"), ("legacy", "not a zip file"),
    ("deflated", "it is compressed"), ("flipped", "a checksum is wrong")])
def test_hostile_and_damaged_pth(tmp_path, kind, said):
    """One line, little memory. view: of one number, which claims 0.8 GB; bytes: bytearray(N) in a
    pickle takes N bytes; flipped: a bit of a weight."""
    file, (_, state), before = tmp_path / "x.pth", released(12, 8), gigabytes()
    torch.save(state, file)
    load_aligner(file)
    if kind == "bytes":
        state["config"] = bytearray(9)
    state["model"] |= {"view": {"mm_projector.0.weight": torch.ones(1).expand(8, 25_000_000)},
                       "nan": {"mm_projector.3.weight": torch.full((8,), torch.nan)},
                       "whole": {"mm_projector.0.bias": torch.ones(8).int()},
                       "scalar": {"mm_projector.0.weight": torch.ones(8)},
                       "number": {"mm_projector.0.weight": 1.0}}.get(kind, {})
    torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "deflated":
        with zipfile.ZipFile(file) as stored:
            entries = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as smaller:
            for name, data in entries.items():
                smaller.writestr(name, data)
    if kind == "flipped":
        data, weight = file.read_bytes(), state["model"]["mm_projector.2.weight"].numpy().tobytes()
        assert data.count(weight) == 1
        file.write_bytes(data.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
    with pytest.raises(UserError, match=f"x.pth.*{said}"):
        load_aligner(file)
    assert gigabytes() < before + 0.5


@pytest.mark.parametrize("config, said", [
    ({"d_vlm": 16384, "d_t5": 16384}, "size mismatch"), ({"hidden": 10**12}, "size mismatch"),
    ({"d_vlm": 2**70}, "holds no aligner"), ({"d_t5": "8"}, "must be tuple of ints"),
    ({"eps": None}, "holds no aligner"), ({"eps": -1}, "0 < eps < 1"), ({"eps": "1e-6"}, "'str'"),
    ({"norm": ["t5"]}, "norm must be one of"), ({"epz": 1}, "unexpected keyword argument 'epz'"),
    ([], "must be a mapping"), ('{"d_vlm": 12, "d_t5": 8, "eps": 1e999}', "1e999 is no finite"),
    ('{"d_vlm": NaN}', "NaN is no finite number"), ("[" * 100_000, "recursion"),
    ('{"d_vlm": ' + "1" * 5000, "config.json is damaged"), ("", "config.json is damaged")])
def test_hostile_and_damaged_config(tmp_path, config, said):
    Aligner(12, 8).save_pretrained(tmp_path)
    before = gigabytes()
    if isinstance(config, dict):
        config = {"d_vlm": 12, "d_t5": 8, **config}
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=said) as error:
        load_aligner(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert gigabytes() < before + 0.5


def test_tensors_of_a_folder(tmp_path):
    """Floats of any width are read as fp32; what is not finite, or no float, is refused."""
    Aligner(12, 8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    for dtype in (torch.bfloat16, torch.float64):
        save_file({name: tensor.to(dtype) for name, tensor in good.items()}, file)
        state = load_aligner(tmp_path).state_dict()
        assert all(torch.equal(state[name], tensor.to(dtype).float())
                   for name, tensor in good.items())
    # what was loaded does not change with the file
    file.write_bytes(bytes(file.stat().st_size))
    assert all(tensor.any() for tensor in state.values() if tensor.ndim == 2)
    for bad in (torch.full((8,), torch.inf), torch.full((8,), 1e300, dtype=torch.float64),
                torch.ones(8).int(), torch.ones(8).to(torch.float8_e4m3fn), torch.ones(9)):
        save_file(good | {"net.0.bias": bad}, file)
        with pytest.raises(UserError, match=str(tmp_path)):
            load_aligner(tmp_path)


@pytest.mark.parametrize("name, said", [
    ("tensor.pth", "cannot read 'model' of .*tensor.pth"),
    ("other.pth", "cannot read 'model' of .*other.pth"),
    ("half.pth", "cannot read 'model' of .*half.pth"),
    ("missing.pth", "no aligner at .*missing.pth: .*an authors' .pth file"),
    ("empty", "no aligner at .*empty: train one, or give its folder"),
    ("missing/folder/aligner", "no aligner at .*missing/folder/aligner: train one"),
    ("no/such-repo", "no aligner at no/such-repo: .*its name on the hub"),
    ("run", "no aligner at .*run: did you mean .*run/aligner?"),
    ("cut", "cut/model.safetensors is damaged"),
    ("config", "config/config.json is damaged"),
    ("partial", "partial holds no aligner .*net.2.bias"),
])
def test_damaged_and_missing_files_are_named(tmp_path, name, said):
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\3\4 half a file")
    (tmp_path / "empty").mkdir()
    for folder in ("cut", "config", "partial", "run/aligner"):
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
