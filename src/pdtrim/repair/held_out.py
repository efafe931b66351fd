"""A held-out text on which pairs are judged, with what the dense model says of it, made once.

Shapes: B sequences of a part.
"""

from __future__ import annotations

import torch

from pdtrim.calibration.recall import ALL, Recall, answer_loss, recall_text
from pdtrim.calibration.score import Score
from pdtrim.calibration.teacher import Teacher
from pdtrim.finite import finite
from pdtrim.models.model import Model
from pdtrim.repair.walk import same_layers
from pdtrim.stage.forward import Batch, Trace, Trimmed

ROWS = 8  # sequences run together


class HeldOut:
    """Judges pairs on a text.

    Args:
        weight: of recall in the loss; None does not measure it.
        seed: of the rows of recall.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Model, text: Batch, *, weight: float | None = None, seed: int = 0
    ) -> None:
        text = text.to(model.device)
        self.model, self.weight = model, weight
        self.parts = text.parts(ROWS)
        dense = Trimmed.dense(model)
        self.traces = [dense.streams(part) for part in self.parts]
        self.teachers = [Teacher.heard(model, [trace]) for trace in self.traces]
        self.recalls: list[tuple[Recall, Trace]] = []
        if weight is not None:
            whole = recall_text(model, text, rows=ALL, seed=seed)
            pieces = [whole[i : i + ROWS] for i in range(0, len(text), ROWS)]
            self.recalls = [(piece, dense.streams(piece.batch)) for piece in pieces]
        self.dense_answers = self._answers(dense)

    @torch.inference_mode()
    def score(self, trimmed: Trimmed) -> Score:
        """KL, and recall if it is measured.

        Raises:
            PdtrimError: either is NaN or infinite.
        """
        decode = trimmed.pair.decode
        kl_B = [
            teacher.kl(decode, self._stream(trimmed, part, trace))
            for teacher, part, trace in zip(self.teachers, self.parts, self.traces, strict=True)
        ]
        kl_n = finite(torch.cat(kl_B), "the KL of a repair")
        kl, kls = float(kl_n.mean()), tuple(kl_n.tolist())
        if self.weight is None:
            return Score(kl=kl, kls=kls)
        parts = zip(self.recalls, self._answers(trimmed), self.dense_answers, strict=True)
        recall_n = torch.cat([piece.lost(nll_B, dense_B) for (piece, _), nll_B, dense_B in parts])
        recall = float(finite(recall_n, "the recall of a repair").mean())
        return Score(kl=kl, recall=recall, weight=self.weight, kls=kls)

    def _answers(self, trimmed: Trimmed) -> list[torch.Tensor]:
        """NLL of each part's rows' answers."""
        return [
            answer_loss(trimmed.pair.decode, piece, self._stream(trimmed, piece.batch, trace))
            for piece, trace in self.recalls
        ]

    def _stream(self, trimmed: Trimmed, batch: Batch, trace: Trace) -> torch.Tensor:
        """What decode's head reads, run from the first layer that is not the dense model's."""
        start = same_layers(self.model, trimmed)
        return trimmed.streams(batch, resume=trace, start=start)[-1][1]
