"""Plans of a comparison and their measurements, each made once and kept in its folder.

``DIR/text`` has the calibration text of each seed, ``DIR/plans`` the plans, ``DIR/cells`` a folder
for each system and seed with one file a task, and beside them ``_pair.json`` and ``_latency.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from pdtrim.bench.stages import StageRatios, stage_times
from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import Calibration
from pdtrim.calibration.kept import kept_calibration, text_settings
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.records import PairFacts, Run
from pdtrim.evaluate.compare.systems import System
from pdtrim.evaluate.configs import CompareConfig, TasksConfig
from pdtrim.evaluate.handover import loopback_bytes
from pdtrim.evaluate.tasks.folder import task_files
from pdtrim.evaluate.tasks.scores import TaskScores
from pdtrim.exported import check_base
from pdtrim.keep.files import sha256_of
from pdtrim.keep.lock import lock
from pdtrim.keep.settings import Settings, package_versions
from pdtrim.keep.store import claim, once
from pdtrim.methods import METHODS
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.stage.cost import removed_parameters
from pdtrim.stage.forward import Trimmed

WIRE_PROMPTS = 4  # calibration prompts whose handover is counted
TIMED_PROMPT, TIMED_TOKENS = 512, 32
DENSE = "dense"


class Runner(Protocol):
    """What runs a task; ``evaluate.tasks.run.run_task`` is one."""

    def __call__(
        self, trimmed: Trimmed, task: str, config: TasksConfig, *, progress: Progress
    ) -> TaskScores:
        """Scores of each item of a task."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A run, and the scores of its tasks' items; none if it failed."""

    run: Run
    scores: dict[str, TaskScores]


class Measurements:
    """A model, the folder of its comparison, and what runs its tasks."""

    def __init__(
        self,
        model: Model,
        config: CompareConfig,
        folder: Path,
        *,
        runner: Runner,
        progress: Progress = silent,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.runner, self.progress, self.say = runner, progress, say
        self.texts: dict[int, Calibration] = {}

    def dense(self) -> MeasuredRun:
        """The dense model's measurements."""
        with self._alone(DENSE):
            trim = TrimPlan.dense(self.model)
            return self._measured(DENSE, trim, Run(seed=0), timed=False)

    def system(self, system: System, seed: int) -> MeasuredRun:
        """A system's measurements with one seed; a method that refuses is a failed run.

        Raises:
            PdtrimError: unreadable text or plan, files of other settings, a task that cannot be
                run, or another process is at this system and seed.
        """
        name = f"{system.name}-seed{seed}"
        with self._alone(name):
            return self._system(system, seed, name)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Parts of a comparison may be made side by side, but each part by one process."""
        cells = self.folder / "cells"
        cells.mkdir(parents=True, exist_ok=True)
        with lock(cells / f".{name}.lock", f"{name} in {self.folder}"):
            yield

    def _system(self, system: System, seed: int, name: str) -> MeasuredRun:
        if system.given:
            trim = TrimPlan.open(system.given[seed])
            check_base(self.model, trim.plan)
        else:
            path = self.folder / "plans" / f"{name}.json"
            made = self._plan(system, seed, path)
            if isinstance(made, str):
                self.say(f"{name}: {made}")
                return MeasuredRun(run=Run(seed=seed, failed=made), scores={})
            trim = made
        origin = trim.plan.provenance
        run = Run(
            seed=seed,
            plan_digest=trim.plan.digest,
            calibration=origin.calibration,
            calibration_hash=origin.calibration_hash,
            search_block_tokens=origin.search_block_tokens,
            wall_s=origin.wall_s,
        )
        first = min(system.given) if system.given else self.config.seeds[0]
        timed = self.config.latency and seed == first
        return self._measured(name, trim, run, timed=timed)

    def prepare_texts(self) -> None:
        """Make the calibration text of every seed, if it is not there."""
        for seed in self.config.seeds:
            self._text(seed)

    def _text(self, seed: int) -> Calibration:
        if seed not in self.texts:
            config = self.config.calibration_of(seed)
            path = self.folder / "text" / f"seed{seed}.safetensors"
            self.texts[seed] = kept_calibration(self.model, config, path, progress=self.progress)
        return self.texts[seed]

    def _plan(self, system: System, seed: int, path: Path) -> TrimPlan | str:
        """The plan, or in one line why the method makes none."""
        target = system.target(seed, self.config.recall)
        claim(
            path.with_name(f"{path.stem}.settings.json"),
            {
                **self._of_model(),
                "method": system.method,
                "target": asdict(target),
                "text": text_settings(self.model, self.config.calibration_of(seed)),
            },
        )
        if path.is_file():
            return TrimPlan.open(path)
        text = self._text(seed)
        journal = path.with_name(f"{path.stem}.search.jsonl")
        try:
            made = METHODS[system.method]().plan(
                self.model,
                text,
                target,
                progress=self.progress,
                journal=journal,
            )
            trim = made.save(path)
        except (PdtrimError, torch.OutOfMemoryError) as error:
            return str(error).splitlines()[0]
        journal.unlink(missing_ok=True)
        return trim

    def _measured(self, name: str, trim: TrimPlan, run: Run, *, timed: bool) -> MeasuredRun:
        """All of a plan's cells."""
        cells = self.folder / "cells" / name
        plan, pair = trim.plan, trim.pair(self.model)
        trimmed = Trimmed.of(plan, pair)
        own: Settings = {**self._of_model(), "plan": plan.digest}

        def facts() -> PairFacts:
            prompts = self._text(self.config.seeds[0]).rerank[:WIRE_PROMPTS]
            removed = removed_parameters(self.model, plan)
            return PairFacts(
                prefill_removed=removed["prefill"],
                decode_removed=removed["decode"],
                kv_bytes=loopback_bytes(plan, pair.prefill, prompts).frame,
            )

        def times() -> StageRatios:
            return stage_times(
                trimmed,
                Trimmed.dense(self.model),
                prompt=TIMED_PROMPT,
                new_tokens=TIMED_TOKENS,
                progress=self.progress,
            )

        # tasks first: data that cannot be read should not wait for calibration text
        scores = {task: self._cell(cells, task, trimmed, own) for task in self.config.tasks}
        text = text_settings(self.model, self.config.calibration_of(self.config.seeds[0]))
        pair_facts = once(cells / "_pair.json", PairFacts, {**own, "text": text}, facts)
        taken = None
        if timed:
            setting = {
                **own,
                "device": self.model.device.type,
                "prompt": TIMED_PROMPT,
                "new_tokens": TIMED_TOKENS,
            }
            taken = once(cells / "_latency.json", StageRatios, setting, times)
        self.say(f"{name}: " + ", ".join(f"{t} {main_score(s):.3f}" for t, s in scores.items()))
        run = run.model_copy(
            update={
                "facts": pair_facts,
                "times": taken,
                "scores": {task: main_score(found) for task, found in scores.items()},
            }
        )
        return MeasuredRun(run=run, scores=scores)

    def _cell(self, cells: Path, task: str, trimmed: Trimmed, own: Settings) -> TaskScores:
        config = self.config
        data, place = config.data, Path(config.data)
        if place.is_dir():
            data = str(place.resolve())
        settings = {
            **own,
            "device": self.model.device.type,
            "task": task,
            "data": data,
            "files": {path.name: sha256_of(path) for path in task_files(place, task)},
            "limit": config.limit,
            "shots": config.shots,
            "batch_tokens": config.batch_tokens,
        }
        return once(
            cells / f"{task}.json",
            TaskScores,
            settings,
            lambda: self.runner(trimmed, task, config.tasks_config, progress=self.progress),
        )

    def _of_model(self) -> Settings:
        return {
            "model": self.model.fingerprint,
            "dtype": self.model.dtype_name,
            "versions": package_versions(),
        }


def main_score(scores: TaskScores) -> float:
    """A task's main metric: the mean over its items, or the perplexity."""
    if scores.main == "ppl":
        return scores.metrics["ppl"]
    items = scores.items[scores.main]
    return sum(items) / len(items)
