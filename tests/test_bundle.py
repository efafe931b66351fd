"""A plan with its weights: from the command line and from Python, in memory and on disk."""

import pytest
import torch
from typer.testing import CliRunner

import pdtrim
from helpers import make_plan, random_batch, tiny_model
from pdtrim.bundle import TrimPlan
from pdtrim.calibration import CalibrationConfig, load_calibration
from pdtrim.cli import app
from pdtrim.errors import PlanError
from pdtrim.methods import PDTrim, Target
from pdtrim.plan import Gates
from pdtrim.stage.forward import forward

SMALL = {"prompt_tokens": 24, "continuation_tokens": 8}


@pytest.fixture(scope="module")
def trim():
    model = tiny_model()
    plan = make_plan(model, Gates.removing(4, prefill={1}))
    noise = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    return model, TrimPlan.of(plan, {"decode": {2: {"mlp.down_proj.weight": noise}}})


def test_the_command_and_python_make_the_same_plan_by_default(tiny_folder, tiny_text, tmp_path):
    words = ["plan", tiny_folder, "-o", tmp_path / "cli.json", "--prefill-remove", "2"]
    words += ["--decode-remove", "1", "--calibration", tiny_text]
    words += ["--prompt-tokens", "24", "--continuation-tokens", "8"]
    done = CliRunner().invoke(app, [*map(str, words), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    model = pdtrim.load_model(str(tiny_folder), dtype="float32")
    text = load_calibration(model, CalibrationConfig(source=str(tiny_text), **SMALL))
    made = PDTrim().plan(model, text, Target(prefill_remove=2, decode_remove=1))
    assert made.plan.provenance.repair != "none"
    assert made.plan.digest == TrimPlan.open(tmp_path / "cli.json").plan.digest


def test_weights_are_the_same_in_memory_on_disk_and_exported(trim, tmp_path):
    model, made = trim
    made.export(model, tmp_path / "pair")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair"]
    saved = made.save(tmp_path / "a.json")
    again = saved.save(tmp_path / "deep" / "b.json")  # from file to file
    batch = random_batch(model)
    logits = []
    for plan in (made, saved, again, TrimPlan.open(tmp_path / "pair")):
        assert plan.plan.digest == made.plan.digest
        with torch.no_grad():
            logits.append(forward(plan.pair(model), batch, plan.plan.gates))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0])


def test_another_model_and_what_a_pair_folder_cannot_do_are_refused(trim, tmp_path):
    model, made = trim
    with pytest.raises(PlanError, match="is not the model of this plan"):
        made.pair(tiny_model(seed=1))
    exported = TrimPlan.open(made.export(model, tmp_path / "pair"))
    for use in (lambda: exported.save(tmp_path / "x.json"), lambda: exported.blocks(model)):
        with pytest.raises(PlanError, match="is an exported pair"):
            use()
