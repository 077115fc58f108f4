"""What T5 costs a GPU in training: saved activations, and --offload of the encoder."""
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import T5Config, T5ForConditionalGeneration

from helpers import complaint
from models import load_t5, load_t5_decoder, save_memory
from test_training import write_clip_data
from thinkdiff_clip import t5_nll

XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
SMALL = {"d_model": 48, "d_kv": 16, "d_ff": 80, "num_heads": 3}
# T5 1.0 shares lm_head and embedding and has no gate; v1.1 and Flan-T5 are the others
KINDS = {"v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
         "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True}}


def t5_config(kind, sizes, layers):
    return T5Config(vocab_size=320, num_layers=layers, num_decoder_layers=layers,
                    decoder_start_token_id=0, **sizes, **KINDS[kind])


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory):
    """Folder of a random T5 whose activations are of the order of 1."""
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(t5_config(request.param, SMALL, 2))
    for name, weight in t5.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 2)
    folder = tmp_path_factory.mktemp("t5")
    t5.save_pretrained(folder)
    return folder


def loss_and_gradient(t5, dtype, nll=None):
    """Eq. 2 of a batch with padding and its gradient with respect to x'; stock's if nll is None."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 48, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(2, 320, (3, 11), generator=g)
    mask = torch.ones(3, 7).long()
    mask[0, 4:], labels[1, 5:] = 0, -100
    if nll:
        loss = nll(t5, x, mask, labels)[0]
    else:
        logits = t5(encoder_outputs=(x,), attention_mask=mask, labels=labels).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), x.grad.float()


def stock_t5(folder, dtype):
    t5 = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return t5.eval().requires_grad_(False)


@pytest.mark.parametrize("load, compiled", [(load_t5, False), (load_t5_decoder, False),
                                            (load_t5_decoder, True)])
def test_loss_and_gradient_are_stocks(stored, load, compiled, count_graphs):
    ours = load(stored, "cpu", torch.float32)
    if compiled:
        ours.decoder.compile(dynamic=True)
    loss, gradient = loss_and_gradient(ours, torch.float32, t5_nll)
    expected_loss, expected = loss_and_gradient(stock_t5(stored, torch.float32), torch.float32)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient / expected.abs().max(), expected / expected.abs().max(),
                               rtol=0, atol=1e-5)
    assert bool(count_graphs) == compiled


def test_bfloat16_is_as_exact_as_stock(stored):
    """Both against fp32, in which they agree."""
    exact_loss, exact = loss_and_gradient(stock_t5(stored, torch.float32), torch.float32)
    errors = []
    for t5, nll in ((load_t5(stored, "cpu", torch.bfloat16), t5_nll),
                    (stock_t5(stored, torch.bfloat16), None)):
        loss, gradient = loss_and_gradient(t5, torch.bfloat16, nll)
        assert loss.item() == pytest.approx(exact_loss.item(), rel=5e-3)
        errors.append((gradient - exact).norm() / exact.norm())
    assert errors[0] < 0.05 and errors[0] < 1.2 * errors[1]


def test_the_encoder_is_stocks(stored):
    ids, mask = torch.randint(2, 320, (2, 9)), torch.ones(2, 9).long()
    mask[0, 5:] = 0
    with torch.no_grad():
        ours, stock = (t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                       for t5 in (load_t5(stored, "cpu", torch.float32),
                                  stock_t5(stored, torch.float32)))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- saved activations
L, S = 64, 63  # tokens of the target and of the memory


def saved_bytes(t5, batch):
    """Bytes that a decoder's forward pass keeps for the backward pass, beside the weights."""
    storages = {}
    weights = {weight.untyped_storage()._cdata for weight in t5.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor
    x = torch.randn(batch, S, t5.config.d_model, dtype=t5.dtype, requires_grad=True)
    mask = torch.ones(batch, S, dtype=torch.long)
    mask[0, -1] = 0
    ids = torch.zeros(batch, L, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        state = t5.decoder(input_ids=ids, encoder_hidden_states=x, encoder_attention_mask=mask,
                           use_cache=False)
    assert state.last_hidden_state.requires_grad
    return sum(size for storage, size in storages.items() if storage not in weights)


def bytes_of_a_layer(kind, dtype, change):
    """Of a sample and a layer, without what a batch or the layers share; sizes of T5-XXL."""
    with FakeTensorMode():
        found = []
        for layers in (1, 2):
            t5 = T5ForConditionalGeneration._from_config(t5_config(kind, XXL, layers), dtype=dtype)
            t5 = change(t5.eval().requires_grad_(False))
            found.append(saved_bytes(t5, 3) - saved_bytes(t5, 2))
    return found[1] - found[0]


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("kind, wide", [("v1.1", 3), ("1.0", 1)])
def test_saved_bytes_by_hand(kind, wide, dtype, size):
    d, d_ff, heads = 4096, 10240, 64
    # the three norms' inputs, in fp32 (on a GPU as they are), and a factor for each token
    norms = 3 * (L * d * 4 + L * 4)
    # queries, outputs, keys, values, and in fp32 the softmax's sum
    self_attention = 4 * L * d * size + heads * L * 4
    cross_attention = 2 * (L + S) * d * size + heads * L * 4 + L * S * size  # and its mask
    # gelu's input and output, and what it is multiplied by; of relu the output
    feed_forward = wide * L * d_ff * size
    by_hand = norms + self_attention + cross_attention + feed_forward
    assert 0.99 * by_hand <= bytes_of_a_layer(kind, dtype, save_memory) <= by_hand
    # relu's T5 in fp32 has only the mask of each head to lose
    assert bytes_of_a_layer(kind, dtype, lambda t5: t5) > 1.05 * by_hand


@pytest.mark.parametrize("load", [load_t5, load_t5_decoder])
def test_loaded_models_save_memory(stored, load):
    ours, stock = load(stored, "cpu", torch.bfloat16), stock_t5(stored, torch.bfloat16)
    assert saved_bytes(ours, 2) < 0.9 * saved_bytes(stock, 2)


def test_on_a_gpu_norms_keep_their_input_as_it_is():
    t5 = save_memory(T5ForConditionalGeneration(t5_config("v1.1", SMALL, 1)))
    norms = [module for module in t5.modules() if "Norm" in type(module).__name__]
    kept = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 5, 48, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.ones(48, dtype=torch.bfloat16, device="cuda")
        for norm in norms:
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
            with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
                norm(x)
    sizes = {(tuple(tensor.shape), tensor.dtype) for tensor in kept}
    assert len(norms) == 7
    assert sizes == {((2, 5, 48), torch.bfloat16), ((48,), torch.bfloat16),
                     ((2, 5, 1), torch.float32)}


# ---------------------------------------------------------------- --offload
def test_offload_computes_the_same(stored, monkeypatch):
    """On the CPU, which stands for the GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    ours, stock = load_t5(stored, "cpu", torch.float32, offload=True), stock_t5(
        stored, torch.float32)
    assert {weight.device.type for weight in ours.encoder.block.parameters()} == {"meta"}
    ids, mask = torch.randint(2, 320, (2, 9)), torch.ones(2, 9).long()
    for _ in range(2):
        with torch.no_grad():
            pair = [t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                    for t5 in (ours, stock)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
    assert {weight.device.type for weight in ours.encoder.block.parameters()} == {"meta"}
    pair = (loss_and_gradient(ours, torch.float32, t5_nll), loss_and_gradient(stock, torch.float32))
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_offload_needs_a_gpu(tmp_path):
    write_clip_data(tmp_path / "data")
    assert "there is no GPU here: leave it out" in complaint(
        "thinkdiff_clip.py", "train", "--mini", "--offload", "--data", tmp_path / "data", "--out",
        tmp_path / "run")
