#!/usr/bin/env bash
# The whole pipeline, pretraining to report, on one node: one process per GPU, resumed after every
# requeue until it is done.
#
#   sbatch slurm/speedrun.sh config/h100_speedrun.py                  # from the repository root
#   sbatch -A account -p partition --gres=gpu:4 slurm/speedrun.sh ... # 4 GPUs; none: a CPU node
#   bash slurm/speedrun.sh                                            # without Slurm, the toy world
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
here="$(dirname "$0")/.."  # but Slurm runs a copy of this file
if [ -f "$here/slurm/common.sh" ]; then cd "$here"; else cd "$SLURM_SUBMIT_DIR"; fi
. slurm/common.sh
out_dir="$(out_dir_of out/toy "$@")"
run python speedrun.py --nproc="$nproc" "$@"  # starts torchrun itself, stage by stage
