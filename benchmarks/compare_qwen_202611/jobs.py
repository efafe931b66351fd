"""What the page consists of, in the order of what it is worth."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from queueing import Job

from pdtrim.evaluate.compare.systems import planned_systems
from pdtrim.methods import METHODS

HERE = Path(__file__).resolve().parent
TRAIN_PREFILL = HERE.parent / "train_prefill" / "run.py"
TASKS = (
    "mmlu,cmmlu,piqa,winogrande,hellaswag,boolq,arc_easy,arc_challenge,openbookqa,mathqa,rte,wnli,"
    "cb,sst2,lambada_openai,wikitext"
)
SEEDS = "0,1"
FIRST = (
    "wanda-sp+pdtrim-tilted",
    "wanda-sp",
    "pdtrim-tilted",
    "pdtrim-prefill",
    "flap+pdtrim-tilted",
    "paper",
    "flap",
    "shortgpt",
    "pdtrim",
    "pdtrim-even",
    "sleb",
    "evopress",
    "uidl",
    "shortened-taylor",
    "shortened-ppl",
    "llm-pruner",
    "flap+pdtrim",
    "llm-pruner+pdtrim-tilted",
)
"""Systems in the order in which they run; the others follow, ``LAST`` behind all."""
LAST = ("blockpruner",)  # the longest search
OURS, GRADIENTS, OTHERS = 24.0, 24.0, 14.0  # GB, at 32 sequences of a model of 1.5B parameters
SCORING, PLANNING, TRAINING, SOLVING = 12.0, 24.0, 40.0, 24.0
SOLVED_TOGETHER = 65536  # tokens of gsm8k that run together
ASKED = ("wanda-sp+pdtrim-tilted", "wanda-sp", "pdtrim-tilted", "pdtrim-prefill", "flap", "paper")
"""Systems that retrieval is asked of, beside the dense model and the prefills."""
TIMED = (
    "pdtrim",
    "pdtrim-tilted",
    "pdtrim-prefill",
    "flap",
    "shortgpt",
    "paper",
    "wanda-sp",
    "wanda-sp+pdtrim-tilted",
)
PREFILL_ROWS = (
    *("--rows", "32", "--accumulate", "1", "--learning-rate", "5e-4"),
    *("--prompt-tokens", "128", "--continuation-tokens", "65"),  # three letters a row
)
PREFILL_KV = ("--stage", "prefill", "--train", "kv", *PREFILL_ROWS)
DECODE_ALL = (
    *("--blocks", "all", "--merge", "none", "--rows", "16", "--accumulate", "2"),
    *("--prompt-tokens", "256", "--continuation-tokens", "256", "--learning-rate", "1e-4"),
)
"""Options of ``distill``."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asks for; see ``run.py``."""

    model: str
    data: Path
    out: Path
    tasks: str
    sequences: int
    length: int
    limit: int
    solved: int
    probes: int
    minutes: float
    third: int
    half: int
    batch_tokens: int
    device: str
    scale: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """The fields of the same names."""
        own = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        own["tasks"] = own["tasks"] or TASKS
        return cls(**own)

    def compare(self, share: str, *options: str) -> list[str]:
        """``pdtrim compare`` at a share, without times."""
        return [
            *("compare", self.model, "--remove", f"0.{share}", "--methods", "all"),
            *("--tasks", self.tasks, "--data", str(self.data), "--limit", str(self.limit)),
            *("--seeds", SEEDS, *self.calibration()),
            *("--batch-tokens", str(self.batch_tokens), "--device", self.device),
            *("-o", str(self.out / share), *options),
        ]

    def calibration(self) -> tuple[str, ...]:
        """Text of C4's training part."""
        return (
            *("--calibration", str(self.data / "c4" / "train.jsonl")),
            *("--sequences", str(self.sequences)),
            *("--prompt-tokens", str(self.length), "--continuation-tokens", str(self.length)),
        )

    def cells(self, share: str, name: str) -> tuple[Path, ...]:
        """The files of all of a system's tasks; ``_pair.json`` comes last."""
        folder = self.out / share / "cells" / name
        return (*(folder / f"{task}.json" for task in self.tasks.split(",")), folder / "_pair.json")

    def text(self, share: str) -> tuple[Path, ...]:
        """The calibration texts of a comparison."""
        return tuple(self.out / share / "text" / f"seed{s}.safetensors" for s in SEEDS.split(","))


def all_jobs(settings: Settings) -> list[Job]:
    """All jobs; each begins when what it needs is there and memory is free."""
    first, again = systems(settings, "20", 0), systems(settings, "20", 1)
    third, half = prefill(settings, "third"), prefill(settings, "half")
    return [
        dense(settings, "20"),
        third[0],
        half[0],
        *first[:5],
        *third[1:],
        *half[1:],
        *trained(settings, "pdtrim-prefill", *PREFILL_KV),
        retrieval(settings, "prefill", ("dense", "third", "third-trained")),
        retrieval(settings, "half", ("half", "half-trained")),
        *solving(settings),
        kv_policies(settings),
        *parts(settings),
        *again[:5],
        *first[5:],
        retrieval(settings, "20", ASKED),
        dense(settings, "33"),
        *systems(settings, "33", 0),
        *again[5:],
        *trained(settings, "pdtrim-tilted", *DECODE_ALL),
        *times(settings),
    ]


def dense(settings: Settings, share: str) -> Job:
    """The calibration texts, then the dense model."""
    return Job(
        name=f"{share}-dense",
        group=f"dense {share}",
        command=settings.compare(share, "--only", "dense", "--no-latency"),
        gigabytes=SCORING * settings.scale,
        makes=settings.cells(share, "dense")[:-1],
    )


def systems(settings: Settings, share: str, seed: int) -> list[Job]:
    """A system a job: its plan, then its tasks."""
    listed = {s.name: s for s in planned_systems(tuple(METHODS), float(f"0.{share}"))}
    middle = [name for name in listed if name not in (*FIRST, *LAST)]
    jobs = []
    for name in (n for n in (*FIRST, *middle, *LAST) if n in listed):
        method = listed[name].method
        size = OURS if "pdtrim" in method else OTHERS
        if "llm-pruner" in method or "taylor" in method:
            size = GRADIENTS
        jobs.append(
            Job(
                name=f"{share}-{name}-seed{seed}",
                group=f"{share} seed {seed}",
                command=settings.compare(share, "--only", f"{name}-seed{seed}", "--no-latency"),
                gigabytes=size * settings.scale,
                needs=settings.text(share),
                makes=settings.cells(share, f"{name}-seed{seed}"),
            )
        )
    return jobs


def prefill(settings: Settings, name: str) -> list[Job]:
    """A prefill without a third or half of its blocks: searched, repaired, trained, measured."""
    out = settings.out / name
    count = getattr(settings, name)
    script = [
        *(str(TRAIN_PREFILL), "--model", settings.model, "--data", str(settings.data)),
        *("--out", str(out), "--remove", str(count), "--train", "kv"),
        *("--minutes", str(settings.minutes), "--sequences", str(32 * settings.sequences)),
        *PREFILL_ROWS,
        *("--limit", str(settings.limit), "--device", settings.device),
    ]
    plans = {name: out / "repaired.json", f"{name}-trained": out / "trained-kv.json"}
    job = Job(
        name=name,
        group="prefill",
        command=script,
        gigabytes=PLANNING * settings.scale,
        makes=(*plans.values(), out / "table.md"),
    )
    return [job, *(row(settings, "20", label, plan) for label, plan in plans.items())]


def parts(settings: Settings) -> list[Job]:
    """Attention and MLP removed apart: the stages tilted at 20 %, and prefill without a third."""
    jobs = []
    for name, prefill, decode in (("tilted-parts", 0.3, 0.1), ("third-parts", 0.3, 0.0)):
        plan = settings.out / "parts" / f"{name}.json"
        command = [
            *("plan", settings.model, "-o", str(plan), "--grain", "part"),
            *("--metric", "parameters", "--prefill-remove", str(prefill)),
            *("--decode-remove", str(decode), *settings.calibration()),
            *("--device", settings.device),
        ]
        jobs.append(
            Job(
                name=name,
                group="parts",
                command=command,
                gigabytes=PLANNING * settings.scale,
                makes=(plan,),
            )
        )
        jobs.append(row(settings, "20", name, plan))
    return jobs


def row(settings: Settings, share: str, name: str, plan: Path) -> Job:
    """The tasks of a plan file."""
    return Job(
        name=f"{share}-{name}",
        group="rows",
        command=settings.compare(share, "--row", f"{name}={plan}", "--only", name, "--no-latency"),
        gigabytes=SCORING * settings.scale,
        needs=(plan, *settings.text(share)),
        makes=settings.cells(share, f"{name}-seed0"),
    )


def plan_of(settings: Settings, name: str) -> Path:
    """The plan file of a system at 20 %, or of a prefill."""
    for kind in ("third", "half"):
        if name.removesuffix("-trained") == kind:
            file = "trained-kv.json" if name.endswith("-trained") else "repaired.json"
            return settings.out / kind / file
    return settings.out / "20" / "plans" / f"{name}-seed0.json"


def retrieval(settings: Settings, name: str, of: tuple[str, ...]) -> Job:
    """What decode retrieves from prompts."""
    plans = {one: plan_of(settings, one) for one in of if one != "dense"}
    out = settings.out / "retrieval"
    return Job(
        name=f"retrieval-{name}",
        group="retrieval",
        command=[
            *(str(HERE / "retrieval.py"), "--model", settings.model, "--out", str(out)),
            *("--probes", str(settings.probes), "--device", settings.device),
            *(f"{one}={plans[one]}" if one in plans else one for one in of),
        ],
        gigabytes=SCORING * settings.scale,
        needs=tuple(plans.values()),
        makes=tuple(out / f"{one}.json" for one in of),
    )


def solving(settings: Settings) -> list[Job]:
    """GSM8K, in a folder of its own: other batches, so other cells."""
    names = ("third", "third-trained", "half-trained", "wanda-sp+pdtrim-tilted", "wanda-sp")
    out = settings.out / "gsm8k"

    def job(name: str, options: tuple[str, ...], needs: tuple[Path, ...]) -> Job:
        cell = "dense" if name == "dense" else f"{name}-seed0"
        command = [
            *("compare", settings.model, "--methods", "none", "--tasks", "gsm8k"),
            *("--data", str(settings.data), "--limit", str(settings.solved)),
            *(*settings.calibration(), "--batch-tokens", str(SOLVED_TOGETHER)),
            *("--device", settings.device, "-o", str(out), "--only", name, "--no-latency"),
        ]
        return Job(
            name=f"gsm8k-{name}",
            group="gsm8k",
            command=[*command, *options],
            gigabytes=SOLVING * settings.scale,
            needs=needs,
            makes=(out / "cells" / cell / "gsm8k.json",),
        )

    text = out / "text" / "seed0.safetensors"
    return [
        job("dense", (), ()),
        *(
            job(name, ("--row", f"{name}={plan}"), (plan, text))
            for name, plan in ((name, plan_of(settings, name)) for name in names)
        ),
    ]


def trained(settings: Settings, name: str, *options: str) -> list[Job]:
    """A system's first plan, trained."""
    plan, made = plan_of(settings, name), settings.out / "trained" / f"{name}.json"
    job = Job(
        name=f"train-{name}",
        group="trained",
        command=[
            *("distill", str(plan), "-o", str(made), "--model", settings.model),
            *("--text", str(settings.data / "c4" / "train.jsonl")),
            *("--sequences", str(32 * settings.sequences), "--held-out", "8"),
            *("--steps", "200", "--minutes", str(settings.minutes)),
            *("--device", settings.device, *options),
        ],
        gigabytes=TRAINING * settings.scale,
        needs=(plan,),
        makes=(made,),
    )
    return [job, row(settings, "20", f"{name}-trained", made)]


def kv_policies(settings: Settings) -> Job:
    """Quality against bytes for all KV policies, budgets at 5 and 8 times among them."""
    out = settings.out / "kv"
    return Job(
        name="kv-sweep",
        group="kv",
        command=[
            *("kv-sweep", settings.model, "--text", str(settings.data / "wikitext2/valid.jsonl")),
            *("--calibration", str(settings.data / "c4" / "train.jsonl")),
            *("--limit", "16", "--probes", "50", "--device", settings.device, "-o", str(out)),
        ],
        gigabytes=PLANNING * settings.scale,
        makes=(out / "result.json",),
    )


def times(settings: Settings) -> list[Job]:
    """Both stages' times at 20 %, one system at a time on a GPU."""
    cells = settings.out / "20" / "cells"
    return [
        Job(
            name=f"times-{name}",
            group="times",
            command=settings.compare("20", "--only", f"{name}-seed0"),
            gigabytes=0.0,
            needs=settings.cells("20", f"{name}-seed0"),
            makes=(cells / f"{name}-seed0" / "_latency.json",),
            alone=True,
        )
        for name in TIMED
    ]
