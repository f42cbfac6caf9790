"""A program's start and end: streams that take any text, and messages in place of tracebacks."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable

from configurator import UserError

# How torch, CUDA, MPS and numpy say that memory is short; most do so in a RuntimeError
NO_MEMORY = (
    "out of memory|[Uu]nable to allocate|can't allocate|ALLOC_FAILED|(size|numel).* overflow"
)
# What to do with characters that a stream cannot hold: a terminal need not know every one
STREAMS = {"stdin": "strict", "stdout": "backslashreplace", "stderr": "backslashreplace"}


def run(main: Callable) -> None:
    """Call main(argv) as a program, and end the process with its exit code.

    2: the user can mend it, and is told how; 130: Ctrl-C; 141: nobody reads the output any more.
    """
    for name, errors in STREAMS.items():
        if getattr(sys, name) is None:  # it was closed before we began
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w"))
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors=errors)
    try:
        code = exit_code(main)
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # Python would try once more, and complain
        os._exit(code)
    sys.exit(code)


def exit_code(main: Callable) -> int:
    """Return the exit code of main(argv), or 2 with a message for what the user can mend."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = in_words(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def in_words(error: Exception) -> str | None:
    """Return what to tell the user about an error; None for a mistake of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"what was read is not UTF-8 text ({error}): convert it"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "check that path and what it permits"
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; {advice}, then run the same command again"
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        reason = str(error).partition("\n")[0] or type(error).__name__
        advice = "lower micro_batch, seq_len, n_samples or the sizes of the model"
        return f"out of memory ({reason}): {advice}"
    return None
