"""Logs of requests: what is read, that they may grow, and that nothing of them is told."""

import gzip
import json
import os

import pytest

from pdtrim.errors import PdtrimError
from pdtrim.reading import requests
from pdtrim.reading.requests import RequestLog

SECRET = "my secret prompt"


def log_of(folder, *rows, name="log.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_texts_and_ids_with_and_without_answers(tmp_path):
    path = log_of(
        tmp_path,
        {"prompt": "a", "answer": "b", "time": 7, "other": [1]},
        "",
        {"prompt": [1, 2], "time": "1970-01-01T01:00:00Z"},
        {"prompt": "a", "answer": [3], "time": "1970-01-01T01:00:00", "id": "x"},
    )
    found = list(RequestLog(path).read())
    assert [(r.prompt, r.answer, r.time) for r in found] == [
        ("a", "b", 7.0),
        ((1, 2), None, 3600.0),
        ("a", (3,), 3600.0),
    ]
    assert len({r.key for r in found}) == 3
    assert [r.key for r in RequestLog(path).read()] == [r.key for r in found]


@pytest.mark.parametrize(
    "row",
    [
        "{",
        '{"prompt": "a", "prompt": "b"}',
        {"text": SECRET},
        {"prompt": ""},
        {"prompt": [1, -1]},
        {"prompt": [True]},
        {"prompt": ["a"]},
        {"prompt": "a", "answer": 3},
        {"prompt": "a", "time": "yesterday"},
        {"prompt": "a", "time": -1},
        {"prompt": "a", "time": True},
        '{"prompt": "a", "time": 1e999}',
        '{"prompt": "\\ud800"}',
    ],
)
def test_a_line_that_is_no_request_is_none(tmp_path, row):
    path = log_of(tmp_path, row, {"prompt": "b"})
    first, second = RequestLog(path).read()
    assert first is None and second.prompt == "b"


def test_a_request_prints_nothing_of_its_text(tmp_path):
    (request,) = RequestLog(log_of(tmp_path, {"prompt": SECRET, "answer": SECRET})).read()
    assert SECRET not in repr(request)


def test_a_log_that_grows_is_read_line_by_line(tmp_path):
    path = log_of(tmp_path, {"prompt": "a"})
    log, late = RequestLog(path), RequestLog(path, end=True)
    assert [r.prompt for r in log.read()] == ["a"] and list(late.read()) == []
    with path.open("a") as file:
        file.write('{"prompt": "b"}\n{"prom')
    assert [r.prompt for r in log.read()] == ["b"]
    assert list(log.read()) == []
    with path.open("a") as file:
        file.write('pt": "c"}')
    assert list(log.read()) == []
    assert [r.prompt for r in log.read(last=True)] == ["c"]
    assert [r.prompt for r in late.read(last=True)] == ["b", "c"]


def test_a_log_that_is_replaced_or_cut_off_is_read_anew(tmp_path):
    path = log_of(tmp_path, {"prompt": "a long first line"})
    log = RequestLog(path)
    assert len(list(log.read())) == 1
    os.replace(path, tmp_path / "log.1")
    assert list(log.read()) == []
    log_of(tmp_path, {"prompt": "b"}, {"prompt": "another line that is long"})
    assert [r.prompt for r in log.read()] == ["b", "another line that is long"]
    path.write_text('{"prompt": "c"}\n')
    assert [r.prompt for r in log.read()] == ["c"]


def test_a_line_that_is_too_long_is_left_out_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "MAX_LINE", 100)
    path = log_of(tmp_path, {"prompt": "x" * 1000}, {"prompt": "b"})
    assert [r and r.prompt for r in RequestLog(path).read()] == [None, "b"]


def test_the_log_of_a_vllm_server(tmp_path):
    """Lines as vLLM 0.32 wrote them; a prompt may say what such a line says."""
    start = "(APIServer pid=9) DEBUG 11-27 15:19:48 [entrypoints/.../request_logger.py:55] Request"
    path = log_of(
        tmp_path,
        "INFO 11-27 15:19:47 [core.py:133] Initializing",
        f"{start} cmpl-a-0 details: prompt: None, prompt_token_ids: [56, 51],"
        " prompt_embeds shape: None.",
        f"{start} cmpl-b-0 details: prompt: 'x, prompt_token_ids: [1], prompt_embeds shape: None.',"
        " prompt_token_ids: [7], prompt_embeds shape: None.",
        f"{start} cmpl-c-0 details: prompt: None, prompt_token_ids: None, prompt_embeds shape: 3.",
    )
    found = list(RequestLog(path).read())
    assert [(r.prompt, r.answer, r.time) for r in found] == [
        ((56, 51), None, None),
        ((7,), None, None),
    ]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(PdtrimError, match="no log at"):
        RequestLog(tmp_path / "none")
    packed = tmp_path / "log.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    with pytest.raises(PdtrimError, match="is gzip data"):
        RequestLog(packed)
