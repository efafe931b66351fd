"""The comparison: what is kept on disk, and the outputs."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from compare_runs import Runner, config_of
from helpers import make_plan, tiny_model
from pdtrim.bench.stages import StageRatios
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.records import Comparison, PairFacts
from pdtrim.evaluate.compare.run import compare, measure_part
from pdtrim.keep.lock import lock
from pdtrim.keep.store import claim, once
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, PrunePlan
from pdtrim.report.compare import markdown, plot_compare, table
from pdtrim.words import RECALL


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


@pytest.fixture(scope="module")
def compared(model, tiny_text, tmp_path_factory):
    """A whole comparison, its folder, its settings, and what ran its tasks."""
    folder = tmp_path_factory.mktemp("compare")
    config, runner = config_of(tiny_text, seeds=(0, 1)), Runner()
    return compare(model, config, folder, run=runner), folder, config, runner


# what is kept


def test_a_file_is_made_once_and_only_by_its_settings(tmp_path):
    path = tmp_path / "deep" / "x.json"
    assert once(path, PairFacts, {"a": 1}, lambda: facts(0.5)) == facts(0.5)
    assert once(path, PairFacts, {"a": 1}, lambda: pytest.fail("made again")) == facts(0.5)
    with pytest.raises(PdtrimError, match=r"made with a 1, now it is 2: delete it"):
        once(path, PairFacts, {"a": 2}, lambda: pytest.fail("made again"))
    for text in ("{", "[]", "{}", '{"settings": {"a": 1}, "value": {}}', '{"settings": {"a": 1}}'):
        path.write_text(text)
        with pytest.raises(PdtrimError, match="damaged or not a kept measurement"):
            once(path, PairFacts, {"a": 1}, lambda: pytest.fail("made again"))
    claim(tmp_path / "claim", {"a": 1})
    claim(tmp_path / "claim", {"a": 1})
    with pytest.raises(PdtrimError, match="made with a 1"):
        claim(tmp_path / "claim", {"a": 1.5})


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_an_interruption_while_measuring_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "x.json", PairFacts, {}, interrupted)
    assert not list(tmp_path.iterdir())


def facts(removed, kv_bytes=100.0):
    return PairFacts(prefill_removed=removed, decode_removed=removed, kv_bytes=kv_bytes)


def test_every_system_and_seed_has_its_plan_and_cells(compared):
    result, folder, _, runner = compared
    names = [row.name for row in result.rows]
    assert names == [
        "dense",
        "pdtrim",
        "shortgpt",
        "pdtrim-even",
        "pdtrim-tilted",
        "pdtrim-prefill",
    ]
    assert all(row.failed is None for row in result.rows)
    assert len(runner.calls) == 2 * (1 + 5 * 2)  # tasks, for dense and for each system and seed
    for row in result.rows[1:]:
        assert [run.seed for run in row.runs] == [0, 1]
        assert len({run.calibration_hash for run in row.runs}) == 2
        for run in row.runs:
            plan = PrunePlan.load(folder / "plans" / f"{row.name}-seed{run.seed}.json")
            assert (plan.digest, plan.provenance.seed) == (run.plan_digest, run.seed)
            own = row.name != "shortgpt"  # which minimises no KL
            assert plan.provenance.recall_weight == (RECALL if own else 0), "as plan's own default"
            cells = folder / "cells" / f"{row.name}-seed{run.seed}"
            assert {path.name for path in cells.iterdir()} == {
                *("piqa.json", "wikitext.json", "_pair.json")
            }
    assert not list((folder / "plans").glob("*.search.jsonl"))


def test_rows_hold_what_their_plans_save(compared, model):
    result = compared[0]
    rows = {row.name: row for row in result.rows}
    assert (rows["dense"].prefill_removed, rows["dense"].kv_compression) == (0, 1)
    for name in ("pdtrim", "shortgpt"):  # one block of four, whose KV does not travel
        assert rows[name].prefill_removed >= 0.25 and rows[name].decode_removed >= 0.25
        assert rows[name].kv_compression > 1.2
    assert rows["pdtrim-prefill"].decode_removed == 0
    assert rows["pdtrim-prefill"].prefill_removed >= 0.5
    assert rows["pdtrim-prefill"].kv_compression == 1
    assert rows["shortgpt"].search_block_tokens > 0 and rows["shortgpt"].wall_s > 0
    assert rows["pdtrim"].asked_prefill == 0.25 and rows["dense"].asked_prefill is None


def test_what_is_there_is_not_made_again(compared, model, tmp_path):
    result, folder, config, _ = compared
    again = Runner()
    assert compare(model, config, folder, run=again) == result
    assert again.calls == []
    more = compare(model, replace(config, tasks=("piqa", "wikitext", "rte")), folder, run=again)
    assert set(again.calls) == {"rte"} and len(again.calls) == 11
    assert [info.task for info in more.tasks] == ["piqa", "wikitext", "rte"]


def test_parts_made_side_by_side_are_the_whole(compared, model, tmp_path):
    result, _, config, _ = compared
    measure_part(model, config, tmp_path, ["dense"], run=Runner())
    assert {path.name for path in (tmp_path / "text").iterdir()} == {
        "seed0.safetensors",
        "seed1.safetensors",
    }
    one = Runner()
    measure_part(model, config, tmp_path, ["shortgpt-seed1"], run=one)
    assert one.calls == ["piqa", "wikitext"]
    assert [path.name for path in (tmp_path / "plans").glob("*seed?.json")] == [
        "shortgpt-seed1.json"
    ]
    rest = ["shortgpt", "pdtrim", "pdtrim-even", "pdtrim-tilted", "pdtrim-prefill"]
    measure_part(model, config, tmp_path, rest, run=Runner())
    assert not (tmp_path / "result.json").exists()
    again = Runner()
    whole = compare(model, config, tmp_path, run=again)
    assert again.calls == []
    assert [row.scores for row in whole.rows] == [row.scores for row in result.rows]
    for name in ("sleb", "shortgpt-seed2", "dense-seed0"):
        with pytest.raises(PdtrimError, match=f"--only '{name}': give dense, or a system such as"):
            measure_part(model, config, tmp_path, [name], run=Runner())


def test_the_first_seed_of_a_system_is_timed(compared, model, tmp_path, monkeypatch):
    _, folder, config, _ = compared
    times = StageRatios(prefill=0.5, decode=0.9, dense_prefill_s=1.0, dense_decode_s=2.0)
    monkeypatch.setattr(
        "pdtrim.evaluate.compare.measure.stage_times", lambda *args, **options: times
    )
    shutil.copytree(folder, tmp_path / "copy")
    result = compare(model, replace(config, latency=True), tmp_path / "copy", run=Runner())
    assert [run.times for run in result.dense.runs] == [None]
    for row in result.rows[1:]:
        assert [run.times for run in row.runs] == [times, None]
        assert (row.prefill_time, row.decode_time) == (0.5, 0.9)


def test_other_settings_are_refused_in_one_line(compared, model):
    _, folder, config, _ = compared
    with pytest.raises(PdtrimError, match=r"piqa\.json was made with limit null, now it is 5"):
        compare(model, replace(config, limit=5), folder, run=Runner())
    with pytest.raises(PdtrimError, match=r"made with batch_tokens 8192, now it is 64"):
        compare(model, replace(config, batch_tokens=64), folder, run=Runner())
    with pytest.raises(PdtrimError, match=r"made with target\.\w+_share 0\.\d+, now it is"):
        compare(model, replace(config, remove=0.5), folder, run=Runner())
    with pytest.raises(PdtrimError, match=r"made with text\.\w+ \d+, now it is"):
        compare(model, replace(config, sequences=3), folder, run=Runner())


def test_items_that_have_changed_are_refused(model, tiny_text, tmp_path):
    items = tmp_path / "data" / "piqa" / "test.jsonl"
    items.parent.mkdir(parents=True)
    items.write_text("{}\n")
    config = config_of(tiny_text, methods=(), tasks=("piqa",), data=str(tmp_path / "data"))
    compare(model, config, tmp_path / "out", run=Runner())
    items.write_text("{}\n{}\n")
    with pytest.raises(PdtrimError, match=r"piqa\.json was made with files\.test\.jsonl"):
        compare(model, config, tmp_path / "out", run=Runner())


def test_two_processes_do_not_make_the_same_part(model, tiny_text, tmp_path):
    config = config_of(tiny_text, methods=("shortgpt",), tasks=("piqa",))
    (tmp_path / "cells").mkdir()
    with lock(tmp_path / "cells" / ".shortgpt-seed0.lock", "it"):
        measure_part(model, config, tmp_path, ["dense"], run=Runner())
        with pytest.raises(PdtrimError, match=r"shortgpt-seed0 in .* is being written by process"):
            measure_part(model, config, tmp_path, ["shortgpt"], run=Runner())
    measure_part(model, config, tmp_path, ["shortgpt"], run=Runner())
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == ["dense", "shortgpt-seed0"]


def test_an_interruption_loses_the_cell_in_work_only(model, tiny_text, tmp_path):
    config = config_of(tiny_text, methods=("shortgpt",), tasks=("piqa", "rte", "cb"))
    first, second = Runner(), Runner()
    first.stop_at = 4  # in the second cell of the system
    with pytest.raises(KeyboardInterrupt):
        compare(model, config, tmp_path, run=first)
    compare(model, config, tmp_path, run=second)
    assert second.calls == ["rte", "cb"]


def test_an_interrupted_search_goes_on(compared, model, tmp_path, monkeypatch):
    result, _, config, _ = compared
    config = replace(config, methods=("pdtrim",), seeds=(0,))
    journal = tmp_path / "plans" / "pdtrim-seed0.search.jsonl"
    kept = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("pdtrim.methods.pdtrim.best_repair", interrupted)
            with pytest.raises(KeyboardInterrupt):
                compare(model, config, tmp_path, run=Runner())
        kept.append((journal.stat().st_mtime_ns, journal.read_text()))
    assert kept[0] == kept[1]  # the second search measured nothing
    assert len(kept[0][1].splitlines()) > 2
    again = compare(model, config, tmp_path, run=Runner())
    assert not journal.exists()
    assert again.rows[1].runs[0].plan_digest == result.rows[1].runs[0].plan_digest


def test_a_method_that_refuses_is_a_row_with_its_reason(model, tiny_text, tmp_path):
    # shortened-taylor protects 6 blocks, and the model has 4
    config = config_of(tiny_text, methods=("shortgpt", "shortened-taylor"))
    result = compare(model, config, tmp_path, run=Runner())
    _, _, failed = result.rows
    assert failed.name == "shortened-taylor" and "\n" not in failed.failed
    assert failed.average is None and failed.scores == {}
    assert result.best_baseline == "shortgpt"
    text = markdown(result)
    assert f"| shortened-taylor | not made: {failed.failed} |" in text
    plot_compare(result, tmp_path / "compare.png")


def test_given_plans_are_rows_of_their_own(model, tiny_text, tmp_path):
    gates = Gates.removing(model.num_layers, prefill={1}, decode={1, 2})
    plan = make_plan(model, gates)
    trained = plan.provenance.model_copy(update={"distillation": "some", "seed": 3})
    plan.model_copy(update={"provenance": trained}).save(tmp_path / "mine.json")
    config = config_of(tiny_text, methods=("shortgpt",), rows=(("mine", tmp_path / "mine.json"),))
    result = compare(model, config, tmp_path / "out", run=Runner())
    row = result.rows[-1]
    assert (row.name, row.trained, row.runs[0].seed) == ("mine", True, 3)
    assert row.prefill_removed < row.decode_removed
    assert row.to_baseline is not None and row.asked_prefill is None
    assert "## Disaggregated, trained" in markdown(result)
    other = tiny_model(seed=1)
    other.tokenizer = model.tokenizer
    with pytest.raises(PdtrimError, match="not the model of this plan"):
        compare(other, config, tmp_path / "other", run=Runner())


def test_times_are_kept_with_the_cells(model, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr("pdtrim.evaluate.compare.measure.TIMED_PROMPT", 8)
    monkeypatch.setattr("pdtrim.evaluate.compare.measure.TIMED_TOKENS", 2)
    config = config_of(tiny_text, methods=("shortgpt",), latency=True)
    result = compare(model, config, tmp_path, run=Runner())
    row = result.rows[1]
    assert row.prefill_time > 0 and row.decode_time > 0 and row.runs[0].times
    assert compare(model, config, tmp_path, run=Runner()) == result
    without = compare(model, replace(config, latency=False), tmp_path, run=Runner())
    assert without.rows[1].prefill_time is None


# the outputs


def test_the_result_file_is_read_back(compared, tmp_path):
    result = compared[0]
    result.save(tmp_path / "result.json")
    assert Comparison.load(tmp_path / "result.json") == result
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["schema"] == "pdtrim.compare/1"
    assert data["versions"]["pdtrim"] and data["settings"]["seeds"] == [0, 1]
    for text in ("{", "{}", '{"schema": "pdtrim.result/1"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PdtrimError):
            Comparison.load(tmp_path / "bad.json")
    with pytest.raises(PdtrimError, match="no file at"):
        Comparison.load(tmp_path / "none.json")


def test_the_tables_have_every_system_in_its_part(compared):
    result = compared[0]
    text = markdown(result)
    unified, apart = text.split("## Disaggregated, training-free")
    assert "| shortgpt |" in unified and "| shortgpt |" not in apart
    assert "| pdtrim-tilted |" in apart and "| pdtrim-tilted |" not in unified
    assert unified.count("| dense |") == apart.count("| dense |") == 1
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    row = next(row for row in result.rows if row.name == "pdtrim-even")
    low, high = (100 * x for x in row.spread)
    assert f"{100 * row.average.mean:.1f} ({low:.1f} .. {high:.1f})" in text
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(result))
    shown = console.export_text()
    assert all(row.name in shown for row in result.rows)


def test_the_picture_is_written(compared, tmp_path, monkeypatch, recwarn):
    pytest.importorskip("matplotlib")
    result = compared[0]
    path = plot_compare(result, tmp_path / "new" / "compare.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    with pytest.raises(PdtrimError, match="nothing to plot"):
        plot_compare(result.model_copy(update={"rows": result.rows[:1]}), tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PdtrimError, match=r"pdtrim\[plot\]"):
        plot_compare(result, tmp_path / "x.png")
