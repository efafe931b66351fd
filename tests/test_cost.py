"""The cost model against closed forms, and the files that it reads."""

import json
import math
import random
import sys
from dataclasses import replace

import pytest

from cost_files import LAYERS, SHAPE, codec_file, plan_data, service, times, times_data, write
from pdtrim.cost.fleet import Targets, Unreachable, best_batch, size_fleet
from pdtrim.cost.handover import CodecFile, Link, coding, handover
from pdtrim.cost.kept import codec_files, kept_names, stage_times
from pdtrim.cost.load import Load, read_trace
from pdtrim.cost.pair import PairCost, codec_name, read_pair
from pdtrim.cost.queueing import poisson_arrivals, station
from pdtrim.cost.times import Shape, StageTimes
from pdtrim.errors import PdtrimError


def mean_wait(rate, service_s, servers, count=200_000, seed=1):
    rng = random.Random(seed)
    arrivals = poisson_arrivals(rate, count, rng)
    starts = station(arrivals, [service_s(rng) for _ in arrivals], servers)
    return sum(s - a for s, a in zip(starts, arrivals, strict=True)) / count


def erlang_wait(rate, mean_s, servers):
    """Mean wait of M/M/c (Erlang C)."""
    load = rate * mean_s
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(terms) + last) * mean_s / (servers - load)


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_simulated_waits_are_those_of_the_closed_forms(busy):
    exponential, fixed = (lambda rng: rng.expovariate(1.0)), (lambda rng: 1.0)
    assert mean_wait(busy, exponential, 1) == pytest.approx(busy / (1 - busy), rel=0.04)
    assert mean_wait(busy, fixed, 1) == pytest.approx(busy / (2 * (1 - busy)), rel=0.04)
    four = mean_wait(4 * busy, exponential, 4)
    assert four == pytest.approx(erlang_wait(4 * busy, 1.0, 4), rel=0.06)


def test_a_line_is_served_in_the_order_of_arrival():
    assert station([3.0, 0.0, 1.0], [1.0, 5.0, 1.0], 1) == [6.0, 0.0, 5.0]
    assert station([3.0, 0.0, 1.0], [1.0, 5.0, 1.0], 2) == [3.0, 0.0, 1.0]


def test_times_are_linear_between_rows_and_refused_beyond_them():
    own = times()
    assert own.prompt(10) == pytest.approx(1e-3) and own.prompt(4000) == pytest.approx(0.4)
    assert own.prompt(2345) == pytest.approx(0.2345)
    assert own.step(5, 3210) == pytest.approx(1e-3 + 5e-5 + 3.21e-3)
    assert own.step(0.5, 2000) == own.step(1, 2000)
    for ask in (lambda: own.prompt(4001), lambda: own.prompt(9), lambda: own.step(33, 100)):
        with pytest.raises(PdtrimError, match="beyond what is measured on bench_sxm"):
            ask()


def test_a_pruned_stage_takes_the_parts_that_it_runs(tmp_path):
    pruned, dense = service(tmp_path), service(tmp_path, dense=True)
    # of 4 layers 0 and 1 run whole; 2 and the last, behind which nothing is read, only K and V
    parts = 2e-5 + (2 * 4e-5 + 2 * 4e-5 + 2 * 1e-5) / 4
    assert pruned.prefill_s(1000) == pytest.approx(1000 * parts)
    assert dense.prefill_s(1000) == pytest.approx(0.1)
    assert pruned.step_s(4, 500, 50) == dense.step_s(4, 500, 50)
    half = replace(pruned, pair=replace(pruned.pair, decode_mlp=2, sent=pruned.pair.sent[:3]))
    gone = 2 / 4 * 4e-4 + 1 / 4 * (4e-4 + 550e-6)
    assert half.step_s(4, 500, 50) == pytest.approx(dense.step_s(4, 500, 50) - gone)


def test_without_parts_only_a_whole_stage_has_a_time(tmp_path):
    rows = [{"tokens": n, "seconds": n * 1e-4} for n in (10, 1000)]
    bare = times(prefill=rows)
    assert replace(service(tmp_path, dense=True), times=bare).prefill_s(500) == pytest.approx(0.05)
    with pytest.raises(PdtrimError, match="no attention_s"):
        replace(service(tmp_path), times=bare).prefill_s(500)


def test_a_handover_encodes_sends_and_decodes(tmp_path):
    shape, files = Shape(**SHAPE), [codec_file(tmp_path), codec_file(tmp_path, 10**9)]
    pair = read_pair(write(tmp_path / "p.json", plan_data()))
    ask = {"itemsize": 2, "link": Link(gbit_s=8.0), "files": files}
    made = handover(pair, shape, 1000, **ask)
    raw = LAYERS * 1000 * 2 * 2 * 16 * 2
    assert made.raw_bytes == raw and made.sent_bytes == raw / 4
    assert made.seconds == pytest.approx(raw / 10e9 + raw / 4 / 1e9 + raw / 20e9)
    assert "codec1000000.json" in made.sources[0]
    told = Link(gbit_s=8.0, bytes_per_token=7)
    assert handover(pair, shape, 1000, **{**ask, "link": told}).sent_bytes == 7000
    plain = handover(PairCost.dense(LAYERS), shape, 1000, **{**ask, "files": []})
    assert plain.seconds == pytest.approx(raw / 1e9)
    paged = Link(gbit_s=8.0, page_tokens=16, page_s=1e-5)
    posted = handover(PairCost.dense(LAYERS), shape, 1000, **{**ask, "link": paged})
    assert posted.held_s == posted.post_s == pytest.approx(LAYERS * 63 * 1e-5)
    assert posted.seconds == pytest.approx(raw / 1e9 + posted.post_s)
    assert handover(pair, shape, 1000, **{**ask, "link": paged}).post_s == 0  # one read
    with pytest.raises(PdtrimError, match="codec 'int4' is not measured"):
        handover(pair, shape, 1000, **{**ask, "files": []})


def test_launches_of_a_codec_count_once_a_layer(tmp_path):
    """At two sizes a layer's time is on their line; a layer of 0 bytes takes 1 ms in, 2 ms out."""

    def file(size):
        speed = {"codec": "int4", "compression": 4.0}
        speed["encode_gb_s"] = size / (1e-3 + size / 1e12) / 1e9
        speed["decode_gb_s"] = size / (2e-3 + size / 5e11) / 1e9
        data = {"raw_bytes": size, "hardware": "a test's machine", "codecs": [speed]}
        return CodecFile.load(write(tmp_path / f"{size}.json", data))

    files = [file(10**9), file(10**7), file(10**8)]
    for layer in (10**6, 3 * 10**7, 3 * 10**8, 10**10):
        made = coding("int4", 8 * layer, 8, files)
        assert made.encode_s == pytest.approx(8 * (1e-3 + layer / 1e12))
        assert made.decode_s == pytest.approx(8 * (2e-3 + layer / 5e11))
    assert "/100000000.json" in made.source and "/1000000000.json" in made.source
    once = coding("int4", 8 * 10**7, 8, files[1:2])
    assert once.encode_s == pytest.approx(8 * (1e-3 + 1e-5))


LOAD = Load(prompts=(1000,), answers=(100,), rate=40.0, source="test")


def test_a_fleet_meets_its_targets_with_no_server_to_spare(tmp_path):
    own = service(tmp_path, dense=True)
    fleet = size_fleet(own, LOAD, Targets(ttft=0.3, tpot=0.01))
    assert fleet.ttft_quantile_s <= 0.3 and fleet.tpot_s <= 0.01
    assert fleet.prefill_gpus >= 4 and 0 < fleet.prefill_load < 1  # 40 x 0.1 s
    tight = size_fleet(own, LOAD, Targets(ttft=0.12, tpot=0.01))
    assert tight.prefill_gpus > fleet.prefill_gpus
    pruned = size_fleet(service(tmp_path), LOAD, Targets(ttft=0.3, tpot=0.01))
    assert pruned.prefill_gpus < fleet.prefill_gpus


def test_an_overlap_hides_its_share_of_the_handover_from_the_first_token(tmp_path):
    targets = Targets(ttft=5.0, tpot=0.01)
    shown = size_fleet(service(tmp_path, dense=True, gbit_s=0.5), LOAD, targets)
    half = size_fleet(service(tmp_path, dense=True, gbit_s=0.5, overlap=0.5), LOAD, targets)
    assert shown.ttft_s - half.ttft_s == pytest.approx(shown.handover_s / 2)


def test_what_is_outside_the_gpus_delays_the_first_token_and_takes_no_server(tmp_path):
    own, targets = service(tmp_path, dense=True), Targets(ttft=0.3, tpot=0.01)
    slow = replace(own, times=times(front_s=0.02, front_token_s=1e-5))
    before, after = (size_fleet(one, LOAD, targets) for one in (own, slow))
    assert after.gpus == before.gpus
    assert after.ttft_s - before.ttft_s == pytest.approx(0.02 + 1000 * 1e-5)


def test_posting_pages_holds_up_the_batch_that_decodes(tmp_path):
    plain = service(tmp_path, dense=True)
    paged = service(tmp_path, dense=True, page_s=1e-5)
    held = LAYERS * 63 * 1e-5  # 1,000 tokens in pages of 16
    more = paged.token_s(4, 1000, 100) - plain.token_s(4, 1000, 100)
    assert more == pytest.approx(4 * held / 100)
    load, targets = replace(LOAD, rate=1.0), Targets(ttft=5.0, tpot=0.01)
    slow, fast = (size_fleet(one, load, targets) for one in (paged, plain))
    assert slow.tpot_s > fast.tpot_s and slow.ttft_s > fast.ttft_s + held
    coded = service(tmp_path, page_s=1e-5)
    assert coded.handover(1000).post_s == 0


def test_targets_that_one_request_misses_are_out_of_reach(tmp_path):
    own = service(tmp_path, dense=True)
    with pytest.raises(Unreachable, match=r"more than --ttft 0\.05"):
        size_fleet(own, LOAD, Targets(ttft=0.05, tpot=0.01))
    with pytest.raises(Unreachable, match=r"more than --tpot 0\.001"):
        size_fleet(own, LOAD, Targets(ttft=0.3, tpot=0.001))


def test_the_batch_is_bounded_by_time_by_memory_and_by_what_is_measured(tmp_path):
    own = service(tmp_path, dense=True)

    def rows(tpot, memory=1.0):
        return best_batch(own, 1000, 100, Targets(ttft=1, tpot=tpot, memory_use=memory))[0]

    assert rows(1.0) == 32
    assert rows(1e-3 + 7.5e-5 + 1050e-6) == 7
    a_row = LAYERS * 1100 * 2 * 2 * 16 * 2
    assert rows(1.0, (2_000_000 + 5.5 * a_row) / 100e6) == 5
    with pytest.raises(PdtrimError, match="do not fit"):
        rows(1.0, 0.02)


def test_a_plan_is_read_as_pdtrim_reads_it(tmp_path):
    from pdtrim.plan import PrunePlan

    path = write(tmp_path / "plan.json", plan_data())
    whole, cost = PrunePlan.load(path), read_pair(path)
    gates = whole.gates.without_dead_work()
    assert cost.attention == sum(a == "full" for a in gates.prefill_attention)
    assert cost.kv_only == sum(a == "kv" for a in gates.prefill_attention)
    assert cost.mlp == sum(gates.prefill_mlp)
    assert len(cost.sent) == len(whole.sent_layers) and cost.search_s == 3600


def test_codecs_are_named_as_the_benchmark_names_them():
    from pdtrim.kv.codecs import parse_codec

    for text in ("raw", "int4", "k3v2:rotate=true", "int8:group=32,rotate=true", "entropy", "fp8"):
        assert codec_name(parse_codec(text).model_dump(), "test") == text


DAMAGED = {
    "not JSON": ("{", "is not valid JSON"),
    "a list": ("[]", "valid dictionary"),
    "another schema": ({**plan_data(), "schema": "x/1"}, "schema"),
    "too few gates": (
        {**plan_data(), "gates": {**plan_data()["gates"], "prefill_mlp": [True]}},
        "one entry a layer",
    ),
    "a selector that chooses": (
        {**plan_data(), "kv": [{"selector": {"name": "gate"}}] * LAYERS},
        "--kv-bytes-per-token",
    ),
    "widths": ({**plan_data(), "widths": {}}, "narrower blocks"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_plan_is_one_line(tmp_path, what):
    data, words = DAMAGED[what]
    with pytest.raises(PdtrimError, match=words) as caught:
        read_pair(write(tmp_path / "plan.json", data))
    assert "\n" not in str(caught.value)


BAD_TIMES = {
    "unknown key": ({"extra": 1}, "extra"),
    "no grid": ({"decode": times_data()["decode"][:-1]}, "a grid"),
    "order": ({"prefill": times_data()["prefill"][::-1]}, "growing tokens"),
    "no time": ({"prefill": [{"tokens": 1, "seconds": 0}] * 2}, "greater than 0"),
}


@pytest.mark.parametrize("what", BAD_TIMES)
def test_damaged_stage_times_are_one_line(tmp_path, what):
    changes, words = BAD_TIMES[what]
    with pytest.raises(PdtrimError, match=words):
        StageTimes.load(write(tmp_path / "t.json", times_data(**changes)))


TRACES = {
    "empty": ("\n", "has no requests"),
    "no JSON": ("{'a'", "line 1"),
    "no lengths": ('{"prompt_tokens": 3}', "output_tokens"),
    "zero": ('{"prompt_tokens": 0, "output_tokens": 1}', "above 0"),
    "a list": ("[1, 2]", "above 0"),
}


@pytest.mark.parametrize("what", TRACES)
def test_a_damaged_trace_is_one_line(tmp_path, what):
    text, words = TRACES[what]
    with pytest.raises(PdtrimError, match=words):
        read_trace(write(tmp_path / "t.jsonl", text))


def test_a_trace_has_lengths_and_perhaps_a_rate(tmp_path):
    rows = [{"input_length": 10 * i, "output_length": i, "arrival_s": i / 4} for i in range(1, 6)]
    load = read_trace(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows))))
    assert (load.mean_prompt, load.mean_answer, load.rate) == (30, 3, 4)


def test_the_kept_times_are_whole_and_found_by_the_plan(tmp_path):
    names = kept_names("h100_sxm")
    assert set(names) == {"llama-3.1-8b", "qwen2.5-7b"}
    for name, path in names.items():
        kept = stage_times(name, "h100_sxm", None)
        assert path.name in kept.source and "AIConfigurator" in kept.source
        assert kept.prompt(8000) > 7 * kept.prompt(1000) > 0
        assert kept.step(64, 8000) > kept.step(1, 8000)
    pair = replace(PairCost.dense(28), kv_heads=4, head_dim=128)
    assert stage_times(None, "h100_sxm", pair).model.name == "Qwen2.5-7B"
    with pytest.raises(PdtrimError, match="give --stages"):
        stage_times(None, "h100_sxm", replace(pair, layers=27))
    with pytest.raises(PdtrimError, match="not on --system"):
        stage_times(str(write(tmp_path / "t.json", times_data())), "h100_sxm", None)
    assert len(codec_files((), "h100_sxm")) == 2 and codec_files((), "b200_sxm") == []


def test_the_kept_times_are_what_aiconfigurator_gives():
    pytest.importorskip("aiconfigurator_core")
    from pdtrim.cost.aiconfigurator import aiconfigurator_times

    made = aiconfigurator_times("meta-llama/Meta-Llama-3.1-8B", "h100_sxm")
    assert made == StageTimes.load(kept_names("h100_sxm")["llama-3.1-8b"])
    for model, system, words in (
        ("meta-llama/Meta-Llama-3.1-8B", "../x", "does not know system"),
        ("nobody/nothing", "h100_sxm", "no config of"),
        ("mistralai/Mixtral-8x7B-v0.1", "h100_sxm", "has experts"),
    ):
        with pytest.raises(PdtrimError, match=words):
            aiconfigurator_times(model, system)


def test_without_aiconfigurator_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(PdtrimError, match="pip install aiconfigurator-core"):
        stage_times("aiconfigurator:meta-llama/Meta-Llama-3.1-8B", "h100_sxm", None)


def test_a_shape_counts_the_parameters_of_its_model():
    from helpers import tiny_model
    from pdtrim.cost.aiconfigurator import shape_of

    network = tiny_model().network
    shape = shape_of(network.config.to_dict(), "some/tiny")
    assert shape.parameters == sum(p.numel() for p in network.parameters())
    with pytest.raises(PdtrimError, match="hidden_size"):
        shape_of({}, "nothing")


def test_more_servers_than_are_modelled_are_refused_before_they_are_simulated(tmp_path):
    with pytest.raises(PdtrimError, match="smaller --rate"):
        size_fleet(service(tmp_path), replace(LOAD, rate=1e12), Targets(ttft=0.3, tpot=0.01))
