"""Training text that needs recall, made of ordinary text."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_model
from pdtrim.calibration import recall_training
from pdtrim.calibration.choices import LETTERS, QUESTION
from pdtrim.calibration.recall_training import (
    KNOWN,
    NEAR,
    PAIR,
    SAMPLE,
    choices,
    letters_known,
    pairs,
    recall_rows,
    returns,
)
from pdtrim.distill.job import DistillConfig
from pdtrim.errors import CalibrationError, PdtrimError, PlanError
from pdtrim.keep.tensors import ids_digest
from pdtrim.plan import Gates
from pdtrim.progress import silent
from pdtrim.stage.forward import Batch, Pair, forward
from pdtrim.verbs.distill import TrainConfig, training_text

P, C = 40, 24
LONG = 70
"""Tokens of a prompt that has room for a question."""
WORDS = 400


def text(rows=60, vocabulary=3000):
    """Mostly frequent tokens, and some that are rare; row 0's first token begins each row."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randint(10, 40, (rows, P + C), generator=draw)
    rare = torch.randint(40, vocabulary, (rows, P + C), generator=draw)
    rare[:, 30:] = rare[:, :34]  # they come back 30 tokens later
    ids = torch.where(torch.rand(rows, P + C, generator=draw) < 0.7, common, rare)
    ids[:, 0] = 1
    return Batch(prompt_BP=ids[:, :P], continuation_BC=ids[:, P:])


def drawn():
    return torch.Generator().manual_seed(3)


def test_a_return_begins_with_a_rare_token_of_the_far_prompt():
    rows_nW = returns(text(), 10, begin=1, draw=drawn())
    assert 5 < len(rows_nW) <= 10 and rows_nW.shape[1] == P + C
    for row in rows_nW.tolist():
        assert row[0] == 1 and row[P] >= 40
        assert row[P] in row[1 : P - NEAR] and row[P] not in row[P - NEAR : P]


def test_pairs_come_again_in_another_order():
    rows_nW = pairs(text(), 5, begin=1, draw=drawn())
    in_order = 0
    for row in rows_nW.tolist():
        assert row[0] == 1
        listed = [tuple(row[i : i + PAIR]) for i in range(P - P // PAIR * PAIR + PAIR, P, PAIR)]
        again = [tuple(row[i : i + PAIR]) for i in range(P, P + C, PAIR)]
        assert len(set(again)) == C // PAIR and set(again) <= {*listed, tuple(row[8:16])}
        in_order += again == listed[: len(again)]
    assert in_order < 2


def test_recall_rows_are_as_many_as_asked_and_a_seeds_own():
    ordinary = text()
    one, same, other = (recall_rows(ordinary, 20, begin=1, seed=seed) for seed in (0, 0, 1))
    assert (
        len(one) == 20 and one.prompt_BP.shape == (20, P) and one.continuation_BC.shape == (20, C)
    )
    assert torch.equal(one.prompt_BP, same.prompt_BP)
    assert not torch.equal(one.prompt_BP, other.prompt_BP)
    copied = [
        row
        for row, rest in zip(one.prompt_BP.tolist(), one.continuation_BC.tolist(), strict=True)
        if str(rest)[1:-1] in str(row)
    ]
    assert len(copied) >= 6  # a third, in one piece each
    with pytest.raises(CalibrationError, match="prompts of 17 tokens at least, not 16"):
        short = Batch(
            prompt_BP=ordinary.prompt_BP[:, :16], continuation_BC=ordinary.continuation_BC
        )
        recall_rows(short, 3, begin=1)


def test_rows_of_a_model_that_does_not_know_letters_are_those_before_there_were_choices():
    made = recall_rows(text(), 20, begin=1, seed=0)
    known = "92be8300ea0aedcee385ac0358d099a31cfa7fb199c9c084b8e70e8411677d54"
    assert ids_digest(made.prompt_BP, made.continuation_BC) == known


@pytest.fixture(scope="module")
def speaker():
    """A random model whose tokenizer has words, and what a question needs."""
    spoken = [" " + "".join(letters) for letters in product("bdgk", "aeiou", "lmnr", "aeiou")]
    pieces = [*spoken, *(f" {letter}" for letter in LETTERS), *LETTERS, ".", "\n", "Answer", "?"]
    pieces += [" Which", " of", " these", " words", " is", " in", " the", " text", " above"]
    pieces += ["Question", ":", *(word[1:] for word in spoken)]
    raw = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    model = tiny_model("llama", vocab_size=len(pieces))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?")
    return model


def words(model, rows=30, prompt=LONG, continuation=80):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (rows, prompt + continuation), generator=draw)
    return Batch.cut(ids, prompt)


def spoken(model, ids):
    return "".join(model.tokenizer.convert_ids_to_tokens(ids))


def test_choices_ask_which_word_the_piece_holds_again_and_again(speaker):
    ordinary = words(speaker)
    made = choices(speaker, ordinary, 10, seed=0)
    assert len(made.batch) == 10 and made.batch.continuation_BC.shape == (10, 80)
    asked = QUESTION.split("{}", maxsplit=1)[0]
    places = set()
    for prompt, row, answers in zip(
        made.batch.prompt_BP.tolist(),
        made.batch.continuation_BC.tolist(),
        made.answer_BC.tolist(),
        strict=True,
    ):
        piece, *questions = (spoken(speaker, prompt) + spoken(speaker, row)).split(asked)
        assert any(piece in spoken(speaker, whole) for whole in ordinary.ids_BT.tolist())
        seen = []
        for question in questions:
            *lines, answer = question.split("\n")[: len(LETTERS) + 1]
            if not answer.startswith("Answer: "):
                break  # the row's last question, cut
            options = dict(line.split(". ") for line in lines)
            assert list(options) == list(LETTERS)
            (right,) = [letter for letter, word in options.items() if f" {word}" in piece]
            assert answer == f"Answer: {right}"
            places.add(right)
            seen += options.values()
        assert len(set(seen)) == len(seen), "a word of one question tells nothing of another's"
        letters = [spoken(speaker, [t])[1:] for t, is_ in zip(row, answers, strict=True) if is_]
        assert answers[0] and len(letters) == len(seen) // len(LETTERS) == 3
        assert set(letters) <= set(LETTERS)
    assert places == set(LETTERS)


def test_choices_are_a_seeds_own_and_none_without_room_words_or_tokenizer(speaker, monkeypatch):
    ordinary = words(speaker)
    one, same, other = (choices(speaker, ordinary, 4, seed=seed).batch for seed in (0, 0, 1))
    assert torch.equal(one.ids_BT, same.ids_BT) and not torch.equal(one.ids_BT, other.ids_BT)
    begun = choices(speaker, ordinary, 4, begin=1).batch
    assert bool((begun.prompt_BP[:, 0] == ordinary.prompt_BP[0, 0]).all())
    short = choices(speaker, words(speaker, prompt=P), 4)
    assert short.batch.ids_BT.shape == (0, P + 80) and short.answer_BC.shape == (0, 80)
    assert letters_known(speaker, words(speaker, prompt=P)) is None
    assert not len(choices(speaker, words(speaker, prompt=P, continuation=1), 4).batch)
    assert not len(choices(speaker, words(speaker, continuation=2000), 4).batch), "of new words"
    monkeypatch.setattr(speaker, "tokenizer", None)
    assert not len(choices(speaker, ordinary, 4).batch)


def test_a_quarter_asks_for_letters_and_copies_stand_in_for_it(speaker):
    ordinary = words(speaker)
    made = recall_rows(ordinary, 20, asked=speaker)
    assert len(made) == 20
    asked = [QUESTION[:20] in spoken(speaker, row) for row in made.prompt_BP.tolist()]
    assert sum(asked) == 5
    other = recall_rows(ordinary, 20, asked=speaker, seed=1)
    assert not torch.equal(made[torch.tensor(asked)].ids_BT, other[torch.tensor(asked)].ids_BT)
    short = words(speaker, prompt=P)
    assert len(recall_rows(short, 20, asked=speaker)) == 20


def test_the_likelihood_of_letters_is_that_of_a_whole_run(speaker):
    ordinary = words(speaker)
    sample = choices(speaker, ordinary, SAMPLE, seed=3)
    with torch.inference_mode():
        logits = forward(Pair.dense(speaker), sample.batch, Gates.dense(speaker.num_layers))
    logp = F.log_softmax(logits, -1).gather(-1, sample.batch.continuation_BC[..., None])[..., 0]
    means = [float(row[at].mean()) for row, at in zip(logp, sample.answer_BC, strict=True)]
    wanted = math.exp(sum(means) / SAMPLE)
    assert letters_known(speaker, ordinary, seed=3) == pytest.approx(wanted, rel=1e-4)
    assert wanted < 0.25, "a random model does not know them"


@pytest.mark.parametrize("known", [KNOWN + 0.01, KNOWN, None])
def test_training_asks_for_letters_where_the_dense_model_knows_them(
    speaker, tmp_path, monkeypatch, known
):
    path = tmp_path / "words.txt"
    path.write_text(spoken(speaker, words(speaker, rows=60).ids_BT.flatten().tolist()))
    config = TrainConfig(
        text=(str(path),), stage="prefill", prompt_tokens=LONG, continuation_tokens=40,
        sequences=20, held_out=8,
    )  # fmt: skip
    looked = []
    monkeypatch.setattr(
        recall_training, "letters_known", lambda model, text, **_: looked.append(len(text)) or known
    )
    said: list[str] = []
    both = training_text(speaker, config, silent, said.append)
    assert looked == [20], "once, on the text that is trained on"
    for part, rows in zip(both, (20, 8), strict=True):
        assert len(part) == 2 * rows
        asks = [QUESTION[:20] in spoken(speaker, row) for row in part.prompt_BP[rows:].tolist()]
        assert sum(asks) == (rows // 4 if known and known > KNOWN else 0)
        if not any(asks):
            plain = recall_rows(part[:rows], rows, seed=config.seed)
            assert torch.equal(part[rows:].ids_BT, plain.ids_BT)
    again = training_text(speaker, config, silent, said.append)
    assert all(torch.equal(a.ids_BT, b.ids_BT) for a, b in zip(both, again, strict=True))
    assert ("asks for letters" in said[-1]) == bool(known and known > KNOWN)


@pytest.mark.parametrize("share", [-1.0, 100.5, math.nan, math.inf])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(PdtrimError, match=r"--recall .* is a share of the other sequences"):
        TrainConfig(recall=share)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_seconds"])
def test_a_training_takes_no_nan(name):
    with pytest.raises(PlanError):
        DistillConfig(**{name: math.nan})
