"""The literature's methods that make blocks narrower: what their plans cut and how they run."""

import itertools

import pytest
import torch

from baselines_naive import C, N, ids_of, text_of
from helpers import FAMILIES, pair_of, reference_logits, tiny_model
from pdtrim.bundle import TrimPlan
from pdtrim.errors import PlanError
from pdtrim.kvfit.policy import parse_policy
from pdtrim.methods import METHODS, Target
from pdtrim.methods.baselines import FLAP, LLMPruner
from pdtrim.methods.baselines.llm_pruner import (
    taylor_units,
)
from pdtrim.methods.baselines.residuals import dense_residuals
from pdtrim.methods.problem import KV_SEQUENCES
from pdtrim.plan import PrunePlan
from pdtrim.stage.cost import removed_parameters
from pdtrim.stage.forward import forward
from width_naive import (
    ALL,
    PREFILL_LAST,
    ROWS,
    L,
    cut_out,
    each,
    each_uniform,
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


# --- what they cut ---


def first_row(block, made):
    """Where the rows of what a projection makes begin; Phi-3's are fused, in this order."""
    a, n = block.attention, block.matrix("mlp").in_features
    q = block.matrix("attention").in_features
    kv = q // a.num_key_value_groups
    fused = {"queries": 0, "keys": q, "values": q + kv, "gate": 0, "up": n}
    return fused[made] if hasattr(a, "qkv_proj") else 0


@torch.no_grad()
def planted(family):
    """A model in which one group and one neuron of each block do nothing, and which they are."""
    model = tiny_model(family, layers=L, seed=3)
    useless = {}
    for layer in range(L):
        group, neuron = layer % 2, 7 * layer + 5
        block, size = model.block(layer), model.head_dim
        read, written = group_channels(model, group), range(group * size, (group + 1) * size)
        rows = {"queries": read, "keys": list(written), "values": list(written)}
        for made, cut in {**rows, "gate": [neuron], "up": [neuron]}.items():
            matrix = block.matrix(made)
            start = first_row(block, made)
            for p in matrix.parameters():
                p[[start + row for row in cut]] = 0
        block.matrix("attention").weight[:, read] = 0
        block.matrix("mlp").weight[:, neuron] = 0
        useless[layer] = group, neuron
    return model, useless


@each
@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_do_nothing_go_first(method, family, tmp_path):
    model, useless = planted(family)
    calibration = text_of(model, rows=ROWS)
    share = 0.3 if "llm" in method.name else 0.4  # of its two open blocks not much more can go
    plan = plan_of(method, model, calibration, tmp_path, share)
    cut_groups = 0
    for layer, (group, neuron) in useless.items():
        groups, neurons = lost(model, plan, "decode", layer)
        assert groups <= {group}
        assert not neurons or neuron in neurons
        cut_groups += len(groups)
    assert cut_groups


@each
@pytest.mark.parametrize("family", FAMILIES)
def test_the_share_is_met_to_within_one_neuron(method, family, tmp_path):
    model = tiny_model(family, layers=L, intermediate_size=96)
    calibration = text_of(model, rows=3)
    for prefill, share in ((None, 0.07), (None, 0.31), (0.12, 0.3), (0.0, 0.17)):
        plan = plan_of(method, model, calibration, tmp_path, share, prefill)
        removed = removed_parameters(model, plan)
        layers = [list(block.module.parameters()) for block in model.blocks]
        held = sum(p.numel() for layer in layers for p in layer)
        neuron = 3 * model.config.hidden_size
        assert share <= removed["decode"] < share + neuron / held
        if prefill is None:
            assert plan.widths.prefill[1:3] == plan.widths.decode[1:3]
            continue
        held -= sum(
            p.numel()
            for name, p in model.block(L - 1).module.named_parameters()
            if not name.startswith(PREFILL_LAST)
        )
        assert prefill <= removed["prefill"] < prefill + (neuron + 1) / held


@each
def test_biases_of_output_projections_stay(method, tmp_path):
    model = tiny_model("llama", layers=L, attention_bias=True, mlp_bias=True)
    plan = plan_of(method, model, text_of(model, rows=3), tmp_path, 0.3)
    held = sum(p.numel() for block in model.blocks for p in block.module.parameters())
    neuron = 3 * model.config.hidden_size + 2  # gate and up have a bias too
    assert 0.3 <= removed_parameters(model, plan)["decode"] < 0.3 + neuron / held


@each
def test_what_prefill_loses_decode_loses_too(model, calibration, method, tmp_path):
    plan = plan_of(method, model, calibration, tmp_path, 0.35, prefill=0.2)
    fewer = 0
    for layer in range(L):
        prefill, decode = (lost(model, plan, stage, layer) for stage in ("prefill", "decode"))
        assert prefill[0] <= decode[0] and prefill[1] <= decode[1]
        fewer += prefill != decode
    assert fewer
    whole = plan_of(method, model, calibration, tmp_path, 0.35)
    assert whole.widths.decode == plan.widths.decode
    kept = [(w.groups, w.neurons) if w else None for w in whole.widths.prefill]
    assert kept == [(w.groups, w.neurons) if w else None for w in whole.widths.decode]
    equal = plan_of(method, model, calibration, tmp_path, 0.35, prefill=0.35)
    assert equal.widths == whole.widths


def test_prefill_loses_the_first_of_what_decode_loses(model, calibration, tmp_path):
    method = ALL["llm-pruner"]
    scores = taylor_units(model, calibration.search, [1, 2], "element")
    plan = plan_of(method, model, calibration, tmp_path, 0.3, prefill=0.15)
    for stage, layer in itertools.product(("prefill", "decode"), (1, 2)):
        groups, neurons = lost(model, plan, stage, layer)
        order = scores[layer].order()
        assert groups == set(order.groups[: len(groups)])
        assert neurons == set(order.neurons[: len(neurons)]) and neurons


@each_uniform
def test_blocks_that_are_not_protected_lose_alike(model, calibration, method, tmp_path):
    plan = plan_of(method, model, calibration, tmp_path, 0.3)
    open_layers = range(L) if method.name == "wanda-sp" else range(1, L - 1)
    counts = []
    for layer in range(L):
        groups, neurons = lost(model, plan, "decode", layer)
        assert (plan.width("decode", layer) is None) == (layer not in open_layers)
        if layer in open_layers:
            counts.append((len(groups), len(neurons)))
    assert len({groups for groups, _ in counts}) == 1
    assert max(n for _, n in counts) - min(n for _, n in counts) <= 1


def test_flap_finds_a_width_for_each_block(model, calibration, tmp_path):
    plan = plan_of(FLAP(), model, calibration, tmp_path, 0.45)
    counts = [[len(units) for units in lost(model, plan, "decode", layer)] for layer in range(L)]
    assert len({groups for groups, _ in counts}) > 1
    assert max(n for _, n in counts) - min(n for _, n in counts) > 1


# --- the pair ---


@pytest.mark.parametrize("extra", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_flaps_biases_keep_the_mean(extra, tmp_path):
    model = tiny_model("llama", layers=L, **extra)
    batch = (calibration := text_of(model, rows=ROWS)).search
    plan = plan_of(FLAP(), model, calibration, tmp_path, 0.55)
    narrow = pair_of(plan, model, tmp_path).decode
    bare = plan_of(FLAP(bias=False), model, calibration, tmp_path / "bare", 0.55)
    without = pair_of(bare, model, tmp_path / "bare").decode
    harmed = checked = 0
    for layer in range(L):
        groups, neurons = lost(model, plan, "decode", layer)
        gone = [i for group in groups for i in group_channels(model, group)], sorted(neurons)
        read = inputs_of(model, ids_of(batch)[:, :-1], layer)
        for x, cut, dense, cheap, poor in zip(
            read,
            gone,
            projections(model, layer),
            projections(narrow, layer),
            projections(without, layer),
            strict=True,
        ):
            kept = [i for i in range(x.shape[1]) if i not in cut]
            expected = dense(x).mean(0)
            torch.testing.assert_close(cheap(x[:, kept]).mean(0), expected, atol=1e-4, rtol=1e-3)
            checked += bool(cut)
            if poor.weight.shape == cheap.weight.shape:
                harmed += bool((poor(x[:, kept]).mean(0) - expected).abs().max() > 0.01)
    assert checked > L and harmed


def test_prefill_has_no_biases_where_it_makes_keys_and_values_only(model, calibration, tmp_path):
    plan = plan_of(FLAP(), model, calibration, tmp_path, 0.5)
    last = L - 1
    assert plan.width("decode", last).biased and not plan.width("prefill", last).biased
    places = {(item.stage, item.layer) for item in plan.replacements}
    assert ("decode", last) in places and ("prefill", last) not in places


def test_flaps_first_block_adds_the_dense_mean_when_it_runs(model, calibration, tmp_path):
    plan = plan_of(FLAP(), model, calibration, tmp_path, 0.6)
    assert lost(model, plan, "decode", 0)[0]
    pair = pair_of(plan, model, tmp_path)
    means = []
    for one in (model, pair.prefill, pair.decode):
        added = []
        hook = projections(one, 0)[0].register_forward_hook(
            lambda module, inputs, output, into=added: into.append(output)
        )
        with torch.no_grad():
            dense_residuals(one, calibration.search)
        hook.remove()
        means.append(added[0].mean((0, 1)))
    torch.testing.assert_close(means[1], means[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(means[2], means[0], atol=1e-4, rtol=1e-3)


@each
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_plan_runs_as_the_dense_model_without_the_units(method, family, tmp_path):
    model = tiny_model(family, layers=L)
    batch = (calibration := text_of(model, rows=3)).search
    plan = plan_of(method, model, calibration, tmp_path, 0.25)
    again = PrunePlan.load(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest
    pair = pair_of(again, model, tmp_path)
    ours = forward(pair, batch, again.gates)
    zeroed = cut_out(model, plan, "decode")
    with torch.no_grad():
        for dense, narrow in zip(zeroed.network.model.layers, pair.decode.blocks, strict=True):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                bias = narrow.module.get_submodule(name).bias
                if bias is not None and bias.abs().sum():
                    dense.get_submodule(name).bias = torch.nn.Parameter(bias.clone())
    theirs = reference_logits(zeroed, batch, plan.gates)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    dense = reference_logits(model, batch, plan.gates)
    assert (ours - dense).abs().max() > 0.05
    assert any(w.biased for w in plan.widths.decode if w) == (method.name == "flap" and method.bias)


@each
def test_the_model_is_left_as_it_was(model, calibration, method, tmp_path):
    weights = list(model.network.parameters())
    frozen = model.network.model.layers[1].mlp.up_proj.weight
    frozen.requires_grad_(False)
    frozen.grad = torch.ones_like(frozen)
    before = [(w.clone(), w.requires_grad) for w in weights]
    try:
        plan_of(method, model, calibration, tmp_path, 0.3)
        assert frozen.grad is not None and frozen.grad.eq(1).all()
        assert all(w.grad is None for w in weights if w is not frozen)
        for w, (value, wanted) in zip(weights, before, strict=True):
            assert torch.equal(w, value) and w.requires_grad == wanted
        assert not any(part._forward_pre_hooks for part in model.network.modules())
    finally:
        frozen.grad = None
        frozen.requires_grad_(True)


# --- targets, costs, registration ---


@each
def test_a_pass_is_paid_by_its_block_tokens(model, calibration, method, tmp_path):
    passes = {"flap": 1, "wanda-sp": 2}.get(method.name, 3)
    cost = passes * ROWS * L * (N + C)
    plan = plan_of(method, model, calibration, tmp_path, 0.1, budget=cost)
    assert plan.provenance.search_block_tokens == cost
    with pytest.raises(PlanError, match=f"budget of {cost - 1} block-tokens .*'{method.name}'"):
        plan_of(method, model, calibration, tmp_path, 0.1, budget=cost - 1)


@each
def test_nothing_to_remove_costs_nothing(model, calibration, method, tmp_path):
    plan = plan_of(method, model, calibration, tmp_path, 0.0)
    assert plan.widths is None and plan.provenance.search_block_tokens == 0


@each
def test_the_kv_policy_goes_into_the_plan_and_not_into_the_ranking(
    model, calibration, method, tmp_path
):
    kv = parse_policy("first_last:first=1,last=2,layers=2")
    plan = plan_of(method, model, calibration, tmp_path, 0.2, kv=kv)
    rules = kv.resolve(model, calibration.search[:KV_SEQUENCES], block_size=1)
    assert plan.kv == rules and rules != rules[::-1]
    assert plan.widths == plan_of(method, model, calibration, tmp_path, 0.2).widths


@each
def test_targets_that_a_width_method_does_not_know(model, calibration, method, tmp_path):
    for words, share, prefill, more in (
        ("metric 'flops': use metric parameters", 0.2, None, {"metric": "flops"}),
        ("use mode unified or subset", 0.2, 0.1, {"mode": "projected"}),
        ("use grain block", 0.2, None, {"grain": "part"}),
        ("use repair none", 0.2, None, {"repair": "best"}),
        ("cannot lose 0.3 when decode loses 0.2", 0.2, 0.3, {}),
    ):
        with pytest.raises(PlanError, match=words):
            plan_of(method, model, calibration, tmp_path, share, prefill, **more)
    with pytest.raises(PlanError, match=rf"'{method.name}' can take at most 0\.\d+ .* not 0.97"):
        plan_of(method, model, calibration, tmp_path, 0.97)


def test_flaps_biases_stay_in_memory_until_saved(model, calibration, tmp_path):
    target = Target(metric="parameters", mode="unified", prefill_share=0.2, decode_share=0.2)
    made = FLAP().plan(model, calibration, target)
    assert made.plan.replacements and not any(tmp_path.iterdir())
    made.save(tmp_path / "plan.json")
    again = TrimPlan.open(tmp_path / "plan.json")
    assert again.plan.digest == made.plan.digest
    mine, theirs = made.blocks(model), again.blocks(model)
    for layer, biases in mine["decode"].items():
        for name, bias in biases.items():
            assert torch.equal(bias, theirs["decode"][layer][name])
    assert FLAP(bias=False).plan(model, calibration, target).plan.widths


def test_a_model_that_is_all_protected(model, calibration, tmp_path):
    with pytest.raises(PlanError, match="first 4 and the last 2 of 4 blocks, so none"):
        plan_of(LLMPruner(), model, calibration, tmp_path)


@pytest.mark.parametrize("name", ["llm-pruner", "llm-pruner-vector", "flap", "wanda-sp"])
def test_every_width_method_is_registered_with_its_papers_defaults(name):
    method = METHODS[name]()
    assert method.name == name and method.default_mode == "unified"
    assert method.paper_calibration.source
    if "llm" in name:
        assert (method.protect_first, method.protect_last) == (4, 2)
        assert method.criterion == ("vector" if "vector" in name else "element")
    if name == "flap":
        assert method.bias
