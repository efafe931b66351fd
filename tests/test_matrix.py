"""Every selector x codec x layout: the simulator against itself and against the real path."""

import pytest
import torch

from helpers import make_plan, random_batch, tiny_model
from pdtrim import kv
from pdtrim.kv.codecs import parse_codec
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.kvfit.observed import Observed
from pdtrim.kvfit.request import KVRequest
from pdtrim.plan import Gates
from pdtrim.stage.forward import Pair, forward
from test_runtime import through_the_socket

SELECTORS = (
    "full",
    "first_last:first=2,last=5,layers=all",
    "first_last:first=2,last=5,layers=1",
    "random:share=0.4,first=1,last=2",
    "lazy_layer:first=2,last=5,tau=0.05",
    "duo:share=0.5,first=2,last=5",
    "snapkv:share=0.4,window=4",
    "snapkv:share=0.4,window=4,heads=shared,value_norm=true",
    "tova:share=0.4",
    "h2o:share=0.4",
    "expected_attention:share=0.4,horizon=16",
    "gate:share=0.5,first=1,last=2",
)
CODECS = (
    "raw",
    "fp8",
    "lossless",
    "entropy:first=1",
    "int8:first=1,recent=2",
    "int4:first=1,recent=2,group=8",
    "k4v2:rotate=true,first=1,recent=2",
)


def test_the_matrix_has_every_selector_and_every_codec():
    assert {text.partition(":")[0] for text in SELECTORS} == set(kv.selectors.SELECTORS)
    assert {parse_codec(text).name for text in CODECS} == set(kv.codecs.CODECS)


@pytest.fixture(scope="module", params=["llama", "phi3", "qwen3"])
def setting(request):
    model = tiny_model(request.param, layers=3)
    batch = random_batch(model, rows=3, prompt=24, new=5)
    text = random_batch(model, rows=4, prompt=24, new=8, seed=9)
    return model, batch, Observed.of(model, text)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_layouts_and_the_real_path_agree(setting, selector, codec, tmp_path):
    model, batch, observed = setting
    rules = KVRequest.parse(f"{selector}+{codec}").fit(observed)
    gates = Gates.removing(3, prefill={1})
    plan = make_plan(model, gates, rules)
    pair, policy = Pair.dense(model), HandoverPolicy.of(plan)
    with torch.no_grad():
        compact = forward(pair, batch, gates, policy)
        masked = forward(pair, batch, gates, policy, layout="masked")
        whole = forward(pair, batch, gates)
    torch.testing.assert_close(compact, masked, atol=2e-5, rtol=0)
    real = through_the_socket(plan, pair, batch, tmp_path)
    torch.testing.assert_close(real, compact, atol=1e-4, rtol=0)
    lossy = codec not in ("raw", "lossless")
    if selector != "full" or lossy:
        assert not torch.allclose(compact, whole, atol=1e-5), "the policy must do something"
    else:
        torch.testing.assert_close(compact, whole)
