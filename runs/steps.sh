# The steps of a run, sourced by the script of a model, which sets MODEL, SHARES, SEEDS, SEQUENCES,
# STEPS, ROWS and ACCUMULATE. Every variable can be given in the environment.
#
# A step is skipped if its output is there and was made by the same command from the same plans, so
# the same command line goes on where a run stopped.

: "${PDTRIM:=pdtrim}"                            # the command, with arguments if it needs some
: "${DEVICE:=cuda}"
: "${DTYPE:=bfloat16}"
: "${CALIBRATION:=hub:HuggingFaceFW/fineweb-edu}" # text that steers and trains, a file, or self
: "${TEXT:=hub:NeelNanda/pile-10k}"              # held-out text, of another source
: "${PROMPT:=256}"                               # tokens of a calibration sequence
: "${CONTINUATION:=256}"
: "${DATA:=hub}"                                 # items of the tasks: hub, olmo or a folder
: "${LIMIT=1000}"                                # items of a task; empty for all
: "${METHODS:=all}"
: "${PREFILL_REMOVE:=0.33}"                      # of the recommended plan
: "${DECODE_REMOVE:=2}"
: "${KV:=budget:compression=5}"
: "${HELD_OUT:=64}"                              # sequences of TEXT
: "${TRAINED=pdtrim-tilted paper}"               # systems that are trained too; empty for none
: "${BLOCKS:=neighbours}"                        # which of their decode blocks
: "${TRAIN_SEQUENCES:=4096}"
: "${LEARNING_RATE:=2e-5}"
if [ -z "${TASKS:-}" ]; then                     # names with commas, see docs/tasks.md
  TASKS=mmlu,piqa,winogrande,hellaswag,boolq,arc_easy,arc_challenge,openbookqa
  TASKS+=,rte,cb,sst2,lambada_openai
  [ "$DATA" = olmo ] || TASKS+=,cmmlu,mathqa,wnli,wikitext
fi

fail() { # MESSAGE [STATUS]
  echo "error: $1" >&2
  exit "${2:-2}"
}

check_host() {
  local program python problem
  program=$(command -v "${pdtrim[0]}") ||
    fail "no command '${pdtrim[0]}': activate pdtrim's environment, or set PDTRIM"
  python=$(dirname "$program")/python3
  [ -x "$python" ] || python=python3
  problem=$("$python" - "$DEVICE" <<'PYTHON'
import importlib.util
import sys

for package, extra in (("lm_eval", "eval"), ("matplotlib", "plot")):
    if importlib.util.find_spec(package) is None:
        sys.exit(print(f"{package} is not installed: pip install 'pdtrim[{extra}]'"))
if sys.argv[1].startswith("cuda"):
    import torch

    if not torch.cuda.is_available():
        print("torch sees no GPU: install a torch for this machine's driver, or set DEVICE=cpu")
PYTHON
  ) || fail "'$python' does not run: set PDTRIM to the pdtrim of an environment"
  [ -z "$problem" ] || fail "$problem"
}

# A command in words, and the checksums of the plans and results that it names.
made_by() {
  local word
  for word; do
    printf '%s\n' "$word"
    case $word in
      *.json) [ ! -f "${word#*=}" ] || cksum <"${word#*=}" ;;
    esac
  done
}

step() { # HEADING NAME OUTPUT COMMAND...
  local heading=$1 record=$OUT/done/$2 output=$3
  shift 3
  printf '\n== %s\n' "$heading"
  if [ -e "$output" ] && [ -f "$record" ] && [ "$(made_by "$@")" = "$(cat "$record")" ]; then
    echo "already made: $output"
    return
  fi
  "$@" || fail "this step did not end: the same command goes on from here" $?
  [ -e "$output" ] || fail "this step made no $output"
  made_by "$@" >"$record"
}

show_plan() { # PLAN
  "${pdtrim[@]}" inspect "$1" >"$OUT/plan.txt" && cat "$OUT/plan.txt"
}

export_pair() { # PLAN FOLDER OPTION...
  rm -rf "$2" && "${pdtrim[@]}" export "$1" -o "$2" "${@:3}"
}

dry_run() { # PAIR, and a file of it for the record
  "${pdtrim[@]}" serve "$1" --dry-run >"$OUT/serve.txt" 2>&1 ||
    [ $? -eq 2 ] || return # 2 is a pair that vLLM cannot serve: the line says why
  cat "$OUT/serve.txt"
}

[ $# -eq 1 ] && [ -n "$1" ] || fail "give the folder of the run: bash $0 OUT"
OUT=$1
read -r -a pdtrim <<<"$PDTRIM"
check_host
mkdir -p "$OUT/done"

machine=(--device "$DEVICE" --dtype "$DTYPE")
lengths=(--prompt-tokens "$PROMPT" --continuation-tokens "$CONTINUATION")
calibration=(--calibration "$CALIBRATION" --sequences "$SEQUENCES" "${lengths[@]}")
seed=${SEEDS%%,*} # of the plans that are made once
compare=("${pdtrim[@]}" compare "$MODEL" --methods "$METHODS" --tasks "$TASKS" --data "$DATA"
  ${LIMIT:+--limit "$LIMIT"} --seeds "$SEEDS" "${calibration[@]}" "${machine[@]}")

step "1. What each block is worth to each stage" sensitivity "$OUT/sensitivity/table.md" \
  "${pdtrim[@]}" sensitivity "$MODEL" -o "$OUT/sensitivity" --text "$CALIBRATION" \
  "${lengths[@]}" --seed "$seed" "${machine[@]}"

for share in $SHARES; do
  step "2. All methods, $share of the parameters removed" "compare-$share" \
    "$OUT/compare-$share/result.json" "${compare[@]}" --remove "$share" -o "$OUT/compare-$share"
done

step "3. The recommended plan" plan "$OUT/plan.json" \
  "${pdtrim[@]}" plan "$MODEL" -o "$OUT/plan.json" --prefill-remove "$PREFILL_REMOVE" \
  --decode-remove "$DECODE_REMOVE" --repair best --kv "$KV" "${calibration[@]}" \
  --fit-sequences "$((2 * SEQUENCES))" --seed "$seed" --resume "${machine[@]}"

for share in $SHARES; do
  given=()
  for system in $TRAINED; do
    plan=$OUT/compare-$share/plans/$system-seed$seed.json
    trained=$OUT/trained/$system-$share.json
    [ -f "$plan" ] || fail "no $plan to train: see compare-$share/table.md, or change TRAINED"
    merge=none
    [ "$system" != paper ] || merge=pairs # its own rule
    mkdir -p "$OUT/trained"
    step "4. Decode's blocks of $system trained, $share removed" "trained-$system-$share" \
      "$trained" "${pdtrim[@]}" distill "$plan" -o "$trained" --model "$MODEL" \
      --text "$CALIBRATION" --blocks "$BLOCKS" --merge "$merge" --steps "$STEPS" --rows "$ROWS" \
      --accumulate "$ACCUMULATE" --learning-rate "$LEARNING_RATE" \
      --sequences "$TRAIN_SEQUENCES" "${lengths[@]}" --seed "$seed" "${machine[@]}"
    given+=(--row "$system-trained=$trained")
  done
  if [ ${#given[@]} -gt 0 ]; then
    step "5. The trained plans in the same table, $share removed" "compare-trained-$share" \
      "$OUT/compare-$share/result.json" "${compare[@]}" --remove "$share" "${given[@]}" \
      -o "$OUT/compare-$share"
  fi
done

step "6. The two checkpoints" export "$OUT/pair/decode/config.json" \
  export_pair "$OUT/plan.json" "$OUT/pair" --model "$MODEL" --dtype "$DTYPE"
step "6. The plan on held-out text" eval "$OUT/held_out.json" \
  "${pdtrim[@]}" eval "$OUT/plan.json" -o "$OUT/held_out.json" --model "$MODEL" --text "$TEXT" \
  --limit "$HELD_OUT" "${lengths[@]}" "${machine[@]}"
step "6. What runs where" inspect "$OUT/plan.txt" show_plan "$OUT/plan.json"
step "6. How vLLM serves it, or why not" serve "$OUT/serve.txt" \
  dry_run "$OUT/pair" "$OUT/pair/decode/config.json"

printf '\n== 7. Where everything is\n'
echo "blocks      $OUT/sensitivity/table.md and blocks.png"
for share in $SHARES; do
  echo "methods     $OUT/compare-$share/table.md, compare.png and result.json"
done
echo "plan        $OUT/plan.json, in words $OUT/plan.txt, measured $OUT/held_out.json"
echo "pair        $OUT/pair, to serve: $OUT/serve.txt"
