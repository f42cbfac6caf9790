"""A program's start and end: streams that take any text, and messages in place of tracebacks."""

import errno
import io
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from configurator import UserError

# How gloo and NCCL say that a rank has died, or was silent for longer than world.PATIENCE
PEER_GONE = "[Cc]onnection (closed|reset) by peer|Timed out waiting|ncclRemoteError|Broken pipe"
# How torch, CUDA, MPS and numpy say that memory is short; most do so in a RuntimeError
NO_MEMORY = (
    "out of memory|[Uu]nable to allocate|can't allocate|ALLOC_FAILED|(size|numel).* overflow"
)


class Lasting(io.TextIOWrapper):
    """A stream that goes on into nothing when nobody reads it any more, or the disk is full."""

    def write(self, text: str) -> int:
        return self.attempt(super().write, text)

    def flush(self) -> None:
        self.attempt(super().flush)

    def attempt(self, call: Callable, *arguments: str) -> int | None:
        try:
            return call(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return call(*arguments)


def prepare_process(outlives_output: bool) -> None:
    """Let this process open many files, and print any text to any stream."""
    with suppress(ValueError, OSError):  # each shard that is mapped holds an open file
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before we began
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):  # a terminal need not know every character
            stream.reconfigure(errors="strict" if name == "stdin" else "backslashreplace")
            if outlives_output and name != "stdin":
                how = {"encoding": stream.encoding, "errors": stream.errors}
                lasting = Lasting(stream.detach(), **how, line_buffering=stream.line_buffering)
                setattr(sys, name, lasting)


def run(main: Callable, outlives_output: bool = False) -> None:
    """Call main(argv) as a program, and end the process with its exit code.

    2: the user can mend it, and is told how; 130: Ctrl-C; 141: nobody reads the output any more,
    which does not end a program whose work goes into files (outlives_output).
    """
    prepare_process(outlives_output)
    try:
        code = main(sys.argv[1:])
        print(end="", flush=True)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = in_words(error)
        if message is None:
            raise
        code = 2
        with suppress(OSError):
            print(f"error: {message}", file=sys.stderr)
    try:
        for stream in (sys.stdout, sys.stderr):
            print(end="", file=stream, flush=True)
    except OSError:  # Python would try once more, and complain
        os._exit(code)
    sys.exit(code)


def in_words(error: Exception) -> str | None:
    """Return what to tell the user about an error; None for a mistake of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"what was read is not UTF-8 text ({error}): convert it"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "check that path and what it permits"
        path = f"{error.filename}: " if error.filename else ""
        where = traceback.extract_tb(error.__traceback__)[-1]  # it may be a mistake of ours
        where = f"{where.name}, {os.path.basename(where.filename)} line {where.lineno}"
        what = f"{path}{error.strerror or error} (in {where})"
        return f"{what}; {advice}, then run the same command again"
    if "InvalidCxxCompiler" in str(error):
        return "torch.compile needs a C++ compiler and finds none: install g++, or --compile=False"
    if re.search(PEER_GONE, str(error)):
        reason = str(error).partition("\n")[0][:200]
        return f"another rank has ended or does not answer; it says why above ({reason})"
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        reason = str(error).partition("\n")[0] or type(error).__name__
        advice = "lower micro_batch, seq_len, n_samples or the sizes of the model"
        return f"out of memory ({reason}): {advice}"
    return None
