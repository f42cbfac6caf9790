"""Real data from local files, for machines without network.

    python data.py config/local_data.py --local_dir=FOLDER --tokenizer=FOLDER/gpt2.tiktoken

English text, Alpaca, HH-RLHF pairs, GSM8K, WikiText-2, SST-2, DialogSum. FOLDER holds the files
named below; each has the schema of the hub data set that it stands for. About a minute on 2 CPU
cores. With 4,096 symbols learnt from the text (27 s more), data/english-4096.tiktoken:

    python data.py config/local_data.py --local_dir=FOLDER --train_tokenizer=4096
"""

sources = (
    "pretrain/english=pretrain/wikipedia_articles.txt.gz;pretrain/wikipedia_leads.txt.gz;"
    "pretrain/openstax_books_ccby.txt.gz;pretrain/openstax_books_ccbyncsa.txt.gz;"
    "pretrain/novels_1of3.txt.gz;pretrain/novels_2of3.txt.gz;pretrain/novels_3of3.txt.gz;"
    "pretrain/tinystories_4k.txt.gz",
    "sft/alpaca=alpaca_52k.jsonl.gz",
    "sft/hh-chosen=hh_rlhf_harmless_base_test.jsonl.gz",
    "dpo/hh-rlhf=hh_rlhf_harmless_base_test.jsonl.gz",
    "dpo/helpful=preference_llamafactory_dpo_en.jsonl.gz",
    "dpo/polite=preference_raschka_1100.jsonl",
    "verifier/gsm8k=gsm8k_train.jsonl.gz",
    "eval/gsm8k-test=gsm8k_test.jsonl",
    # answers to the test questions: to judge, never to train on
    "eval/gsm8k-published=gsm8k_example_model_solutions.jsonl.gz",
    "eval/wikitext-2=wikitext2_raw_test.txt.gz",
    "eval/wikitext-2-valid=wikitext2_raw_valid.txt.gz",
    "eval/sst2=sst2_dev.tsv",
    "eval/sst2-train=sst2_train.tsv.gz",  # examples for few-shot prompts
    "eval/dialogsum=dialogsum_test.jsonl",
)
