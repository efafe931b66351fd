import json

import pytest

from helpers import first_last, make_plan, tiny_model
from pdtrim.errors import PlanError
from pdtrim.plan import Gates, LayerKV, PrunePlan


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def plan_data(model, **changes):
    data = make_plan(model, Gates.removing(4, prefill={1}, decode={2})).to_json()
    return {**data, **changes}


def test_a_plan_survives_its_file(model, tmp_path):
    kv = (LayerKV(), first_last(1, 2), LayerKV(), LayerKV())
    plan = make_plan(model, Gates.removing(4, prefill={1}), kv, block_size=4)
    plan.save(tmp_path / "deep" / "plan.json")
    again = PrunePlan.load(tmp_path / "deep" / "plan.json")
    assert again == plan and again.digest == plan.digest


def test_digest_follows_what_runs_and_nothing_else(model):
    plan = make_plan(model, Gates.dense(4))
    data = plan.to_json()
    data["provenance"]["seed"] = 99
    data["model"]["name"] = "elsewhere"
    assert PrunePlan.from_json(data).digest == plan.digest
    changed = {
        make_plan(model, Gates.removing(4, prefill={3})).digest,
        make_plan(model, Gates.removing(4, decode={3})).digest,
        make_plan(model, Gates.dense(4), block_size=2).digest,
        make_plan(model, Gates.dense(4), (first_last(0, 1), *(LayerKV(),) * 3)).digest,
        PrunePlan.from_json({**data, "model": {**data["model"], "fingerprint": "0" * 64}}).digest,
        plan.digest,
    }
    assert len(changed) == 6


@pytest.mark.parametrize(
    "change,words",
    [
        ({"surprise": 1}, "surprise"),
        ({"schema": "pdtrim.plan/9"}, "schema"),
        ({"kv": [{"selector": {"name": "full"}}]}, "kv has 1 entries"),
        ({"kv": [{"selector": {"name": "full", "first": 3}}] * 4}, "first"),
        ({"kv": [{"selector": {"name": "first_last", "first": 0, "last": 0}}] * 4}, "one token"),
        ({"block_size": 0}, "block_size"),
        (
            {
                "replacements": [
                    {
                        "stage": "decode",
                        "layer": 1,
                        "merged": [1, 2],
                        "weights": "../x.safetensors",
                        "sha256": "0" * 64,
                    }
                ]
            },
            "relative",
        ),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(model, change, words):
    with pytest.raises(PlanError, match=words) as caught:
        PrunePlan.from_json(plan_data(model, **change))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(PlanError, match="no plan file"):
        PrunePlan.load(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="not valid JSON"):
        PrunePlan.load(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(PlanError):
        PrunePlan.load(tmp_path / "list.json")


def test_decode_attention_needs_prompt_kv():
    with pytest.raises(ValueError, match="layer 1: decode runs its attention"):
        Gates(
            prefill_attention=("full", "off"),
            prefill_mlp=(True, True),
            decode_attention=(True, True),
            decode_mlp=(True, True),
        )


def test_removing_knows_the_two_modes():
    projected = Gates.removing(4, prefill={1, 2}, decode={2})
    assert projected.prefill_attention == ("full", "kv", "off", "full")
    assert projected.decode_attention == (True, True, False, True)
    assert (projected.blocks("prefill"), projected.blocks("decode")) == (2, 3)
    assert projected.layers("prefill") == (0, 1, 3)
    with pytest.raises(PlanError, match=r"prefill removes \[1\], which decode keeps"):
        Gates.removing(4, prefill={1, 2}, decode={2}, mode="subset")
    with pytest.raises(PlanError, match="layer 4 does not exist"):
        Gates.removing(4, prefill={4})
