"""What a file is, told by its first bytes: for the message when it is not what was asked for."""

import zipfile
from pathlib import Path

EXPORT = "`mekd export --teacher.arch NAME --teacher.checkpoint FILE` makes an ONNX file of a state_dict"
TF2ONNX = "convert it with `python -m tf2onnx.convert` (pip install tf2onnx)"

#: kind -> what it is, in words.
NAMES = {
    "folder": "a folder",
    "saved_model": "a TensorFlow SavedModel",
    "empty": "an empty file",
    "lfs": "a pointer of git-lfs, not the file itself",
    "page": "a web page, not a model",
    "safetensors": "a safetensors file: weights without their network",
    "torch": "a PyTorch checkpoint",
    "torchscript": "a TorchScript module",
    "zip": "a zip archive",
    "gzip": "a gzip archive",
    "pickle": "a Python pickle",
    "keras": "a Keras model",
    "tflite": "a TensorFlow Lite model",
}
#: What makes an ONNX file of it.
AS_ONNX = {
    "folder": "name the .onnx file in it",
    "saved_model": TF2ONNX,
    "empty": "download or export it again",
    "lfs": "`git lfs pull` fetches the file",
    "page": "the address asked for a login or was wrong: download it again",
    "safetensors": f"load it into its network and export that; {EXPORT}",
    "torch": EXPORT,
    "torchscript": "export its network with torch.onnx.export",
    "zip": "unpack it and name the .onnx file in it",
    "gzip": "unpack it and name the .onnx file in it",
    "pickle": f"if it is PyTorch's, {EXPORT}; scikit-learn's goes through skl2onnx",
    "keras": TF2ONNX,
    "tflite": TF2ONNX,
}


def kind_of(path: Path) -> str | None:
    """A key of NAMES, or None for what is none of them, an ONNX file among others; path must exist."""
    if path.is_dir():
        return "saved_model" if (path / "saved_model.pb").exists() else "folder"
    if path.name == "saved_model.pb":
        return "saved_model"
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        return _of_archive(path)
    begins = {
        b"version https://git-lfs": "lfs",
        b"\x89HDF\r\n\x1a\n": "keras",
        b"\x1f\x8b": "gzip",
    }
    for magic, kind in begins.items():
        if head.startswith(magic):
            return kind
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "page"
    if head[0] == 0x80 and 2 <= head[1] <= 5:
        return "pickle"
    if head[4:8] == b"TFL3":
        return "tflite"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    return None


def _of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:  # cut short: torch.save writes such archives
        return "torch"
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        return "torchscript"
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    return "keras" if "model.weights.h5" in names else "zip"
