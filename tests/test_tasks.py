"""Requests of benchmark tasks under prefill/decode inference, held against the simulator."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from helpers import first_last, make_plan, pair_of, random_gates, tiny_model
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.tasks import likelihood, ragged
from pdtrim.evaluate.tasks.generation import generate_greedy
from pdtrim.evaluate.tasks.likelihood import Query, score
from pdtrim.evaluate.tasks.lm import PDTrimLM
from pdtrim.kv.codecs import Integer
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kv.selectors import SnapKV
from pdtrim.models.loading import load_model
from pdtrim.plan import Gates, LayerKV, Width, Widths
from pdtrim.stage.forward import Batch, Pair, Trimmed, forward
from pdtrim.stage.generate import prefill

CLOSED = Gates(
    prefill_attention=("full", "kv", "full", "off"),
    prefill_mlp=(True, False, True, False),
    decode_attention=(True, True, False, False),
    decode_mlp=(True, True, False, True),
)
INT4 = LayerKV(codec=Integer(k_bits=4, v_bits=4, group=4, first=1, recent=2))


def variant_of(model, *, gates=None, rules=None):
    L = model.num_layers
    policy = HandoverPolicy(rules=rules) if rules else HandoverPolicy.full(L)
    return Trimmed(pair=Pair.dense(model), gates=gates or Gates.dense(L), policy=policy)


def variants(model):
    full = LayerKV()
    return {
        "dense": variant_of(model),
        "closed gates": variant_of(model, gates=CLOSED),
        "random gates": variant_of(model, gates=random_gates(4, random.Random(3))),
        "first and last": variant_of(model, rules=(first_last(1, 2), full, first_last(2, 3), full)),
        "int4": variant_of(model, rules=(INT4, full, INT4, INT4)),
        "by content": variant_of(
            model,
            gates=CLOSED,
            rules=(
                LayerKV(selector=SnapKV(share=0.5, first=1, window=3)),
                full,
                first_last(1, 1),
                full,
            ),
        ),
    }


def queries(*, vocabulary=97, seed=0):
    """Contexts of 1 to 40 tokens; some answers share their start, some their context."""
    rng = random.Random(seed)

    def tokens(n):
        return tuple(rng.randrange(vocabulary) for _ in range(n))

    found = []
    for length in (7, 1, 40, 12, 12, 2, 23):
        context, stem = tokens(length), tokens(3)
        answers = [tokens(1), tokens(1), (*stem, 4), (*stem, 5), stem, tokens(9)]
        found += [Query(context=context, continuation=answer) for answer in answers[: length % 6]]
        found.append(Query(context=context, continuation=answers[-1]))
    rng.shuffle(found)
    return found


@torch.no_grad()
def by_simulator(variant, query):
    batch = Batch(
        prompt_BP=torch.tensor([query.context]), continuation_BC=torch.tensor([query.continuation])
    )
    logits = forward(variant.pair, batch, variant.gates, variant.policy)[0].float()
    logp = F.log_softmax(logits, -1)
    target = batch.continuation_BC[0]
    return float(logp.gather(-1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral: a window shorter than contexts
@pytest.mark.parametrize("budget", [60, 100_000])
@pytest.mark.parametrize("name", list(variants(tiny_model())))
def test_each_likelihood_equals_the_simulator(family, budget, name, monkeypatch):
    monkeypatch.setattr(likelihood, "CPU_TOKENS", 1_000_000)
    monkeypatch.setattr(likelihood, "head_rows", lambda device: 5)  # borders within a batch
    variant = variants(tiny_model(family))[name]
    asked = queries()
    found = score(variant, asked, batch_tokens=budget)
    for query, one in zip(asked, found, strict=True):
        total, greedy = by_simulator(variant, query)
        assert one.total == pytest.approx(total, abs=2e-4)
        assert one.greedy == greedy


@pytest.mark.parametrize("kv", [LayerKV(), first_last(1, 2), INT4], ids=["full", "cut", "int4"])
def test_only_the_heads_that_decode_has_are_handed_over(kv):
    model = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    plan = make_plan(model, Gates.dense(4), (kv,) * 4)
    narrow = Width.of(groups=(0, 3), neurons=range(40), num_neurons=48)
    widths = Widths(prefill=(None,) * 4, decode=(None, narrow, narrow, None))
    plan = plan.model_copy(update={"widths": widths})
    variant = Trimmed.of(plan, pair_of(plan, model, None))
    for query, one in zip(queries(), score(variant, queries(), batch_tokens=200), strict=True):
        assert one.total == pytest.approx(by_simulator(variant, query)[0], abs=2e-4)


def test_the_variants_of_this_file_differ():
    found = [
        [one.total for one in score(variant, queries(), batch_tokens=500)]
        for variant in variants(tiny_model()).values()
    ]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.05


def test_the_dense_variant_equals_transformers():
    model = tiny_model()
    asked = queries()
    for query, one in zip(asked, score(variant_of(model), asked, batch_tokens=200), strict=True):
        ids = torch.tensor([query.context + query.continuation])
        with torch.no_grad():
            logp = F.log_softmax(model.network(ids[:, :-1]).logits[0], -1)
        C = len(query.continuation)
        expected = logp[-C:].gather(-1, ids[0, -C:, None]).sum()
        assert one.total == pytest.approx(float(expected), abs=2e-4)


def greedy_by_simulator(variant, prompt, tokens):
    """Token by token, each from a forward of its own."""
    said = []
    for _ in range(tokens):
        batch = Batch(prompt_BP=torch.tensor([prompt]), continuation_BC=torch.tensor([[*said, 0]]))
        with torch.no_grad():
            logits = forward(variant.pair, batch, variant.gates, variant.policy)
        said.append(int(logits[0, -1].argmax()))
    return said


def test_what_greedy_decoding_says_is_called_greedy():
    variant = variants(tiny_model())["closed gates"]
    context = (3, 14, 15, 9, 26)
    said = tuple(greedy_by_simulator(variant, context, 4))
    wrong = (*said[:-1], (said[-1] + 1) % 97)
    asked = [Query(context=context, continuation=one) for one in (said, wrong, said[:2])]
    found = score(variant, asked, batch_tokens=100)
    assert [one.greedy for one in found] == [True, False, True]


@pytest.fixture
def ran(monkeypatch):
    """Tokens that each stage ran, as [prefill rows, decode rows] of every batch."""
    batches = []
    decode_block = ragged.decode_block

    def count_prefill(model, ids, gates):
        batches.append([ids.shape[0], None])
        return prefill(model, ids, gates)

    def count_decode(block, y, *args, **kwargs):
        batches[-1][1] = y.shape[0]
        return decode_block(block, y, *args, **kwargs)

    monkeypatch.setattr(ragged, "prefill", count_prefill)
    monkeypatch.setattr(ragged, "decode_block", count_decode)
    return batches


def test_a_context_is_prefilled_once_and_one_token_answers_share_a_row(ran):
    variant = variant_of(tiny_model())
    letters = [Query(context=(5, 6, 7), continuation=(i,)) for i in range(4)]
    texts = [Query(context=(8, 9), continuation=(i, 1, 2)) for i in range(3)]
    score(variant, letters + texts, batch_tokens=1000)
    assert ran == [[2, 1 + 3]]


def test_batches_keep_to_the_budget(ran):
    variant = variant_of(tiny_model())
    asked = [Query(context=(1,) * n, continuation=(2, 3)) for n in range(1, 21)]
    score(variant, asked, batch_tokens=45)
    assert sum(prefilled for prefilled, _ in ran) == 20
    assert ran[0] == [2, 2]  # 2 contexts of 20 tokens and 2 answers of 2
    assert len(ran) < 10


@pytest.mark.parametrize("name", ["dense", "first and last", "closed gates"])
@pytest.mark.parametrize("budget", [1, 70, 1000])
def test_generation_equals_the_simulator_step_by_step(name, budget):
    variant = variants(tiny_model())[name]
    prompts = [(3, 1, 4, 1, 5), (9,), (2, 6, 5, 3, 5, 8, 9, 7, 9), (3, 2)]
    new = generate_greedy(
        variant, prompts, max_new_tokens=6, finished=lambda ids: False, batch_tokens=budget
    )
    assert new == [greedy_by_simulator(variant, prompt, 6) for prompt in prompts]


def test_generation_keeps_to_the_budget(monkeypatch):
    tokens = []
    monkeypatch.setattr(
        ragged,
        "prefill",
        lambda model, ids, gates: tokens.append(ids.shape) or prefill(model, ids, gates),
    )
    prompts = [(1,) * n for n in (2, 9, 3, 8, 4)]
    generate_greedy(
        variant_of(tiny_model()),
        prompts,
        max_new_tokens=3,
        finished=lambda ids: False,
        batch_tokens=24,
    )
    assert tokens == [(2, 8), (3, 3)]  # 2 rows of 9 + 3 tokens, then 3 of 4 + 3


def test_generation_ends_each_row_where_it_is_finished():
    variant = variant_of(tiny_model())
    prompts = [(3, 1, 4), (9, 9)]
    long = generate_greedy(
        variant, prompts, max_new_tokens=8, finished=lambda ids: False, batch_tokens=100
    )
    end = long[0][2]
    new = generate_greedy(
        variant, prompts, max_new_tokens=8, finished=lambda ids: ids[-1] == end, batch_tokens=100
    )
    assert new[0] == long[0][: long[0].index(end) + 1]
    assert end not in long[1] and new[1] == long[1]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(str(tiny_folder), dtype="float32")


def request(*args):
    return SimpleNamespace(args=args)


def test_text_is_split_behind_the_context(tiny):
    variant = variant_of(tiny, gates=CLOSED)
    pairs = [("w1 w2 w3", " w4"), ("w5 w6 ", "w7 w8"), ("", "w9 w9 w2"), ("w1", " w2 w3")]
    # ids of the tiny tokenizer: 1 begins a text, word wN is N + 3; nothing is put before texts
    tokens = [((4, 5, 6), (7,)), ((8, 9), (10, 11)), ((1,), (12, 12, 5)), ((4,), (5, 6))]
    found = PDTrimLM(variant).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (total, greedy) in zip(tokens, found, strict=True):
        query = Query(context=context, continuation=continuation)
        expected = by_simulator(variant, query)
        assert total == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_the_token_that_begins_texts_comes_once(tiny, monkeypatch):
    model = PDTrimLM(variant_of(tiny))
    monkeypatch.setattr(model, "_begin", [1])
    assert model.tok_encode("w1 w2") == [1, 4, 5]
    assert model.tok_encode("<s> w1") == [1, 4]
    assert model.tok_encode("w1", add_special_tokens=False) == [4]


def test_a_long_context_is_cut_on_the_left(tiny, monkeypatch):
    model = PDTrimLM(variant_of(tiny))
    monkeypatch.setattr(model, "max_length", 6)
    long, short = "w1 w2 w3 w4 w5 w6 w7 w8", "w4 w5 w6 w7 w8"
    (cut,) = model.loglikelihood([request(long, " w9 w1")])
    (whole,) = PDTrimLM(variant_of(tiny)).loglikelihood([request(short, " w9 w1")])
    assert cut == whole  # 6 tokens are read: 5 of the context and w9
    with pytest.raises(PdtrimError, match="7 tokens cannot be scored"):
        model.loglikelihood([request("w1", " w2" * 7)])


def test_equal_requests_are_run_once(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pdtrim.evaluate.tasks.lm.score",
        lambda variant, new, **kwargs: asked.extend(new) or score(variant, new, **kwargs),
    )
    model = PDTrimLM(variant_of(tiny))
    one, other = request("w1 w2", " w3"), request("w1 w2", " w4")
    first = model.loglikelihood([one, other, one])
    again = model.loglikelihood([other, one])
    assert len(asked) == 2
    assert first[0] == first[2] == again[1] and first[1] == again[0] != first[0]


def test_rolling_scores_every_token_once_behind_half_a_window(tiny):
    variant = variant_of(tiny, gates=CLOSED)
    text = "w1 w2 w3 w4 w5 w6 w7"
    ids = (1, 4, 5, 6, 7, 8, 9, 10)
    pieces = [(ids[:1], ids[1:4]), (ids[1:4], ids[4:7]), (ids[4:7], ids[7:])]
    expected = [by_simulator(variant, Query(context=c, continuation=new))[0] for c, new in pieces]
    model = PDTrimLM(variant, window=6)
    found = model.loglikelihood_rolling([request(text), request("w1")])
    assert found[0] == pytest.approx(sum(expected), abs=1e-4)
    alone = by_simulator(variant, Query(context=(1,), continuation=(4,)))[0]
    assert found[1] == pytest.approx(alone, abs=1e-4)


def test_generated_text_ends_before_its_first_stop_string(tiny):
    variant = variant_of(tiny, gates=CLOSED)
    model = PDTrimLM(variant)
    prompts = {"w2 w7": (5, 10), "w9": (12,)}
    settings = {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    free = model.generate_until([request(text, settings) for text in prompts])
    ids = [greedy_by_simulator(variant, prompt, 5) for prompt in prompts.values()]
    assert free == [tiny.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    stop = free[0].split()[2]
    stopped = model.generate_until(
        [request(text, {**settings, "until": ["nowhere", stop]}) for text in prompts]
    )
    assert stopped == [text.split(stop)[0] for text in free] and stopped[0] != free[0]


def test_generation_ends_at_the_token_that_ends_texts(tiny, monkeypatch):
    model = PDTrimLM(variant_of(tiny))
    settings = {"max_gen_toks": 6}
    (free,) = model.generate_until([request("w1 w2", settings)])
    (third,) = tiny.tokenizer(free.split()[2], add_special_tokens=False).input_ids
    monkeypatch.setattr(model, "_ends", {third})
    (ended,) = model.generate_until([request("w1 w2", settings)])
    assert free.startswith(ended) and ended.split()[-1] == free.split()[2] and ended != free


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.7}])
def test_sampling_is_refused(tiny, settings):
    with pytest.raises(PdtrimError, match="greedily only"):
        PDTrimLM(variant_of(tiny)).generate_until([request("w1", settings)])


def test_an_answer_as_long_as_the_model_reads_is_refused(tiny):
    with pytest.raises(PdtrimError, match="no room for a prompt"):
        PDTrimLM(variant_of(tiny)).generate_until([request("w1", {"max_gen_toks": 512})])


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(PdtrimError, match="no tokenizer"):
        PDTrimLM(variant_of(tiny_model()))
