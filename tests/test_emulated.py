"""bf16 on a CPU without instructions for it: the same model, its products made in fp32."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import random_batch, tiny_model
from pdtrim.models import emulated
from pdtrim.plan import Gates
from pdtrim.stage.forward import Pair, forward


@pytest.fixture(params=[True, False], ids=["emulated", "instructions"])
def lacks(request, monkeypatch):
    monkeypatch.setattr(emulated, "cpu_lacks_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, emulated.ROWS - 1, emulated.ROWS])
def test_a_product_is_summed_in_fp32_and_rounded_once(lacks, rows, monkeypatch):
    layer = emulated.Linear(300, 7).bfloat16()
    x = torch.randn(rows, 300).bfloat16()
    seen = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or plain(x, *rest))
    made = layer(x)
    assert seen == [torch.float32 if lacks and rows == emulated.ROWS else torch.bfloat16]
    exact = plain(x.double(), layer.weight.double(), layer.bias.double())
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), exact, atol=1e-3, rtol=2**-8)


def test_a_weight_is_copied_once_until_it_changes(monkeypatch):
    """And no more copies are held than have room; those of weights that are gone make room."""
    monkeypatch.setattr(emulated, "cpu_lacks_bf16", lambda: True)
    copied = []
    product = emulated._product
    monkeypatch.setattr(emulated, "_product", lambda x, w, b: copied.append(w) or product(x, w, b))
    layers = [emulated.Linear(30, 7, bias=False).bfloat16().requires_grad_(False) for _ in "ab"]
    held = sum(copy.nbytes for _, copy in emulated._copies.values())
    monkeypatch.setattr(emulated, "KEPT_BYTES", held + 30 * 7 * 4)
    x = torch.randn(64, 30).bfloat16()

    def same(layer):
        """Whether two products read the same copy."""
        before = layer(x)
        assert torch.equal(before, layer(x))
        assert torch.equal(before, product(x, layer.weight.float(), None))
        return copied[-1] is copied[-2]

    assert same(layers[0]) and not same(layers[1])
    layers[0].weight.mul_(2)
    assert same(layers[0])
    layers[0].weight.data = torch.ones(7, 30).bfloat16()
    assert same(layers[0]) and not same(layers[1])
    copied.clear()
    del layers[0]
    assert same(layers[0])


@pytest.mark.parametrize("trains", [True, False])
def test_gradients_go_to_and_through_a_weight_whose_copy_is_there(trains, monkeypatch):
    monkeypatch.setattr(emulated, "cpu_lacks_bf16", lambda: True)
    layer = emulated.Linear(30, 7).bfloat16().requires_grad_(trains)
    x = torch.randn(64, 30).bfloat16().requires_grad_()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert x.grad is not None
    assert (layer.weight.grad is not None) == (layer.bias.grad is not None) == trains


def test_other_types_are_left_alone(lacks):
    layer = emulated.Linear(30, 7)
    x = torch.randn(64, 30)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_model_stays_what_it_was(lacks, family):
    model = tiny_model(family)
    batch, gates = random_batch(model), Gates.removing(4, prefill={1}, decode={2})
    exact = forward(Pair.dense(model), batch, gates)
    model.network.to(torch.bfloat16)
    assert {type(m) for m in model.network.modules() if isinstance(m, nn.Linear)} == {
        emulated.Linear
    }
    half = forward(Pair.dense(model), batch, gates)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


def test_a_cpu_that_says_nothing_of_itself_is_left_alone(monkeypatch):
    emulated.cpu_lacks_bf16.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not emulated.cpu_lacks_bf16()
    for instructions, lacks in (({"avx2": True}, True), ({"avx512_bf16": True}, False)):
        emulated.cpu_lacks_bf16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda i=instructions: i, raising=False)
        assert emulated.cpu_lacks_bf16() == lacks
    emulated.cpu_lacks_bf16.cache_clear()
