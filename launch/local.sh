#!/usr/bin/env bash
# Train on this machine, with every device that jax finds.
#
#   launch/local.sh [CONFIG] [overrides]
#   launch/local.sh configs/tiny.py --train.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."

config=${1:-configs/tiny.py}
shift || true
if [[ -x .venv/bin/python ]]; then # as `make train` leaves it
  PATH=$PWD/.venv/bin:$PATH
fi

exec python -m maxlm.train --config "$config" "$@"
