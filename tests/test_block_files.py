"""Replaced blocks: their files, the pair they make, its checkpoints, and what is refused."""

import hashlib
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from helpers import export, make_plan, pair_of, random_batch, tiny_model, trim_of, with_files
from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import text_batch
from pdtrim.cli import app
from pdtrim.errors import PlanError
from pdtrim.evaluate.configs import EvalConfig
from pdtrim.evaluate.handover import Ran, run_plan
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.run import evaluate_text
from pdtrim.exported import load_pair
from pdtrim.keep.files import CannotWrite
from pdtrim.models.block_files import FilesInFolder, save_blocks
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, PrunePlan
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Pair, Trimmed, forward

GATES = Gates.removing(4, prefill={1, 2}, decode={2})


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def new_weights(model, seed, *names):
    generator = torch.Generator().manual_seed(seed)
    block = model.block(0).module
    return {
        name: 0.2 * torch.randn(block.get_parameter(name).shape, generator=generator)
        for name in names
    }


def with_blocks(model, folder, blocks):
    plan = make_plan(model, GATES)
    merged = {("decode", 1): (1, 2)}
    return with_files(plan, blocks, folder, merged=merged)


def file_of(folder, layer=1):
    (found,) = (folder / "plan.blocks").glob(f"decode-{layer:02d}-*.safetensors")
    return found


def decode_plan(model, folder, seed=1):
    weights = new_weights(model, seed, "mlp.down_proj.weight", "self_attn.o_proj.weight")
    return with_blocks(model, folder, {"decode": {1: weights}})


def test_a_block_comes_back_as_it_was_written(model, tmp_path):
    weights = new_weights(model, 1, "mlp.down_proj.weight", "input_layernorm.weight")
    weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"].bfloat16()
    plan = with_blocks(model, tmp_path, {"decode": {1: weights, 3: weights}})
    assert [(r.layer, r.merged, r.weights) for r in plan.replacements] == [
        (layer, merged, file_of(tmp_path, layer).relative_to(tmp_path).as_posix())
        for layer, merged in ((1, (1, 2)), (3, (3,)))
    ]
    back = trim_of(plan, tmp_path).blocks(model)
    assert back["prefill"] == {} and set(back["decode"]) == {1, 3}
    for name, part in weights.items():
        assert torch.equal(back["decode"][1][name], part)
        assert back["decode"][1][name].dtype == part.dtype
    for name in ("../up", "..", ".", "", "/tmp"):
        with pytest.raises(PlanError, match="not a folder name"):
            save_blocks(plan, FilesInFolder(folder=tmp_path), tmp_path, name)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_only_the_named_stage_runs_the_new_weights(model, tmp_path, stage):
    weights = new_weights(model, 2, "mlp.down_proj.weight")
    pair = pair_of(with_blocks(model, tmp_path, {stage: {0: weights}}), model, tmp_path)
    changed, other = (
        (pair.prefill, pair.decode) if stage == "prefill" else (pair.decode, pair.prefill)
    )
    assert other is model
    assert torch.equal(
        changed.block(0).module.mlp.down_proj.weight, weights["mlp.down_proj.weight"]
    )
    batch = random_batch(model)
    with torch.no_grad():
        assert not torch.allclose(
            forward(pair, batch, GATES), forward(Pair.dense(model), batch, GATES), atol=1e-3
        )


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_an_exported_pair_computes_what_the_simulator_does(family, tmp_path):
    model, batch = tiny_model(family), random_batch(tiny_model(family))
    q, k, down = (
        f"{model.block(0).making(made).name}.weight" for made in ("queries", "keys", "mlp")
    )
    plan = with_blocks(
        model,
        tmp_path,
        {
            "decode": {1: new_weights(model, 1, down, q)},
            # prefill's block 1 only makes keys and values
            "prefill": {1: new_weights(model, 2, k)},
        },
    )
    with torch.no_grad():
        wanted = forward(pair_of(plan, model, tmp_path), batch, plan.gates)
    trim_of(plan, tmp_path).export(model, tmp_path / "pair")
    export(make_plan(model, GATES), model, tmp_path / "plain")
    (tmp_path / "plan.blocks").rename(tmp_path / "gone")
    pair, embedded = load_pair(tmp_path / "pair")
    assert embedded == plan and embedded.digest == plan.digest
    with torch.no_grad():
        torch.testing.assert_close(forward(pair, batch, plan.gates), wanted)
    for stage, names in (
        ("prefill", {k}),
        ("decode", {down, q}),
    ):
        ours, plain = (
            load_file(tmp_path / name / stage / "model.safetensors") for name in ("pair", "plain")
        )
        changed = {name for name in plain if not torch.equal(ours[name], plain[name])}
        assert changed == {f"model.layers.1.{name}" for name in names}


@pytest.mark.usefixtures("warm_stages")
def test_a_session_needs_no_files_but_the_pair(model, tmp_path):
    plan, batch = decode_plan(model, tmp_path), random_batch(model)
    with torch.no_grad():
        wanted = forward(pair_of(plan, model, tmp_path), batch, plan.gates)
    trim_of(plan, tmp_path).export(model, tmp_path / "pair")
    (tmp_path / "plan.blocks").rename(tmp_path / "gone")
    with Session(tmp_path / "pair") as session:
        torch.testing.assert_close(session.score(batch), wanted, atol=1e-4, rtol=0)


def test_a_plan_without_replacements_is_the_dense_pair(model):
    pair = pair_of(make_plan(model, GATES), model, None)
    assert pair.prefill is model and pair.decode is model


def test_the_digest_follows_the_weights(model, tmp_path):
    digests = {decode_plan(model, tmp_path / str(seed), seed).digest for seed in (1, 1, 2)}
    assert len(digests | {make_plan(model, GATES).digest}) == 3


def alter(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def grow(path):
    path.write_bytes(path.read_bytes() + bytes(2**17))


def link_out(path):
    outside = path.parent.parent.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def make_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil,words",
    [
        (alter, "is not the file of this plan"),
        (os.unlink, "no file"),
        (make_folder, "no file"),
        (grow, "larger than a block"),
        (link_out, "leads out of the plan's folder"),
    ],
)
def test_a_spoilt_file_is_refused_in_one_line(model, tmp_path, spoil, words):
    folder = tmp_path / "plans"
    plan = decode_plan(model, folder)
    spoil(file_of(folder))
    for use in (
        lambda: pair_of(plan, model, folder),
        lambda: trim_of(plan, folder).export(model, tmp_path / "pair"),
        lambda: run_plan(trim_of(plan, folder), model, random_batch(model)),
    ):
        with pytest.raises(PlanError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pair").exists()
    with pytest.raises(PlanError, match=r"decode-01-\w{12}\.safetensors.*open the plan file"):
        export(plan, model, tmp_path / "pair")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "data,words",
    [
        (pickle.dumps(Bomb()), "no safetensors file"),
        (save({"mlp.up_proj.bias": torch.zeros(48)}), r"does not fit layer 1.*mlp\.up_proj\.bias"),
        (save({"mlp.up_proj.weight": torch.zeros(48, 31)}), r"see 'mlp\.up_proj\.weight'"),
        (save({"mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.int8)}), "torch.int8"),
    ],
)
def test_a_file_that_is_no_block_is_refused(model, tmp_path, data, words):
    plan = decode_plan(model, tmp_path)
    file_of(tmp_path).write_bytes(data)
    entry = plan.replacements[0].model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(PlanError, match=words):
        trim_of(plan.model_copy(update={"replacements": (entry,)}), tmp_path).blocks(model)


@pytest.mark.parametrize(
    "changes,words",
    [
        ([{"layer": 2}], "decode runs nothing of that layer"),
        ([{"layer": 2, "stage": "prefill"}], "prefill runs nothing of that layer"),
        ([{"layer": 7}], "does not exist"),
        ([{}, {}], "two replacements"),
    ],
)
def test_a_plan_names_a_running_layer_once(model, tmp_path, changes, words):
    data = decode_plan(model, tmp_path).to_json()
    data["replacements"] = [{**data["replacements"][0], **change} for change in changes]
    with pytest.raises(PlanError, match=words):
        PrunePlan.from_json(data)


def test_eval_finds_the_blocks_beside_the_plan(tmp_path, tiny_folder, tiny_text, monkeypatch):
    places = []

    def count(trim, *_):  # the real one starts two processes
        places.append(getattr(trim.files, "folder", None))
        return Ran(kv_bytes=100.0, answer=None)

    monkeypatch.setattr("pdtrim.evaluate.run.run_plan", count)
    model = load_model(str(tiny_folder), dtype="float32")
    plan = decode_plan(model, tmp_path)
    plan.save(tmp_path / "plan.json")
    lengths = {"prompt_tokens": 16, "continuation_tokens": 8, "limit": 2}
    row = evaluate_text(
        tmp_path / "plan.json", EvalConfig(text=str(tiny_text), **lengths), dtype="float32"
    ).rows[1]
    variants = {
        "replaced": Trimmed.of(plan, pair_of(plan, model, tmp_path)),
        "bare": Trimmed.of(plan, Pair.dense(model)),
    }
    wanted = measure_quality(model, variants, text_batch(model, str(tiny_text), **lengths))
    assert row.kl == pytest.approx(wanted["replaced"].kl, rel=1e-4)
    assert row.kl != pytest.approx(wanted["bare"].kl, rel=1e-2)
    assert places == [None, tmp_path]  # the dense plan, then this one


def test_the_command_exports_the_blocks_beside_the_plan(tmp_path, tiny_folder):
    plan = decode_plan(load_model(str(tiny_folder), dtype="float32"), tmp_path / "plans")
    plan.save(tmp_path / "plans" / "plan.json")
    arguments = ["export", tmp_path / "plans" / "plan.json", "-o", tmp_path / "pair"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--dtype", "float32", "--json"])
    assert done.exit_code == 0, done.output
    exported = load_pair(tmp_path / "pair")[0].decode.block(1).module.mlp.down_proj.weight
    written = load_file(file_of(tmp_path / "plans"))["mlp.down_proj.weight"]
    assert torch.equal(exported, written)


# what is beside the plan


def save_at(model, path, seed):
    blocks = {"decode": {1: new_weights(model, seed, "mlp.down_proj.weight")}}
    return TrimPlan.of(make_plan(model, GATES), blocks).save(path).plan


def loaded(model, path):
    return TrimPlan.open(path).blocks(model)["decode"][1]["mlp.down_proj.weight"]


def test_a_new_plan_takes_the_old_ones_blocks_away_but_not_another_plans(model, tmp_path):
    path = tmp_path / "plan.json"
    save_at(model, path, 1)
    first = loaded(model, path)
    (tmp_path / "plan.blocks" / "notes.txt").write_text("mine")
    (tmp_path / "best.json").write_bytes(path.read_bytes())
    save_at(model, path, 2)
    assert torch.equal(loaded(model, tmp_path / "best.json"), first)
    save_at(model, path, 3)
    assert torch.equal(loaded(model, tmp_path / "best.json"), first)
    assert len(list((tmp_path / "plan.blocks").iterdir())) == 3  # of best, of plan, and the notes
    (tmp_path / "best.json").unlink()
    (tmp_path / "plan.blocks" / "notes.txt").unlink()
    make_plan(model, GATES).save(path)  # the blocks of a plan that is gone are nobody's to remove
    assert len(list((tmp_path / "plan.blocks").iterdir())) == 2


def test_a_plan_that_cannot_be_written_leaves_the_old_one_with_its_blocks(
    model, tmp_path, monkeypatch
):
    path = tmp_path / "plan.json"
    old = save_at(model, path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_):
        raise CannotWrite("no space")

    for owner in ("pdtrim.keep.document.write_json", "pdtrim.models.block_files.write_bytes"):
        with monkeypatch.context() as patch, pytest.raises(CannotWrite):
            patch.setattr(owner, full)
            save_at(model, path, 2)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert PrunePlan.load(path) == old
    with monkeypatch.context() as patch, pytest.raises(CannotWrite):
        patch.setattr("pdtrim.keep.document.write_json", full)
        save_at(model, tmp_path / "new" / "plan.json", 2)
    assert not list((tmp_path / "new").iterdir())


def test_a_plan_that_names_other_peoples_files_does_not_have_them_removed(model, tmp_path):
    path = tmp_path / "plan.json"
    plan = save_at(model, path, 1)
    theirs = tmp_path / "models" / "decode-01.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    entry = plan.replacements[0].model_copy(update={"weights": "models/decode-01.safetensors"})
    plan.model_copy(update={"replacements": (entry,)}).save(path)
    save_at(model, path, 2)
    assert theirs.read_text() == "mine"
