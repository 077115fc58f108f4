"""The command lines on a device that is not the CPU: no tensor stays behind, none has another type.

Needs no GPU: a tensor on the pretended one holds its numbers in main memory, and an operation on
tensors of both devices raises, as it does on a GPU. The models are in bfloat16, as they are there.
The device is called "lazy", the one name besides "cpu" with which autograd works everywhere."""
import contextlib

import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cobsat_eval
import common
import models
import thinkdiff_clip
import thinkdiff_lvlm
import training_run
from common import EXAMPLE, MINI
from helpers import command, read_log
from test_training import write_clip_data, write_lvlm_data

GPU = torch.device("lazy", 0)
TRAIN = ("--mini --batch-size 8 --micro-batch 4 --log-every 1 --eval-every 1 --save-every 1 "
         "--data").split()


# ---------------------------------------------------------------- the pretended GPU
class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU; `here` holds its numbers, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here, **options):
        # accelerate calls the type of a parameter to make another one
        if options:
            return torch.nn.Parameter(here, **options)
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=GPU)

    def __init__(self, here, **options):
        self.here = here.here if isinstance(here, OnGpu) else here

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    # what reads memory without an operation of torch
    def tolist(self):
        return self.here.tolist()

    def storage(self):
        return self.here.storage()

    def data_ptr(self):
        return self.here.data_ptr()

    def __format__(self, spec):
        return format(self.here, spec)


def replaced(value, kind, change):
    """An argument or a result of an operation with change(x) in place of each x of a kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: replaced(part, kind, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(part, kind, change) for part in value])
    return value


def compute(operation, args, kwargs):
    """An operation of torch with the rules of a GPU. Raises RuntimeError if devices are mixed."""
    name = operation._schema.name
    tensors = []
    replaced((args, kwargs), torch.Tensor, tensors.append)
    known = {id(x.here): x for x in tensors if isinstance(x, OnGpu)}
    on_gpu = bool(known)
    if name == "aten::copy_":
        on_gpu = isinstance(args[0], OnGpu)
    elif kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == GPU.type
        kwargs = {**kwargs, "device": "cpu"} if on_gpu else kwargs
    # numbers are read from everywhere
    left = [x.shape for x in tensors if not isinstance(x, OnGpu) and x.ndim]
    if known and left and name != "aten::copy_":
        raise RuntimeError(f"{name}: tensors on {GPU}, but one of size {left[0]} is not")
    if on_gpu and kwargs.get("generator"):
        raise RuntimeError(f"{name}: a generator on the CPU, numbers on {GPU}")
    args, kwargs = replaced((args, kwargs), OnGpu, lambda x: x.here)
    result = operation(*args, **kwargs)
    if not on_gpu:
        return result
    # what is changed in place stays the same object
    return replaced(result, torch.Tensor,
                    lambda x: known[id(x)] if id(x) in known else OnGpu(x))


class Operations(TorchDispatchMode):
    """Also operations without a tensor on the GPU, such as those that make one there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Numbers(TorchFunctionMode):
    """torch.tensor of a list of numbers on the GPU, which reads them from memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.tensor:
            args = replaced(args, OnGpu, torch.Tensor.item)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretended_gpu():
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Numbers(), Operations():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@pytest.fixture
def gpu(monkeypatch):
    """Every script finds the pretended GPU."""
    for module in (common, thinkdiff_lvlm, thinkdiff_clip, cobsat_eval):
        monkeypatch.setattr(module, "pick_device", lambda dtype="auto": (GPU, torch.bfloat16))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **options: autocast(
        "cpu" if kind == GPU.type else kind, *args, **options))
    # the pretended GPU is unknown in other threads
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with pretended_gpu():
        yield


def test_devices_are_not_mixed(gpu):
    x, y = torch.arange(6.0).view(2, 3), torch.ones(2, 3, device=GPU)
    moved = x.to(GPU).requires_grad_()
    (moved * y).sum().backward()
    assert moved.grad.device == moved.device == y.new_zeros(2).device == GPU
    assert (moved * 2).tolist() == (moved.detach() * 2).cpu().numpy().tolist() == (x * 2).tolist()
    assert torch.tensor([moved.sum(), 1.0]).tolist() == [15, 1]
    for mix in (lambda: y + x, lambda: x @ y.T, lambda: torch.cat([x, y]), lambda: y[x.long()],
                lambda: torch.where(y > 0, x, y), lambda: y.add_(x)):
        with pytest.raises(RuntimeError, match="tensors on lazy"):
            mix()
    with pytest.raises(RuntimeError, match="numpy"):
        y.numpy()
    with pytest.raises(RuntimeError, match="generator on the CPU"):
        torch.rand(2, device=GPU, generator=torch.Generator())


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("encoder_loss", [0, 1])
@pytest.mark.parametrize("script, write", [("thinkdiff_lvlm.py", write_lvlm_data),
                                           ("thinkdiff_clip.py", write_clip_data)])
def test_training(gpu, tmp_path, script, write, encoder_loss):
    """Loss, backward pass, optimizer, held-out loss, checkpoint, and going on from it."""
    write(tmp_path / "data")
    run = (script, "train", *TRAIN, tmp_path / "data", "--out", tmp_path / "run",
           "--encoder-loss", encoder_loss)
    command(*run, "--steps", 1)
    command(*run, "--steps", 2, "--resume")
    rows = read_log(tmp_path / "run")
    assert len(rows) == 2 and all(float(row["held_out_loss"]) > 0 for row in rows)


def test_training_with_offload(gpu, tmp_path, monkeypatch):
    def with_gpu(function):
        def call(*args):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
                return function(*args)
        return call
    for module, name in ((models, "load_t5"), (training_run, "check_run_folder")):
        monkeypatch.setattr(module, name, with_gpu(getattr(module, name)))
    write_clip_data(tmp_path / "data")
    command("thinkdiff_clip.py", "train", *TRAIN, tmp_path / "data", "--out", tmp_path / "run",
            "--steps", 1, "--offload")


@pytest.mark.parametrize("features", ["generated", "input"])
def test_describing_and_training_from_tokens_only(gpu, tmp_path, features):
    write_clip_data(tmp_path / "images")
    prepare = ("prepare_data.py", "lvlm", "--mini", "--images", tmp_path / "images", "--count", 10,
               "--tokens", 4, "--features", features, "--out")
    command(*prepare, tmp_path / "stored")
    command(*prepare, tmp_path / "tokens", "--tokens-only")
    command("thinkdiff_lvlm.py", "train", *TRAIN, tmp_path / "tokens", "--out", tmp_path / "run",
            "--steps", 1, "--features", features)


def test_teacher_forced_features(gpu):
    """Of tokens that vLLM has generated."""
    model, processor = models.load_vlm(MINI["vlm"], GPU, torch.bfloat16)
    chats = [thinkdiff_lvlm.caption_messages(Image.open(file).convert("RGB"), 0)
             for file in sorted(EXAMPLE.glob("*_car.png"))]
    inputs = models.encode_messages(processor, chats).to(GPU)
    y = torch.full((len(chats), 5), 9, device=GPU)
    assert models.teacher_forced_features(model, inputs, y).device == GPU


# ---------------------------------------------------------------- generating
@pytest.mark.parametrize("script, flags", [
    ("thinkdiff_lvlm.py", "--temperature 0.5 --true-cfg 1"),
    ("thinkdiff_lvlm.py", "--relay --true-cfg 2"),
    ("thinkdiff_lvlm.py", "--features input --true-cfg 1"),
    ("thinkdiff_clip.py", f"--image {EXAMPLE}/blue_car.png --image {EXAMPLE}/beach_dog.png "
                          "--image-weight 1 --image-weight 0.5 --text zebra --true-cfg 2"),
])
def test_generating(gpu, tmp_path, script, flags):
    more = ("--max-new-tokens", 4) if "lvlm" in script else ()
    command(script, "generate", "--mini", *flags.split(), *more, "--steps", 1,
            "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("script, more", [("thinkdiff_lvlm.py", ("--tokens", 6)),
                                          ("thinkdiff_clip.py", ())])
def test_explaining(gpu, script, more):
    command(script, "explain", "--mini", "--no-picture", *more)


# ---------------------------------------------------------------- CoBSAT
def test_cobsat_generates(gpu, tmp_path):
    """The first prompt of task 1: blue car, brown car, orange."""
    folder = tmp_path / "images" / "datasets" / "color_car"
    folder.mkdir(parents=True)
    for name in ("blue_car", "brown_car"):
        Image.open(EXAMPLE / "blue_car.png").convert("RGB").save(folder / f"{name}.jpg")
    command("cobsat_eval.py", "generate", "--mini", "--images", tmp_path / "images", "--tasks", 1,
            "--shots", 2, "--limit", 1, "--steps", 1, "--max-new-tokens", 4, "--true-cfg", 2,
            "--method", "thinkdiff", "relay", "oracle", "--out", tmp_path / "x")
    assert len(list((tmp_path / "x").rglob("*.jpg"))) == 3


@pytest.mark.parametrize("judge, path", [("vlm", MINI["vlm"]), ("text", MINI["vlm"]),
                                         ("clip", MINI["clip"])])
def test_cobsat_judges(gpu, judge, path):
    shown = Image.open(EXAMPLE / "blue_car.png").convert("RGB")
    item = "a blue car" if judge == "text" else shown
    answer = cobsat_eval.LOAD_JUDGE[judge](path, GPU, torch.bfloat16)
    assert len(answer([item, item], [("color", "blue", "car")] * 2, ("thinkdiff", 2, 1))) == 2
