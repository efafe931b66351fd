"""Quality numbers, operation counts and result files."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import pdtrim.stage.forward as stage
from helpers import (
    first_last,
    make_plan,
    perturbed,
    random_batch,
    reference_logits,
    tiny_model,
    trimmed,
)
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.evaluate.quality import Quality, measure_quality
from pdtrim.evaluate.result import Result, make_provenance, make_row
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.swap import swap_blocks
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage.cost import Lengths, stage_flops
from pdtrim.stage.forward import Pair, Trimmed, last_streams

LENGTHS = Lengths(prompt=9, continuation=6)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_kl_and_nll_against_the_reference(model):
    batch = random_batch(model, rows=6)
    gates = Gates.removing(4, prefill={1}, decode={2})
    plan = make_plan(model, gates)
    pair = Pair.dense(model)
    found = measure_quality(
        model, {"dense": Trimmed.dense(model), "cut": Trimmed.of(plan, pair)}, batch
    )
    p = F.log_softmax(reference_logits(model, batch, Gates.dense(4)), -1)
    q = F.log_softmax(reference_logits(model, batch, gates), -1)
    kl_n = (p.exp() * (p - q)).sum(-1).mean(1)
    nll_n = F.nll_loss(q.transpose(1, 2), batch.continuation_BC, reduction="none").mean(1)
    torch.testing.assert_close(found["cut"].kl_n, kl_n, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["cut"].nll_n, nll_n, atol=1e-5, rtol=1e-4)
    assert found["dense"].kl == pytest.approx(0, abs=1e-6)
    assert found["cut"].ppl == pytest.approx(math.exp(float(nll_n.mean())), rel=1e-4)
    assert found["cut"].kl_error == pytest.approx(float(kl_n.std()) / 6**0.5, rel=1e-3)


def test_variants_side_by_side_are_each_what_they_are_alone(model, monkeypatch):
    """And what they do alike is done once: a cut costs the layers from there on."""
    batch, dense = random_batch(model), Trimmed.dense(model)
    rules = (LayerKV(), first_last(1, 2), LayerKV(), LayerKV())
    swapped = swap_blocks(model, {2: perturbed(model, 2)})
    variants = {
        "dense": dense,
        "again": Trimmed.dense(model),
        "cut": trimmed(model, Gates.removing(4, prefill={2})),
        "sent": replace(dense, policy=HandoverPolicy(rules=rules)),
        "repaired": trimmed(Pair(prefill=model, decode=swapped), Gates.dense(4)),
    }
    alone = {name: variant.last_stream(batch) for name, variant in variants.items()}
    assert len({float(y_BCE.detach().sum()) for y_BCE in alone.values()}) == 4
    ran = Counter()
    for name in ("prefill_block", "decode_block"):
        step = getattr(stage, name)
        monkeypatch.setattr(
            stage, name, lambda *a, name=name, step=step, **b: ran.update([name]) or step(*a, **b)
        )
    together = last_streams(list(variants.values()), batch)
    assert all(torch.equal(*two) for two in zip(together, alone.values(), strict=True))
    assert ran == {"prefill_block": 4 + 2, "decode_block": 4 + 2 + 3 + 2}


def test_models_of_two_vocabularies_do_not_compare(model):
    other = tiny_model("llama", vocab_size=64)
    with pytest.raises(PlanError, match="vocabularies"):
        measure_quality(model, {"other": Trimmed.dense(other)}, random_batch(other))


def test_operations_are_counted_by_hand(model):
    # width 32, 4 heads and 2 KV heads of 8, inner 48, vocabulary 97; 8 prefill and 6 decode tokens
    kv, qo, mlp, head = 2 * 32 * 16, 2 * 32 * 32, 3 * 32 * 48, 32 * 97
    full = HandoverPolicy.full(4)
    prefill, decode = stage_flops(model.config, Gates.dense(4), full, LENGTHS)
    assert prefill == 2 * 4 * (8 * (kv + qo + mlp) + 2 * 32 * 36)
    assert decode == 2 * (4 * (6 * (kv + qo + mlp) + 2 * 32 * (48 + 21)) + 6 * head)
    gates = Gates.removing(4, prefill={1, 2}, decode={2})
    cut = first_last(1, 2)
    policy = HandoverPolicy(rules=(cut, *(LayerKV(),) * 3))
    prefill, decode = stage_flops(model.config, gates, policy, LENGTHS)
    assert prefill == 2 * (2 * (8 * (kv + qo + mlp) + 2 * 32 * 36) + 8 * kv)
    attention = 2 * 32 * ((3 * 6 + 21) + 2 * (48 + 21))
    assert decode == 2 * (3 * 6 * (kv + qo + mlp) + attention + 6 * head)


def quality_of(*kl):
    return Quality(kl_n=torch.tensor(kl), nll_n=torch.full((len(kl),), 3.0))


def result_of(model):
    plan = make_plan(model, Gates.removing(4, prefill={1, 2}, decode={3}))
    rows = (
        make_row(
            "dense", model, quality_of(0.0), None, lengths=LENGTHS, kv_bytes=800, dense_kv_bytes=800
        ),
        make_row(
            "cut",
            model,
            quality_of(0.2, 0.4),
            plan,
            lengths=LENGTHS,
            kv_bytes=200,
            dense_kv_bytes=800,
        ),
    )
    provenance = make_provenance(model, text="t", sequences=2, lengths=LENGTHS, plans=(plan,))
    return Result(provenance=provenance, rows=rows), plan


def test_a_result_survives_its_file_and_names_what_it_measured(model, tmp_path):
    result, plan = result_of(model)
    result.save(tmp_path / "out" / "result.json")
    assert Result.load(tmp_path / "out" / "result.json") == result
    data = json.loads((tmp_path / "out" / "result.json").read_text())
    assert data["schema"] == "pdtrim.result/1"
    assert data["provenance"]["model_fingerprint"] == model.fingerprint
    assert data["provenance"]["plan_digests"] == [plan.digest]
    row = data["rows"][1]
    assert (row["kl"], row["kv_compression"]) == (pytest.approx(0.3), 4.0)
    assert (row["prefill_blocks"], row["decode_blocks"]) == (2, 3)
    assert data["rows"][0]["prefill_flops_ratio"] == data["rows"][0]["decode_flops_ratio"] == 1
    assert 0 < row["prefill_flops_ratio"] < 0.8 and 0.5 < row["decode_flops_ratio"] < 1


@pytest.mark.parametrize(
    "change", [{"rows": []}, {"extra": 1}, {"schema": "other/1"}, {"provenance": {}}]
)
def test_a_result_of_another_shape_is_refused(model, tmp_path, change):
    result, _ = result_of(model)
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**result.to_json(), **change}))
    with pytest.raises(PdtrimError, match=r"result\.json"):
        Result.load(path)
