"""A run: its configuration, its folder, its log, and the pieces that several stages open."""

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mekd import files
from mekd.config import Config, dump_yaml
from mekd.data import TREES, Source, open_source
from mekd.engine import parallel
from mekd.nets import Generator
from mekd.oracle.base import Oracle
from mekd.oracle.batch import find_batch, stored_batch
from mekd.oracle.ledger import Ledger
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.session import provider_names
from mekd.seeds import generator_at
from mekd.errors import MekdError

Module = TypeVar("Module", bound=torch.nn.Module)


class StageError(MekdError, RuntimeError):
    """A stage cannot begin: something that it needs is not there, or belongs to another run."""


@dataclass(frozen=True)
class Run:
    """One configuration in one folder. wrap_oracle stands between a stage and its oracle: tests watch through it."""

    config: Config
    out: Path
    wrap_oracle: Callable[[Oracle], Oracle] = lambda oracle: oracle

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        name = self.config.engine.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and parallel.world() > 1:
            name = f"cuda:{torch.cuda.current_device()}"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise StageError(f"engine.device is {name!r}; it must be auto, cpu, cuda or cuda:N") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise StageError(f"engine.device is {name!r}, but torch finds no CUDA device; `mekd doctor` says more")
        return device

    def place(self, module: Module) -> Module:
        """A network on the run's device, its weights laid out for channels_last convolutions.

        With several processes and engine.batch_norm synchronised, its batch norms see the whole batch.
        """
        placed = module.to(self.device).to(memory_format=torch.channels_last)
        if self.config.engine.batch_norm == "local" or parallel.world() == 1:
            return placed
        if self.device.type != "cuda":
            raise StageError(
                "engine.batch_norm is 'synchronised', which PyTorch does on CUDA alone; on the CPU it must be 'local'"
            )
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(placed)

    def latents(self, purpose: str, step: int, count: int, num_classes: int) -> Tensor:
        """This process's part of a step's count latent codes, each drawn from N(0, I): (m, num_classes)."""
        generator = generator_at(self.config.seed, purpose, step, device=self.device)
        codes = torch.randn(count, num_classes, generator=generator, device=self.device)
        return codes[parallel.part(count)]

    @property
    def teacher_onnx(self) -> Path:
        """The black box's file: the user's, or the exported one."""
        own = self.config.teacher.onnx
        return Path(own) if own else self.out / "teacher.onnx"

    def checkpoint(self, name: str) -> Path:
        """Where a stage's checkpoint lies."""
        return self.out / "checkpoints" / f"{name}.pt"

    def log(self, line: str) -> None:
        """A line for the screen and for log.txt, of the first process."""
        if parallel.rank():
            return
        print(line, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def log_skipped(self, data: Source) -> None:
        """Say how many files data.on_error=skip left out, if any."""
        (skipped,) = parallel.sum_of(data.skipped())
        if skipped:
            self.log(f"data: {skipped:.0f} files could not be read and were left out (data.on_error is skip)")

    def save_config(self) -> None:
        """Write the resolved configuration into the run's folder."""
        if parallel.rank() == 0:
            files.write_text(self.out / "config.yaml", dump_yaml(self.config))

    @property
    def image(self) -> tuple[int, int, int]:
        """(ch, H, W) of the images; a tree is not looked through for it."""
        size = self.config.data.size
        return (3, size, size) if self.config.data.name in TREES else self.open_data().image

    def open_data(self) -> Source:
        """The data set: its images come on the run's device, and this process gets its part of them."""
        return open_source(self.config, self.device, parallel.rank(), parallel.world())

    def open_oracle(self, stage: str, image: tuple[int, int, int], budget: int | None = None) -> Oracle:
        """The black box with the account of a stage."""
        settings = self.config.oracle
        path = self.teacher_onnx
        if not path.is_file():
            raise StageError(
                f"{path} is missing: run `mekd export` first, or give your classifier with --teacher.onnx FILE"
            )
        names = None if settings.classes is None else read_names(settings.classes)
        folder = self.out / "ledger"
        ledger = parallel.deal(Ledger(stage, folder, budget, settings.price, parallel.rank()), folder)
        oracle = OnnxOracle(
            path,
            settings.response,
            providers=settings.provider,
            image=image,
            classes=names,
            num_classes=None if names is None else len(names),
            output=settings.output,
            mean=settings.mean,
            std=settings.std,
            k=settings.k,
            decimals=settings.decimals,
            transport=settings.transport,
            batch=settings.batch or functools.partial(self._query_batch, image),
            precision=settings.precision,
            cuda_graph=settings.cuda_graph,
            cache=self.out / "tensorrt",
            ledger=ledger,
        )
        return self.wrap_oracle(oracle)

    def _query_batch(self, image: tuple[int, int, int], run_blank: Callable[[int], object]) -> int:
        """The images that the teacher gets at once: measured by the first process when the run first asks, then kept.

        The images that measure are blank and stay here: the ledger does not count them.
        """
        settings = self.config.oracle
        belongs = {"teacher": self.teacher_digest(), "provider": provider_names(settings.provider)[0]}
        belongs |= {"transport": settings.transport, "precision": settings.precision}
        asked = any(journal.stat().st_size for journal in (self.out / "ledger").glob("*.journal"))
        size = 0
        if parallel.rank() == 0:
            size = stored_batch(self.out / "oracle.json", belongs, asked, lambda: find_batch(run_blank, image))
        return int(parallel.sum_of(size)[0])

    def load_generator(self, num_classes: int, channels: int) -> Generator:
        """The trained generator, frozen: its averaged weights where deprivatize.ema asks for them."""
        path = self.checkpoint("deprivatize")
        if not path.exists():
            raise StageError(f"{path} is missing: run `mekd deprivatize` first")
        saved = files.load(path)
        if saved["step"] != self.config.deprivatize.steps:
            raise StageError(
                f"deprivatize stands at step {saved['step']} of {self.config.deprivatize.steps}: run "
                f"`mekd deprivatize` to finish it, or accept it as it is with --deprivatize.steps {saved['step']}"
            )
        settings = self.config.deprivatize
        generator = Generator(num_classes, self.config.data.size, channels, settings.width)
        generator.load_state_dict(saved["state"]["average" if settings.ema else "generator"])
        return generator.to(self.device).eval().requires_grad_(False)

    def teacher_digest(self) -> str:
        """A hash of the black box's file, by which a checkpoint knows its teacher."""
        return hashlib.sha256(self.teacher_onnx.read_bytes()).hexdigest()[:16]

    def load_weights(self, module: torch.nn.Module, name: str, path: str) -> None:
        """Load a state_dict that the user gave as the setting called name; StageError if it is none or does not fit."""
        try:
            module.load_state_dict(files.load(Path(path)))
        except FileNotFoundError as error:
            raise StageError(f"{name} is {path!r}; no such file") from error
        except RuntimeError as error:
            raise StageError(f"{name} {path!r} does not fit the network: {error}") from error

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A small result, whole or not at all, of the first process."""
        if parallel.rank():
            return
        files.write_text(self.out / name, json.dumps(content, indent=1) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small result, if it is there."""
        path = self.out / name
        return json.loads(path.read_text()) if path.exists() else None


def read_names(path: str) -> list[str]:
    """Class names, one a line."""
    file = Path(path)
    if not file.is_file():
        raise StageError(f"oracle.classes is {path!r}; no such file. It lists the teacher's class names, one a line")
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def is_terminal() -> bool:
    """Whether somebody watches: a progress bar in a file helps nobody."""
    return sys.stderr.isatty()
