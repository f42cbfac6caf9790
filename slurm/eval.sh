#!/usr/bin/env bash
# Evaluation of a run folder, in one process on one GPU. Requeued, it goes on behind its results.
#
#   sbatch slurm/eval.sh --out_dir=out/toy --no_overwrite      # from the repository root
#   sbatch -A account -p partition slurm/eval.sh ...           # --gres=none for a CPU node
#   bash slurm/eval.sh --out_dir=out/toy                       # the same without Slurm
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
here="$(dirname "$0")/.."  # but Slurm runs a copy of this file
if [ -f "$here/slurm/common.sh" ]; then cd "$here"; else cd "$SLURM_SUBMIT_DIR"; fi
NPROC=1
. slurm/common.sh
if [ "$restarts" != 0 ]; then set -- "$@" --no_overwrite; fi
out_dir="$(out_dir_of out/toy "$@")"
run "${launch[@]}" eval.py "$@"
