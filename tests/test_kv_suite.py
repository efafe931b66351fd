"""Retrieval under KV policies, against greedy generation, and the checks of its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers import first_last, reference_logits, tiny_model, trimmed
from pdtrim.errors import ModelError, PdtrimError
from pdtrim.evaluate.kv_suite import KvSuiteConfig, retrieval_scores, run_suite, summarize
from pdtrim.evaluate.retrieval import Probe
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kv.selectors import FirstLast, Random, SnapKV
from pdtrim.models.loading import load_model
from pdtrim.models.narrow import narrow_blocks
from pdtrim.plan import Gates, LayerKV, Width
from pdtrim.stage.forward import Batch, Pair

LAYERS = 4
DENSE = Gates.dense(LAYERS)
FULL = HandoverPolicy.full(LAYERS)
WHOLE = (first_last(500, 500),) * LAYERS  # keeps everything, and is asked
WATCHED = HandoverPolicy(rules=WHOLE)
ENDS = HandoverPolicy(rules=(first_last(1, 1),) * LAYERS)
# (context, question, answer) lengths in words; two groups can be batched, one probe stands alone
SHAPES = [(9, 4, 3)] * 6 + [(12, 3, 2)] * 5 + [(7, 5, 4)]


@pytest.fixture(scope="module")
def model(tiny_folder):
    model = load_model(str(tiny_folder), dtype="float32")
    with torch.no_grad():  # special tokens are never the likeliest: greedy answers are plain words
        model.network.lm_head.weight[:3] = 0
    return model


def words(ids: list[int]) -> str:
    return " ".join(f"w{i - 3}" for i in ids)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) + 3 for word in text.split()]


def greedy(model, prompt: list[int], count: int, *, handed: int, policy: str) -> list[int]:
    """Token by token, each by one whole forward of transformers' own layers.

    ``handed``: prompt tokens that were prefilled; with policy ``ends`` decode sees two of them.
    """
    said: list[int] = []
    kept = {layer: {0, handed - 1} for layer in range(LAYERS)} if policy == "ends" else None
    for _ in range(count):
        ids = torch.tensor([[*prompt, *said, 0]])  # the last one is never read
        batch = Batch(prompt_BP=ids[:, : handed + 1], continuation_BC=ids[:, handed + 1 :])
        logits = reference_logits(model, batch, DENSE, kept)[0, -1]
        said.append(int(logits.argmax()))
    return said


@pytest.fixture(scope="module")
def probes(model) -> list[Probe]:
    """Every other answer is what greedy generation says with everything kept."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, (context, question, answer) in enumerate(SHAPES):
        ids = torch.randint(3, 64, (context + question,), generator=generator).tolist()
        said = greedy(model, ids, answer, handed=len(ids) - 1, policy="full")
        if i % 2:
            said[i % answer] = 3 + (said[i % answer] - 3 + 1) % 61  # one token off, anywhere
        made.append(
            Probe(
                task="needle",
                context=words(ids[:context]),
                question=" " + words(ids[context:]),
                answer=" " + words(said),
                depth=0.5,
            )
        )
    return made


def expected(model, probes, policy: str, *, hidden: bool, begin: tuple[int, ...] = ()) -> list[int]:
    hits = []
    for probe in probes:
        prompt = [*begin, *ids_of(probe.prompt)]
        answer = ids_of(probe.answer)
        at = len(begin) + len(ids_of(probe.context)) if hidden else len(prompt)
        hits.append(int(greedy(model, prompt, len(answer), handed=at - 1, policy=policy) == answer))
    return hits


def scores(model, probes, policy=FULL, **how) -> list[int]:
    how = {"hidden": False, **how}
    found = retrieval_scores(trimmed(Pair.dense(model), DENSE), {"it": policy}, probes, **how)
    assert list(found) == ["it"] and set(found["it"].tolist()) <= {0, 1}
    return found["it"].tolist()


@pytest.mark.parametrize("hidden", [False, True])
def test_exact_match_is_what_greedy_generation_says(model, probes, hidden):
    hits = scores(model, probes, hidden=hidden)
    assert hits == expected(model, probes, "full", hidden=hidden)
    assert hits == [1, 0] * 6


def test_the_prompt_as_transformers_generates_it(model, probes):
    hits = []
    for probe in probes:
        prompt, answer = ids_of(probe.prompt), ids_of(probe.answer)
        out = model.network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            min_new_tokens=len(answer),
            max_new_tokens=len(answer),
        )
        hits.append(int(out[0, len(prompt) :].tolist() == answer))
    assert scores(model, probes) == hits


@pytest.mark.parametrize("hidden", [False, True])
def test_dropped_tokens_are_not_seen(model, probes, hidden):
    cut = scores(model, probes, ENDS, hidden=hidden)
    assert cut == expected(model, probes, "ends", hidden=hidden)
    assert sum(cut) < sum(scores(model, probes, hidden=hidden))


@pytest.mark.parametrize("hidden", [False, True])
def test_an_answer_made_without_the_needle_is_found_without_it_only(model, probes, hidden):
    said = []
    for probe in probes:
        prompt, count = ids_of(probe.prompt), len(ids_of(probe.answer))
        handed = len(ids_of(probe.context)) - 1 if hidden else len(prompt) - 1
        ids = greedy(model, prompt, count, handed=handed, policy="ends")
        said.append(
            Probe(
                task="needle",
                context=probe.context,
                question=probe.question,
                answer=" " + words(ids),
                depth=0.5,
            )
        )
    assert scores(model, said, ENDS, hidden=hidden) == [1] * len(said)
    assert sum(scores(model, said, hidden=hidden)) < len(said)
    assert sum(scores(model, said, ENDS, hidden=not hidden)) < len(said)


@pytest.fixture
def shown(monkeypatch):
    """Shapes of what the selectors of WATCHED are shown."""
    shapes = []
    plain = FirstLast.keep

    def keep(self, view, *, block_size):
        if self == WHOLE[0].selector:
            shapes.append(tuple(view.k_BGND.shape))
        return plain(self, view, block_size=block_size)

    monkeypatch.setattr(FirstLast, "keep", keep)
    return shapes


@pytest.mark.parametrize("hidden", [False, True])
def test_a_selector_sees_the_question_only_where_it_is_visible(model, probes, hidden, shown):
    scores(model, probes, WATCHED, hidden=hidden)
    lengths = {c - 1 if hidden else c + q - 1 for c, q, _ in SHAPES}
    assert {shape[2] for shape in shown} == lengths
    # 6 rows as 4 and 2, 5 as 4 and 1, and one alone: batched, and each seen by every layer
    assert sum(shape[0] for shape in shown) == LAYERS * len(SHAPES)
    assert len(shown) == LAYERS * 5


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        first_last(2, 3),
        LayerKV(selector=SnapKV(share=0.5, window=2)),
        LayerKV(codec=parse_codec("int4")),
    ],
)
def test_batched_equals_one_by_one(model, probes, rule, hidden):
    policy = HandoverPolicy(rules=(rule,) * LAYERS)
    alone = [scores(model, [probe], policy, hidden=hidden)[0] for probe in probes]
    assert scores(model, probes, policy, hidden=hidden) == alone
    assert scores(model, probes[::-1], policy, hidden=hidden) == alone[::-1]


def beginning(model, tokenizer):
    """The model with another tokenizer."""
    copy = tiny_model("llama", vocab_size=64)
    copy.network, copy.blocks, copy.tokenizer = model.network, model.blocks, tokenizer
    return copy


def test_the_begin_token_opens_each_prompt(model, probes, tiny_folder, shown):
    raw = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    other = beginning(model, tokenizer)
    said = []
    for probe in probes:
        ids = [1, *ids_of(probe.prompt)]
        count = len(ids_of(probe.answer))
        answer = words(greedy(model, ids, count, handed=len(ids) - 1, policy="full"))
        said.append(
            Probe(
                task="needle",
                context=probe.context,
                question=probe.question,
                answer=" " + answer,
                depth=0.5,
            )
        )
    for hidden in (False, True):
        assert scores(other, said, hidden=hidden) == [1] * len(said)
        found = scores(other, probes, ENDS, hidden=hidden)
        assert found == expected(model, probes, "ends", hidden=hidden, begin=(1,))
    assert sum(scores(model, said)) < len(said)  # without it these are other prompts
    shown.clear()
    scores(other, probes, WATCHED)
    assert {shape[2] for shape in shown} == {c + q for c, q, _ in SHAPES}


def probe_of(context="w1 w2 w3", question=" w4", answer=" w5 w6") -> Probe:
    return Probe(task="needle", context=context, question=question, answer=answer, depth=0.5)


@pytest.mark.parametrize("hidden", [False, True])
def test_probes_that_say_nothing_are_refused(model, hidden):
    with pytest.raises(PdtrimError, match="blind to the KV cache"):
        scores(model, [probe_of(), probe_of(answer=" w5")], hidden=hidden)
    if hidden:
        with pytest.raises(PdtrimError, match="prompt is empty"):
            scores(model, [probe_of(context="")], hidden=True)
    with pytest.raises(ModelError, match="tokenizer"):
        scores(tiny_model("llama"), [probe_of()], hidden=hidden)


def test_one_word_of_context_is_enough(model):
    scores(model, [probe_of(context="w1")], hidden=True)  # nothing is handed over


def array(*values: int):
    return np.array(values, dtype=np.int64)


def hits_of(visible, hidden):
    """Two tasks of two probes each."""
    return {
        "a_visible": array(*visible[:2]),
        "b_visible": array(*visible[2:]),
        "a_hidden": array(*hidden[:2]),
        "b_hidden": array(*hidden[2:]),
    }


def test_means_and_differences_by_hand():
    found = summarize(
        {
            "full": hits_of((1, 1, 1, 1), (1, 1, 0, 1)),
            "cut": hits_of((0, 0, 0, 0), (1, 1, 1, 1)),
        },
        seed=0,
    )
    cut = found["cut"]
    assert (cut["a_visible"], cut["b_hidden"], found["full"]["b_hidden"]) == (0, 1, 0.5)
    assert (cut["retrieval_visible"], cut["retrieval_hidden"]) == (0, 1)
    assert found["full"]["retrieval_hidden"] == 0.75
    # every probe loses: no resampling changes that
    for bound in ("", "_low", "_high"):
        assert cut[f"retrieval_visible_delta{bound}"] == -100
        assert found["full"][f"retrieval_visible_delta{bound}"] == 0
    # one of four gains: resampled means are k/4 with k ~ Binomial(4, 1/4), whose 97.5 % point is 3
    assert cut["retrieval_hidden_delta"] == 25
    assert (cut["retrieval_hidden_delta_low"], cut["retrieval_hidden_delta_high"]) == (0, 75)


def test_differences_pair_probes_whatever_the_order_of_the_keys():
    hits = hits_of((1, 0, 0, 1), (0, 1, 1, 0))
    found = summarize({"full": hits, "same": dict(reversed(hits.items()))}, seed=0)
    for view in ("visible", "hidden"):
        for bound in ("", "_low", "_high"):
            assert found["same"][f"retrieval_{view}_delta{bound}"] == 0


@pytest.fixture(scope="module")
def letters():
    """A tiny model that reads letter by letter, so that any text is many tokens."""
    alphabet = ["<unk>", "<s>", "</s>"] + [chr(c) for c in range(32, 127)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(alphabet)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model = tiny_model("llama", vocab_size=98)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    return model


def test_the_suite_end_to_end(letters, shown):
    config = KvSuiteConfig(tasks=("needle", "system"), probes=3, tokens=200, seed=4)
    told: list[float] = []

    class Bar:
        def __init__(self, what, total):
            told.append(-total)

        def __enter__(self):
            return told.append

        def __exit__(self, *error):
            return None

    policies = {"ends": ENDS, "random": HandoverPolicy(rules=(LayerKV(selector=Random()),) * 4)}
    policies["watched"] = WATCHED
    result = run_suite(trimmed(Pair.dense(letters), DENSE), policies, config, Bar)
    assert list(result) == ["full", "ends", "random", "watched"]
    assert sum(told) == pytest.approx(0) and min(told) == -2 * 3 * 4
    tasks_views = {f"{t}_{v}" for t in ("needle", "system") for v in ("visible", "hidden")}
    for name, row in result.items():
        assert all(isinstance(value, float) for value in row.values())
        assert tasks_views < set(row) and "retrieval_hidden_delta_low" in row
        assert set(result.hits[name]) == tasks_views
        for key, hits_n in result.hits[name].items():
            assert hits_n.shape == (3,) and row[key] == hits_n.mean()
    # visible prompts of at most 200 tokens come first, one of which decode reads
    seen = [N for B, _, N, _ in shown for _ in range(B)]
    visible, hidden = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(hidden) == 2 * 3 * LAYERS
    assert 150 < max(visible) < 200 and max(hidden) < min(visible)
    assert result["full"]["kept_at_most"] == result["watched"]["kept_at_most"] == 1
    share = float(np.mean([2 / n for n in hidden]))
    assert result["ends"]["kept_at_most"] == pytest.approx(share)
    again = run_suite(trimmed(Pair.dense(letters), DENSE), policies, config)
    assert again == result


def test_shares_count_the_layers_that_hand_over(letters):
    config = KvSuiteConfig(tasks=("needle",), probes=2, tokens=200)
    gates = Gates.removing(LAYERS, prefill={3}, decode={3})
    half = HandoverPolicy(rules=(*ENDS.rules[:2], *FULL.rules[2:]))
    one = run_suite(trimmed(Pair.dense(letters), DENSE), {"it": half}, config)["it"]["kept_at_most"]
    two = run_suite(trimmed(Pair.dense(letters), gates), {"it": half}, config)["it"]["kept_at_most"]
    ends = 2 * one - 1
    assert 0 < ends < 0.05
    assert two == pytest.approx((2 * ends + 1) / 3)


def test_the_reference_sends_the_heads_that_decode_has(letters):
    width = Width.of(groups=[1], neurons=range(8), num_neurons=8)
    width = width.model_copy(update={"neurons": "f" * (letters.config.intermediate_size // 4)})
    pair = Pair(prefill=letters, decode=narrow_blocks(letters, {1: width}))
    places = (None, (1,), None, None)
    sent = HandoverPolicy(rules=(LayerKV(),) * LAYERS, places=places)
    found = run_suite(
        trimmed(pair, DENSE, sent),
        {"it": sent},
        KvSuiteConfig(tasks=("needle",), probes=2, tokens=200),
    )
    assert found["it"] == found["full"]


def test_a_reference_that_drops_is_refused(letters):
    with pytest.raises(PdtrimError, match="every pair"):
        run_suite(trimmed(Pair.dense(letters), DENSE), {"full": ENDS})


@pytest.mark.parametrize(
    "wrong",
    [{"tasks": ()}, {"tasks": ("needle", "needle")}, {"tasks": ("other",)}, {"probes": 1}],
)
def test_senseless_suites_are_refused(wrong):
    with pytest.raises(PdtrimError):
        KvSuiteConfig(**wrong)
