"""Methods of the literature with the stage-aware search behind them."""

from dataclasses import replace

import pytest
import torch

from baselines_naive import text_of
from helpers import pair_of, tiny_model
from pdtrim.bundle import TrimPlan
from pdtrim.errors import PlanError
from pdtrim.evaluate.quality import measure_quality
from pdtrim.methods import METHODS, Target
from pdtrim.methods.baselines import FLAP, LLMPruner, ShortGPT
from pdtrim.methods.baselines.wanda_sp import WandaSP
from pdtrim.methods.flap_pdtrim import FLAPPDTrim
from pdtrim.methods.llm_pruner_pdtrim import LLMPrunerPDTrim
from pdtrim.methods.pdtrim import PDTrim
from pdtrim.methods.problem import Problem
from pdtrim.methods.shortgpt_pdtrim import ShortGPTPDTrim
from pdtrim.methods.wanda_sp_pdtrim import WandaSPPDTrim
from pdtrim.plan import Gates
from pdtrim.progress import silent
from pdtrim.search.anneal import Annealing
from pdtrim.stage.cost import removed_parameters
from pdtrim.stage.forward import Trimmed
from pdtrim.verbs.plan import PlanConfig, make_plan

LAYERS = 8
SHARES = Target(repair="none", metric="parameters", prefill_share=0.4, decode_share=0.3)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=LAYERS, seed=1)


@pytest.fixture(scope="module")
def text(model):
    text = text_of(model, rows=14)
    return replace(text, search=text.search[:9], rerank=text.search[9:])


def test_without_steps_it_is_shortgpt_and_with_them_never_worse(model, text):
    target = Target(repair="none", prefill_remove=4, decode_remove=3)
    text = replace(text, rerank=text.rerank[:0])
    alone = ShortGPT().plan(model, text, target).plan
    still = ShortGPTPDTrim(annealing=Annealing(steps=0)).plan(model, text, target).plan
    moved = ShortGPTPDTrim().plan(model, text, target).plan
    assert still.gates == alone.gates
    assert moved.provenance.search_kl < still.provenance.search_kl
    assert moved.gates.blocks("decode") == LAYERS - 3
    assert moved.gates.blocks("prefill") <= LAYERS - 4


def test_the_ranking_is_paid_for(model, text):
    target = Target(repair="none", decode_remove=2)
    ranking = ShortGPT().plan(model, text, target).plan.provenance.search_block_tokens
    still = ShortGPTPDTrim(annealing=Annealing(steps=0)).plan(model, text, target).plan
    own = still.provenance.search_block_tokens - ranking
    assert ranking > 0 and own > 0
    with pytest.raises(PlanError, match=r"does not reach the end of method 'shortgpt.pdtrim'"):
        tight = Target(repair="none", decode_remove=2, budget=ranking + own // 4)
        ShortGPTPDTrim().plan(model, text, tight)


def test_narrow_blocks_and_removed_blocks_make_up_the_share(model, text):
    plan = LLMPrunerPDTrim().plan(model, text, SHARES).plan
    assert plan.widths is not None and plan.widths.prefill == plan.widths.decode
    removed = removed_parameters(model, plan)
    assert 0.4 <= removed["prefill"] < 0.4 + 1 / LAYERS
    assert 0.3 <= removed["decode"] < 0.3 + 1 / LAYERS
    half = Target(
        repair="none", metric="parameters", prefill_share=0.15, decode_share=0.15, mode="unified"
    )
    assert plan.widths == LLMPruner().plan(model, text, half).plan.widths
    assert plan.gates.blocks("decode") < LAYERS


def test_without_narrowing_it_is_pdtrim(model, text):
    ours = PDTrim().plan(model, text, SHARES).plan
    plan = LLMPrunerPDTrim(narrow=0).plan(model, text, SHARES).plan
    assert plan.widths is None and plan.gates == ours.gates


def test_a_repaired_hybrid_is_written_read_and_better(model, text, tmp_path):
    target = Target(metric="parameters", prefill_share=0.3, decode_share=0.3, repair="best")
    path = tmp_path / "plan.json"
    LLMPrunerPDTrim().plan(model, text, target).save(path)
    trim = TrimPlan.open(path)
    plan = trim.plan
    assert plan.replacements and plan.provenance.repair != "none"
    bare = plan.model_copy(update={"replacements": ()})
    found = measure_quality(
        model,
        {
            "bare": Trimmed.of(bare, pair_of(bare, model, None)),
            "repaired": Trimmed.of(plan, trim.pair(model)),
        },
        text.rerank,
    )
    assert found["repaired"].kl < found["bare"].kl


def measured(model, text, plans):
    """Held-out KL of plans with their weights."""
    found = measure_quality(
        model,
        {name: Trimmed.of(trim.plan, trim.pair(model)) for name, trim in plans.items()},
        text.rerank,
    )
    return {name: quality.kl for name, quality in found.items()}


@pytest.mark.parametrize(("narrower", "hybrid"), [(FLAP, FLAPPDTrim), (WandaSP, WandaSPPDTrim)])
def test_with_nothing_more_to_lose_it_is_the_narrower_and_its_repair_is_better(
    model, text, narrower, hybrid
):
    shares = Target(
        repair="none", metric="parameters", prefill_share=0.3, decode_share=0.3, mode="unified"
    )
    plans = {
        "alone": narrower().plan(model, text, shares),
        "bare": hybrid().plan(model, text, shares),
        "repaired": hybrid().plan(model, text, replace(shares, repair="best")),
    }
    assert plans["bare"].plan.digest == plans["alone"].plan.digest
    assert plans["repaired"].plan.widths == plans["alone"].plan.widths
    assert plans["repaired"].plan.provenance.repair != "none"
    kl = measured(model, text, plans)
    assert kl["repaired"] < 0.9 * kl["alone"]


def test_the_search_behind_flap_sees_its_biases(model, text):
    problem = Problem.of(model, text, SHARES, progress=silent, journal=None)
    ground = FLAPPDTrim().ground(problem)
    biases = [
        (layer, name, weights[name])
        for layer, weights in ground.blocks["decode"].items()
        for name in weights
        if name.endswith("proj.bias")
    ]
    assert biases
    for layer, name, bias in biases:
        assert torch.equal(ground.pair.decode.block(layer).module.get_parameter(name), bias)


@pytest.mark.parametrize("hybrid", [FLAPPDTrim, WandaSPPDTrim])
def test_where_both_lose_alike_no_block_goes(model, text, hybrid):
    plan = hybrid().plan(model, text, replace(SHARES, prefill_share=0.2, decode_share=0.2)).plan
    removed = removed_parameters(model, plan)
    assert plan.gates == Gates.dense(LAYERS).without_dead_work()
    assert removed["decode"] >= 0.2 and 0.2 * 0.99 <= removed["prefill"] < 0.21


@pytest.mark.parametrize("hybrid", [FLAPPDTrim, WandaSPPDTrim])
def test_it_narrows_what_both_lose_and_prefill_skips_the_rest(model, text, hybrid):
    shares = Target(metric="parameters", prefill_share=0.4, decode_share=0.2, repair="best")
    repaired = hybrid().plan(model, text, shares)
    plan = repaired.plan
    removed = removed_parameters(model, plan)
    assert 0.4 <= removed["prefill"] < 0.4 + 1 / LAYERS
    assert removed["decode"] == pytest.approx(0.2, abs=0.01)
    assert plan.gates.blocks("decode") == LAYERS > plan.gates.blocks("prefill")
    skipped = [i for i, gate in enumerate(plan.gates.prefill_attention) if gate == "kv"]
    assert skipped and not any(
        width and width.biased for width in map(plan.widths.prefill.__getitem__, skipped)
    )
    bare = hybrid().plan(model, text, replace(shares, repair="none"))
    kl = measured(model, text, {"repaired": repaired, "bare": bare})
    assert kl["repaired"] < kl["bare"]


@pytest.mark.parametrize(
    ("name", "target", "what"),
    [
        ("llm-pruner+pdtrim", Target(repair="none", decode_remove=2), "use metric parameters"),
        ("flap+pdtrim", replace(SHARES, grain="part"), "use grain block"),
        (
            "shortgpt+pdtrim",
            Target(repair="none", decode_remove=2, search="greedy"),
            "use search anneal",
        ),
    ],
)
def test_refusals_say_what_to_do(model, text, name, target, what):
    with pytest.raises(PlanError, match=what):
        METHODS[name]().plan(model, text, target)


@pytest.mark.parametrize(
    ("asked", "method"),
    [
        ({}, "pdtrim"),
        ({"prefill_remove": 0.3, "decode_remove": 0.1}, "pdtrim"),
        ({"metric": "parameters", "prefill_remove": 0.3}, "pdtrim"),
        ({"metric": "parameters", "decode_remove": 0.1}, "wanda-sp+pdtrim"),
        ({"metric": "parameters", "decode_remove": 0.1, "kv": "snapkv+int4"}, "wanda-sp+pdtrim"),
        ({"metric": "parameters", "decode_remove": 0.1, "kv": "duo:share=0.5+int4"}, "pdtrim"),
        ({"metric": "parameters", "decode_remove": 0.1, "grain": "part"}, "pdtrim"),
        ({"metric": "parameters", "decode_remove": 0.1, "method": "flap"}, "flap"),
    ],
)
def test_a_plan_narrows_by_default_where_both_stages_lose_parameters(asked, method):
    config = PlanConfig(**asked)
    config.check()
    assert config.chosen_method == method


def test_the_default_plan_of_parameters_is_narrow_in_both_stages(model):
    config = PlanConfig(
        metric="parameters", prefill_remove=0.4, decode_remove=0.2, sequences=4, fit_sequences=4,
        prompt_tokens=24, continuation_tokens=12,
    )  # fmt: skip
    plan = make_plan(model, config).plan
    assert plan.provenance.method == "wanda-sp+pdtrim"
    assert plan.widths is not None and plan.gates.blocks("decode") == LAYERS
