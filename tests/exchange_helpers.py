"""What the tests of exchange/ share: small models of every home, vocabularies, dialogues."""

import base64
import functools
import gzip
import json
from pathlib import Path

import tokenizers
import torch
from corpus_helpers import real
from helpers import BYTE, save_start, tiny
from hypothesis import strategies as st

from corpus import toy
from corpus.foreign import byte_of_symbol
from corpus.tokenizer import CHAT_1, Tokenizer, load_tokenizer
from exchange.exporting import write_folder
from exchange.weights import config_of, from_ours, home_of
from inference.sampling import GREEDY, generate
from model import GPT

LLAMA = {"qk_norm": False, "sinks": False}
HOMES = {
    "Llama": LLAMA,
    "Llama, not tied": LLAMA | {"tied": False, "rms_eps": 1e-5, "rope_base": 5e4, "n_kv_head": 4},
    "Mistral": LLAMA | {"sliding_window": 9},
    "Qwen3": {"sinks": False},
    "Qwen3 with a window": {"sinks": False, "sliding_window": 9, "tied": False},
    "Flint": {"d_head": 16},
    "Flint with a window": {"sliding_window": 9, "tied": False, "n_kv_head": 1},
    "Flint with experts": {"n_expert": 4, "d_expert": 24, "balance_coef": 0.02},
    "Flint with experts, no sinks": {"n_expert": 3, "sinks": False, "tied": False},
}
TEXT = "Tom the cat saw 12 pens at the shop. 'Rosé!' said Ana; they're new,  isn't it?\n\n\t好 🐟\n"
# Characters that a split pattern tells apart, and those that spell a special token
LETTERS = "aB1 \n\t'sé好.!<|end>_²٣\u00a0\u3000🐟"
ANY_TEXT = st.text(st.sampled_from(LETTERS) | st.characters(exclude_categories=["Cs"]))
SPECIAL_TEXT = "a<|end|>b<|endoftext|> <|user|><|im_start|>c</s>"
PROMPTS = [[5, 80, 66], [101], [97, 98, 99, 100, 32, 97, 98], [40, 41]]


@torch.no_grad()
def logit_gap(ours: GPT, theirs, lengths: tuple[int, ...] = (1, 17, 64)) -> float:
    """Return the largest difference between the logits of two models, at these lengths."""
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for n in lengths:
        ids = torch.randint(ours.cfg.vocab_size, (2, n), generator=generator)
        gaps.append((ours(ids) - theirs(ids).logits).abs().max().item())
    return max(gaps)


def check_generation(ours: GPT, theirs, n: int = 20) -> None:
    """Assert that greedy answers to unequal prompts in one batch are the same ids."""
    width = max(map(len, PROMPTS))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "suppress_tokens": None}
    found = theirs.generate(torch.tensor(rows), attention_mask=torch.tensor(mask), **options)
    assert generate(ours, PROMPTS, n, sampling=GREEDY) == found[:, width:].tolist()


def random_model(tokenizer: Tokenizer = BYTE, seed: int = 0, **fields) -> GPT:
    """Return a small random model, whose rows of no token are zero as from the start."""
    model = tiny(seed, vocab_size=tokenizer.vocab_size, **fields)
    with torch.no_grad():
        for matrix in (model.embed.weight, model.head.weight):
            matrix[tokenizer.vocab_size :] = 0
    return model.eval()


def save_chat_model(folder: Path, tokenizer: Tokenizer = BYTE, **fields) -> GPT:
    """Save a random model as align.py saves one that was tuned on chats. -> the model"""
    model = random_model(tokenizer, **fields)
    save_start(folder, model, task="sft", template=CHAT_1, tokenizer=tokenizer.spec())
    return model


def trained_bpe(n: int = 400, special: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """Return a small byte-level BPE, trained on TEXT and the toy world as the library does it."""
    return tokenizers.Tokenizer.from_str(trained_json(n, special))


@functools.cache
def trained_json(n: int, special: tuple[str, ...]) -> str:
    """Return the text of tokenizer.json of a trained BPE."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": list(special)}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=n, show_progress=False, **options)
    texts = [TEXT * 5, *toy.records(toy.story, "train", 200, 0)]
    backend.train_from_iterator(texts, trainer)
    assert backend.get_vocab_size() == n
    return backend.to_str()


def ranks_file(folder: Path) -> str:
    """Write the ranks of a small trained BPE. -> the path of the file"""
    symbols = byte_of_symbol()
    vocab = sorted(json.loads(trained_bpe().to_str())["model"]["vocab"].items(), key=lambda x: x[1])
    tokens = [bytes(symbols[symbol] for symbol in text) for text, _ in vocab]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path = folder / "own.tiktoken"
    path.write_text("".join(lines))
    return str(path)


def vocabulary(name: str, folder: Path) -> Tokenizer:
    """Return the tokenizer byte, toy or "ranks", a small one of a file in the folder."""
    return load_tokenizer(ranks_file(folder) if name == "ranks" else name)


def real_texts() -> list[str]:
    """Return 10 MB of the real data, of every kind of file, in parts of 100,000 characters."""
    names = ["wikitext2_raw_valid.txt.gz", "wikitext2_raw_test.txt.gz", "tinyshakespeare.txt.gz"]
    names += ["dialogsum_test.jsonl", "gsm8k_train.jsonl.gz", "hh_rlhf_harmless_base_test.jsonl.gz"]
    text = ""
    for name in [*names, "preference_llamafactory_dpo_en.jsonl.gz", "alpaca_52k.jsonl.gz"]:
        data = Path(real(name)).read_bytes()
        data = gzip.decompress(data) if name.endswith(".gz") else data
        text += data.decode()[: 10_000_000 - len(text)]
    return [text[i : i + 100_000] for i in range(0, len(text), 100_000)]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
    "'<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_theirs(folder: Path, backend: tokenizers.Tokenizer, jinja: str | None = CHATML, **fields):
    """Write a random model and a tokenizer as transformers does. -> our model of these weights"""
    n = backend.get_vocab_size()
    torch.manual_seed(0)
    model = tiny(vocab_size=n, **(LLAMA | fields)).eval()
    with torch.no_grad():
        for matrix in (model.embed.weight, model.head.weight):
            matrix[n:] = 0
    kind = home_of(model.cfg, "a test")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    files = {"config.json": config_of(model.cfg, kind), "tokenizer_config.json": special}
    files |= {"tokenizer.json": backend.to_str(), "generation_config.json": {"eos_token_id": 2}}
    files |= {"chat_template.jinja": jinja} if jinja else {}
    write_folder(str(folder), files, from_ours(model.state_dict(), model.cfg, kind))
    return model
