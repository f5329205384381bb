"""One run at a time in a folder: a lock that goes with its process, however that ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout  # torch brings it

from mekd import files
from mekd.engine import parallel
from mekd.errors import MekdError, UsageError

#: Seconds to wait for a lock: where a run is killed, its loader's processes hold it for up to 5 more.
PATIENCE = 6.0


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, of all processes together; UsageError where one works there already.

    What was made for that is taken away again, so that a run that is refused leaves nothing.
    """
    made: list[Path] = []
    lock = _lock_of(out)
    error = _refused(out, lock, made) if parallel.rank() == 0 else None
    try:
        if any(parallel.any_of(error is not None)):
            raise error or UsageError(f"--out is {str(out)!r}, which the first process cannot work in: it says why")
        yield
    finally:
        _let_go(lock)
        for folder in made:
            with contextlib.suppress(OSError):  # something lies there by now
                folder.rmdir()


@contextlib.contextmanager
def still(run: Path) -> Iterator[None]:
    """Keep runs out of a folder while its files are read together; UsageError where one works there."""
    lock = _lock_of(run)
    if run.is_dir():
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise UsageError(
                f"RUN is {str(run)!r}, where a run is at work, so that its files may be of two students: wait for it "
                f"(`mekd watch {run}` shows how far it is), or stop it"
            ) from None
        except (NotImplementedError, OSError):  # where nothing can be written, no run writes
            pass
    try:
        yield
    finally:
        _let_go(lock)


def _lock_of(run: Path) -> FileLock:
    return FileLock(run / "run.lock", thread_local=False)


def _let_go(lock: FileLock) -> None:
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)  # first: whoever has it, has the file of that name
    lock.release()


def _refused(out: Path, lock: FileLock, made: list[Path]) -> MekdError | None:
    """Take the lock, and add the folders that are made for it to made; why not, if not."""
    try:
        made += [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        return UsageError(
            f"--out is {str(out)!r}, where another run is at work: wait for it (`mekd watch {out}` shows how far it "
            "is), stop it, or say another --out"
        )
    except NotImplementedError:  # a file system without locks: there the ledger's own is all that there is
        pass
    except OSError as error:
        return files.WriteError(
            f"--out is {str(out)!r}, which cannot be written ({error}): check the folder's permissions, or say another "
            "--out"
        )
    return None
