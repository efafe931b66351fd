"""Processes that have their imports behind them: forks of one process that did them once.

``python -S warm.py ask SOCKET STREAMS MODULE ...`` is ``python -m MODULE ...`` in such a fork. It
hands its open files (``STREAMS``, numbers with commas), folder and environment over, waits for the
fork and ends as that does.
"""

import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from importlib import import_module

PARENT = "PARENT"
"""In a fork's arguments: the number of its parent."""


def ask(path, streams, words):
    """Run a module in a fork; its exit code."""
    numbers = [int(number) for number in streams.split(",")]
    asked = {"words": words, "streams": numbers, "folder": os.getcwd(), "environ": {**os.environ}}
    with socket.socket(socket.AF_UNIX) as line, line.makefile("rw") as text:
        line.connect(path)
        socket.send_fds(line, [b"\0"], numbers)
        json.dump(asked, text)
        text.flush()
        line.shutdown(socket.SHUT_WR)
        return int(text.read())


def serve(path, modules):
    """Import, then fork for each caller a process that waits for the caller's."""
    for name in modules:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whose ends nobody asks for
    with socket.create_server(path, family=socket.AF_UNIX) as listening:
        print("ready", flush=True)
        while True:
            line, _ = listening.accept()
            if os.fork() == 0:
                break
            line.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent()
    child = os.fork()
    if child == 0:
        be(line, path)
    else:
        _, status = os.waitpid(child, 0)
        line.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def be(line, path):
    """Run the module that was asked for; the stages that it starts are forks too."""
    die_with_parent()
    _, given, *_ = socket.recv_fds(line, 1, 8)
    with line, line.makefile() as text:
        asked = json.load(text)
    above = [fcntl.fcntl(one, fcntl.F_DUPFD, 100) for one in given]  # or one takes another's place
    for number, one in zip(asked["streams"], above, strict=True):
        os.dup2(one, number)
    for one in (*given, *above):
        if one not in asked["streams"]:
            os.close(one)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environ"])
    module, *words = asked["words"]
    sys.argv = [module, *(str(os.getppid()) if word == PARENT else word for word in words)]
    from pdtrim.runtime import process

    process.python_module = stages_by(path)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def die_with_parent():
    from pdtrim.runtime.start import die_with

    die_with(os.getppid())


def forked(path, module, *words, streams=(0, 1, 2)):
    """What runs a module in a fork."""
    handed = ",".join(map(str, streams))
    return (sys.executable, "-S", __file__, "ask", path, handed, module, *words)


def stages_by(path):
    """What ``runtime.process`` calls for the command of a stage process."""

    def made(module, stage, folder, parent, channel, device):
        words = (stage, folder, PARENT, channel, device)
        return forked(path, module, *words, streams=(0, 1, 2, channel))

    return made


class Warm:
    """A server that has imported some modules. Use it as a context manager."""

    def __init__(self, folder, *modules):
        self.path = str(folder / "warm")
        served = [sys.executable, __file__, "serve", self.path, *modules]
        self.process = subprocess.Popen(served, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    verb, place, *rest = sys.argv[1:]
    sys.exit(serve(place, rest) if verb == "serve" else ask(place, rest[0], rest[1:]))
