#!/usr/bin/env bash
# Train on every host of one or more TPU slices, through gcloud: rent them, run launch/tpu_vm.sh on all hosts, and go on
# with the same command when they were taken away.
#
#   NAME=mine ZONE=us-east5-a ACCELERATOR=v5p-128 RUNTIME=v2-alpha-tpuv5 REPO=https://github.com/me/maxlm.git \
#     launch/tpu_pod.sh CONFIG [overrides]
#
# NAME is the queued resource, made if it is not there; SLICES and SPOT=true say of what kind. REPO is cloned to FOLDER
# on each host. PYTHON as in tpu_vm.sh. The data and the run folder must be where all hosts see them.
set -euo pipefail

: "${NAME:?a name for the queued resource}" "${ZONE:?its zone}" "${REPO:?git address of this repository}"
: "${ACCELERATOR:?such as v5p-128}" "${RUNTIME:?image of the TPU VMs, such as v2-alpha-tpuv5}"
: "${FOLDER:=maxlm}" "${PYTHON:=python3}" "${SLICES:=1}" "${SPOT:=false}" "${RESTARTS:=100}"
config=${1:?usage: NAME=... ZONE=... launch/tpu_pod.sh CONFIG [overrides]}
shift

if ((SLICES == 1)); then
  slices=("$NAME")
  nodes=(--node-id="$NAME")
else # gcloud numbers them
  slices=()
  for ((i = 0; i < SLICES; i++)); do slices+=("$NAME-$i"); done
  nodes=(--node-count="$SLICES" --node-prefix="$NAME")
fi
if [[ $SPOT == true ]]; then nodes+=(--spot); fi

queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
state() { queued describe --format='value(state.state)' 2>/dev/null || echo NONE; }

rent() { # until every slice is there
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      NONE) queued create --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${nodes[@]}" ;;
      SUSPENDED | FAILED) queued delete --force --quiet ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

on_all_hosts() { # the exit code of the last slice that failed
  local code=0 slice pid pids=()
  for slice in "${slices[@]}"; do
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$ZONE" --worker=all --command="$1" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

# Here each word is quoted once for the shells of the hosts.
printf -v clone '[ -d %q ] || git clone --quiet %q %q' "$FOLDER" "$REPO" "$FOLDER"
printf -v train 'cd %q && PYTHON=%q launch/tpu_vm.sh' "$FOLDER" "$PYTHON"
printf -v words ' %q' "$config" "$@"

for ((restart = 0; ; restart++)); do
  rent
  code=0
  on_all_hosts "{ $clone; } && $train$words" || code=$?
  case $code in
    0) exit 0 ;;
    75) ;; # stopped by a signal, with everything saved
    *)     # a host that is gone (255: ssh lost it; the state follows later), or a mistake
      sleep "${POLL_SECONDS:-30}"
      if [[ $(state) == ACTIVE && ! ($SPOT == true && $code == 255) ]]; then exit "$code"; fi
      ;;
  esac
  if ((restart == RESTARTS)); then exit "$code"; fi
  echo "stopped (exit code $code); going on with the same command" >&2
done
