#!/usr/bin/env bash
# Smoke test of an installation: two processes on the CPU train a tiny model on the toy world, in
# about a minute, without network.
#
#   sbatch slurm/smoke.sh                                                 # from the repository root
#   sbatch -A account -p partition slurm/smoke.sh --max_steps=60
#   bash slurm/smoke.sh                                                   # the same without Slurm
#SBATCH --job-name=smoke
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:15:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
here="$(dirname "$0")/.."  # but Slurm runs a copy of this file
if [ -f "$here/slurm/common.sh" ]; then cd "$here"; else cd "$SLURM_SUBMIT_DIR"; fi
NPROC="${NPROC:-2}"
set -- config/smoke.py --device=cpu --out_dir=out/smoke_slurm --force "$@"
. slurm/common.sh
out_dir="$(out_dir_of out/smoke "$@")"
run "${launch[@]}" train.py "$@"
if [ "$(state)" != done ]; then echo "smoke: $out_dir/state.json does not say done" >&2; exit 1; fi
echo "smoke: fine, $nproc processes"
