"""Training prefill's projections, held against differences of the simulator's own KL."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from helpers import (
    Killed,
    first_last,
    killed_at,
    make_plan,
    random_batch,
    tiny_model,
    trim_of,
    trimmed,
    with_files,
)
from pdtrim.cli import app
from pdtrim.distill.job import DistillConfig
from pdtrim.distill.loss import backward_kl, dense_stream
from pdtrim.distill.plan import Training, train_plan, trained_plan
from pdtrim.distill.sets import SetRule
from pdtrim.distill.student import Descent, Student, frozen
from pdtrim.distill.train import distill
from pdtrim.distill.trainable import first_cut, prefill_names
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.exported import load_pair
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.swap import swap_blocks
from pdtrim.plan import Gates, LayerKV, PrunePlan
from pdtrim.repair.apply import repair
from pdtrim.stage.forward import Pair, Trimmed, forward

GATES = Gates.removing(5, prefill={1, 3}).without_dead_work()
DESCENT = Descent(steps=10, learning_rate=1e-3, warmup=0.1)
CONFIG = DistillConfig(
    stage="prefill",
    steps=12,
    learning_rate=5e-3,
    rows=4,
    compute="float32",
    evaluate_every=3,
    checkpoint_seconds=0,
    fit_rows=8,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=5)


@pytest.fixture(scope="module")
def text(model):
    return random_batch(model, rows=24, seed=1), random_batch(model, rows=6, seed=2)


def exact_kl(model, variant, batch):
    with torch.no_grad():
        dense = forward(Pair.dense(model), batch, Gates.dense(model.num_layers))
        ours = forward(variant.pair, batch, variant.gates, variant.policy)
    kl = F.kl_div(ours.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
    return float(kl.sum(-1).double().mean())


def same(a, b):
    return a.keys() == b.keys() and all(
        a[layer].keys() == b[layer].keys()
        and all(torch.equal(tensor, b[layer][name]) for name, tensor in a[layer].items())
        for layer in a
    )


KV = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


@pytest.mark.parametrize("family,more", [("qwen2", ()), ("qwen3", ("self_attn.k_norm.weight",))])
def test_what_trains_grows_with_each_word(family, more):
    """Blocks 1 and 3 are skipped, and of the last one only keys and values are read."""
    model = tiny_model(family, layers=5)
    query = ("self_attn.q_proj.weight", *(("self_attn.q_proj.bias",) * (family == "qwen2")))
    normed = {*KV, *more, "input_layernorm.weight"}
    names = {
        what: {layer: set(of) for layer, of in prefill_names(what, model, GATES).items()}
        for what in ("kv", "norms", "qkv", "blocks")
    }
    assert names["kv"] == {layer: set(KV) for layer in (1, 3, 4)}
    assert names["norms"] == dict.fromkeys((1, 3, 4), normed)
    assert names["qkv"] == {**dict.fromkeys((1, 3, 4), normed), 2: {*normed, *query}}
    blocks = names["blocks"]
    assert blocks.keys() == {0, 1, 2, 3, 4}
    assert "mlp.up_proj.weight" in blocks[0] & blocks[2] and blocks[1] == normed
    assert not any("k_proj.bias" in name for of in blocks.values() for name in of)


def test_a_prefill_that_skips_nothing_is_refused(model, text):
    for gates in (Gates.dense(5), Gates.removing(5, prefill={4}), Gates.removing(5, decode={4})):
        with pytest.raises(PlanError, match=r"prefill skips no block .* --prefill-remove"):
            distill(model, trimmed(model, gates), *text, CONFIG)
        with pytest.raises(PlanError, match="prefill skips no block"):
            plan = make_plan(model, gates.without_dead_work())
            train_plan(trim_of(plan), model, *text, Training(distillation=CONFIG))
    with pytest.raises(PlanError, match="leave merging out"):
        config = Training(rule=SetRule(), distillation=CONFIG)
        train_plan(trim_of(make_plan(model, GATES)), model, *text, config)
    halves = Gates.dense(5).model_copy(update={"prefill_mlp": (True, True, False, True, True)})
    assert first_cut(halves.without_dead_work()) == 2


@pytest.mark.parametrize("what", ["qkv", "blocks"])
@pytest.mark.parametrize("kept", [LayerKV(), first_last(2, 3)])
def test_the_gradient_is_that_of_the_pairs_kl(model, what, kept):
    """Along the gradient itself, the pair's KL changes as fast as the gradient is long."""
    batch = random_batch(model, rows=3, new=30)
    base = frozen(model, torch.float32)
    names = prefill_names(what, model, GATES)
    student = Student(model, base, names, {}, DESCENT)
    own = trimmed(
        Pair(prefill=student.model, decode=base), GATES, HandoverPolicy(rules=(kept,) * 5)
    )
    backward_kl(own, batch, dense_stream(base, batch))
    assert not any(p.requires_grad or p.grad is not None for p in base.network.parameters())
    student.collect()
    grads = {key: master.grad.clone() for key, master in student.masters.items()}
    assert all(grad.abs().max() > 1e-6 for grad in grads.values())
    length = float(torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt())
    began, kls = student.copy_weights(torch.float32), []
    for way in (1, -1):
        eps = way * 2e-2 / length
        student.put({key: began[key] + eps * grad for key, grad in grads.items()})
        kls.append(exact_kl(model, own, batch))
    assert (kls[0] - kls[1]) / 4e-2 == pytest.approx(length, rel=0.03)


def test_rounding_lets_the_gradient_through(model):
    """What decode reads is the codec's, bit for bit; each row's gradient is of its own pairs."""
    coded = LayerKV(codec=parse_codec("int4:first=0,recent=0,group=4"))
    batch = random_batch(model, rows=2)
    base = frozen(model, torch.float32)
    names = {3: KV}
    trained = Student(model, base, names, {}, DESCENT).model
    policy = HandoverPolicy(rules=(coded,) * 5)
    ours, theirs = (
        trimmed(Pair(prefill=one, decode=base), GATES, policy) for one in (trained, base)
    )
    heard = ours.last_stream(batch)
    assert torch.equal(heard.detach(), theirs.last_stream(batch))
    heard.square().sum().backward()
    for name in KV:
        assert trained.block(3).module.get_parameter(name).grad.abs().max() > 1e-4


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_only_prefills_named_weights_change_and_the_kl_falls(model, text, compute, keep_dense):
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    config = dataclasses.replace(
        CONFIG, steps=40, compute=compute, keep_dense=keep_dense, evaluate_every=10
    )
    start = trimmed(model, GATES)
    out = distill(model, start, *text, config)
    assert out.blocks == {}
    assert {layer: tuple(of) for layer, of in out.prefill.items()} == dict.fromkeys((1, 3, 4), KV)
    now = model.network.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    pair = Pair(prefill=swap_blocks(model, out.prefill), decode=model)
    near = {"abs": 1e-4 if compute == "float32" else 3e-2}
    kl = exact_kl(model, trimmed(pair, GATES), text[1])
    assert out.held_out_before == pytest.approx(exact_kl(model, start, text[1]), **near)
    assert out.held_out_after == pytest.approx(kl, **near)
    assert kl < 0.9 * out.held_out_before


def test_the_fit_of_keys_and_values_is_the_repairs_and_stands_if_it_is_better(model, text):
    data, held_out = text
    still = dataclasses.replace(CONFIG, steps=1, learning_rate=1e-12, fit_rows=len(data))
    out = distill(model, trimmed(model, GATES), data, held_out, still)
    made = repair(model, trimmed(model, GATES), data, "kv", stages=("prefill",))["prefill"]
    assert [point.step for point in out.history] == [0, 0, 1]
    assert out.history[1].held_out_kl < out.history[0].held_out_kl
    for layer, weights in made.items():
        for name, tensor in weights.items():
            torch.testing.assert_close(out.prefill[layer][name], tensor, atol=1e-6, rtol=0)
    # from weights that the training has made better than any fit, it is put back
    config = dataclasses.replace(CONFIG, steps=60)
    good = distill(model, trimmed(model, GATES), data, held_out, config)
    pair = Pair(prefill=swap_blocks(model, good.prefill), decode=model)
    again = distill(model, trimmed(pair, GATES), data, held_out, still)
    assert again.held_out_after == pytest.approx(good.held_out_after, abs=1e-5)
    fitted, trained = (again.history[i].held_out_kl for i in (1, 2))
    assert fitted > trained == pytest.approx(again.held_out_after, abs=1e-5)


@pytest.mark.parametrize("stage", ["prefill", "both"])
def test_a_killed_run_goes_on_to_the_same_weights_and_the_seed_decides(
    model, text, tmp_path, stage
):
    gates = Gates.removing(5, prefill={1, 3}, decode={2})
    start = trimmed(model, gates)
    config = dataclasses.replace(CONFIG, stage=stage, which="neighbours", keep_dense=True)
    torch.manual_seed(1)
    whole = distill(model, start, *text, config)
    file = tmp_path / "state.safetensors"
    torch.manual_seed(2)
    with pytest.raises(Killed):
        distill(model, start, *text, config, checkpoint=file, progress=killed_at(7))
    lines = []
    resumed = distill(model, start, *text, config, checkpoint=file, say=lines.append)
    assert not any(line.startswith(("step 3", "keys and values")) for line in lines)
    assert same(resumed.prefill, whole.prefill) and same(resumed.blocks, whole.blocks)
    assert bool(whole.blocks) == (stage == "both")
    other = distill(model, start, *text, dataclasses.replace(config, seed=1))
    assert not same(other.prefill, whole.prefill)
    with pytest.raises(PdtrimError, match="was made with parts"):
        config = dataclasses.replace(config, parts="norms")
        distill(model, start, *text, config, checkpoint=file)


def test_both_stages_together_learn_more_than_either(model, text):
    start = trimmed(model, Gates.removing(5, prefill={1, 3}, decode={2}))
    config = dataclasses.replace(CONFIG, steps=30, learning_rate=2e-3)
    learnt = {}
    for stage in ("prefill", "decode", "both"):
        made = distill(model, start, *text, dataclasses.replace(config, stage=stage))
        learnt[stage] = made.history[-1].train_kl
    assert learnt["both"] < min(learnt["prefill"], learnt["decode"])


def test_the_exported_pair_computes_what_the_simulator_does(model, text, tmp_path):
    """Repairs that do not train stay, and the rest of the plan with them."""
    blocks = repair(model, trimmed(model, GATES), text[0], "linear", stages=("prefill",))
    plan = with_files(make_plan(model, GATES), blocks, tmp_path)
    trained = train_plan(trim_of(plan, tmp_path), model, *text, Training(distillation=CONFIG))
    assert trained.blocks["decode"] == {}
    for layer, weights in blocks["prefill"].items():
        for name in weights.keys() - set(KV):
            assert torch.equal(trained.blocks["prefill"][layer][name], weights[name])
    made = trained_plan(plan, trained).save(tmp_path / "trained.json")
    assert made.plan.provenance.distillation == "prefill kv, 0 merged, 12 steps on 24 sequences"
    assert made.plan.digest != plan.digest and made.plan.gates == plan.gates
    simulated = Trimmed.of(made.plan, made.pair(model))
    pair, loaded = load_pair(made.export(model, tmp_path / "pair"))
    exported = Trimmed.of(loaded, pair)
    assert torch.equal(exported.last_stream(text[1]), simulated.last_stream(text[1]))
    kl = exact_kl(model, simulated, text[1])
    assert kl == pytest.approx(trained.distilled.held_out_after, abs=1e-4)
    assert kl < exact_kl(model, Trimmed.of(plan, trim_of(plan, tmp_path).pair(model)), text[1])


def test_the_verb_trains_a_repaired_plan_and_refuses_words_of_decode(
    tiny_folder, tiny_text, tmp_path
):
    run = CliRunner().invoke
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "trained.json")
    words = ["plan", str(tiny_folder), "-o", plan, "--calibration", str(tiny_text)]
    words += ["--prefill-remove", "2", "--prompt-tokens", "24", "--continuation-tokens", "8"]
    done = run(app, [*words, "--sequences", "4", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    words = ["distill", plan, "-o", out, "--text", str(tiny_text), "--stage", "prefill"]
    words += ["--train", "qkv", "--steps", "4", "--rows", "2", "--prompt-tokens", "24"]
    words += ["--continuation-tokens", "8", "--sequences", "6", "--held-out", "3"]
    words += ["--dtype", "float32", "--json"]
    done = run(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["held_out_kl"]["after"] <= found["held_out_kl"]["before"]
    made = PrunePlan.load(out)
    assert made.digest == found["digest"]
    assert made.provenance.distillation == "prefill qkv, 0 merged, 4 steps on 12 sequences"
    assert {item.stage for item in made.replacements} == {"prefill"}
    for extra in (["--blocks", "pairs"], ["--merge", "pairs"]):
        done = run(app, [*words, *extra])
        assert "are of decode" in str(done.exception)
