"""Search which blocks each stage can lose: what ``pdtrim plan`` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pdtrim.errors import PdtrimError
from pdtrim.progress import Progress, silent
from pdtrim.verbs.model import dense_model
from pdtrim.words import RECALL, Grain, Metric, Mode, Repair, Search

if TYPE_CHECKING:
    from pdtrim.bundle import TrimPlan
    from pdtrim.calibration.batches import CalibrationConfig
    from pdtrim.methods import Target
    from pdtrim.models.model import Model


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How to prune.

    Attributes:
        method: the method that plans, as pdtrim, paper (as reconstructed), or a baseline; if not
            given, wanda-sp+pdtrim where both stages lose parameters by block, else pdtrim.
        mode: how the stages' removed blocks relate; the method's own if not given.
        prefill_remove: blocks that prefill loses, or a share of them such as 0.25.
        decode_remove: blocks that decode loses, or a share of them.
        metric: what is removed; with all but blocks, both counts are shares.
        grain: whether whole blocks go (block), or attention and MLP apart (part).
        search: how method pdtrim searches.
        repair: whether kept blocks are corrected for what was cut, in closed form (best), or not
            (none). The method's own if not given: best for pdtrim and its hybrids.
        kv: what travels, as SELECTOR[:option=value,...][+CODEC], such as snapkv:share=0.5+int4.
        kv_compression: instead of a KV policy, full bytes over bytes sent, mixed by measured KL.
        kv_bytes_per_token: instead of a KV policy, the bytes sent for each prompt token.
        handover_ms: instead of a KV policy, the milliseconds that a calibration prompt may take
            over the link.
        link_gbit_s: speed of the link in Gbit/s; codecs that do not shorten the handover at the
            speeds measured here, beside prefill, are left out.
        calibration: calibration text, as self, FILE.txt, FILE.jsonl[.gz], or
            hub:NAME[:SPLIT[:FIELD]].
        prompt_tokens: tokens of each calibration prompt.
        continuation_tokens: tokens of each calibration continuation.
        sequences: calibration sequences that steer the search; half as many choose among its
            finalists and their repairs.
        fit_sequences: further calibration sequences that repairs are fitted to; 0 fits them to
            those that steer.
        recall: weight of recall beside KL in what pdtrim and its hybrids minimise; 0 leaves it out.
        budget: block-tokens that the search may spend; the method's own effort if not given.
        minutes: how long search and repairs may take; the best found so far is kept.
        block_size: tokens in a page of the decode engine.
        seed: seed of the calibration text and of the search.
    """

    method: str | None = None
    mode: Mode | None = None
    prefill_remove: float = 0.25
    decode_remove: float = 0
    metric: Metric = "blocks"
    grain: Grain = "block"
    search: Search = "hybrid"
    repair: Repair | None = None
    kv: str = "full"
    kv_compression: float | None = None
    kv_bytes_per_token: float | None = None
    handover_ms: float | None = None
    link_gbit_s: float | None = None
    calibration: str = "self"
    prompt_tokens: int = 256
    continuation_tokens: int = 128
    sequences: int = 12
    fit_sequences: int = 24
    recall: float = RECALL
    budget: int | None = None
    minutes: float | None = None
    block_size: int = 1
    seed: int = 0

    def check(self) -> None:
        """Refuse what no model could be planned with, before one is loaded.

        Raises:
            PdtrimError: an unknown method or mode, or a KV policy that does not parse.
        """
        from pdtrim.kvfit.policy import parse_policy
        from pdtrim.methods import METHODS

        if self.mode not in (None, *get_args(Mode)):
            words = ", ".join(get_args(Mode))
            raise PdtrimError(f"unknown mode '{self.mode}': use one of {words}")
        if self.chosen_method not in METHODS:
            raise PdtrimError(f"unknown method '{self.method}': use one of {', '.join(METHODS)}")
        parse_policy(self.kv)

    @property
    def chosen_method(self) -> str:
        """The method that is asked for, or the one that keeps most.

        What both stages lose costs least in narrower blocks (``benchmarks/compare_qwen_202611``).
        A selector that numbers a layer's heads needs all of them.
        """
        from pdtrim.kv.selectors import SELECTORS
        from pdtrim.kvfit.policy import parse_policy
        from pdtrim.kvfit.request import KVRequest

        if self.method is not None:
            return self.method
        both = self.prefill_remove > 0 and self.decode_remove > 0
        narrow = both and self.metric == "parameters" and self.grain == "block"
        kv = parse_policy(self.kv)
        whole = isinstance(kv, KVRequest) and SELECTORS[kv.selector].numbers_heads
        return "wanda-sp+pdtrim" if narrow and not whole else "pdtrim"

    def text(self) -> CalibrationConfig:
        """The calibration text: repairs have a part of their own where the method repairs."""
        from pdtrim.calibration.batches import CalibrationConfig
        from pdtrim.methods import METHODS

        repair = self.repair or METHODS[self.chosen_method].default_repair
        return CalibrationConfig(
            source=self.calibration,
            prompt_tokens=self.prompt_tokens,
            continuation_tokens=self.continuation_tokens,
            search=self.sequences,
            rerank=(self.sequences + 1) // 2,
            fit=self.fit_sequences if repair == "best" else 0,
            seed=self.seed,
        )

    def removal(self, blocks: int) -> dict[str, Any]:
        """The target's counts of a model's blocks, or its shares."""
        if self.metric != "blocks":
            return {"prefill_share": self.prefill_remove, "decode_share": self.decode_remove}
        return {
            name: _count(getattr(self, name), blocks, name)
            for name in ("prefill_remove", "decode_remove")
        }


def make_plan(
    model: Model | str,
    config: PlanConfig = PlanConfig(),
    output: str | Path | None = None,
    *,
    resume: bool = False,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> TrimPlan:
    """Search which blocks each stage can lose.

    Args:
        model: the dense model, or its name, which is loaded with ``dtype`` to ``device``.
        output: the plan file to write. The search's text and journal stand beside it while it
            runs, and stay if it is interrupted. None keeps the plan in memory.
        resume: go on with a search that was interrupted.
        say: takes a line for people.

    Returns:
        The plan with its weights.

    Raises:
        PdtrimError: an unknown word, text that cannot be read, counts or shares that no plan can
            meet, or a place that holds something else.
    """
    from pdtrim.calibration.batches import load_calibration
    from pdtrim.keep.folder import output_file
    from pdtrim.methods import METHODS
    from pdtrim.verbs.work import Work

    config.check()
    method, text = METHODS[config.chosen_method](), config.text()
    if output is None:
        dense = dense_model(model, dtype=dtype, device=device, progress=progress)
        target = _target(dense, config, progress)
        packed = load_calibration(dense, text, progress=progress)
        return method.plan(dense, packed, target, progress=progress, say=say)
    output = Path(output)
    with output_file(output):
        work = Work(output.with_name(f"{output.stem}.search"), resume=resume, say=say)
        dense = dense_model(model, dtype=dtype, device=device, progress=progress)
        target = _target(dense, config, progress)
        with work:
            packed = work.text(dense, text, progress)
            made = method.plan(
                dense, packed, target, progress=progress, journal=work.journal, say=say
            )
            return made.save(output)


def _target(model: Model, config: PlanConfig, progress: Progress) -> Target:
    """What the method is asked, its KV policy chosen by what is known of the link."""
    from pdtrim.bench.machine import measure_machine
    from pdtrim.kvfit.link import LinkBudget
    from pdtrim.kvfit.policy import parse_policy
    from pdtrim.methods import METHODS, Target

    machine = None
    if config.link_gbit_s is not None:
        with progress("timing prefill and the codecs", 1):
            machine = measure_machine(model, config.prompt_tokens)
    kv = LinkBudget(
        compression=config.kv_compression,
        bytes_per_token=config.kv_bytes_per_token,
        handover_ms=config.handover_ms,
        link_gbit_s=config.link_gbit_s,
    ).policy(model, parse_policy(config.kv), config.prompt_tokens, machine=machine)
    target = Target(
        **config.removal(model.num_layers),
        metric=config.metric,
        grain=config.grain,
        search=config.search,
        repair=config.repair,
        mode=config.mode or METHODS[config.chosen_method].default_mode,
        kv=kv,
        seed=config.seed,
        block_size=config.block_size,
        budget=config.budget,
        recall=config.recall,
        minutes=config.minutes,
    )
    target.check(model)
    return target


def _count(number: float, blocks: int, name: str) -> int:
    """``8`` blocks or a share such as ``0.25`` of all."""
    if 0 < number < 1:
        return round(number * blocks)
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise PdtrimError(f"{name} {number:g}: give a whole number of blocks or a share 0 .. 1")
    return int(number)
