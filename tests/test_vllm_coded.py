"""A plan with codecs inside vLLM's own classes, without a server."""

import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from helpers import export, first_last, make_plan, tiny_model
from pdtrim.engines.pages import is_coded
from pdtrim.engines.ranges import Form, Ticket
from pdtrim.engines.vllm import coded_worker
from pdtrim.engines.vllm.coded import TICKET, Job, Told
from pdtrim.engines.vllm.coded_scheduler import CodedScheduler
from pdtrim.engines.vllm.coded_worker import CodedWorker, RemotePool
from pdtrim.engines.vllm.kv_bias import StageBias
from pdtrim.engines.vllm.metrics import REFUSED
from pdtrim.engines.vllm.stage import Served, check_config
from pdtrim.errors import PlanError
from pdtrim.kv.codecs import parse_codec
from pdtrim.plan import Gates, LayerKV
from test_vllm_plugin import GOOD, config_of

BLOCK, LONGEST = 32, 256


# ------------------------------------------------------------------ ranges


def served(stage, codec="int4"):
    kv = (LayerKV(codec=parse_codec(codec)), first_last(4, 4), LayerKV(), LayerKV())
    plan = make_plan(tiny_model(head_dim=32), Gates.dense(4), kv, block_size=BLOCK)
    assert is_coded(plan)
    return Served(stage=stage, plan=plan)


@pytest.mark.parametrize("states, asked", [(["PROC", "PROC", "DONE"], 3), (["ERR"], 1), ([], 1)])
def test_a_step_that_runs_nothing_waits_for_a_read(states, asked, monkeypatch):
    made, seen = object.__new__(CodedWorker), []

    def check(handle):
        seen.append(handle)
        return states[len(seen) - 1]  # beyond the last it raises, as NIXL may

    made.nixl_wrapper = SimpleNamespace(check_xfer_state=check)
    made._reading, made._recving_transfers = {"a": None}, {"a": [5], "not ours": [6]}
    monkeypatch.setattr(coded_worker, "POLL_SECONDS", 60)
    made._await_read()
    assert seen == [5] * asked
    monkeypatch.setattr(coded_worker, "POLL_SECONDS", 0)
    made._await_read()
    assert len(seen) == asked, "not beyond the limit"


def test_only_steps_that_run_nothing_wait():
    made = scheduler("prefill")
    one = prompt("a", 96)
    made.get_num_new_matched_tokens(one, 0)
    assert not step(made, (one, 64)).pdtrim_idle and step(made).pdtrim_idle


def scheduler(stage, prompts=1, codec="int4", ranks=1):
    extra = {"staged_prompts": prompts}
    parallel = SimpleNamespace(
        tensor_parallel_size=ranks,
        decode_context_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_index=0,
    )
    config = SimpleNamespace(
        parallel_config=parallel,
        cache_config=SimpleNamespace(block_size=BLOCK),
        model_config=SimpleNamespace(dtype=torch.float32, max_model_len=LONGEST),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        kv_transfer_config=SimpleNamespace(
            get_from_extra_config=lambda key, default: extra.get(key, default),
            kv_buffer_device="cpu",
        ),
        num_prefill_lookahead_tokens=0,
    )
    caches = SimpleNamespace(
        transfer_groups=[],
        kv_cache_groups=[],
        has_mamba_layers=False,
        select_transfer_block_ids=lambda ids: ids,
    )
    return CodedScheduler(config, "engine", caches, served=served(stage, codec))


def request(name, tokens, **params):
    from vllm.v1.request import RequestStatus

    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        num_preemptions=0,
        prompt_token_ids=[5] * tokens,
        kv_transfer_params=params,
        status=RequestStatus.RUNNING,
    )


def prompt(name, tokens):
    return request(name, tokens, do_remote_decode=True)


def step(made, *scheduled, preempted=(), finished=()):
    """One step's metadata; ``scheduled`` are (request, tokens of this step)."""
    state = SimpleNamespace(get_block_ids=lambda name: ([1, 2, 3],))
    counts = {one.request_id: count for one, count in scheduled}
    return made.build_connector_meta(
        SimpleNamespace(
            num_scheduled_tokens=counts,
            kv_connector_block_state=state,
            preempted_req_ids={*preempted},
            finished_req_ids={*finished},
        )
    )


def hear(made, *, told=None, sent=(), read=()):
    made.update_connector_output(
        SimpleNamespace(
            finished_recving=set(read), finished_sending=set(sent), kv_connector_worker_meta=told
        )
    )


def encoded(*sizes, name="a"):
    """What ranks tell of a request, one after the other as vLLM gathers it."""
    first, *others = (Told({name: {rank: size}}, set()) for rank, size in enumerate(sizes))
    for other in others:
        first = first.aggregate(other)
    return first


def finish(made, one, status="FINISHED_LENGTH_CAPPED"):
    from vllm.v1.request import RequestStatus

    one.status = RequestStatus[status]
    return made.request_finished(one, ([1, 2, 3],))


WAITS, GOES = (None, False), (0, False)
WHERE = GOOD | {"remote_block_ids": [[3, 4]], "remote_num_tokens": 40}
"""What prefill tells decode of a prompt of 40 tokens."""


def test_prompts_wait_in_turn_for_a_range():
    made = scheduler("prefill")
    long, next_long, short = prompt("a", LONGEST), prompt("b", LONGEST), prompt("c", 40)
    assert made.get_num_new_matched_tokens(long, 0) == GOES
    assert made.get_num_new_matched_tokens(long, 0) == GOES, "preempted: it keeps its range"
    assert made.get_num_new_matched_tokens(next_long, 0) == WAITS
    finish(made, long, "FINISHED_ABORTED")
    assert made.get_num_new_matched_tokens(short, 0) == WAITS, "it was not asked first"
    assert made.get_num_new_matched_tokens(next_long, 0) == GOES
    assert made.get_num_new_matched_tokens(short, 0) == WAITS
    finish(made, short, "FINISHED_ABORTED")  # while it waits: the others' turn
    assert finish(made, next_long, "FINISHED_ABORTED") == (False, None)
    assert made.get_num_new_matched_tokens(prompt("d", LONGEST), 0) == GOES


def test_a_prompt_is_encoded_behind_its_last_chunk_only():
    made = scheduler("prefill")
    one = prompt("a", 96)
    made.get_num_new_matched_tokens(one, 0)
    assert step(made, (one, 64)).pdtrim_to_encode == {}
    one.num_computed_tokens = 64
    job = step(made, (one, 32)).pdtrim_to_encode["a"]
    assert job.pages == [1, 2, 3] and job.tokens == 96 and len(job.ticket.nonce) == 16
    assert job.ticket.sizes == (Form.of(served("prefill").plan, torch.float32, 96, BLOCK).most,)
    one.num_computed_tokens = 96
    assert step(made, (one, 1)).pdtrim_to_encode == {}


@pytest.mark.parametrize("encoded_first", [True, False])
def test_the_clients_ticket_has_the_length_that_was_encoded(encoded_first):
    """Whichever comes first: vLLM ends a request before it passes the worker's words on."""
    made = scheduler("prefill", codec="entropy")
    one = prompt("a", 96)
    made.get_num_new_matched_tokens(one, 0)
    job = step(made, (one, 96)).pdtrim_to_encode["a"]
    nbytes = job.ticket.sizes[0] - 800
    if encoded_first:
        hear(made, told=encoded(nbytes))
    delay, params = finish(made, one)
    if not encoded_first:
        assert TICKET not in params
        hear(made, told=encoded(nbytes))
    assert delay
    assert params[TICKET] == {"offset": 0, "bytes": [nbytes], "nonce": job.ticket.nonce.hex()}
    other = prompt("b", LONGEST)
    assert made.get_num_new_matched_tokens(other, 0) == WAITS, "nobody has read it"
    hear(made, sent={"a"})
    assert made.get_num_new_matched_tokens(other, 0) == GOES
    hear(made, told=encoded(1, name="gone"))


def test_a_ticket_waits_for_every_rank():
    made = scheduler("prefill", codec="entropy", ranks=2)
    one = prompt("a", 96)
    made.get_num_new_matched_tokens(one, 0)
    (first, second) = step(made, (one, 96)).pdtrim_to_encode["a"].ticket.sizes
    whole = Form.of(served("prefill", "entropy").plan, torch.float32, 96, BLOCK).most
    assert first == second < 0.6 * whole, "a rank has one of the two heads"
    _, params = finish(made, one)
    hear(made, told=encoded(800))
    assert TICKET not in params
    hear(made, told=Told({"a": {1: 640}}, set()))
    assert params[TICKET]["bytes"] == [800, 640]
    other = scheduler("prefill", codec="entropy", ranks=2)
    two = prompt("b", 96)
    other.get_num_new_matched_tokens(two, 0)
    _, params = finish(other, two)
    hear(other, told=encoded(800, 640, name="b"))
    assert params[TICKET]["bytes"] == [800, 640]


class Written:
    """Stands for a CUDA event."""

    def __init__(self, seen):
        self.seen = seen

    def synchronize(self):
        self.seen.append("waited")


def test_a_ticket_is_given_when_the_gpu_has_written_the_range():
    made = scheduler("prefill", codec="entropy")
    one = prompt("a", 96)
    made.get_num_new_matched_tokens(one, 0)
    _, params = finish(made, one)
    seen = []
    written = SimpleNamespace(synchronize=lambda: seen.append(TICKET in params))
    hear(made, told=Told({"a": {0: 640}}, set(), written))
    assert seen == [False] and TICKET in params


def test_what_ranks_tell_of_a_gpu_waits_for_it_on_its_way():
    seen = []
    told = Told({"a": {0: 640}}, {"b"}, Written(seen))
    came = pickle.loads(pickle.dumps(told))
    assert seen == ["waited"] and (came.sizes, came.refused) == (told.sizes, told.refused)
    assert came.written is None
    told.aggregate(Told({}, set(), Written(seen)))
    assert seen == ["waited"] * 2, "once each"


@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_event_lies_behind_the_last_range(is_cuda, monkeypatch):
    made, seen = object.__new__(CodedWorker), []
    stream = SimpleNamespace(record_event=lambda: seen.append("event") or "event")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    class Staging:
        device = torch.device("cpu")

        def __getitem__(self, at):
            return self

    Staging.is_cuda = is_cuda
    form = SimpleNamespace(most=640, write=lambda room, nonce, kept: seen.append("range") or 640)
    made._staging, made._form, made._kept = Staging(), lambda tokens: form, lambda *args: ()
    made.tp_rank, made._told = 0, Told({}, set())
    ticket = Ticket(offset=0, sizes=(640,), nonce=bytes(16))
    jobs = {name: Job(ticket=ticket, pages=[1], tokens=9) for name in "ab"}
    made.encode(SimpleNamespace(pdtrim_to_encode=jobs))
    assert seen == ["range", "range", *["event"] * is_cuda]
    told = made.take_told()
    assert told.written == ("event" if is_cuda else None) and told.sizes.keys() == {"a", "b"}
    made.encode(SimpleNamespace(pdtrim_to_encode={}))
    assert made.take_told() is None


def test_a_range_that_several_ranks_refuse_counts_once():
    made = scheduler("decode", ranks=2)
    hear(made, told=Told({}, {"a"}))
    assert made.take_stats() is None, "the other rank still reads"
    hear(made, told=Told({}, {"a", "b"}).aggregate(Told({}, {"b"})), read={"a", "b", "c"})
    assert made.take_stats().data[REFUSED] == [1, 1]
    hear(made, read={"a"})
    assert made.take_stats() is None


def test_decode_refuses_what_has_no_sound_ticket():
    made = scheduler("decode")
    form = Form.of(served("decode").plan, torch.float32, 40, BLOCK)
    ticket = Ticket(offset=64, sizes=(form.most,), nonce=bytes(16))
    good = request("a", 40, **WHERE, **{TICKET: ticket.to_json()})
    assert made._problem(good) is None
    assert "name no range" in made._problem(request("b", 40, **WHERE))
    long = ticket.to_json() | {"bytes": [form.most + 8]}
    assert "a prompt of 40 tokens has" in made._problem(request("c", 40, **WHERE, **{TICKET: long}))
    made._reqs_need_recv = {
        "a": (good, ([1],), (), True),
        "gone": (request("gone", 40, **WHERE), [], (), False),  # tells prefill to let go
    }
    assert step(made).pdtrim_tickets == {"a": ticket}


@pytest.mark.parametrize("said", [7, "many"])
def test_how_often_prefill_registered_its_cache_is_not_the_clients_to_say(said):
    """vLLM 0.33 would shake hands again, and its worker end at a text."""
    made = scheduler("decode")
    one = request("a", 40, **WHERE, remote_registration_generation=said)
    made._reqs_need_recv = {"a": (one, [], (), False)}
    assert step(made).reqs_to_recv["a"].remote.registration_generation == 0


def test_a_prompt_of_one_token_is_loaded_once():
    """Behind its load nothing is computed, so vLLM asks again: that is not a local prompt."""
    made = scheduler("decode")
    one = request("a", 1, do_remote_prefill=False)
    made._loaded["a"] = ([3],)
    assert made.get_num_new_matched_tokens(one, 0) == GOES
    one.num_preemptions = 1  # its pages are gone, and decode itself wrote them
    assert made.get_num_new_matched_tokens(one, 0) == GOES
    assert not made._refused


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(PlanError, match="staged_prompts 0"):
        scheduler("prefill", prompts=0)


def test_the_pool_travels_as_a_region():
    meta = SimpleNamespace(
        kv_caches_base_addr=[1, 2],
        block_lens=[8, 8],
        block_strides=[8, 8],
        region_members=[["a"], ["b"]],
        region_num_blocks=[4, 4],
        region_group_ids=None,
        region_names=["a", "b"],
        region_mem_types=["VRAM", "VRAM"],
        device_id=3,
    )
    before = {key: list(value) for key, value in vars(meta).items() if isinstance(value, list)}
    coded_worker._add_region(meta, 4096, 512, "DRAM")
    assert len(meta.region_members) == len(meta.region_num_blocks) == 3
    pool = coded_worker._take_region(meta)
    assert pool == RemotePool(address=4096, size=512, device=3, memory="DRAM")
    assert before == {key: value for key, value in vars(meta).items() if isinstance(value, list)}


@pytest.mark.parametrize(
    "tensor_parallel, cache_dtype, words",
    [
        (1, "auto", None),
        (1, "bfloat16", None),
        (2, "auto", None),
        (4, "auto", "2 KV heads in tensor parallel 4: use a size that divides 2"),
        (1, "fp8", "a fp8 cache: drop --kv-cache-dtype"),
    ],
)
def test_settings_that_a_codec_does_not_go_with(tmp_path, tensor_parallel, cache_dtype, words):
    export(served("decode").plan, tiny_model(head_dim=32), tmp_path / "pair")
    config = config_of(tmp_path / "pair", tensor=tensor_parallel)
    config.cache_config.cache_dtype = cache_dtype
    config.model_config.dtype = torch.bfloat16
    if words is None:
        check_config(config)
    else:
        with pytest.raises(PlanError, match=words):
            check_config(config)


def test_each_rank_takes_off_the_biases_of_its_own_heads(tmp_path):
    model = tiny_model("qwen2", head_dim=32)
    plan = make_plan(model, Gates.dense(4), (LayerKV(codec=parse_codec("int8")),) * 4)
    folder = export(plan, model, tmp_path / "pair")
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder / "prefill"), dtype=torch.float32),
        cache_config=SimpleNamespace(block_size=BLOCK),
    )
    stage = Served(stage="prefill", plan=plan)
    both, *each = (StageBias(config, stage, rank=r, ranks=n) for r, n in ((0, 1), (0, 2), (1, 2)))
    assert both.by_layer.keys() == {0, 1, 2, 3}
    for layer, bias in both.by_layer.items():
        for name in ("k_GD", "v_GD"):
            shares = [getattr(one.by_layer[layer], name) for one in each]
            assert [len(share) for share in shares] == [1, 1]
            assert torch.equal(torch.cat(shares), getattr(bias, name))
