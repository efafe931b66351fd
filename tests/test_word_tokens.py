"""Words that are asked for."""

from pdtrim.calibration.word_tokens import WordTokens


def test_common_words_are_not_rare():
    words = WordTokens(None)
    assert words.rare([[1] * 3 + [2] * 2 + [3], list(range(10, 1004))]) == {2, 3, *range(10, 1004)}
