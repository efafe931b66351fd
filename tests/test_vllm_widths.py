"""Narrower blocks inside vLLM's own classes and pdtrim's, without a server."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from helpers import export, first_last, make_plan, pair_of, random_batch
from narrow_models import GATES, G, L, R, grouped, narrow_plan, width, widths
from pdtrim.engines.pages import bytes_sent, check_servable, page_bytes
from pdtrim.engines.ranges import Form
from pdtrim.engines.vllm.cache import TrimmedSpec, hole_in, register
from pdtrim.engines.vllm.kv_bias import StageBias
from pdtrim.engines.vllm.stage import Served, check_config
from pdtrim.engines.vllm.widths import arranged, heads_in_order, padded
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.model import Model
from pdtrim.plan import STAGES, LayerKV, Widths
from pdtrim.stage.forward import Pair, forward
from test_vllm_plugin import config_of

HEADS = (2, 2, 1, 4)
"""That decode keeps of each layer; not the first of those that prefill keeps."""


@pytest.fixture(scope="module")
def model():
    return grouped("llama")


def as_vllm_holds_it(model, served):
    """A stage with its tensors as the plugin gives them to vLLM."""
    network = copy.deepcopy(model.network)
    weights = dict(model.network.named_parameters())
    for name, tensor in arranged(weights.items(), served, R):
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    return Model(network, name=model.name)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_other_order_and_zeros_change_nothing_but_which_heads_come_first(family, tmp_path):
    model = grouped(family)
    plan, batch = narrow_plan(model, tmp_path), random_batch(model, prompt=20)
    pair, policy = pair_of(plan, model, tmp_path), HandoverPolicy.of(plan)
    assert policy.places == ((0, 2), (1, 3), (1,), None)
    stages = {s: as_vllm_holds_it(getattr(pair, s), Served(stage=s, plan=plan)) for s in STAGES}
    first = tuple(tuple(range(heads)) for heads in HEADS)
    with torch.no_grad():
        ours = forward(Pair(**stages), batch, GATES[0], HandoverPolicy(rules=plan.kv, places=first))
        theirs = forward(pair, batch, GATES[0], policy)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    mlp = stages["decode"].block(0).module.mlp
    assert mlp.down_proj.weight.shape == (model.config.hidden_size, padded(41)) == (64, 64)


def test_prefill_holds_what_decode_reads_before_the_rest(model):
    plan = narrow_plan(model)
    prefill, decode = (Served(stage=stage, plan=plan) for stage in STAGES)
    wanted = ((0, 2, 1), (1, 3, 0, 2), (1, 0), (0, 1, 2, 3))
    assert tuple(heads_in_order(prefill, layer) for layer in range(L)) == wanted
    assert [heads_in_order(decode, layer) for layer in range(L)] == [tuple(range(h)) for h in HEADS]


def test_bytes_are_of_the_heads_that_decode_keeps(model):
    codec = parse_codec("int8")
    plan = narrow_plan(model, kv=(LayerKV(codec=codec),) * L)
    assert [page_bytes(plan, i, 16, 2) for i in range(L)] == [h * 2 * 8 * 16 * 2 for h in HEADS]
    made = [page_bytes(plan, i, 16, 2, "prefill") for i in range(L)]
    assert made == [h * 2 * 8 * 16 * 2 for h in (3, 4, 2, 4)]
    assert bytes_sent(plan, 40, 16, 2) == 3 * sum(HEADS) * 2 * 8 * 16 * 2
    form = Form.of(plan, torch.bfloat16, 40, 16)
    assert [part.most for part in form.parts] == [
        codec.nbytes(heads, 39, 8, torch.bfloat16) for heads in HEADS
    ]


def test_heads_of_different_numbers_need_one_rule(model):
    one = (first_last(4, 4),) * L
    for kv in (None, one):
        check_servable(
            narrow_plan(model, kv=kv).model_copy(update={"block_size": 16}), block_size=16
        )
    mixed = make_plan(model, GATES[0], (*one[:2], LayerKV(), LayerKV()), block_size=16)
    with pytest.raises(PlanError, match=r"decode keeps 1 to 4 KV heads .* one --kv rule"):
        check_servable(mixed.model_copy(update={"widths": widths()}), block_size=16)
    same = Widths(prefill=(None,) * L, decode=(width((1, 3), 5),) * L)
    check_servable(mixed.model_copy(update={"widths": same}), block_size=16)
    neurons = Widths(prefill=(None,) * L, decode=(width(range(G), 5), None, None, None))
    check_servable(mixed.model_copy(update={"widths": neurons}), block_size=16)


def test_tensor_parallel_is_refused(model, tmp_path):
    made = export(narrow_plan(model), model, tmp_path / "pair")
    assert not check_config(config_of(made)).whole
    with pytest.raises(PlanError, match="narrower blocks in tensor parallel"):
        check_config(config_of(made, tensor=2))


def test_a_stage_is_whole_if_all_that_it_runs_is(model):
    one = Widths(prefill=(None,) * L, decode=(None, None, None, width((0, 1, 2, 3), 2)))
    plan = narrow_plan(model, given=one)
    assert [Served(stage=stage, plan=plan).whole for stage in STAGES] == [True, False]
    gates = make_plan(model, GATES[1])
    assert not any(Served(stage=stage, plan=gates).whole for stage in STAGES)


def test_trimmed_layers_of_different_heads_are_one_group_of_vllm():
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    register()

    def spec(heads, last=6):
        return TrimmedSpec(
            block_size=4, num_kv_heads=heads, head_size=8, dtype=torch.float32, first=4, last=last
        )

    group = UniformTypeKVCacheSpecs.from_specs({"a": spec(1), "b": spec(3)})
    assert group.page_size_bytes == (1 + 3) * 4 * 2 * 8 * 4
    assert hole_in(group, 31) == hole_in(spec(2), 31) == spec(2).hole(31) == (1, 6)
    assert UniformTypeKVCacheSpecs.from_specs({"a": spec(1), "b": spec(3, last=7)}) is None


def test_biases_are_of_the_heads_that_travel_also_in_a_prompt_shorter_than_a_page(tmp_path):
    """Decode adds what prefill took off, and it is the bias of the right head."""
    model = grouped("qwen2")
    rule = LayerKV(selector=first_last(20, 50).selector, codec=parse_codec("int8"))
    plan = make_plan(model, GATES[0], (rule,) * L, block_size=32)
    plan = plan.model_copy(update={"widths": widths()})
    folder = export(plan, model, tmp_path / "pair")
    biases = {
        stage: StageBias(
            SimpleNamespace(
                model_config=SimpleNamespace(model=str(folder / stage), dtype=torch.float32),
                cache_config=SimpleNamespace(block_size=32),
            ),
            Served(stage=stage, plan=plan),
            rank=0,
            ranks=1,
        )
        for stage in STAGES
    }
    for tokens in (1, 5, 33, 200):
        for part in Form.of(plan, torch.float32, tokens, 32).parts:
            assert part.heads == HEADS[part.layer]
            kv = torch.randn(2, part.heads, part.tokens, 8)
            bare = biases["prefill"].taken_from(part, tokens - 1, tuple(kv))
            back = biases["decode"].added_to(part, tokens - 1, bare)
            torch.testing.assert_close(torch.stack(back), kv)
            of = model.block(part.layer).kv_bias().v_GD[list(plan.kv_heads("decode", part.layer))]
            torch.testing.assert_close(kv[1] - bare[1], of[:, None].expand_as(kv[1]))
