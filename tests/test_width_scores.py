"""Scores of the width methods, by hand and by loops, and how many units they make go."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from baselines_naive import C, N, ids_of, text_of
from helpers import tiny_model
from pdtrim.errors import PlanError
from pdtrim.methods.baselines import WandaSP
from pdtrim.methods.baselines.flap import (
    compensation,
    flap_scores,
    fluctuation,
    standardised,
)
from pdtrim.methods.baselines.llm_pruner import (
    element2_scores,
    element_scores,
    taylor_units,
    vector_scores,
)
from pdtrim.methods.baselines.moments import Moments, watched
from pdtrim.methods.baselines.one_ranking import cut_until_enough, ranked
from pdtrim.methods.baselines.residuals import dense_residuals
from pdtrim.methods.baselines.uniform import uniform_counts
from pdtrim.methods.baselines.wanda_sp import channel_scores
from pdtrim.methods.baselines.width import LayerCost, StageCost, UnitScores, group_sums
from width_naive import (
    ROWS,
    L,
    cut_out,
    group_channels,
    inputs_of,
    lost,
    plan_of,
    projections,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=L)


@pytest.fixture(scope="module")
def calibration(model):
    return text_of(model, rows=ROWS)


# --- the scores, by hand ---


def test_taylor_scores_of_rows_by_hand():
    w, g = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[4.0, 5.0], [-1.0, 7.0]])
    a = torch.tensor([[2.0, 1.0], [2.0, 9.0]])
    assert element_scores(w, g).tolist() == [14, 3]
    assert vector_scores(w, g).tolist() == [6, 3]
    assert element2_scores(w, g, a).tolist() == [abs(4 - 1) + abs(-10 - 2), abs(-3 - 9)]


def test_a_unit_is_its_rows_and_columns_with_the_query_heads_that_read_it():
    model = tiny_model("qwen2", layers=3)  # 4 query heads, 2 KV heads, biases on q, k and v
    batch = text_of(model, rows=3).search
    network, rows = copy.deepcopy(model.network), ids_of(batch)
    per_row = []
    for row in rows:
        logits = network(input_ids=row[None], use_cache=False).logits[0, :-1]
        network.zero_grad()
        F.cross_entropy(logits, row[1:]).backward()
        per_row.append({name: p.grad.clone() for name, p in network.named_parameters()})
    block = "model.layers.1."
    width, head_dim = model.config.intermediate_size, model.head_dim

    def lines(unit):
        """Each row or column of a unit: (w, g, A) of its elements."""
        kind, index = unit
        places = []
        if kind == "neuron":
            places += [(f"mlp.{m}_proj", "row", index) for m in ("gate", "up")]
            places += [("mlp.down_proj", "column", index)]
        else:
            for i in range(head_dim):
                places += [(f"self_attn.{m}_proj", "row", index * head_dim + i) for m in "kv"]
            for i in group_channels(model, index):
                places += [("self_attn.q_proj", "row", i), ("self_attn.o_proj", "column", i)]
        for name, axis, at in places:
            leaves = ["weight", "bias"] if axis == "row" else ["weight"]
            parts = []
            for leaf in leaves:
                key = f"{block}{name}.{leaf}"
                if key not in per_row[0]:
                    continue
                grads = torch.stack([one[key] for one in per_row])
                w = network.get_parameter(key).detach()
                triple = w, grads.mean(0), grads.square().mean(0)
                parts.append([(t[:, at] if axis == "column" else t[at]).flatten() for t in triple])
            yield [torch.cat(one) for one in zip(*parts, strict=True)]

    def expected(unit, criterion):
        if criterion == "element":
            return sum(float((w * g).abs().sum()) for w, g, _ in lines(unit))
        if criterion == "vector":
            return sum(abs(float((w * g).sum())) for w, g, _ in lines(unit))
        return sum(float((w * g - w * w * a / 2).abs().sum()) for w, g, a in lines(unit))

    for criterion in ("element", "element2", "vector"):
        scores = taylor_units(model, batch, [1], criterion)[1]
        groups = [expected(("group", i), criterion) for i in range(2)]
        neurons = [expected(("neuron", i), criterion) for i in range(width)]
        assert scores.groups_G.tolist() == pytest.approx(groups, rel=1e-3)
        assert scores.neurons_F.tolist() == pytest.approx(neurons, rel=1e-3, abs=1e-6)


def test_moments_are_those_of_all_tokens_of_an_ordinary_forward(model, calibration):
    batch = calibration.search
    for layer in (0, 2):
        with watched(model.block(layer)) as moments:
            for start in range(0, len(batch), 4):
                dense_residuals(model, batch[start : start + 4])
        for seen, x in zip(moments, inputs_of(model, ids_of(batch)[:, :-1], layer), strict=True):
            x = x.double()
            assert seen.count == len(x) == ROWS * (N + C)
            torch.testing.assert_close(seen.mean_F, x.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                seen.variance_F, x.var(0, correction=0), atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(seen.norm_F, x.norm(dim=0), atol=1e-5, rtol=1e-4)


def test_watching_ends_when_the_forward_fails(model):
    with pytest.raises(RuntimeError), watched(model.block(0)):
        raise RuntimeError
    assert not any(part._forward_pre_hooks for part in model.network.modules())


def test_fluctuation_by_hand():
    x = torch.tensor([[0.0, 1.0, 5.0, 2.0], [2.0, 1.0, 7.0, -2.0]])  # 2 tokens, 4 channels
    seen = Moments()
    seen.add(x[None])
    weight = torch.tensor([[1.0, 3.0, 0.0, 1.0], [1.0, 4.0, 3.0, 0.0]]).double()
    metric = fluctuation(seen.variance_F, weight)
    assert metric.tolist() == [1 * 2, 0, 1 * 9, 4 * 1]
    mean = 15 / 4
    std = math.sqrt(sum((m - mean) ** 2 for m in (2, 0, 9, 4)) / 4)
    z = [(m - mean) / std for m in (2, 0, 9, 4)]
    assert standardised(metric).tolist() == pytest.approx(z)
    assert standardised(torch.ones(3)).tolist() == [0, 0, 0]
    scores = flap_scores(metric, metric, 2)
    assert scores.neurons_F.tolist() == pytest.approx(z)
    squares = [4.0, 0.0, 81.0, 16.0]  # attention's metric, squared
    mean = sum(squares) / 4
    std = math.sqrt(sum((s - mean) ** 2 for s in squares) / 4)
    heads = [((4 - mean) + (0 - mean)) / 2 / std, ((81 - mean) + (16 - mean)) / 2 / std]
    assert scores.groups_G.tolist() == pytest.approx(heads)
    # channels 1 and 2 are cut: their means are 1 and 6
    assert compensation(weight, seen.mean_F, (1, 2)).tolist() == [3 * 1, 4 * 1 + 3 * 6]


def test_weights_times_inputs_by_hand():
    weight = torch.tensor([[1.0, -3.0, 0.0, 1.0], [1.0, 4.0, -3.0, 0.0]])
    norm = torch.tensor([2.0, 1.0, 2.0, 10.0])
    scores = channel_scores(weight, norm)
    assert scores.tolist() == [1 * 2, 3.5 * 1, 1.5 * 2, 0.5 * 10]
    assert group_sums(scores, 2).tolist() == [5.5, 8]


@torch.no_grad()
def naive_wanda(model, ids, layer):
    """Groups and neurons of a layer, the lowest score first, of a model as it is."""
    orders = []
    o, down = projections(model, layer)
    read_o, read_down = inputs_of(model, ids, layer)
    scores = []
    for group in range(model.num_kv_heads):
        total = 0.0
        for j in group_channels(model, group):
            total += float(o.weight[:, j].abs().mean() * read_o[:, j].norm())
        scores.append(total)
    orders.append(sorted(range(len(scores)), key=scores.__getitem__))
    scores = [
        float(down.weight[:, j].abs().mean() * read_down[:, j].norm())
        for j in range(model.config.intermediate_size)
    ]
    orders.append(sorted(range(len(scores)), key=scores.__getitem__))
    return orders


def test_wanda_scores_each_block_behind_the_narrower_ones(model, calibration, tmp_path):
    plan = plan_of(WandaSP(), model, calibration, tmp_path, 0.4)
    ids, dense_differs = ids_of(calibration.search)[:, :-1], False
    for layer in range(L):
        behind = cut_out(model, plan, "decode", range(layer))
        groups, neurons = lost(model, plan, "decode", layer)
        order = naive_wanda(behind, ids, layer)
        assert groups == set(order[0][: len(groups)]) and groups
        assert neurons == set(order[1][: len(neurons)]) and neurons
        dense = naive_wanda(model, ids, layer)
        dense_differs |= neurons != set(dense[1][: len(neurons)])
    assert dense_differs


def test_flap_ranks_all_units_of_a_model_together():
    scores = {
        0: UnitScores(groups_G=torch.tensor([0.5, -1.0]), neurons_F=torch.tensor([2.0, -2.0, 0.0])),
        1: UnitScores(groups_G=torch.tensor([3.0, 0.0]), neurons_F=torch.tensor([-3.0, 1.0, -0.5])),
    }
    order = ranked(scores)
    assert order[:4] == [(1, "neuron", 0), (0, "neuron", 1), (0, "group", 1), (1, "neuron", 2)]
    assert order[4:7] == [(0, "neuron", 2), (1, "group", 1), (0, "group", 0)]  # equals: by layer
    assert len(order) == 10


# --- how many go ---


def cost_of(needed, layers=2, group=10, neuron=3, held=1000, **more):
    one = LayerCost(group=group, neuron=neuron, bias=more.pop("bias", 0), whole=True)
    return StageCost(stage="decode", layers=(one,) * layers, held=held, share=needed / held, **more)


@pytest.mark.parametrize(
    "needed,counts",
    [
        # 2 blocks of 4 groups and 20 neurons: 2 * (40 + 60) = 200 parameters
        (50, {0: (1, 5), 1: (1, 5)}),
        (51, {0: (1, 6), 1: (1, 5)}),  # ceil(31 / 3) = 11 neurons; the first block has one more
        (24, {0: (0, 4), 1: (0, 4)}),  # 0.48 of a group a block
        (26, {0: (1, 1), 1: (1, 1)}),  # 0.52
        (60 + 19 * 6, {0: (3, 19), 1: (3, 19)}),  # all that may go
        (3, {0: (0, 1), 1: (0, 0)}),
    ],
)
def test_groups_are_rounded_and_neurons_make_up_for_it(needed, counts):
    assert uniform_counts("x", cost_of(needed), range(2), (4, 20), None) == counts


def test_another_number_of_groups_where_neurons_cannot_make_up():
    # 2 neurons a block: at 0.3 of 2 groups the nearest number is 1, worth 20 of 18
    counts = uniform_counts("x", cost_of(18), range(2), (2, 3), None)
    assert counts == {0: (1, 2), 1: (0, 1)}
    with pytest.raises(
        PlanError, match=r"at most 0.032 of the parameters of decode's .* not 0.033"
    ):
        uniform_counts("x", cost_of(33), range(2), (2, 3), None)


@pytest.mark.parametrize("needed", range(1, 60))
def test_prefills_counts_lie_inside_decodes(needed):
    cost = cost_of(60, layers=3)
    decode = uniform_counts("x", cost, range(3), (4, 10), None)
    prefill = uniform_counts("x", cost_of(needed, layers=3), range(3), (4, 10), decode)
    assert all(a <= b for i in range(3) for a, b in zip(prefill[i], decode[i], strict=True))
    assert needed <= cost.saved(prefill) < needed + 3


def test_prefill_loses_a_group_more_where_decodes_neurons_are_too_few():
    decode = {0: (1, 1), 1: (1, 1)}
    prefill = uniform_counts("x", cost_of(8), range(2), (4, 20), decode)
    assert prefill == {0: (1, 0), 1: (0, 0)}  # 2 neurons are worth 6
    assert uniform_counts("x", cost_of(6), range(2), (4, 20), decode) == {0: (0, 1), 1: (0, 1)}


def naive_saving(cost, cut):
    saved = sum(
        cost.layers[i].group if kind == "group" else cost.layers[i].neuron for i, kind, _ in cut
    )
    return saved - sum(cost.layers[i].bias for i in {unit[0] for unit in cut})


def test_flap_cuts_in_order_and_takes_back_what_is_too_much():
    sizes = {"group": 2, "neuron": 3}
    order = [
        (0, "neuron", 1),
        (1, "group", 0),
        (0, "neuron", 0),
        (0, "neuron", 2),
        (1, "neuron", 2),
    ]
    order += [(0, "group", 0), (1, "group", 1), (0, "group", 1), (1, "neuron", 1)]
    bare = {"biased": False}
    assert cut_until_enough("x", cost_of(13), order, sizes, **bare) == order[:2]
    assert cut_until_enough("x", cost_of(14), order, sizes, **bare) == order[:3]
    # one neuron of a block stays: the third of block 0 does
    passed = [unit for unit in order if unit != (0, "neuron", 2)]
    assert cut_until_enough("x", cost_of(19), order, sizes, **bare) == passed[:4]
    # the group that reaches 20 brings 29; neurons of the highest score come back: 29 - 9 = 20
    assert cut_until_enough("x", cost_of(20), order, sizes, **bare) == [passed[1], passed[4]]
    with pytest.raises(PlanError, match="'x' can take at most"):
        cut_until_enough("x", cost_of(33), order, sizes, **bare)
    for needed in range(1, 27):
        cost = cost_of(needed, bias=2)
        cut = cut_until_enough("x", cost, order, sizes, biased=True)
        assert needed <= naive_saving(cost, cut)
        for unit in cut:
            assert naive_saving(cost, [one for one in cut if one != unit]) < needed
