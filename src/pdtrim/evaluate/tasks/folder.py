"""Rows from a folder of JSON Lines, ``DIR/TASK/test.jsonl`` (or ``val.jsonl``, ``valid.jsonl``).

Rows that shots are drawn from are ``dev.jsonl`` or ``fewshot.jsonl`` beside it. ``docs/tasks.md``
gives the fields of each task; here each layout is a function from a row to lm-eval's columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pdtrim.errors import PdtrimError, one_line
from pdtrim.evaluate.tasks.rows import Row, Rows, check_size, lettered
from pdtrim.reading.json_text import parse_json

ITEMS = ("test.jsonl", "val.jsonl", "valid.jsonl")
SHOTS = ("dev.jsonl", "fewshot.jsonl")
FOLDERS = {"lambada_openai": "lambada", "wikitext": "wikitext2"}
"""Subfolders of other names than their tasks."""


def read_folder(folder: str, task: str) -> Rows:
    """The rows of a task.

    Raises:
        PdtrimError: no such folder, no file of this task, or a row of another layout.
    """
    place = Path(folder) / FOLDERS.get(task, task)
    if not Path(folder).is_dir():
        raise PdtrimError(f"no data folder at {folder}: give a folder, 'olmo' or 'hub'")
    items = next((place / name for name in ITEMS if (place / name).is_file()), None)
    if items is None:
        raise PdtrimError(f"{place} has none of {', '.join(ITEMS)}: no rows of task '{task}'")
    layout, overrides = LAYOUTS[task]
    shots = next((place / name for name in SHOTS if (place / name).is_file()), None)
    return Rows(
        items=_read(items, layout),
        shots=[] if shots is None else _read(shots, layout),
        overrides=overrides,
    )


def task_files(folder: Path, task: str) -> list[Path]:
    """Files of a data folder that hold rows of a task; none where there is no such folder."""
    place = folder / FOLDERS.get(task, task)
    return [place / name for name in (*ITEMS, *SHOTS) if (place / name).is_file()]


def _read(path: Path, layout: Callable[[Row], Row]) -> list[Row]:
    check_size(path)
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    rows.append(layout(parse_json(line, where=f"{path} line {number}")))
            except PdtrimError:
                raise
            except KeyError as error:
                raise PdtrimError(f"{path} line {number} has no field {error}") from error
            except (ValueError, TypeError) as error:
                raise PdtrimError(
                    f"{path} line {number} is not a row of this task: {one_line(error)}"
                ) from error
    if not rows:
        raise PdtrimError(f"{path} has no rows")
    return rows


def _text(row: Row, *fields: str) -> Row:
    for name in fields:
        if not isinstance(row[name], str):
            raise TypeError(f"'{name}' must be a text")
    return {name: row[name] for name in fields}


def _choices(row: Row) -> tuple[list[str], int]:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("'choices' must be a list of texts")
    return choices, _index(answer, len(choices), "answer")


def _index(value: object, count: int, name: str) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"'{name}' must be a whole number of 0 to {count - 1}")
    return value


def _piqa(row: Row) -> Row:
    (sol1, sol2), answer = _choices(row)
    return {"goal": _text(row, "question")["question"], "sol1": sol1, "sol2": sol2, "label": answer}


def _hellaswag(row: Row) -> Row:
    choices, answer = _choices(row)
    context = _text(row, "context")["context"]
    return {"query": context, "choices": choices, "label": str(answer)}


def _winogrande(row: Row) -> Row:
    answer = _index(row["answer"], 3, "answer")
    if answer == 0 or row["sentence"].count("_") == 0:
        raise ValueError("it needs a '_' in the sentence and an answer of 1 or 2")
    return {**_text(row, "sentence", "option1", "option2"), "answer": str(answer)}


def _lettered(row: Row, question: str) -> Row:
    choices, answer = _choices(row)
    return lettered(question, _text(row, "question")["question"], choices, answer)


def _mathqa(row: Row) -> Row:
    choices, answer = _choices(row)
    return {
        "Problem": _text(row, "question")["question"],
        "choices": choices,
        "correct": "abcde"[_index(answer, 5, "answer")],
    }


def _mmlu(row: Row) -> Row:
    (a, b, c, d), answer = _choices(row)
    return {**_text(row, "question", "subject"), "choices": [a, b, c, d], "answer": answer}


def _cmmlu(row: Row) -> Row:
    (a, b, c, d), answer = _choices(row)
    texts = _text(row, "question", "subject")
    letters = {"A": a, "B": b, "C": c, "D": d, "Answer": "ABCD"[answer]}
    return {"Question": texts["question"], "subject": texts["subject"], **letters}


def _boolq(row: Row) -> Row:
    return {**_text(row, "passage", "question"), "label": _index(row["label"], 2, "label")}


def _glue_pair(row: Row) -> Row:
    texts = _text(row, "premise", "hypothesis")
    return {
        "sentence1": texts["premise"],
        "sentence2": texts["hypothesis"],
        "label": _index(row["label"], 2, "label"),
    }


def _cb(row: Row) -> Row:
    return {**_text(row, "premise", "hypothesis"), "label": _index(row["label"], 3, "label")}


def _sst2(row: Row) -> Row:
    return {**_text(row, "sentence"), "label": _index(row["label"], 2, "label")}


LAYOUTS: dict[str, tuple[Callable[[Row], Row], Row]] = {
    "mmlu": (_mmlu, {}),
    "cmmlu": (_cmmlu, {}),
    "piqa": (_piqa, {}),
    "winogrande": (_winogrande, {}),
    # the rows are cleaned already, with both halves of the context joined
    "hellaswag": (_hellaswag, {"process_docs": None}),
    "boolq": (_boolq, {}),
    "arc_easy": (lambda row: _lettered(row, "question"), {}),
    "arc_challenge": (lambda row: _lettered(row, "question"), {}),
    "openbookqa": (lambda row: _lettered(row, "question_stem"), {}),
    # lm-eval parses one line of options, which the rows hold apart
    "mathqa": (_mathqa, {"doc_to_choice": "choices"}),
    "rte": (_glue_pair, {}),
    "wnli": (_glue_pair, {}),
    "cb": (_cb, {}),
    "sst2": (_sst2, {}),
    "gsm8k": (lambda row: _text(row, "question", "answer"), {}),
    "lambada_openai": (lambda row: _text(row, "text"), {}),
    "wikitext": (lambda row: _text(row, "text"), {}),
}
"""By task: the function of a row, and what of lm-eval's definition the rows replace."""
