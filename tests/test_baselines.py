"""The literature's methods, each against its formula by hand or by a loop over transformers."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import random_batch, reference_logits, tiny_model
from pdtrim.calibration.batches import Calibration
from pdtrim.calibration.self_text import write_text
from pdtrim.errors import PlanError
from pdtrim.methods import METHODS, Target
from pdtrim.methods.baselines import (
    SLEB,
    UIDL,
    BlockPruner,
    EvoPress,
    ShortenedPPL,
    ShortenedTaylor,
    ShortGPT,
)
from pdtrim.methods.baselines.evopress import paper_generations
from pdtrim.methods.baselines.nll import token_nll
from pdtrim.methods.baselines.shortened import taylor_salience, taylor_scores
from pdtrim.methods.baselines.shortgpt import block_influence
from pdtrim.methods.baselines.uidl import angular_distance, best_run
from pdtrim.plan import Gates
from pdtrim.search.kv_budget import KV_SEQUENCES, resolve_policy
from pdtrim.stage.forward import Batch

L, P, C, ROWS = 6, 10, 6, 9
N = P - 1
ALL = {
    "shortgpt": ShortGPT(),
    "sleb": SLEB(),
    "shortened-ppl": ShortenedPPL(),
    "shortened-taylor": ShortenedTaylor(protect_first=1, protect_last=1),
    "uidl": UIDL(),
    "blockpruner": BlockPruner(),
    "evopress": EvoPress(starts=8, offspring=6, generations=6),
}
each = pytest.mark.parametrize("method", ALL.values(), ids=ALL)


def text_of(model, rows=ROWS):
    """Text that the model itself wrote, so that every removal harms."""
    ids = write_text(model, sequences=rows, tokens=P + C, seed=1)
    batch = Batch(prompt_BP=ids[:, :P], continuation_BC=ids[:, P:])
    return Calibration(search=batch, rerank=batch[:0], report=batch[:0], source="x", hash="0" * 64)


def flatten(model, layer, scale=1e-3):
    """Make a block nearly the identity."""
    with torch.no_grad():
        block = model.network.model.layers[layer]
        block.self_attn.o_proj.weight.mul_(scale)
        block.mlp.down_proj.weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=L)


@pytest.fixture(scope="module")
def calibration(model):
    return text_of(model)


def ids_of(batch):
    return torch.cat((batch.prompt_BP, batch.continuation_BC), dim=1)


@torch.no_grad()
def hooked_streams(model, ids):
    """Input of each decoder layer and the output of the last, from a forward of transformers."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.network.model.layers
    ]
    hooks.append(
        model.network.model.norm.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
    )
    model.network(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == L + 1
    return seen


@torch.no_grad()
def nll_without(model, batch, gone):
    """Mean NLL of the continuations by a network that lacks the layers."""
    network = copy.deepcopy(model.network)
    kept = [layer for i, layer in enumerate(network.model.layers) if i not in gone]
    network.model.layers = nn.ModuleList(kept)
    network.config.num_hidden_layers = len(kept)
    logits = network(input_ids=ids_of(batch), use_cache=False).logits[:, N:-1]
    logp = logits.log_softmax(-1).gather(-1, batch.continuation_BC[..., None])
    return -float(logp.mean())


@torch.no_grad()
def nll_under(model, batch, gates):
    logp = reference_logits(model, batch, gates).log_softmax(-1)
    return -float(logp.gather(-1, batch.continuation_BC[..., None]).mean())


def naive_order(score, units, count):
    """Units removed one by one, each time the one without which the score is least."""
    gone = []
    for _ in range(count):
        left = [unit for unit in units if unit not in gone]
        gone.append(min(left, key=lambda unit: score({*gone, unit})))
    return gone


def pruned(prefill, decode, mode="unified"):
    return Gates.removing(L, prefill=prefill, decode=decode, mode=mode).without_dead_work()


def plan_of(method, model, calibration, prefill, decode, mode="unified", **more):
    target = Target(prefill_remove=prefill, decode_remove=decode, mode=mode, **more)
    return method.plan(model, calibration, target)


# --- the scores ---


def test_block_influence_by_hand():
    flows = [
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),  # two tokens of one text
        torch.tensor([[[1.0, 1.0], [0.0, 5.0]]]),
        torch.tensor([[[1.0, 1.0], [0.0, -5.0]]]),
    ]
    half = (1 - math.sqrt(0.5)) / 2
    torch.testing.assert_close(block_influence(flows), torch.tensor([[half, 1.0]]))


def test_angular_distance_and_the_best_run_by_hand():
    turns = [torch.tensor([[math.cos(a), math.sin(a)]]) for a in (0.0, 0.5, 0.6, 2.0)]
    one, two = angular_distance(turns, 1), angular_distance(turns, 2)
    torch.testing.assert_close(one * math.pi, torch.tensor([[0.5, 0.1, 1.4]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(two * math.pi, torch.tensor([[0.6, 1.5]]), atol=1e-4, rtol=0)
    assert best_run(one[0], 1, range(3)) == range(1, 2)
    assert best_run(one[0], 1, range(2, 3)) == range(2, 3)
    assert best_run(two[0], 2, range(3)) == range(2)
    same = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    assert (F.cosine_similarity(same, 1.1 * same, dim=-1) > 1).any()  # rounding
    assert not angular_distance([same, 1.1 * same], 1).isnan().any()


def test_nll_and_taylor_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = torch.tensor([math.log(4 / 3), math.log(2.0)])
    torch.testing.assert_close(token_nll(logits, torch.tensor([1, 0])), expected)
    weights = [torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])]
    gradients = [torch.tensor([[4.0, 5.0]]), torch.tensor([-1.0])]
    assert taylor_salience(weights, gradients) == 4 + 10 + 3


def test_taylor_is_that_of_an_ordinary_forward_and_leaves_the_model_as_it_was(model, calibration):
    batch = calibration.search
    network = copy.deepcopy(model.network)
    logits = network(input_ids=ids_of(batch), use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids_of(batch)[:, 1:].flatten()).backward()
    expected = [
        sum(float((w.detach() * w.grad).abs().sum()) for w in layer.parameters())
        for layer in network.model.layers
    ]
    first = model.network.model.layers[0].mlp.up_proj.weight
    first.requires_grad_(False)
    try:
        assert taylor_scores(model, batch, rows=4) == pytest.approx(expected, rel=1e-3)
        assert not first.requires_grad
    finally:
        first.requires_grad_(True)
    assert all(w.grad is None for w in model.network.parameters())


# --- what they remove ---


@each
def test_a_block_that_is_nearly_the_identity_goes_first(method):
    for layer in (2, 4):
        model = flatten(tiny_model("llama", layers=L), layer)
        plan = plan_of(method, model, text_of(model, rows=48), 1, 1)
        assert plan.gates == pruned({layer}, {layer})


@pytest.fixture(scope="module")
def apart():
    """A model and a text whose prompt and continuation rank the blocks differently."""
    model = tiny_model("llama", layers=L, seed=5)
    return model, text_of(model, rows=1)


def test_shortgpt_removes_by_the_raw_stream_of_all_tokens(model, calibration, apart):
    for each_model, text in ((model, calibration), apart):
        seen = hooked_streams(each_model, ids_of(text.search)[:, :-1])
        cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in itertools.pairwise(seen)]
        everything, prompt, other = (
            sorted(range(L), key=lambda i: -float(cosines[i][:, span].mean()))
            for span in (slice(None), slice(N), slice(N, None))
        )
        for n in range(1, L):
            plan = plan_of(ShortGPT(), each_model, text, n, n)
            assert plan.gates == pruned(everything[:n], everything[:n])
            staged = plan_of(ShortGPT(), each_model, text, n, 1, "projected")
            assert staged.gates == pruned(prompt[:n], other[:1], "projected")
    assert everything[0] != other[0] and set(everything[:2]) != set(prompt[:2])  # of ``apart``


def test_the_final_norm_does_not_count_for_the_last_block():
    model = flatten(tiny_model("llama", layers=L), L - 1)
    with torch.no_grad():  # a norm that turns the stream, which transformers' last state has seen
        model.network.model.norm.weight.copy_(torch.linspace(-2, 2, 32))
    calibration = text_of(model)
    last = {L - 1}
    assert plan_of(ShortGPT(), model, calibration, 1, 1).gates == pruned(last, last)
    assert plan_of(UIDL(), model, calibration, 1, 1).gates == pruned(last, last)


def test_uidl_removes_the_run_that_turns_the_last_token_least(model, calibration, apart):
    def run(seen, token, count):
        angle = {}
        for start in range(L - count + 1):
            a, b = (seen[i][:, token].flatten(1) for i in (start, start + count))
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            angle[start] = float(torch.arccos(cosine).mean())
        start = min(angle, key=angle.get)
        return range(start, start + count)

    for each_model, text in ((model, calibration), apart):
        seen = hooked_streams(each_model, ids_of(text.search)[:, :-1])
        for n in range(1, L):
            chosen = run(seen, -1, n)
            plan = plan_of(UIDL(), each_model, text, n, n)
            assert plan.gates == pruned(chosen, chosen)
            staged = plan_of(UIDL(), each_model, text, n, 2, "projected")
            ends = run(seen, N - 1, n), run(seen, -1, 2)
            assert staged.gates == pruned(*ends, "projected")
    assert run(seen, -1, 1) != run(seen, N - 1, 1)  # of ``apart``
    assert run(seen, -1, 1) != run(seen, slice(None), 1)


def test_uidls_run_of_prefill_lies_where_decodes_turns_least():
    model = flatten(flatten(tiny_model("llama", layers=L), 2, 0.1), 3)
    plan = plan_of(UIDL(), model, text_of(model), 1, 2, "subset")
    assert plan.gates == pruned({3}, {2, 3}, "subset")


def test_sleb_removes_one_by_one_between_the_protected_blocks(model, calibration):
    batch = calibration.search

    def score(gone):
        return nll_without(model, batch, gone)

    for protected in (0, 1):
        order = naive_order(score, range(protected, L - protected), 4)
        method = SLEB(protect_first=protected, protect_last=protected)
        for count in (1, 2, 4):
            plan = plan_of(method, model, calibration, count, count)
            assert plan.gates == pruned(order[:count], order[:count])


def test_sleb_for_each_stage_alone(model, calibration):
    batch = calibration.search

    def score(prefill, decode):
        return nll_under(model, batch, Gates.removing(L, prefill=prefill, decode=decode))

    decode = naive_order(lambda gone: score((), gone), range(1, L - 1), 2)
    prefill = naive_order(lambda gone: score(gone, decode), range(1, L - 1), 1)
    plan = plan_of(SLEB(), model, calibration, 1, 2, "projected")
    assert plan.gates == pruned(prefill, decode, "projected")


def test_shortened_ppl_ranks_once(model, calibration):
    batch = calibration.search
    alone = [nll_without(model, batch, {layer}) for layer in range(L)]
    order = sorted(range(L), key=lambda i: alone[i])
    for count in (1, 3, 5):
        plan = plan_of(ShortenedPPL(), model, calibration, count, count)
        assert plan.gates == pruned(order[:count], order[:count])
    stages = {
        stage: [
            nll_under(model, batch, Gates.removing(L, **{stage: {layer}})) for layer in range(L)
        ]
        for stage in ("prefill", "decode")
    }
    prefill, decode = (sorted(range(L), key=lambda i: stages[s][i]) for s in ("prefill", "decode"))
    staged = plan_of(ShortenedPPL(), model, calibration, 3, 2, "projected")
    assert staged.gates == pruned(prefill[:3], decode[:2], "projected")


def test_shortened_taylor_takes_the_lowest_scores_that_are_not_protected(model, calibration):
    scores = taylor_scores(model, calibration.search)
    for first, last in ((0, 0), (2, 1)):
        method = ShortenedTaylor(protect_first=first, protect_last=last)
        order = sorted(range(first, L - last), key=lambda i: scores[i])
        plan = plan_of(method, model, calibration, 2, 2)
        assert plan.gates == pruned(order[:2], order[:2])


def parts_gone(units, prefill=None):
    """Gates without parts 2 * layer (attention) and 2 * layer + 1 (MLP); prefill's are inside."""
    prefill = units if prefill is None else prefill
    return Gates(
        prefill_attention=tuple("off" if 2 * i in prefill else "full" for i in range(L)),
        prefill_mlp=tuple(2 * i + 1 not in prefill for i in range(L)),
        decode_attention=tuple(2 * i not in units for i in range(L)),
        decode_mlp=tuple(2 * i + 1 not in units for i in range(L)),
    )


def test_blockpruner_removes_attention_and_mlp_apart(model, calibration):
    batch = calibration.search
    width, kv, inner, keys = 32, 16, 48, (P + C) / 2
    attention = 2 * width * width + 2 * width * kv + 2 * width * keys
    share = attention / (attention + 3 * width * inner)

    def worth(units):
        return sum(share if unit % 2 == 0 else 1 - share for unit in units)

    def prefix(order, blocks):
        length = next(n for n in range(len(order) + 1) if worth(order[:n]) >= blocks - 1e-9)
        return order[:length]

    order = naive_order(lambda gone: nll_under(model, batch, parts_gone(gone)), range(2 * L), 8)
    assert {unit % 2 for unit in order} == {0, 1}
    for count in (1, 2, 3):
        plan = plan_of(BlockPruner(), model, calibration, count, count)
        assert plan.gates == parts_gone(prefix(order, count)).without_dead_work()
    nested = plan_of(BlockPruner(), model, calibration, 1, 3, "subset")
    expected = parts_gone(prefix(order, 3), prefix(order, 1))
    assert nested.gates == expected.without_dead_work()


def test_evopress_finds_the_state_of_least_kl(model, calibration):
    batch = calibration.search
    dense = reference_logits(model, batch, Gates.dense(L)).log_softmax(-1)

    def kl(gates):
        other = reference_logits(model, batch, gates).log_softmax(-1)
        return float((dense.exp() * (dense - other)).sum(-1).mean())

    losses = {
        d: kl(Gates.removing(L, prefill=d, decode=d)) for d in itertools.combinations(range(L), 3)
    }
    best = min(losses, key=losses.get)
    plan = plan_of(EvoPress(starts=6), model, calibration, 3, 3)
    assert plan.gates == pruned(best, best)
    assert plan.provenance.search_kl == pytest.approx(losses[best], rel=1e-3)
    target = Target(prefill_remove=8, decode_remove=8, mode="unified")
    assert paper_generations(target, 32) == 128
    assert paper_generations(Target(prefill_remove=2, decode_remove=8, mode="subset"), 32) == 168


def test_evopress_starts_and_breeds_by_its_seed(model, calibration):
    method = EvoPress(starts=1, offspring=2, generations=1)
    found = {plan_of(method, model, calibration, 3, 3, seed=seed).gates for seed in (0, 1, 2, 3, 4)}
    assert len(found) > 1
    parts = plan_of(ALL["evopress"], model, calibration, 2, 2, grain="part").gates
    assert any(a != m for a, m in zip(parts.decode_attention, parts.decode_mlp, strict=True))


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
    whole = method.plan(model, calibration, target, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)  # a header, the KV policy, losses
    assert (len(lines) > 2) == (method.name not in ("shortgpt", "uidl", "shortened-taylor"))
    journal.write_bytes(b"".join(lines[: len(lines) // 2 + 1]))
    again = method.plan(model, calibration, target, journal=journal)
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
    kv = "first_last:first=1,last=2,layers=2"
    plan = plan_of(method, model, calibration, 2, 2, kv=kv)
    rules = resolve_policy(kv, model, calibration.search[:KV_SEQUENCES], block_size=1)
    assert plan.kv == rules and rules != rules[::-1]
    assert plan.gates == plan_of(method, model, calibration, 2, 2).gates


# --- what they refuse, and how they are found ---


@each
def test_targets_that_the_literature_does_not_know(model, calibration, method, tmp_path):
    with pytest.raises(PlanError, match=f"'{method.name}' counts blocks"):
        plan_of(
            method, model, calibration, 0, 0, metric="flops", prefill_share=0.2, decode_share=0.2
        )
    repaired = Target(prefill_remove=1, decode_remove=1, mode="unified", repair="best")
    with pytest.raises(PlanError, match=f"'{method.name}' repairs nothing"):
        method.plan(model, calibration, repaired, output=tmp_path / "plan.json")
    if method.name not in ("blockpruner", "evopress"):
        with pytest.raises(PlanError, match=f"'{method.name}' removes whole blocks"):
            plan_of(method, model, calibration, 1, 1, grain="part")


def test_taylor_has_no_ranking_for_a_stage(model, calibration):
    with pytest.raises(PlanError, match=r"'shortened-taylor' cannot .* --mode unified or subset"):
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
    short = Calibration(search=batch, rerank=batch, report=batch, source="x", hash="0" * 64)
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
