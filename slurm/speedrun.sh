#!/usr/bin/env bash
# The whole pipeline, pretraining to report, on one node: one process per GPU, resumed after every requeue until it is done.
#
#   sbatch slurm/speedrun.sh config/h100_speedrun.py                      # from the repository root
#   sbatch -A account -p partition --gres=gpu:4 slurm/speedrun.sh ...     # four GPUs; --gres=none for a CPU node
#   bash slurm/speedrun.sh                                                # the same without Slurm, on the toy world
#SBATCH --job-name=speedrun
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
if [ -f "$(dirname "$0")/common.sh" ]; then cd "$(dirname "$0")/.."; else cd "$SLURM_SUBMIT_DIR"; fi  # Slurm runs a copy of this file
. slurm/common.sh
out_dir="$(out_dir_of out/toy "$@")"
run python speedrun.py --nproc="$nproc" "$@"  # starts torchrun itself, stage by stage
