"""Every method on tasks at two shares, and prefills without a third and half of their blocks.

    python run.py --model Qwen/Qwen2.5-Coder-1.5B-Instruct --data DATA --out OUT

DATA is a folder of tasks and text (docs/tasks.md), with c4/train.jsonl, c4/valid.jsonl and
wikitext2/train.jsonl. Jobs are processes side by side, each with a share of a GPU's memory that it
cannot pass, in the order of what they are worth; what is done stays done, so the run can be cut off
at any time and the same command goes on. OUT/status.txt says where it is, OUT/log has a file a job,
OUT/20 and OUT/33 are folders of ``pdtrim compare``.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from jobs import Settings, all_jobs
from queueing import Job

from pdtrim.versions import host, versions

TICK = 1.0  # seconds between looks at the processes
ATTEMPTS = 3  # with more memory each time
MORE = 1.6


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a GGUF file or a hub id")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--sequences", type=int, default=32, help="that steer; see pdtrim compare")
    parser.add_argument("--length", type=int, default=256, help="tokens of prompt and continuation")
    parser.add_argument("--limit", type=int, default=500, help="items of each task")
    parser.add_argument("--solved", type=int, default=300, help="items of gsm8k")
    parser.add_argument("--probes", type=int, default=100, help="of each retrieval task")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each training")
    parser.add_argument("--third", type=int, default=9, help="blocks that are a third")
    parser.add_argument("--half", type=int, default=14, help="blocks that are half")
    parser.add_argument("--tasks", default="", help="others than the page's")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="of a task, together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--memory", type=float, default=74.0, help="GB of a GPU for all jobs")
    parser.add_argument("--scale", type=float, default=1.0, help="of jobs' GB, for other models")
    parser.add_argument("--jobs", type=int, default=12, help="processes at a time")
    parser.add_argument("--only", default="", help="jobs whose names begin so, with commas")
    return parser.parse_args()


@dataclass
class Running:
    """A process, what it does and where."""

    job: Job
    process: subprocess.Popen[bytes]
    gpu: int
    begun: float = field(default_factory=time.monotonic)


class Runner:
    """Starts jobs in their order as memory allows."""

    def __init__(self, args: argparse.Namespace, jobs: list[Job]) -> None:
        self.args, self.out = args, Path(args.out)
        self.begun = time.monotonic()
        for name in ("log", "done"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        self.jobs = jobs
        self.waiting = [job for job in jobs if not self.done(job).exists()]
        self.running: list[Running] = []
        self.attempts: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def done(self, job: Job) -> Path:
        """The file that says a job is done."""
        return self.out / "done" / job.name

    def run(self) -> None:
        """Until all jobs are done or have failed."""
        while self.waiting or self.running:
            for one in list(self.running):
                if one.process.poll() is not None:
                    self.running.remove(one)
                    self.ended(one)
            self.start()
            self.status()
            if not self.running and not any(job.ready() for job in self.waiting):
                break  # what they need has failed
            time.sleep(TICK)
        self.status()

    def start(self) -> None:
        """Start what is ready, in order; the first that finds no room holds up all behind it."""
        for job in list(self.waiting):
            if not job.ready():
                continue
            need = self.args.memory if job.alone else min(job.gigabytes, self.args.memory)
            free = [self.args.memory - self.taken(gpu) for gpu in range(self.args.gpus)]
            gpu = max(range(self.args.gpus), key=lambda i: free[i])
            if free[gpu] < need - 1e-6 or len(self.running) >= self.args.jobs:
                return
            self.waiting.remove(job)
            self.running.append(Running(job, self.process(job, gpu, need), gpu))

    def taken(self, gpu: int) -> float:
        """GB of a GPU that its jobs may take."""
        here = [one.job for one in self.running if one.gpu == gpu]
        return sum(self.args.memory if job.alone else job.gigabytes for job in here)

    def process(self, job: Job, gpu: int, gigabytes: float) -> subprocess.Popen[bytes]:
        """A job's process, on one GPU and one core."""
        command = [sys.executable, __file__, "--child", f"{gigabytes:.2f}", *job.command]
        places = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        where = places[gpu] if gpu < len(places) and places[gpu] else str(gpu)
        env = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": where,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log(job).open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def log(self, job: Job) -> Path:
        """The file of a job's output."""
        return self.out / "log" / f"{job.name}.txt"

    def ended(self, one: Running) -> None:
        """Note a job as done, give it another try with more memory, or give it up."""
        job, code = one.job, one.process.returncode
        missing = [path.name for path in job.makes if not path.exists()]
        if code == 0 and not missing:
            self.done(job).write_text(f"{time.monotonic() - one.begun:.0f} s\n", encoding="utf-8")
            return
        self.attempts[job.name] = self.attempts.get(job.name, 0) + 1
        if self.attempts[job.name] < ATTEMPTS and (code != 0 or self.short_of_memory(job)):
            job.gigabytes *= MORE if self.short_of_memory(job) else 1.0
            self.waiting.insert(0, job)
        else:
            self.failed[job.name] = f"exit {code}; {self.last(job)}"

    def short_of_memory(self, job: Job) -> bool:
        """Whether its output ends with a lack of memory."""
        return "out of memory" in self.text(job)[-4000:].lower()

    def text(self, job: Job) -> str:
        """A job's output."""
        log = self.log(job)
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def last(self, job: Job) -> str:
        """The last line of a job's output."""
        lines = [line for line in self.text(job).splitlines() if line.strip()]
        return lines[-1].strip()[-110:] if lines else ""

    def status(self) -> None:
        """Write down what is done, what runs and what failed."""
        groups: dict[str, list[int]] = {}
        for job in self.jobs:
            count = groups.setdefault(job.group, [0, 0])
            count[0] += self.done(job).exists()
            count[1] += 1
        now = time.monotonic()
        lines = [f"{(now - self.begun) / 60:.1f} min"]
        lines.append(", ".join(f"{name} {done}/{all_}" for name, (done, all_) in groups.items()))
        for one in self.running:
            where = f"gpu {one.gpu}, {one.job.gigabytes:.0f} GB"
            lines.append(
                f"  {one.job.name}: {now - one.begun:.0f} s, {where}: {self.last(one.job)}"
            )
        lines += [f"  FAILED {name}: {why}" for name, why in self.failed.items()]
        if not self.running:
            lines.append("ended")
        part = self.out / "status.part"
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.rename(self.out / "status.txt")


def child(gigabytes: float, command: list[str]) -> None:
    """Run a verb of pdtrim, or a script, with no more of the GPU's memory than given."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total))
    if command[0].endswith(".py"):
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
        return
    from pdtrim.cli import main

    sys.argv = ["pdtrim", *command]
    main()


def main() -> None:
    """Make the list of jobs and run it."""
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
        return
    args = arguments()
    settings = Settings.of(args)
    jobs = all_jobs(settings)
    if args.only:
        jobs = [job for job in jobs if job.name.startswith(tuple(args.only.split(",")))]
    runner = Runner(args, jobs)
    where = {
        "host": host(),
        "versions": versions(),
        "settings": {k: str(v) for k, v in vars(args).items()},
    }
    (args.out / "machine.json").write_text(json.dumps(where, indent=1) + "\n", encoding="utf-8")
    runner.run()


if __name__ == "__main__":
    main()
