"""Gradients of decode's blocks, held against transformers and the fused kernel."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from helpers import first_last, perturbed, random_batch, tiny_model, trimmed
from pdtrim.distill.loss import backward_kl, dense_stream
from pdtrim.distill.student import Descent, Student, frozen
from pdtrim.distill.train import DistillConfig
from pdtrim.distill.trainable import running
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage import attention
from pdtrim.stage.forward import Pair

DESCENT = Descent(steps=10, learning_rate=1e-3, warmup=0.1)
CONFIG = DistillConfig(
    which="all",
    steps=12,
    learning_rate=2e-3,
    rows=4,
    compute="float32",
    evaluate_every=3,
    checkpoint_seconds=0,
)
GATES = Gates.removing(4, decode={2})


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rule,kept", [(LayerKV(), range(8)), (first_last(2, 3), [0, 1, 5, 6, 7])])
def test_gradients_equal_those_of_transformers(family, rule, kept):
    """The reference: transformers' own cache of the prompt, cut to what travels."""
    model = tiny_model(family)
    policy = HandoverPolicy(rules=(rule,) * 4)
    batch = random_batch(model, rows=3, new=30)  # more positions than one slice of the head
    start = {1: perturbed(model, 1)}
    base = frozen(model, torch.float32)
    student = Student(
        model, base, running(model, Gates.dense(4), "decode", range(4)), start, DESCENT
    )
    dense_BCE = dense_stream(base, batch)
    pair = Pair(prefill=base, decode=student.model)
    kl = backward_kl(trimmed(pair, Gates.dense(4), policy), batch, dense_BCE)
    student.collect()

    network = copy.deepcopy(model.network)
    with torch.no_grad():
        cache = network(batch.prefill_ids_BN, use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        whole = torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)[:, :-1]
        dense = network(whole).logits[:, batch.prompt_BP.shape[1] - 1 :].log_softmax(-1)
        for name, tensor in start[1].items():
            network.model.layers[1].get_parameter(name).copy_(tensor)
    at = torch.arange(8, 8 + 30)[None]
    ours = network(batch.decode_ids_BC, past_key_values=cache, position_ids=at).logits
    ours = ours.log_softmax(-1)
    expected = F.kl_div(ours, dense, log_target=True, reduction="none").sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(kl, expected.detach(), atol=1e-5, rtol=1e-5)
    assert len(student.masters) == sum(1 for _ in network.model.layers.parameters())
    for key, master in student.masters.items():
        layer, name = key.split(".", 1)
        grad = network.model.layers[int(layer)].get_parameter(name).grad
        assert grad.abs().max() > 1e-4, key
        torch.testing.assert_close(master.grad, grad, atol=1e-5, rtol=1e-4)


def test_prefills_side_is_not_recorded(model):
    batch = random_batch(model)
    base = frozen(model, torch.float32)
    student = Student(model, base, running(model, GATES, "decode", [1]), {}, DESCENT)
    trace = trimmed(Pair(prefill=base, decode=student.model), GATES).streams(batch)
    assert not any(x.requires_grad for x, _ in trace)
    assert [y.requires_grad for _, y in trace] == [False, False, True, True, True]
    theirs, ours = (m.block(3).module.mlp.up_proj.weight for m in (model, student.model))
    assert ours.data_ptr() == theirs.data_ptr()  # blocks that do not train cost no memory


def test_a_step_is_clipped_and_decays_matrices_only(model):
    gates = Gates.dense(4)
    base = frozen(model, torch.float32)
    still = dataclasses.replace(DESCENT, weight_decay=0.1, warmup=0.0)
    student = Student(model, base, running(model, gates, "decode", [1]), {}, still)
    before = student.copy_weights(torch.float32)
    for master in student.masters.values():
        master.grad.fill_(3.0)
    student.step(0)
    size = sum(master.numel() for master in student.masters.values()) ** 0.5
    mean = student.state()["mean"]["1.mlp.up_proj.weight"]
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1 / size))
    for key, tensor in before.items():
        decayed = tensor * (1 - 1e-3 * 0.1) if tensor.dim() > 1 else tensor
        torch.testing.assert_close(student.masters[key], decayed - 1e-3, atol=2e-6, rtol=0)


def test_tiled_attention_has_the_fused_kernels_gradients(monkeypatch):
    monkeypatch.setattr(attention, "TILE_SCORES", 4000)  # several tiles
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, n, 16) for heads, n in ((6, 40), (2, 65), (2, 65))]
    allowed = torch.rand(2, 40, 65) < 0.6
    allowed[:, :, 0] = True
    grads = []
    for tiled in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = (
            attention._tiled(q * 0.25, k, v, allowed)
            if tiled
            else attention.attend(q, k, v, scale=0.25, allowed_BTS=allowed)
        )
        out.square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
