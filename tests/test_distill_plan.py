"""Training a plan's decode blocks: merges by the rule, the new plan and its checkpoints."""

import json

import pytest
import torch
from typer.testing import CliRunner

from helpers import make_plan, pair_of, random_batch, tiny_model, trim_of, trimmed, with_files
from pdtrim.cli import app
from pdtrim.distill.job import DistillConfig
from pdtrim.distill.merge import MergeConfig
from pdtrim.distill.plan import Training, pairs_of, train_plan, trained_plan, with_slot
from pdtrim.distill.sets import SetRule
from pdtrim.errors import PlanError
from pdtrim.evaluate.quality import measure_quality
from pdtrim.exported import load_pair
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.plan import Gates, LayerKV, PrunePlan, Width, Widths
from pdtrim.repair.apply import repair
from pdtrim.stage.forward import Trimmed

DISTIL = DistillConfig(
    which="pairs", steps=12, rows=4, learning_rate=3e-3, compute="float32", evaluate_every=4
)
MERGE = MergeConfig(steps=20, learning_rate=3e-3, compute="float32")
ANY_PAIR = SetRule(reading="pairs", threshold=-1.0)


@pytest.fixture(scope="module")
def setting():
    model = tiny_model("llama", layers=5)
    gates = Gates.removing(5, decode={2})
    plan = make_plan(model, gates, (LayerKV(),) * 5)
    text, held_out = (
        random_batch(model, rows=r, prompt=12, new=10, seed=s) for r, s in ((12, 1), (6, 2))
    )
    return model, plan, text, held_out


def kl(model, plan, folder, batch):
    variant = Trimmed(
        pair=pair_of(plan, model, folder), gates=plan.gates, policy=HandoverPolicy.of(plan)
    )
    return measure_quality(model, {"x": variant}, batch)["x"].kl


def test_the_rule_names_the_pairs(setting):
    model, plan, text, _ = setting
    assert pairs_of(plan, model, text, SetRule(reading="none")) == ()
    assert pairs_of(plan, model, text, SetRule(threshold=1.0)) == ()
    (pair,) = pairs_of(plan, model, text, ANY_PAIR)
    assert pair in {(1, 2), (2, 3)}


def test_a_merged_and_trained_plan_is_better_and_survives_export(setting, tmp_path):
    model, plan, text, held_out = setting
    config = Training(rule=ANY_PAIR, merging=MERGE, distillation=DISTIL)
    trained = train_plan(trim_of(plan), model, text, held_out, config)
    (merged,) = trained.merged
    assert set(trained.blocks["decode"]) == {merged.layer} and trained.blocks["prefill"] == {}
    assert trained.gates.decode_mlp[merged.layer] and trained.gates.blocks("decode") == 4
    made = trained_plan(plan, trained).save(tmp_path / "trained.json").plan
    assert made.replacements[0].merged == merged.merged
    assert made.provenance.distillation.startswith("pairs, 1 merged, 12 steps")
    assert kl(model, made, tmp_path, held_out) < 0.95 * kl(model, plan, None, held_out)
    loaded = PrunePlan.load(tmp_path / "trained.json")
    assert loaded.digest == made.digest != plan.digest
    pair, _ = load_pair(trim_of(loaded, tmp_path).export(model, tmp_path / "pair"))
    variant = Trimmed(pair=pair, gates=loaded.gates, policy=HandoverPolicy.of(loaded))
    exported = measure_quality(model, {"x": variant}, held_out)["x"].kl
    assert exported == pytest.approx(kl(model, made, tmp_path, held_out), abs=1e-5)


def test_distill_plan_starts_from_the_plans_repairs_and_keeps_prefills(setting, tmp_path):
    model, plan, text, held_out = setting
    gates = Gates.removing(5, prefill={1, 3}, decode={2})
    blocks = repair(model, trimmed(model, gates, HandoverPolicy.full(5)), text, "linear")
    assert blocks["prefill"] and blocks["decode"]
    repaired = with_files(plan.model_copy(update={"gates": gates}), blocks, tmp_path)
    config = Training(distillation=DISTIL.__class__(**{**vars(DISTIL), "which": "all"}))
    trained = train_plan(trim_of(repaired, tmp_path), model, text, held_out, config)
    before = trained.distilled.held_out_before
    assert before == pytest.approx(kl(model, repaired, tmp_path, held_out), abs=1e-4)
    assert trained.distilled.held_out_after < before
    for layer, weights in blocks["prefill"].items():
        for name, tensor in weights.items():
            assert torch.equal(trained.blocks["prefill"][layer][name], tensor)


def test_a_slot_moves_with_its_keys_and_values():
    gates = with_slot(Gates.removing(4, prefill={1}, decode={1}, mode="subset"), 1, 2)
    assert gates.decode_mlp == (True, True, False, True)
    assert gates.prefill_attention[1] == "kv", "decode reads this layer now"
    assert gates.prefill_attention[2] == "full", "prefill goes on running what it ran"


def test_the_verb_writes_a_plan_that_evaluates(tiny_folder, tiny_text, tmp_path):
    run = CliRunner().invoke
    plan = str(tmp_path / "plan.json")
    words = ["plan", str(tiny_folder), "-o", plan, "--calibration", str(tiny_text)]
    words += ["--prefill-remove", "1", "--decode-remove", "1", "--prompt-tokens", "24"]
    words += ["--continuation-tokens", "8", "--sequences", "4", "--dtype", "float32"]
    done = run(app, words)
    assert done.exit_code == 0, done.output
    out = str(tmp_path / "trained.json")
    words = ["distill", plan, "-o", out, "--text", str(tiny_text), "--steps", "3", "--rows", "2"]
    words += ["--prompt-tokens", "24", "--continuation-tokens", "8", "--sequences", "6"]
    words += ["--held-out", "2", "--dtype", "float32", "--json"]
    done = run(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["held_out_kl"]["after"] <= found["held_out_kl"]["before"]
    assert PrunePlan.load(out).digest == found["digest"]
    assert not list(tmp_path.glob("*.training*"))
    assert run(app, ["distill", plan, "-o", plan, "--text", str(tiny_text)]).exit_code != 0


def test_narrower_blocks_are_refused(setting):
    model, plan, text, rest = setting
    width = Width(groups=(0,), neurons="f" * (model.config.intermediate_size // 4))
    row = (width, *[None] * (model.num_layers - 1))
    narrow = plan.model_copy(update={"widths": Widths(prefill=row, decode=row)})
    with pytest.raises(PlanError, match="distil a plan without narrower blocks"):
        train_plan(trim_of(narrow), model, text, rest, Training())
