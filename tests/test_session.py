"""A session whose caller, stages or machine do what they should not."""

import gc
import io
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import export, make_plan, tiny_model
from pdtrim.errors import PdtrimError, PlanError, RuntimeFailure
from pdtrim.plan import Gates
from pdtrim.runtime.process import Patience, StageProcess, last_words
from pdtrim.runtime.session import Session
from pdtrim.stage.forward import Batch
from pdtrim.stage.sampling import Sampling

FIRST, SECOND = list(range(3, 20)), [50, 2, 8, 60, 33, 21, 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model("llama", eos_token_id=None)
    plan = make_plan(model, Gates.removing(4, prefill={1}))
    return export(plan, model, tmp_path_factory.mktemp("pair") / "pair")


HOSTILE = ("torch", "json", "safetensors", "transformers", "pdtrim", "sitecustomize")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of modules by well-known names, and the file that any of them leaves."""
    folder = tmp_path_factory.mktemp("hostile")
    mark = folder / "was-run"
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit(3)\n")
    return folder, mark


@pytest.fixture(scope="module")
def session(folder, hostile):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(hostile[0])
        session = Session(folder)
    with session:
        yield session


@pytest.fixture(scope="module")
def wanted(session):
    """What the second prompt leads to in a session that nobody disturbs."""
    return session.generate([SECOND], max_new_tokens=6)[0].tokens


def test_nothing_of_the_current_folder_was_run(session, wanted, hostile):
    """The session was started in the hostile folder; its processes are still there."""
    for process in (session.prefill.process, session.decode.process):
        assert os.readlink(f"/proc/{process.pid}/cwd") == str(hostile[0])
    assert wanted and not hostile[1].exists()


def interrupted(session, stage, event, at):
    """A Ctrl-C at the n-th event of a kind that a stage sends."""
    process, count = getattr(session, stage), 0
    wait = process.event

    def disturbed(number):
        nonlocal count
        message = wait(number)
        count += message["event"] == event
        if count == at:
            raise KeyboardInterrupt
        return message

    return process, disturbed


@pytest.mark.parametrize(
    "stage, event, at",
    [("prefill", "linked", 1), ("decode", "expecting", 1), ("prefill", "prefilled", 1),
     ("decode", "tokens", 1), ("decode", "tokens", 3), ("decode", "done", 1)],
)  # fmt: skip
def test_after_a_ctrl_c_the_next_prompt_gets_its_own_tokens(session, wanted, stage, event, at):
    session._linked = False  # so that there is a link to make
    process, disturbed = interrupted(session, stage, event, at)
    process.event = disturbed
    try:
        with pytest.raises(KeyboardInterrupt):
            session.generate([FIRST], max_new_tokens=400 if event == "tokens" else 4)
    finally:
        del process.event
    assert session.generate([SECOND], max_new_tokens=6)[0].tokens == wanted


def test_a_ctrl_c_before_the_answer_leaves_the_work_and_its_answer_behind(session, wanted):
    """The orders stand in the pipes when the session has long left them."""
    for process in (session.prefill, session.decode):

        def gone(number):
            raise KeyboardInterrupt

        process.event = gone
        try:
            with pytest.raises(KeyboardInterrupt):
                session.generate([FIRST], max_new_tokens=4)
        finally:
            del process.event
        assert session.generate([SECOND], max_new_tokens=6)[0].tokens == wanted


def test_after_a_refused_frame_the_stages_get_a_new_stream(session, wanted, monkeypatch):
    order = session.decode.order

    def announce_nothing(op, **fields):
        return order(op, **{**fields, "requests": []} if op == "expect" else fields)

    with monkeypatch.context() as patched:
        patched.setattr(session.decode, "order", announce_nothing)
        with pytest.raises(RuntimeFailure, match=r"prefill: .*no such request is expected"):
            session.generate([FIRST], max_new_tokens=4)
    assert session.generate([SECOND], max_new_tokens=6)[0].tokens == wanted


@pytest.mark.parametrize("how", ["close", "throw", "forgotten"])
def test_an_abandoned_stream_leaves_the_session_usable(session, wanted, how):
    stream = session.stream([FIRST], max_new_tokens=400)
    next(stream)
    if how == "close":
        stream.close()
    elif how == "throw":
        with pytest.raises(MemoryError):
            stream.throw(MemoryError("the caller's"))
    assert session.generate([SECOND], max_new_tokens=6)[0].tokens == wanted
    if how == "forgotten":
        with pytest.raises(RuntimeFailure, match="a later request has ended"):
            list(stream)


def test_the_end_of_an_old_stream_is_not_the_new_ones(session, wanted):
    old = session.stream([FIRST], max_new_tokens=400)
    next(old)
    new = session.stream([SECOND], max_new_tokens=6)
    tokens = [next(new)]
    old.close()
    assert [token for _, token in (*tokens, *new)] == wanted


WRONG = {
    "no prompts": ([], {}, "no prompt given"),
    "an empty prompt": ([[]], {}, "empty"),
    "a text for a list": ("text", {}, "prompts must be a list"),
    "a number for a list": (5, {}, "prompts must be a list"),
    "a number for a prompt": ([5], {}, "must be a list"),
    "bytes": ([b"ab"], {}, "must be a list"),
    "a text without a tokenizer": (["text"], {}, "no tokenizer"),
    "tokens as texts": ([["1", "2"]], {}, "token id '1' is no whole number"),
    "tokens as floats": ([[1.0]], {}, "no whole number"),
    "tokens as truth": ([[True]], {}, "token id True is no whole number"),
    "no token": ([[None]], {}, "no whole number"),
    "a token beyond": ([[1, 4000]], {}, "not in the vocabulary"),
    "a token below": ([[-1]], {}, "not in the vocabulary"),
    "a huge token": ([[10**6000]], {}, "not in the vocabulary"),
    "too long": ([[1] * 600], {}, "limit of 512"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "at least 1"),
    "many new tokens": ([[1]], {"max_new_tokens": 10**6000}, "limit of 512"),
    "new tokens as text": ([[1]], {"max_new_tokens": "5"}, "max_new_tokens '5' is no whole"),
    "half a token": ([[1]], {"max_new_tokens": 1.5}, "no whole number"),
    "true new tokens": ([[1]], {"max_new_tokens": True}, "no whole number"),
    "stops as text": ([[1]], {"stop_ids": "2"}, "stop_ids must be a list"),
    "a stop as text": ([[1]], {"stop_ids": ["2"]}, "stop id '2' is no whole number"),
    "a sampling of another type": ([[1]], {"sampling": {"temperature": 1}}, "must be a Sampling"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_before_a_process_hears_of_it(session, what, monkeypatch):
    prompts, options, words = WRONG[what]
    monkeypatch.setattr(session.prefill, "order", lambda *a, **k: pytest.fail("heard"))
    monkeypatch.setattr(session.decode, "order", lambda *a, **k: pytest.fail("heard"))
    calls = [session.generate] if what == "a text without a tokenizer" else [
        session.generate, session.stream
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(PdtrimError, match=words) as error:
            call(prompts, **{"max_new_tokens": 5, **options})
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "name, value",
    [("temperature", "1"), ("temperature", None), ("top_p", True), ("seed", 1.5), ("seed", -1),
     ("seed", 1 << 63)],
)  # fmt: skip
def test_a_sampling_of_wrong_values_is_refused(session, name, value):
    sampling = Sampling()
    object.__setattr__(sampling, name, value)
    with pytest.raises(PdtrimError, match=name):
        session.generate([[1]], sampling=sampling)


def test_whole_numbers_of_other_libraries_are_taken(session, wanted):
    for prompt in (np.array(SECOND), torch.tensor(SECOND), tuple(SECOND)):
        made = session.generate([prompt], max_new_tokens=np.int64(6), stop_ids=torch.tensor([96]))
        assert made[0].tokens == wanted


def test_scores_are_asked_for_real_tokens_only(session):
    for prompt, continuation in (([[1, 97]], [[1]]), ([[1]], [[-1]]), ([[1]], [[0.5]])):
        batch = Batch(prompt_BP=torch.tensor(prompt), continuation_BC=torch.tensor(continuation))
        with pytest.raises(PdtrimError, match="token id"):
            session.score(batch)


@pytest.mark.parametrize(
    "stage, op, fields, words",
    [
        ("decode", "generate", {"requests": [{"id": 5}]}, "KeyError"),
        ("decode", "score", {"requests": None, "continuation": [[1]]}, "TypeError"),
        ("decode", "expect", {"requests": [{"id": "ab"}]}, "KeyError"),
        ("prefill", "prefill", {"requests": [{"id": "ab", "tokens": ["1"]}]}, "prefill: "),
        ("prefill", "explode", {}, "KeyError: 'explode'"),
    ],
)
def test_an_order_that_nothing_can_be_made_of_is_answered(
    session, wanted, stage, op, fields, words
):
    process = getattr(session, stage)
    with pytest.raises(RuntimeFailure, match=words) as error:
        process.event(process.order(op, **fields))
    assert "\n" not in str(error.value)
    assert session.generate([SECOND], max_new_tokens=6)[0].tokens == wanted


def listening(kind):
    """Inodes of sockets that listen on this machine."""
    for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
        words = line.split()
        if kind == "unix" and int(words[3], 16) & 0x10000:
            yield words[6]
        elif kind != "unix" and words[3] == "0A":
            yield words[9]


def test_the_stages_listen_nowhere(session):
    with socket.create_server(("127.0.0.1", 0)) as own:
        everybodys = {inode for kind in ("tcp", "tcp6", "unix") for inode in listening(kind)}
        assert os.readlink(f"/proc/self/fd/{own.fileno()}")[8:-1] in everybodys
    for process in (session.prefill.process, session.decode.process):
        held = {os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()}
        sockets = {name[8:-1] for name in held if name.startswith("socket:[")}
        assert sockets and not sockets & everybodys


def stop(process):
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_stopped_stage_is_named_and_a_session_ends_over_stopped_ones(folder):
    """Decode stops in the middle of a handover: prefill lives and waits for it.

    Prefill stops under an order that no pipe holds; then the session's last reference goes.
    """
    session = Session(folder, patience=Patience(silence_s=2))
    processes = [session.prefill.process, session.decode.process]
    order = session.prefill.order

    def stop_decode_first(op, **fields):
        if op == "prefill":
            stop(processes[1])
        return order(op, **fields)

    session.prefill.order = stop_decode_first
    with pytest.raises(RuntimeFailure, match="the decode process gave no sign of life for 2 s"):
        session.generate([FIRST], max_new_tokens=4)
    with pytest.raises(RuntimeFailure, match=r"the decode process ended \(killed by SIGKILL\)"):
        session.generate([FIRST], max_new_tokens=4)
    stop(processes[0])
    order("rest", ballast="x" * (1 << 22))
    del session.prefill.order, session
    gc.collect()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


PARENT = """
import os, signal, sys
from pathlib import Path
from pdtrim.runtime.process import Patience, StageProcess
one, two = (StageProcess(s, Path(sys.argv[1]) / s, Patience()) for s in ("prefill", "decode"))
one.event(0), two.event(0)
one.order("prefill", requests=[{"id": "ab" * 16, "tokens": [1] * 511}] * 4000, overlap=True)
os.kill(two.process.pid, signal.SIGSTOP)
loading = StageProcess("prefill", Path(sys.argv[1]) / "prefill", Patience())
print(*(stage.process.pid for stage in (one, two, loading)), flush=True)
signal.pause()
"""


def test_no_stage_outlives_a_killed_parent(folder):
    """One computes, one is stopped, one loads: none of them looks at its stdin."""
    command = [sys.executable, "-c", PARENT, str(folder)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        handles = [os.pidfd_open(pid) for pid in pids]
        parent.kill()
    assert len(handles) == 3
    for handle in handles:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        assert waiting.poll(60_000), "it still runs"
        os.close(handle)


def test_last_words_are_one_line_without_terminal_codes():
    log = io.BytesIO(
        b"x" * 100_000 + b"\nTrace\n\x1b[31mValueError: no\x07 [/such]\x1b[0m file\n \n"
    )
    assert last_words(log) == "ValueError: no [/such] file"
    assert last_words(io.BytesIO(b"\n \n")) == "no message"
    assert last_words(io.BytesIO(b"\xff" * 100_000)).startswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("name", ["start_s", "silence_s", "event_s"])
@pytest.mark.parametrize("value", [0, -1, 0.5, float("nan")])
def test_patience_is_longer_than_a_heartbeat(name, value):
    with pytest.raises(PdtrimError, match=name):
        Patience(**{name: value})


def test_a_stage_that_fails_while_another_is_waited_for_says_why(tmp_path):
    """Prefill never gets ready; the other has long said that it cannot load."""
    prefill = StageProcess("prefill", tmp_path, Patience())
    decode = StageProcess("nonsense", tmp_path, Patience())
    prefill.others = [decode]
    try:
        stop(prefill.process)
        with pytest.raises(RuntimeFailure, match=r"^nonsense: ModuleNotFoundError: No module"):
            prefill.event(0)
        with pytest.raises(RuntimeFailure, match=r"\(exit 1\): ModuleNotFoundError: No"):
            decode.event(0)
    finally:
        prefill.close()
        decode.close()


def test_a_killed_stage_is_reported_and_nothing_outlives_the_session(folder):
    session = Session(folder)
    pids = [session.prefill.process.pid, session.decode.process.pid]
    session.prefill.process.kill()
    session.prefill.process.wait()
    with pytest.raises(RuntimeFailure, match="prefill process ended"):
        session.generate([[1, 2, 3]], max_new_tokens=2)
    session.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(PdtrimError, match="closed"):
        session.generate([[1, 2, 3]], max_new_tokens=2)


def test_a_pair_that_cannot_load_says_why(tmp_path):
    model = tiny_model("llama")
    folder = export(make_plan(model, Gates.dense(4)), model, tmp_path / "pair")
    (folder / "decode" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(PdtrimError, match=r"decode.*is not the file that export wrote"):
        Session(folder)
    export(make_plan(model, Gates.dense(4)), model, tmp_path / "a")
    export(make_plan(model, Gates.removing(4, decode={1})), model, tmp_path / "b")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "a" / "prefill").rename(tmp_path / "mixed" / "prefill")
    (tmp_path / "b" / "decode").rename(tmp_path / "mixed" / "decode")
    with pytest.raises(PlanError, match="different plans"):
        Session(tmp_path / "mixed")
