#!/usr/bin/env bash
# LLaMA-2-13B: 40 blocks, in which every query head has keys and values of its own.
#
#     bash runs/llama-2-13b.sh OUT
#
# The numbers are for one GPU of 80 GB; each is replaced by an environment variable of its name.
# steps.sh has the other variables and says what they mean.
set -euo pipefail

: "${MODEL:=meta-llama/Llama-2-13b-hf}"
: "${SHARES:=0.2 0.33}"
: "${SEEDS:=0,1,2}"
: "${SEQUENCES:=32}"
: "${STEPS:=1000}"
: "${ROWS:=2}"
: "${ACCUMULATE:=8}"

. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
