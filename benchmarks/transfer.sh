#!/usr/bin/env bash
# A handover at the paper's setting, 3,824 tokens of LLaMA-3.1-8B, and both stages against the
# blocks they lose. Random weights and caches: nothing is downloaded. About 2 minutes on one H100;
# with two GPUs the second one receives. A step whose result is there is not run again.
#
#   benchmarks/transfer.sh [OUT]
#   SHAPE=folder TOKENS=128 DEVICE=cpu REPEATS=1 benchmarks/transfer.sh out/rehearsal
set -euo pipefail

out=${1:-out/transfer}
shape=${SHAPE:-llama-3.1-8b} tokens=${TOKENS:-3824} device=${DEVICE:-cuda} repeats=${REPEATS:-7}
common=(--shape "$shape" --tokens "$tokens" --device "$device" --repeats "$repeats")

step() { # NAME VERB OPTION...
  local name=$1 verb=$2
  shift 2
  if [ ! -f "$out/$name/result.json" ]; then
    echo "+ pdtrim $verb $* -o $out/$name" >&2
    "${PYTHON:-python3}" -m pdtrim.cli "$verb" "$@" -o "$out/$name" > /dev/null
  fi
  cat "$out/$name/table.md"
  echo
}

step transfer bench-transfer "${common[@]}" --link measured --link 400 --link 100 --link 25
step stages bench-stages "${common[@]}"
