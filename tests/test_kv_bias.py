"""Key biases cost no quality and go nowhere astray; pairs that no codec holds are refused."""

import pytest
import torch

from helpers import export, make_plan, random_batch, tiny_model
from pdtrim.errors import NotFinite
from pdtrim.kv.bearable import check_bearable
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.groups import HeadGroup
from pdtrim.kv.policy import HandoverPolicy, hand_over, select
from pdtrim.models.block import Block
from pdtrim.plan import Gates, LayerKV
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Pair, forward
from pdtrim.stage.generate import prefill

LOSSY = ("int4", "int3:rotate=true", "fp8", "entropy")


def biased_model(scale, *, seed=0, layers=4):
    """Qwen2's layers, the key biases of two pairs of channels ``scale`` times as large.

    Queries hardly look there, as in the real models: attention to them would be to one token.
    """
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "eos_token_id": None}
    model = tiny_model("qwen2", seed=seed, layers=layers, **sizes)
    loud_D = torch.isin(torch.arange(16), torch.tensor([0, 1, 8, 9]))
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            attention.k_proj.bias[loud_D.repeat(2)] *= scale
            attention.q_proj.weight[loud_D.repeat(4)] *= 1e-4
            attention.q_proj.bias[loud_D.repeat(4)] *= 1e-4
    return model


def rules_of(model, codec):
    return (LayerKV(codec=parse_codec(codec)),) * model.num_layers


def view_of(model, layer):
    batch = random_batch(model, rows=1, prompt=41, seed=0)
    with torch.no_grad():
        views = prefill(model, batch.prompt_BP[:, :-1], Gates.dense(model.num_layers))
        return dict(views)[layer]


@torch.inference_mode()
def kl(model, codec):
    """KL of one codec in all layers to the whole cache, nats a token."""
    batch = random_batch(model, rows=4, prompt=97, new=16)
    gates, pair = Gates.dense(model.num_layers), Pair.dense(model)
    p, q = (
        forward(pair, batch, gates, policy).log_softmax(-1)
        for policy in (None, HandoverPolicy(rules=rules_of(model, codec)))
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("codec", ["int4:rotate=true", "int3:rotate=true", "entropy"])
def test_a_hundredfold_key_bias_costs_no_quality(codec, monkeypatch):
    plain = kl(biased_model(0.0), codec)
    loud = biased_model(100.0)
    assert kl(loud, codec) < 3 * plain + 1e-3
    monkeypatch.setattr(Block, "kv_bias", lambda self: None)
    assert kl(loud, codec) > 5 * plain  # what keeping them apart is for


@pytest.mark.usefixtures("warm_stages")
def test_two_processes_give_what_the_simulator_gives(tmp_path):
    """A layer for each codec, the first one raw."""
    rules = tuple(LayerKV(codec=parse_codec(codec)) for codec in ("raw", *LOSSY))
    model = biased_model(100.0, layers=len(rules))
    plan = make_plan(model, Gates.removing(len(rules), prefill={1}), rules)
    batch = random_batch(model, rows=1, prompt=60, new=8)
    with Session(export(plan, model, tmp_path / "pair")) as session:
        got = session.score(batch)
    with torch.inference_mode():
        wanted = forward(Pair.dense(model), batch, plan.gates, HandoverPolicy.of(plan))
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["k_BGND", "v_BGND"])
@pytest.mark.parametrize("codec", ["int4", "raw"])
def test_pairs_that_are_no_numbers_are_refused_with_their_layer(value, side, codec):
    model = biased_model(1.0)
    view = view_of(model, 2)
    setattr(view, side, getattr(view, side).clone())
    getattr(view, side)[0, 1, 7, 3] = value
    policy = HandoverPolicy(rules=rules_of(model, codec))
    what = "key" if side == "k_BGND" else "value"
    with pytest.raises(NotFinite, match=f"layer 2: .* {what} that is NaN or infinite"):
        select(policy, 2, view).check()
    if codec != "raw":  # which the loss would show
        with pytest.raises(NotFinite, match=f"layer 2: .* {what} that is NaN or infinite"):
            hand_over(policy, 2, view)


@pytest.mark.parametrize(
    ("codec", "most"), [("int4", 65504), ("entropy", 65504), ("fp8", 29345792)]
)
def test_pairs_beyond_a_codec_are_refused_with_their_layer(codec, most):
    def group(value):
        v = torch.ones(1, 2, 40, 16)
        v[0, 0, 3, 3] = value
        at = torch.arange(40).expand(1, 2, 40)
        return HeadGroup(heads=(0, 1), k_BgMD=torch.ones_like(v), v_BgMD=v, positions_BgM=at)

    check_bearable(3, parse_codec(codec), group(most))
    loud = group(-1.01 * most)
    with pytest.raises(NotFinite, match=f"layer 3: .* value of .* ends at {most}: plan with a raw"):
        check_bearable(3, parse_codec(codec), loud)
    check_bearable(3, parse_codec("lossless"), loud)
