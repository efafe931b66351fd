"""Compare methods at one share of parameters removed: what ``pdtrim compare`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from pdtrim.errors import PdtrimError
from pdtrim.evaluate.compare.measure import DENSE, MeasuredRun, Measurements, Runner
from pdtrim.evaluate.compare.records import Comparison
from pdtrim.evaluate.compare.summary import summarise, task_infos
from pdtrim.evaluate.compare.systems import System, chosen_methods, given_systems, planned_systems
from pdtrim.evaluate.configs import CompareConfig
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
    systems = listed_systems(config)
    measurements = Measurements(model, config, folder, runner=run, progress=progress, say=say)
    measured: dict[str, list[MeasuredRun]] = {DENSE: [measurements.dense()]}
    measured |= {system.name: [] for system in systems}
    for system, seed in _parts(config, systems):
        measured[system.name].append(measurements.system(system, seed))
    tasks = task_infos(measured)
    asked = replace(config, methods=chosen_methods(config.methods))
    rows, best = summarise(systems, measured)
    return Comparison(
        model=model.name,
        model_fingerprint=model.fingerprint,
        dtype=model.dtype_name,
        device=model.device.type,
        remove=config.remove,
        settings=TypeAdapter(CompareConfig).dump_python(asked, mode="json"),
        tasks=tasks,
        best_baseline=best,
        rows=rows,
        versions=versions(),
        host=host(),
    )


def measure_part(
    model: Model,
    config: CompareConfig,
    folder: Path,
    only: Sequence[str],
    *,
    run: Runner = run_task,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Measure some of the systems and leave their plans and cells in ``folder``.

    Processes may do parts of one comparison side by side in one folder, on one machine or many;
    :func:`compare` then finds everything there.

    Args:
        only: ``NAME`` of a system for all its seeds or ``NAME-seedN`` for one; ``dense`` for the
            calibration texts, which should be there before processes start side by side, and then
            the dense model.

    Raises:
        PdtrimError: a name that the comparison has not; further as :func:`compare`.
    """
    parts = parts_of(config, only)
    measurements = Measurements(model, config, folder, runner=run, progress=progress, say=say)
    if DENSE in only:
        measurements.prepare_texts()  # first: others may wait for them to begin
        measurements.dense()
    for system, seed in parts:
        measurements.system(system, seed)


def parts_of(config: CompareConfig, only: Sequence[str]) -> list[tuple[System, int]]:
    """The systems and seeds of these names, in the comparison's order; ``dense`` is none.

    Raises:
        PdtrimError: a name that the comparison has not; further as :func:`listed_systems`.
    """
    parts = _parts(config, listed_systems(config))
    known = {DENSE, *(name for system, seed in parts for name in _names(system, seed))}
    for name in only:
        if name not in known:
            systems = ", ".join(dict.fromkeys(system.name for system, _ in parts))
            raise PdtrimError(
                f"--only '{name}': give dense, or a system such as {systems}, with -seedN"
                " behind it for one of the seeds"
            )
    return [part for part in parts if any(name in only for name in _names(*part))]


def _names(system: System, seed: int) -> tuple[str, str]:
    return system.name, f"{system.name}-seed{seed}"


def _parts(config: CompareConfig, systems: Sequence[System]) -> list[tuple[System, int]]:
    """All systems with one seed, then with the next, and given plans at the end."""
    planned = [system for system in systems if not system.given]
    return [
        *((system, seed) for seed in config.seeds for system in planned),
        *((system, seed) for system in systems for seed in system.given),
    ]


def listed_systems(config: CompareConfig) -> list[System]:
    """The systems that a comparison plans and those whose plans it is given, in their order.

    Raises:
        PdtrimError: two of one name, a name that is no file name, or a share out of range.
    """
    methods = chosen_methods(config.methods)
    systems = [*planned_systems(methods, config.remove), *given_systems(config.rows)]
    names = [DENSE, *(system.name for system in systems)]
    for name in names:
        if names.count(name) > 1:
            raise PdtrimError(f"two systems are called '{name}': give the --row another name")
        if not name or Path(name).name != name:
            raise PdtrimError(f"--row '{name}': a row's name is also a folder's, so give no '/'")
    return systems
