"""The plugin's parts inside vLLM's own classes, without a server."""

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
import prometheus_client

from helpers import export, first_last, make_plan, tiny_model
from pdtrim.engines.vllm import blocks, compat
from pdtrim.engines.vllm.attention import compact, trimmed_backend
from pdtrim.engines.vllm.cache import SharedSpec, TrimmedManager, TrimmedSpec, register
from pdtrim.engines.vllm.compat import FullAttentionSpec, KVCacheSpecRegistry
from pdtrim.engines.vllm.metrics import HANDOVER, Metrics, Stats
from pdtrim.engines.vllm.scheduler import handover_problem
from pdtrim.engines.vllm.stage import check_config, prefill_to_decode
from pdtrim.engines.vllm.worker import identity
from pdtrim.errors import PlanError
from pdtrim.models.checkpoint import read_stage_config
from pdtrim.plan import Gates, LayerKV

BLOCK = 4


@pytest.fixture
def manager():
    from vllm.v1.core.block_pool import BlockPool

    register()
    spec = TrimmedSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, first=4, last=6
    )
    pool = BlockPool(num_gpu_blocks=40, enable_caching=False, hash_block_size=BLOCK)
    return TrimmedManager(
        spec,
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


def test_a_prompt_that_is_handed_over_has_null_pages_in_its_hole(manager):
    # 30 tokens: 29 handed over in 8 pages; the first 4 tokens stay and the last 6, page 5 on
    pool = manager.block_pool
    before = pool.get_num_free_blocks()
    wanted = manager.get_num_blocks_to_allocate("r", 31, [], 30, 0, 31)
    assert wanted == 8 - 4
    manager.allocate_external_computed_blocks("r", 0, 30)
    manager.allocate_new_blocks("r", 31, 31)
    blocks = manager.req_to_blocks["r"]
    assert [block.is_null for block in blocks] == [False, *[True] * 4, *[False] * 3]
    assert before - pool.get_num_free_blocks() == wanted
    manager.num_cached_block["r"] = 0
    assert manager.get_num_blocks_to_allocate("r", 33, [], 30, 0, 33) == 1
    manager.free("r")
    assert pool.get_num_free_blocks() == before


def test_a_prompt_that_decode_runs_itself_has_none(manager):
    assert manager.get_num_blocks_to_allocate("r", 30, [], 0, 0, 30) == 8
    manager.allocate_new_blocks("r", 30, 30)
    assert not any(block.is_null for block in manager.req_to_blocks["r"])


def test_nothing_is_found_in_a_prefix_cache(manager):
    assert TrimmedManager.find_longest_cache_hit([b"x"], 8, [0, 1]) == (([], []), 0)


def test_a_prefix_cache_holds_what_was_handed_over_only():
    """Of 16 prompt tokens and 8 of an answer 15 came from prefill: three whole pages."""
    from vllm.v1.core.block_pool import BlockPool

    register()
    spec = SharedSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    pool = BlockPool(num_gpu_blocks=40, enable_caching=True, hash_block_size=BLOCK)
    manager = KVCacheSpecRegistry.get_manager_class(spec)(
        spec,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )
    request = SimpleNamespace(
        request_id="r",
        num_prompt_tokens=16,
        shared_prefix_boundary=None,
        block_hashes=[bytes([number]) * 32 for number in range(6)],
    )
    manager.add_local_computed_blocks("r", [], 0, 24)
    manager.allocate_external_computed_blocks("r", 0, 24)
    manager.cache_blocks(request, 24, replay_boundaries=())
    held = [block.block_hash is not None for block in manager.req_to_blocks["r"]]
    assert held == [True] * 3 + [False] * 3
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is FullAttentionSpec


def test_tables_are_compacted_and_other_rows_left():
    table = torch.tensor([[3, 0, 0, 7, 8], [1, 2, 9, 9, 9], [0, 0, 9, 9, 9], [5, 0, 6, 9, 9]])
    lengths = torch.tensor([18, 6, 8, 12], dtype=torch.int32)
    made, kept = compact(table, lengths, BLOCK)
    assert made[0, :3].tolist() == [3, 7, 8] and kept[0] == 10
    assert made[1, :2].tolist() == [1, 2] and kept[1] == 6
    assert made[2, :2].tolist() == [0, 0] and kept[2] == 8, "a row of padding stays"
    assert made[3, :2].tolist() == [5, 6] and kept[3] == 8
    assert kept.dtype == torch.int32


def test_a_null_block_may_be_several_pages_of_a_kernel():
    """Pages of 8 tokens for a kernel that takes 4: block 0 is pages 0 and 1."""
    made, kept = compact(torch.tensor([[6, 7, 0, 1, 4, 5, 9]]), torch.tensor([22]), 4, nulls=2)
    assert made[0, :4].tolist() == [6, 7, 4, 5] and kept.tolist() == [14]


def test_a_graph_finds_each_steps_table_where_it_was():
    """And no other group is lent metadata over a whole table."""

    class Builder:
        supports_update_block_table = True

        def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
            self.kv_cache_spec = kv_cache_spec

        def build(self, common_prefix_len, common, fast_build):
            return common

    backend = trimmed_backend(type("Backend", (), {"get_builder_cls": lambda: Builder}))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK),
        scheduler_config=SimpleNamespace(max_num_seqs=3),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
    )
    made = backend.get_builder_cls()(SimpleNamespace(block_size=BLOCK), [], config, "cpu")
    assert not made.supports_update_block_table
    steps = [
        made.build(0, Common(torch.tensor(table), torch.tensor(lengths)))
        for table, lengths in (([[3, 0, 7], [0, 0, 0]], [12, 0]), ([[5, 6, 8], [4, 0, 9]], [9, 12]))
    ]
    assert steps[-1].block_table_tensor[:, :2].tolist() == [[5, 6], [4, 9]]
    assert steps[-1].seq_lens.tolist() == [9, 8]
    for name in ("block_table_tensor", "seq_lens"):
        first, second = (getattr(step, name) for step in steps)
        assert first.data_ptr() == second.data_ptr()


@dataclass
class Common:
    block_table_tensor: torch.Tensor
    seq_lens: torch.Tensor

    def replace(self, **changes):
        return replace(self, **changes)


def test_specs_of_one_rule_share_a_table():
    def spec(last):
        return TrimmedSpec(
            block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32, first=4, last=last
        )

    assert spec(6).is_uniform_with_collection({"a": spec(6), "b": spec(6)})
    assert not spec(6).is_uniform_with_collection({"a": spec(6), "b": spec(7)})


GOOD = {
    "do_remote_prefill": True,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 1,
    "tp_size": 1,
    "remote_block_ids": [[3, 4, 5]],
    "remote_num_tokens": 10,
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"do_remote_prefill": False}, "without a handover"),
        ({"tp_size": None}, "lack tp_size"),
        ({"remote_block_ids": [[3, 4], [5]]}, "not one list"),
        ({"remote_block_ids": [[3, 4, -5]]}, "not one list"),
        ({"remote_block_ids": [[3, 4, True]]}, "not one list"),
        ({"remote_num_tokens": 9}, "prefill ran 9 tokens of a prompt of 10"),
        ({"remote_block_ids": [[3, 4]]}, "does not fill 2 pages"),
    ],
)
def test_what_came_over_http_is_checked(change, words):
    problem = handover_problem(GOOD | change, 10, BLOCK)
    assert problem is None if words is None else words in problem
    assert "without a handover" in handover_problem(None, 10, BLOCK)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model = tiny_model()
    kv = (LayerKV(), first_last(4, 4), LayerKV(), LayerKV())
    plan = make_plan(model, Gates.removing(4, prefill={2}, decode={0}), kv, block_size=32)
    return export(plan, model, tmp_path_factory.mktemp("plugin") / "pair")


def config_of(pair, stage="decode", **changes):
    """The parts of a vLLM config that are looked at, as ``pdtrim serve`` sets them."""
    data, plan = read_stage_config(pair / stage, stage)
    data["pdtrim"] = {"stage": stage, "plan": plan.to_json(), "plan_digest": plan.digest}
    settings = {
        "role": {"decode": "kv_consumer", "prefill": "kv_producer"}[stage],
        "prefix": False,
        "policy": "fail",
        "block_size": 32,
        "speculative": None,
        "lora": None,
        "pipeline": 1,
        "context": 1,
        "tensor": 1,
        "sleep": False,
        "enforce": True,
        "local_prefill": "refuse",
        **data,
        **changes,
    }
    extra = {
        "enforce_handshake_compat": settings["enforce"],
        "local_prefill": settings["local_prefill"],
    }
    hf = {k: v for k, v in settings.items() if k in (*data, "layer_types")}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(**hf), enable_sleep_mode=settings["sleep"]
        ),
        kv_transfer_config=SimpleNamespace(
            kv_role=settings["role"],
            kv_load_failure_policy=settings["policy"],
            get_from_extra_config=lambda key, default: extra.get(key, default),
        ),
        cache_config=SimpleNamespace(
            enable_prefix_caching=settings["prefix"], block_size=settings["block_size"]
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=settings["pipeline"],
            decode_context_parallel_size=settings["context"],
            prefill_context_parallel_size=1,
            tensor_parallel_size=settings["tensor"],
        ),
        speculative_config=settings["speculative"],
        lora_config=settings["lora"],
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"role": "kv_producer"}, "decode checkpoint cannot serve as kv_producer"),
        (
            {"prefix": True},
            "codes them or narrows blocks: pass --no-enable-prefix-caching",
        ),
        ({"policy": "recompute"}, "kv_load_failure_policy"),
        ({"block_size": 16}, "pages of 32, the engine's hold 16"),
        ({"speculative": object()}, "speculative decoding"),
        ({"lora": object()}, "LoRA"),
        ({"pipeline": 2}, "pipeline parallelism"),
        ({"context": 2}, "context parallelism"),
        ({"sleep": True}, "sleep mode: drop --enable-sleep-mode"),
        ({"enforce": False}, "enforce_handshake_compat"),
        ({"layer_types": ["sliding_attention"]}, "sliding-window"),
        ({"pdtrim": None}, "not exported by pdtrim"),
    ],
)
def test_settings_that_would_break_the_plan_are_refused(pair, change, words):
    assert check_config(config_of(pair)).stage == "decode"
    assert check_config(config_of(pair, "prefill", prefix=True)).stage == "prefill"
    with pytest.raises(PlanError, match=words):
        check_config(config_of(pair, **change))


def test_a_plan_that_sends_whole_pages_may_have_a_prefix_cache_on_decode(tmp_path):
    model = tiny_model()
    made = export(make_plan(model, Gates.dense(4)), model, tmp_path / "pair")
    assert check_config(config_of(made, prefix=True)).stage == "decode"
    with pytest.raises(PlanError, match="prefix caching on decode beside local_prefill count"):
        check_config(config_of(made, prefix=True, local_prefill="count"))


def test_one_window_for_all_layers_is_refused_too(tmp_path):
    for window in (None, 7):
        model = tiny_model("phi3", sliding_window=window)
        made = export(make_plan(model, Gates.dense(4)), model, tmp_path / str(window))
        if window is None:
            assert check_config(config_of(made)).stage == "decode"
        else:
            with pytest.raises(PlanError, match="sliding-window"):
                check_config(config_of(made))


def test_partners_of_another_tensor_parallel_size_have_another_identity(pair):
    said = []
    for size in (1, 2):
        config = config_of(pair, tensor=size)
        config.model_config.dtype, config.cache_config.cache_dtype = torch.float32, "auto"
        said.append(identity(config, check_config(config)))
    first, second = said
    assert first.endswith("tensor parallel 1") and second == f"{first[:-1]}2"


def test_layers_are_mapped_through_the_plan(pair):
    _, plan = read_stage_config(pair / "decode", "decode")
    # prefill runs 0 1 2(kv) 3 in slots 0 .. 3; decode 1 2 3 in slots 0 .. 2
    assert prefill_to_decode(plan) == {1: 0, 2: 1, 3: 2}


def test_what_was_noted_travels_and_adds_up():
    stats = Stats()
    assert stats.is_empty()
    stats.note(HANDOVER, 0.5)
    stats.record_transfer(
        SimpleNamespace(xferDuration=1, postDuration=1, totalBytes=64, descCount=2)
    )
    other = Stats(data=stats.clone_and_reset().data)
    assert stats.is_empty() and other.data[HANDOVER] == [0.5]
    assert other.aggregate(other).data["pdtrim_bytes_sent"] == [64, 64]


def test_a_kv_gates_write_survives_compilation():
    """vLLM's own op has no attention behind it that reads its answer, and would be removed."""
    from torch._dynamo.backends.common import aot_autograd

    blocks.register()
    blocks.register()
    name = compat._encode_layer_name("x")
    compiled = []

    def keep(graph, inputs):
        compiled.append(graph.code)
        return graph.forward

    def run(write):
        def gate(x_TE):
            out = torch.zeros_like(x_TE)
            write(x_TE.view(-1, 1, 4), x_TE.view(-1, 1, 4), out)
            return out + x_TE

        backend = aot_autograd(fw_compiler=keep, inference_compiler=keep)
        with torch.no_grad(), contextlib.suppress(AssertionError):  # there is no cache to write to
            torch.compile(gate, backend=backend, fullgraph=True)(torch.ones(2, 4))
        return compiled.pop()

    ours, theirs = getattr(torch.ops.vllm, blocks.OP), torch.ops.vllm.unified_kv_cache_update
    assert blocks.OP in run(lambda k, v, out: ours(k, v, out, name))
    assert "unified_kv_cache_update" not in run(lambda k, v, out: theirs(k, v, name))


@pytest.mark.parametrize("cache, size", [("auto", 4), ("bfloat16", 2)])
def test_the_page_has_the_bytes_of_a_token(pair, cache, size):
    """Three of four layers travel; keys and values of two heads of 8 channels."""
    config = config_of(pair)
    config.model_config.dtype, config.cache_config.cache_dtype = torch.float32, cache
    made = {}

    class Noted:
        def __init__(self, name, **how):
            self.labels = lambda *values: self
            made[name] = self

        def set(self, value):
            self.value = value

    kinds = {kind: Noted for kind in (prometheus_client.Gauge, prometheus_client.Counter)}
    kinds[prometheus_client.Histogram] = Noted
    Metrics(config, kinds, ["model_name"], {0: ["m"]})
    assert made["pdtrim:kv_bytes_per_token"].value == 3 * 2 * 2 * 8 * size
