"""Images in Parquet files as Hugging Face's datasets has them: a column of images, and one of labels or none."""

import collections
import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mekd.data.arrays import DataError
from mekd.data.names import is_hidden

#: The names that a split goes by; of several the first that is there.
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
#: A row group is read whole: this is the most that its two columns may hold.
LARGEST = 2**31
#: Bytes of row groups that are kept for the next rows.
KEPT = 2**29


def find(root: Path, split: str) -> list[Path]:
    """The Parquet files of a split: in a folder of its name, or with names that begin with it; sorted.

    Under root, root/data or a folder in root (a dataset's configuration). Of train: those of no split, where none is.
    """
    folders = [root, *sorted(entry for entry in _inside(root) if entry.is_dir() and not is_hidden(entry.name))]
    all_of_them = [file for folder in folders for file in _files(folder)]
    for name in SPLITS.get(split, (split,)):
        within = [file for folder in folders if (folder / name).is_dir() for file in _files(folder / name)]
        named = [file for file in all_of_them if re.match(rf"{re.escape(name)}([-._].*)?\.parquet$", file.name)]
        if found := sorted({*within, *named}):
            return found
    others = {name for names in SPLITS.values() for name in names}
    if split == "train" and not any(re.split(r"[-._]", file.name)[0] in others for file in all_of_them):
        return sorted(file for file in all_of_them if file.parent.name not in others)
    return []


def read(files: Sequence[Path]) -> tuple[tuple[str, ...] | None, list[str], np.ndarray]:
    """The names of the classes (None where there are no labels; empty where they are numbers without names), the row
    groups as FILE:NUMBER, and the rows: (n, 5) int64, group, row in it, 0, label (-1 where there is none), 0.

    Raises DataError naming the file and what is wrong with it.
    """
    names: tuple[str, ...] | None = None
    columns: tuple[str, str | None] | None = None
    as_text = False
    groups: list[str] = []
    labels: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    for file in files:
        opened = _open(file)
        features = _features(opened.schema_arrow)
        mine = _columns(file, opened.schema_arrow, features)
        own = _names(features, mine[1])
        text = mine[1] is not None and _is_text(opened.schema_arrow.field(mine[1]).type)
        if columns is not None and (mine, own, text) != (columns, names, as_text):
            raise DataError(f"{file} has other columns or classes than {files[0]}; files of a data set have the same")
        columns, names, as_text = mine, own, text
        for number in range(opened.num_row_groups):
            group = opened.metadata.row_group(number)
            size = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)
                       if group.column(i).path_in_schema.split(".")[0] in mine)  # fmt: skip
            if size > LARGEST:
                raise DataError(
                    f"{file} has a row group of {size / 1e9:.1f} GB, and one is read whole: write it with smaller ones "
                    "(row_group_size=100)"
                )
            groups.append(f"{file}:{number}")
            if mine[1] is None:
                labels.append(np.full(group.num_rows, -1, np.int64))
                continue
            column = _read(opened, number, [mine[1]], groups[-1])[mine[1]]
            if column.null_count:
                raise DataError(f"{groups[-1]} has {column.null_count} rows without a {mine[1]}; leave those rows out")
            (texts if _is_text(column.type) else labels).append(column.to_numpy(zero_copy_only=False))
    if columns is None or not sum(map(len, [*labels, *texts])):
        raise DataError(f"{files[0]} holds no row")
    if texts:
        found, numbers = np.unique(np.concatenate(texts).astype(str), return_inverse=True)
        names, flat = tuple(map(str, found)), numbers
        sizes = [len(part) for part in texts]
    else:
        flat, sizes = np.concatenate(labels).astype(np.int64), [len(part) for part in labels]
    spans = np.zeros((len(flat), 5), np.int64)
    spans[:, 0] = np.repeat(np.arange(len(sizes)), sizes)
    spans[:, 1] = np.concatenate([np.arange(size) for size in sizes])
    spans[:, 3] = flat
    if columns[1] is None:
        return None, groups, spans
    if (low := int(flat.min())) < 0:
        raise DataError(
            f"{files[0]}: the column {columns[1]} holds {low}, as of images without a label; classes count from 0"
        )
    return names or (), groups, spans


def sample(group: str, row: int) -> bytes:
    """The bytes of an image. Raises OSError or ValueError saying what is missing."""
    content = _group(group)[row].as_py()
    if isinstance(content, dict):
        if content.get("bytes") is None:
            raise ValueError(f"its bytes are not in the file, which names {content.get('path')!r}; write them into it")
        content = content["bytes"]
    if not content:
        raise ValueError("it is empty")
    _check_size(content)
    return bytes(content)


def _check_size(content: bytes) -> None:
    """ValueError where a file claims more pixels than Pillow opens: whoever decodes it would make room for them."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images in Parquet files need Pillow: pip install pillow") from error
    try:
        Image.open(io.BytesIO(content)).close()
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except (OSError, ValueError):
        pass  # no image of Pillow's; whoever decodes it says so


def _inside(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); data.path must be a folder") from error


def _files(folder: Path) -> list[Path]:
    return [p for p in _inside(folder) if p.suffix.lower() == ".parquet" and p.is_file() and not is_hidden(p.name)]


def _library() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("data.name is 'parquet', which needs pyarrow: pip install 'mekd[parquet]'") from error
    return pyarrow.parquet


def _open(file: Path | str) -> Any:
    library = _library()
    try:
        return library.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged or no Parquet file ({_line(error)}); fetch it again") from error


def _read(opened: Any, number: int, columns: list[str], name: str) -> Any:
    try:
        return opened.read_row_group(number, columns=columns)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read ({_line(error)}); the file is damaged: fetch it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's datasets says of the columns; empty where a file is another's."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def _columns(file: Path, schema: Any, features: dict[str, Any]) -> tuple[str, str | None]:
    """The columns of images and of labels, the latter None where there is none."""
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    images = images or [name for name in schema.names if _is_image(schema.field(name).type)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image is None or not _is_image(schema.field(image).type):
        has = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
        raise DataError(
            f"{file} has {len(images) or 'no'} column{'s' if len(images) > 1 else ''} of images among {has}: one is "
            "needed, called image, of struct<bytes: binary, path: string> or of binary"
        )
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    label = "label" if "label" in schema.names else labels[0] if len(labels) == 1 else None
    if label is None and labels:
        raise DataError(f"{file} has the labels {', '.join(labels)}: call the one that counts label")
    if label is not None and not (_is_number(schema.field(label).type) or _is_text(schema.field(label).type)):
        raise DataError(
            f"{file}: the column {label} is of {schema.field(label).type}; labels are integers from 0 or names"
        )
    return image, label


def _names(features: dict[str, Any], label: str | None) -> tuple[str, ...] | None:
    names = None if label is None else features.get(label, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


_lock = threading.Lock()
_groups: "collections.OrderedDict[str, Any]" = collections.OrderedDict()


def _group(group: str) -> Any:
    """The column of images of a row group, kept while the rows around it are read: they are shuffled in windows."""
    with _lock:
        if group in _groups:
            _groups.move_to_end(group)
            return _groups[group]
        file, _, number = group.rpartition(":")
        opened = _open(file)
        image, _ = _columns(Path(file), opened.schema_arrow, _features(opened.schema_arrow))
        column = _groups[group] = _read(opened, int(number), [image], group)[image]
        while len(_groups) > 1 and sum(kept.nbytes for kept in _groups.values()) > KEPT:
            _groups.popitem(last=False)
        return column
