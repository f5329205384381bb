"""Functions of the user's own, by name: FILE.py:NAME, or package.module:NAME."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mekd.errors import UsageError


def from_file(value: str) -> Callable[..., Any]:
    """The function that value, FILE.py:NAME, names; UsageError saying why there is none.

    The file's code runs. It may import what lies beside it.
    """
    file, _, name = value.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UsageError("it must be FILE.py:function")
    if not path.is_file():
        raise UsageError(f"no such file {file}")
    spec = importlib.util.spec_from_file_location(f"mekd_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    _reach(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{file} cannot be imported: {told(error)}") from error
    return _function(module, file, name)


def from_module(value: str) -> Callable[..., Any]:
    """The same for package.module:NAME, installed or in the folder that the command runs in."""
    dotted, _, name = value.rpartition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in dotted.split(".")):
        raise UsageError("it must be package.module:function or FILE.py:function")
    _reach(Path.cwd())
    try:
        module = importlib.import_module(dotted)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{dotted}.".startswith(f"{error.name}.")
        hint = ". Install it, or run from the folder that holds it" if missing else ""
        raise UsageError(f"{dotted} cannot be imported: {told(error)}{hint}") from error
    return _function(module, dotted, name)


def told(error: BaseException) -> str:
    """What the user's code raised and where, in a line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    placed = frames and not isinstance(error, SyntaxError)  # which says itself where it is
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if placed else ""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= 300 else said[:300] + ' ...'}{where}"


def _reach(folder: Path) -> None:
    """Let imports find what lies in folder, after everything that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _function(module: ModuleType, place: str, name: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"{place} has no function {name}")
    return found
