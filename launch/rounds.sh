#!/usr/bin/env bash
# Rounds of post-training, as Llama 3 has them (arXiv:2407.21783, section 4): a reward model is trained; then, in each
# round, the newest model answers prompts several times, BASE learns the best answers (rejection sampling and SFT), and
# learns to prefer its own best answers to its worst (DPO).
#
#   launch/rounds.sh [ROUNDS]
#   SAMPLES=8 OUT=/data/rounds launch/rounds.sh 3
#
# ROUNDS is 2 if it is left out. What is done is not done again: the same command goes on after an interruption.
#
#   BASE      what each round's SFT begins from: a run, hf:DIR or gguf:FILE (default: runs/sft_tiny, trained if need be)
#   SFT, DPO  configs of both, whose data sets are replaced by what the model wrote (configs/{sft,dpo}_tiny.py)
#   REWARD    config of the reward model (configs/reward_tiny.py)
#   PROMPTS   records that ask something (configs/data/manners.jsonl)
#   SAMPLES   answers to a prompt (4)
#   TOKENS    of an answer, at most (96)
#   STEPS     of each training of a round; without it as the configs say
#   OUT       folder of the rounds (runs/rounds)
#   ROOT      this repository's folder (default: the one above this script)
set -euo pipefail
cd "${ROOT:-$(dirname "$0")/..}"
if [[ -x .venv/bin/python ]]; then # as `make train` leaves it
  PATH=$PWD/.venv/bin:$PATH
fi

rounds=${1:-2}
base=${BASE:-runs/sft_tiny} out=${OUT:-runs/rounds}
sft=${SFT:-configs/sft_tiny.py} dpo=${DPO:-configs/dpo_tiny.py} reward=${REWARD:-configs/reward_tiny.py}
prompts=${PROMPTS:-configs/data/manners.jsonl}
steps=()
if [[ -n ${STEPS:-} ]]; then
  steps=("--train.steps=$STEPS")
fi

train() { # CONFIG [overrides]
  local config=$1
  shift
  python -m maxlm.train --config "$config" "$@"
}

learn() { # CONFIG, RECORDS, the run it begins from, RUN
  train "$1" "--data.datasets.0.prepare.documents.paths=$2" "--data.datasets.0.path=${2%.jsonl}_data" \
    "--checkpoint.init_from=$3" "--run_dir=$4" "${steps[@]}"
}

named() { # a run, hf:DIR or gguf:FILE -> options
  case $1 in
    hf:*) echo "--hf=${1#hf:}" ;;
    gguf:*) echo "--gguf=${1#gguf:}" ;;
    *) echo "--run=$1" ;;
  esac
}

answers() { # MODEL, RECORDS, SEED [options]: whole, or not there
  local model=$1 records=$2 seed=$3
  shift 3
  if [[ ! -f $records ]]; then
    rm -f "$records.part"
    python -m maxlm.synthesize best "$prompts" "$(named "$model")" --reward_run="$out/reward" --n="${SAMPLES:-4}" \
      --max_new_tokens="${TOKENS:-96}" --seed="$seed" --out="$records.part" "$@"
    mv "$records.part" "$records"
  fi
}

mkdir -p "$out"
if [[ $base == runs/sft_tiny ]]; then
  train configs/sft_tiny.py
fi
train "$reward" "--run_dir=$out/reward" "${steps[@]}"

policy=$base
for ((round = 1; round <= rounds; round++)); do
  here=$out/round$round
  mkdir -p "$here"
  answers "$policy" "$here/best.jsonl" $((2 * round))
  learn "$sft" "$here/best.jsonl" "$base" "$here/sft"
  answers "$here/sft" "$here/pairs.jsonl" $((2 * round + 1)) --pairs
  learn "$dpo" "$here/pairs.jsonl" "$here/sft" "$here/dpo"
  policy=$here/dpo
done
echo "the model of the last round: $policy"
