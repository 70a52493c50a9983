#!/usr/bin/env bash
#SBATCH --job-name=maxlm-clean
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Clean text on the nodes of a Slurm cluster: this small job hands in an array of jobs for each stage, waits for them,
# and hands in again what failed.
#
#   sbatch --partition=cpu launch/slurm_clean.sh INPUT... --recipe fineweb --out DIR --slurm.partition cpu
#
# Submit it from this repository's root, on a file system that all nodes share, with the environment made before:
# python3 -m venv .venv && .venv/bin/python -m pip install -e '.[clean,cluster]'. If the job ends too early, the same
# command goes on.
set -euo pipefail

: "${1:?usage: sbatch launch/slurm_clean.sh INPUT... --out DIR and other options of python -m maxlm.data clean}"
PATH=$PWD/.venv/bin:$PATH

exec python -m maxlm.data clean "$@" --engine slurm --slurm.wait
