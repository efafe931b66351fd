"""Whether pruning would help a fleet, and where: what ``pdtrim assess`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pdtrim.errors import PdtrimError

if TYPE_CHECKING:
    from pdtrim.cost.assess import Request
    from pdtrim.cost.load import Load
    from pdtrim.cost.metrics import Seen
    from pdtrim.cost.service import Service


@dataclass(frozen=True, kw_only=True)
class AssessConfig:
    """What is known of a fleet beside its metrics or its trace.

    Attributes:
        system: the GPU, by the name in the stage times, such as h100_sxm.
        stages: stage times of the model, as FILE, a kept name such as llama-3.1-8b, or
            aiconfigurator:MODEL; a trace needs them.
        link_gbit_s: speed of each prefill server's link; of metrics, what the handovers reached if
            not given.
        rate: requests a second, for the queue of a trace; the trace's own if it has arrival_s.
        ttft: most seconds to the first token; with a rate, a trace's queue is that of the smallest
            fleet that meets it.
        tpot: most seconds a token after the first; a trace needs it.
        quantile: the share of requests that must meet the ttft.
        memory_use: share of a GPU's memory for weights and cache; 0.9 is vLLM's default.
        prefill_remove: the share of prefill's blocks that is thought of.
        worth: the share of a request's time, or of GPU time, that a change must save to be advised.
        codecs: outputs of bench-codec, with commas; those that come with pdtrim if not given.
        model: the model's name in the advised command.
    """

    system: str = "h100_sxm"
    stages: str | None = None
    link_gbit_s: float | None = None
    rate: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    quantile: float = 0.95
    memory_use: float = 0.9
    prefill_remove: float = 0.25
    worth: float = 0.1
    codecs: tuple[str, ...] = ()
    model: str | None = None

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            PdtrimError: naming the first such option.
        """
        from pdtrim.cost.load import need_positive

        need_positive(link_gbit_s=self.link_gbit_s, rate=self.rate, ttft=self.ttft, tpot=self.tpot)
        for name in ("quantile", "memory_use", "prefill_remove", "worth"):
            if not 0 < getattr(self, name) <= 1:
                option = f"--{name.replace('_', '-')} {getattr(self, name):g}"
                raise PdtrimError(f"{option}: give a share above 0, up to 1")


def assess(
    config: AssessConfig = AssessConfig(),
    *,
    metrics: Sequence[str] = (),
    trace: str | None = None,
) -> dict[str, Any]:
    """Where a request's time goes, and whether to prune.

    Args:
        metrics: Prometheus text of each server of a vLLM pair, as files or loopback URLs.
        trace: a JSONL file of lengths, in place of metrics.

    Returns:
        Plain data: ``parts`` with seconds, share and source, ``levers`` with what each could save,
        ``advice``, whose last line is a command unless it says not to prune, and ``sources``.

    Raises:
        PdtrimError: both or neither, an unreadable file, or a number that is missing.
    """
    from pdtrim.cost.assess import advice, levers
    from pdtrim.cost.kept import codec_files

    config.check()
    if bool(metrics) == (trace is not None):
        raise PdtrimError("give either --metrics for each server, or --trace")
    if trace is not None:
        request, name = _of_trace(trace, config), None
    else:
        request, name = _of_metrics(metrics, config)
    codecs = codec_files(config.codecs, config.system)
    found = levers(
        request,
        remove=config.prefill_remove,
        worth=config.worth,
        ttft=config.ttft,
        codecs=codecs,
    )
    said = advice(
        found,
        model=config.model or name or "MODEL",
        remove=config.prefill_remove,
        link=request.link_gbit_s,
    )
    gpu = request.gpu_prefill_s, request.gpu_decode_s
    return {
        "parts": request.parts(),
        "first_token_s": request.first_s,
        "request_s": request.total_s,
        "gpu_prefill_s": gpu[0],
        "gpu_decode_s": gpu[1],
        "handover_bytes": request.raw_bytes,
        "link_gbit_s": request.link_gbit_s,
        "levers": [asdict(lever) for lever in found],
        "advice": said,
        "sources": request.sources
        | ({} if codecs else {"codecs": f"none is measured on {config.system}"}),
    }


def _of_trace(trace: str, config: AssessConfig) -> Request:
    """A mean request of the trace on the dense model."""
    from pdtrim.cost.assess import Request
    from pdtrim.cost.fleet import Targets, size_fleet
    from pdtrim.cost.load import read_trace

    for name in ("stages", "link_gbit_s", "tpot"):
        if getattr(config, name) is None:
            option = name.replace("_", "-")
            raise PdtrimError(f"a trace needs --{option}: nothing stands in for it")
    load = read_trace(trace, config.rate)
    service = _dense(config)
    queue = None
    if load.rate is not None and config.ttft is not None:
        assert config.tpot is not None
        targets = Targets(
            ttft=config.ttft,
            tpot=config.tpot,
            quantile=config.quantile,
            memory_use=config.memory_use,
        )
        queue = size_fleet(service, load, targets).queue_s
    lengths = [service.prefill_s(n) for n in load.prompts]
    rows, place_s = _places(service, load, config)
    moved = service.handover(load.mean_prompt)
    times, gpus = service.times.source, service.times.gpus
    return Request(
        queue_s=queue,
        prefill_s=sum(lengths) / len(lengths),
        handover_s=moved.seconds,
        decode_s=place_s,
        raw_bytes=moved.sent_bytes,
        layers=service.times.model.layers,
        link_gbit_s=config.link_gbit_s,
        gpu_prefill_s=sum(lengths) / len(lengths) * gpus,
        gpu_decode_s=place_s / rows * gpus,
        sources={
            "queue": "simulated arrivals" if queue is not None else "needs --rate and --ttft",
            "prefill": times,
            "handover": "formula: bytes / --link-gbit-s",
            "decode": f"{times}; {rows} sequences a batch, the most within --tpot and memory",
            "lengths": load.source,
        },
    )


def _of_metrics(places: Sequence[str], config: AssessConfig) -> tuple[Request, str | None]:
    """A mean request of a running pair, and the model's name."""
    from pdtrim.cost.assess import Request
    from pdtrim.cost.load import Load
    from pdtrim.cost.metrics import read_servers

    seen = read_servers(places)
    gpu: tuple[float | None, float | None] = (None, None)
    layers = 1
    sources = dict.fromkeys(("queue", "prefill", "handover", "decode"), seen.source)
    if config.stages is not None and config.tpot is not None:
        load = Load(
            prompts=(max(1, round(seen.prompt)),),
            answers=(max(1, round(seen.answer)),),
            rate=None,
            source=seen.source,
        )
        service = _dense(replace(config, link_gbit_s=config.link_gbit_s or 1.0))
        rows, place_s = _places(service, load, config)
        gpu = service.prefill_s(load.mean_prompt), place_s / rows
        layers = service.times.model.layers
        sources["GPU time"] = f"{service.times.source}, at the pair's mean lengths"
    link = config.link_gbit_s or _reached(seen)
    sources["link"] = "--link-gbit-s" if config.link_gbit_s else f"bytes / time, {seen.source}"
    request = Request(
        queue_s=seen.queue_s,
        prefill_s=seen.prefill_s,
        handover_s=seen.handover_s,
        decode_s=seen.decode_s,
        raw_bytes=seen.sent_bytes,
        layers=layers,
        link_gbit_s=link,
        gpu_prefill_s=gpu[0],
        gpu_decode_s=gpu[1],
        sources=sources,
    )
    return request, seen.model


def _reached(seen: Seen) -> float | None:
    """Gbit/s that the handovers had, waits included; None if no bytes were counted."""
    if seen.sent_bytes is None or seen.handover_s <= 0:
        return None
    return seen.sent_bytes * 8 / seen.handover_s / 1e9


def _dense(config: AssessConfig) -> Service:
    from pdtrim.cost.kept import stage_times
    from pdtrim.cost.pair import PairCost
    from pdtrim.cost.service import Link, Service

    assert config.link_gbit_s is not None
    times = stage_times(config.stages, config.system, None)
    return Service(
        pair=PairCost.dense(times.model.layers),
        times=times,
        link=Link(gbit_s=config.link_gbit_s),
        codecs=(),
    )


def _places(service: Service, load: Load, config: AssessConfig) -> tuple[int, float]:
    from pdtrim.cost.fleet import Targets, best_batch

    assert config.tpot is not None
    targets = Targets(
        ttft=config.ttft or float("inf"),
        tpot=config.tpot,
        quantile=config.quantile,
        memory_use=config.memory_use,
    )
    return best_batch(service, load.mean_prompt, load.mean_answer, targets)
