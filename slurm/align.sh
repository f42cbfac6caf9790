#!/usr/bin/env bash
# One stage of alignment (SFT, DPO or verifier) on one node: one process per GPU, resumed after every requeue until it is done.
#
#   sbatch slurm/align.sh config/sft.py --init_from=out/toy/pretrain      # from the repository root
#   sbatch -A account -p partition --gres=gpu:4 slurm/align.sh ...        # four GPUs; --gres=none for a CPU node
#   bash slurm/align.sh config/sft.py --init_from=out/toy/pretrain        # the same without Slurm
#SBATCH --job-name=align
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
if [ -f "$(dirname "$0")/common.sh" ]; then cd "$(dirname "$0")/.."; else cd "$SLURM_SUBMIT_DIR"; fi  # Slurm runs a copy of this file
. slurm/common.sh
out_dir="$(out_dir_of out/pretrain "$@")"
run "${launch[@]}" align.py "$@"
