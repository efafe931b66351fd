"""Models: where each family keeps its parts, and how checkpoints are read."""

from pdtrim.models.block import Block, Rope
from pdtrim.models.families import FAMILIES, family_of
from pdtrim.models.model import Model

__all__ = ["FAMILIES", "Block", "Model", "Rope", "family_of"]
