"""NaN and infinity end in one line wherever they would decide something; nothing runs for ever."""

from __future__ import annotations

import random

import pytest
import torch

from helpers import perturbed, random_batch, tiny_model, trimmed
from pdtrim.calibration.batches import Calibration
from pdtrim.calibration.teacher import Teacher
from pdtrim.distill.job import DistillConfig
from pdtrim.distill.merge import MergeConfig, merge
from pdtrim.distill.train import distill
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.sensitivity import sensitivity
from pdtrim.kvfit.budget import lagrangian
from pdtrim.methods import METHODS, Target
from pdtrim.methods.baselines.width import WidthMethod
from pdtrim.models.model import Model
from pdtrim.models.swap import swap_blocks
from pdtrim.plan import Gates
from pdtrim.search.anneal import Annealing, anneal
from pdtrim.search.evolution import Evolution, evolution
from pdtrim.search.goal import Goal
from pdtrim.search.greedy import greedy
from pdtrim.search.hybrid import Hybrid, hybrid
from pdtrim.search.objective import Objective
from pdtrim.search.state import Removal
from pdtrim.stage.forward import Trimmed
from pdtrim.stage.sampler import Sampler
from pdtrim.stage.sampling import Sampling

BAD = (torch.nan, torch.inf, -torch.inf)
LAYERS = 4


def broken(value, layer=2, part="mlp.down_proj.weight", layers=LAYERS):
    """A model with one weight that is no number."""
    model = tiny_model("llama", layers=layers)
    with torch.no_grad():
        model.block(layer).module.get_parameter(part)[0, 0] = value
    return model


def overflowing():
    """All weights are finite, and the stream's squares are beyond fp32."""
    model = tiny_model("llama", layers=LAYERS)
    with torch.no_grad():
        model.block(1).module.get_parameter("mlp.down_proj.weight").mul_(1e20)
    return model


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("layer", [0, 2])
def test_calibration_text_that_a_model_does_not_bear_names_the_layer(value, layer):
    model = broken(value, layer)
    with pytest.raises(PdtrimError, match=f"layer {layer} .* NaN or infinite"):
        Teacher.of(model, random_batch(model))


def test_a_stream_whose_squares_overflow_gives_no_zeros():
    """The norm divides by their root: all logits would be 0, and token 0 the next one."""
    model = overflowing()
    with pytest.raises(PdtrimError, match=r"last block .* NaN or infinite"):
        model.head(torch.full((1, 2, 32), 1e20))
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        Teacher.of(model, random_batch(model))
    assert model.head(torch.full((1, 2, 32), 1e15)).isfinite().all()


SEARCHES = {
    "greedy": lambda o, s, g: greedy(o, s, g),
    "anneal": lambda o, s, g: anneal(o, s, g, Annealing(steps=3), rng=random.Random(0)),
    "evolution": lambda o, s, g: evolution(
        o, s, g, Evolution(starts=3, offspring=3, generations=2), rng=random.Random(0)
    ),
    "hybrid": lambda o, s, g: hybrid(
        o, s, g, Hybrid(annealing=Annealing(steps=4)), rng=random.Random(0)
    ),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("after", [0, 1, 7, 11])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_searches_end_at_a_loss_that_is_no_number(search, after, value):
    """Whenever it comes; those whose search ends before it are not harmed."""
    model = tiny_model("llama", layers=LAYERS)
    count = 0

    def loss(model, batch):
        def of(y_BCE):
            nonlocal count
            count += 1
            return (
                y_BCE.float().square().mean((1, 2))
                if count <= after
                else y_BCE.new_tensor([value] * len(y_BCE))
            )

        return of

    objective = Objective(model, random_batch(model), loss=loss)
    goal = Goal.blocks(LAYERS, prefill=1, decode=2)
    with pytest.raises(PdtrimError, match="loss of a removal is NaN or infinite"):
        start = objective.measure(Removal(num_layers=LAYERS, mode="projected", grain="block"))
        for _ in range(5):
            start = SEARCHES[search](objective, start, goal)
            objective.memo.clear(), objective.known.clear()
            start = objective.measure(Removal(num_layers=LAYERS, mode="projected", grain="block"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_budget_is_not_split_by_costs_that_are_no_numbers(value):
    cost_LO, bytes_LO = torch.rand(3, 4).double(), torch.rand(3, 4).double() + 1
    assert lagrangian(cost_LO, bytes_LO, 5.0) is not None
    cost_LO[1, 2] = value
    with pytest.raises(PdtrimError, match="KL of a KV policy"):
        lagrangian(cost_LO, bytes_LO, 5.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e20, 1e150])
def test_a_budget_is_split_whatever_the_size_of_costs_and_bytes(scale):
    draw = torch.Generator().manual_seed(1)
    cost_LO = torch.rand(5, 4, generator=draw, dtype=torch.float64) * scale
    bytes_LO = torch.rand(5, 4, generator=draw, dtype=torch.float64) * 1e6
    least = float(bytes_LO.min(1).values.sum())
    choice = lagrangian(cost_LO, bytes_LO, least)
    assert sum(float(bytes_LO[i, o]) for i, o in enumerate(choice)) <= least * (1 + 1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1e-31, 1.0])
def test_a_sampler_refuses_logits_that_are_no_numbers(value, temperature):
    logits = torch.randn(2, 50)
    logits[1, 7] = value
    with pytest.raises(PdtrimError, match="logit of the next token"):
        Sampler(Sampling(temperature=temperature), 2)(logits)
    logits[1] = -torch.inf
    with pytest.raises(PdtrimError, match="logit of the next token"):
        Sampler(Sampling(temperature=temperature), 2)(logits)
    logits[1, 3] = 0.0  # all others are forbidden
    assert Sampler(Sampling(temperature=temperature), 2)(logits)[1] == 3


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-31, 1e-30, 1e-20, 1e-9])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e30])
def test_cold_sampling_is_greedy_and_never_overflows(temperature, size):
    logits = size * (torch.randperm(400, generator=torch.Generator().manual_seed(2)) - 50.0)[None]
    for top_p in (1.0, 0.5):
        sampler = Sampler(Sampling(temperature=temperature, top_p=top_p), 1)
        assert sampler(logits) == logits.argmax(-1)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-1e-9, 10.1, torch.nan, torch.inf, "1", True, 10**5000)),
        *({"top_p": p} for p in (0.0, -0.1, 1.0001, torch.nan, torch.inf, "1", None, 10**5000)),
        *({"seed": s} for s in (-1, 2**63, 10**5000, 1.0, "1", None, True)),
    ],
    ids=lambda wrong: str(next(iter(wrong))),
)
def test_sampling_that_makes_no_sense_is_refused_in_one_line(wrong):
    with pytest.raises(PdtrimError) as caught:
        Sampling(**wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 100
    Sampling(temperature=10, top_p=1, seed=2**63 - 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_measuring_refuses_a_variant_that_makes_no_numbers(value):
    model, batch = tiny_model("llama", layers=LAYERS), random_batch(tiny_model("llama"))
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        measure_quality(model, {"broken": Trimmed.dense(broken(value))}, batch)
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        sensitivity(broken(value), batch)


def test_a_training_ends_at_a_loss_that_is_no_number():
    """A rate at which it diverges, and data on which the dense model makes none."""
    model = tiny_model("llama", layers=LAYERS)
    gates = Gates.removing(LAYERS, decode=[1])
    data = [random_batch(model, rows=4, seed=seed) for seed in (1, 2)]
    config = DistillConfig(steps=30, learning_rate=1e25, warmup=0.0, compute="float32", rows=2)
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        distill(model, trimmed(model, gates), *data, config)
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        distill(broken(torch.nan), trimmed(broken(torch.nan), gates), *data, config)


def test_a_merge_ends_at_an_error_that_is_no_number():
    model = overflowing()
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        merge(model, random_batch(model), 1, MergeConfig(steps=2, compute="float32"))


@pytest.mark.parametrize("value", BAD)
def test_replaced_blocks_hold_numbers(value):
    """Those that repairs, trainings and plan files bring all enter a model in one place."""
    model = tiny_model("llama", layers=LAYERS)
    weights = perturbed(model, 1)
    swap_blocks(model, {1: weights})
    weights["mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(PdtrimError, match=r"'mlp.up_proj.weight' of the block .* layer 1.* NaN"):
        swap_blocks(model, {1: weights})
    half = Model(model.network.to(torch.float16))
    weights["mlp.up_proj.weight"][3, 4] = 1e6
    with pytest.raises(PdtrimError, match=r"layer 1, in torch.float16, is NaN or infinite"):
        swap_blocks(half, {1: weights})


@pytest.mark.parametrize("name", [name for name in METHODS if "+" not in name])
@pytest.mark.parametrize("layer", [0, 6])
def test_no_method_plans_on_scores_that_are_no_numbers(name, layer):
    model = broken(torch.nan, layer, layers=8)
    batch = random_batch(model, rows=4, prompt=13, new=7)
    text = Calibration(search=batch, rerank=batch, fit=batch, source="x", hash="0" * 64)
    mode = METHODS[name].default_mode
    blocks = Target(prefill_remove=1, decode_remove=1, mode=mode)
    shares = Target(metric="parameters", mode="unified", prefill_share=0.1, decode_share=0.1)
    target = shares if issubclass(METHODS[name], WidthMethod) else blocks
    with pytest.raises(PdtrimError, match="NaN or infinite"):
        METHODS[name]().plan(model, text, target)
