"""What ``pdtrim serve`` says before it serves: measured numbers, how they came about, warnings."""

from dataclasses import asdict, replace

import pytest

from helpers import first_last, make_plan, tiny_model
from pdtrim.bench.start import Coded, Measured, Read
from pdtrim.engines.config import ServeConfig
from pdtrim.engines.ports import free_port
from pdtrim.engines.vllm.launch import ENGINE, processes
from pdtrim.kv.codecs import parse_codec
from pdtrim.plan import Gates, LayerKV
from pdtrim.report.start import start_lines
from pdtrim.verbs import serve
from serving import export_tiny

KV = (first_last(32, 64), LayerKV(codec=parse_codec("int4")), LayerKV(), LayerKV())
MEASURED = Measured(
    tokens=512,
    block_size=32,
    dtype="bfloat16",
    devices=("cuda:0", "cuda:1"),
    hardware="a GPU",
    dense=Read(nbytes=64_000_000, pieces=64, seconds=0.008),
    pages=Read(nbytes=48_000_000, pieces=52, seconds=0.006),
    coded=Coded(
        read=Read(nbytes=16_000_000, pieces=1, seconds=0.002),
        encode_s=0.001,
        decode_s=0.0005,
        raw_bytes=60_000_000,
        unaided=(),
    ),
    copy_gb_s=20,
)


def lines_of(measured):
    plan = make_plan(tiny_model(), Gates.removing(4, prefill={1}), KV, block_size=32)
    return start_lines(plan, measured)


def test_each_number_is_said_with_how_it_came_about():
    lines = lines_of(MEASURED)
    assert [line.text for line in lines] == [
        "stages: prefill runs 3 of 4 blocks whole, decode 4",
        "handover: of 512 tokens 16 MB in 1 read, the dense model's 64 MB in 64: compression 4x",
        "link: 8 GB/s; 2 ms, the dense model's 8 ms",
        "codecs: 60 GB/s of raw bytes in, 120 out; 1 ms and 0.5 ms",
        "in turn: 3.5 ms, 2.29x as fast as the dense model's",
        "memory: a token takes 256 bytes of decode's cache, the dense model's 256;"
        " the prompt holds 52 of 64 pages there",
    ]
    assert all(line.how for line in lines)
    assert "from a process on cuda:0 into one on cuda:1 (a GPU)" in lines[2].how
    shared = lines_of(replace(MEASURED, ranks=2))[1].text
    assert shared.startswith("handover of each of 2 GPUs: of 512 tokens 16 MB")
    raw = [line.text for line in lines_of(replace(MEASURED, coded=None))]
    assert raw[1].startswith("handover: of 512 tokens 48 MB in 52 reads")
    assert len(raw) == 5 and raw[3].startswith("in turn: 6 ms")


def test_what_makes_a_pair_slow_here_is_a_warning():
    def warnings(**changes):
        found = [line.text for line in lines_of(replace(MEASURED, **changes))]
        return [text for text in found if text.startswith("warning: ")]

    assert warnings() == []
    (emulated,) = warnings(copy_gb_s=1000)
    assert "NIXL reads 8 GB/s where a copy makes 1e+03: UCX emulates" in emulated
    assert warnings(copy_gb_s=1000, devices=("cpu", "cpu")) == []
    (torch_path,) = warnings(coded=replace(MEASURED.coded, unaided=("entropy",)))
    assert torch_path == "warning: entropy runs in torch on this GPU, not in a kernel"
    (slow,) = warnings(coded=replace(MEASURED.coded, encode_s=0.01))
    assert slow.endswith("the codecs cost more than they save: without them 6 ms")


def test_what_was_measured_travels_between_processes():
    assert Measured.from_json(asdict(MEASURED)) == MEASURED
    raw = replace(MEASURED, coded=None)
    assert Measured.from_json(asdict(raw)) == raw


def report_of(pair, ranks=1, **options):
    config = ServeConfig(pair=pair, max_model_len=300, tensor_parallel=ranks)
    return serve._report(ENGINE, config, processes(config, free_port=free_port), **options)


def test_a_process_of_its_own_measures_the_plans_reads(tmp_path):
    """Ten pages in each of four layers; in the first six are dropped."""
    pytest.importorskip("nixl")
    pair = export_tiny(tmp_path / "pair", kv=KV, block_size=32)
    lines = report_of(pair, ranks=2, explain=True)
    said, how = lines[::2], lines[1::2]
    assert all(line.startswith("    ") for line in how) and len(said) >= 6
    assert said[1].startswith("handover of each of 2 GPUs: of 300 tokens ")
    assert "in 1 read, " in said[1]
    dense = 40 * 32 * 2 * 8 * 4 / 1e6  # a rank has one head of 8 channels
    assert f" {dense:.4g} MB in 40: compression " in said[1]
    assert "holds 34 of 40 pages" in said[5]
    assert "in float32" in how[1]


def test_a_measurement_that_fails_is_one_line(tmp_path, monkeypatch):
    pair = export_tiny(tmp_path / "pair")
    monkeypatch.setattr(serve, "_devices", lambda started: ("cpu", "cuda:7"))
    (line,) = report_of(pair, explain=False)
    assert line.startswith("nothing was measured: ") and "device 'cuda:7'" in line
    monkeypatch.setattr(serve, "PROBE_SECONDS", 0.001)
    assert report_of(pair, explain=True) == ["nothing was measured: it took more than 0.001 s"]
