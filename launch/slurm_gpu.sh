#!/usr/bin/env bash
#SBATCH --job-name=maxlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=TERM@120
#
# Train on GPU nodes under Slurm: one process on each node, all of its GPUs.
#
#   sbatch --nodes=4 launch/slurm_gpu.sh CONFIG [overrides]
#
# Submit it from this repository's root, on a file system that all nodes share, with the environment made before:
# python3 -m venv .venv && .venv/bin/python -m pip install -e '.[gpu]'. Processes find each other by Slurm's variables.
set -euo pipefail

config=${1:?usage: sbatch launch/slurm_gpu.sh CONFIG [overrides]}
shift
PATH=$PWD/.venv/bin:$PATH
# Under Slurm jax gives a process a single GPU, the one with its local rank, unless told otherwise.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 "$((SLURM_GPUS_ON_NODE - 1))")
export JAX_LOCAL_DEVICE_IDS

exec srun --kill-on-bad-exit=1 python -m maxlm.train --config "$config" "$@"
