"""The journal of a search (``keep/journal.py``)."""

from pdtrim.keep.journal import Journal

__all__ = ["Journal"]
