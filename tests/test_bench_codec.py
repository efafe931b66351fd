"""The codec benchmark: its bookkeeping, not its speed."""

from contextlib import contextmanager

import pytest
import torch

from helpers import tiny_model
from pdtrim.bench.codec import LOUD_CHANNELS, bench_codecs, sample
from pdtrim.bench.configs import CodecsConfig
from pdtrim.bench.machine import measure_machine
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.kv.codecs import parse_codec

SHAPE = {"heads": 3, "tokens": 100, "width": 16}
NAMES = ("raw", "fp8", "int4:group=32", "lossless")


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_every_codec_is_reported_with_its_compression(dtype, itemsize):
    report = bench_codecs(CodecsConfig(codecs=NAMES, **SHAPE, repeats=2), dtype=dtype)
    raw_bytes = 2 * 3 * 100 * 16 * itemsize
    assert report["raw_bytes"] == raw_bytes
    assert (report["dtype"], report["device"], report["repeats"]) == (dtype, "cpu", 2)
    assert report["copy_gb_s"] > 0
    assert [entry["codec"] for entry in report["codecs"]] == list(NAMES)
    for entry in report["codecs"]:
        parts = ("encode", "decode", "both")
        assert set(entry) == {"codec", "path", "compression", "break_even_gbit_s"} | {
            f"{part}_{what}" for part in parts for what in ("gb_s", "ratio", "range")
        }
        assert entry["path"] == "torch"
        for part in parts:
            slowest, fastest = entry[f"{part}_range"]
            assert 0 < slowest <= entry[f"{part}_gb_s"] <= fastest
            assert entry[f"{part}_ratio"] == entry[f"{part}_gb_s"] / report["copy_gb_s"] > 0
        gain = max(0, 1 - 1 / entry["compression"])
        assert entry["break_even_gbit_s"] == pytest.approx(8 * gain * entry["both_gb_s"])
    by_name = {entry["codec"]: entry["compression"] for entry in report["codecs"]}
    kv = sample(3, 100, 16).to(getattr(torch, dtype))
    assert by_name["raw"] == 1
    assert by_name["fp8"] == raw_bytes / (2 * 3 * (2 + 100 * 16))
    # of 100 tokens 36 are raw; 64 make 2 key groups a channel and 1 value group a token
    coded = 2 * 3 * 36 * 16 * itemsize + 4 * 3 * (16 * 2 + 64) + 3 * 64 * 16
    assert by_name["int4:group=32"] == raw_bytes / coded
    assert by_name["lossless"] == raw_bytes / parse_codec("lossless").encode(*kv).numel() > 1


def test_the_data_is_the_same_each_time_and_has_loud_key_channels():
    kv = sample(2, 300, 32)
    assert torch.equal(kv, sample(2, 300, 32))
    k_2D, v_2D = kv.std(dim=2)
    assert ((k_2D > 10).sum(-1) == LOUD_CHANNELS).all()
    assert (v_2D < 2).all()


def test_progress_counts_every_run():
    seen = []

    @contextmanager
    def progress(what, total):
        seen.append(total)
        yield seen.append

    bench_codecs(CodecsConfig(codecs=("raw", "fp8"), **SHAPE, repeats=3), progress=progress)
    assert seen[0] == sum(seen[1:]) == 12


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"codecs": ()}, PdtrimError),
        ({"codecs": ("int5",)}, PlanError),
        ({"repeats": 0}, PdtrimError),
    ],
)
def test_what_cannot_be_timed_is_refused(change, error):
    with pytest.raises(error):
        bench_codecs(CodecsConfig(**{"codecs": ("raw",), **SHAPE, "repeats": 1, **change}))


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(PdtrimError, match="unknown dtype 'int8'"):
        bench_codecs(CodecsConfig(codecs=("raw",), **SHAPE), dtype="int8")


def test_the_machine_has_speeds_of_both_kinds_of_codecs_and_of_prefill():
    machine = measure_machine(tiny_model("llama", layers=2), 20)
    assert set(machine.codecs) == {"any", "packed"} and machine.layer_s > 0
    for speed in machine.codecs.values():
        assert speed.encode_gb_s > 0 and speed.decode_gb_s > 0
