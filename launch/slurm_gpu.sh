#!/usr/bin/env bash
#SBATCH --job-name=maxlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
#
# Train on GPU nodes under Slurm: one process on each node, all of its GPUs.
#
#   sbatch --nodes=4 launch/slurm_gpu.sh CONFIG [overrides]
#
# Submit it from this repository's root, on a file system that all nodes share, with the environment made before:
# python3 -m venv .venv && .venv/bin/python -m pip install -e '.[gpu]'. Processes find each other by Slurm's variables.
# 300 seconds before the time limit they save and stop, and the job goes back to the queue.
set -euo pipefail

config=${1:?usage: sbatch launch/slurm_gpu.sh CONFIG [overrides]}
shift
PATH=$PWD/.venv/bin:$PATH
# Under Slurm jax gives a process a single GPU, the one with its local rank, unless told otherwise.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$((SLURM_GPUS_ON_NODE - 1))")
export JAX_LOCAL_DEVICE_IDS

trap : TERM # this shell waits for the processes, which save when they are told to stop
code=0
# Not killed on a bad exit: 75 is one, and the first process may be writing still. jax ends those that miss another.
srun --kill-on-bad-exit=0 python -m maxlm.train --config "$config" "$@" || code=$?
# Slurm itself requeues a job that it preempts, and a cancelled one is to end; only the time limit is left to us.
if ((code == 75)) && [[ $(squeue --noheader --job="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
