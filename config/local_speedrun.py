"""The whole loop on real data, small, on 2 CPU cores.

python data.py config/local_data.py --local_dir=FOLDER --tokenizer=FOLDER/gpt2.tiktoken
python speedrun.py config/local_speedrun.py
"""

out_dir = "out/local"
pretrain = "config/local_pretrain.py"
sft = "config/local_sft.py"
dpo = "config/local_dpo.py"
verifier = "config/local_verifier.py"
eval = "config/local_eval.py"
