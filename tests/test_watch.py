"""Replayed requests: what is measured, which are picked, what is told of them, and drift."""

import difflib
import inspect
import io
import itertools
import json
import threading
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from helpers import make_plan, tiny_model
from pdtrim.bundle import TrimPlan
from pdtrim.cli import app
from pdtrim.cli.watch import _table as watch_table
from pdtrim.demo import _squad
from pdtrim.errors import ModelError, PdtrimError
from pdtrim.evaluate.handover import loopback_bytes
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.watch import Sample
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, HeldOutScore
from pdtrim.reading.requests import Request
from pdtrim.stage.forward import Batch, Trimmed, forward
from pdtrim.verbs.watch import WatchConfig, watch_log, watch_requests

HOUR = 3600
LOUD, QUIET = range(3, 33), range(33, 64)
"""Tokens whose embeddings drown what a block adds, and tokens that live on it."""
CONFIG = WatchConfig(share=1.0, dtype="float32", answer_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder):
    """A model, and a plan that lost a block of prefill and one of decode."""
    place = tmp_path_factory.mktemp("watch")
    made = tiny_model("llama", vocab_size=64)
    with torch.no_grad():
        made.network.model.embed_tokens.weight[list(LOUD)] *= 30
    made.network.save_pretrained(place / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "m" / name).write_bytes((tiny_folder / name).read_bytes())
    model = load_model(str(place / "m"), dtype="float32")
    make_plan(model, Gates.removing(4, prefill={1}, decode={2})).save(place / "plan.json")
    return place


@pytest.fixture(scope="module")
def plan(folder):
    return folder / "plan.json"


def row(tokens, seed, *, time=0, prompt=20, answer=6):
    """A request of random tokens of a kind."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(0, len(tokens), (prompt + answer,), generator=generator)
    ids = [tokens[i] for i in at.tolist()]
    return {"prompt": ids[:prompt], "answer": ids[prompt:], "time": time, "id": str(seed)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def reference(folder, plan):
    """What the pair costs on loud text, as a file."""
    log = write(folder / "reference.jsonl", [row(LOUD, 1000 + i) for i in range(40)])
    path = folder / "reference.json"
    path.write_text(json.dumps(watch_requests(plan, log, CONFIG)))
    return str(path)


def test_what_is_replayed_is_what_eval_measures(plan, tmp_path):
    rows = [row(LOUD, i, time=HOUR * 5 + i, prompt=9 + i) for i in range(3)]
    found = watch_requests(plan, write(tmp_path / "log", rows), CONFIG)
    trim = TrimPlan.open(plan)
    model = load_model(str(plan.parent / "m"), dtype="float32")
    pair = trim.pair(model)
    kls, same, sent = [], [], 0
    for one in rows:
        batch = Batch(
            prompt_BP=torch.tensor([one["prompt"]]), continuation_BC=torch.tensor([one["answer"]])
        )
        quality = measure_quality(model, {"x": Trimmed.of(trim.plan, pair)}, batch)["x"]
        kls.append(quality.kl)
        dense, pruned = (
            forward(pair, batch, gates).argmax(-1) for gates in (Gates.dense(4), trim.plan.gates)
        )
        same.append(float((dense == pruned).float().mean()))
        sent += loopback_bytes(trim.plan, pair.prefill, batch).frame
    (hour,) = found["hours"]
    assert found["kls"] == pytest.approx(kls)
    assert (hour["start"], hour["requests"]) == (HOUR * 5, 3)
    assert hour["kl"] == pytest.approx(sum(kls) / 3) and min(kls) > 0
    assert hour["agreement"] == pytest.approx(sum(same) / 3) and 0 < sum(same) < 3
    assert hour["kv_bytes_per_token"] == pytest.approx(sent / (9 + 10 + 11))


def test_hours_are_those_of_the_log(plan, tmp_path):
    times = [HOUR - 1, HOUR, HOUR + 5, HOUR - 7, 3 * HOUR]  # the fourth came late
    rows = [row(LOUD, i, time=time) for i, time in enumerate(times)]
    found = watch_requests(plan, write(tmp_path / "log", rows), CONFIG)
    assert [(h["start"], h["requests"]) for h in found["hours"]] == [
        (0, 1),
        (HOUR, 3),
        (3 * HOUR, 1),
    ]


def test_the_same_requests_are_picked_whenever_the_log_is_read():
    keys = [Request(key=b"%d" % i, prompt=(1,)) for i in range(4000)]

    def picked(seed, share):
        sampling = Sample(share=share, seed=seed, per_hour=9, prompt_tokens=9, answer_tokens=9)
        return {i for i, request in enumerate(keys) if sampling.picks(request)}

    assert picked(0, 0.1) == picked(0, 0.1) < picked(0, 0.3)
    assert 300 < len(picked(0, 0.1)) < 500
    assert len(picked(0, 0.1) & picked(1, 0.1)) < 100
    assert len(picked(0, 1.0)) == 4000


def test_what_is_not_replayed_is_counted(plan, tmp_path):
    rows = [
        {"prompt": [5]},  # nothing that could follow
        {"prompt": [1, 2, 64]},
        {"prompt": [3] * 40, "answer": [4]},
        {"prompt": [3] * 30, "answer": [4]},
        {"prompt": [3] * 30, "answer": [4]},
        {"text": "w1"},
    ]
    config = replace(CONFIG, prompt_tokens=30, per_hour=1)
    found = watch_requests(plan, write(tmp_path / "log", rows), config)
    assert found["skipped"] == {
        "unreadable": 1, "short": 1, "long": 1, "foreign": 1, "over the hour's limit": 1,
    }  # fmt: skip
    assert (found["requests"], found["replayed"]) == (5, 1)


def test_a_prompt_without_an_answer_is_cut_in_two(plan, tmp_path):
    whole, cut = row(LOUD, 1), row(LOUD, 1)
    whole["prompt"] += whole.pop("answer")
    logs = write(tmp_path / "a", [whole]), write(tmp_path / "b", [cut])
    first, second = (watch_requests(plan, log, CONFIG)["kls"] for log in logs)
    assert first == pytest.approx(second)


def test_texts_are_read_by_the_models_tokenizer(plan, tmp_path):
    texts = {"prompt": "w0 w1 w2 w3 w4", "answer": "w5 w6"}
    ids = {"prompt": [3, 4, 5, 6, 7], "answer": [8, 9]}
    found = watch_requests(plan, write(tmp_path / "log", [texts, ids]), CONFIG)
    assert found["kls"][0] == pytest.approx(found["kls"][1])


def test_a_model_without_a_tokenizer_is_said_and_not_skipped(folder, tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((folder / "m" / name).read_bytes())
    log = write(tmp_path / "log", [{"prompt": "w1 w2 w3 w4"}])
    with pytest.raises(ModelError, match="tokenizer"):
        watch_requests(folder / "plan.json", log, replace(CONFIG, model=str(model)))


def test_changed_text_calls_for_a_new_plan_and_unchanged_text_does_not(plan, reference, tmp_path):
    config = replace(CONFIG, reference=reference)
    calm = [row(LOUD, i, time=HOUR * (i // 30)) for i in range(240)]
    found = watch_requests(plan, write(tmp_path / "calm", calm), config)
    assert [hour["drift"] for hour in found["hours"]] == [False] * 8
    assert found["drift"] is False and found["said"] == "no drift"
    turned = [*calm[:30], *(row(QUIET, i, time=HOUR) for i in range(30))]
    found = watch_requests(plan, write(tmp_path / "turned", turned), config)
    assert [hour["drift"] for hour in found["hours"]] == [False, True]
    assert found["hours"][1]["kl"] > 1.5 * found["expected"]["kl"]
    assert found["said"].startswith("a new plan is called for")


def test_the_plans_own_held_out_text_is_the_reference(plan, reference, tmp_path):
    kls = json.loads(Path(reference).read_text())["kls"]
    made = TrimPlan.open(plan).plan
    score = HeldOutScore(kl=sum(kls) / len(kls), kls=tuple(kls))
    kept = made.model_copy(
        update={"provenance": made.provenance.model_copy(update={"held_out": score})}
    )
    assert kept.digest == made.digest
    kept.save(tmp_path / "plan.json")
    log = write(tmp_path / "log", [row(QUIET, i) for i in range(30)])
    found = watch_requests(tmp_path / "plan.json", log, CONFIG)
    other = watch_requests(plan, log, replace(CONFIG, reference=reference))
    assert found["hours"] == other["hours"] and found["drift"] is True
    untested = watch_requests(plan, log, CONFIG)
    assert untested["drift"] is None and "give --reference" in untested["said"]


def test_a_reference_of_another_plan_is_refused(plan, reference, tmp_path):
    data = json.loads(Path(reference).read_text())
    log = write(tmp_path / "log", [row(LOUD, 1)])
    for change, words in (
        ({"plan_digest": "0" * 64}, "of another plan"),
        ({"schema": "x"}, "is not what"),
        ({"kls": [0.1, "x"]}, "lacks the KLs"),
        ({"kls": []}, "lacks the KLs"),
    ):
        path = tmp_path / "other.json"
        path.write_text(json.dumps(data | change))
        with pytest.raises(PdtrimError, match=words):
            watch_requests(plan, log, replace(CONFIG, reference=str(path)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"share": 0.0}, "--share 0"),
        ({"share": float("nan")}, "--share nan"),
        ({"per_hour": 0}, "--per-hour 0"),
        ({"worse": 0.5}, "--worse 0.5"),
        ({"false_alarms": 0.0001}, "--false-alarms"),
        ({"port": 70000}, "--port"),
    ],
)
def test_settings_out_of_range_are_refused(plan, tmp_path, change, words):
    with pytest.raises(PdtrimError, match=words):
        watch_requests(plan, tmp_path / "log", replace(CONFIG, **change))


def test_a_log_without_a_request_is_refused(plan, tmp_path):
    log = write(tmp_path / "log", [])
    log.write_text("INFO nothing here\n")
    with pytest.raises(PdtrimError, match="no request in"):
        watch_requests(plan, log, CONFIG)


SECRET = "w40 w41 w42 w43 w44 w45"


def test_nothing_of_a_request_is_told(plan, reference, tmp_path):
    """In metrics, rows, JSON: neither texts nor ids, though a line is damaged too."""
    rows = [row(LOUD, i) for i in range(25)] + [{"prompt": SECRET, "answer": SECRET}]
    log = write(tmp_path / "log", [*rows, {"prompt": [99999999], "id": SECRET}])
    with log.open("a") as file:
        file.write('{"prompt": "' + SECRET + "\n")
    args = ["watch", str(plan), str(log), "--share", "1", "--dtype", "float32", "--once"]
    args += ["--reference", reference, "--textfile", str(tmp_path / "m.prom")]
    told = ""
    for more in ([], ["--json"]):
        done = CliRunner().invoke(app, [*args, *more])
        assert done.exit_code == 0, done.output
        told += done.output
    page = (tmp_path / "m.prom").read_text()
    assert "25" in told and "pdtrim:watch_kl{" in page
    for words in ("w40", "w45", "99999999"):
        assert words not in told + page


def test_a_log_is_followed_and_answered_for_on_metrics(plan, reference, tmp_path):
    """What comes while it is watched is on /metrics when its hour has ended."""
    log = write(tmp_path / "log", [row(QUIET, i) for i in range(30)])
    config = replace(
        CONFIG, reference=reference, port=0, textfile=str(tmp_path / "m.prom"), every=9.0
    )
    said, hours, pages = [], [], []
    steps = iter((row(LOUD, 50, time=HOUR), row(LOUD, 51, time=2 * HOUR)))

    def look(seconds):
        assert seconds == 9.0
        with urllib.request.urlopen(said[0].split()[-1], timeout=30) as answer:
            pages.append(answer.read().decode())
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        with log.open("a") as file:
            file.write(json.dumps(step) + "\n")

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        watch_log(plan, log, config, say=said.append, row=hours.append, wait=look)
    assert said[0].startswith("metrics on http://127.0.0.1:")
    assert [hour["requests"] for hour in hours] == [30, 1]
    digest = TrimPlan.open(plan).plan.digest[:12]
    label = f'{{plan="{digest}"}}'
    assert f"pdtrim:watch_replayed_requests_total{label} 30.0" in pages[0]
    assert f"pdtrim:watch_kl{label}" not in pages[0] and "watch_expected_kl{" in pages[0]
    assert f"pdtrim:watch_drift{label} 1.0" in pages[1]
    assert f"pdtrim:watch_kl{label} {hours[0]['kl']}" in pages[1]
    assert f"pdtrim:watch_drift{label}" not in pages[2]  # one request is too few to test
    assert f"pdtrim:watch_hour_timestamp_seconds{label} 3600.0" in pages[2]
    assert (tmp_path / "m.prom").read_text().splitlines()[:3] == pages[2].splitlines()[:3]
    assert threading.active_count() <= before


def test_an_old_log_is_left_out_without_backlog(plan, tmp_path):
    log = write(tmp_path / "log", [row(LOUD, i) for i in range(3)])
    pages, said = [], []

    def look(seconds):
        with urllib.request.urlopen(said[0].split()[-1], timeout=30) as answer:
            pages.append(answer.read().decode())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_log(plan, log, replace(CONFIG, backlog=False, port=0), say=said.append, wait=look)
    assert 'watch_requests_total{plan="' in pages[0] and "} 0.0" in pages[0]
    assert "drift is not tested" in said[1]


@pytest.mark.slow
def test_english_that_turns_into_code_is_drift_of_a_real_model(smollm2, smollm2_folder, tmp_path):
    """A plan that lost prefill blocks, judged on English: other English is borne, code is not."""
    plan = make_plan(smollm2, Gates.removing(30, prefill=range(20, 26)))
    plan.save(tmp_path / "plan.json")
    config = replace(
        CONFIG, model=str(smollm2_folder), answer_tokens=32, worse=1.2, false_alarms=0.01
    )
    texts = [text[:400] for text in itertools.islice(_squad(), 100)]

    def rows(found, hour):
        return [{"prompt": text, "time": hour * HOUR} for text in found]

    judged = write(tmp_path / "judged", rows(texts[:20], 0))
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps(watch_requests(tmp_path / "plan.json", judged, config)))
    sources = [inspect.getsource(module)[20_000:] for module in (difflib, zipfile)]
    code = [source[at : at + 400] for source in sources for at in range(0, 10 * 800, 800)]
    log = write(tmp_path / "log", [*rows(texts[50:70], 0), *rows(code, 1)])
    config = replace(config, reference=str(reference))
    found = watch_requests(tmp_path / "plan.json", log, config)
    assert [hour["drift"] for hour in found["hours"]] == [False, True], found["hours"]


def test_the_table_of_hours_is_whole_in_80_columns():
    hour = {
        "start": 1795770000, "requests": 12_345, "kl": 12.0304, "kl_error": 0.0031,
        "agreement": 1.0, "kv_bytes_per_token": 130_504.0, "p": 0.0001, "drift": None,
    }  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(watch_table({"hours": [hour]}))
    shown = console.file.getvalue()
    for cell in ("12,345", "12.0304 (0.0031)", "100.0%", "130,504", "0.0001", "untested"):
        assert cell in shown, shown
    assert "…" not in shown
