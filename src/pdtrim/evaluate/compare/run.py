"""Compare methods at one share of parameters removed: what ``pdtrim compare`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.measure import (
    DENSE,
    Bench,
    CompareConfig,
    Measured,
    Runner,
)
from pdtrim.evaluate.compare.records import Comparison
from pdtrim.evaluate.compare.summary import summarise, task_infos
from pdtrim.evaluate.compare.systems import System, given_systems, planned_systems
from pdtrim.evaluate.tasks.run import run_task
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.versions import host, versions


def compare(
    model: Model,
    config: CompareConfig,
    folder: Path,
    *,
    run: Runner = run_task,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Plan every system with every seed, run the tasks, and put the numbers together.

    What is in ``folder`` and was made by the same settings is not made again. A system whose
    method refuses gets a row with the reason.

    Args:
        run: runs one task; for tests.

    Raises:
        PdtrimError: two systems of one name, unreadable text, plans or cells, cells of other
            settings, or a task that cannot be run.
    """
    systems = listed(config)
    bench = Bench(model, config, folder, runner=run, progress=progress, say=say)
    measured: dict[str, list[Measured]] = {DENSE: [bench.dense()]}
    measured |= {system.name: [] for system in systems}
    for seed in config.seeds:
        for system in systems:
            if not system.given:
                measured[system.name].append(bench.system(system, seed))
    for system in systems:
        measured[system.name] += [bench.system(system, seed) for seed in system.given]
    tasks = task_infos(measured)
    rows, best = summarise(systems, measured)
    return Comparison(
        model=model.name,
        model_fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        remove=config.remove,
        settings=TypeAdapter(CompareConfig).dump_python(config, mode="json"),
        tasks=tasks,
        best_baseline=best,
        rows=rows,
        versions=versions(),
        host=host(),
    )


def listed(config: CompareConfig) -> list[System]:
    """The systems that a comparison plans and those whose plans it is given, in their order.

    Raises:
        PdtrimError: two of one name, a name that is no file name, or a share out of range.
    """
    systems = [*planned_systems(config.methods, config.remove), *given_systems(config.rows)]
    names = [DENSE, *(system.name for system in systems)]
    for name in names:
        if names.count(name) > 1:
            raise PdtrimError(f"two systems are called '{name}': give the --row another name")
        if not name or Path(name).name != name:
            raise PdtrimError(f"--row '{name}': a row's name is also a folder's, so give no '/'")
    return systems
