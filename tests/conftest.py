"""Fixtures: the real SmolLM2 as a plain folder, made once for all workers; and what runs first."""

from __future__ import annotations

import interpreted  # noqa: F401

# isort: split
import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import tiny_model
from pdtrim.models.loading import load_model
from warm import Warm, stages_by

LONG = ("test_smollm2", "test_vllm_", "test_runs", "test_supervisor")


def pytest_collection_modifyitems(items):
    """The files that take the longest come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG))  # stable


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """A shell's background job ignores SIGINT, and so would all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in bf16 as safetensors, for the GGUF is slow to read; and beside it
    ``smollm2.fingerprint``, that of the model in the GGUF."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # all workers share one
    folder = root / "smollm2"
    with FileLock(root / "smollm2.lock"):
        if not folder.exists():
            model = load_model("smollm2")
            model.network.save_pretrained(folder)
            model.need_tokenizer().save_pretrained(folder)
            folder.with_suffix(".fingerprint").write_text(model.fingerprint)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """The same, loaded in fp32."""
    return load_model(str(smollm2_folder), dtype="float32")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random Llama with a word tokenizer, as a user's local folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=64).network.save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file of the tiny tokenizer's words, far from periodic."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    ids = torch.randint(0, 61, (6000,), generator=torch.Generator().manual_seed(5)).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids))
    return path


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """What a stage process imports, imported once."""
    modules = ("pdtrim.runtime.prefill", "pdtrim.runtime.decode")
    modules += ("transformers.models.llama.modeling_llama",)
    with Warm(tmp_path_factory.mktemp("warm"), *modules) as made:
        yield made


@pytest.fixture(scope="module")
def warm_stages(warm):
    """Stage processes of a file's sessions that need not import what takes each of them seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pdtrim.runtime.process.python_module", stages_by(warm.path))
        yield
