"""The table of predicted against measured is that of today's cost model."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

from pdtrim.cost.kept import CODECS, STAGES
from pdtrim.cost.times import StageTimes

FOLDER = Path(__file__).parent.parent / "benchmarks" / "predicted_202611"


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("predict", FOLDER / "predict.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["predict"] = module  # dataclasses look for theirs
    spec.loader.exec_module(module)
    yield module
    del sys.modules["predict"]


def test_the_table_is_what_the_model_predicts_today(predict):
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == predict.report()


def test_serving_without_codecs_is_predicted_within_a_tenth(predict):
    """Means of the time to the first token and of a token's time; no row of these was read."""
    found = predict.under_load(predict.served())
    for (system, rate), cells in found.items():
        if system in ("stock", "pruned"):
            assert not cells["mean"].read
            assert abs(cells["mean"].error) < 0.1 and abs(cells["tpot"].error) < 0.1, (system, rate)


def test_the_load_generators_times_are_those_that_were_served(predict):
    """While prompts queue, first tokens come a prefill apart; times of another seed scatter."""
    row = predict.served()["stock", "8192@5"]
    at = predict.arrivals(row["requests"], 5)
    first = [a + t for a, t in zip(at, row["ttft_s"], strict=True)]
    gaps = [b - a for a, b in itertools.pairwise(first[30:])]
    assert min(gaps) > 0.1 and max(gaps) < 0.3
    assert at[-1] == pytest.approx(15.0)


@pytest.fixture
def calibrate(predict, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("calibrate")
    del sys.modules["calibrate"]


def test_the_kept_codec_times_of_a_layer_are_the_benchmarks(calibrate):
    kept = json.loads((CODECS / "bench_8_3824_128.json").read_text(encoding="utf-8"))
    assert kept == calibrate.layer_codecs()


def test_the_kept_times_of_an_h200_are_calibrated_by_the_script(calibrate, tmp_path, monkeypatch):
    pytest.importorskip("aiconfigurator_core")
    kept = StageTimes.load(STAGES / "llama-3.1-8b_h200_sxm.json")
    monkeypatch.setattr(calibrate, "STAGES", tmp_path)
    monkeypatch.setattr(calibrate, "CODECS", tmp_path)
    calibrate.calibrate()
    assert StageTimes.load(tmp_path / "llama-3.1-8b_h200_sxm.json") == kept
