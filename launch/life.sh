#!/usr/bin/env bash
# The whole life of a model in small: text, conversations, preferences, rewards, fewer bits, and a page that compares
# every stage. Each line is a command of its own; what is done is not done again, so that after an interruption the same
# command goes on where it was. docs/life.md tells what one sees.
#
#   launch/life.sh           all of it
#   launch/life.sh data      the problems alone
#
# ROOT is this repository's folder (default: the one above this script).
set -euo pipefail
cd "${ROOT:-$(dirname "$0")/..}"
if [[ -x .venv/bin/python ]]; then # as `make train` leaves it
  PATH=$PWD/.venv/bin:$PATH
fi

problems() { # KIND NAME, and options
  [[ -e data/life/$2.jsonl ]] || python -m maxlm.data build problems "$1" --out "data/life/$2.jsonl" "${@:3}"
}

problems addition addition_text --count 12000 --seed 1 --as text
problems sort sort --count 1000 --seed 2
problems addition addition --count 1000 --seed 2
problems sort prompts --count 4000 --seed 3
problems sort sort_exam --count 100 --held_out
problems addition addition_exam --count 100 --held_out
