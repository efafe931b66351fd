"""What is compared: methods in settings, all at the same share of the blocks' parameters removed.

The share is of both stages together: what a system removes is the mean of its two stages' shares.

* Setting ``unified``: both stages lose the same, by every method that knows how.
* Setting ``disaggregated``: the stages lose different parts, as each method's ``splits`` say.
  ``even`` removes the share from each, but not the same blocks; ``tilted`` and ``prefill`` take
  more from prefill, the stage that bears it, and less from decode. PDTrim (arXiv 2509.04467) keeps
  prefill's removed set inside decode's, so its split is the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pdtrim.errors import PdtrimError
from pdtrim.methods import METHODS, PDTrim, Target
from pdtrim.methods.baselines import BASELINES
from pdtrim.plan import Mode, PrunePlan

Setting = Literal["unified", "disaggregated"]
SETTINGS: tuple[Setting, ...] = ("unified", "disaggregated")

OPTIONS: dict[str, Any] = {"search": "hybrid", "repair": "best"}
"""Further fields of the target of ``pdtrim`` and of the methods that build on it."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A method in a setting.

    Attributes:
        name: of the row and of its files.
        prefill_share, decode_share: of the blocks' parameters, that each stage is to lose.
        options: further fields of the target.
        trained: its weights were trained; nothing that is planned here is.
        given: plan files by seed, for a system that is not planned here.
    """

    name: str
    method: str
    setting: Setting
    mode: Mode
    prefill_share: float
    decode_share: float
    options: dict[str, Any] = field(default_factory=dict)
    trained: bool = False
    given: dict[int, Path] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        """Whether it is a method of the literature, planned here and not trained."""
        return not self.given and METHODS.get(self.method) in BASELINES

    def target(self, seed: int, recall: float = 0.0) -> Target:
        """What its plans must meet, and what recall weighs."""
        return Target(
            metric="parameters",
            prefill_share=self.prefill_share,
            decode_share=self.decode_share,
            mode=self.mode,
            seed=seed,
            recall=recall,
            **self.options,
        )


def chosen_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods of some names, of ``all`` or of ``none``; always in the library's order.

    Raises:
        PdtrimError: an unknown name.
    """
    if tuple(names) == ("all",):
        return tuple(METHODS)
    if tuple(names) == ("none",):
        return ()
    for name in sorted(set(names) - METHODS.keys()):
        known = ", ".join(METHODS)
        raise PdtrimError(f"unknown method '{name}': use all, none, or some of {known}")
    return tuple(name for name in METHODS if name in names)


def planned_systems(methods: Sequence[str], remove: float) -> list[System]:
    """The systems of some methods at a mean share, unified ones first.

    Raises:
        PdtrimError: a share that is not between 0 and 1.
    """
    if not 0 < remove < 1:
        raise PdtrimError(f"--remove {remove}: give a share between 0 and 1")
    systems = [
        System(
            name=method,
            method=method,
            setting="unified",
            mode="unified",
            prefill_share=remove,
            decode_share=remove,
            options=_options(method),
        )
        for method in methods
        if "unified" in METHODS[method].modes
    ]
    for method in methods:
        systems += [
            System(
                name=method + split.name,
                method=method,
                setting="disaggregated",
                mode=split.mode,
                prefill_share=split.prefill * remove,
                decode_share=split.decode * remove,
                options=_options(method),
            )
            for split in METHODS[method].splits
            if max(split.prefill, split.decode) * remove < split.below
        ]
    return systems


def _options(method: str) -> dict[str, Any]:
    return OPTIONS if issubclass(METHODS[method], PDTrim) else {}


def given_systems(rows: Sequence[tuple[str, Path]]) -> list[System]:
    """Systems of plan files that are there, by name; one name may have a plan of each seed.

    Their shares are not known before they are measured, and stand as 0.

    Raises:
        PdtrimError: unreadable plans, or plans of one name that are of one seed or differ in kind.
    """
    plans: dict[str, dict[int, Path]] = {}
    kinds: dict[str, tuple[str, Mode, bool]] = {}
    for name, path in rows:
        provenance = PrunePlan.load(path).provenance
        kind = provenance.method, provenance.mode, provenance.distillation != "none"
        if kinds.setdefault(name, kind) != kind:
            raise PdtrimError(f"--row {name}: plans of different kinds need a name each")
        if provenance.seed in plans.setdefault(name, {}):
            raise PdtrimError(f"--row {name}: two plans of seed {provenance.seed} need a name each")
        plans[name][provenance.seed] = path
    return [
        System(
            name=name,
            method=method,
            setting="unified" if mode == "unified" else "disaggregated",
            mode=mode,
            prefill_share=0.0,
            decode_share=0.0,
            trained=trained,
            given=plans[name],
        )
        for name, (method, mode, trained) in kinds.items()
    ]
