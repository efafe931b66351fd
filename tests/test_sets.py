"""The paper's two sets, by hand."""

import torch

from pdtrim.distill.sets import SetRule, merges

BLOCK = torch.tensor([0.5, 0.97, 0.99, 0.9, 0.8])
PAIR = torch.tensor([0.6, 0.96, 0.94, 0.7, 0.0])  # (0,1), (1,2), (2,3), (3,4)


def test_pairs_that_are_alike_are_distilled():
    assert SetRule().distilled(BLOCK, PAIR) == {1: (2,), 2: (1,)}
    assert SetRule(threshold=0.93).distilled(BLOCK, PAIR) == {1: (2,), 2: (1, 3), 3: (2,)}


def test_the_other_reading_distils_what_is_not_redundant():
    found = SetRule(reading="redundancy").distilled(BLOCK, PAIR)
    assert found == {0: (1,), 3: (2, 4), 4: (3,)}


def test_without_distillation_the_set_is_empty():
    assert SetRule(reading="none").distilled(BLOCK, PAIR) == {}


def test_a_merge_needs_a_kept_partner_of_its_own():
    distilled = {1: (2, 0), 2: (1, 3), 3: (2, 4), 4: (3,)}
    assert merges([2], distilled) == ((1, 2),)
    assert merges([1, 2], distilled) == ((0, 1), (2, 3))
    assert merges([1, 2, 3, 4], distilled) == ((0, 1),)
    assert merges([3, 1], {1: (2,), 3: (2, 4)}) == ((1, 2), (3, 4))
    assert merges([0], distilled) == ()
