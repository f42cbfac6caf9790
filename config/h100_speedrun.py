"""The whole loop at 253M parameters on one node of H100s.

    python data.py --stage=all                              # on the login node, needs the network
    sbatch slurm/speedrun.sh config/h100_speedrun.py
    python speedrun.py config/h100_speedrun.py --nproc=4    # or this, without Slurm

Not yet run; the arithmetic of each stage is in its own recipe.
"""

out_dir = "out/h100"
pretrain = "config/h100_pretrain.py"
sft = "config/h100_sft.py"
dpo = "config/h100_dpo.py"
verifier = "config/h100_verifier.py"
eval = "config/h100_eval.py"
