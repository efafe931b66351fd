"""What a block is worth to a stage: against whole runs; the table and the picture."""

import pytest
import torch
from typer.testing import CliRunner

from helpers import random_batch, tiny_model
from pdtrim.cli import app
from pdtrim.evaluate.quality import measure_quality
from pdtrim.evaluate.sensitivity import WAYS, sensitivity
from pdtrim.kv.policy import HandoverPolicy
from pdtrim.report.heatmap import plot_sensitivity
from pdtrim.report.table import sensitivity_table
from pdtrim.stage.forward import Pair, Trimmed


def test_each_entry_is_the_kl_of_a_whole_run():
    model = tiny_model("qwen3", layers=4)
    batch = random_batch(model, rows=10, prompt=20, new=8)  # more rows than run together
    kl_WL = sensitivity(model, batch)
    policy = HandoverPolicy.full(4)
    for way, gates_of in enumerate(WAYS.values()):
        for layer in range(4):
            variant = Trimmed(pair=Pair.dense(model), gates=gates_of(4, layer), policy=policy)
            whole = measure_quality(model, {"x": variant}, batch)["x"].kl
            assert float(kl_WL[way, layer]) == pytest.approx(whole, abs=2e-4), (way, layer)
    assert kl_WL[0, -1] == pytest.approx(0, abs=1e-5), "prefill's last block is dead work"


def test_the_four_ways_differ_in_what_they_keep():
    gates = {way: gates_of(3, 1) for way, gates_of in WAYS.items()}
    assert gates["prefill"].prefill_attention[1] == "kv" and gates["prefill"].decode_attention[1]
    no_kv = gates["prefill, no KV"]
    assert no_kv.prefill_attention[1] == "off" and not no_kv.decode_attention[1]
    assert no_kv.decode_mlp[1] and not no_kv.prefill_mlp[1]
    assert gates["decode"].prefill_mlp[1] and not gates["decode"].decode_mlp[1]
    assert not gates["unified"].prefill_mlp[1] and not gates["unified"].decode_mlp[1]


def test_the_table_and_the_picture_hold_every_block(tmp_path):
    kl_WL = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)) ** 4
    text = sensitivity_table(kl_WL, tuple(WAYS))
    assert text.count("\n") == 32 and f"| 29 | {float(kl_WL[0, 29]):.4f} |" in text
    png = plot_sensitivity(kl_WL, tuple(WAYS), tmp_path / "deep" / "x.png", title="tiny")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_verb_writes_both(tiny_folder, tiny_text, tmp_path):
    words = ["sensitivity", str(tiny_folder), "--text", str(tiny_text), "-o", str(tmp_path / "out")]
    words += ["--prompt-tokens", "24", "--continuation-tokens", "8", "--sequences", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "blocks.png").exists()
    assert "| prefill, no KV |" in (tmp_path / "out" / "table.md").read_text()
