"""The picture of a result."""

import sys

import pytest

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.result import Result, ResultProvenance, Row
from pdtrim.report.plot import COLOURS, MARKERS, STYLES, families, plot_kv, ticks


def row(name, compression, kl=0.1, kl_error=0.02):
    return Row(
        name=name,
        kl=kl,
        kl_error=kl_error,
        nll=3,
        ppl=20,
        kv_bytes=1e6 / compression,
        kv_compression=compression,
        prefill_flops_ratio=1,
        decode_flops_ratio=1,
        prefill_blocks=30,
        decode_blocks=30,
        search_block_tokens=0,
        wall_s=0,
    )


ROWS = (
    row("dense", 1, 0, 0),
    row("snapkv+k3v2@8.6x", 8.6, 0.3),
    row("first_last@4.95x", 4.95, 0.2, 0.5),
    row("first_last@1.98x", 1.98, 0.05),
    row("snapkv+k3v2@4.3x", 4.3, -1e-5),
    row("k4v4@4@x", 3.5, 2e-6, 0),
)


def result_of(rows, **provenance):
    values = {
        "model": "some/model",
        "model_fingerprint": "f",
        "dtype": "bfloat16",
        "text": "a text",
        "sequences": 8,
        "prompt_tokens": 512,
        "continuation_tokens": 128,
        "versions": {},
        "host": {},
    }
    return Result(provenance=ResultProvenance(**{**values, **provenance}), rows=rows)


def test_rows_are_grouped_by_the_name_before_the_first_at():
    found = families(ROWS)
    assert {family: [row.kv_compression for row in rows] for family, rows in found.items()} == {
        "snapkv+k3v2": [4.3, 8.6],
        "first_last": [1.98, 4.95],
        "k4v4": [3.5],
    }
    assert list(found) == ["snapkv+k3v2", "first_last", "k4v4"]
    assert families(ROWS[:1]) == {}


def test_families_look_different():
    looks = [
        (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(2 * len(STYLES) * 7)
    ]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.98, 8.6, 4], [1.5, 2, 3, 4, 5, 6, 8, 10]),
        ([1, 10], [1, 1.5, 2, 3, 4, 5, 6, 8, 10]),
        ([4], [4]),
        ([4.1, 4.2], [4, 5]),
        ([0.35, 1.2], [0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5]),
        ([1.4, 90], [1, 2, 5, 10, 20, 50, 100]),
    ],
)
def test_ticks_enclose_the_values(values, expected):
    assert ticks(values) == expected


def test_the_picture_is_written_twice_and_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = plot_kv(result_of(ROWS), tmp_path / "new" / "kv-4.95x")
    # a dot in the stem is not an ending
    assert (png, svg) == tuple(tmp_path / "new" / f"kv-4.95x.{end}" for end in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = svg.read_text()
    for text in (*families(ROWS), "some/model", "a text", "KL to dense, nats a token", "8x"):
        assert text in picture
    assert "compression of the KV bytes sent" in picture and ">dense<" not in picture
    assert "≤ 0.0001" in picture
    _, again = plot_kv(result_of(ROWS), tmp_path / "again")
    assert again.read_bytes() == svg.read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        (row("only@1x", 1, 0, 0),),
        (row("a@2x", 2, 3.0, 9.0), row("a@2x", 2, 1e-9)),
        tuple(row(f"f{i}@x", 1 + i, 0.01 * (i + 1)) for i in range(30)),
    ],
)
def test_odd_results_are_drawn_without_a_warning(tmp_path, rows, recwarn):
    pytest.importorskip("matplotlib")
    result = result_of(rows, model="a$b$" * 40, text="long words " * 30)
    png, _ = plot_kv(result, tmp_path / "plot")
    assert png.is_file()
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_nothing_to_draw_and_no_matplotlib_are_told(tmp_path, monkeypatch):
    with pytest.raises(PdtrimError, match="family@setting"):
        plot_kv(result_of(ROWS[:1]), tmp_path / "plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PdtrimError, match=r"pdtrim\[plot\]"):
        plot_kv(result_of(ROWS), tmp_path / "plot")
    assert not list(tmp_path.iterdir())
