"""The supervisor of ``pdtrim serve`` with small HTTP servers in place of vLLM's.

Each server, and a child that it leaves behind, holds a connection to the test. The kernel closes it
when they are gone: that is how a test sees, without a clock, that nothing is left.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest

from pdtrim.engines import supervise as supervisor
from pdtrim.engines.base import Process
from pdtrim.engines.ports import free_port
from pdtrim.engines.supervise import serve
from pdtrim.errors import PdtrimError, RuntimeFailure
from pdtrim.runtime.start import python_module

PATIENCE = 120  # seconds until a test that hangs fails; a good one never waits for it

FAKE = """
import http.server, os, select, signal, socket, subprocess, sys, threading
name, port, witness, *how = sys.argv[1:]
link = socket.create_connection(("127.0.0.1", int(witness)))

def leave_with_the_test():  # a failing one leaves nothing behind either
    poll = select.poll()
    poll.register(link, select.POLLRDHUP)
    poll.poll()
    os._exit(9)

threading.Thread(target=leave_with_the_test, daemon=True).start()
if "child" in how:  # it would outlive its parent
    code = (
        "import select, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('up', flush=True); poll = select.poll();"
        "poll.register(int(sys.argv[1]), select.POLLRDHUP); poll.poll()"
    )
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(link.fileno())],
        stdout=subprocess.PIPE, pass_fds=[link.fileno()],
    )
    child.stdout.readline()
if "stubborn" in how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
link.sendall(f"{name}\\n".encode())
if "fail" in how:
    link.recv(1)
    print("loading\\n\\x1b[31mno [/such] model\\x1b[0m\\n", flush=True)
    sys.exit(1)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("out of memory", flush=True)
            os._exit(3)
        self.send_response(503 if "sick" in how else 200)
        self.end_headers()
        if "sick" in how:
            link.sendall(b"asked\\n")
    def log_message(self, *args):
        pass

print(name, os.environ["PORT"], os.environ.get("WORD"), flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


class Witness:
    """Sees servers come and go."""

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(PATIENCE)
        self.links, self.lines = {}, {}

    def fakes(self, prefill=(), decode=(), router=()):
        port = str(self.server.getsockname()[1])
        made = []
        for name, how in (("prefill 0", prefill), ("decode 0", decode), ("router", router)):
            own = free_port()
            command = (sys.executable, "-S", "-c", FAKE, name, str(own), port, *how)
            url = f"http://127.0.0.1:{own}"
            made.append(Process(name=name, command=command, env={"PORT": str(own)}, url=url))
        return made

    def wait_for(self, *names):
        """Until exactly these have come."""
        while len(self.links) < len(names):
            link, _ = self.server.accept()
            link.settimeout(PATIENCE)
            lines = link.makefile()
            name = lines.readline().strip()
            self.links[name], self.lines[name] = link, lines
        assert self.links.keys() == set(names)

    def all_gone(self):
        """Wait for the end of all that came, and of their children."""
        return all(not lines.read().replace("asked\n", "") for lines in self.lines.values())

    def close(self):
        for closed in (self.server, *self.lines.values(), *self.links.values()):
            closed.close()


class Running:
    """A supervisor in a thread of its own."""

    def __init__(self, fakes, start_seconds=PATIENCE, log=lambda name, line: None):
        self.log = log
        self.lines, self.said, self.error = [], [], None
        self.stop, self.ready = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(fakes, start_seconds), daemon=True)
        self.thread.start()

    def _run(self, fakes, start_seconds):
        try:
            serve(
                fakes,
                start_seconds=start_seconds,
                say=self._say,
                stop=self.stop,
                log=self._log,
            )
        except PdtrimError as error:
            self.error = error
        self.ready.set()

    def _log(self, name, line):
        self.lines.append((name, line))
        self.log(name, line)

    def _say(self, text):
        self.said.append(text)
        self.ready.set()

    def serves(self):
        return self.ready.wait(PATIENCE) and bool(self.said)

    def ended(self):
        """Whether it returned or raised."""
        self.thread.join(timeout=PATIENCE)
        return not self.thread.is_alive()


@pytest.fixture
def witness():
    witness = Witness()
    yield witness
    witness.close()


@pytest.fixture
def spawned(monkeypatch):
    """Every process that the supervisor starts."""
    seen = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            self.reaped = threading.Event()
            super().__init__(*args, **kwargs)
            seen.append(self)

        def wait(self, timeout=None):
            code = super().wait(timeout)
            self.reaped.set()
            return code

    names = {**vars(subprocess), "Popen": Popen}
    monkeypatch.setattr(supervisor, "subprocess", SimpleNamespace(**names))
    return seen


def test_all_start_the_endpoint_is_said_and_a_stop_leaves_nothing(witness, monkeypatch):
    monkeypatch.setenv("WORD", "listens")
    fakes = witness.fakes(["child"], ["child"], ["child"])
    running = Running(fakes)
    assert running.serves()
    assert running.said == [f"OpenAI endpoint: {fakes[2].url}/v1"]
    witness.wait_for("prefill 0", "decode 0", "router")
    running.stop.set()
    assert running.ended() and running.error is None and witness.all_gone()
    assert sorted(running.lines) == sorted(
        (fake.name, f"{fake.name} {fake.env['PORT']} listens") for fake in fakes
    )


def test_the_router_waits_for_the_servers(witness, spawned):
    running = Running(witness.fakes(["sick"]))
    witness.wait_for("prefill 0", "decode 0")
    assert witness.lines["prefill 0"].readline() == "asked\n"
    assert len(spawned) == 2
    running.stop.set()
    assert running.ended() and running.error is None and running.said == []
    assert len(spawned) == 2 and witness.all_gone()


def test_a_server_that_fails_to_start_ends_the_others_and_its_last_line_is_told(witness, spawned):
    def slow(name, line):  # the last line is still to be read when the process is long gone
        if line == "loading":
            assert spawned[1].reaped.wait(PATIENCE)

    running = Running(witness.fakes(["child"], ["fail", "child"]), log=slow)
    witness.wait_for("prefill 0", "decode 0")
    witness.links["decode 0"].sendall(b"!")
    assert running.ended() and isinstance(running.error, RuntimeFailure)
    assert str(running.error) == "decode 0 ended (exit 1): no [/such] model"
    assert running.said == [] and witness.all_gone()


def test_a_server_that_does_not_answer_in_time_is_named(witness, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep)
    monkeypatch.setattr(supervisor, "time", clock)
    running = Running(witness.fakes(["sick", "child"]), start_seconds=50)
    witness.wait_for("prefill 0", "decode 0")
    assert witness.lines["prefill 0"].readline() == "asked\n"
    clock.monotonic = lambda: 51.0
    assert running.ended() and witness.all_gone()
    assert str(running.error).startswith("prefill 0 did not answer within 50 s")


def test_a_command_that_does_not_exist_ends_what_was_started(witness, spawned):
    prefill, decode, router = witness.fakes()
    missing = Process(name=decode.name, command=("/no/such/program",), env={}, url=decode.url)
    running = Running([prefill, missing, router])
    assert running.ended() and "cannot start decode 0" in str(running.error)
    assert [process.returncode for process in spawned] == [-signal.SIGTERM]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_one_dies_later_everything_ends_and_it_is_named(witness, victim):
    fakes = witness.fakes(["child"], ["child"], ["child"])
    running = Running(fakes)
    assert running.serves()
    witness.wait_for("prefill 0", "decode 0", "router")
    doomed = HTTPConnection(fakes[victim].url.removeprefix("http://"), timeout=PATIENCE)
    doomed.request("GET", "/die")
    with pytest.raises(ConnectionError):
        doomed.getresponse()
    assert running.ended() and witness.all_gone()
    assert str(running.error) == f"{fakes[victim].name} ended (exit 3): out of memory"


SUPERVISOR = """
import json, sys
from pdtrim.engines.base import Process
from pdtrim.engines.supervise import serve
say = lambda text: print(text, flush=True)
processes = [Process(**{**p, "command": tuple(p["command"])}) for p in json.loads(sys.argv[1])]
serve(processes, start_seconds=600, say=say, log=lambda name, line: None)
"""


def test_nothing_is_left_of_a_supervisor_that_is_killed(witness):
    """Of servers that do not heed anything, nor of the children that they left behind."""
    fakes = witness.fakes(["child", "stubborn"], ["child", "stubborn"], ["child"])
    given = json.dumps([dataclasses.asdict(fake) for fake in fakes])
    command = [sys.executable, "-c", SUPERVISOR, given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == f"OpenAI endpoint: {fakes[2].url}/v1\n"
        witness.wait_for("prefill 0", "decode 0", "router")
        running.kill()
    assert witness.all_gone()


def test_a_module_starts_without_the_current_folder_on_any_python(tmp_path):
    """Also where Python knows no PYTHONSAFEPATH; what PYTHONPATH names is found."""
    mark = tmp_path / "was-run"
    for name in ("runpy", "colorsys", "served"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "served.py").write_text("import colorsys, sys; print(sys.argv[1:])")
    env = {"PYTHONPATH": str(tmp_path / "own")}
    command = python_module("served", "-m", "a b")
    for safe in ({}, {"PYTHONSAFEPATH": "1"}):
        done = subprocess.run(
            command, cwd=tmp_path, env=env | safe, capture_output=True, text=True, check=True
        )
        assert done.stdout == "['-m', 'a b']\n" and not mark.exists()


def test_servers_run_nothing_of_the_current_folder(witness, tmp_path, monkeypatch):
    """Neither the keeper, nor what it starts, nor what that starts in turn."""
    mark = tmp_path / "was-run"
    for name in ("subprocess", "signal", "http", "pdtrim", "colorsys"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "served.py").write_text(
        "import colorsys, sys, subprocess\n"
        "if sys.version_info >= (3, 11):\n"
        "    subprocess.run([sys.executable, '-c', 'import colorsys'], check=True)\n"
        "print(__name__, sys.argv[1:])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"), prepend=os.pathsep)
    prefill, decode, router = witness.fakes()
    command = python_module("served", "-m", "x")
    module = Process(name=decode.name, command=command, env={}, url=decode.url)
    running = Running([prefill, module, router])
    assert running.ended()
    assert str(running.error) == "decode 0 ended (exit 0): __main__ ['-m', 'x']"
    assert not mark.exists()


def test_one_that_does_not_heed_sigterm_is_killed(witness, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.0)
    running = Running(witness.fakes(["stubborn"], ["stubborn"], ["stubborn"]))
    assert running.serves()
    witness.wait_for("prefill 0", "decode 0", "router")
    running.stop.set()
    assert running.ended() and running.error is None and witness.all_gone()


def test_health_is_asked_for_directly_whatever_proxy_is_set(witness, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        running = Running(witness.fakes(["sick"]))
        witness.wait_for("prefill 0", "decode 0")
        assert witness.lines["prefill 0"].readline() == "asked\n"
        running.stop.set()
        assert running.ended()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_and_is_the_callers_again(witness, number):
    stop, passed = threading.Event(), []

    def callers(*_):
        passed.append(number)
        stop.set()

    late = threading.Timer(PATIENCE, callers)
    late.start()

    def say(text):
        witness.wait_for("prefill 0", "decode 0", "router")
        os.kill(os.getpid(), number)

    before = signal.signal(number, callers)
    try:
        fakes = witness.fakes(["child"], [], ["child"])
        serve(fakes, start_seconds=PATIENCE, say=say, stop=stop, log=lambda name, line: None)
        assert not passed and witness.all_gone()
        os.kill(os.getpid(), number)
        assert passed == [number]
    finally:
        late.cancel()
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_ignored(witness):
    stop, handlers = threading.Event(), []

    def say(text):
        handlers.append(signal.getsignal(signal.SIGHUP))
        stop.set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fakes = witness.fakes()
        serve(fakes, start_seconds=PATIENCE, say=say, stop=stop, log=lambda name, line: None)
        assert [*handlers, signal.getsignal(signal.SIGHUP)] == [signal.SIG_IGN, signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGHUP, before)
