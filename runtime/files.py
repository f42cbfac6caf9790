"""Files: written all or nothing (also after a kill, on a full disk), read whole or refused."""

import contextlib
import csv
import errno
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TextIO

from configurator import UserError

RECORDS = ("json", "jsonl", "ndjson", "parquet", "csv", "tsv")  # suffixes of files of records
PARQUET = b"PAR1"  # the first bytes of such a file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unfinished(path: str, kind: str) -> str:
    """Return a name beside path for what this process has not finished, kind "tmp" or "part"."""
    return f"{path}.{os.getpid()}@{os.uname().nodename}.{kind}"


def remove_leftovers(folder: str) -> None:
    """Remove what processes of this machine left unfinished in a folder when they died."""
    here = re.escape(os.uname().nodename)
    for path in glob.glob(os.path.join(glob.escape(folder), "*.*")):
        found = re.search(rf"\.(\d+)(@{here})?\.(tmp|part)$", path)
        is_part = os.path.isdir(path)  # a file .part is a user's archive
        if found and is_part == (found[3] == "part") and is_dead(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
            remove_if_there(path)


def is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # it lives, and is another user's
        return False
    except (OSError, OverflowError):
        return True
    return False


def write_atomic(path: str, write: Callable[[BinaryIO], Any], need: int = 0) -> None:
    """Let write(file) fill a temporary file, then put that file in the place of path.

    need: expected bytes, for the message of the UserError that a full disk raises.
    """
    folder = os.path.dirname(path) or "."
    temporary = unfinished(path, "tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        remove_leftovers(folder)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        advice = "choose a place that you may write to"
        if getattr(error, "errno", errno.ENOSPC) in DISK_FULL:  # torch gives no number
            free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
            room = f"about {need / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
            advice = f"free some space ({room}), then run the same command again"
        what = f"could not write {path} ({type(error).__name__}: {error})"
        raise UserError(f"{what}. The file that was there is untouched; {advice}") from None
    finally:
        remove_if_there(temporary)


def remove_if_there(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def reason_of(error: Exception) -> str:
    """Return what a library raised, in one line of a message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def read_json(path: str) -> dict:
    """Return the object in a JSON file; {} where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        with open(path) as f:
            value = json.load(f)
        return value if isinstance(value, dict) else {}
    return {}


def write_json(path: str, value: object) -> None:
    write_atomic(path, lambda f: f.write(json.dumps(value, indent=1).encode() + b"\n"))


def as_lines(rows: Iterable) -> bytes:
    texts = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(texts).encode(errors="replace")


def write_jsonl(path: str, rows: Iterable) -> None:
    write_atomic(path, lambda f: f.writelines(as_lines([row]) for row in rows))


def first_bytes(path: str) -> bytes:
    """Return the start of a file; one that is missing, empty or not readable is a UserError."""
    if not os.path.isfile(path):
        what = "is a folder or a device" if os.path.exists(path) else "does not exist"
        raise UserError(f"file {path} {what}")
    try:
        with open(path, "rb") as f:
            start = f.read(1024)
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror}") from None
    if not start:
        raise UserError(f"file {path} is empty")
    return start


@contextlib.contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped or not; a missing, empty or damaged one is a UserError."""
    start = first_bytes(path)
    is_gzip = path.endswith(".gz") or start.startswith(b"\x1f\x8b")
    if b"\0" in start and not is_gzip:
        raise UserError(f"{path} is not UTF-8 text: it has zero bytes, as UTF-16 and programs have")
    try:
        opener = gzip.open if is_gzip else open
        with opener(path, "rt", encoding="utf-8-sig") as f:
            yield f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): copy it again") from None


def read_lines(path: str) -> Iterator[str]:
    with open_text(path) as f:
        yield from f


def finite(text: str) -> float:
    """Return the number of a JSON text. Raises ValueError for NaN, Infinity and 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


STRICT_JSON = json.JSONDecoder(parse_constant=finite, parse_float=finite)
WHITE = re.compile(r"\s*")


def read_jsonl(path: str) -> list:
    """Return the values of JSON lines, or the objects of one list; errors name file:line."""
    with open_text(path) as f:
        text = f.read().rstrip()
    values, start = [], 0
    while start < len(text):
        start = WHITE.match(text, start).end()
        try:
            value, start = STRICT_JSON.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            place = getattr(error, "pos", start) if text[start] == "[" else start
            line = text.count("\n", 0, place) + 1  # of a list the fault's, else the record's
            raise UserError(f"{path}:{line} is no JSON: {error}") from None
        values.append(value)
    is_list = len(values) == 1 and isinstance(values[0], list)
    are_records = is_list and all(isinstance(value, dict) for value in values[0])
    return values[0] if are_records else values


def file_kind(path: str) -> str:
    """Return what a file's name says that it holds: its suffix in lower case, without .gz."""
    name = os.path.basename(path).lower().removesuffix(".gz")
    return os.path.splitext(name)[1][1:]


def holds_records(path: str) -> bool:
    """Say whether a file holds records and no text: by its name, else by its first line."""
    if file_kind(path) in RECORDS or first_bytes(path).startswith(PARQUET):
        return True
    with open_text(path) as f:
        start = next(filter(str.strip, f), "")
    return bool(re.match(r'\s*(\[\s*)?\{\s*("|$)|\s*\[\s*$', start))


def read_rows(path: str) -> Iterator:
    """Yield the records of a file of parquet, CSV, TSV or JSON; a damaged one is a UserError."""
    if file_kind(path) == "parquet" or first_bytes(path).startswith(PARQUET):
        yield from read_parquet(path)
    elif file_kind(path) in ("csv", "tsv"):
        yield from read_table(path)
    else:
        yield from read_jsonl(path)


def read_table(path: str) -> Iterator[dict]:
    """Yield the rows of a .csv or .tsv file, whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a novel
    with open_text(path) as f:
        header = f.readline()
        how = {"delimiter": max(",;\t", key=header.count), "strict": True}
        if file_kind(path) == "tsv":
            how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        lines = csv.reader(itertools.chain([header], f), **how)
        try:
            keys = [key.strip() for key in next(lines)]
            if len(set(keys)) < len(keys):
                raise UserError(f"{path} names a column twice: {', '.join(keys)}")
            for cells in filter(None, lines):
                if len(cells) != len(keys):
                    wanted = f"expected {len(keys)}: {', '.join(keys)}"
                    raise UserError(f"{path}:{lines.line_num} has {len(cells)} cells, {wanted}")
                yield dict(zip(keys, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{lines.line_num} is no table: {error}") from None


def read_parquet(path: str) -> Iterator[dict]:
    """Yield the rows of a .parquet file; NaN, which pandas writes for nothing, is None."""
    import pyarrow.parquet

    first_bytes(path)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                floats = [key for key, value in row.items() if isinstance(value, float)]
                holes = [key for key in floats if not math.isfinite(row[key])]
                yield row | dict.fromkeys(holes)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file: {error}") from None


def digest_of_files(folder: str, patterns: str) -> str:
    """Return 16 digits that change with names and content of the files that match in a folder."""
    names = {name for text in patterns.split() for name in glob.glob(text, root_dir=folder)}
    return digest([[name, sha256(os.path.join(folder, name))] for name in sorted(names)])


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: object, sort_keys: bool = True) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of a value written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()[:16]
