"""Evaluation of SmolLM2-135M-Instruct and of what was made of it, hours of one CPU core in all.

    python eval.py config/smollm2_eval.py --no_overwrite                  # all of it
    python eval.py config/smollm2_eval.py --stages=base --tasks=sst2      # or part by part
    python eval.py config/smollm2_eval.py --tasks=problems,rerank --calculator --no_overwrite
    python eval.py config/smollm2_eval.py --tasks=streaming --streaming=novels-smollm2 \
        --stream_slots=512 --n_streams=4 --stages=base --no_overwrite     # 41 minutes

WikiText-2, SST-2, DialogSum, GSM8K, and the HH-RLHF pairs that DPO did not see. bfloat16 is three
times as fast here as float32, on a CPU that has it.
"""

out_dir = "out/smollm2"
dtype = "bfloat16"
data = ""
chats = ""
text = "wikitext-2,wikitext-2-valid"
problems = "gsm8k-test"
pairs = "hh-rest"
sst2 = "sst2"
shots = "sst2-train"
dialogues = "dialogsum"
published = "gsm8k-published"
n_problems = 300  # --tasks=published takes all of them: --n_problems=1319
n_samples = 8
max_new_tokens = 256
