#!/usr/bin/env bash
# Train on this machine, with every device that jax finds.
#
#   launch/local.sh [CONFIG] [overrides]
#   launch/local.sh configs/tiny.py --train.steps=50
#
# ROOT is this repository's folder (default: the one above this script).
set -euo pipefail
cd "${ROOT:-$(dirname "$0")/..}"

config=${1:-configs/tiny.py}
shift || true
if [[ -x .venv/bin/python ]]; then # as `make train` leaves it
  PATH=$PWD/.venv/bin:$PATH
fi

exec python -m maxlm.train --config "$config" "$@"
