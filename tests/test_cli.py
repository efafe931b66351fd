"""Every verb as a user runs it: its output, its exit code. A plan, its pair and an answer are made
by new processes."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from in_process import run_here
from pdtrim.cli import app
from pdtrim.evaluate.result import Result
from pdtrim.plan import PrunePlan

pytestmark = pytest.mark.usefixtures("warm_stages")

VERBS = tuple(typer.main.get_command(app).commands)


def pdtrim(*args, code=0):
    command = [sys.executable, "-m", "pdtrim.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def here(monkeypatch, capsys):
    """The same in the tests' own process; returns the output."""

    def run(*args):
        code, out, said = run_here(monkeypatch, capsys, *args)
        assert code == 0, said
        return out

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, tiny_text):
    """A plan and its pair, made by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    shape = ("--prompt-tokens", 16, "--continuation-tokens", 8, "--sequences", 4)
    pdtrim(
        "plan", tiny_folder, "-o", folder / "plan.json", "--prefill-remove", 0.5,
        "--decode-remove", 1, "--kv", "first_last:first=1,last=2,layers=2",
        "--calibration", tiny_text, "--dtype", "float32", "--seed", 3, *shape,
    )  # fmt: skip
    pdtrim("export", folder / "plan.json", "-o", folder / "pair", "--dtype", "float32")
    return folder


def test_plan_writes_what_was_asked(made, tiny_folder):
    plan = PrunePlan.load(made / "plan.json")
    gates = plan.gates
    assert sum(a != "full" for a in gates.prefill_attention) == 2
    assert sum(not a for a in gates.decode_attention) == 1
    assert sum(rule.selector.name == "first_last" for rule in plan.kv) == 2
    assert plan.provenance.method == "pdtrim" and plan.provenance.seed == 3
    assert plan.model.name == str(tiny_folder)


def test_paper_is_planned_from_self_written_text(made, tiny_folder, here):
    shown = here(
        "plan", tiny_folder, "-o", made / "paper.json", "--method", "paper",
        "--prefill-remove", 1, "--decode-remove", 2, "--prompt-tokens", 16,
        "--continuation-tokens", 8, "--sequences", 4, "--json",
    )  # fmt: skip
    report = json.loads(shown)
    plan = PrunePlan.load(made / "paper.json")
    assert report["digest"] == plan.digest and report["mode"] == "subset"
    assert report["calibration"] == "self"


def test_inspect_draws_the_stages(made, here):
    shown = here("inspect", made / "plan.json")
    plan = PrunePlan.load(made / "plan.json")
    letters = {"full": "A", "kv": "k", "off": "·"}
    assert "prefill  " + "".join(letters[a] for a in plan.gates.prefill_attention) in shown
    decode = "".join("A" if a else "·" for a in plan.gates.decode_attention)
    assert "decode   " + decode in shown
    assert plan.digest[:12] in shown and "first_last (first 1, last 2)" in shown
    data = json.loads(here("inspect", made / "pair", "--json"))
    assert data["digest"] == plan.digest


def test_generate_streams_what_a_batch_gives(made, here):
    alone = pdtrim("generate", made / "pair", "--prompt", "w1 w2 w3", "--max-new-tokens", 6)
    assert "handover" in alone.stderr
    batch = here(
        "generate", made / "pair", "--prompt", "w1 w2 w3", "--prompt", "w9 w8",
        "--max-new-tokens", 6, "--json",
    )  # fmt: skip
    results = json.loads(batch)
    assert [r["prompt_tokens"] for r in results] == [3, 2]
    assert results[0]["text"].split() == alone.stdout.split()
    assert all(r["kv_bytes"] > 0 for r in results)


def test_eval_gives_the_same_quality_for_the_plan_and_its_pair(made, tiny_text, here):
    options = (
        "--text", tiny_text, "--prompt-tokens", 16, "--continuation-tokens", 8, "--limit", 6,
        "--dtype", "float32", "--json",
    )  # fmt: skip
    by_plan = json.loads(here("eval", made / "plan.json", *options))
    out = made / "result.json"
    asked = ("--ask", "w1 w2 w3", "-o", out)
    by_pair = json.loads(here("eval", made / "pair", *options, *asked))
    assert [row["name"] for row in by_plan["rows"]] == ["dense", "pdtrim"]
    for a, b in zip(by_plan["rows"], by_pair["rows"], strict=True):
        for key in ("kl", "nll", "kv_bytes", "kv_compression", "prefill_flops_ratio"):
            assert a[key] == pytest.approx(b[key], abs=1e-6)
    assert by_pair["rows"][1]["kl"] > 1e-4 and by_pair["rows"][1]["kv_compression"] > 1.5
    assert Result.load(out).provenance.sequences == 6
    prompt = ("--prompt", "w1 w2 w3", "--max-new-tokens", 80)
    real = json.loads(here("generate", made / "pair", *prompt, "--json"))[0]["text"]
    assert by_pair["rows"][1]["answer"] == real != by_pair["rows"][0]["answer"]
    assert by_plan["rows"][0]["answer"] is None


def test_bench_prints_a_ratio(tiny_folder, here):
    shown = here(
        "bench-forward", tiny_folder, "--prompt-tokens", 16, "--continuation-tokens", 8,
        "--repeats", 1, "--json",
    )  # fmt: skip
    report = json.loads(shown)
    assert report["ratio"] > 0 and [e["start"] for e in report["reuse"]] == [1, 2, 3]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert f"Example: pdtrim {verb}" in " ".join(shown.output.split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_every_option_is(verb):
    command = typer.main.get_command(app).commands[verb]
    bare = [p.name for p in command.params if len((getattr(p, "help", "") or "").split()) < 2]
    assert not bare


MISTAKES = {
    "no such plan": (("inspect", "nothing.json"), "no plan file at nothing.json"),
    "no such model": (("plan", "./nothing", "-o", "p.json"), "no model folder"),
    "method": (("plan", "MODEL", "-o", "p.json", "--method", "magic"), "unknown method 'magic'"),
    "mode": (("plan", "MODEL", "-o", "p.json", "--mode", "half"), "'half' is not one of"),
    "two budgets": (
        ("plan", "MODEL", "-o", "p.json", "--kv-compression", "3", "--handover-ms", "3"),
        "give one of",
    ),
    "count": (("plan", "MODEL", "-o", "p.json", "--prefill-remove", "2.5"), "whole number"),
    "word": (("plan", "MODEL", "-o", "p.json", "--prefill-remove", "many"), "--prefill-remove"),
    "too many": (("plan", "MODEL", "-o", "p.json", "--decode-remove", "9"), "cannot remove 9"),
    "policy": (("plan", "MODEL", "-o", "p.json", "--kv", "first_last:x=1"), "x"),
    "text": (("plan", "MODEL", "-o", "p.json", "--calibration", "no.txt"), "no text file"),
    "no pair": (("generate", "nowhere", "--prompt", "x"), "no prefill checkpoint"),
    "temperature": (("generate", "PAIR", "--prompt", "x", "--temperature", "-1"), "temperature"),
    "suite": (("eval", "PLAN", "--text", "TEXT", "--suite", "x"), "unknown suite"),
    "ask": (("eval", "PLAN", "--tasks", "piqa", "--ask", "x"), "--ask goes with --text"),
    "limit": (("eval", "PLAN", "--text", "TEXT", "--limit", "0"), "at least 1"),
    "length": (("eval", "PLAN", "--text", "TEXT", "--prompt-tokens", "900000"), "tokens"),
    "full folder": (("export", "PLAN", "-o", "HERE", "--dtype", "float32"), "already holds"),
    "option": (("inspect",), "Missing argument"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    made, tiny_folder, tiny_text, mistake, monkeypatch, capsys
):
    args, words = MISTAKES[mistake]
    places = {
        "MODEL": tiny_folder,
        "PLAN": made / "plan.json",
        "PAIR": made / "pair",
        "TEXT": tiny_text,
        "HERE": tiny_folder,
    }
    code, _, said = run_here(monkeypatch, capsys, *(places.get(a, a) for a in args))
    assert code == 2 and words in said
    if mistake != "option":  # typer draws its own usage box
        assert said.count("\n") == 1 and said.startswith("error: ")
