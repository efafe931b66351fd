"""The measured files that come with pdtrim, and which of them a system and a model get."""

from __future__ import annotations

from pathlib import Path

from pdtrim.cost.handover import CodecFile
from pdtrim.cost.pair import PairCost
from pdtrim.cost.times import StageTimes
from pdtrim.errors import PdtrimError

MEASURED = Path(__file__).parent / "measured"
STAGES, CODECS = MEASURED / "stages_202611", MEASURED / "codecs_202611"
CODECS_SYSTEM = "h100"
AICONFIGURATOR = "aiconfigurator:"


def stage_times(source: str | None, system: str, pair: PairCost | None) -> StageTimes:
    """The stage times that the user names, or the kept ones of a system and of the pair's shape.

    Args:
        source: a file, the name of kept times such as ``llama-3.1-8b``, ``aiconfigurator:MODEL``,
            or None.

    Raises:
        PdtrimError: nothing is measured for them, or the file is of another model or system.
    """
    if source is not None and source.startswith(AICONFIGURATOR):
        from pdtrim.cost.aiconfigurator import aiconfigurator_times

        times, where = aiconfigurator_times(source.removeprefix(AICONFIGURATOR), system), source
    elif source is not None and source in (kept := kept_names(system)):
        times, where = _kept(kept[source]), source
    elif source is not None:
        times, where = StageTimes.load(source), source
        times = times.model_copy(update={"source": f"{times.source}, in {source}"})
    else:
        return _kept_times(system, pair)
    if times.system != system:
        raise PdtrimError(f"{where} was measured on {times.system}, not on --system {system}")
    if pair is not None and not fits(times, pair):
        raise PdtrimError(
            f"{where} is of {times.model.name}, {times.model.layers} layers and"
            f" {times.model.kv_heads} KV heads, not of this plan's model"
        )
    return times


def fits(times: StageTimes, pair: PairCost) -> bool:
    """Whether these are times of the pair's dense model, as far as a plan says its shape."""
    shape = times.model
    own = (shape.layers, shape.kv_heads, shape.head_dim)
    return own == (pair.layers, pair.kv_heads, pair.head_dim)


def kept_names(system: str) -> dict[str, Path]:
    """Models whose stage times on a system come with pdtrim, and their files."""
    ending = f"_{system}.json"
    paths = sorted(STAGES.glob("*.json"))
    return {p.name.removesuffix(ending): p for p in paths if p.name.endswith(ending)}


def _kept(path: Path) -> StageTimes:
    times = StageTimes.load(path)
    return times.model_copy(update={"source": f"{times.source}, in {path.parent.name}/{path.name}"})


def _kept_times(system: str, pair: PairCost | None) -> StageTimes:
    kept = kept_names(system)
    for path in kept.values():
        times = _kept(path)
        if pair is not None and fits(times, pair):
            return times
    about = f"'{pair.model}' ({pair.layers} layers)" if pair else "an unnamed model"
    raise PdtrimError(
        f"no stage times of {about} on {system} come with pdtrim (there are:"
        f" {', '.join(kept) or 'none'}): give --stages NAME, FILE or aiconfigurator:MODEL"
    )


def codec_files(paths: tuple[str, ...], system: str) -> list[CodecFile]:
    """The files that the user names, or the kept ones of a system; none if there are none."""
    if paths:
        return [CodecFile.load(path) for path in paths]
    if CODECS_SYSTEM not in system.split("_"):
        return []
    found = sorted(CODECS.glob("bench_[0-9]*.json"))
    return [CodecFile.load(path, source=f"{path.parent.name}/{path.name}") for path in found]
