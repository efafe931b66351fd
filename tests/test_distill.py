"""Training decode's blocks, held against transformers, the simulator and itself."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from helpers import (
    Killed,
    first_last,
    killed_at,
    perturbed,
    random_batch,
    tiny_model,
    trimmed,
)
from pdtrim.distill import train
from pdtrim.distill.loss import kl_of
from pdtrim.distill.schedule import rate_share, rows_of
from pdtrim.distill.student import Descent
from pdtrim.distill.train import DistillConfig, distill
from pdtrim.distill.trainable import trainable_layers
from pdtrim.errors import PdtrimError, PlanError
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.models.swap import swap_blocks
from pdtrim.plan import Gates, LayerKV
from pdtrim.stage.forward import Batch, Pair, Trimmed, forward

DESCENT = Descent(steps=10, learning_rate=1e-3, warmup=0.1)
CONFIG = DistillConfig(
    which="all",
    steps=12,
    learning_rate=2e-3,
    rows=4,
    compute="float32",
    evaluate_every=3,
    checkpoint_seconds=0,
)
GATES = Gates.removing(4, decode={2})


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def text(model):
    return random_batch(model, rows=24, seed=1), random_batch(model, rows=6, seed=2)


def whole_kl(pair, batch, gates, policy=None):
    """The exact KL of the simulator's logits."""
    with torch.no_grad():
        dense = forward(Pair.dense(pair.prefill), batch, Gates.dense(gates.num_layers))
        ours = forward(pair, batch, gates, policy)
    kl = F.kl_div(ours.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none")
    return float(kl.sum(-1).mean())


def assert_same(a, b, **tolerance):
    assert a.blocks.keys() == b.blocks.keys()
    for layer, weights in a.blocks.items():
        assert weights.keys() == b.blocks[layer].keys()
        for name, tensor in weights.items():
            if tolerance:
                torch.testing.assert_close(tensor, b.blocks[layer][name], **tolerance)
            else:
                assert torch.equal(tensor, b.blocks[layer][name]), (layer, name)


def without_time(history):
    return [dataclasses.replace(point, seconds=0) for point in history]


# which blocks train


@pytest.mark.parametrize(
    "decode,merged,pairs,neighbours",
    [
        ({2, 3}, (), None, (1, 4)),
        ({2, 4}, (), None, (1, 3, 5)),
        ({0}, (), None, (1,)),
        ({5, 6}, (0,), (0,), (0, 4)),
        ((), (3,), (3,), (3,)),
    ],
)
def test_blocks_that_train(decode, merged, pairs, neighbours):
    gates = Gates.removing(7, decode=decode)
    if pairs is None:
        with pytest.raises(PlanError, match="no block to train"):
            trainable_layers("pairs", gates, merged)
    else:
        assert trainable_layers("pairs", gates, merged) == pairs
    assert trainable_layers("neighbours", gates, merged) == neighbours
    assert trainable_layers("all", gates, merged) == gates.layers("decode")


def test_a_cut_inside_a_block_lies_beside_its_other_half():
    halves = Gates(
        prefill_attention=("full",) * 5,
        prefill_mlp=(True,) * 5,
        decode_attention=(True, False, True, True, True),
        decode_mlp=(True, True, True, False, True),
    )
    assert trainable_layers("neighbours", halves, ()) == (0, 1, 3, 4)
    with pytest.raises(PlanError, match="does not run"):
        trainable_layers("all", Gates.removing(5, decode={3}), (3,))


def test_each_epoch_shows_each_row_once_in_a_new_order():
    shown = [row for step in range(6) for row in rows_of(step, 4, 12, seed=3)]
    assert sorted(shown[:12]) == sorted(shown[12:]) == list(range(12))
    assert shown[:12] != shown[12:] != list(range(12))
    assert rows_of(5, 4, 12, seed=3) == shown[20:]


def test_the_learning_rate_rises_and_falls():
    shares = [rate_share(step, 20, 0.2) for step in range(20)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0 < shares[-1] < 0.02
    assert rate_share(0, 1, 0.0) == 1.0


# distillation


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_distill_plan_lowers_held_out_kl_of_the_pair_itself(model, compute, keep_dense):
    """The numbers it reports are those of the dense prefill model with the trained decode model."""
    data, held_out = random_batch(model, rows=48, seed=1), random_batch(model, rows=6, seed=2)
    gates = Gates.removing(4, prefill={3}, decode={2})
    policy = HandoverPolicy(rules=(LayerKV(), first_last(2, 3), LayerKV(), LayerKV()))
    config = dataclasses.replace(
        CONFIG, steps=40, evaluate_every=10, compute=compute, keep_dense=keep_dense
    )
    out = distill(model, trimmed(model, gates, policy), data, held_out, config)
    trained = Pair(prefill=model, decode=swap_blocks(model, out.blocks))
    near = {"abs": 1e-4 if compute == "float32" else 2e-2}
    before = whole_kl(Pair.dense(model), held_out, gates, policy)
    after = whole_kl(trained, held_out, gates, policy)
    assert out.held_out_before == pytest.approx(before, **near)
    assert out.held_out_after == pytest.approx(after, **near)
    assert after < 0.9 * before
    assert [point.step for point in out.history] == [0, 10, 20, 30, 40]
    assert out.history[0].train_kl is None and out.history[1].train_kl > out.history[-1].train_kl


def test_only_the_chosen_parts_change(model, text):
    gates = GATES.model_copy(update={"decode_attention": (True, False, False, True)})
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    flags = [p.requires_grad for p in model.network.parameters()]
    out = distill(
        model,
        trimmed(model, gates),
        *text,
        dataclasses.replace(CONFIG, which="neighbours", steps=2),
    )
    assert out.blocks.keys() == {0, 1, 3}
    for layer, weights in out.blocks.items():
        own = dict(model.block(layer).module.named_parameters())
        mlp_only = layer == 1
        assert weights.keys() == {n for n in own if "mlp" in n or "post" in n or not mlp_only}
        assert all(not torch.equal(tensor, own[name]) for name, tensor in weights.items())
        assert all(tensor.dtype == model.dtype for tensor in weights.values())
    now = model.network.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    assert flags == [p.requires_grad for p in model.network.parameters()]


def test_merged_blocks_start_from_their_weights_and_prefill_from_its_own(model, text):
    data, held_out = text
    start = {1: perturbed(model, 1)}
    prefill = swap_blocks(model, {0: perturbed(model, 0, seed=1)})
    config = dataclasses.replace(CONFIG, which="pairs", steps=1, learning_rate=1e-12)
    out = distill(
        model,
        trimmed(Pair(prefill=prefill, decode=model), GATES),
        data,
        held_out,
        config,
        start=start,
    )
    assert out.blocks.keys() == {1}
    for name, tensor in start[1].items():
        torch.testing.assert_close(out.blocks[1][name], tensor, atol=1e-8, rtol=0)
    pair = Pair(prefill=prefill, decode=swap_blocks(model, start))
    with torch.no_grad():
        ys = [
            Trimmed.dense(model).streams(held_out)[-1][1],
            trimmed(pair, GATES).streams(held_out)[-1][1],
        ]
    assert out.held_out_before == pytest.approx(float(kl_of(model, *ys).mean()), rel=1e-5)


def test_small_updates_are_not_lost_in_bf16(text):
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    config = dataclasses.replace(CONFIG, steps=40, compute="bfloat16", learning_rate=4e-5)
    out = distill(model, trimmed(model, GATES), *text, config)
    own = model.block(1).module.mlp.up_proj.weight
    step = own.abs() * 2**-8  # half of bf16's spacing is above one update
    moved = (out.blocks[1]["mlp.up_proj.weight"] != own) & (step > 4e-5 * 2)
    assert moved.sum() > 50


def test_the_seed_decides_the_weights(model, text):
    config = dataclasses.replace(CONFIG, steps=3)
    torch.manual_seed(1)
    first = distill(model, trimmed(model, GATES), *text, config)
    torch.manual_seed(2)
    assert_same(first, distill(model, trimmed(model, GATES), *text, config))
    other = distill(model, trimmed(model, GATES), *text, dataclasses.replace(config, seed=1))
    with pytest.raises(AssertionError):
        assert_same(first, other)


def test_accumulated_micro_batches_equal_one_batch(model, text):
    """The first moment after one step is the gradient: a rounding error cannot hide in it."""
    together = dataclasses.replace(CONFIG, steps=3, rows=4, learning_rate=1e-3)
    apart = dataclasses.replace(together, rows=2, accumulate=2)
    a, b = (distill(model, trimmed(model, GATES), *text, config) for config in (together, apart))
    assert_same(a, b, atol=2e-5, rtol=0)
    assert [p.train_kl for p in a.history[1:]] == pytest.approx(
        [p.train_kl for p in b.history[1:]], rel=1e-5
    )


@pytest.mark.parametrize("where", ["progress", "say"])
def test_a_killed_run_goes_on_to_the_same_weights(model, text, tmp_path, where):
    config = dataclasses.replace(CONFIG, rows=5, accumulate=2, weight_decay=0.1)
    whole = distill(model, trimmed(model, GATES), *text, config)
    file = tmp_path / "run" / "state.safetensors"
    with pytest.raises(Killed):
        if where == "progress":
            distill(
                model, trimmed(model, GATES), *text, config, checkpoint=file, progress=killed_at(7)
            )
        else:

            def say(line):
                if line.startswith("step 6"):  # evaluated, not yet saved
                    raise Killed

            distill(model, trimmed(model, GATES), *text, config, checkpoint=file, say=say)
    lines = []
    resumed = distill(
        model, trimmed(model, GATES), *text, config, checkpoint=file, say=lines.append
    )
    assert not any(line.startswith("step 3") for line in lines)
    assert_same(resumed, whole)
    assert without_time(resumed.history) == without_time(whole.history)
    again = distill(model, trimmed(model, GATES), *text, config, checkpoint=file, say=pytest.fail)
    assert_same(again, whole)
    assert [file.name] == [path.name for path in file.parent.iterdir()]


def test_another_runs_checkpoint_is_refused(model, text, tmp_path):
    data, held_out = text
    file = tmp_path / "state.safetensors"
    config = dataclasses.replace(CONFIG, steps=1)
    distill(model, trimmed(model, GATES), data, held_out, config, checkpoint=file)
    flipped = Batch(prompt_BP=data.prompt_BP.flip(0), continuation_BC=data.continuation_BC.flip(0))
    kept = HandoverPolicy(rules=(first_last(1, 2), *(LayerKV(),) * 3))
    seed = dataclasses.replace(config, seed=1)
    other = tiny_model("llama", seed=1)
    own = trimmed(model, GATES)
    others = {
        "seed 0, now it is 1": (model, own, data, held_out, seed, {}),
        r"gates\.": (
            *(model, trimmed(model, Gates.removing(4, decode={1})), data, held_out, config),
            {},
        ),
        "kv": (model, trimmed(model, GATES, kept), data, held_out, config, {}),
        "text": (model, own, flipped, held_out, config, {}),
        "held_out": (model, own, data, data[:4], config, {}),
        "model": (other, trimmed(other, GATES), data, held_out, config, {}),
        "merged_blocks": (model, own, data, held_out, config, {"start": {1: perturbed(model, 1)}}),
        "prefill null": (
            *(model, trimmed(Pair(prefill=other, decode=model), GATES), data, held_out, config),
            {},
        ),
    }
    for key, (*args, more) in others.items():
        with pytest.raises(PdtrimError, match=f"was made with {key}"):
            distill(*args, checkpoint=file, **more)
    distill(
        model,
        trimmed(model, GATES, HandoverPolicy.full(4)),
        data,
        held_out,
        dataclasses.replace(config, max_seconds=1e6, checkpoint_seconds=5),
        checkpoint=file,
        say=pytest.fail,
    )
    first, second = ({1: perturbed(model, 1, seed=seed)} for seed in (0, 1))
    other = tmp_path / "other.safetensors"
    distill(model, trimmed(model, GATES), data, held_out, config, start=first, checkpoint=other)
    with pytest.raises(PdtrimError, match="made with merged_blocks"):
        distill(
            model, trimmed(model, GATES), data, held_out, config, start=second, checkpoint=other
        )
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(PdtrimError, match=r"not a file of schema 'pdtrim\.distill/2'"):
        distill(model, trimmed(model, GATES), data, held_out, config, checkpoint=file)
    file.write_bytes(b"{")
    with pytest.raises(PdtrimError, match="cannot read"):
        distill(model, trimmed(model, GATES), data, held_out, config, checkpoint=file)


def test_an_early_stop_keeps_the_best_weights(model, text, tmp_path):
    data, held_out = text
    wild = dataclasses.replace(
        CONFIG, steps=60, learning_rate=0.02, evaluate_every=1, patience=4, warmup=0.9
    )
    file = tmp_path / "state.safetensors"
    out = distill(model, trimmed(model, GATES), data, held_out, wild, checkpoint=file)
    kls = [point.held_out_kl for point in out.history]
    best = kls.index(min(kls))
    assert best > 0 and len(kls) == best + 1 + 4 < 60
    assert out.held_out_after == min(kls) < kls[-1]
    pair = Pair(prefill=model, decode=swap_blocks(model, out.blocks))
    assert whole_kl(pair, held_out, GATES) == pytest.approx(min(kls), abs=1e-4)
    again = distill(
        model, trimmed(model, GATES), data, held_out, wild, checkpoint=file, say=pytest.fail
    )
    assert_same(again, out)


def test_distill_plan_time_counts_over_resumes(model, text, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])

    def ticking(kill):
        @contextlib.contextmanager
        def progress(what, total):
            with killed_at(kill)(what, total) as inner:

                def advance(amount):
                    clock[0] += 10
                    inner(amount)

                yield advance

        return progress

    file = tmp_path / "state.safetensors"
    config = dataclasses.replace(CONFIG, max_seconds=55)
    with pytest.raises(Killed):
        distill(model, trimmed(model, GATES), *text, config, checkpoint=file, progress=ticking(4))
    clock[0] += 1000  # nobody trains
    out = distill(
        model, trimmed(model, GATES), *text, config, checkpoint=file, progress=ticking(-1)
    )
    assert [point.step for point in out.history] == [0, 3, 5]
    assert out.history[-1].seconds >= 55
    more = dataclasses.replace(config, max_seconds=None)
    out = distill(model, trimmed(model, GATES), *text, more, checkpoint=file)
    assert out.history[-1].step == CONFIG.steps


def test_settings_out_of_range_are_refused(model, text):
    data, held_out = text
    for change in ({"steps": 0}, {"rows": 0}, {"learning_rate": 0.0}, {"warmup": 1.5}):
        with pytest.raises(PlanError):
            dataclasses.replace(CONFIG, **change)
    with pytest.raises(PlanError, match="1 row"):
        distill(model, trimmed(model, GATES), data, held_out[:0], CONFIG)
