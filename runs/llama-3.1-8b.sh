#!/usr/bin/env bash
# LLaMA-3.1-8B: 32 blocks with grouped-query attention and scaled rotary frequencies.
#
#     bash runs/llama-3.1-8b.sh OUT
#
# The numbers are for one GPU of 80 GB; each is replaced by an environment variable of its name.
# steps.sh has the other variables and says what they mean.
set -euo pipefail

: "${MODEL:=meta-llama/Llama-3.1-8B}"
: "${SHARES:=0.2 0.33}"
: "${SEEDS:=0,1,2}"
: "${SEQUENCES:=32}"
: "${STEPS:=1000}"
: "${ROWS:=4}"
: "${ACCUMULATE:=4}"

. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
