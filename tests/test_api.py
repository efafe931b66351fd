"""The public names, and what importing them costs."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import typer

import pdtrim
from pdtrim.cli import app
from pdtrim.cli.options import help_of
from pdtrim.verbs.distill import TrainConfig
from pdtrim.verbs.plan import PlanConfig


def test_every_public_name_resolves_and_is_documented():
    for name in pdtrim.__all__:
        assert getattr(pdtrim, name).__doc__, name
    assert sorted(pdtrim._HOMES) == sorted(pdtrim.__all__)


def test_importing_pdtrim_and_its_command_loads_no_torch():
    code = "import pdtrim, pdtrim.cli, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_examples_of_the_docs_run(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny_folder), "TEXT": str(tiny_text)}
    examples = re.findall("```python\n(.*?)```", text, flags=re.S)
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert len(examples) == 2 and len(capsys.readouterr().out.splitlines()) == 4


def test_the_docs_name_a_public_function_for_every_verb():
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    verbs = {verb for row in rows for verb in re.findall("`([^`]+)`", row[0])}
    assert verbs == set(typer.main.get_command(app).commands)
    named = {name for row in rows for cell in row[1:] for name in re.findall(r"`(\w+)", cell)}
    assert named <= set(pdtrim.__all__)


def test_the_options_of_a_record_are_its_fields_with_their_defaults():
    for verb, record, own in (("plan", PlanConfig, set()), ("distill", TrainConfig, {"text"})):
        found = {p.name: p for p in typer.main.get_command(app).commands[verb].params}
        for field in fields(record):
            if field.name not in own:
                assert found[field.name].default == field.default, field.name
                assert found[field.name].help == help_of(record)[field.name]
