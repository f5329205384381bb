"""mekd doctor: what this machine can run, and what is missing for the rest."""

import math
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from mekd import system

EXTRAS = {
    "run": ("PyYAML", "jsonargparse", "safetensors", "tqdm"),
    "onnx": ("onnx", "onnxscript"),
    "vision": ("torchvision",),
    "plot": ("matplotlib",),
    "audit": ("POT",),
    "demo": ("scikit-learn",),
    "dali": ("nvidia-dali-cuda130",),
    "remote": ("urllib3", "pyrate-limiter"),
    "serve": ("starlette", "uvicorn"),
    "parquet": ("pyarrow",),
    "hub": ("huggingface_hub",),
    "dp": ("opacus",),
}
#: The extras that a run of one's own photos, or of another's data, ends without.
OPTIONAL = ("plot", "audit", "dali", "vision", "demo", "remote", "serve", "parquet", "hub", "dp")


def doctor() -> int:
    """Print one line per thing that mekd can use; returns 0 if the main job can run here, else 1."""
    memory = system.memory() / 2**30
    size = f"{memory:.0f} GiB" if math.isfinite(memory) else "unknown"
    disk = shutil.disk_usage(".").free / 2**30
    simd = torch.backends.cpu.get_cpu_capability()
    print(f"machine      {platform.machine()}, {os.cpu_count()} cores, {size} memory, {disk:.0f} GiB disk free")
    print(f"python       {platform.python_version()}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads, {simd}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            print(f"cuda:{i}       {card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        print(f"cuda         none: {why}; everything runs on the CPU")
    compiler = shutil.which("g++") or shutil.which("clang++")
    print(f"compiler     {compiler or 'none: torch.compile and building from source need g++ or clang++'}")
    complete = True
    for extra, packages in EXTRAS.items():
        found = {package: _version(package) for package in packages}
        missing = [package for package, v in found.items() if v is None]
        complete &= not missing or extra in OPTIONAL
        have = ", ".join(f"{package} {v}" for package, v in found.items() if v)
        hint = f"missing {', '.join(missing)}: pip install {' '.join(missing)}" if missing else ""
        print(f"{extra:<12} {'; '.join(part for part in (have, hint) if part)}")
    ok, line = _checked(_runtime)
    print(f"{'runtime':<12} {line}")
    verdict = "the main job can run here" if complete and ok else "the main job cannot run yet: see the lines above"
    print(f"\n{verdict}")
    return 0 if complete and ok else 1


def _runtime() -> tuple[bool, str]:
    from mekd.oracle.ort import PROVIDERS, runtime_clash

    if clash := runtime_clash():
        return False, clash
    import onnxruntime as ort

    known = [name for name, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
    usable = [name for name in known if name == "cpu" or torch.cuda.is_available()]
    idle = [name for name in known if name not in usable]
    tail = f"; built in but without a device: {', '.join(idle)}" if idle else ""
    return True, f"onnxruntime {ort.__version__}, runs on {', '.join(usable)}{tail}"


def _checked(check: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    try:
        return check()
    except ImportError as error:
        return False, f"{error}: pip install 'mekd[onnx]' (CPU) or 'mekd[onnx-gpu]'"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
