"""Narrower blocks in plans: what is refused, what they cost, who makes and shows them."""

import hashlib
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers import export, first_last, make_plan, pair_of, random_batch, tiny_config, trim_of
from narrow_models import (
    BIASES,
    GATES,
    F,
    L,
    R,
    biases,
    grouped,
    narrow_plan,
    width,
    widths,
)
from pdtrim.calibration.batches import Calibration
from pdtrim.errors import PlanError
from pdtrim.evaluate.quality import Quality
from pdtrim.evaluate.result import make_row
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kv.selectors import Duo, SnapKV
from pdtrim.kvfit.policy import parse_policy
from pdtrim.methods import Target
from pdtrim.methods.base import Found, Method
from pdtrim.plan import STAGES, Gates, LayerKV, PrunePlan, Width, Widths
from pdtrim.report.inspect import picture
from pdtrim.stage.cost import Lengths, removed_parameters, stage_flops


@pytest.fixture(scope="module")
def model():
    return grouped("llama")


# --- plans ---


def changed(data, stage, layer, **changes):
    data["widths"][stage][layer] = {**data["widths"][stage][layer], **changes}


@pytest.mark.parametrize(
    "spoil,words",
    [
        (lambda d: d["widths"]["decode"].pop(), "decode widths has 3 entries .* 4 layers"),
        (
            lambda d: changed(d, "prefill", 0, groups=[0, 3, 4]),
            "prefill keeps KV head 4 of layer 0",
        ),
        (lambda d: changed(d, "prefill", 0, groups=[3, 0]), "ascending head numbers"),
        (lambda d: changed(d, "prefill", 0, groups=[0, 0]), "ascending head numbers"),
        (lambda d: changed(d, "prefill", 0, groups=[-1, 0]), "ascending head numbers"),
        (lambda d: changed(d, "prefill", 0, groups=[]), "groups"),
        (
            lambda d: changed(d, "prefill", 0, groups=[0, 2]),
            r"layer 0: decode keeps KV heads \[3\]",
        ),
        (lambda d: changed(d, "decode", 2, neurons="00"), "neurons"),
        (lambda d: changed(d, "decode", 2, neurons="0g"), "neurons"),
        (lambda d: changed(d, "decode", 2, heads=[0]), "heads"),
        (lambda d: d["widths"].pop("decode"), "widths.decode"),
        (lambda d: d["kv"][2].update(selector={"name": "duo"}), "layer 2: 'duo' numbers all 4 KV"),
        (
            lambda d: d["kv"][0].update(
                selector={"name": "gate", "weights": "AAA=", "threshold": 0.0}
            ),
            "layer 0: 'gate' numbers all 4 KV heads, but decode keeps 2",
        ),
    ],
)
def test_bad_widths_are_told_in_one_line(model, spoil, words, tmp_path):
    data = narrow_plan(model).to_json()
    spoil(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=words) as error:
        PrunePlan.load(path)
    assert "\n" not in str(error.value)


def test_a_head_of_a_layer_that_nothing_reads_is_free(model):
    data = narrow_plan(model).to_json()
    changed(data, "prefill", 0, groups=[1])
    data["gates"]["decode_attention"][0] = False
    assert PrunePlan.from_json(data).sent_layers == (1, 2, 3)
    data["kv"][3]["selector"] = Duo(full_heads=(3,)).model_dump()  # a layer of all heads
    PrunePlan.from_json(data)


def test_neurons_that_the_model_lacks_are_told_when_it_is_cut(model, tmp_path):
    beyond = Width.of(groups=(0,), neurons=(1, F), num_neurons=F + 4)
    plan = narrow_plan(model, given=Widths(prefill=(None,) * L, decode=(beyond, *[None] * 3)))
    for make in (lambda: pair_of(plan, model, None), lambda: removed_parameters(model, plan)):
        with pytest.raises(PlanError, match="layer 0 has 4 KV heads and 48 MLP neurons") as error:
            make()
        assert "\n" not in str(error.value)


def test_widths_belong_to_the_digest_and_their_absence_does_not(model):
    plan = make_plan(model, GATES[0])
    old = {key: value for key, value in plan.to_json().items() if key != "widths"}
    assert PrunePlan.from_json(old).digest == plan.digest
    del old["provenance"]  # as plans were hashed before there were widths
    old["model"] = {"fingerprint": plan.model.fingerprint}
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    assert plan.digest == hashlib.sha256(text.encode()).hexdigest()
    biased = Widths(prefill=widths().prefill, decode=(width((0, 3), 7), *widths().decode[1:]))
    digests = [plan.digest, narrow_plan(model).digest, narrow_plan(model, given=biased).digest]
    assert len(set(digests)) == 3


def test_a_width_holds_its_neurons():
    for neurons in ([0], [3, 4, 47], range(48), [46]):
        made = Width.of(groups=(1, 0), neurons=neurons, num_neurons=48)
        assert made.kept_neurons == tuple(neurons) and made.groups == (0, 1)
    assert Width.of(groups=(0,), neurons=(0, 5), num_neurons=6).neurons == "84"


# --- costs, pictures, methods, servers ---


PLANS = {
    "dense": {"given": Widths(prefill=(None,) * L, decode=(None,) * L), "blocks": {}},
    "narrow": {},
    "gates": {"gates": GATES[1].without_dead_work()},
    "selector": {"gates": GATES[1].without_dead_work(), "kv": (LayerKV(selector=SnapKV()),) * L},
}


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", PLANS)
def test_removed_parameters_are_those_that_the_files_lack(family, name, tmp_path):
    model = grouped(family)
    plan = narrow_plan(
        model, tmp_path, **{"gates": Gates.dense(L).without_dead_work()} | PLANS[name]
    )
    dense = make_plan(model, Gates.dense(L).without_dead_work(), plan.kv)

    def held(folder):
        return {
            stage: sum(
                tensor.numel()
                for key, tensor in load_file(folder / stage / "model.safetensors").items()
                if key.startswith("model.layers.")
            )
            for stage in STAGES
        }

    ours = held(trim_of(plan, tmp_path).export(model, tmp_path / "ours"))
    whole = held(export(dense, model, tmp_path / "dense"))
    removed = removed_parameters(model, plan)
    assert removed == pytest.approx({s: 1 - ours[s] / whole[s] for s in STAGES}, abs=1e-12)
    assert all((share == 0) == (name == "dense") for share in removed.values())
    assert removed_parameters(model, make_plan(model, Gates.dense(L))) == {
        "prefill": 0,
        "decode": 0,
    }


def test_operations_of_equal_widths_are_those_of_a_smaller_model(model):
    kept = width((0, 2), 4)
    narrow = Widths(prefill=(kept,) * L, decode=(kept,) * L)
    small = tiny_config(
        "llama",
        layers=L,
        hidden_size=64,
        head_dim=8,
        num_attention_heads=2 * R,
        num_key_value_heads=2,
        intermediate_size=len(kept.kept_neurons),
    )
    lengths, policy = (
        Lengths(prompt=30, continuation=9),
        HandoverPolicy(rules=(first_last(2, 3),) * L),
    )
    for gates in GATES:
        ours = stage_flops(model.config, gates, policy, lengths, widths=narrow)
        assert ours == stage_flops(small, gates, policy, lengths)
        assert ours < stage_flops(model.config, gates, policy, lengths)
    one = Widths(prefill=(None,) * L, decode=(kept,) * L)
    half = stage_flops(model.config, GATES[0], policy, lengths, widths=one)
    assert half[0] == stage_flops(model.config, GATES[0], policy, lengths)[0]
    assert half[1] == stage_flops(small, GATES[0], policy, lengths)[1]
    quality = Quality(kl_n=torch.zeros(2), nll_n=torch.ones(2))
    plan = narrow_plan(model, given=one)
    row = make_row("it", model, quality, plan, lengths=lengths, kv_bytes=1.0, dense_kv_bytes=2.0)
    assert row.prefill_flops_ratio == 1 and row.decode_flops_ratio < 0.9


def test_the_picture_shows_what_is_kept(model):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture(narrow_plan(model, gates=GATES[1])))
    lines = [line.split() for line in console.export_text().splitlines()]
    kept = {layer: widths().of(stage)[layer] for layer, stage in ((0, "prefill"), (2, "prefill"))}
    neurons = {layer: str(len(w.kept_neurons)) for layer, w in kept.items()}
    assert ["0", "3", "of", "4", neurons[0], "2", "of", "4", "41"] in lines
    assert ["1", "4", "of", "4", "all", "2", "of", "4", "36"] in lines
    assert ["2", "2", "of", "4", neurons[2], "1", "of", "4", "24"] in lines
    assert [line[2:] for line in lines if "attention," in line] == [
        ["attention,", "0", "whole", "blocks", "of", "4"],  # of the first and last, both narrower
        ["attention,", "0", "whole", "blocks", "of", "4"],
    ]
    plain = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    plain.print(picture(make_plan(model, GATES[0])))
    assert "narrower" not in plain.export_text()


class Given(Method):
    """Finds what it was given."""

    name = "given"

    def __init__(self, found):
        self.found = found

    def solve(self, problem):
        return self.found


def test_a_method_may_find_widths_and_their_biases(model, tmp_path):
    batch = random_batch(model)
    text = Calibration(search=batch, rerank=batch, fit=batch, source="x", hash="0" * 64)
    bare = Found(gates=GATES[0], block_tokens=0, widths=widths())
    plan = Given(bare).plan(model, text, Target()).plan
    assert plan.widths == widths() and plan.replacements == ()
    found = Found(gates=GATES[0], block_tokens=0, widths=widths(), blocks=biases(model))
    made = Given(found).plan(model, text, Target())
    saved = made.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == saved.plan and made.plan.widths == widths()
    assert saved.plan.digest == made.plan.digest
    ours = made.pair(model).decode.block(1).module.mlp.down_proj.bias
    assert torch.equal(ours, biases(model)["decode"][1][BIASES[1]])
    duo = Target(kv=parse_policy("duo:share=0.5"))
    with pytest.raises(PlanError, match="method 'given': layer 0: 'duo' numbers all") as error:
        Given(bare).plan(model, text, duo)
    assert "\n" not in str(error.value)
