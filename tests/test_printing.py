"""What verbs print: a user's text as it is, without markup or control codes; refusals in a line."""

import io
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import pdtrim.cli as cli
from helpers import make_plan, tiny_model
from in_process import run_here
from pdtrim.cli.common import console, visible
from pdtrim.cli.run import _stream
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.result import Result
from pdtrim.keep.places import need_folder_place
from pdtrim.plan import Gates
from pdtrim.progress import lines

HOSTILE = "[/INST] [red]x[/red] :smile: \x1b[2J\x1b]8;;http://x\x07 \x9b1m \u202e\ud83d"
SHOWN = r"[/INST] [red]x[/red] :smile: \x1b[2J\x1b]8;;http://x\x07 \x9b1m \u202e\ud83d"


@pytest.fixture
def plan_file(tmp_path):
    """A plan whose model has a hostile name."""
    data = make_plan(tiny_model(), Gates.dense(4)).to_json()
    data["model"]["name"] = HOSTILE.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    (tmp_path / "plan.json").write_text(json.dumps(data))
    return tmp_path / "plan.json"


def test_control_codes_are_shown_and_markup_is_text():
    assert visible(HOSTILE) == SHOWN
    assert visible("tab\tline\nא é 😀") == "tab\tline\nא é 😀"
    made = console()
    made.file = io.StringIO()
    made.print(HOSTILE)
    made.print(HOSTILE, style="bold")
    dropped = SHOWN.replace(r"\x07", "")  # rich leaves the bell out
    assert made.file.getvalue().splitlines() == [dropped, dropped]


def clean_of_controls(text):
    return not any(ord(c) < 32 and c not in "\n\t" for c in text) and "\x9b" not in text


def test_a_plans_words_are_not_obeyed(plan_file, monkeypatch, capsys):
    code, out, err = run_here(monkeypatch, capsys, "inspect", plan_file)
    assert code == 0 and r"[/INST] [red]x[/red] :smile: \x1b[2J" in out
    assert clean_of_controls(out + err)
    code, out, err = run_here(
        monkeypatch, capsys, "export", plan_file, "-o", plan_file.parent / "pair"
    )
    assert code == 2 and len(err.splitlines()) == 1 and r"\x1b[2J" in err
    assert clean_of_controls(out + err)


VERBS = tuple(
    name
    for name, verb in typer.main.get_command(cli.app).commands.items()
    if any(isinstance(parameter, typer.core.TyperArgument) for parameter in verb.params)
)
"""The verbs that are given a plan, a pair or a model."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_hostile_path_is_one_line_with_what_was_asked(verb, tmp_path, monkeypatch, capsys):
    path = "/nowhere/[red]x[/red]\x1b[2J"
    more = {
        "export": ["-o", tmp_path / "o"],
        "distill": ["-o", tmp_path / "o.json"],
        "eval": ["--text", "a.txt"],
        "generate": ["--prompt", "hi"],
        "plan": ["-o", tmp_path / "p.json"],
        "kv-sweep": ["--text", "a.txt", "-o", tmp_path / "o"],
        "ablate": ["--text", "a.txt", "-o", tmp_path / "o"],
        "compare": ["-o", tmp_path / "o", "--methods", "none"],
        "sensitivity": ["-o", tmp_path / "o"],
        "report": ["-o", tmp_path / "o.html"],
        "watch": [tmp_path / "log.jsonl"],
        "roi": [
            *("--isl", "80", "--osl", "20", "--rate", "5", "--ttft", "1", "--tpot", "1"),
            *("--link-gbit-s", "9", "--gpu-hour", "2"),
        ],
    }
    code, out, err = run_here(monkeypatch, capsys, verb, path, *more.get(verb, []))
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert r"[red]x[/red]\x1b[2J" in err and clean_of_controls(err)


def test_wrong_options_are_one_line(monkeypatch, capsys):
    for words, said in (
        (["plan", "--nonsense"], "No such option: --nonsense"),
        (["no\x1b[2Jverb"], r"No such command 'no\x1b[2Jverb'"),
        (["inspect", "p.json", "--prompt-tokens", "0"], "--prompt-tokens"),
    ):
        code, _, err = run_here(monkeypatch, capsys, *words)
        assert code == 2 and len(err.splitlines()) == 1 and said in err
    code, out, _ = run_here(monkeypatch, capsys)
    assert code == 2 and "Usage" in out and "distill" in out


def test_an_error_of_the_system_is_one_line(plan_file, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pdtrim.report.inspect.picture", full)
    code, _, err = run_here(monkeypatch, capsys, "inspect", plan_file)
    assert code == 2 and err.splitlines() == ["error: [Errno 28] No space left on device"]


def test_a_place_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    need_folder_place(tmp_path / "deep" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    for place, words in (
        (tmp_path / "file", "is a file"),
        ("/proc/nothing/here", "cannot write to /proc"),
    ):
        with pytest.raises(PdtrimError, match=words):
            need_folder_place(type(tmp_path)(place))
    result = CliRunner().invoke(cli.app, ["export", "none.json", "-o", str(tmp_path / "file")])
    assert "is a file" in str(result.exception)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_where_there_is_no_terminal_progress_is_a_line_every_half_minute():
    clock, stream = Clock(), io.StringIO()
    with lines("searching", 10, clock=clock, stream=stream) as advance:
        for _ in range(10):
            clock.now += 12
            advance(1)
    said = stream.getvalue().splitlines()
    assert said[0] == "searching: 30% done in 36 s, about 1 min 24 s left"
    assert len(said) == 3
    with lines("quick", 1, clock=clock, stream=stream) as advance:
        advance(1)
    assert len(stream.getvalue().splitlines()) == 3


class HalfACharacter:
    """A session whose answer ends within a character."""

    class tokenizer:
        @staticmethod
        def decode(ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    def __init__(self, text):
        self.text = text

    def stream(self, prompts, **more):
        yield from ((0, byte) for byte in self.text)


def test_a_stream_shows_an_unfinished_character(capsys):
    _stream(HalfACharacter("né\x1b[2J".encode() + "😀".encode()[:2]), [1], 9, None)
    assert capsys.readouterr().out == "né\\x1b[2J\ufffd\n"


def test_the_package_runs_as_a_module_and_help_does_not_wait_for_torch():
    code = "import sys, runpy; sys.argv = ['pdtrim', '--help']\n"
    code += "try: runpy.run_module('pdtrim', run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False" and "distill" in done.stdout


def test_what_the_terminal_lacks_is_escaped(plan_file):
    done = subprocess.run(
        [sys.executable, "-m", "pdtrim", "inspect", str(plan_file)],
        capture_output=True,
        env={"PATH": "", "PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_results_hold_no_infinite_numbers():
    with pytest.raises(ValueError, match="JSON compliant"):
        cli.common.print_json({"kl": float("nan")})
    assert Result.model_config["extra"] == "forbid"
