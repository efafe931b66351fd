"""A KV policy as a user asks for it, and what calibration makes of it.

Grammar: ``SELECTOR[:option=value,...][+CODEC[:option=value,...]]``, for example::

    full                                     everything, in the model's dtype
    full+int4                                everything, in 4 bits
    first_last:first=4,last=60               in the layers where attention concentrates there
    first_last:first=4,last=60,layers=20     in the 20 layers where it concentrates most
    first_last:layers=all,last=124+k4v2      in every layer, keys in 4 bits and values in 2
    streaming:share=0.2                      4 first tokens and the last ones, in every layer
    streaming:last=1020                      the same with a window of so many tokens
    snapkv:share=0.25                        other selectors: every layer
    duo:share=0.3,last=60                    the 0.3 of all heads that need the middle stay whole
    gate:share=0.5                           a fitted linear gate that keeps half of the pairs

``streaming`` is StreamingLLM (arXiv 2309.17453), which is ``first_last`` with ``first=4`` and
``layers=all`` unless given. As in the paper the last tokens are so many, whatever the prompt;
``share`` sets their number to what keeps that much of a calibration prompt. Different from the
paper: the cut is made once, so the tokens that decode adds all stay, and keys keep the positions
that they were rotated for, where the paper numbers those of the cache anew.

Concentration is measured for each attention head: the share of what continuation tokens pay to the
prompt that goes to the tokens a first/last rule keeps. A head is concentrated from ``cutoff`` on; a
layer is selected if at least half of its heads are (PDTrim, arXiv 2509.04467: "an attention-score
cutoff"; the half is ours, as a layer is what the paper selects).
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from pdtrim.errors import PlanError
from pdtrim.kv.codecs import MOST_LETTERS, Codec, Raw, parse_codec
from pdtrim.kv.selectors import SELECTORS, FirstLast, Full, SelectorBase
from pdtrim.kvfit.observed import Observed
from pdtrim.models.model import Model
from pdtrim.plan import LayerKV
from pdtrim.progress import Progress, silent
from pdtrim.records import Frozen, first_problem, shortened
from pdtrim.stage.forward import Batch

HEADS_NEEDED = 0.5
STREAMING = "streaming"  # a name in the grammar only: the plan says first_last


class KVRequest(Frozen):
    """What the user asked for.

    Attributes:
        text: as the user wrote it.
        options: of the selector, as text.
        layers: which layers the selector applies to; the others send every token.
        cutoff: from where on a head is concentrated; for ``layers=auto``.
        share: what the selector's fit is asked to keep; None leaves that to the selector.
    """

    text: str
    selector: str
    options: dict[str, str] = Field(default_factory=dict)
    layers: NonNegativeInt | Literal["all", "auto"]
    cutoff: float = Field(default=0.8, gt=0, le=1)
    share: float | None = Field(default=None, ge=0, le=1)
    codec: Codec = Raw()

    @classmethod
    def parse(cls, text: str) -> KVRequest:
        """Read the grammar above.

        Raises:
            PlanError: unknown policy, option or value.
        """
        said = f"KV policy '{shortened(text)}'"
        if len(text) > MOST_LETTERS or not (text.isascii() and text.isprintable()):
            raise PlanError(f"{said}: write plain letters, {MOST_LETTERS} at most")
        selector_text, plus, codec_text = text.partition("+")
        name, colon, rest = selector_text.partition(":")
        options = _options(said, rest) if colon else {}
        if name == "full" and colon:
            raise PlanError("KV policy 'full' takes no options")
        if name == STREAMING:
            name = "first_last"
            options = {"first": "4", "layers": "all", **options}
            if "last" not in options:
                options = {"share": "0.5", **options}
        kind = SELECTORS.get(name)
        if kind is None:
            known = ", ".join((*SELECTORS, STREAMING))
            raise PlanError(f"{said}: unknown selector '{shortened(name)}', use one of {known}")
        own: dict[str, Any] = {"text": text, "selector": name}
        own["layers"] = _layers(said, options.pop("layers", kind.default_layers))
        for key in kind.asked:
            if key in options:
                own[key] = options.pop(key)
        for key in options:
            if key == "name" or key in kind.fitted:
                raise PlanError(f"{said}: '{key}' is no option, it is found by pdtrim")
        if plus:
            own["codec"] = parse_codec(codec_text)
        try:
            request = cls(options=options, **own)
            kind.build(options)
        except ValidationError as error:
            raise PlanError(f"{said}: {first_problem(error)}") from error
        if name == "first_last" and request.share is not None and "last" in options:
            raise PlanError(f"{said}: give share or last, not both")
        return request

    def resolve(
        self, model: Model, batch: Batch, *, block_size: int = 1, progress: Progress = silent
    ) -> tuple[LayerKV, ...]:
        """One rule a layer, fitted on calibration text.

        Raises:
            PlanError: the model does not have what the policy names.
        """
        return self.fit(Observed.of(model, batch, block_size=block_size))

    def fit(self, observed: Observed) -> tuple[LayerKV, ...]:
        """One rule a layer, from what was observed already."""
        count = observed.num_layers
        self.codec.check_width(observed.model.head_dim)
        if isinstance(self.layers, int) and self.layers > count:
            raise PlanError(f"KV policy: layers={self.layers}, but the model has {count}")
        selectors = SELECTORS[self.selector].fit(observed, self.options, self.share)
        chosen = self._chosen(observed, selectors[0])
        return tuple(
            LayerKV(selector=selectors[i] if i in chosen else Full(), codec=self.codec)  # type: ignore[arg-type]
            for i in range(count)
        )

    def _chosen(self, observed: Observed, selector: SelectorBase) -> set[int]:
        """Layers that the selector applies to."""
        if self.layers == "all":
            return set(range(observed.num_layers))
        rule = selector if isinstance(selector, FirstLast) else FirstLast()
        mass_LH = observed.concentration(rule)
        heads_L = (mass_LH >= self.cutoff).double().mean(1)
        if self.layers == "auto":
            return {i for i, share in enumerate(heads_L.tolist()) if share >= HEADS_NEEDED}
        # most concentrated heads first, the mean mass breaks ties
        order = (heads_L + mass_LH.double().mean(1) * 1e-6).argsort(descending=True, stable=True)
        return set(order[: self.layers].tolist())


def _options(said: str, rest: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        if not equals:
            raise PlanError(f"{said}: '{shortened(item)}' is not option=value")
        if key in options:
            raise PlanError(f"{said}: '{shortened(key)}' is given twice")
        options[key] = value
    return options


def _layers(said: str, text: str) -> int | str:
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    if text not in ("all", "auto"):
        raise PlanError(f"{said}: layers must be a number, 'all' or 'auto'")
    return text
