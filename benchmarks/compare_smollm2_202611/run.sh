#!/usr/bin/env bash
# The numbers of this page: bash run.sh DATA OUT
#
# DATA is a folder of tasks and text (docs/tasks.md), with c4/train.jsonl and wikitext2/train.jsonl.
# JOBS processes share one GPU. The same command goes on where it stopped.
set -euo pipefail
DATA=$1 OUT=$2
: "${MODEL:=smollm2}" "${DEVICE:=cuda}" "${SHARES:=0.2 0.33}" "${SEEDS:=0,1}" "${JOBS:=12}"
: "${LIMIT:=500}" "${SEQUENCES:=32}" "${LENGTH:=256}" "${BATCH_TOKENS:=32768}"
: "${TRAINED:=pdtrim-prefill pdtrim-tilted paper}" "${WRITTEN:=4096}" "${STEPS:=600}" "${MINUTES:=3}"
: "${TASKS:=mmlu,cmmlu,piqa,winogrande,hellaswag,boolq,arc_easy,arc_challenge,openbookqa,mathqa,rte,wnli,cb,sst2,lambada_openai,wikitext}"
export MODEL DATA OUT DEVICE SEEDS LIMIT SEQUENCES LENGTH BATCH_TOKENS TRAINED WRITTEN STEPS MINUTES TASKS
export OMP_NUM_THREADS=1

compare() { # SHARE OPTION...
  pdtrim compare "$MODEL" --remove "$1" --methods all --tasks "$TASKS" --data "$DATA" \
    --limit "$LIMIT" --seeds "$SEEDS" --calibration "$DATA/c4/train.jsonl" \
    --sequences "$SEQUENCES" --prompt-tokens "$LENGTH" --continuation-tokens "$LENGTH" \
    --batch-tokens "$BATCH_TOKENS" --device "$DEVICE" -o "$OUT/$1" "${@:2}"
}

train() { # SHARE SYSTEM: decode's blocks of the first seed's plan
  local plan=$OUT/$1/plans/$2-seed${SEEDS%%,*}.json merge=none
  [ "$2" != paper ] || merge=pairs # its own rule
  pdtrim distill "$plan" -o "$OUT/$1/trained/$2.json" --model "$MODEL" --blocks all \
    --merge "$merge" --text "$DATA/c4/train.jsonl" --text "$DATA/wikitext2/train.jsonl" --text self \
    --sequences "$WRITTEN" --held-out 8 --prompt-tokens "$LENGTH" --continuation-tokens "$LENGTH" \
    --steps "$STEPS" --minutes "$MINUTES" --rows 32 --accumulate 1 --learning-rate 5e-4 \
    --device "$DEVICE"
}

work() { # SHARE SYSTEM SEED
  local log=$OUT/$1/log/$2-seed$3.txt row=$OUT/$1/trained/$2.json
  {
    compare "$1" --only "$2-seed$3" --no-latency
    if [ "$3" = "${SEEDS%%,*}" ] && [[ " $TRAINED " = *" $2 "* ]]; then
      [ -f "$row" ] || train "$1" "$2"
      compare "$1" --row "$2-trained=$row" --only "$2-trained" --no-latency
    fi
  } >>"$log" 2>&1 || echo "$2, seed $3, at $1 did not end: $log"
}
export -f compare train work

systems() { # SHARE: longest searches first
  python3 - "$1" <<'PYTHON'
import sys

from pdtrim.evaluate.compare.systems import planned_systems
from pdtrim.methods import METHODS

names = [system.name for system in planned_systems(tuple(METHODS), float(sys.argv[1]))]
print(*sorted(names, key=lambda name: "pdtrim" not in name), sep="\n")
PYTHON
}

for share in $SHARES; do
  mkdir -p "$OUT/$share/log" "$OUT/$share/trained"
  compare "$share" --only dense >"$OUT/$share/log/dense.txt" 2>&1 &
done
wait
for seed in ${SEEDS//,/ }; do
  for share in $SHARES; do
    for system in $(systems "$share"); do
      echo "$share $system $seed"
    done
  done
done | xargs -P "$JOBS" -L 1 bash -c 'work "$@"' work
for share in $SHARES; do # one after the other: now the stages are timed
  rows=()
  for system in $TRAINED; do
    rows+=(--row "$system-trained=$OUT/$share/trained/$system.json")
  done
  compare "$share" "${rows[@]}"
done
