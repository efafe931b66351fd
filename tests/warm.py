"""The command in forks of a process that has its imports behind it, for scripts of many commands.

A script calls ``python -S warm.py SOCKET VERB ...``, which hands its words, streams, folder and
environment over, and ends as the fork does.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys


def ask(path, words):
    """A command's exit code."""
    with socket.socket(socket.AF_UNIX) as line, line.makefile("rw") as text:
        line.connect(path)
        socket.send_fds(line, [b"\0"], [0, 1, 2])
        json.dump({"words": words, "folder": os.getcwd(), "environ": {**os.environ}}, text)
        text.flush()
        line.shutdown(socket.SHUT_WR)
        return int(text.read())


def serve(path):
    """Answer one command after another, each in a fork."""
    import lm_eval.evaluator  # noqa: F401
    import matplotlib.figure  # noqa: F401
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401

    from pdtrim.evaluate import ablation, run  # noqa: F401
    from pdtrim.verbs import distill, plan  # noqa: F401

    with socket.create_server(path, family=socket.AF_UNIX) as listening:
        print("ready", flush=True)
        while True:
            line, _ = listening.accept()
            with line:
                child = os.fork()
                if child == 0:
                    return answer(line)
                _, status = os.waitpid(child, 0)
                line.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def answer(line):
    """Be the command that was asked for."""
    _, streams, *_ = socket.recv_fds(line, 1, 3)
    with line.makefile() as text:
        asked = json.load(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environ"])
    sys.argv = ["pdtrim", *asked["words"]]
    from pdtrim.cli import main

    main()


@contextlib.contextmanager
def warm(folder):
    """A running server; gives the command's words."""
    path = str(folder / "warm")
    served = [sys.executable, __file__, path]
    with subprocess.Popen(served, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield f"{sys.executable} -S {__file__} {path}"
        finally:
            process.kill()


if __name__ == "__main__":
    _, place, *given = sys.argv
    sys.exit(ask(place, given) if given else serve(place))
