#!/usr/bin/env bash
# Train on this host of a TPU slice: alone, or with the slice's other hosts when each of them runs the same command.
#
#   launch/tpu_vm.sh CONFIG [overrides]
#   launch/tpu_vm.sh configs/tiny.py --run_dir=/mnt/bucket/runs/tiny
#
# ROOT is this repository's folder (default: the one above this script). PYTHON names the interpreter, 3.11 or newer,
# that makes the environment, once (default: python3). Processes find each other by the TPU's own metadata.
set -euo pipefail
cd "${ROOT:-$(dirname "$0")/..}"

config=${1:?usage: launch/tpu_vm.sh CONFIG [overrides]}
shift
if [[ ! -e .venv/.tpu ]]; then
  "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[tpu]'
  touch .venv/.tpu
fi
PATH=$PWD/.venv/bin:$PATH

exec python -m maxlm.train --config "$config" "$@"
