#!/usr/bin/env bash
# One stage of alignment (SFT, DPO or verifier) on one node: one process per GPU, resumed
# after every requeue until it is done.
#
#   sbatch slurm/align.sh config/sft.py --init_from=out/toy/pretrain  # from the repository root
#   sbatch -A account -p partition --gres=gpu:4 slurm/align.sh ...    # 4 GPUs; none: a CPU node
#   bash slurm/align.sh config/sft.py --init_from=out/toy/pretrain    # the same without Slurm
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
here="$(dirname "$0")/.."  # but Slurm runs a copy of this file
if [ -f "$here/slurm/common.sh" ]; then cd "$here"; else cd "$SLURM_SUBMIT_DIR"; fi
. slurm/common.sh
out_dir="$(out_dir_of out/pretrain "$@")"
if [ "$out_dir" = out/pretrain ]; then  # not given: align.py goes beside its start
  beside='import sys; from runtime.checkpoint import beside; print(beside(*sys.argv[1:]))'
  out_dir="$(python -c "$beside" "$(key_of init_from "" "$@")" "$(key_of mode sft "$@")")"
fi
run "${launch[@]}" align.py "$@"
