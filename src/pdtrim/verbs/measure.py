"""Measurements that end as tables and pictures in a folder: kv-sweep, sensitivity and ablate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim.keep.files import write_json, write_text
from pdtrim.keep.folder import output_folder
from pdtrim.progress import Progress, silent
from pdtrim.verbs.model import dense_model

if TYPE_CHECKING:
    from torch import Tensor

    from pdtrim.evaluate.configs import AblationConfig, SensitivityConfig, SweepConfig
    from pdtrim.evaluate.result import Result
    from pdtrim.models.model import Model


def sweep_kv(
    model: Model | str,
    config: SweepConfig,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
) -> Result:
    """Quality against bytes for all KV policies.

    Args:
        model: the dense model, or its name, which is loaded with ``dtype`` to ``device``.
        folder: gets ``result.json``, ``table.md``, ``kv.png`` and ``kv.svg``; an interrupted sweep
            goes on from what is there.

    Returns:
        A row for the dense model and for each policy; KL in nats a token, sizes in bytes a prompt.

    Raises:
        PdtrimError: unreadable text, or a folder of other settings.
    """
    from pdtrim.evaluate.kv_sweep import markdown, sweep
    from pdtrim.report.plot import plot_kv

    folder = Path(folder)
    with output_folder(folder, "sweep of KV policies"):
        dense = dense_model(model, dtype=dtype, device=device, progress=progress)
        result = sweep(dense, config, folder, progress=progress)
        result.save(folder / "result.json")
        write_text(folder / "table.md", markdown(result))
        plot_kv(result, folder / "kv")
    return result


def measure_sensitivity(
    model: Model | str,
    config: SensitivityConfig,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """What losing each block alone costs each stage.

    Args:
        model: the dense model, or its name, which is loaded with ``dtype`` to ``device``.
        folder: gets ``table.md`` and ``blocks.png``, and the same of recall, ``recall.md`` and
            ``recall.png``.

    Returns:
        ``KL`` to the dense model, nats a token, and ``recall``, nats an answer above dense, each
        ``[W, L]``: the ways of ``pdtrim.evaluate.sensitivity.WAYS``, then layers.

    Raises:
        PdtrimError: unreadable text, too short for recall, or a folder that holds something else.
    """
    from pdtrim.calibration.batches import load_calibration
    from pdtrim.evaluate.sensitivity import WAYS, recall_sensitivity, sensitivity
    from pdtrim.report.heatmap import plot_sensitivity
    from pdtrim.report.table import sensitivity_table

    folder = Path(folder)
    with output_folder(folder, "sensitivity"):
        dense = dense_model(model, dtype=dtype, device=device, progress=progress)
        asked = config.calibration_config(config.text, config.seed, search=config.sequences)
        text = load_calibration(dense, asked, progress=progress).search
        maps = {
            "KL": sensitivity(dense, text, progress=progress),
            "recall": recall_sensitivity(dense, text, progress=progress, seed=config.seed),
        }
        units = {"KL": "KL, nats a token", "recall": "NLL above dense, nats an answer"}
        names = {"KL": ("table.md", "blocks.png"), "recall": ("recall.md", "recall.png")}
        for what, loss_WL in maps.items():
            table, picture = names[what]
            write_text(folder / table, sensitivity_table(loss_WL, tuple(WAYS)))
            title = f"{dense.name}: {what} of losing one block"
            plot_sensitivity(loss_WL, tuple(WAYS), folder / picture, title=title, unit=units[what])
    return maps


def run_ablation(
    model: Model | str,
    config: AblationConfig,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What each part of the method is worth.

    Args:
        model: the dense model, or its name, which is loaded with ``dtype`` to ``device``.
        folder: gets ``result.json`` and ``table.md``; what is there is not measured again.
        say: takes a line for people.

    Returns:
        What ``result.json`` holds: the model, versions, host, and a cell for each row and seed.

    Raises:
        PdtrimError: unreadable text, or a folder of other settings.
    """
    from pdtrim.evaluate.ablation import ablate, markdown
    from pdtrim.versions import host, versions

    folder = Path(folder)
    with output_folder(folder, "ablation"):
        dense = dense_model(model, dtype=dtype, device=device, progress=progress)
        cells = ablate(dense, config, folder, progress=progress, say=say)
        made = {
            "model": dense.name,
            "dtype": dense.dtype_name,
            "versions": versions(),
            "host": host(),
            "cells": [cell.model_dump() for cell in cells],
        }
        write_json(folder / "result.json", made)
        write_text(folder / "table.md", markdown(cells))
    return made
