"""The runs of the paper's models, from end to end, on tiny random models of the same kinds."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from pdtrim.evaluate.compare.records import Comparison
from pdtrim.evaluate.result import Result
from pdtrim.exported import load_pair
from pdtrim.methods import METHODS
from pdtrim.plan import PrunePlan
from warm import Warm, forked

RUNS = Path(__file__).parents[1] / "runs"
WORDS = (
    *("the", "a", "red", "old", "small", "bird", "fish", "tree", "house", "river"),
    *("sees", "eats", "finds", "near", "under", "and", "not"),
)
BLOCKS = 8
SIZES = {
    "vocab_size": 280,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama-3.1-8b": lambda: LlamaConfig(
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **SIZES,
    ),
    "llama-2-13b": lambda: LlamaConfig(
        num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5, **SIZES
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        num_key_value_heads=2, max_position_embeddings=131072, rope_theta=1000000.0, **SIZES
    ),
}
BEGINS = {"llama-3.1-8b": "<|begin_of_text|>", "llama-2-13b": "<s>", "qwen2.5-7b": None}


def sentences(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 9))) + "." for _ in range(count)]


def save_tokenizer(folder, begin):
    """Pieces of bytes, and the token that begins every text where the family has one."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|end|>", *([begin] if begin else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(sentences(50, seed=1), trainer)
    if begin:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, raw.token_to_id(begin))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", bos_token=begin
    ).save_pretrained(folder)


def save_model(name, folder):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for key, p in network.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.1)
            elif "bias" in key:
                p.normal_(std=0.3)
    network.save_pretrained(folder)
    save_tokenizer(folder, BEGINS[name])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Tasks of a few items, text to steer by and text held out."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        {"question": question, "choices": sentences(2, seed=10 + i), "answer": i % 2}
        for i, question in enumerate(sentences(4, seed=2))
    ]
    for task in ("piqa", "arc_easy"):
        (folder / task).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / "test.jsonl").write_text(lines)
    for name, seed in (("calibration", 3), ("held_out", 4)):
        (folder / f"{name}.txt").write_text(" ".join(sentences(2000, seed)))
    return folder


def run(name, out, command, **variables):
    """Run a model's script, as a user does in a shell."""
    environment = {**os.environ, "PDTRIM": command, **variables}
    words = ["bash", str(RUNS / f"{name}.sh"), str(out)]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


# the whole thing


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Of processes that need not import what takes each of them seconds."""
    ours = ("evaluate.ablation", "evaluate.compare.run", "distill.train")
    ours += ("runtime.prefill", "runtime.decode")
    theirs = ("transformers.models.llama.modeling_llama", "lm_eval.evaluator", "matplotlib.figure")
    modules = [f"pdtrim.{name}" for name in ours]
    with Warm(tmp_path_factory.mktemp("warm"), *modules, *theirs) as made:
        yield " ".join(forked(made.path, "pdtrim.cli"))


CASES = {
    "llama-3.1-8b": {"METHODS": "all", "TRAINED": "paper", "KV": "budget:compression=2"},
    "llama-2-13b": {"METHODS": "pdtrim", "TRAINED": "", "KV": "full+int4:recent=0"},
    "qwen2.5-7b": {"METHODS": "flap,paper", "TRAINED": "paper", "KV": "full+int4:recent=0"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_makes_all_its_outputs_and_then_nothing(name, texts, command, tmp_path):
    save_model(name, tmp_path / "model")
    out = tmp_path / "out"
    variables = {
        "MODEL": str(tmp_path / "model"),
        "DEVICE": "cpu",
        "DTYPE": "float32",
        "CALIBRATION": str(texts / "calibration.txt"),
        "TEXT": str(texts / "held_out.txt"),
        "DATA": str(texts),
        "TASKS": "piqa,arc_easy",
        "LIMIT": "2",
        "SHARES": "0.15",
        "SEEDS": "0",
        "SEQUENCES": "2",
        "PROMPT": "16",
        "CONTINUATION": "16",
        "DECODE_REMOVE": "1",
        "HELD_OUT": "2",
        "STEPS": "2",
        "ROWS": "1",
        "ACCUMULATE": "1",
        "TRAIN_SEQUENCES": "2",
        **CASES[name],
    }
    done = run(name, out, command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    check_comparison(out / "compare-0.15", CASES[name])
    check_plan_and_pair(name, out)
    for picture in ("sensitivity/blocks.png", "compare-0.15/compare.png"):
        assert (out / picture).stat().st_size > 1000
        assert picture.split("/")[-1] in done.stdout
    before = times_of(out)
    again = run(name, out, command, **variables)
    assert again.returncode == 0 and times_of(out) == before
    assert again.stdout.count("already made") == done.stdout.count("\n== ") - 1


def check_comparison(folder, case):
    result = Comparison.load(folder / "result.json")
    rows = {row.name: row for row in result.rows}
    chosen = set(METHODS) if case["METHODS"] == "all" else set(case["METHODS"].split(","))
    assert {row.method for row in result.rows} == chosen | {"dense"}
    assert {row.name: row.failed for row in result.rows if row.failed} == {}
    trained = [row.name for row in result.rows if row.trained and row.average]
    assert trained == [f"{system}-trained" for system in case["TRAINED"].split()]
    assert [info.count for info in result.tasks] == [2, 2]
    table = (folder / "table.md").read_text()
    assert all(f"| {name} |" in table for name in rows)
    plans = [p for p in (folder / "plans").glob("*.json") if "settings" not in p.name]
    assert len(plans) == len(rows) - 1 - len(trained)
    assert {PrunePlan.load(path).model.num_layers for path in plans} == {BLOCKS}


def check_plan_and_pair(name, out):
    plan = PrunePlan.load(out / "plan.json")
    assert sum(gate != "full" for gate in plan.gates.prefill_attention) >= 3  # a third of 8
    assert sum(not gate for gate in plan.gates.decode_attention) == 1
    dense, pruned = Result.load(out / "held_out.json").rows
    assert dense.kl == 0 < pruned.kl and pruned.kv_compression > 1.5
    assert plan.digest[:12] in (out / "plan.txt").read_text()
    pair, exported = load_pair(out / "pair")
    assert exported.digest == plan.digest
    attention = pair.decode.network.model.layers[0].self_attn
    config = pair.decode.config
    assert (attention.q_proj.bias is not None) == (name == "qwen2.5-7b")
    assert (config.rope_parameters["rope_type"] == "llama3") == (name == "llama-3.1-8b")
    assert (config.num_key_value_heads == 4) == (name == "llama-2-13b")
    served = (out / "serve.txt").read_text()
    assert "vllm.entrypoints" in served or served.startswith("error: ")


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# the steps alone, with a command that only writes files

FAKE = """
import os, pathlib, sys

verb, *words = sys.argv[1:]
named = words[words.index("-o") + 1] if "-o" in words else ""
with open(os.environ["LOG"], "a") as log:
    print(verb, os.path.basename(named), file=log)
if os.environ.get("BREAK") == verb:
    sys.exit(int(os.environ["STATUS"]))
makes = {
    "sensitivity": ["table.md"],
    "compare": ["result.json", "plans/pdtrim-tilted-seed0.json", "plans/paper-seed0.json"],
    "export": ["decode/config.json"],
}
for name in makes.get(verb, [""] if named else []):
    path = pathlib.Path(named, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "plans" not in name or not path.exists():
        path.write_text(" ".join(sys.argv))
print("said", verb)
"""


@pytest.fixture
def steps(tmp_path):
    """Runs the Llama's script on the fake; returns what it did and the verbs that it called."""
    (tmp_path / "fake.py").write_text(FAKE)
    log = tmp_path / "log"

    def go(**variables):
        log.write_text("")
        done = run(
            "llama-3.1-8b",
            tmp_path / "out",
            f"{sys.executable} {tmp_path / 'fake.py'}",
            **{"LOG": str(log), "DEVICE": "cpu", **variables},
        )
        return done, log.read_text().splitlines()

    return go


WHOLE = [
    "sensitivity sensitivity",
    "compare compare-0.2",
    "compare compare-0.33",
    "plan plan.json",
    "distill pdtrim-tilted-0.2.json",
    "distill paper-0.2.json",
    "compare compare-0.2",
    "distill pdtrim-tilted-0.33.json",
    "distill paper-0.33.json",
    "compare compare-0.33",
    "export pair",
    "eval held_out.json",
    "inspect ",
    "serve ",
]


def test_the_steps_come_in_order_once(steps, tmp_path):
    done, called = steps()
    assert done.returncode == 0 and called == WHOLE, done.stderr
    assert str(tmp_path / "out" / "compare-0.33") in done.stdout.splitlines()[-3]
    result = (tmp_path / "out" / "compare-0.2" / "result.json").read_text()
    assert f"--row paper-trained={tmp_path}/out/trained/paper-0.2.json" in result
    assert "--remove 0.2 " in result and "--limit 1000 " in result
    for system, merge in (("paper", "pairs"), ("pdtrim-tilted", "none")):
        command = (tmp_path / "out" / "trained" / f"{system}-0.33.json").read_text()
        assert f"compare-0.33/plans/{system}-seed0.json " in command
        assert f"--merge {merge} --steps 1000 --rows 4 " in command
    assert steps()[1] == []


def test_what_depends_on_a_change_is_made_again(steps, tmp_path):
    steps(TRAINED="paper", SHARES="0.2")
    _, called = steps(TRAINED="paper", SHARES="0.2", LIMIT="")
    assert called == ["compare compare-0.2"] * 2
    assert "--limit" not in (tmp_path / "out" / "compare-0.2" / "result.json").read_text()
    (tmp_path / "out" / "compare-0.2" / "plans" / "paper-seed0.json").write_text("another")
    _, called = steps(TRAINED="paper", SHARES="0.2", LIMIT="", STEPS="7")
    assert called == ["distill paper-0.2.json", "compare compare-0.2"]
    (tmp_path / "out" / "plan.json").unlink()
    _, called = steps(TRAINED="", SHARES="0.2", LIMIT="")
    assert called == ["plan plan.json"]  # the same plan again, so nothing behind it


@pytest.mark.parametrize(("verb", "place"), [("compare", 1), ("distill", 4), ("inspect", 12)])
def test_a_run_that_was_stopped_goes_on_from_there(verb, place, steps):
    done, called = steps(BREAK=verb, STATUS="3")
    assert done.returncode == 3 and called == WHOLE[: place + 1]
    assert done.stderr == "error: this step did not end: the same command goes on from here\n"
    assert steps()[1] == WHOLE[place:]


def test_half_an_export_is_made_anew(steps, tmp_path):
    steps(BREAK="export", STATUS="130")
    pair = tmp_path / "out" / "pair"
    (pair / "prefill").mkdir(parents=True)
    steps()
    assert [path.name for path in pair.iterdir()] == ["decode"]


def test_a_pair_that_vllm_refuses_does_not_stop_a_run(steps, tmp_path):
    done, _ = steps(BREAK="serve", STATUS="2")
    assert done.returncode == 0 and "where everything is" in done.stdout.lower()
    assert steps(BREAK="serve", STATUS="2")[1] == []
    (tmp_path / "out" / "serve.txt").unlink()
    assert steps(BREAK="serve", STATUS="1")[0].returncode == 1  # a crash is no refusal


def test_a_system_without_a_plan_cannot_be_trained(steps):
    done, _ = steps(TRAINED="sleb")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "sleb-seed0.json to train: see compare-0.2/table.md, or change TRAINED\n"
    )


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"DEVICE": "cuda"}, "torch sees no GPU"),
        ({"PDTRIM": "no-such-command x"}, "no command 'no-such-command'"),
    ],
)
def test_a_host_that_cannot_run_it_is_one_line(variables, problem, steps):
    done, called = steps(CUDA_VISIBLE_DEVICES="", **variables)
    assert done.returncode == 2 and called == []
    assert done.stderr.startswith(f"error: {problem}") and done.stderr.count("\n") == 1


def test_a_run_without_a_folder_is_one_line():
    done = run("qwen2.5-7b", "", sys.executable)
    assert done.returncode == 2 and done.stderr.startswith("error: give the folder of the run")


@pytest.mark.parametrize("script", sorted(RUNS.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
