"""Recall's questions with four options: what they ask, and of which model."""

from pathlib import Path

import pytest
import torch

from pdtrim.calibration import recall
from pdtrim.calibration.choices import LETTERS
from pdtrim.calibration.recall import ALL, FEW, recall_text
from pdtrim.calibration.recall_training import KNOWN, letters_known
from pdtrim.calibration.tokens import encode_for
from pdtrim.stage.forward import Batch

TEXT = Path(__file__).parents[1] / "docs" / "design.md"
SEQUENCES, TOKENS = 6, 150


@pytest.fixture(scope="module")
def text(smollm2):
    ids = encode_for(smollm2, TEXT.read_text())[: SEQUENCES * TOKENS]
    return Batch.cut(torch.tensor(ids).view(SEQUENCES, TOKENS), 100)


def rows_of(made):
    return [made.batch.ids_BT[at :: made.rows] for at in range(made.rows)]


def test_every_second_sequence_asks_which_word_it_holds(smollm2, text, monkeypatch):
    monkeypatch.setattr(recall, "SURE", 1e-9)  # the model is asked whatever it thinks
    made = recall_text(smollm2, text)
    asked = 0
    for number in range(SEQUENCES):
        row = made[number : number + 1]
        prompt = smollm2.tokenizer.decode(row.batch.prompt_BP[FEW.count - 1])
        if number % 2 == 0:
            assert "Which of these words" not in prompt
            continue
        piece, question = prompt.split("\nQuestion: Which of these words is in the text above?\n")
        options = dict(line.split(". ") for line in question.splitlines()[:-1])
        assert question.endswith("Answer:") and list(options) == list(LETTERS)
        whole = smollm2.tokenizer.decode(text.ids_BT[number])
        held = [letter for letter, word in options.items() if f" {word}" in piece]
        assert len(held) == 1 and piece.strip() in whole
        answers = row.answer_BC[FEW.count - 1]
        assert answers.tolist() == [True] + [False] * (len(answers) - 1)
        letter = smollm2.tokenizer.decode(row.batch.continuation_BC[FEW.count - 1, :1])
        assert letter == f" {held[0]}"
        asked += 1
    assert asked == SEQUENCES // 2
    everywhere = rows_of(recall_text(smollm2, text, rows=ALL))[-1]
    prompts = smollm2.tokenizer.batch_decode(everywhere)
    assert all("Which of these words" in prompt for prompt in prompts)


def test_a_model_that_does_not_know_letters_is_not_asked(smollm2, text, monkeypatch):
    """Its rows are those it would have had without such questions, of the other kinds too."""
    monkeypatch.setattr(recall, "SURE", 0.999)
    without = recall_text(smollm2, text)
    assert "Which of these" not in str(smollm2.tokenizer.batch_decode(without.batch.prompt_BP))
    monkeypatch.setattr(recall, "SURE", 1e-9)
    asked = recall_text(smollm2, text)
    first, second, last = (
        [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(rows_of(without), rows_of(asked), strict=True)
    )
    assert all(first) and all(second)
    assert last[0] and not any(last[1::2])


def test_pairs_a_copy_and_a_question_of_every_sequence(smollm2, text):
    made = recall_text(smollm2, text, rows=ALL)
    for number in range(SEQUENCES):
        prompts = smollm2.tokenizer.batch_decode(made[number : number + 1].batch.prompt_BP)
        pairs, copy, question = prompts[ALL.returns :]
        assert all(line.count(":") == 1 for line in pairs.splitlines()[-3:])
        piece, _, cue = copy.rpartition("\n")
        assert cue in piece
        assert "What comes after" in question and "What comes after" not in pairs + copy


def test_training_does_not_ask_smollm2(smollm2, text):
    assert 0 < letters_known(smollm2, text) < KNOWN / 2
