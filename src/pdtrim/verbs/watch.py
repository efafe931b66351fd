"""What a pair costs on the requests that are served, by the hour: what ``pdtrim watch`` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim.errors import PdtrimError
from pdtrim.progress import Progress, silent

if TYPE_CHECKING:
    from pdtrim.bundle import TrimPlan
    from pdtrim.evaluate.watch import Expected, Hour, Watch
    from pdtrim.reading.requests import RequestLog

SCHEMA = "pdtrim.watch/1"
MAX_BYTES = 64 * 2**20
LEAST_FALSE_ALARMS = 0.001


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Which requests are replayed, what they are held against, and where the metrics go.

    Attributes:
        share: of the requests that are replayed.
        per_hour: requests that are replayed in an hour at most.
        seed: of the hash that picks them.
        prompt_tokens: tokens of the longest prompt that is replayed.
        answer_tokens: tokens of each answer that are compared; of a prompt without one, its last.
        reference: what ``watch --once --json`` printed for text that the pair is good at; the
            plan's own held-out text if not given.
        worse: how many times the reference's mean KL is still borne.
        false_alarms: the share of hours, at most, that call for a new plan though the text is the
            reference's; 0.001 is one hour in six weeks.
        backlog: also replay what the log holds already.
        every: seconds between two looks at the log.
        host: of the metrics.
        port: of the metrics; 0 for a free one.
        textfile: also write the metrics to this file, for node_exporter's textfile collector.
        model: where the dense model is, if not where the plan says.
        device: cpu, or cuda.
        dtype: bfloat16, float32 or float16.
    """

    share: float = 0.01
    per_hour: int = 200
    seed: int = 0
    prompt_tokens: int = 4096
    answer_tokens: int = 256
    reference: str | None = None
    worse: float = 1.5
    false_alarms: float = LEAST_FALSE_ALARMS
    backlog: bool = True
    every: float = 5.0
    host: str = "127.0.0.1"
    port: int = 9109
    textfile: str | None = None
    model: str | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            PdtrimError: naming the first such option.
        """
        if not 0 < self.share <= 1:
            raise PdtrimError(f"--share {self.share:g}: give a share above 0, up to 1")
        for name in ("per_hour", "prompt_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise PdtrimError(f"{option}: give at least 1")
        if not 1 <= self.worse < float("inf"):
            raise PdtrimError(f"--worse {self.worse:g}: give 1 or more")
        if not LEAST_FALSE_ALARMS <= self.false_alarms < 1:
            raise PdtrimError(
                f"--false-alarms {self.false_alarms:g}: give a share from {LEAST_FALSE_ALARMS:g} on"
            )
        if not 0 < self.every < float("inf") or not 0 <= self.port < 2**16:
            raise PdtrimError("--every must be above 0 seconds, --port between 0 and 65535")


def watch_requests(
    target: str | Path,
    log: str | Path,
    config: WatchConfig = WatchConfig(),
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Replay a sample of the requests that a log holds now.

    Args:
        target: a plan, or an exported pair's folder.
        log: as in ``pdtrim.reading.requests``.

    Returns:
        Plain data: ``hours``, each with its KL and agreement, ``expected``, ``skipped``, ``kls`` of
        all replayed requests, ``drift`` (whether an hour calls for a new plan; None if none could
        be tested) and ``said``, the same in words. Nothing of a request is in it.

    Raises:
        PdtrimError: an unreadable plan, model, log or reference, or a log without any request.
    """
    watch, requests = _made(target, log, config, end=False)
    hours: list[Hour] = []
    with progress("replaying requests", requests.path.stat().st_size) as advance:
        at = 0
        for request in requests.read(last=True):
            hours += watch.take(request, time.time())
            advance(requests.at - at)
            at = requests.at
    if (ended := watch.end()) is not None:
        hours.append(ended)
    if watch.requests == 0:
        raise PdtrimError(
            f"no request in {log}: give JSON lines with a prompt, or the log of a vLLM server with"
            " --enable-log-requests and VLLM_LOGGING_LEVEL=DEBUG"
        )
    if config.textfile is not None:
        _metrics(watch, hours[-1] if hours else None).write(config.textfile)
    return _found(watch, config, hours)


def watch_log(
    target: str | Path,
    log: str | Path,
    config: WatchConfig = WatchConfig(),
    *,
    say: Callable[[str], None] = print,
    row: Callable[[dict[str, Any]], None] = lambda hour: None,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Follow a log that grows, and answer on ``/metrics``, until interrupted.

    Args:
        say: takes what people wait for, such as the address.
        row: takes each hour that has ended.
        wait: called between two looks with ``config.every``; what it raises ends the watch.

    Returns:
        None, once ``wait`` is interrupted.

    Raises:
        PdtrimError: as :func:`watch_requests`, or the address cannot be had.
    """
    watch, requests = _made(target, log, config, end=not config.backlog)
    metrics = _metrics(watch, None)
    server, url = metrics.serve(config.host, config.port)
    say(f"metrics on {url}")
    if (words := _untested(watch)) is not None:
        say(words)
    try:
        while True:
            for request in requests.read():
                for hour in watch.take(request, time.time()):
                    metrics.hour = hour
                    row(_row(hour))
            if config.textfile is not None:
                metrics.write(config.textfile)
            wait(config.every)
    finally:
        server.shutdown()
        server.server_close()


def _made(
    target: str | Path, log: str | Path, config: WatchConfig, *, end: bool
) -> tuple[Watch, RequestLog]:
    from pdtrim.bundle import TrimPlan
    from pdtrim.evaluate.watch import Expected, Sample, Watch
    from pdtrim.exported import base_model
    from pdtrim.reading.requests import RequestLog

    config.check()
    trim = TrimPlan.open(target)
    expected = Expected.of(trim) if config.reference is None else _read(config.reference, trim)
    requests = RequestLog(log, end=end)
    model = base_model(trim.plan, source=config.model, dtype=config.dtype, device=config.device)
    sampling = Sample(
        share=config.share,
        seed=config.seed,
        per_hour=config.per_hour,
        prompt_tokens=config.prompt_tokens,
        answer_tokens=config.answer_tokens,
    )
    watch = Watch(
        trim,
        model,
        sampling,
        expected,
        worse=config.worse,
        false_alarms=config.false_alarms,
    )
    return watch, requests


def _metrics(watch: Watch, hour: Hour | None) -> Any:
    from pdtrim.report.prometheus import WatchMetrics

    made = WatchMetrics(watch)
    made.hour = hour
    return made


def _read(reference: str, trim: TrimPlan) -> Expected:
    """The KLs of an earlier watch of the same plan."""
    import math

    from pdtrim.evaluate.watch import Expected
    from pdtrim.reading.json_text import read_json

    data = read_json(reference, limit=MAX_BYTES)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise PdtrimError(f"{reference} is not what 'pdtrim watch --once --json' prints")
    if data.get("plan_digest") != trim.plan.digest:
        raise PdtrimError(f"{reference} is of another plan: make one with this plan")
    kls = data.get("kls")
    if (
        not isinstance(kls, list)
        or len(kls) < 2
        or not all(type(kl) in (int, float) and math.isfinite(kl) for kl in kls)
    ):
        raise PdtrimError(f"{reference} lacks the KLs of 2 requests or more")
    return Expected(kl=sum(kls) / len(kls), kls=tuple(map(float, kls)), source=reference)


def _found(watch: Watch, config: WatchConfig, hours: list[Hour]) -> dict[str, Any]:
    tested = [hour.drift for hour in hours if hour.drift is not None]
    drift = any(tested) if tested else None
    expected = watch.expected
    return {
        "schema": SCHEMA,
        "plan_digest": watch.plan.digest,
        "share": config.share,
        "seed": config.seed,
        "worse": config.worse,
        "false_alarms": config.false_alarms,
        "expected": None
        if expected is None
        else {"kl": expected.kl, "sequences": len(expected.kls), "source": expected.source},
        "requests": watch.requests,
        "replayed": watch.replayed,
        "skipped": dict(watch.skipped),
        "hours": [_row(hour) for hour in hours],
        "kls": [kl for hour in hours for kl in hour.kls],
        "drift": drift,
        "said": _said(watch, drift),
    }


def _row(hour: Hour) -> dict[str, Any]:
    return {
        "start": hour.start,
        "requests": len(hour.kls),
        "kl": hour.kl,
        "kl_error": hour.kl_error,
        "agreement": hour.agreement,
        "kv_bytes_per_token": hour.kv_bytes_per_token,
        "p": hour.p,
        "drift": hour.drift,
    }


def _said(watch: Watch, drift: bool | None) -> str:
    if drift:
        return "a new plan is called for: plan again with --calibration on text like these requests"
    if drift is None:
        return _untested(watch) or "drift was not tested: too few requests in each hour"
    return "no drift"


def _untested(watch: Watch) -> str | None:
    """Why drift cannot be tested; None if it can."""
    if watch.expected is not None and len(watch.expected.kls) > 1:
        return None
    return (
        "drift is not tested: this plan keeps no held-out KLs; give --reference, made by"
        " 'pdtrim watch --once --json' on text that the pair is good at"
    )
