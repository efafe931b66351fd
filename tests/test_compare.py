"""The comparison: what is compared, what is kept on disk, the outputs, and the command."""

import hashlib
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from helpers import make_plan, tiny_model
from pdtrim.cli import app
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.measure import CompareConfig
from pdtrim.evaluate.compare.records import Comparison, PairFacts
from pdtrim.evaluate.compare.run import compare, listed
from pdtrim.evaluate.compare.store import claim, once
from pdtrim.evaluate.compare.systems import (
    chosen_methods,
    given_systems,
    planned_systems,
)
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.methods import METHODS
from pdtrim.methods.dense import dense_plan
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, PrunePlan
from pdtrim.report.compare import markdown, plot_compare, table
from pdtrim.stage.cost import Lengths

ITEMS = 8


def scores_of(task="piqa", values=(0.0, 1.0), *, main="acc", ppl=20.0, items="h"):
    return TaskScores(
        task=task,
        version="1",
        source="folder",
        shots=0,
        count=len(values),
        metrics={main: ppl if main == "ppl" else sum(values) / len(values)},
        items={main: tuple(values)},
        items_hash=items,
        main=main,
    )


class Runner:
    """Scores made of the variant's gates, without running anything; it counts its calls."""

    def __init__(self):
        self.calls = []
        self.stop_at = None

    def __call__(self, variant, task, config, *, progress):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(task)
        text = f"{task} {variant.gates}"
        right = np.random.default_rng(list(hashlib.sha256(text.encode()).digest())).random(ITEMS)
        main = "ppl" if task == "wikitext" else "acc"
        return scores_of(task, tuple((right < 0.5).astype(float)), main=main)


def config_of(text, **changes):
    values = {
        "remove": 0.25,
        "methods": ("pdtrim", "shortgpt"),
        "tasks": ("piqa", "wikitext"),
        "data": "hub",
        "calibration": str(text),
        "sequences": 2,
        "lengths": Lengths(prompt=12, continuation=6),
        "latency": False,
    }
    return CompareConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


@pytest.fixture(scope="module")
def compared(model, tiny_text, tmp_path_factory):
    """A whole comparison, its folder, its settings, and what ran its tasks."""
    folder = tmp_path_factory.mktemp("compare")
    config, runner = config_of(tiny_text, seeds=(0, 1)), Runner()
    return compare(model, config, folder, run=runner), folder, config, runner


# what is compared


def test_every_system_removes_the_share_in_the_mean_of_its_stages():
    systems = planned_systems(tuple(METHODS), 0.3)
    for system in systems:
        assert (system.prefill_share + system.decode_share) / 2 == pytest.approx(0.3)
    shares = {s.name: (round(s.prefill_share, 3), round(s.decode_share, 3)) for s in systems}
    assert shares["pdtrim"] == shares["shortgpt"] == shares["pdtrim-even"] == (0.3, 0.3)
    assert shares["pdtrim-tilted"] == (0.45, 0.15)
    assert shares["pdtrim-prefill"] == (0.6, 0.0)
    assert shares["paper"] == (0.2, 0.4)
    modes = {s.name: (s.setting, s.mode) for s in systems}
    assert modes["pdtrim"] == modes["sleb"] == ("unified", "unified")
    assert modes["pdtrim-even"] == ("disaggregated", "projected")
    assert modes["paper"] == ("disaggregated", "subset")
    assert {s.method for s in systems} == set(METHODS)


def test_a_split_that_no_stage_can_bear_is_left_out():
    names = {system.name for system in planned_systems(("pdtrim", "paper"), 0.4)}
    assert "pdtrim-prefill" not in names and "pdtrim-tilted" in names  # 0.8 of prefill
    names = {system.name for system in planned_systems(("pdtrim", "paper"), 0.76)}
    assert names == {"pdtrim", "pdtrim-even"}  # else 1.14 of prefill, 1.01 of decode
    for share in (0, 1, -0.1, 1.5):
        with pytest.raises(PdtrimError, match="between 0 and 1"):
            planned_systems(("pdtrim",), share)


def test_a_system_asks_its_method_for_shares_of_parameters():
    (unified, *_) = planned_systems(("pdtrim",), 0.2)
    target = unified.target(7)
    assert (target.metric, target.mode, target.seed) == ("parameters", "unified", 7)
    assert (target.search, target.repair) == ("hybrid", "best")
    assert (target.prefill_share, target.decode_share) == (0.2, 0.2)
    assert planned_systems(("sleb",), 0.2)[0].target(0).repair == "none"
    assert planned_systems(("shortgpt+pdtrim",), 0.2)[0].target(0).repair == "best"


def test_methods_are_chosen_in_one_order():
    assert chosen_methods("all") == tuple(METHODS)
    assert chosen_methods("none") == ()
    assert chosen_methods("sleb, pdtrim") == ("pdtrim", "sleb")
    with pytest.raises(PdtrimError, match="unknown method 'magic'"):
        chosen_methods("sleb,magic")


def test_given_plans_tell_their_setting_and_training(model, tmp_path):
    def plan(name, **provenance):
        plain = dense_plan(model)
        made = plain.provenance.model_copy(update=provenance)
        plain.model_copy(update={"provenance": made}).save(tmp_path / name)
        return tmp_path / name

    rows = [
        ("a", plan("a0", method="sleb", mode="unified", seed=0)),
        ("a", plan("a1", method="sleb", mode="unified", seed=1)),
        ("b", plan("b", method="pdtrim", distillation="200 steps")),
    ]
    a, b = given_systems(rows)
    assert (a.name, a.method, a.setting, a.trained) == ("a", "sleb", "unified", False)
    assert list(a.given) == [0, 1] and not a.is_baseline
    assert (b.setting, b.trained, list(b.given)) == ("disaggregated", True, [0])
    with pytest.raises(PdtrimError, match="two plans of seed 0"):
        given_systems([rows[0], rows[0]])
    with pytest.raises(PdtrimError, match="different kinds"):
        given_systems([rows[0], ("a", rows[2][1])])


def test_names_are_told_apart(model, tiny_text, tmp_path):
    dense_plan(model).save(tmp_path / "plan.json")
    for name, problem in (("shortgpt", "two systems"), ("dense", "two systems"), ("a/b", "no '/'")):
        with pytest.raises(PdtrimError, match=problem):
            listed(config_of(tiny_text, rows=((name, tmp_path / "plan.json"),)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"limit": 1}, "at least 2 items"),
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("magic",)}, "unknown task 'magic'"),
        ({"shots": -1}, "shots must be 0 or more"),
        ({"tasks": ("piqa", "piqa")}, "each once"),
        ({"seeds": ()}, "at least one seed"),
    ],
)
def test_settings_that_give_no_comparison_are_refused(changes, problem, tiny_text):
    with pytest.raises(PdtrimError, match=problem):
        config_of(tiny_text, **changes)


# what is kept


def test_a_file_is_made_once_and_only_by_its_settings(tmp_path):
    path = tmp_path / "deep" / "x.json"
    assert once(path, PairFacts, {"a": 1}, lambda: facts(0.5)) == facts(0.5)
    assert once(path, PairFacts, {"a": 1}, lambda: pytest.fail("made again")) == facts(0.5)
    with pytest.raises(PdtrimError, match=r"made with a 1, now it is 2: delete it"):
        once(path, PairFacts, {"a": 2}, lambda: pytest.fail("made again"))
    for text in ("{", "[]", "{}", '{"settings": {"a": 1}, "value": {}}', '{"settings": {"a": 1}}'):
        path.write_text(text)
        with pytest.raises(PdtrimError, match="not a file of a comparison"):
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


def test_other_settings_are_refused_in_one_line(compared, model):
    _, folder, config, _ = compared
    with pytest.raises(PdtrimError, match=r"piqa\.json was made with limit null, now it is 5"):
        compare(model, replace(config, limit=5), folder, run=Runner())
    with pytest.raises(PdtrimError, match=r"made with target\.\w+_share 0\.\d+, now it is"):
        compare(model, replace(config, remove=0.5), folder, run=Runner())
    with pytest.raises(PdtrimError, match=r"made with text\.\w+ \d+, now it is"):
        compare(model, replace(config, sequences=3), folder, run=Runner())


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
    with pytest.raises(PdtrimError, match="no readable result"):
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


# the command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks of a few made-up items, in the layout of a data folder."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(0, 61, count))

    for task in ("piqa", "arc_easy"):
        rows = [
            {
                "id": str(i),
                "context": "",
                "question": words(6),
                "choices": [words(3), words(2)],
                "answer": int(rng.integers(2)),
            }
            for i in range(6)
        ]
        (folder / task).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / "test.jsonl").write_text(lines)
    return folder


def test_the_verb_compares_on_real_tasks(tiny_folder, tiny_text, data, tmp_path):
    pytest.importorskip("lm_eval")
    words = ["compare", str(tiny_folder), "--remove", "0.25", "--methods", "shortgpt,pdtrim"]
    words += ["--tasks", "piqa,arc_easy", "--data", str(data), "--limit", "5", "--seeds", "0"]
    words += ["--calibration", str(tiny_text), "--sequences", "2", "--prompt-tokens", "12"]
    words += ["--continuation-tokens", "6", "--dtype", "float32", "--no-latency"]
    words += ["-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    result = Comparison.load(tmp_path / "out" / "result.json")
    assert result.to_json() == json.loads(done.stdout)
    assert [info.count for info in result.tasks] == [5, 5]
    assert result.best_baseline == "shortgpt"
    assert all(row.average and row.failed is None for row in result.rows)
    scores = [tuple(row.scores.values()) for row in result.rows]
    assert len(set(scores)) > 1  # pruning changes something here
    assert (tmp_path / "out" / "compare.png").is_file()
    assert (tmp_path / "out" / "table.md").read_text() == markdown(result)
    plan = tmp_path / "out" / "plans" / "pdtrim-tilted-seed0.json"
    done = CliRunner().invoke(app, [*words, "--row", f"again={plan}"])
    assert done.exit_code == 0, done.output
    rows = {row.name: row for row in Comparison.load(tmp_path / "out" / "result.json").rows}
    assert rows["again"].scores == rows["pdtrim-tilted"].scores
    assert "again" in done.stdout and "wrote" in done.stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--tasks", "magic"], "unknown task 'magic'"),
        (["--seeds", "x"], "give numbers such as 0,1,2"),
        (["--row", "plan.json"], "give NAME=PLAN.json"),
        (["--row", "x=none.json"], "no plan file at none.json"),
        (["--remove", "2"], "between 0 and 1"),
    ],
)
def test_the_verbs_mistakes_do_not_wait_for_the_model(words, problem, tmp_path):
    done = CliRunner().invoke(app, ["compare", "no/such/model", "-o", str(tmp_path), *words])
    assert isinstance(done.exception, PdtrimError) and problem in str(done.exception)
