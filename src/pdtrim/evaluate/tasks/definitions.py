"""Which of lm-eval's task files defines each task, and what pdtrim adds to it.

The prompts, answers, filters and metrics stand in the YAML files that lm-eval installs; nothing of
them is written again here. A source of rows brings them in the columns that those files read.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.errors import PdtrimError


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One of lm-eval's tasks.

    Attributes:
        place: the folder of its YAML file below ``lm_eval/tasks``.
        main: the metric that enters averages.
        shots: solved examples by default.
        subjects: whether lm-eval has a task ``NAME_SUBJECT`` for each subject, and none for all.
    """

    place: str
    main: str = "acc"
    shots: int = 0
    subjects: bool = False


DEFINITIONS: dict[str, Definition] = {
    "mmlu": Definition(place="mmlu/default", subjects=True),
    "cmmlu": Definition(place="cmmlu", subjects=True),
    "piqa": Definition(place="piqa", main="acc_norm"),
    "winogrande": Definition(place="winogrande"),
    "hellaswag": Definition(place="hellaswag", main="acc_norm"),
    "boolq": Definition(place="super_glue/boolq"),
    "arc_easy": Definition(place="arc", main="acc_norm"),
    "arc_challenge": Definition(place="arc", main="acc_norm"),
    "openbookqa": Definition(place="openbookqa", main="acc_norm"),
    "mathqa": Definition(place="mathqa", main="acc_norm"),
    "rte": Definition(place="glue/rte"),
    "wnli": Definition(place="glue/wnli"),
    "cb": Definition(place="super_glue/cb"),
    "sst2": Definition(place="glue/sst2"),
    "gsm8k": Definition(place="gsm8k", main="exact_match", shots=5),
    "lambada_openai": Definition(place="lambada"),
}
"""All tasks but ``wikitext``, which lm-eval has in another form only."""

TASKS = (*DEFINITIONS, "wikitext")

FILTERS = {"flexible-extract": "exact_match_flexible"}
"""Names of metrics behind filters other than a task's first."""


def definition_of(task: str) -> Definition:
    """The definition of a task that lm-eval runs.

    Raises:
        PdtrimError: no such task.
    """
    check_name(task)
    return DEFINITIONS[task]


def check_name(task: str) -> None:
    """Raise :class:`PdtrimError` where there is no such task."""
    if task not in TASKS:
        raise PdtrimError(f"unknown task '{task}': choose from {', '.join(TASKS)}")
