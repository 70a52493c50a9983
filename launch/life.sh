#!/usr/bin/env bash
# The whole life of a model in small: text, conversations, preferences, rewards, fewer bits, and a page that compares all
# of it. Every line is a command of its own; what is done is not done again, so that after an interruption the same
# command goes on where it was. docs/life.md says what one sees.
#
#   launch/life.sh             runs/life/report.html, in about nine minutes on two cores
#   launch/life.sh rlhf        the classic chain beside it: runs/rlhf/report.html
#
# ROOT is this repository's folder (default: the one above this script).
set -euo pipefail
cd "${ROOT:-$(dirname "$0")/..}"
if [[ -x .venv/bin/python ]]; then # as `make train` leaves it
  PATH=$PWD/.venv/bin:$PATH
fi

problems() { # KIND NAME [options]: data/life/NAME.jsonl
  [[ -e data/life/$2.jsonl ]] || python -m maxlm.data build problems "$1" --out "data/life/$2.jsonl" "${@:3}"
}

train() { # NAME [overrides]
  echo "== $1 =="
  python -m maxlm.train --config "configs/$1.py" "${@:2}"
}

problems addition addition_text --count 12000 --seed 1 --as text
train life_pretrain

if [[ ${1:-} == rlhf ]]; then
  train rlhf_sft
  train rlhf_reward
  train rlhf_ppo
  train rlhf_reward --train.seed 1 --run_dir runs/rlhf/judge # which no policy has seen
  python -m maxlm.compare runs/rlhf/sft runs/rlhf/ppo --prompts data/rlhf/prompts --judge runs/rlhf/judge \
    --out runs/rlhf/report.html
  exit
fi

problems sort sort --count 600 --seed 2
problems addition addition --count 1000 --seed 2
problems sort prompts --count 4000 --seed 3
problems sort sorting --count 100 --held_out # the exams, of which none of the above has a question
problems addition adding --count 100 --held_out
train life_sft
train life_dpo
train life_grpo

[[ -e runs/life/int8 ]] || python -m maxlm.quantize --run runs/life/grpo --method int8 --out runs/life/int8
python -m maxlm.compare runs/life/{pretrain,sft,dpo,grpo,int8} --out runs/life/report.html \
  --prompts configs/data/questions.jsonl data/life/sorting.jsonl data/life/adding.jsonl --shown 5
