"""The byte budget: the exact trade, the cheap evaluation, and what a budget buys."""

import itertools

import pytest
import torch

from helpers import random_batch, tiny_model
from pdtrim.calibration.recall import with_recall
from pdtrim.errors import PlanError
from pdtrim.evaluate.quality import measure_quality
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kvfit.budget import KVBudget, KVObjective, allocate, lagrangian
from pdtrim.kvfit.menu import default_menu
from pdtrim.kvfit.policy import parse_policy
from pdtrim.kvfit.request import KVRequest
from pdtrim.kvfit.sizes import full_bytes, rule_bytes
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage.forward import Pair, Trimmed

MENU = (
    "full+raw",
    "full+int8:first=0,recent=0,group=16",
    "full+int4:first=0,recent=0,group=16",
    "full+int2:first=0,recent=0,group=16",
    "first_last:first=1,last=4,layers=all",
    "snapkv:share=0.4,window=4",
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=4)


@pytest.fixture(scope="module")
def text(model):
    return random_batch(model, rows=3, prompt=33, new=8, seed=4)


def kl_of(model, batch, rules):
    variant = Trimmed(
        pair=Pair.dense(model),
        gates=Gates.dense(4),
        policy=HandoverPolicy(rules=rules),
    )
    return measure_quality(model, {"x": variant}, batch)["x"].kl


def test_the_decode_only_evaluation_equals_the_simulator(model, text):
    objective = KVObjective(model, text)
    tables = [KVRequest.parse(m).fit(objective.observed) for m in MENU]
    base, other = tables[2], tables[5]
    assert objective.stand_on(base) == pytest.approx(kl_of(model, text, base), abs=1e-5)
    for layer in range(4):
        mixed = (*base[:layer], other[layer], *base[layer + 1 :])
        found = objective.kl_with(layer, objective.hand(other[layer], layer))
        assert found == pytest.approx(kl_of(model, text, mixed), abs=1e-5)


def test_rule_bytes_count_pairs_and_masks_in_bf16(model, text):
    objective = KVObjective(model, text)
    view = objective.views[0]
    assert rule_bytes(view, LayerKV()) == 2 * 2 * 32 * 8 * 2
    assert full_bytes(model, 32) == 4 * 2 * 2 * 32 * 8 * 2
    (snap, *_) = KVRequest.parse(MENU[5]).fit(objective.observed)
    assert rule_bytes(view, snap) == 2 * 2 * 13 * 8 * 2 + 2 * 4  # ceil(0.4 * 32), two mask rows


def test_the_lagrangian_choice_is_close_to_the_optimum_and_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.rand(4, 5, generator=generator, dtype=torch.float64) + 0.05
        cost = torch.rand(4, 5, generator=generator, dtype=torch.float64) / sizes
        budget = float(sizes.sum()) / 5 * 0.7
        states = [
            (
                sum(float(cost[i, o]) for i, o in enumerate(choice)),
                sum(float(sizes[i, o]) for i, o in enumerate(choice)),
            )
            for choice in itertools.product(range(5), repeat=4)
        ]
        best = min(c for c, b in states if b <= budget)
        worst = max(c for c, b in states if b <= budget)
        choice = lagrangian(cost, sizes, budget)
        spent = sum(float(sizes[i, o]) for i, o in enumerate(choice))
        reached = sum(float(cost[i, o]) for i, o in enumerate(choice))
        assert spent <= budget
        assert reached - best <= 0.25 * (worst - best)
    assert lagrangian(cost, sizes, 0.01) is None


def test_a_budget_is_met_and_never_worse_than_one_entry_everywhere(model, text):
    objective = KVObjective(model, text)
    full = full_bytes(model, 32)
    for compression in (2.0, 3.0, 4.5):
        found = allocate(model, text, compression, menu=MENU)
        sent = sum(rule_bytes(v, r) for v, r in zip(objective.views, found.rules, strict=True))
        assert full / sent == pytest.approx(found.compression) and found.compression >= compression
        assert found.kl <= found.uniform_kl
        assert found.kl == pytest.approx(kl_of(model, with_recall(text), found.rules), abs=1e-5)
    assert len(set(found.entries)) > 1, "the budget should mix entries here"


def test_a_budget_out_of_reach_or_misspelt_is_refused(model, text):
    with pytest.raises(PlanError, match="out of reach"):
        allocate(model, text, 500.0, menu=MENU)
    with pytest.raises(PlanError, match="at least 1"):
        allocate(model, text, 0.5, menu=MENU)
    with pytest.raises(PlanError, match="write budget:compression=5"):
        parse_policy("budget:5")
    with pytest.raises(PlanError, match="unknown selector"):
        parse_policy("nearest")
    assert parse_policy("full") == KVRequest.parse("full")
    for budget in (KVBudget(compression=5), KVBudget(compression=2.5, codecs="packed")):
        assert parse_policy(budget.text) == budget
    assert not any("entropy" in name for name in default_menu(64, "packed"))
    assert any("entropy" in name for name in default_menu(64))


def test_a_policys_text_resolves_for_every_layer(model, text):
    rules = parse_policy("tova:share=0.5+int8").resolve(model, text)
    assert [r.selector.name for r in rules] == ["tova"] * 4
    assert [r.codec.name for r in rules] == ["int"] * 4


def test_recall_copies_the_prompt_and_leaves_the_text_alone(model, text):
    both = with_recall(text)
    assert torch.equal(both.prompt_BP, text.prompt_BP.repeat(2, 1))
    assert torch.equal(both.continuation_BC[:3], text.continuation_BC)
    long = with_recall(random_batch(model, rows=2, prompt=90, new=70))
    rows = zip(long.prompt_BP[2:].tolist(), long.continuation_BC[2:].tolist(), strict=True)
    for prompt, copied in rows:
        windows = [prompt[i : i + 32] for i in range(59)]
        assert copied[:32] in windows and copied[32:64] in windows
        assert copied[64:] in [window[:6] for window in windows]
