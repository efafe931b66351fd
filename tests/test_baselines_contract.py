"""What all baselines have in common: modes, counts, budgets and refusals."""

import pytest

from baselines_naive import ALL, ROWS, C, L, N, each, plan_of, pruned, text_of
from helpers import random_batch, tiny_model
from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.kvfit.policy import parse_policy
from pdtrim.methods import METHODS, Target
from pdtrim.methods.baselines import (
    SLEB,
    UIDL,
    ShortenedPPL,
    ShortenedTaylor,
    ShortGPT,
)
from pdtrim.methods.problem import KV_SEQUENCES


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=L)


@pytest.fixture(scope="module")
def calibration(model):
    return text_of(model)


# --- modes, counts, budgets ---


@each
def test_one_model_loses_the_same_in_both_stages(model, calibration, method):
    gates = plan_of(method, model, calibration, 2, 2).gates
    last = gates.last_read
    assert [a == "full" for a in gates.prefill_attention[:last]] == list(
        gates.decode_attention[:last]
    )
    assert gates.prefill_mlp[:last] == gates.decode_mlp[:last]
    lost = gates.decode_attention.count(False) + gates.decode_mlp.count(False)
    assert lost >= 3 if method.name == "blockpruner" else lost == 4


@each
def test_prefills_blocks_lie_inside_decodes(model, calibration, method):
    gates = plan_of(method, model, calibration, 1, 3, "subset").gates
    assert "kv" not in gates.prefill_attention[: gates.last_read]
    if method.name == "blockpruner":
        return  # its test compares the sets
    decode = {i for i, on in enumerate(gates.decode_attention) if not on}
    assert len(decode) == 3
    inside = [{i} for i in decode if pruned({i}, decode, "subset") == gates]
    assert inside
    if method.name not in ("uidl", "evopress"):  # one ranking: both sets are those of one model
        whole = plan_of(method, model, calibration, 3, 3).gates
        assert whole.decode_attention == gates.decode_attention
        alone = plan_of(method, model, calibration, 1, 1).gates
        assert any(pruned(one, one) == alone for one in inside)


@each
def test_the_same_text_gives_the_same_plan(model, calibration, method):
    digests = {plan_of(method, model, calibration, 2, 2, seed=3).digest for _ in range(2)}
    assert len(digests) == 1


@each
def test_a_search_goes_on_from_its_journal(model, calibration, method, tmp_path):
    target = Target(prefill_remove=1, decode_remove=2, mode="subset")
    journal = tmp_path / "journal"
    whole = method.plan(model, calibration, target, journal=journal).plan
    lines = journal.read_bytes().splitlines(keepends=True)  # a header, the KV policy, losses
    assert (len(lines) > 2) == (method.name not in ("shortgpt", "uidl", "shortened-taylor"))
    journal.write_bytes(b"".join(lines[: len(lines) // 2 + 1]))
    again = method.plan(model, calibration, target, journal=journal).plan
    assert again.digest == whole.digest
    assert again.provenance.search_block_tokens == whole.provenance.search_block_tokens
    assert journal.read_bytes() == b"".join(lines)


def test_a_pass_is_paid_by_its_block_tokens(model, calibration):
    one = ROWS * L * (N + C)
    for method, passes in ((ShortGPT(), 1), (UIDL(), 1), (ALL["shortened-taylor"], 3)):
        assert plan_of(method, model, calibration, 2, 2).provenance.search_block_tokens == (
            passes * one
        )
    ppl = plan_of(ShortenedPPL(), model, calibration, 2, 2).provenance.search_block_tokens
    # the dense pass, then what lies behind each block; without the last block prefill ends with the
    # keys and values of the one before, which runs again
    behind = [L - 1 - layer for layer in range(L - 1)] + [1]
    assert ppl == one + ROWS * sum(behind) * (N + C)
    nested = plan_of(ShortenedPPL(), model, calibration, 1, 2, "subset")
    assert nested.provenance.search_block_tokens == ppl  # one ranking for both stages


@each
def test_a_budget_is_honoured_or_refused(model, calibration, method):
    dense = ROWS * L * (N + C)
    with pytest.raises(PlanError, match=f"budget of {dense - 1} block-tokens .*'{method.name}'"):
        plan_of(method, model, calibration, 2, 2, budget=dense - 1)
    free = plan_of(method, model, calibration, 2, 2)
    spent = free.provenance.search_block_tokens
    paid = plan_of(method, model, calibration, 2, 2, budget=spent)
    assert paid.digest == free.digest and paid.provenance.search_block_tokens == spent
    if method.name != "evopress":
        with pytest.raises(PlanError, match="budget"):
            plan_of(method, model, calibration, 2, 2, budget=spent - 1)
    else:
        less = plan_of(method, model, calibration, 2, 2, budget=spent - 1)
        assert less.provenance.search_block_tokens < spent


@each
def test_nothing_to_remove_costs_nothing(model, calibration, method):
    plan = plan_of(method, model, calibration, 0, 0)
    assert plan.gates == pruned((), ()) and plan.provenance.search_block_tokens == 0


@each
def test_the_kv_policy_goes_into_the_plan_and_not_into_the_ranking(model, calibration, method):
    kv = parse_policy("first_last:first=1,last=2,layers=2")
    plan = plan_of(method, model, calibration, 2, 2, kv=kv)
    rules = kv.resolve(model, calibration.search[:KV_SEQUENCES], block_size=1)
    assert plan.kv == rules and rules != rules[::-1]
    assert plan.gates == plan_of(method, model, calibration, 2, 2).gates


# --- what they refuse, and how they are found ---


@each
def test_targets_that_the_literature_does_not_know(model, calibration, method, tmp_path):
    with pytest.raises(PlanError, match=f"'{method.name}' does not know metric"):
        plan_of(
            method, model, calibration, 0, 0, metric="flops", prefill_share=0.2, decode_share=0.2
        )
    repaired = Target(prefill_remove=1, decode_remove=1, mode="unified", repair="best")
    with pytest.raises(PlanError, match=f"'{method.name}' does not know repair"):
        method.plan(model, calibration, repaired)
    if method.name not in ("blockpruner", "evopress"):
        with pytest.raises(PlanError, match=f"'{method.name}' does not know grain"):
            plan_of(method, model, calibration, 1, 1, grain="part")


def test_taylor_has_no_ranking_for_a_stage(model, calibration):
    with pytest.raises(PlanError, match="use mode unified or subset"):
        plan_of(ALL["shortened-taylor"], model, calibration, 1, 1, "projected")


@pytest.mark.parametrize(
    "method,words",
    [
        (SLEB(), "first 1 and the last 1 of 6 blocks, so 4 can go, not 5"),
        (ShortenedTaylor(), "first 4 and the last 2 of 6 blocks, so 0 can go, not 5"),
        (ShortenedPPL(protect_first=4, protect_last=2), "so 0 can go"),
        (SLEB(protect_first=4, protect_last=4), "so 0 can go"),
    ],
)
def test_protected_blocks_bound_what_can_go(model, calibration, method, words):
    with pytest.raises(PlanError, match=words):
        plan_of(method, model, calibration, 5, 5)


def test_a_prompt_of_one_token_leaves_prefill_nothing_to_rank(model):
    batch = random_batch(model, rows=2, prompt=1, new=6)
    short = Calibration(search=batch, rerank=batch, fit=batch, source="x", hash="0" * 64)
    for method in (ShortGPT(), UIDL()):
        with pytest.raises(PlanError, match="prompts of 1 token"):
            plan_of(method, model, short, 1, 1, "projected")
        assert plan_of(method, model, short, 0, 1, "projected").gates.blocks("decode") == L - 1


@each
def test_every_baseline_is_registered_with_its_papers_defaults(method):
    cls = METHODS[method.name]
    assert cls is type(method) and cls.default_mode == "unified"
    assert cls.paper_calibration.source
    default = cls()
    if method.name == "sleb":
        assert (default.protect_first, default.protect_last) == (1, 1)
    if method.name == "shortened-taylor":
        assert (default.protect_first, default.protect_last) == (4, 2)
    if method.name == "shortened-ppl":
        assert (default.protect_first, default.protect_last) == (0, 0)
    if method.name == "evopress":
        assert (default.starts, default.offspring, default.survive) == (64, 32, 2 / 32)
