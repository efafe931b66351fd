"""Retrieval probes: each answer is there to be found, once, at the depth that is claimed."""

from __future__ import annotations

import random
import re

import pytest

from pdtrim.errors import PdtrimError
from pdtrim.evaluate import retrieval
from pdtrim.evaluate.retrieval import Probe, generate, tasks

FACT = re.compile("secret code|number in the|holds the same number|^Rule:")


def sentences(probe: Probe) -> list[str]:
    return [f"{part}." for part in probe.context.removesuffix(".").split(". ")]


def filler(probe: Probe) -> list[str]:
    return [line for line in sentences(probe) if not FACT.search(line)]


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(params=tasks())
def task(request) -> str:
    return request.param


def test_names():
    assert tasks() == ("needle", "multikey", "tracking", "system")


def test_same_seed_same_probes_and_another_seed_others(task):
    first = generate(task, count=6, seed=3)
    assert generate(task, count=6, seed=3) == first
    others = generate(task, count=6, seed=4)
    assert all(a.prompt != b.prompt for a, b in zip(first, others, strict=True))
    assert len({probe.prompt for probe in first}) == 6


def test_a_longer_run_asks_the_same_questions_first(task):
    short, long = generate(task, count=3, seed=3), generate(task, count=9, seed=3)
    assert [p.question + p.answer for p in short] == [p.question + p.answer for p in long[:3]]


def test_the_answer_follows_the_prompt_without_a_doubtful_space(task):
    for probe in generate(task, count=10, seed=0):
        assert probe.prompt == probe.context + probe.question
        assert not probe.question.endswith(" ")
        assert re.fullmatch(r" (\d{5,7}|[a-z]+-[a-z]+)", probe.answer)
        assert probe.answer.strip() not in probe.question
        assert probe.context.count(probe.answer.strip()) == 1


def test_filler_has_no_digits_no_repeats_and_no_words_of_the_question(task):
    for probe in generate(task, count=5, seed=1, words=3000):
        lines = filler(probe)
        assert 3000 <= sum(map(words, lines)) < 3020
        assert len(set(lines)) == len(lines)
        assert not re.search(r"\d", "".join(lines))
        keys = re.findall(r"(?:for|in the) (\w+)(?: box)?\?", probe.question)
        assert len(keys) == (task != "system")
        assert not any(re.search(rf"\b{key}\b", line, re.I) for key in keys for line in lines)
        assert all(re.fullmatch(r"[A-Z][a-z ,]+\.", line) for line in lines)


def test_filler_does_not_repeat_itself_though_words_are_few(monkeypatch):
    for name in ("PEOPLE", "MANNERS", "ACTIONS", "THINGS", "TIMES", "PREPOSITIONS"):
        monkeypatch.setattr(retrieval, name, getattr(retrieval, name)[:1])
    for probe in generate("needle", count=3, seed=0, words=800):
        lines = filler(probe)
        assert len(set(lines)) == len(lines)


def test_no_number_is_part_of_another():
    numbers = sorted(retrieval._numbers(random.Random(0), 1000), key=len)
    text = " ".join(numbers)
    assert all(text.count(number) == 1 for number in numbers)


@pytest.mark.parametrize("asked", ["needle", "multikey", "tracking"])
def test_the_fact_stands_at_its_depth(asked):
    probes = generate(asked, count=11, seed=2, words=800)
    assert [probe.depth for probe in probes] == [pytest.approx(i / 10) for i in range(11)]
    for probe in probes:
        lines, own = sentences(probe), set(filler(probe))
        place = next(i for i, line in enumerate(lines) if probe.answer.strip() in line)
        before = sum(line in own for line in lines[:place])
        assert before == pytest.approx(probe.depth * len(own), abs=0.5)
    assert generate(asked, count=1, seed=0)[0].depth == 0.5


def test_the_fact_is_in_the_words_of_the_question():
    for probe in generate("needle", count=5, seed=0):
        cue = probe.question.split("Answer: ")[1]
        assert f"{cue}{probe.answer}." in sentences(probe)
        assert len(re.findall(r"\d+", probe.context)) == 1


def test_multikey_distractors_have_other_words_and_other_numbers():
    for probe in generate("multikey", count=10, seed=0):
        pairs = re.findall(r"The secret code for (\w+) is (\d+)\.", probe.context)
        keys, numbers = zip(*pairs, strict=True)
        assert len(pairs) == len(set(keys)) == len(set(numbers)) == 5
        assert not any(a in b for a in numbers for b in numbers if a is not b)
        asked = re.search(r"code for (\w+)\?", probe.question).group(1)
        assert f" {dict(pairs)[asked]}" == probe.answer


def test_only_the_chain_leads_to_the_answer():
    for probe in generate("tracking", count=12, seed=0):
        value: dict[str, str] = {}
        for line in sentences(probe):  # read in order, as the model does: no link comes too early
            if found := re.fullmatch(r"The number in the (\w+) box is (\d+)\.", line):
                value[found[1]] = found[2]
            if found := re.fullmatch(r"The (\w+) box holds the same .* as the (\w+) box\.", line):
                assert found[1] not in value
                value[found[1]] = value[found[2]]
        asked = re.search(r"in the (\w+) box\?", probe.question).group(1)
        assert f" {value[asked]}" == probe.answer
        assert sorted(list(value.values()).count(number) for number in set(value.values())) == [
            3,
            3,
        ]
        assert f"The number in the {asked} box is" not in probe.context


def test_the_rule_opens_the_prompt_and_the_question_applies_it():
    for probe in generate("system", count=5, seed=0):
        assert probe.depth == 0.0
        rule = sentences(probe)[0]
        assert (
            rule == f"Rule: every answer ends with the password, and the password is{probe.answer}."
        )
        assert probe.question.endswith(", and the password is")


@pytest.mark.parametrize("budget", [90, 256, 1000])
def test_the_token_budget_is_used_and_never_exceeded(task, budget):
    for probe in generate(task, count=7, seed=0, count_tokens=words, tokens=budget):
        assert budget - 20 < words(probe.prompt) <= budget


def test_what_cannot_be_generated_is_refused():
    with pytest.raises(PdtrimError, match="unknown retrieval task 'haystack': choose from needle"):
        generate("haystack", count=1, seed=0)
    with pytest.raises(PdtrimError, match="count of at least 1"):
        generate("needle", count=0, seed=0)
    with pytest.raises(PdtrimError, match="together"):
        generate("needle", count=1, seed=0, tokens=100)
    with pytest.raises(PdtrimError, match="together"):
        generate("needle", count=1, seed=0, count_tokens=words)
    with pytest.raises(PdtrimError, match="no room"):
        generate("needle", count=1, seed=0, count_tokens=words, tokens=10)


@pytest.mark.parametrize(
    "wrong", [{"depth": 1.1}, {"depth": float("nan")}, {"question": "is "}, {"answer": "12345"}]
)
def test_a_probe_refuses_a_bad_depth_and_a_doubtful_space(wrong):
    good = {"task": "needle", "context": "", "question": "is", "answer": " 12345", "depth": 0.5}
    Probe(**good)
    with pytest.raises(PdtrimError, match="probe's"):
        Probe(**{**good, **wrong})
