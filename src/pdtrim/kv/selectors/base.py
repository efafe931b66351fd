"""What every selector answers to.

A selector is a frozen record of its parameters, written into the plan, and a pure function of a
layer's prompt. It decides when that layer's prefill ends, on the prefill side, and looks at nothing
that comes later.

Shapes: B rows, G KV heads, N prompt tokens handed over, L layers, H query heads, C later tokens, D
head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from pdtrim.kv.view import LayerView
from pdtrim.records import Frozen

if TYPE_CHECKING:
    from typing_extensions import Self

Mask = Literal["static", "token", "pair"]
"""What must travel beside the kept pairs for decode to know which they are.

static: nothing, the plan and the token count tell. token: one bit a token, all heads alike.
pair: one bit a token and KV head.
"""


class Observed(Protocol):
    """What calibration text shows a selector that is fitted: the dense model, layer by layer."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def num_kv_heads(self) -> int:
        """G."""

    @property
    def tokens(self) -> int:
        """N of every calibration prompt."""

    def view(self, layer: int) -> LayerView:
        """A layer's prompts."""

    def later_queries(self, layer: int) -> Tensor:
        """Rotated queries of the tokens that follow, ``[B, H, C, D]``."""

    def concentration(self, rule: StaticSelector) -> Tensor:
        """Share of each head's attention that a rule's tokens receive, ``[L, H]``."""


class SelectorBase(Frozen):
    """Parameters of one selector, and how a user's policy becomes them.

    Attributes:
        fitted: parameters that :meth:`fit` finds, with values to check the others beside.
        asked: what a policy may say of the fit, of ``share`` and ``cutoff``.
        default_layers: where it holds if a policy does not say.
        numbers_heads: whether parameters go by KV head, so that a layer must have all of them.
    """

    fitted: ClassVar[Mapping[str, Any]] = {}
    asked: ClassVar[Sequence[str]] = ()
    default_layers: ClassVar[Literal["all", "auto"]] = "all"
    numbers_heads: ClassVar[bool] = False

    @classmethod
    def build(cls, options: Mapping[str, str], **fitted: Any) -> Self:
        """One selector of a user's options; what is to be fitted has any value unless given."""
        return cls.model_validate({**cls.fitted, **options, **fitted})

    @classmethod
    def fit(
        cls, observed: Observed, options: Mapping[str, str], share: float | None
    ) -> Sequence[Self]:
        """The selector of every layer.

        Args:
            share: how much the policy asks to keep; None leaves that to the selector.
        """
        return [cls.build(options)] * observed.num_layers

    @classmethod
    def sweep(cls, share: float, tokens: int) -> str | None:
        """The policy that keeps about a share of a prompt, for comparisons; None if none does."""
        return None

    @property
    @abstractmethod
    def mask(self) -> Mask:
        """A class variable where it does not depend on the parameters."""

    def mask_rows(self, heads: int) -> int:
        """Rows of one bit a token that must travel, for so many KV heads."""
        return {"static": 0, "token": 1, "pair": heads}[self.mask]

    @property
    def reads_queries(self) -> bool:
        """Whether it calls ``queries`` or ``unrotated_queries``: a block whose prefill gate is
        ``kv`` must then keep its query projection in the checkpoint."""
        return False

    @property
    def reads_output(self) -> bool:
        """The same for ``output_weight`` and the output projection."""
        return False

    @abstractmethod
    def keep(self, view: LayerView, *, block_size: int = 1) -> Tensor:
        """Which pairs travel: bool ``[B, G, N]`` on the view's device.

        With mask ``token`` all heads of a row are alike. ``block_size`` is the page of the decode
        engine: only static selectors round to it.
        """


class StaticSelector(SelectorBase):
    """A selector whose answer depends on the token count and the KV head only."""

    mask: ClassVar[Mask] = "static"

    @abstractmethod
    def static_keep(self, heads: int, tokens: int, *, block_size: int = 1) -> Tensor:
        """bool ``[G, N]`` on the CPU."""

    def keep(self, view: LayerView, *, block_size: int = 1) -> Tensor:
        """See the base class."""
        B, G, N, _ = view.k_BGND.shape
        keep_GN = self.static_keep(G, N, block_size=block_size).to(view.k_BGND.device)
        return keep_GN.expand(B, G, N)


def top(score_BGN: Tensor, count: int, *, always: Tensor | None = None) -> Tensor:
    """Keep the ``count`` best pairs of each head, those in ``always`` (bool ``[N]``) first.

    Ties go to the earlier token, so that the choice is the same on every device.
    """
    if always is not None:
        score_BGN = score_BGN.masked_fill(always, torch.inf)
    count = min(count, score_BGN.shape[-1])
    order = score_BGN.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score_BGN, dtype=torch.bool).scatter(-1, order, True)
