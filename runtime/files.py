"""Files: written all or nothing (also after a kill, on a full disk), read whole or refused."""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TextIO

from configurator import UserError


def write_atomic(path: str, write: Callable[[BinaryIO], Any], need: int = 0) -> None:
    """Let write(file) fill a temporary file, then put that file in the place of path.

    need: expected bytes, for the message of the UserError that a full disk raises.
    """
    folder = os.path.dirname(path) or "."
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        remove_if_there(temporary)
        free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
        raise UserError(
            f"could not write {path} ({type(error).__name__}: {error}); about {need / 1e6:.1f} MB "
            f"needed, {free / 1e6:.1f} MB free. The file that was there before is untouched: free "
            "some space, then run the same command again"
        ) from None


def remove_if_there(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def write_json(path: str, value: object) -> None:
    write_atomic(path, lambda f: f.write(json.dumps(value, indent=1).encode() + b"\n"))


def write_jsonl(path: str, rows: Iterable) -> None:
    texts = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lambda f: f.writelines(text.encode(errors="replace") for text in texts))


@contextlib.contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not; a missing, empty or damaged one is a UserError."""
    if not os.path.isfile(path):
        raise UserError(f"file {path} does not exist")
    if os.path.getsize(path) == 0:
        raise UserError(f"file {path} is empty")
    try:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig") as f:
            yield f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): copy it again") from None


def read_jsonl(path: str) -> list:
    """Read the lines of a .jsonl file or the list of a .json file; errors name file:line."""
    with open_text(path) as f:
        number = 0
        try:
            if path.removesuffix(".gz").endswith(".json"):
                return json.load(f)
            rows = []
            for text in f:
                number += 1
                if text.strip():
                    rows.append(json.loads(text))
            return rows
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number or error.lineno} is no JSON: {error}") from None


def read_rows(path: str) -> Iterator:
    """Yield the records of a .parquet, .json or .jsonl file; a damaged one is a UserError."""
    if not path.endswith(".parquet"):
        yield from read_jsonl(path)
        return
    import pyarrow.parquet

    if not os.path.isfile(path):
        raise UserError(f"file {path} does not exist")
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file: {error}") from None


def read_log(path: str) -> list[dict]:
    """Read a log's rows up to the first line that is no JSON, torn by a kill; no file, no rows."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for text in f:
            try:
                rows.append(json.loads(text))
            except ValueError:
                break
    return rows


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: object, sort_keys: bool = True) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of a value written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()[:16]
