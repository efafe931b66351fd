"""The probe of export: needles and KL, and the codec that it advises."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers import first_last, make_plan, random_batch
from pdtrim.errors import PlanError
from pdtrim.evaluate import kv_probe
from pdtrim.evaluate.kv_probe import TRIED, Costs, ProbeConfig, _advice, check_codecs
from pdtrim.evaluate.quality import measure_quality
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.block import Block
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage.forward import Trimmed
from test_kv_bias import biased_model

RUINOUS = "int2:rotate=true,first=0,recent=0"
SMALL = ProbeConfig(needles=2, tokens=200, kl=0.2)


class Letters:
    """A tokenizer of letters, in the vocabulary of the tiny models."""

    bos_token_id = None

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[3 + ord(letter) % 90 for letter in text])


@pytest.fixture
def model():
    model = biased_model(300.0)
    model.tokenizer = Letters()
    return model


def plan_of(model, codec, **more):
    return make_plan(model, Gates.dense(4), (LayerKV(codec=parse_codec(codec), **more),) * 4)


def test_key_biases_are_no_reason_to_refuse(model):
    probed = check_codecs(model, plan_of(model, "int3:rotate=true"), SMALL)
    assert probed.kl < SMALL.kl and check_codecs(model, plan_of(model, "lossless"), SMALL) is None


def test_a_codec_that_ruins_the_model_is_refused_with_one_that_does_not(model, monkeypatch):
    """No random model finds a needle, so that needles alone would let it pass."""
    monkeypatch.setattr(Block, "kv_bias", lambda self: None)
    with pytest.raises(PlanError) as caught:
        check_codecs(model, plan_of(model, RUINOUS), SMALL)
    message = str(caught.value)
    assert "finds 0 of 2 needles, without them 0" in message and "\n" not in message
    spent, limit, advised, cost = re.search(
        r"cost (\S+) nats a token, which may be (\S+); 'full\+(\S+)' costs (\S+)$", message
    ).groups()
    assert float(spent) > float(limit) == SMALL.kl > float(cost)
    assert check_codecs(model, plan_of(model, advised), SMALL).kl == pytest.approx(
        float(cost), rel=0.01
    )


def test_what_codecs_cost_is_what_is_measured_of_them(model):
    """And advice asks for no more codecs than it takes to find one that costs little."""
    text = random_batch(model, rows=3, prompt=40, new=8)
    costs = Costs(model, text)
    policies = {name: HandoverPolicy(rules=plan_of(model, name).kv) for name in TRIED}
    variants = {n: replace(Trimmed.dense(model), policy=p) for n, p in policies.items()}
    measured = {n: float(q.kl_n.max()) for n, q in measure_quality(model, variants, text).items()}
    assert {n: costs.kl(p) for n, p in policies.items()} == pytest.approx(measured, rel=1e-3)
    asked = []
    some = SimpleNamespace(observed=costs.observed, kl=lambda p: asked.append(p) or costs.kl(p))
    for count, name in ((1, "int3"), (3, "int4"), (len(TRIED), "lossless")):
        limit = 2.001 * measured[name]
        said = _advice(some, ProbeConfig(kl=limit))
        first = next(n for n in TRIED if measured[n] <= limit / 2 or n == TRIED[-1])
        assert said == f"'full+{first}' costs {costs.kl(policies[first]):.3g}"
        assert len(asked) == TRIED.index(first) + 1 <= count
        asked.clear()


def test_a_kl_that_is_no_number_is_refused(model, monkeypatch):
    monkeypatch.setattr(Costs, "kl", lambda costs, policy: float("nan"))
    with pytest.raises(PlanError, match="cost nan nats"):
        check_codecs(model, plan_of(model, "int8"), SMALL)


def test_selectors_are_a_choice_and_unsent_layers_no_matter(model, monkeypatch):
    plan = plan_of(model, "int8", selector=first_last(1, 1).selector)
    assert check_codecs(model, plan, SMALL).kl < 0.01
    monkeypatch.setattr(kv_probe, "Costs", None)
    gates = Gates.removing(4, decode=range(4), prefill=range(4))
    unsent = plan.model_copy(update={"gates": gates})
    assert not unsent.sent_layers and check_codecs(model, unsent, SMALL) is None
