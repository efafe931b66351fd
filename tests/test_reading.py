"""What users bring is read as what it is, bounded, and cleaned once; the rest is one line."""

import gzip
import json
import struct

import pytest
import torch

import pdtrim.reading.text as reading
from helpers import make_plan, tiny_model
from pdtrim.calibration.batches import CalibrationConfig, load_calibration, text_batch
from pdtrim.calibration.sources import read_documents
from pdtrim.calibration.tokens import encode
from pdtrim.errors import CalibrationError, PdtrimError, PlanError, border, one_line
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, PrunePlan
from pdtrim.reading.json_text import parse_json, read_json
from pdtrim.reading.text import clean

ROWS = [{"text": f"first line {i}\nsecond"} for i in range(3)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ALPACA = [{"instruction": "Say it.", "input": "", "output": f"word {i}"} for i in range(2)]

READ = {
    "lines.jsonl": (LINES, TEXTS),
    "LINES.JSONL": (LINES, TEXTS),
    "lines.json": (LINES, TEXTS),
    "lines.txt": (LINES, TEXTS),
    "array.json": (json.dumps(ROWS, indent=1), TEXTS),
    "array.txt": (json.dumps(TEXTS), TEXTS),
    "alpaca.json": (json.dumps(ALPACA), ["Say it.\nword 0", "Say it.\nword 1"]),
    "crlf.jsonl": (LINES.replace("\n", "\r\n\r\n"), TEXTS),
    "bom.jsonl": (b"\xef\xbb\xbf" + LINES.encode(), TEXTS),
    "bom.txt": (b"\xef\xbb\xbfplain", ["plain"]),
    "packed.jsonl.gz": (gzip.compress(LINES.encode()), TEXTS),
    "packed": (gzip.compress(b"plain text"), ["plain text"]),
    "table.csv": ("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS)), TEXTS),
    "table.TSV": ("id\tcontext\n0\tone\n", ["one"]),
    "prompt.txt": ("[INST] not an array [/INST]", ["[INST] not an array [/INST]"]),
    "code.txt": ("{ a: b }\nint main() {}", ["{ a: b }\nint main() {}"]),
    "html.txt": ("<p>a</p>", ["<p>a</p>"]),
    "nul.txt": (b"wo\0rd", ["wo\0rd"]),
    "empty.txt": ("", []),
}


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


@pytest.mark.parametrize("name", READ)
def test_a_text_is_read_by_what_is_in_it(tmp_path, name):
    data, wanted = READ[name]
    assert list(read_documents(put(tmp_path / name, data))) == wanted


def deep(levels):
    return "[" * levels + "]" * levels


REFUSED = {
    "null.jsonl": (LINES + '{"text": null}\n', "line 4 has no text"),
    "numbers.jsonl": ("1\n2\n", "line 1 has no text"),
    "words.jsonl": ("not json\n", "line 1 is not valid JSON"),
    "chat.json": ('[{"messages": []}]', "item 1 has no text"),
    "long.jsonl": ('{"text": ' + "9" * 5000 + "}", "line 1 is not valid JSON"),
    "deep.jsonl": (deep(50_000), "nested too deeply"),
    "nested.json": (deep(100), "nested more than 64 deep"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 50)[:60], "cannot read"),
    "damaged.gz": (gzip.compress(LINES.encode())[:-12] + b"garbagegarba", "cannot read"),
    "utf16.txt": ("word".encode("utf-16"), "is UTF-16 text"),
    "latin1.txt": (b"caf\xe9 au lait", "is not UTF-8 text"),
    "latin1.jsonl": (b'{"text": "caf\xe9"}', "is not valid JSON"),
    "table.csv": ("a,b\n1,2\n", "no column named"),
    "model.gguf": (b"GGUF" + bytes(99), "a GGUF model"),
    "rows.parquet": (b"PAR1" + bytes(99), "a Parquet table"),
    "pointer.txt": ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "picture.txt": (b"\x89PNG\r\n", "a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name):
    data, words = REFUSED[name]
    with pytest.raises(CalibrationError, match=words) as caught:
        list(read_documents(put(tmp_path / name, data)))
    assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="no text file at"):
        read_documents(str(tmp_path))


def test_sizes_are_bounded_and_reading_is_lazy(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(reading, "MAX_LINE", 2000)
    monkeypatch.setattr(reading, "MAX_ARRAY", 3000)
    bomb = put(tmp_path / "bomb.gz", gzip.compress(b"x" * 50_000_000))
    assert len(next(read_documents(bomb))) <= 1000  # and nothing more is unpacked
    words = "".join(f"wörd {i}\n" for i in range(400))
    pieces = list(read_documents(put(tmp_path / "long.txt", words)))
    assert "".join(pieces) == words and max(map(len, pieces)) <= 1000
    unbroken = "ö" * 3000
    assert "".join(read_documents(put(tmp_path / "unbroken.txt", unbroken))) == unbroken
    with pytest.raises(CalibrationError, match="line 1 is longer than 2,000 bytes"):
        list(read_documents(put(tmp_path / "line.jsonl", json.dumps({"text": "x" * 5000}))))
    with pytest.raises(CalibrationError, match="an array of more than 3,000 bytes"):
        list(read_documents(put(tmp_path / "a.json", json.dumps(["x" * 5000]))))


JSON_REFUSED = {
    "NaN": "NaN is not a JSON number",
    '{"a": 1e999}': "too large",
    '{"a": 1, "a": 2}': "'a' stands twice",
    "9" * 5000: "not valid JSON",
    deep(100_000): "nested too deeply",
    deep(65): "nested more than 64 deep",
    "{": "not valid JSON",
    b"\xff": "not valid JSON",
}


def test_json_is_bounded(tmp_path):
    assert parse_json(b'\xef\xbb\xbf{"a": [1.5]}', where="it") == {"a": [1.5]}
    for text, words in JSON_REFUSED.items():
        with pytest.raises(PdtrimError, match=words) as caught:
            parse_json(text, where="it")
        assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(PlanError, match="more than 3 bytes"):
        read_json(tmp_path / "a.json", limit=3, kind=PlanError)
    for odd in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(PdtrimError):
            read_json(odd)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model", "num_kv_heads"), 10**12),
        (("model", "num_layers"), 10**9),
        (("model", "head_dim"), 10**400),
        (("block_size",), 10**30),
        (("provenance", "search_block_tokens"), -1),
    ],
)
def test_a_plan_that_claims_too_much_is_refused_before_it_costs_memory(tmp_path, place, value):
    data = make_plan(tiny_model(), Gates.dense(4)).to_json()
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=place[-1]) as caught:
        PrunePlan.load(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def test_text_is_cleaned_once():
    assert clean("a\ud83d\ude00b") == "a😀b"
    assert clean("w\ud83d") == "w\ufffd"
    assert clean("caf\udce9") == "caf\ufffd"  # a Latin-1 byte of the command line
    assert clean("plain é") == "plain é"


def test_plan_refuses_what_eval_refuses(tiny_folder, tiny_text):
    model = load_model(str(tiny_folder), dtype="float32")
    assert encode(model.tokenizer, "w1 \ud83d w2", 64)
    model.tokenizer.add_tokens(["zzz"])
    with pytest.raises(CalibrationError, match="token id 64 is not in the vocabulary of 64"):
        encode(model.tokenizer, "w1 zzz", 64)
    lengths = {"prompt_tokens": 400, "continuation_tokens": 200}
    for read in (
        lambda: load_calibration(model, CalibrationConfig(source=str(tiny_text), **lengths)),
        lambda: load_calibration(model, CalibrationConfig(source="self", **lengths)),
        lambda: text_batch(model, str(tiny_text), limit=1, **lengths),
    ):
        with pytest.raises(CalibrationError, match="600 tokens are longer than the 512"):
            read()


def test_a_border_turns_anything_into_one_line_with_the_place():
    def fails(error):
        with border(PlanError, "at the place"):
            raise error

    for error, words in (
        (KeyError("x"), "at the place: KeyError: 'x'"),
        (struct.error("short\nmore"), "at the place: short"),
        (RecursionError(), "at the place: RecursionError"),
        (RuntimeError(), "at the place: RuntimeError"),
    ):
        with pytest.raises(PlanError) as caught:
            fails(error)
        assert str(caught.value) == words
    with pytest.raises(KeyboardInterrupt):
        fails(KeyboardInterrupt())
    own = CalibrationError("own words")
    with pytest.raises(CalibrationError, match="own words"):
        fails(own)
    assert one_line(torch.OutOfMemoryError("CUDA\nlong")) == "CUDA"
