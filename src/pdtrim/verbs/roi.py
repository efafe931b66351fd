"""What a pruned pair is worth beside the dense model: what ``pdtrim roi`` does."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim.errors import PdtrimError

if TYPE_CHECKING:
    from pdtrim.cost.fleet import Fleet
    from pdtrim.cost.load import Load
    from pdtrim.cost.pair import PairCost
    from pdtrim.cost.service import Service
    from pdtrim.cost.worth import Side

SENSITIVITY = 0.25


@dataclass(frozen=True, kw_only=True)
class RoiConfig:
    """A load, its targets, and prices.

    Attributes:
        system: the GPU, by the name in the stage times, such as h100_sxm.
        isl: tokens of a prompt; or give a trace.
        osl: tokens of an answer; or give a trace.
        trace: JSONL of lengths, prompt_tokens and output_tokens a line, in place of isl and osl.
        rate: requests a second; of the trace if it has arrival_s and no rate is given.
        ttft: most seconds to the first token, at the quantile.
        tpot: most seconds a token after the first.
        quantile: the share of requests that must meet the ttft.
        link_gbit_s: speed of each prefill server's link to decode, in Gbit/s.
        gpu_hour: price of a GPU for an hour, in your currency.
        overlap: share of a handover that is hidden behind its prefill; vLLM's pull hides none.
        page_tokens: tokens of a page; vLLM's default is 16.
        page_us: microseconds that decode takes to post one page of a layer that travels raw.
        memory_use: share of a GPU's memory for weights and cache; 0.9 is vLLM's default.
        work_cost: price of the work to prune; the plan's search at gpu_hour if not given.
        gpu_watts: power that one GPU draws, for energy; none is reported if not given.
        stages: stage times, as FILE, a kept name such as llama-3.1-8b, or aiconfigurator:MODEL;
            the kept ones of the system and the plan's shape if not given.
        codecs: outputs of bench-codec, with commas; those that come with pdtrim if not given.
        kv_bytes_per_token: bytes that the pair sends for each prompt token, where you know.
        seed: of the simulated arrivals.
    """

    system: str = "h100_sxm"
    isl: int | None = None
    osl: int | None = None
    trace: str | None = None
    rate: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    quantile: float = 0.95
    link_gbit_s: float | None = None
    gpu_hour: float | None = None
    overlap: float = 0.0
    page_tokens: int = 16
    page_us: float = 0.0
    memory_use: float = 0.9
    work_cost: float | None = None
    gpu_watts: float | None = None
    stages: str | None = None
    codecs: tuple[str, ...] = ()
    kv_bytes_per_token: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what is missing or out of range.

        Raises:
            PdtrimError: naming the first such option.
        """
        from pdtrim.cost.load import need_positive

        need_positive(
            isl=self.isl, osl=self.osl, rate=self.rate, ttft=self.ttft, tpot=self.tpot,
            link_gbit_s=self.link_gbit_s, gpu_hour=self.gpu_hour, gpu_watts=self.gpu_watts,
            kv_bytes_per_token=self.kv_bytes_per_token, page_tokens=self.page_tokens,
        )  # fmt: skip
        for name in ("ttft", "tpot", "link_gbit_s", "gpu_hour"):
            if getattr(self, name) is None:
                raise PdtrimError(f"give --{name.replace('_', '-')}: nothing stands in for it")
        if (self.trace is None) == (self.isl is None) or (self.isl is None) != (self.osl is None):
            raise PdtrimError("give either --isl and --osl, or --trace")
        for name, low in (("overlap", self.overlap >= 0), ("quantile", self.quantile > 0)):
            if not low or getattr(self, name) > 1:
                raise PdtrimError(f"--{name} {getattr(self, name):g}: give a share up to 1")
        if not 0 < self.memory_use <= 1:
            raise PdtrimError(f"--memory-use {self.memory_use:g}: give a share up to 1")
        for name in ("work_cost", "page_us"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                option = f"--{name.replace('_', '-')} {value:g}"
                raise PdtrimError(f"{option}: give a number of 0 or more")

    def load(self) -> Load:
        """The requests.

        Raises:
            PdtrimError: an unreadable trace, or no rate.
        """
        from pdtrim.cost.load import Load, read_trace

        if self.trace is not None:
            made = read_trace(self.trace, self.rate)
        else:
            assert self.isl is not None and self.osl is not None
            made = Load(
                prompts=(self.isl,), answers=(self.osl,), rate=self.rate, source="--isl, --osl"
            )
        if made.rate is None:
            raise PdtrimError("give --rate, in requests a second: nothing stands in for it")
        return made


def estimate_roi(pair: str | Path, config: RoiConfig) -> dict[str, Any]:
    """The dense fleet beside the pruned one, for the same load and targets.

    Args:
        pair: a plan file, or an exported pair's folder.

    Returns:
        Plain data: ``inputs``, ``options`` (what else was set), ``sources``, ``dense`` and
        ``pruned`` (seconds, bytes, GPUs, money a year), ``saving`` with its break-even, and
        ``sensitivity``, the yearly saving with each input a quarter lower and higher.

    Raises:
        PdtrimError: an unreadable file, a missing number, or something that is not measured.
    """
    from pdtrim.cost import worth
    from pdtrim.cost.pair import PairCost, read_pair

    config.check()
    load, cost = config.load(), read_pair(pair)
    service = _service(cost, config)
    dense = replace(service, pair=PairCost.dense(cost.layers))
    dense = replace(dense, link=replace(service.link, bytes_per_token=None))
    gpu_hour = config.gpu_hour
    assert gpu_hour is not None and load.rate is not None
    services = {"dense": dense, "pruned": service}
    sides = {name: _side(one, load, config) for name, one in services.items()}

    def saving(inputs: dict[str, float]) -> float | None:
        return _saving(dense, service, load, config, inputs)

    inputs = {
        "isl": load.mean_prompt,
        "osl": load.mean_answer,
        "rate": load.rate,
        "ttft": config.ttft,
        "tpot": config.tpot,
        "link_gbit_s": config.link_gbit_s,
        "gpu_hour": gpu_hour,
    }
    known = {name: float(value) for name, value in inputs.items() if value is not None}
    a_year = worth.saving_a_year(sides["dense"], sides["pruned"], gpu_hour)
    searched = cost.search_s / 3600 * gpu_hour
    work = searched if config.work_cost is None else config.work_cost
    return {
        "pair": str(pair),
        "system": config.system,
        "inputs": known,
        "options": _options(config, known),
        "sources": _sources(service, load, config),
        **{name: one.to_json(gpu_hour, config.gpu_watts) for name, one in sides.items()},
        "saving": {
            "gpus": _difference(sides["dense"].fleet, sides["pruned"].fleet),
            "money_a_year": a_year,
            "work_cost": work,
            "break_even_hours": worth.break_even_hours(work, a_year),
        },
        "sensitivity": worth.sensitivity(known, SENSITIVITY, saving),
    }


def _service(cost: PairCost, config: RoiConfig) -> Service:
    from pdtrim.cost.kept import codec_files, stage_times
    from pdtrim.cost.service import Link, Service

    assert config.link_gbit_s is not None
    return Service(
        pair=cost,
        times=stage_times(config.stages, config.system, cost),
        link=Link(
            gbit_s=config.link_gbit_s,
            overlap=config.overlap,
            bytes_per_token=config.kv_bytes_per_token,
            page_tokens=config.page_tokens,
            page_s=config.page_us / 1e6,
        ),
        codecs=codec_files(config.codecs, config.system),
    )


def _side(service: Service, load: Load, config: RoiConfig) -> Side:
    """The smallest fleet for a load and targets, or why there is none."""
    from pdtrim.cost.fleet import Targets, size_fleet
    from pdtrim.cost.worth import side

    assert config.ttft is not None and config.tpot is not None
    targets = Targets(
        ttft=config.ttft,
        tpot=config.tpot,
        quantile=config.quantile,
        memory_use=config.memory_use,
    )
    return side(lambda: size_fleet(service, load, targets, seed=config.seed))


def _saving(
    dense: Service, pruned: Service, load: Load, config: RoiConfig, inputs: dict[str, float]
) -> float | None:
    """Money a year that is saved with other inputs; None if a fleet misses its targets."""
    from pdtrim.cost.worth import saving_a_year

    changed = replace(config, ttft=inputs["ttft"], tpot=inputs["tpot"])
    before, after = (
        _side(
            replace(one, link=replace(one.link, gbit_s=inputs["link_gbit_s"])),
            _scaled(load, inputs),
            changed,
        )
        for one in (dense, pruned)
    )
    return saving_a_year(before, after, inputs["gpu_hour"])


def _scaled(load: Load, inputs: dict[str, float]) -> Load:
    """The load with other mean lengths and another rate."""
    prompt, answer = inputs["isl"] / load.mean_prompt, inputs["osl"] / load.mean_answer
    return replace(
        load,
        prompts=tuple(max(1, round(n * prompt)) for n in load.prompts),
        answers=tuple(max(1, round(n * answer)) for n in load.answers),
        rate=inputs["rate"],
    )


def _options(config: RoiConfig, inputs: dict[str, float]) -> dict[str, Any]:
    """What was set beside the pair, the system, the trace and the inputs."""
    said = {*inputs, "system", "trace"}
    values = {f.name: (getattr(config, f.name), f.default) for f in fields(config)}
    return {name: v for name, (v, usual) in values.items() if name not in said and v != usual}


def _difference(dense: Fleet | None, pruned: Fleet | None) -> int | None:
    return None if dense is None or pruned is None else dense.gpus - pruned.gpus


def _sources(service: Service, load: Load, config: RoiConfig) -> dict[str, str]:
    """Where each kind of number is from."""
    moved = service.handover(load.mean_prompt)
    fleet = f"simulated arrivals ({config.quantile:.0%} within --ttft, seed {config.seed})"
    layers = service.times.model.layers
    work = "--work-cost" if config.work_cost is not None else "the plan's search time x --gpu-hour"
    return {
        "stage times": service.times.source,
        "pruned stage times": f"formula: the measured parts of the layers it runs, of {layers}",
        "lengths": load.source,
        "rate": "--rate" if config.rate is not None else load.source,
        "codecs": "; ".join(moved.sources) or "none: raw cache",
        "link": "formula: bytes / --link-gbit-s, and pages x --page-us",
        "GPUs": fleet,
        "batch": f"formula: most within --tpot and {config.memory_use:.0%} of the GPU's memory",
        "money": "formula: GPUs x 8760 h x --gpu-hour",
        "energy": "none: give --gpu-watts"
        if config.gpu_watts is None
        else "formula: GPUs x 8760 h x --gpu-watts, whatever they do",
        "work": work,
    }
