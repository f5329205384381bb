"""What a system can be asked for, and what stands in where it cannot: macOS has less than Linux."""

import errno
import math
import os
import sys
from typing import BinaryIO, TextIO

_BLOCK = 1 << 20  # bytes
#: Of a stream whose reader ended, as a tee does at Ctrl-C, or whose terminal is gone.
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


def allocate(file: BinaryIO, size: int) -> None:
    """Take the room of the first size bytes of a file open for reading and writing; what it holds stays.

    Without this a file has holes, and a full disk shows as a crash in the middle of the work. Raises OSError where the
    disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for at in range(0, size, _BLOCK):  # each block over itself, holes as the zeros that they read as
        file.seek(at)
        content = file.read(min(_BLOCK, size - at))
        file.seek(at)
        file.write(content.ljust(min(_BLOCK, size - at), b"\0"))
    file.flush()


def cores() -> int:
    """Cores that this process may use, or those of the machine where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Bytes of memory of the machine, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line, to standard output without a stream; where nobody reads it any more, this and what follows is lost.

    Where it cannot be written now, as to a full disk, that line alone may be. A run goes on either way: what it says is
    in its log.txt too, and a screen is no reason to lose what was paid for.
    """
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        if error.errno in _GONE:
            nowhere(stream)


def settle(stream: TextIO | None) -> None:
    """Write what a stream of the process still holds, or let it go, so that its end is no fault."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere(stream)


def nowhere(stream: TextIO) -> None:
    """Let go what is still to be written to a stream of the process, and all that will be."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
