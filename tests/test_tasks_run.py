"""Whole tasks: scores item by item, WikiText under prefill/decode inference, the command."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from helpers import make_plan
from pdtrim.cli import main
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.configs import TasksConfig
from pdtrim.evaluate.statistics import paired_difference
from pdtrim.evaluate.tasks.lm import PDTrimLM
from pdtrim.evaluate.tasks.run import run_task
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.evaluate.tasks.wikitext import spaced
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates
from pdtrim.stage.forward import Pair, Trimmed
from test_tasks import CLOSED
from test_tasks_sources import write

CHOICES = [
    {"question": f"w{i}", "choices": [f"w{i + 1} w{i + 2}", f"w{2 * i} w3 w4"], "answer": i % 2}
    for i in range(12)
]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


@pytest.fixture(scope="module")
def dense(tiny):
    return Trimmed.dense(tiny)


@pytest.fixture(scope="module")
def cut(tiny):
    return Trimmed.of(make_plan(tiny, CLOSED), Pair.dense(tiny))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a few rows of several tasks, in the tiny tokenizer's words."""
    place = tmp_path_factory.mktemp("rows")
    write(place, task="piqa", lines=CHOICES)
    letters = [
        {**row, "choices": list("pqrs"), "subject": ("virology", "anatomy")[i % 3 == 1]}
        for i, row in enumerate(CHOICES)
    ]
    write(place, task="mmlu", lines=letters)
    write(place, task="lambada_openai", lines=[{"text": f"w{i} w5 w{i + 1}"} for i in range(4)])
    questions = [{"question": f"w{i}", "answer": f"w1 #### {i}"} for i in range(5)]
    write(place, task="gsm8k", lines=questions)
    write(place, task="gsm8k", name="fewshot.jsonl", lines=questions)
    return place


def config(data, **changes):
    return TasksConfig(data=str(data), **changes)


def test_scores_say_what_was_run(dense, data):
    scores = run_task(dense, "piqa", config(data))
    assert (scores.task, scores.source, scores.shots, scores.count) == ("piqa", data.name, 0, 12)
    assert scores.version.startswith("1.0, lm-eval 0.4.")
    assert scores.main == "acc_norm" and set(scores.items) == {"acc", "acc_norm"}
    for name, values in scores.items.items():
        assert len(values) == 12 and set(values) <= {0.0, 1.0}
        assert scores.metrics[name] == pytest.approx(sum(values) / 12)


def test_items_are_scored_by_the_likelihoods_of_their_answers(dense, data, monkeypatch):
    def loglikelihood(self, requests, disable_tqdm=False):
        # by characters the second answer wins, in sum the first
        return [((-4.0, -5.0)[one.args[1].endswith("w3 w4")], False) for one in requests]

    monkeypatch.setattr(PDTrimLM, "loglikelihood", loglikelihood)
    scores = run_task(dense, "piqa", config(data))
    assert scores.items["acc"] == (1.0, 0.0) * 6
    assert scores.items["acc_norm"] == (0.0, 1.0) * 6


def test_items_of_subjects_stand_in_the_order_of_the_source(dense, data, monkeypatch):
    def loglikelihood(self, requests, disable_tqdm=False):
        # right for questions of w4, w7 and w8: the answers are A for even rows and B for odd ones
        def likely(context, letter):
            word = context.split("\nA.")[0].rsplit("\n", 1)[-1]
            wanted = {"w4": " A", "w8": " A", "w7": " B"}.get(word, " D")
            return 0.0 if letter == wanted else -1.0

        return [(likely(*one.args), False) for one in requests]

    monkeypatch.setattr(PDTrimLM, "loglikelihood", loglikelihood)
    scores = run_task(dense, "mmlu", config(data))
    assert [i for i, hit in enumerate(scores.items["acc"]) if hit] == [4, 7, 8]
    assert scores.metrics == {"acc": 0.25}


def test_both_answers_of_gsm8k_are_read(dense, data, monkeypatch):
    answers = ["w1 #### 0", "it is 1", "#### 3 4", "none", "#### 5, then 4"]
    seen = []

    def generate_until(self, requests, disable_tqdm=False):
        seen.extend(one.args[0] for one in requests)
        return answers

    monkeypatch.setattr(PDTrimLM, "generate_until", generate_until)
    scores = run_task(dense, "gsm8k", config(data))
    assert scores.items["exact_match"] == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert scores.items["exact_match_flexible"] == (1.0, 1.0, 0.0, 0.0, 1.0)
    assert (scores.shots, scores.main) == (5, "exact_match")
    assert all(context.count("Question:") == 6 for context in seen)


def test_generation_runs_to_the_end(cut, data):
    scores = run_task(cut, "gsm8k", config(data, shots=1, limit=2))
    assert scores.count == 2 and scores.metrics["exact_match"] == 0.0


def test_perplexity_of_words_is_of_their_mean(dense, data):
    scores = run_task(dense, "lambada_openai", config(data))
    nll = scores.items["perplexity"]
    assert min(nll) > 0 and scores.main == "acc"
    assert scores.metrics["perplexity"] == pytest.approx(math.exp(sum(nll) / 4))


def test_variants_pair_by_the_hash_of_their_items(dense, cut, data, tmp_path):
    a, b = (run_task(variant, "piqa", config(data)) for variant in (dense, cut))
    assert a.items_hash == b.items_hash
    assert a.items != b.items
    paired_difference(a.items[a.main], b.items[b.main], seed=0, samples=100)
    write(tmp_path, task="piqa", lines=[{**row, "question": "w9"} for row in CHOICES])
    asked_else = run_task(dense, "piqa", config(tmp_path))
    assert asked_else.items_hash != a.items_hash
    fewer = run_task(dense, "piqa", config(data, limit=11))
    assert fewer.items_hash != a.items_hash
    assert fewer.items["acc"] == a.items["acc"][:11]


def test_batches_change_nothing(cut, data):
    assert run_task(cut, "piqa", config(data)) == run_task(
        cut, "piqa", config(data, batch_tokens=9)
    )


# ---- WikiText


@pytest.fixture(scope="module")
def wiki(tmp_path_factory):
    place = tmp_path_factory.mktemp("wiki")
    ids = torch.randint(0, 61, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    words = [f"w{i}" for i in ids]
    pieces = [" ".join(words[:40]) + "\n \n", " ".join(words[40:]) + "\n"]
    write(place, task="wikitext", lines=[{"text": piece} for piece in pieces])
    return place, torch.tensor(ids) + 3


def test_dense_perplexity_equals_transformers_on_second_halves(tiny, dense, wiki):
    place, ids = wiki
    scores = run_task(dense, "wikitext", config(place, window_tokens=20))
    nll = []
    for window in ids[:80].view(4, 20):
        with torch.no_grad():
            logp = F.log_softmax(tiny.network(window[None]).logits[0], -1)
        nll.append(-float(logp[9:19].gather(-1, window[10:, None]).mean()))
    assert scores.items["ppl"] == pytest.approx(nll, abs=1e-4)
    assert scores.metrics["ppl"] == pytest.approx(math.exp(sum(nll) / 4), rel=1e-4)
    assert (scores.count, scores.main, scores.source) == (4, "ppl", place.name)


def test_pruned_stages_change_the_perplexity_of_the_same_tokens(dense, cut, tiny, wiki):
    place, _ = wiki
    a, b = (run_task(v, "wikitext", config(place, window_tokens=20)) for v in (dense, cut))
    assert a.items_hash == b.items_hash
    assert abs(a.metrics["ppl"] - b.metrics["ppl"]) > 0.01
    decode_only = Trimmed.of(make_plan(tiny, Gates.removing(4, prefill={1})), Pair.dense(tiny))
    one = run_task(decode_only, "wikitext", config(place, window_tokens=20, limit=2))
    assert one.count == 2 and one.items["ppl"] != a.items["ppl"][:2]


@pytest.mark.parametrize(
    "window,words", [(1, "must have 2 to 512"), (513, "must have 2 to 512"), (91, "not one window")]
)
def test_a_window_that_does_not_fit_is_refused(dense, wiki, window, words):
    with pytest.raises(PdtrimError, match=words):
        run_task(dense, "wikitext", config(wiki[0], window_tokens=window))


def test_the_text_is_spaced_as_the_hubs_rows_joined():
    rows = ["", " = Title = \n", "", " One line .\n", " Another .\n"]  # the hub's rows
    plain = " \n = Title = \n \n One line .\n Another .\n"  # the file they come from
    assert spaced(plain) == "\n\n".join(rows)


def test_wikitext_has_no_olmo_rows_and_no_shots(dense):
    with pytest.raises(PdtrimError, match="lacks task 'wikitext'"):
        run_task(dense, "wikitext", TasksConfig(data="olmo"))
    with pytest.raises(PdtrimError, match="no shots"):
        run_task(dense, "wikitext", TasksConfig(data="olmo", shots=2))


# ---- mistakes, and the command


@pytest.mark.parametrize(
    "changes,words",
    [({"data": ""}, "where the rows are"), ({"limit": 0}, "limit"), ({"shots": -1}, "shots"),
     ({"batch_tokens": 0}, "batch")],
)  # fmt: skip
def test_settings_without_sense_are_refused(changes, words):
    with pytest.raises(PdtrimError, match=words):
        TasksConfig(**{"data": "hub", **changes})


def test_an_unknown_task_is_refused(dense, data):
    with pytest.raises(PdtrimError, match="unknown task 'chess': choose from mmlu"):
        run_task(dense, "chess", config(data))


def test_without_lm_eval_the_message_says_what_to_install(dense, data, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    with pytest.raises(PdtrimError, match=r"pip install 'pdtrim\[eval\]'"):
        run_task(dense, "piqa", config(data))


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    make_plan(tiny, CLOSED).save(path)
    return path


def test_the_command_writes_both_rows_and_prints_their_difference(plan, dense, cut, data, tmp_path):
    command = [
        sys.executable, "-m", "pdtrim.cli", "eval", plan, "--tasks", "piqa, lambada_openai",
        "--data", data, "--limit", "6", "--dtype", "float32", "-o", tmp_path / "result.json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100%" not in done.stderr and "lm-eval" not in done.stderr  # no bars or logs of others
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["schema"] == "pdtrim.tasks/1"
    assert [row["name"] for row in result["rows"]] == ["dense", "test"]
    for row, variant in zip(result["rows"], (dense, cut), strict=True):
        assert list(row["tasks"]) == ["piqa", "lambada_openai"]
        for task, scores in row["tasks"].items():
            assert TaskScores(**scores) == run_task(variant, task, config(data, limit=6))
    lines = [line for line in done.stdout.splitlines() if "acc_norm" in line]
    found = result["rows"][0]["tasks"]["piqa"]["metrics"]["acc_norm"] * 100
    assert len(lines) == 1 and f"{found:.1f}" in lines[0] and "[" in lines[0]


@pytest.mark.parametrize(
    "options,words",
    [
        ((), "give one of --text and --tasks"),
        (("--tasks", "piqa", "--text", "x"), "give one of --text and --tasks"),
        (("--tasks", "piqa,piqa", "--data", "DATA"), "each only once"),
        (("--tasks", "boolq", "--data", "DATA"), "no rows of task 'boolq'"),
    ],
)
def test_a_mistake_is_one_line(plan, data, options, words, monkeypatch, capsys):
    options = [str(data) if one == "DATA" else one for one in options]
    monkeypatch.setattr(sys, "argv", ["pdtrim", "eval", str(plan), *options, "--dtype", "float32"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1
