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

Shapes: B batch, C continuation tokens, N prompt tokens handed over, H query heads, G KV heads,
D head width, L layers.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from pdtrim.errors import PlanError
from pdtrim.kv.codecs import MOST_LETTERS, Codec, Raw, parse_codec
from pdtrim.kv.selectors import SELECTORS, Full, Selector, SelectorBase
from pdtrim.kv.selectors.duo import Duo, retrieval_score
from pdtrim.kv.selectors.first_last import FirstLast
from pdtrim.kv.selectors.gate import (
    attention_received,
    fit_gate,
    gate_score,
    pack_weights,
    threshold_for,
)
from pdtrim.models.model import Model
from pdtrim.plan import LayerKV
from pdtrim.records import Frozen, first_problem, shortened
from pdtrim.stage.forward import Batch, Trace
from pdtrim.stage.view import BlockView

HEADS_NEEDED = 0.5
RIDGE = 1e-2
FITTED = ("duo", "gate")  # selectors whose parameters come from calibration text
STREAMING = "streaming"  # a name in the grammar only: the plan says first_last


class KVRequest(Frozen):
    """What the user asked for.

    Attributes:
        options: of the selector, as text.
        layers: which layers it applies to; the others send every token.
        share: of duo's heads that stay whole, of gate's pairs that travel, or of a calibration
            prompt's tokens that streaming keeps.
        fit_last: ``last`` follows from that share.
    """

    selector: str
    options: dict[str, str] = Field(default_factory=dict)
    layers: NonNegativeInt | Literal["all", "auto"]
    cutoff: float = Field(default=0.8, gt=0, le=1)
    share: float = Field(default=0.5, ge=0, le=1)
    fit_last: bool = False
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
        if name not in SELECTORS and name != STREAMING:
            known = ", ".join((*SELECTORS, STREAMING))
            name = shortened(name)
            raise PlanError(f"{said}: unknown selector '{name}', use one of {known}")
        options: dict[str, str] = {}
        for item in rest.split(",") if colon else ():
            key, equals, value = item.partition("=")
            if not equals:
                raise PlanError(f"{said}: '{shortened(item)}' is not option=value")
            if key in options:
                raise PlanError(f"{said}: '{shortened(key)}' is given twice")
            if key == "name" or key in _PLACEHOLDER.get(name, {}):
                raise PlanError(f"{said}: '{key}' is no option, it is found by pdtrim")
            options[key] = value
        own: dict[str, Any] = {}
        if name == STREAMING:
            name, options, own = _streaming(said, options)
        own["layers"] = options.pop("layers", _default_layers(name))
        if re.fullmatch("[0-9]{1,9}", own["layers"]):
            own["layers"] = int(own["layers"])
        elif own["layers"] not in ("all", "auto"):
            raise PlanError(f"{said}: layers must be a number, 'all' or 'auto'")
        for key, takers in (("cutoff", ("first_last",)), ("share", FITTED)):
            if name in takers and key in options:
                own[key] = options.pop(key)
        if plus:
            own["codec"] = parse_codec(codec_text)
        if name == "full" and rest:
            raise PlanError("KV policy 'full' takes no options")
        try:
            request = cls(selector=name, options=options, **own)
            request.build(**_PLACEHOLDER.get(name, {}))
        except ValidationError as error:
            raise PlanError(f"{said}: {first_problem(error)}") from error
        return request

    def build(self, **fitted: Any) -> SelectorBase:
        """The selector with what calibration has fitted."""
        data = {"name": self.selector, **self.options, **fitted}
        selector: SelectorBase = TypeAdapter(Selector).validate_python(data)
        return selector

    @torch.inference_mode()
    def resolve(
        self, model: Model, batch: Batch, trace: Trace, *, block_size: int = 1
    ) -> tuple[LayerKV, ...]:
        """One rule a layer.

        Args:
            batch, trace: calibration text and the dense model's streams on it.
        """
        count, width = model.num_layers, model.head_dim
        if getattr(self.codec, "rotate", False) and width & (width - 1):
            raise PlanError(f"rotate needs a head width that is a power of two, not {width}")
        if isinstance(self.layers, int) and self.layers > count:
            raise PlanError(f"KV policy: layers={self.layers}, but the model has {count}")
        if self.selector == "duo":
            selectors = self._duo(model, batch, trace, block_size)
        elif self.selector == "gate":
            selectors = self._gate(model, batch, trace)
        else:
            selectors = [self._window(batch) if self.fit_last else self.build()] * count
        chosen = self._layers(model, batch, trace, block_size, selectors[0])
        return tuple(
            LayerKV(selector=selectors[i] if i in chosen else Full(), codec=self.codec)  # type: ignore[arg-type]
            for i in range(count)
        )

    def _window(self, batch: Batch) -> SelectorBase:
        plain = self.build()
        assert isinstance(plain, FirstLast)
        handed_over = batch.prompt_BP.shape[1] - 1
        kept = math.ceil(self.share * handed_over - 1e-9)  # as shares of other selectors round
        return self.build(last=max(1, kept - plain.first))

    def _layers(
        self, model: Model, batch: Batch, trace: Trace, block_size: int, selector: SelectorBase
    ) -> set[int]:
        if self.layers == "all":
            return set(range(model.num_layers))
        rule = selector if isinstance(selector, FirstLast) else FirstLast()
        mass_LH = concentration(model, batch, trace, rule, block_size=block_size)
        heads_L = (mass_LH >= self.cutoff).double().mean(1)
        if self.layers == "auto":
            return {i for i, share in enumerate(heads_L.tolist()) if share >= HEADS_NEEDED}
        # most concentrated heads first, the mean mass breaks ties
        order = (heads_L + mass_LH.double().mean(1) * 1e-6).argsort(descending=True, stable=True)
        return set(order[: self.layers].tolist())

    def _duo(self, model: Model, batch: Batch, trace: Trace, block_size: int) -> list[SelectorBase]:
        plain = self.build(full_heads=())
        assert isinstance(plain, Duo)
        rule = FirstLast(first=plain.first, last=plain.last)
        mass_LH = concentration(model, batch, trace, rule, block_size=block_size)
        score_LG = torch.stack([retrieval_score(row, model.num_kv_heads) for row in mass_LH])
        whole = score_LG.flatten().argsort(descending=True, stable=True)
        whole = whole[: round(self.share * score_LG.numel())]
        full: list[list[int]] = [[] for _ in range(model.num_layers)]
        for at in whole.tolist():
            full[at // model.num_kv_heads].append(at % model.num_kv_heads)
        return [self.build(full_heads=tuple(sorted(heads))) for heads in full]

    def _gate(self, model: Model, batch: Batch, trace: Trace) -> list[SelectorBase]:
        selectors = []
        for layer in range(model.num_layers):
            view, q_BHCD = prompt_and_queries(model, batch, trace, layer)
            target_BGN = attention_received(q_BHCD, view.k_BGND, view.scale)
            h_SE = view.h_BNE.flatten(0, 1).float()
            weights = fit_gate(h_SE, target_BGN.transpose(1, 2).flatten(0, 1), RIDGE)
            threshold = threshold_for(gate_score(view.h_BNE, weights), self.share)
            selectors.append(self.build(weights=pack_weights(weights), threshold=threshold))
        return selectors


_PLACEHOLDER: dict[str, dict[str, Any]] = {
    "duo": {"full_heads": ()},
    "gate": {"weights": "AAAAAA==", "threshold": 0.0},
}


def _streaming(said: str, options: dict[str, str]) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The selector that ``streaming`` stands for, its options, and the request's own fields."""
    options = {"first": "4", "layers": "all", **options}
    if "last" not in options:
        return "first_last", options, {"fit_last": True, "share": options.pop("share", "0.5")}
    if "share" in options:
        raise PlanError(f"{said}: give share or last, not both")
    return "first_last", options, {}


def _default_layers(selector: str) -> str:
    return "auto" if selector == "first_last" else "all"


def prompt_and_queries(
    model: Model, batch: Batch, trace: Trace, layer: int
) -> tuple[BlockView, Tensor]:
    """A layer's prompt in the dense model, and the continuation's rotated queries [B, H, C, D]."""
    N, C = batch.prompt_BP.shape[1] - 1, batch.continuation_BC.shape[1]
    at = torch.arange(N + C, device=model.device)[None]
    block = model.block(layer)
    x, y = trace[layer]
    h_BNE = block.attention_norm(x)
    view = BlockView(block, h_BNE, *block.project_kv(h_BNE, model.rope(at[:, :N])), model.rope)
    return view, block.project_q(block.attention_norm(y), model.rope(at[:, N:]))


@torch.inference_mode()
def concentration(
    model: Model, batch: Batch, trace: Trace, rule: FirstLast, *, block_size: int = 1
) -> Tensor:
    """Share of each head's attention to the prompt that a rule's tokens receive, ``[L, H]``."""
    N = batch.prompt_BP.shape[1] - 1
    kept_N = rule.static_keep(1, N, block_size=block_size)[0].to(model.device)
    rows = []
    for layer in range(model.num_layers):
        view, q_BHCD = prompt_and_queries(model, batch, trace, layer)
        B, G, _, D = view.k_BGND.shape
        q_BGRCD = q_BHCD.view(B, G, -1, q_BHCD.shape[2], D)
        scores = torch.einsum("bgrcd,bgnd->bgrcn", q_BGRCD, view.k_BGND).float() * view.scale
        mass_BGR = scores.softmax(-1)[..., kept_N].sum(-1).mean(-1)
        rows.append(mass_BGR.flatten(1).mean(0))
    return torch.stack(rows).cpu()
