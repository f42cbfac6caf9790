"""What the tests of evals/ and eval.py share: a folder of four random checkpoints with its data."""

from pathlib import Path

import numpy as np
from helpers import BYTE, save_start, tiny

from corpus import toy
from corpus.shards import write_shard
from corpus.tokenizer import CHAT_1
from evals.results import read_results
from runtime.checkpoint import weights_hash
from runtime.files import write_atomic, write_json, write_jsonl

TEXT = " = One = \n\n first words of it .\n second line ,\n = Two = \n\n more of it .\n"
PUBLISHED = [
    {
        "question": f"{i} + 1?",
        "ground_truth": f"A: {i + 1}",
        "small": {"solution": f"It is\nA: {i + 2}", "is_correct": i == 0},
        "large": {
            "solution": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\nA: {i + 1}",
            "is_correct": True,
        },
    }
    for i in range(3)
]


STAGES = ("pretrain", "sft", "dpo", "verifier")
# Tasks that need a setting, or RL: test_few_shot.py, test_sinks.py, test_problems.py
ON_REQUEST = {"few_shot", "streaming", "attention", "samples"}


def make_run(folder: Path) -> list[str]:
    """Write data and a checkpoint for every stage. -> flags for eval.py"""
    write_data(folder / "data")
    origin = {}
    for seed, stage in enumerate(STAGES):
        origin = make_stage(folder / "run" / stage, seed, stage, init_from=origin)
    return [
        f"--out_dir={folder / 'run'}",
        f"--data_dir={folder / 'data'}",
        "--text=wiki",
        "--published=larger",
        "--sst2=films",
        "--dialogues=talks",
        "--n_samples=2",
        "--max_new_tokens=6",
        "--device=cpu",
        "--dtype=float32",
    ]


def make_stage(folder: Path, seed: int, task: str, **changes) -> dict:
    """Write the checkpoint of a stage. -> init_from of a stage that starts from it"""
    fields = {"n_layer": 1, "seq_len": 256, "score_head": task == "verifier"}
    model = tiny(seed, **{**fields, **changes.pop("fields", {})})
    save_start(folder, model, task=task, template=CHAT_1, **changes)
    return {"ref": str(folder), "weights_hash": weights_hash(model.state_dict())}


def write_data(folder: Path) -> None:
    """Write a little of every kind of data."""
    world = folder / "toy"
    write_json(str(world / "manifest_pretrain.json"), {})
    write_bytes(world / "val_000.bin", "".join(toy.records(toy.story, "val", 20, 0)))
    write_bytes(world / "train_000.bin", TEXT[: len(TEXT) // 2])
    write_jsonl(str(world / "problems_test.jsonl"), toy.records(toy.problem, "test", 3, 0))
    shots = [{"question": f"{i}+1", "answer": f"#### {i + 1}"} for i in range(7)]
    write_jsonl(str(folder / "shots" / "problems_test.jsonl"), shots)
    write_jsonl(str(world / "dpo_test.jsonl"), toy.records(toy.preference, "test", 4, 0))
    write_jsonl(str(world / "sft_val.jsonl"), toy.records(toy.instruction, "val", 4, 0))
    write_jsonl(str(folder / "larger" / "test.jsonl"), PUBLISHED)
    write_atomic(str(folder / "wiki" / "test.txt"), lambda f: f.write(TEXT.encode()))
    for name, count in (("films", 5), ("films-train", 6)):
        films = [{"sentence": f"no. {i} ", "label": str(int(i % 5 > 1))} for i in range(count)]
        write_jsonl(str(folder / name / "test.jsonl"), films)
    talk = "#B#: hello there\n#A#: bye\n#B#: so long, see you soon"
    talks = [
        {"dialogue": f"#A#: hi {i}\n{talk}", "summary1": "A and B greet", "summary2": f"hi {i}"}
        for i in range(2)
    ]
    write_jsonl(str(folder / "talks" / "test.jsonl"), talks)


def write_bytes(path: Path, text: str) -> None:
    """Write a shard of the bytes of a text."""
    write_shard(str(path), np.frombuffer(text.encode(), np.uint8).astype("<u4"), BYTE)


def results_of(folder: Path, task: str) -> list[dict]:
    """Return the results of one task."""
    return [row for row in read_results(str(folder)) if row["task"] == task]


def save_peer(folder: Path, kind: str = "Llama", seq_len: int = 64, **tokens):
    """Save a small random transformers model with a tokenizer of bytes and words. -> the model"""
    import torch
    import transformers

    tokenizer = peer_tokenizer(**tokens)
    torch.manual_seed(0)
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": seq_len, "hidden_size": 32}
    own |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": False}
    own |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    own |= {"pad_token_id": tokenizer.eos_token_id}
    if kind != "GPT2":
        own |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    if kind in ("Mistral", "Flint"):
        own |= {"sliding_window": 5}
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")
    model = model(getattr(transformers, f"{kind}Config")(**own))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def peer_tokenizer(words: tuple[str, ...] = (), prefix: bool = False, template: str | None = None):
    """Return a transformers tokenizer of bytes and whole words; prefix: <s> before texts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({x: i for i, x in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    if prefix:
        start = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [start])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
