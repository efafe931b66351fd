"""Checkpoints: what they hold, what loads them, and what is refused."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import (
    FAMILIES,
    export,
    forge,
    make_plan,
    random_batch,
    random_gates,
    reference_logits,
    tiny_model,
)
from pdtrim.errors import ModelError, PdtrimError, PlanError
from pdtrim.exported import load_pair
from pdtrim.models.checkpoint import load_stage, read_stage
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates
from pdtrim.stage.forward import forward


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_pair_computes_what_the_dense_model_does_under_the_gates(family, tmp_path):
    model, rng = tiny_model(family), random.Random(4)
    batch = random_batch(model)
    for number in range(6):
        gates = random_gates(4, rng)
        pair, plan = load_pair(export(make_plan(model, gates), model, tmp_path / str(number)))
        with torch.no_grad():
            ours = forward(pair, batch, plan.gates)
        theirs = reference_logits(model, batch, gates)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_whole_blocks_is_a_plain_model(family, tmp_path):
    model = tiny_model(family)
    gates = Gates.removing(4, prefill={1}, decode={1}, mode="subset")
    export(make_plan(model, gates), model, tmp_path / "pair")
    ids = torch.cat((random_batch(model).prompt_BP, random_batch(model).continuation_BC), dim=1)
    wanted = reference_logits(model, random_batch(model), gates)
    for stage in ("prefill", "decode"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / stage)
        assert plain.config.num_hidden_layers == 3
        with torch.no_grad():
            logits = plain(ids[:, :-1]).logits[:, -6:]
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_partial_checkpoint_holds_only_what_runs_and_no_plain_loader_takes_it(tmp_path):
    model = tiny_model("qwen3")
    export(make_plan(model, Gates.removing(4, prefill={1})), model, tmp_path / "pair")
    with safe_open(tmp_path / "pair" / "prefill" / "model.safetensors", "pt") as file:
        names = {n.removeprefix("model.layers.1.") for n in file.keys() if ".layers.1." in n}  # noqa: SIM118
    assert names == {
        f"{part}.weight"
        for part in ("input_layernorm", *(f"self_attn.{p}" for p in ("k_proj", "v_proj", "k_norm")))
    }
    with pytest.raises((ValueError, KeyError), match="pdtrim_qwen3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "prefill")


def test_both_configs_carry_the_plan(tmp_path):
    model = tiny_model("llama")
    plan = make_plan(model, Gates.removing(4, prefill={2}, decode={0}))
    export(plan, model, tmp_path)
    for stage, layers in (("prefill", [0, 1, 2, 3]), ("decode", [1, 2, 3])):
        entry = json.loads((tmp_path / stage / "config.json").read_text())["pdtrim"]
        assert entry["plan_digest"] == plan.digest
        assert (entry["stage"], entry["layers"]) == (stage, layers)
        assert load_stage(tmp_path / stage, stage)[1] == plan


def test_stages_of_two_plans_do_not_pair(tmp_path):
    model = tiny_model("llama")
    export(make_plan(model, Gates.removing(4, prefill={1})), model, tmp_path / "a")
    export(make_plan(model, Gates.removing(4, prefill={2})), model, tmp_path / "b")
    (tmp_path / "a" / "decode").rename(tmp_path / "a" / "old")
    (tmp_path / "b" / "decode").rename(tmp_path / "a" / "decode")
    with pytest.raises(PlanError, match="different plans"):
        load_pair(tmp_path / "a")


def spoil_config(folder, change):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda d: d.pop("pdtrim"), "not exported by pdtrim"),
        (lambda d: d["pdtrim"].update(stage="prefill"), "holds stage 'prefill'"),
        (lambda d: d["pdtrim"].update(plan_digest="0" * 64), "does not match its digest"),
        (lambda d: d["pdtrim"]["plan"].update(block_size=8), "does not match its digest"),
        (lambda d: d["pdtrim"].update(plan=None), "config.json"),
        (lambda d: d["pdtrim"].pop("files"), "older version"),
        (lambda d: d["pdtrim"].update(files=["model.safetensors"]), "files"),
        (lambda d: d["pdtrim"].update(layers="all"), "layers"),
        (lambda d: d.update(rms_norm_eps=1e-4), "not the file that export wrote"),
        (lambda d: d.update(eos_token_id=3), "not the file that export wrote"),
    ],
)
def test_a_spoilt_config_is_refused(tmp_path, change, words):
    model = tiny_model("llama")
    export(make_plan(model, Gates.removing(4, decode={1})), model, tmp_path)
    spoil_config(tmp_path / "decode", change)
    with pytest.raises((ModelError, PlanError), match=words):
        load_stage(tmp_path / "decode", "decode")


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda d: d.update(dtype="complex99"), "unknown dtype"),
        (lambda d: d.update(hidden_size=64), "does not fit|cannot load"),
    ],
)
def test_forged_digests_do_not_make_nonsense_load(tmp_path, change, words):
    model = tiny_model("llama")
    export(make_plan(model, Gates.removing(4, decode={1})), model, tmp_path)
    spoil_config(tmp_path / "decode", change)
    forge(tmp_path / "decode")
    with pytest.raises(ModelError, match=words):
        load_stage(tmp_path / "decode", "decode")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = tiny_model("llama")
    export(make_plan(model, Gates.dense(4)), model, tmp_path)
    path = tmp_path / "decode" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"model\.safetensors is not the file that export wrote"):
        load_stage(tmp_path / "decode", "decode")
    forge(tmp_path / "decode")
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj"):
        load_stage(tmp_path / "decode", "decode")
    path.write_bytes(b"\x80\x04pickle?")
    forge(tmp_path / "decode")
    with pytest.raises(ModelError, match="cannot load"):
        load_stage(tmp_path / "decode", "decode")


def test_export_leaves_other_peoples_files_alone(tmp_path):
    model = tiny_model("llama")
    plan = make_plan(model, Gates.dense(4))
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(PlanError, match="thesis"):
        export(plan, model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    export(plan, model, tmp_path / "pair")
    export(plan, model, tmp_path / "pair")  # its own pair may be written again
    with pytest.raises(PlanError, match="not the model of this plan"):
        export(plan, tiny_model("llama", seed=1), tmp_path / "other")


def pair_files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def with_tokenizer(folder):
    """A tiny model whose checkpoints have tokenizer files."""
    model = load_model(str(folder), dtype="float32")
    return model, make_plan(model, Gates.removing(4, decode={1}))


def test_every_altered_bit_of_a_checkpoint_is_refused(tmp_path, tiny_folder):
    model, plan = with_tokenizer(tiny_folder)
    folder = export(plan, model, tmp_path / "pair") / "decode"
    found = read_stage(folder, "decode")
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for bit in rng.sample(range(8 * len(data)), 64):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            if path.name == "config.json":  # white space; ``pair`` is compared with prefill's
                try:
                    now = read_stage(folder, "decode")
                except PdtrimError as error:
                    assert "\n" not in str(error)
                else:
                    made = now.entry.model_copy(update={"pair": found.entry.pair})
                    assert (now.data, made) == (found.data, found.entry)
            else:
                with pytest.raises(ModelError, match=f"{path.name} is not the file that export"):
                    load_stage(folder, "decode")
        path.write_bytes(data)
    assert load_stage(folder, "decode")[1] == plan


def test_files_that_are_gone_or_too_many_are_refused(tmp_path):
    model = tiny_model("llama")
    folder = export(make_plan(model, Gates.dense(4)), model, tmp_path) / "decode"
    (folder / "model-00002-of-00002.safetensors").touch()  # vLLM reads all weights of a folder
    with pytest.raises(ModelError, match=r"00002\.safetensors was not written by export"):
        load_stage(folder, "decode")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "README.md").touch()
    load_stage(folder, "decode")
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"generation_config\.json is gone"):
        load_stage(folder, "decode")


def test_stages_of_two_exports_of_one_plan_do_not_pair(tmp_path):
    model = tiny_model("llama")
    plan = make_plan(model, Gates.removing(4, prefill={1}))
    export(plan, model, tmp_path / "a")
    export(plan, model, tmp_path / "same")
    assert pair_files(tmp_path / "a") == pair_files(tmp_path / "same")
    model.network.to(torch.bfloat16)
    export(plan, model, tmp_path / "b")
    (tmp_path / "a" / "decode").rename(tmp_path / "a" / "old")
    (tmp_path / "b" / "decode").rename(tmp_path / "a" / "decode")
    with pytest.raises(PlanError, match="stages of two exports"):
        load_pair(tmp_path / "a")


class Killed(BaseException):
    pass


def killed_at(monkeypatch, number):
    """From rename ``number`` on nothing of the file system is changed any more."""
    done = []
    real = os.rename

    def rename(source, target):
        if len(done) == number:
            raise Killed
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr("pdtrim.exported.shutil.rmtree", lambda *_, **__: None)
    monkeypatch.setattr(Path, "rmdir", lambda _: None)


@pytest.mark.parametrize("number", range(5))
def test_a_killed_export_leaves_the_old_pair_the_new_one_or_a_refusal(
    tmp_path, monkeypatch, number
):
    model = tiny_model("llama")
    old, new = (make_plan(model, Gates.removing(4, decode={i})) for i in (1, 2))
    folder = export(old, model, tmp_path / "pair")
    (folder / "notes.txt").write_text("mine")
    before = pair_files(folder)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, number)
        export(new, model, folder)
    try:
        assert load_pair(folder)[1] == (old if number == 0 else new)
    except (ModelError, PlanError) as error:
        assert number in (1, 2, 3)
        assert re.search("no (prefill|decode) checkpoint|different plans", str(error))
    with monkeypatch.context() as patch, pytest.raises(PdtrimError):
        patch.setattr(
            "pdtrim.exported.save_stage",
            full_disk,
            # the next one fails before it writes
        )
        export(new, model, folder)
    assert pair_files(folder) == before, "the old pair is back"
    export(new, model, folder)
    assert load_pair(folder)[1] == new
    names = {path.name for path in folder.iterdir()}
    assert names - {"README.md"} == {"decode", "notes.txt", "prefill"}


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("number", range(4))
def test_an_export_that_fails_at_a_rename_puts_the_old_pair_back(tmp_path, monkeypatch, number):
    model = tiny_model("llama")
    old, new = (make_plan(model, Gates.removing(4, decode={i})) for i in (1, 2))
    folder = export(old, model, tmp_path / "pair")
    before = pair_files(tmp_path)
    real, done = os.rename, []

    def rename(source, target):
        done.append(target)
        if len(done) == number + 1:
            full_disk()
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PdtrimError, match=r"cannot write .*pair: No space left"):
        export(new, model, folder)
    assert pair_files(tmp_path) == before
    assert {"decode", "prefill", "README.md"} == {path.name for path in folder.iterdir()}


def test_a_failed_first_export_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("pdtrim.exported.seal", full_disk)
    with pytest.raises(PdtrimError, match="cannot write"):
        export(make_plan(model, Gates.dense(4)), model, tmp_path / "pair")
    assert not list(tmp_path.iterdir())


def test_a_users_file_in_a_stage_is_not_lost(tmp_path):
    model = tiny_model("llama")
    plan = make_plan(model, Gates.dense(4))
    folder = export(plan, model, tmp_path / "pair")
    (folder / "decode" / "adapter").mkdir()
    (folder / "decode" / "adapter" / "notes.txt").write_text("mine")
    before = pair_files(tmp_path)
    with pytest.raises(PlanError, match=r"decode holds 'adapter/notes\.txt', which export did not"):
        export(plan, model, folder)
    assert pair_files(tmp_path) == before
    (folder / "decode").rename(tmp_path / "elsewhere")
    (folder / "decode").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlanError, match="already holds 'decode'"):
        export(plan, model, folder)
    assert (tmp_path / "elsewhere" / "adapter" / "notes.txt").read_text() == "mine"


def test_fingerprint_is_the_same_in_bf16_and_fp32_and_sees_one_weight(tmp_path):
    model = tiny_model("llama")
    model.network.to(torch.bfloat16).save_pretrained(tmp_path)
    prints = {load_model(str(tmp_path), dtype=d).fingerprint for d in ("bfloat16", "float32")}
    assert len(prints) == 1
    changed = load_model(str(tmp_path))
    with torch.no_grad():
        changed.network.model.norm.weight[3] += 1
    assert changed.fingerprint not in prints


def test_unsupported_and_dangerous_models_are_refused(tmp_path, tiny_folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    gpt.save_pretrained(tmp_path / "gpt")
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel.*not supported"):
        load_model(str(tmp_path / "gpt"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tiny_folder / "config.json").read_text())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickle weights"):
        load_model(str(pickled))
    with pytest.raises(ModelError, match="pickle file"):
        load_model(str(pickled / "pytorch_model.bin"))
    with pytest.raises(ModelError, match="no model folder"):
        load_model("./nowhere")
    with pytest.raises(ModelError, match="no GGUF file"):
        load_model("nowhere.gguf")
    with pytest.raises(ModelError, match="unknown dtype"):
        load_model(str(tiny_folder), dtype="int3")


def test_a_pair_is_no_dense_model(tmp_path):
    model = tiny_model("llama")
    export(make_plan(model, Gates.dense(4)), model, tmp_path / "pair")
    with pytest.raises(ModelError, match="exported pair"):
        load_model(str(tmp_path / "pair"))


def test_a_pair_carries_a_card_and_a_users_own_stays(tmp_path, tiny_folder):
    source = tmp_path / "model"
    shutil.copytree(tiny_folder, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Mine\n")
    model = load_model(str(source), dtype="float32")
    plan = make_plan(model, Gates.removing(4, prefill={1}, decode={2}))
    folder = export(plan, model, tmp_path / "pair")
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0" and head["base_model"] == str(source)
    assert plan.digest in text and "| decode | 3 of 4 | 2 | none |" in text
    (folder / "README.md").write_text(text.replace("not measured", "measured: fine"))
    export(plan, model, folder)
    assert (folder / "README.md").read_text() == text  # it was ours
    (folder / "README.md").write_text("mine\n")
    export(plan, model, folder)
    assert (folder / "README.md").read_text() == "mine\n"
    load_pair(folder)
