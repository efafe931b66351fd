"""The comparison: what is compared, and the command."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from compare_runs import config_of
from pdtrim.bundle import TrimPlan
from pdtrim.cli import app
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.records import Comparison
from pdtrim.evaluate.compare.run import listed_systems
from pdtrim.evaluate.compare.systems import (
    chosen_methods,
    given_systems,
    planned_systems,
)
from pdtrim.methods import METHODS
from pdtrim.models.loading import load_model
from pdtrim.report.compare import markdown


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


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
    assert planned_systems(("sleb",), 0.2)[0].target(0).repair is None  # its own: none
    assert METHODS["sleb"].default_repair == "none"
    assert planned_systems(("shortgpt+pdtrim",), 0.2)[0].target(0).repair == "best"


def test_methods_are_chosen_in_one_order():
    assert chosen_methods(("all",)) == tuple(METHODS)
    assert chosen_methods(("none",)) == ()
    assert chosen_methods(("sleb", "pdtrim")) == ("pdtrim", "sleb")
    with pytest.raises(PdtrimError, match="unknown method 'magic'"):
        chosen_methods(("sleb", "magic"))


def test_given_plans_tell_their_setting_and_training(model, tmp_path):
    def plan(name, **provenance):
        plain = TrimPlan.dense(model).plan
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
    TrimPlan.dense(model).plan.save(tmp_path / "plan.json")
    for name, problem in (("shortgpt", "two systems"), ("dense", "two systems"), ("a/b", "no '/'")):
        with pytest.raises(PdtrimError, match=problem):
            listed_systems(config_of(tiny_text, rows=((name, tmp_path / "plan.json"),)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"limit": 1}, "at least 2 items"),
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("magic",)}, "unknown task 'magic'"),
        ({"shots": -1}, "shots must be 0 or more"),
        ({"tasks": ("piqa", "piqa")}, "each once"),
        ({"seeds": ()}, "at least one seed"),
        ({"recall": -0.1}, "--recall -0.1 must be a number of at least 0"),
    ],
)
def test_settings_that_give_no_comparison_are_refused(changes, problem, tiny_text):
    with pytest.raises(PdtrimError, match=problem):
        config_of(tiny_text, **changes)


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
        (["--row", "plan.json"], "give NAME=FILE"),
        (["--row", "x=none.json"], "no plan file at none.json"),
        (["--remove", "2"], "between 0 and 1"),
    ],
)
def test_the_verbs_mistakes_do_not_wait_for_the_model(words, problem, tmp_path):
    done = CliRunner().invoke(app, ["compare", "no/such/model", "-o", str(tmp_path), *words])
    assert isinstance(done.exception, PdtrimError) and problem in str(done.exception)
