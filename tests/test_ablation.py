"""The ablation: every row on a tiny model, the table, and going on after an interruption."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from pdtrim.cli import app
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.ablation import Cell, RowResult, ablate, markdown
from pdtrim.evaluate.configs import AblationConfig
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates


@pytest.fixture(scope="module")
def config(tiny_text):
    return AblationConfig(
        text=(str(tiny_text),),
        calibration=str(tiny_text),
        seeds=(0, 1),
        prompt_tokens=24,
        continuation_tokens=8,
        sequences=4,
        limit=2,
        budget=12,
        prefill_remove=(1,),
        unified_remove=1,
        decode_remove=1,
        train_steps=2,
        fit_sequences=4,
    )


@pytest.fixture(scope="module")
def measured(tiny_folder, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    model = load_model(str(tiny_folder), dtype="float32")
    return model, folder, ablate(model, config, folder)


def test_every_question_has_its_rows_with_every_seed(measured):
    _, _, cells = measured
    names = {(cell.group.split(",")[0], cell.name) for cell in cells}
    assert {n for g, n in names if g == "search"} == {
        *("one_shot", "greedy", "evolution", "anneal", "hybrid")
    }
    assert {n for g, n in names if g == "repair"} == {
        *("scalar", "diagonal", "linear", "outputs", "kv", "linear+kv", "outputs+kv", "best")
    }
    assert {n for g, n in names if g == "mode"} == {"subset", "projected"}
    assert {n for g, n in names if g == "grain"} == {"block", "part"}
    assert len([n for g, n in names if g == "paper's rule"]) == 3
    assert len(cells) == 2 * len({(c.group, c.name) for c in cells})
    assert all(len(cell.kl) == 1 and min(cell.kl.values()) >= -1e-4 for cell in cells)


def test_searches_keep_to_the_same_budget(measured, config):
    _, _, cells = measured
    searched = [c for c in cells if c.group.startswith("search")]
    dense = 4 * 4 * (23 + 8)  # sequences x layers x tokens; the last block of prefill is dead work
    # the re-ranking on half as much text again is beside the budget
    assert all(0 < c.block_tokens <= (config.budget + 4) * dense for c in searched)
    unified = next(c for c in searched if "unified" in c.group)
    prefill, decode = unified.removed.removeprefix("prefill ").split("; decode ")
    assert set(decode.split()) <= set(prefill.split())


def test_what_is_on_disk_is_not_measured_again(measured, config, monkeypatch):
    model, folder, cells = measured
    monkeypatch.setattr("pdtrim.evaluate.ablation.measure", lambda *_: pytest.fail("measured"))
    assert ablate(model, config, folder) == cells
    path = next((folder / "cells").glob("*hybrid*"))
    text = path.read_text()
    path.write_text("{}")
    with pytest.raises(PdtrimError, match=r"hybrid\.json is damaged"):
        ablate(model, config, folder)
    path.write_text(text)


def test_cells_of_another_model_text_or_number_are_refused(
    measured, config, tiny_folder, tiny_text, tmp_path
):
    model, folder, cells = measured
    other_text = tmp_path / "words.txt"
    other_text.write_text(tiny_text.read_text()[5:])
    other_model = load_model(str(tiny_folder), dtype="float32")
    with torch.no_grad():
        other_model.network.model.norm.weight[0] += 1
    for words, changed, changes in (
        ("limit 2, now it is 1", model, {"limit": 1}),
        ("model ", other_model, {}),
        ("dtype ", load_model(str(tiny_folder)), {}),
        (r"texts\.", model, {"text": (str(other_text),)}),
        ("calibration ", model, {"calibration": "self"}),
        ("budget 12, now it is 13", model, {"budget": 13}),
        ("prompt_tokens 24, now it is 25", model, {"prompt_tokens": 25}),
    ):
        with pytest.raises(PdtrimError, match=rf"settings\.json was made with {words}") as told:
            ablate(changed, replace(config, **changes), folder)
        assert "\n" not in str(told.value)
    one = replace(config, seeds=(1,), only=("mode",))
    assert ablate(model, one, folder) == [c for c in cells if c.seed == 1 and "mode" in c.group]


def test_a_calibration_text_that_has_changed_is_refused(tiny_folder, config, tiny_text, tmp_path):
    model = load_model(str(tiny_folder), dtype="float32")
    text = tmp_path / "words.txt"
    text.write_text(tiny_text.read_text())
    config = replace(config, calibration=str(text), seeds=(0,), only=("mode",))
    ablate(model, config, tmp_path / "out")
    text.write_text(tiny_text.read_text() + " w1")
    with pytest.raises(PdtrimError, match="made with calibration_sha256"):
        ablate(model, config, tmp_path / "out")


def test_the_table_has_means_and_spreads():
    def cell(seed, kl):
        return Cell(
            group="g",
            name="n",
            seed=seed,
            kl={"t": kl},
            block_tokens=2_000_000,
            seconds=3,
            removed="",
        )

    assert "| g | n | 0.2000 ± 0.1000 | 2.0 M | 3 |" in markdown(
        [cell(0, 0.1), cell(1, 0.2), cell(2, 0.3)]
    )
    assert "| 0.1000 |" in markdown([cell(0, 0.1)])


def test_removed_parts_have_names():
    gates = Gates(
        prefill_attention=("full", "kv", "full"),
        prefill_mlp=(True, False, True),
        decode_attention=(True, True, False),
        decode_mlp=(False, True, True),
    )
    assert RowResult(gates=gates, blocks={}).removed == "prefill 1; decode 0m 2a"


def test_the_verb_writes_result_and_table(measured, tiny_folder, tiny_text, tmp_path):
    words = ["ablate", str(tiny_folder), "--text", str(tiny_text), "-o", str(tmp_path)]
    words += ["--calibration", str(tiny_text), "--prompt-tokens", "24", "--dtype", "float32"]
    words += ["--continuation-tokens", "8", "--sequences", "4", "--limit", "2", "--budget", "12"]
    words += ["--prefill-remove", "1", "--unified-remove", "1", "--decode-remove", "1"]
    words += ["--train-steps", "1", "--fit-sequences", "4", "--seeds", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert f"| {cells[0]['group']} | {cells[0]['name']} |" in (tmp_path / "table.md").read_text()
    assert CliRunner().invoke(app, [*words[:-1], "x"]).exit_code != 0
