#!/usr/bin/env bash
# Train on one TPU VM (a slice with a single host). Run it there, in a clone of this repository.
#
#   launch/tpu_vm.sh CONFIG [overrides]
#   launch/tpu_vm.sh configs/tiny.py --run_dir=gs://BUCKET/runs/tiny
#
# PYTHON names the interpreter that makes the environment, once (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

config=${1:?usage: launch/tpu_vm.sh CONFIG [overrides]}
shift
if [[ ! -e .venv/.tpu ]]; then
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[tpu]'
  touch .venv/.tpu
fi
PATH=$PWD/.venv/bin:$PATH

exec python -m maxlm.train --config "$config" "$@"
