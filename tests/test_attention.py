"""Attention that is trained through: which of torch's kernels takes it, and its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from pdtrim.stage import attention
from pdtrim.stage.attention import attend

T, S, D = 65, 192, 32


def heads(device="cpu", dtype=torch.float32):
    """Queries of 4 heads over 2 KV heads; every logit is about -120, as some of Qwen2.5's are."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, t, D, generator=draw) for n, t in ((4, T), (2, S), (2, S)))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(D)
    return [x.to(device, dtype).requires_grad_() for x in (q, k, v)]


def gradients(tensors):
    attend(*tensors, scale=D**-0.5).square().sum().backward()
    return [x.grad for x in tensors]


@pytest.fixture
def recorded_as_on_a_gpu(monkeypatch):
    """The flags of each attention, with a CPU's tensors taken for a GPU's."""
    flags = []
    plain = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        flags.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert not attention._recorded(*heads())
    monkeypatch.setattr(attention, "_recorded", lambda *x: torch.is_grad_enabled())
    return flags


def test_what_trains_keeps_off_cudnn_and_has_the_same_gradient(recorded_as_on_a_gpu, monkeypatch):
    off = gradients(heads())
    assert recorded_as_on_a_gpu == [False]
    with torch.no_grad():
        attend(*heads(), scale=D**-0.5)
    assert recorded_as_on_a_gpu == [False, True] and torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(attention, "_recorded", lambda *x: False)
    for one, other in zip(off, gradients(heads()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_gradient_is_finite_where_cudnns_is_not(dtype):
    assert all(grad.isfinite().all() for grad in gradients(heads("cuda", dtype)))
