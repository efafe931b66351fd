"""Which tokens begin a word, in tokenizers that spell them as bytes and in those that do not."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pdtrim.calibration.word_tokens import WordTokens

BYTES = {" ": "\u0120", "\n": "\u010a", "\u201d": "\u00e2\u0122\u013f", "\u00fc": "\u00c3\u00bc"}
"""How byte-level BPE spells a space, a line break, a quotation mark and an umlaut."""


def looked_up(texts, spelled, decoder):
    vocabulary = {spelled(text): i for i, text in enumerate(["?", *texts])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.decoder = decoder
    return WordTokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?"))


@pytest.mark.parametrize("bytewise", [True, False])
def test_a_word_is_letters_whatever_the_tokenizer_spells_them_with(bytewise):
    texts = [" over", " \u00fcber", " \u201d", "\u00fcber", "\u201d", "\n", " an", " x1y"]
    words = (
        looked_up(texts, lambda text: "".join(BYTES.get(c, c) for c in text), decoders.ByteLevel())
        if bytewise
        else looked_up(texts, lambda text: text.replace(" ", "\u2581"), decoders.Metaspace())
    )
    tokens = range(1, 1 + len(texts))
    assert [texts[t - 1] for t in tokens if words.starts(t)] == [" over", " \u00fcber"]
    assert [texts[t - 1] for t in tokens if words.goes_on(t)] == ["\u00fcber"]
    assert [words.word(t) for t in (1, 2)] == ["over", "\u00fcber"]


def test_common_words_are_not_rare():
    words = WordTokens(None)
    assert words.rare([[1] * 3 + [2] * 2 + [3], list(range(10, 1004))]) == {2, 3, *range(10, 1004)}
