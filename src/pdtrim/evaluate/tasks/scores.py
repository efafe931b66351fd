"""What a task gives: the score of every item, so that variants can be compared item by item."""

from __future__ import annotations

from pdtrim.records import Frozen


class TaskScores(Frozen):
    """One task, one variant: scores of each item, and what is needed to repeat them.

    Attributes:
        version: of the task's definition, with lm-eval's version where lm-eval defines it.
        source: ``hub``, ``olmo``, or the name of the folder.
        shots: solved examples in each prompt.
        count: items.
        metrics: over all items. The mean of the items for accuracies and exact match; for a
            perplexity (``ppl``, ``perplexity``) the exponential of their mean.
        items: by metric, one value an item in the source's order. Of a perplexity: the item's
            negative log-likelihood in nats, a token for ``ppl`` and a word for ``perplexity``.
        items_hash: SHA-256 of the items' texts, prompts and answers included. Two variants pair
            item by item only where it is the same.
        main: the metric that enters averages over tasks; one that is ``ppl`` enters none.
    """

    task: str
    version: str
    source: str
    shots: int
    count: int
    metrics: dict[str, float]
    items: dict[str, tuple[float, ...]]
    items_hash: str
    main: str
