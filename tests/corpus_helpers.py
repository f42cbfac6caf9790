"""What the tests of corpus/ and data.py share: real data where it is, small sources, shards."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import BYTE, EOS, REAL
from hypothesis import HealthCheck, settings

from corpus.shards import read_shard, write_shard
from data import DataConfig

RANKS = REAL / "gpt2.tiktoken"
needs_ranks = pytest.mark.skipif(
    not RANKS.is_file(), reason=f"no GPT-2 ranks at {RANKS} (set MODERN_LLM_DATA)"
)
quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXTS = [f"Tale number {i}.\nIt has two lines." for i in range(250)]
WIKI = (
    " \n = Tom Cat = \n \n He is a cat . \n = = Life = = \n He sat . \n"
    " \n = Mia Dog = \n She ran . \n"
)


def real(name: str) -> str:
    """Return the path of a file of real data; skip the test where it is not there."""
    if not (REAL / name).is_file():
        pytest.skip(f"no {name} in {REAL} (set MODERN_LLM_DATA)")
    return str(REAL / name)


def snapshot(folder) -> dict[str, bytes]:
    """Return the content of every file in a folder; a lock's says who came last and when."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    content = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: b"" if name.endswith("lock") else x for name, x in content.items()}


def jsonl(path, *rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shard(path, tokens, tokenizer=BYTE):
    """Write tokens as a shard of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(str(path), np.asarray(tokens), tokenizer)
    return path


def foreign(path, tokens, magic=20240520, version=1, count=None):
    """Write a shard as llm.c's write_datafile does: no words but the first three."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    return path


def request(folder, *sources: str, **keys) -> DataConfig:
    """Return the configuration that prepares sources from folder into folder/out, in bytes."""
    places = {"data_dir": str(folder / "out"), "local_dir": str(folder)}
    return DataConfig(**{"sources": sources, "tokenizer": "byte", **places, **keys})


def tokens_of(path) -> list[int]:
    """Return the tokens of a shard of bytes."""
    return read_shard(str(path), BYTE).tolist()


def every_token(folder) -> list[int]:
    """Return the tokens of a small folder: the training shard, then the validation shard."""
    return tokens_of(folder / "train_000.bin") + tokens_of(folder / "val_000.bin")


def documents_of(folder) -> list[str]:
    """Return every document of the shards, in no particular order; each must end with EOS."""
    found = []
    for path in sorted(folder.glob("*.bin")):
        ids = tokens_of(path)
        ends = [i for i, token in enumerate(ids) if token == EOS]
        starts = [0, *[end + 1 for end in ends]]
        found += [BYTE.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    return found


def parquet(path, columns: dict) -> None:
    """Write columns as a parquet file."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_source(folder, kind: str) -> str:
    """Write TEXTS as a file of some kind, and return its name."""
    marked = "".join(text + "\n<|endoftext|>\n" for text in TEXTS).encode()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == "parquet":
        parquet(folder / "x.parquet", {"text": TEXTS, "id": list(range(250))})
        return "x.parquet"
    content = {
        "txt": marked,
        "txt.gz": gzip.compress(marked),
        "jsonl": rows,
        "jsonl.gz": gzip.compress(rows),
        "json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    }
    (folder / f"x.{kind}").write_bytes(content[kind])
    return f"x.{kind}"


def chat(*texts: str) -> list[dict]:
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
