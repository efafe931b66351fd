"""Which layers a repair corrects, and which layers read what it corrects."""

from pdtrim.plan import Gates
from pdtrim.repair.cuts import find_cuts, merged_layers, readers


def test_cuts_are_runs_of_whole_blocks_with_their_readers():
    gates = Gates.removing(9, prefill={0, 2, 3, 4, 7, 8}, decode={0, 3, 6, 7})
    decode = [(c.first, c.stop, c.readers) for c in find_cuts(gates, "decode")]
    assert decode == [(0, 1, (1,)), (3, 4, (4,)), (6, 8, (8,))]
    # layers 2 and 4 still make K and V from the stream of the cut, 3 does not; 8 is a reader too
    prefill = [(c.first, c.stop, c.readers) for c in find_cuts(gates, "prefill")]
    assert prefill == [(0, 1, (1,)), (2, 5, (2, 4, 5)), (7, 9, (8,))]
    assert merged_layers(gates) == {
        ("prefill", 1): (1, 2, 3, 4),
        ("prefill", 6): (6, 7, 8),
        ("decode", 2): (2, 3),
        ("decode", 5): (5, 6, 7),
    }
    tail = Gates.removing(4, prefill={3}, decode={2, 3})
    assert find_cuts(tail, "prefill") == ()  # prefill ends with layer 1
    assert [c.readers for c in find_cuts(tail, "decode")] == [(4,)]  # the head
    assert find_cuts(Gates.removing(4, prefill={3}), "prefill") == ()  # 3 reads what it always did
    parts = Gates.dense(4).model_copy(update={"decode_mlp": (True, False, True, True)})
    assert find_cuts(parts, "decode") == ()


def test_readers_are_skipped_keys_and_values_and_the_next_that_writes():
    gates = Gates.removing(9, prefill={2, 3, 4, 7, 8}, decode={3, 6, 7}).without_dead_work()
    assert readers(gates, "prefill", 1) == (2, 4, 5)  # 3 makes no K and V: decode skips it
    assert readers(gates, "prefill", 5) == (6,) and readers(gates, "prefill", 6) == (8,)
    assert readers(gates, "prefill", 8) == ()
    assert readers(gates, "decode", 2) == (4,) and readers(gates, "decode", 8) == (9,)
