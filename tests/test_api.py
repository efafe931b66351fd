"""The public names, and what importing them costs."""

import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import typer

import pdtrim
from pdtrim import configs
from pdtrim.cli import app
from pdtrim.cli.options import help_of


def test_every_public_name_resolves_and_is_documented():
    for name in pdtrim.__all__:
        public = getattr(pdtrim, name)
        said = public.__doc__
        assert said, name
        if inspect.isfunction(public):
            assert "Returns:" in said and "Raises:" in said, name
    assert sorted(pdtrim._HOMES) == sorted(pdtrim.__all__)


def test_importing_pdtrim_and_its_command_loads_no_torch():
    code = "import pdtrim, pdtrim.cli, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("warm_stages")
def test_the_examples_of_the_docs_run(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny_folder), "TEXT": str(tiny_text)}
    examples = re.findall("```python\n(.*?)```", text, flags=re.S)
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert len(examples) == 3 and len(capsys.readouterr().out.splitlines()) == 7


def rows_of(table):
    """Cells of the docs' tables: the first has the verbs, the second the modules below."""
    text = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    part = text.split("## Below the verbs")[table]
    return [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("| `")]


def named(rows, column):
    return {name for row in rows for name in re.findall(r"`([\w.-]+)", row[column])}


def test_the_docs_name_a_public_function_and_a_record_for_every_verb():
    rows = rows_of(0)
    assert named(rows, 0) == set(typer.main.get_command(app).commands)
    functions = {name.partition(".")[0] for name in named(rows, 1)}
    assert functions | {"PdtrimError", "load_model"} == set(pdtrim.__all__)
    assert named(rows, 2) == set(configs.__all__)


def test_what_the_docs_name_below_the_verbs_is_there():
    for module, *said in rows_of(1):
        (place,) = named([[module]], 0)
        for name in re.findall(r"`([A-Za-z_]+)`", said[0]):
            assert hasattr(import_module(place), name), (place, name)


SHARED = {"device", "dtype", "as_json", "help", "model", "shape", "output", "resume", "only"}
"""Options and arguments that say where a verb works, not what it is asked."""
OF_VERBS = {
    "assess": {"metrics", "trace"},
    "bench-codec": {"torch_path"},
    "distill": {"plan_file"},
    "eval": {"pair"},
    "generate": {"folder", "prompt", "max_new_tokens", "chat"}
    | {field.name for field in fields(configs.RuntimeConfig)},
    "report": {"runs"},
    "roi": {"pair"},
    "serve": {"dry_run", "explain"},
    "watch": {"target", "log", "once"},
}
WITHOUT_RECORD = {"demo", "export", "inspect"}


def record_of(command):
    """The record that a verb's options are made of; None if there is none."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    return hints.get("config")


def test_the_options_of_a_verb_are_the_fields_of_its_record_with_their_defaults():
    commands = typer.main.get_command(app).commands
    without = {verb for verb, command in commands.items() if record_of(command) is None}
    assert without == WITHOUT_RECORD
    for verb in commands.keys() - without:
        record = record_of(commands[verb])
        found = {parameter.name: parameter for parameter in commands[verb].params}
        said = help_of(record)
        for field in fields(record):
            option = found.pop(field.name)
            assert option.help.startswith(said[field.name].removesuffix(".")), field.name
            assert option.required == (field.default is MISSING), field.name
            if isinstance(field.default, tuple):
                shown = option.default if option.multiple else option.default.split(",")
                assert [word for word in map(str, shown or ()) if word] == [
                    *map(str, field.default)
                ]
            elif not option.required:
                assert option.default == field.default, field.name
        assert found.keys() <= SHARED | OF_VERBS.get(verb, set()), verb
