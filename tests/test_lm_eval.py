"""lm-eval's own command on an exported pair."""

import json
import sys

import pytest

pytest.importorskip("lm_eval")

import pdtrim.lm_eval as ours
from helpers import make_plan, trim_of
from pdtrim.errors import PdtrimError
from pdtrim.evaluate.tasks.lm import PDTrimLM
from pdtrim.models.loading import load_model
from pdtrim.stage.forward import Trimmed
from test_tasks import CLOSED

TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_folder):
    """A pair whose stages differ, the same in memory, and a task of lm-eval's kind."""
    folder = tmp_path_factory.mktemp("lm_eval")
    dense = load_model(str(tiny_folder), dtype="float32")
    trim = trim_of(make_plan(dense, CLOSED))
    trim.export(dense, folder / "pair")
    rows = [
        {"question": f"w{i}", "choices": [f"w{i + 1} w{i + 2}", f"w{2 * i} w3"], "answer": i % 2}
        for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "words.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder, Trimmed.of(trim.plan, trim.pair(dense))


def run(monkeypatch, folder, *words):
    command = ["lm_eval", "--model", "pdtrim", *words, "--tasks", "words"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--log_samples"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    ours.main()


def test_the_command_scores_an_exported_pair(setting, monkeypatch):
    folder, trimmed = setting
    run(monkeypatch, folder, "--model_args", f"pair={folder / 'pair'},device=cpu,window=64")
    found = json.loads(next((folder / "out").rglob("results_*.json")).read_text())
    assert (
        found["config"]["plan_digest"]
        == json.loads((folder / "pair" / "decode" / "config.json").read_text())["pdtrim"][
            "plan_digest"
        ]
    )
    lm = PDTrimLM(trimmed)
    for line in next((folder / "out").rglob("samples_words_*.jsonl")).read_text().splitlines():
        sample = json.loads(line)
        pairs = [("", *lm._encode_pair(sample["doc"]["question"], f" {choice}"))
                 for choice in sample["doc"]["choices"]]  # fmt: skip
        expected = lm._loglikelihood_tokens([((q, ""), c, n) for q, c, n in pairs])
        seen = [float(answer[0][0]) for answer in sample["resps"]]
        assert seen == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_a_chat_template_is_the_tokenizers(setting):
    lm = ours.PairLM(setting[0] / "pair")
    with pytest.raises(PdtrimError, match="no such template"):
        lm.chat_template(True)
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert lm.chat_template(True) == lm.tokenizer.chat_template and lm.chat_template() == ""
    assert lm.apply_chat_template([{"role": "user", "content": "w1"}]) == "<w1>"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "cpu"}, "'pair' is missing"),
        ({"pair": "x", "pretrained": "gpt2"}, "'pretrained' is not known"),
        ({"pair": "/nowhere"}, "no prefill checkpoint"),  # lm-eval's cuda:0 is the CPU here
        ({"pair": "/nowhere", "device": "cuda"}, "device=cuda, but torch finds no GPU"),
    ],
)
def test_a_mistake_in_model_args_is_one_line(monkeypatch, capsys, given, words):
    def asked():
        ours.PairLM.create_from_arg_obj(given, {"device": "cuda:0", "batch_size": 1})

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        ours.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and words in line
