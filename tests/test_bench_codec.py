"""The codec benchmark: its bookkeeping, not its speed."""

from contextlib import contextmanager

import pytest
import torch

from pdtrim.bench.codec import LOUD_CHANNELS, bench_codecs, break_even, sample
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.kv.codecs import parse_codec

SHAPE = {"heads": 3, "tokens": 100, "width": 16}
NAMES = ["raw", "fp8", "int4:group=32", "lossless"]


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_every_codec_is_reported_with_its_compression(dtype, itemsize):
    report = bench_codecs(NAMES, **SHAPE, dtype=dtype, repeats=2)
    raw_bytes = 2 * 3 * 100 * 16 * itemsize
    assert report["raw_bytes"] == raw_bytes
    assert (report["dtype"], report["device"], report["repeats"]) == (dtype, "cpu", 2)
    assert report["copy_gb_s"] > 0
    assert [entry["codec"] for entry in report["codecs"]] == NAMES
    for entry in report["codecs"]:
        assert set(entry) == {"codec", "compression", "break_even_gbit_s"} | {
            f"{part}_{what}" for part in ("encode", "decode", "both") for what in ("gb_s", "ratio")
        }
        for part in ("encode", "decode", "both"):
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


def test_break_even_by_hand():
    # 4x at 2 GB/s: three quarters of 16 Gbit/s
    assert break_even(4, 2e9, 1) == pytest.approx(12)
    assert break_even(2, 1e6, 1e-3) == pytest.approx(4)
    assert break_even(1, 1e9, 1) == break_even(0.5, 1e9, 1) == 0
    # at that speed both ways take the same time, and below it the encoded one takes less
    n, compression, seconds = 3e8, 3.0, 0.25
    link = break_even(compression, n, seconds) / 8 * 1e9
    assert seconds + n / compression / link == pytest.approx(n / link)
    assert seconds + n / compression / (link / 2) < n / (link / 2)


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

    bench_codecs(["raw", "fp8"], **SHAPE, repeats=3, progress=progress)
    assert seen[0] == sum(seen[1:]) == 12


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"names": []}, PdtrimError),
        ({"names": ["int5"]}, PlanError),
        ({"repeats": 0}, PdtrimError),
        ({"dtype": "int8"}, PdtrimError),
    ],
)
def test_what_cannot_be_timed_is_refused(change, error):
    with pytest.raises(error):
        bench_codecs(**{"names": ["raw"], **SHAPE, "repeats": 1, **change})
