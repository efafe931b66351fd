"""What each part of the method is worth: what ``pdtrim ablate`` does.

Every row runs on the same calibration text and, where it searches, with the same budget of
block-tokens; its KL is measured on held-out texts. A cell (a row and a seed) is written to disk as
soon as it is measured, and is not measured again: an interrupted run goes on, and runs of different
seeds may share a folder. A folder of another model, text or number is refused.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import Calibration, text_batch
from pdtrim.calibration.kept import kept_calibration, source_digest
from pdtrim.distill.job import DistillConfig
from pdtrim.distill.plan import Training, pairs_of, train_plan
from pdtrim.distill.sets import SetRule
from pdtrim.evaluate.configs import AblationConfig
from pdtrim.evaluate.quality import measure_quality
from pdtrim.keep.settings import Settings, package_versions
from pdtrim.keep.store import claim, once
from pdtrim.keep.tensors import ids_digest
from pdtrim.methods.base import Method
from pdtrim.methods.paper import Paper
from pdtrim.methods.pdtrim import PDTrim
from pdtrim.methods.problem import Target
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks
from pdtrim.plan import Gates, Stage
from pdtrim.progress import Progress, silent
from pdtrim.records import Frozen
from pdtrim.repair.apply import KINDS, SHARED, best_repair, repair
from pdtrim.stage.cost import block_tokens
from pdtrim.stage.forward import Batch, Pair, Trimmed
from pdtrim.stage.swap import swap_pair
from pdtrim.words import Reading, Search

SEARCHES: tuple[Search, ...] = ("one_shot", "greedy", "evolution", "anneal", "hybrid")


class Cell(Frozen):
    """One row with one seed.

    Attributes:
        kl: on each held-out text, nats a continuation token.
        block_tokens, seconds: of the search, or of the repair or training.
    """

    group: str
    name: str
    seed: int
    kl: dict[str, float]
    block_tokens: int
    seconds: float
    removed: str


def ablate(
    model: Model,
    config: AblationConfig,
    folder: Path,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Every row with every seed, in order; those found in ``folder`` are not run again.

    Raises:
        PdtrimError: unreadable text, or a folder of other settings or with a damaged cell.
    """
    held_out: dict[str, Batch] = {
        name: text_batch(
            model,
            source,
            prompt_tokens=config.prompt_tokens,
            continuation_tokens=config.continuation_tokens,
            limit=config.limit,
        )
        for name, source in config.texts.items()
    }
    settings = settings_of(model, config, held_out)
    claim(folder / "settings.json", settings)
    cells = []
    for seed in config.seeds:
        ablation = Ablation(model, config, seed, folder, progress, settings)
        for group, name, make in rows(ablation):
            if config.only and not any(words in f"{group}, {name}" for words in config.only):
                continue

            def cell(
                seed: int = seed,
                group: str = group,
                name: str = name,
                make: Callable[[], RowResult] = make,
            ) -> Cell:
                started = time.perf_counter()
                made = make()
                cell = Cell(
                    group=group,
                    name=name,
                    seed=seed,
                    kl=measure(model, made, held_out),
                    block_tokens=made.block_tokens,
                    seconds=round(time.perf_counter() - started, 1),
                    removed=made.removed,
                )
                found = ", ".join(f"{text} {kl:.4f}" for text, kl in cell.kl.items())
                say(f"seed {seed}, {group}, {name}: KL {found}")
                return cell

            path = folder / "cells" / f"{_slug(f'{seed} {group} {name}')}.json"
            cells.append(once(path, Cell, {**settings, "row": [group, name, seed]}, cell))
    return cells


def settings_of(model: Model, config: AblationConfig, held_out: Mapping[str, Batch]) -> Settings:
    """All that the cells of a folder depend on; its seeds and its choice of rows may differ."""
    asked = {k: v for k, v in asdict(config).items() if k not in ("text", "seeds", "only")}
    return {
        **asked,
        "model": model.fingerprint,
        "dtype": model.dtype_name,
        "device": model.device.type,
        "calibration_sha256": source_digest(config.calibration),
        "texts": {
            name: ids_digest(text.prompt_BP, text.continuation_BC)
            for name, text in held_out.items()
        },
        "versions": package_versions(),
    }


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What a row comes to: gates, and other weights in some blocks."""

    gates: Gates
    blocks: Blocks
    block_tokens: int = 0

    @property
    def removed(self) -> str:
        """Blocks that each stage has lost, in words; parts of blocks as ``3a`` and ``3m``."""
        stages = []
        for stage in ("prefill", "decode"):
            attention, mlp = self.gates.of(stage)
            names = []
            for layer, (a, m) in enumerate(zip(attention, mlp, strict=True)):
                a = a in ("full", True)
                names += [] if a and m else [str(layer) + ("" if a == m else "m" if a else "a")]
            stages.append(f"{stage} {' '.join(names) or '-'}")
        return "; ".join(stages)


def measure(model: Model, made: RowResult, held_out: dict[str, Batch]) -> dict[str, float]:
    """KL on each held-out text, the whole KV cache sent."""
    variant = Trimmed.whole(swap_pair(Pair.dense(model), made.blocks), made.gates)
    return {
        name: measure_quality(model, {"x": variant}, batch)["x"].kl
        for name, batch in held_out.items()
    }


class Ablation:
    """A model with one seed's calibration text; plans are made once and kept in the folder."""

    def __init__(
        self,
        model: Model,
        config: AblationConfig,
        seed: int,
        folder: Path,
        progress: Progress,
        settings: Settings,
    ) -> None:
        self.model, self.config, self.seed = model, config, seed
        self.folder, self.progress, self.settings = folder, progress, settings

    @cached_property
    def text(self) -> Calibration:
        """Text of the search, of the choices after it, and of repairs and training."""
        return kept_calibration(
            self.model,
            self.config.calibration_of(self.seed),
            self.folder / "text" / f"seed{self.seed}.safetensors",
            progress=self.progress,
        )

    @property
    def budget(self) -> int:
        """Block-tokens of a search."""
        passes = block_tokens(
            Gates.dense(self.model.num_layers),
            sequences=self.config.sequences,
            prefill=self.config.prompt_tokens - 1,
            decode=self.config.continuation_tokens,
        )
        return round(self.config.budget * passes)

    def plan(self, name: str, method: Method, target: Target) -> TrimPlan:
        """A plan, from the folder if it is there."""
        path = self.folder / "plans" / f"{_slug(f'{self.seed} {name}')}.json"
        made_by = {"method": repr(method), "target": asdict(target), **self.settings}
        claim(path.with_name(f"{path.stem}.settings.json"), made_by)
        if path.is_file():
            return TrimPlan.open(path)
        target = replace(target, repair="none")  # repairs are rows of their own
        made = method.plan(self.model, self.text, target, progress=self.progress)
        return made.save(path)

    def searched(self, name: str, method: Method, target: Target) -> RowResult:
        """The row of a plan as it was searched."""
        plan = self.plan(name, method, target).plan
        spent = plan.provenance.search_block_tokens
        return RowResult(gates=plan.gates, blocks={}, block_tokens=spent)

    def repaired(self, name: str, method: Method, target: Target, kind: str) -> RowResult:
        """A plan with its cuts repaired; ``best`` is each stage's best on the re-rank text."""
        gates = self.plan(name, method, target).plan.gates
        trimmed = Trimmed.whole(Pair.dense(self.model), gates)
        if kind == "best":
            best = best_repair(self.model, trimmed, self.text.fit, self.text.rerank)
            return RowResult(gates=gates, blocks=best.blocks)
        (chosen,) = (k for k in (*KINDS["prefill"], *SHARED) if k == kind)
        return RowResult(gates=gates, blocks=repair(self.model, trimmed, self.text.fit, chosen))

    def trained(self, name: str, method: Method, target: Target, reading: Reading) -> RowResult:
        """A plan whose distillation set is merged and lightly distilled."""
        trim = self.plan(name, method, target)
        plan, rule = trim.plan, SetRule(reading=reading)
        if not pairs_of(plan, self.model, self.text.fit, rule):
            return RowResult(gates=plan.gates, blocks={})  # the rule puts nothing in its set
        distillation = DistillConfig(which="pairs", steps=self.config.train_steps, seed=self.seed)
        done = train_plan(
            trim,
            self.model,
            self.text.fit,
            self.text.rerank,
            Training(rule=rule, distillation=distillation),
            progress=self.progress,
        )
        return RowResult(gates=done.gates, blocks=done.blocks)


def rows(ablation: Ablation) -> Iterator[tuple[str, str, Callable[[], RowResult]]]:
    """Group, name and maker of every row."""
    config, seed, budget = ablation.config, ablation.seed, ablation.budget
    half = min(3, config.decode_remove)
    both: dict[str, Any] = {"prefill_remove": half, "decode_remove": config.decode_remove}
    paper = Target(**both, mode="subset", seed=seed, budget=budget)
    rule = f"paper's rule, prefill {half} decode {config.decode_remove}"
    yield rule, "no distillation", lambda: ablation.searched("paper", Paper(), paper)
    readings: tuple[Reading, ...] = ("pairs", "redundancy")
    for reading in readings:

        def train(reading: Reading = reading) -> RowResult:
            return ablation.trained("paper", Paper(), paper, reading)

        yield rule, f"distillation set by {reading}", train
    for mode in ("subset", "projected"):
        target = Target(**both, mode=mode, seed=seed, budget=budget)
        yield (
            f"mode, prefill {half} decode {config.decode_remove}",
            mode,
            _search(ablation, mode, target),
        )
    targets: dict[str, dict[str, Any]] = {
        **{f"prefill {count}": {"prefill_remove": count} for count in config.prefill_remove},
        f"unified {config.unified_remove}": {
            "prefill_remove": config.unified_remove,
            "decode_remove": config.unified_remove,
            "mode": "unified",
        },
        f"decode {config.decode_remove}": {"decode_remove": config.decode_remove},
    }
    for what, removal in targets.items():
        for search in SEARCHES:
            target = Target(**removal, search=search, seed=seed, budget=budget)
            yield f"search, {what}", search, _search(ablation, f"{what} {search}", target)
        hybrid = Target(**removal, search="hybrid", seed=seed, budget=budget)
        stage: Stage = "decode" if what.startswith("decode") else "prefill"
        for kind in (*KINDS[stage][1:], "best"):

            def mend(what: str = what, target: Target = hybrid, kind: str = kind) -> RowResult:
                return ablation.repaired(f"{what} hybrid", PDTrim(), target, kind)

            yield f"repair, {what}", kind, mend
    # prefill's part that is worth its share of whole blocks
    share = config.prefill_remove[0] / ablation.model.num_layers
    for grain in ("block", "part"):
        target = Target(
            metric="flops",
            prefill_share=share,
            grain=grain,
            seed=seed,
            budget=budget,
        )
        yield f"grain, {share:.0%} of prefill's operations", grain, _search(ablation, grain, target)


def _search(ablation: Ablation, name: str, target: Target) -> Callable[[], RowResult]:
    return lambda: ablation.searched(name, PDTrim(), target)


def markdown(cells: list[Cell]) -> str:
    """Mean and standard deviation over seeds, a row a line."""
    texts = list(cells[0].kl) if cells else []
    lines = [
        "| what | row | " + " | ".join(f"KL {text}" for text in texts) + " | cost | seconds |",
        "|---|---|" + "---|" * (len(texts) + 2),
    ]
    for group, name in dict.fromkeys((cell.group, cell.name) for cell in cells):
        of_row = [cell for cell in cells if (cell.group, cell.name) == (group, name)]
        found = [mean_and_deviation([cell.kl[text] for cell in of_row]) for text in texts]
        cost = statistics.mean(cell.block_tokens for cell in of_row) / 1e6
        seconds = statistics.mean(cell.seconds for cell in of_row)
        lines.append(
            f"| {group} | {name} | "
            + " | ".join(found)
            + f" | {f'{cost:.1f} M' if cost else ''} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.mean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


def _slug(text: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
