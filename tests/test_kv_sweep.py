"""The sweep of KV policies, and its picture."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers import trim_of
from pdtrim.bundle import TrimPlan
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.configs import SweepConfig
from pdtrim.evaluate.handover import loopback_bytes, run_plan
from pdtrim.evaluate.kv_sweep import markdown, sweep
from pdtrim.evaluate.result import Result
from pdtrim.models.loading import load_model
from pdtrim.report.plot import plot_kv


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def config(tiny_text):
    return SweepConfig(
        text=str(tiny_text),
        calibration=str(tiny_text),
        prompt_tokens=129,
        continuation_tokens=8,
        limit=2,
        probes=0,
        budgets=(3.0,),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def result(model, config, folder):
    return sweep(model, config, folder)


def test_what_is_there_is_not_measured_again(result, model, config, folder, tmp_path, monkeypatch):
    unwanted = ("evaluate.kv_sweep.measure_quality", "evaluate.kv_sweep.loopback_bytes")
    for name in (*unwanted, "evaluate.kv_sweep.load_calibration", "kvfit.budget.allocate"):
        monkeypatch.setattr(f"pdtrim.{name}", lambda *_, **__: pytest.fail())
    assert sweep(model, config, folder) == result
    other_text = tmp_path / "words.txt"
    other_text.write_text(Path(config.text).read_text()[5:])
    for words, changes in (
        ("limit 2, now it is 1", {"limit": 1}),
        ("seed 0, now it is 1", {"seed": 1}),
        ("continuation_tokens 8, now it is 7", {"continuation_tokens": 7}),
        ("text ", {"text": str(other_text)}),
    ):
        with pytest.raises(PdtrimError, match=rf"settings\.json was made with {words}"):
            sweep(model, replace(config, **changes), folder)
    with pytest.raises(PdtrimError, match="made with dtype"):
        sweep(load_model(model.name, dtype="float32"), config, folder)
    cell = folder / "cells" / "quality.json"
    before = cell.read_bytes()
    cell.write_bytes(before.replace(b"1", b"2", 1))
    with pytest.raises(PdtrimError, match=r"quality\.json is damaged"):
        sweep(model, config, folder)
    cell.write_bytes(before)


def test_every_family_is_measured_at_real_bytes(result):
    rows = {row.name: row for row in result.rows}
    assert rows["dense"].kl == pytest.approx(0, abs=1e-4)
    families = {name.partition("@")[0] for name in rows if "@" in name}
    assert families >= {"codec", "first_last", "snapkv", "tova", "gate", "duo", "budget", "random"}
    assert rows["lossless@lossless"].kl == pytest.approx(0, abs=1e-4)
    for family in ("first_last", "random", "snapkv", "tova", "expected_attention"):
        assert 2.5 < rows[f"{family}@4.95x"].kv_compression < 5.5
    bits = [rows[f"codec@{name}"] for name in ("int8", "int4", "int3", "int2")]
    assert [r.kl for r in bits] == sorted(r.kl for r in bits)
    assert [r.kv_bytes for r in bits] == sorted((r.kv_bytes for r in bits), reverse=True)
    for family in ("budget", "budget, packed codecs"):
        assert rows[f"{family}@3x"].kv_compression > 2.5  # the frame's header counts here
    caches = {name: row.metrics["decode_cache_bytes"] for name, row in rows.items()}
    assert caches["codec@int2"] == caches["dense"]  # a codec saves the link, not decode
    assert caches["snapkv@4.95x"] < 0.3 * caches["dense"]


@pytest.mark.usefixtures("warm_stages")
def test_bytes_are_those_of_two_processes(model, tiny_text):
    from pdtrim.calibration.batches import text_batch

    batch = text_batch(model, str(tiny_text), prompt_tokens=20, continuation_tokens=2, limit=2)
    plan = TrimPlan.dense(model).plan
    counted = loopback_bytes(plan, model, batch)
    assert counted.frame == run_plan(trim_of(plan), model, batch).kv_bytes


def test_the_table_and_the_picture_show_every_row(result, tmp_path):
    text = markdown(result)
    assert all(f"| {row.name} |" in text for row in result.rows)
    png, svg = plot_kv(result, tmp_path / "kv")
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = svg.read_text()
    assert "first_last" in drawn and "snapkv" in drawn
    first = svg.read_bytes()
    plot_kv(result, tmp_path / "kv")
    assert svg.read_bytes() == first


def test_a_result_without_policies_has_no_picture(result, tmp_path):
    with pytest.raises(PdtrimError):
        plot_kv(Result(provenance=result.provenance, rows=result.rows[:1]), tmp_path / "kv")
