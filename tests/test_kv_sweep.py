"""The sweep of KV policies, and its picture."""

import pytest

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.handover import loopback_bytes, measured_plan_bytes
from pdtrim.evaluate.kv_sweep import SweepConfig, markdown, sweep
from pdtrim.evaluate.result import Result
from pdtrim.methods.dense import dense_plan
from pdtrim.models.loading import load_model
from pdtrim.report.plot import plot_kv
from pdtrim.stage.cost import Lengths


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def result(model, tiny_text):
    config = SweepConfig(
        text=str(tiny_text),
        calibration=str(tiny_text),
        lengths=Lengths(prompt=129, continuation=8),
        limit=2,
        probes=0,
        budgets=(3.0,),
    )
    return sweep(model, config)


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


def test_bytes_are_those_of_two_processes(model, tiny_text):
    from pdtrim.calibration.batches import text_batch

    batch = text_batch(model, str(tiny_text), prompt_tokens=20, continuation_tokens=2, limit=2)
    plan = dense_plan(model)
    counted = loopback_bytes(plan, model, batch)
    assert counted.frame == measured_plan_bytes(plan, model, batch)


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
