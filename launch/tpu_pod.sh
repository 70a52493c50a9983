#!/usr/bin/env bash
# Train on every host of a TPU slice: the same command on all of them, through gcloud.
#
#   NAME=my-slice ZONE=us-east5-a launch/tpu_pod.sh CONFIG [overrides]
#
# NAME and ZONE name the slice; FOLDER is this repository's clone on each host (default: maxlm), with the config, the
# data and the run folder where all hosts see them. On TPU jax finds the other hosts by itself.
set -euo pipefail

: "${NAME:?name of the TPU slice}" "${ZONE:?its zone}"
config=${1:?usage: NAME=... ZONE=... launch/tpu_pod.sh CONFIG [overrides]}
shift
printf -v command '%q ' python -m maxlm.train --config "$config" "$@"
printf -v folder '%q' "${FOLDER:-maxlm}"

exec gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
  --command="cd $folder && PATH=.venv/bin:\$PATH && $command"
