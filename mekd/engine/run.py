"""A run: its configuration, its folder, its log, and the pieces that several stages open."""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mekd import files, system, track
from mekd.config import Config
from mekd.data import TREES, Source, open_source, read_names
from mekd.engine import parallel, reach, reuse
from mekd.engine.train import faster_in_bfloat16
from mekd.errors import MekdError
from mekd.fingerprint import fingerprint, resolve
from mekd.nets import Generator
from mekd.nets.registry import file_of, without_folder
from mekd.oracle import identity, ledger
from mekd.oracle.base import Oracle
from mekd.oracle.batch import find_batch, stored_batch
from mekd.oracle.ledger import Ledger
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.remote import Service
from mekd.oracle.session import provider_names
from mekd.seeds import generator_at
from mekd.settings import dump_yaml, read_saved

Module = TypeVar("Module", bound=torch.nn.Module)
#: The accounts of each stage, which share its budget.
ACCOUNTS = {
    "deprivatize": ("deprivatize",),
    "distill": ("holdout", "replay", "distill"),
    "evaluate": ("evaluate-test", "evaluate-private"),
    "audit": ("audit",),
}


class Latents(NamedTuple):
    """What G draws from: codes (m, num_classes) and nuisances (m, deprivatize.nuisance)."""

    code: Tensor
    n: Tensor


class StageError(MekdError, RuntimeError):
    """A stage cannot begin: something that it needs is not there, or belongs to another run."""


@dataclass(frozen=True)
class Run:
    """One configuration, resolved for this machine, in one folder.

    wrap_oracle stands between a stage and its oracle: tests watch through it. service answers in a remote teacher's
    place. asked_to_stop: whether the calls of a query shall end. agree_to_send: is called before a remote teacher gets
    the first image of step 1, where that asks, and of step 2, and may refuse.
    """

    config: Config
    out: Path
    wrap_oracle: Callable[[Oracle], Oracle] = lambda oracle: oracle
    service: Service | None = None
    asked_to_stop: Callable[[], bool] = lambda: False
    agree_to_send: Callable[["Run"], None] = lambda run: None

    def __post_init__(self) -> None:
        kept = read_saved(self.out / "config.yaml")
        object.__setattr__(self, "config", resolve(reuse.adopted(self.config), kept, faster_in_bfloat16))

    # -- what there is -------------------------------------------------------------------------------------

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the networks and of the teacher."""
        name = self.config.engine.device
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise StageError(f"engine.device is {name!r}; it must be auto, cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise StageError(f"engine.device is {name!r}; it must be auto, cpu, cuda or cuda:N")
        if device.type == "cpu":
            return device
        if not torch.cuda.is_available():
            raise StageError(f"engine.device is {name!r}, but torch finds no CUDA device; `mekd doctor` says more")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise StageError(f"engine.device is {name!r}; there are {count} CUDA devices, from cuda:0")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    @functools.cached_property
    def data(self) -> Source:
        """The data set: its images come on the run's device, and this process gets its part of them."""
        return open_source(self.config, self.device, parallel.rank(), parallel.world(), self.out / "photos")

    @functools.cached_property
    def image(self) -> tuple[int, int, int]:
        """(ch, H, W) of the images; a tree is not looked through for it."""
        size, other = self.config.data.size, self.config.deprivatize.generator
        if other is not None:
            return reuse.channels_of(self.checkpoint("deprivatize")), size, size
        return (3, size, size) if self.config.data.name in (None, "photos", *TREES) else self.data.image

    @property
    def teacher_onnx(self) -> Path:
        """The black box's file: the user's, or the exported one."""
        own = self.config.teacher.onnx
        return Path(own) if own else self.out / "teacher.onnx"

    @property
    def given_teacher(self) -> bool:
        """Whether the black box is the user's, or its answers are there already: none is trained or written here."""
        return self.config.teacher.onnx is not None or self.config.teacher.remote or self.origin is not None

    @property
    def trained_classes(self) -> int:
        """The classes of a teacher that is trained or exported here: as it is said, else those of the data."""
        known = self.config.oracle.num_classes if self.class_names is None else len(self.class_names)
        if known is None and self.config.data.name is None:
            raise StageError(
                "oracle.num_classes is null, and there is no data that says how many classes teacher.checkpoint has: "
                "say --oracle.num_classes N, or list their names in --oracle.classes FILE"
            )
        return len(self.data.classes) if known is None else known

    def require_teacher(self) -> Path:
        """The black box's file, which is there, unless it is remote; StageError where it is not."""
        if not self.config.teacher.remote and not self.teacher_onnx.is_file():
            raise StageError(
                f"{self.teacher_onnx} is missing: run `mekd export` first, or give your classifier with --teacher.onnx "
                "FILE, --teacher.url ADDRESS or --teacher.python FILE.py:function"
            )
        return self.teacher_onnx

    @functools.cached_property
    def class_names(self) -> list[str] | None:
        """The teacher's classes, where oracle.classes lists them, or the store that is learnt from."""
        path = self.config.oracle.classes
        if path is None:
            return None if self.origin is None else self.origin["class_names"]
        return read_names(path, "oracle.classes")

    @functools.cached_property
    def origin(self) -> dict[str, Any] | None:
        """What the answers of distill.store are a result of."""
        return None if self.config.distill.store is None else reuse.origin_of(self.config.distill.store)

    @functools.cached_property
    def num_classes(self) -> int:
        """The teacher's classes, as its file or the configuration says: nothing is asked."""
        return self._looked_at[0]

    @property
    def teacher_notes(self) -> list[str]:
        """How the teacher's file is read, for people."""
        return self._looked_at[1]

    @functools.cached_property
    def _looked_at(self) -> tuple[int, list[str]]:
        if self.origin is not None:
            name = self.origin["teacher_name"]
            return self.origin["classes"], [f"the answers of {name} in {self.config.distill.store}: nobody is asked"]
        if self.config.teacher.remote:
            return self.about_teacher.classes, self.about_teacher.notes
        if not self.teacher_onnx.is_file():  # a step 1 that asks nothing needs no more of it than this number
            settings = self.config.oracle
            known = settings.num_classes if self.class_names is None else len(self.class_names)
            if known is None and self.config.teacher.onnx is None:
                known = self.trained_classes
            if known is not None:
                return known, []
        oracle = self.open_oracle(Ledger("nothing", budget=0), look=True)
        return oracle.num_classes, oracle.notes

    @property
    def teacher_digest(self) -> str:
        """A hash of the black box, by which a checkpoint knows its teacher: of its file, or of what names it."""
        if self.origin is not None:
            return str(self.origin["teacher"])
        return self.about_teacher.identity if self.config.teacher.remote else identity.digest(self.teacher_onnx)

    @property
    def teacher_name(self) -> str:
        """By what people know the black box: a remote one by its name, the user's by its file."""
        if self.origin is not None:
            return str(self.origin["teacher_name"])
        teacher = self.config.teacher
        if teacher.name is not None:
            return teacher.name
        own = teacher.onnx
        if own is not None:
            return Path(own).name
        return f"{without_folder(teacher.arch)}, trained on {self.config.data.name} for this run"

    @functools.cached_property
    def about_teacher(self) -> reach.About:
        """What a remote teacher is, as far as that costs nothing."""
        return reach.look(self)

    # -- what a stage opens --------------------------------------------------------------------------------

    def open_oracle(self, account: Ledger, look: bool = False) -> Oracle:
        """The black box with an account; look: only to see what it is, on the CPU, and nothing is measured."""
        settings = self.config.oracle
        if self.config.teacher.remote:
            return self.wrap_oracle(reach.open_remote(self, account))
        path = self.require_teacher()
        measured = functools.partial(self._query_batch, self.image)
        oracle = OnnxOracle(
            path,
            settings.response,
            providers="cpu" if look else settings.provider,
            image=self.image,
            classes=self.class_names,
            num_classes=settings.num_classes if self.class_names is None else len(self.class_names),
            output=settings.output,
            output_name=settings.output_name,
            device=self.device,
            mean=settings.mean,
            std=settings.std,
            k=settings.k,
            decimals=settings.decimals,
            transport=settings.transport,
            batch=None if look else settings.batch or measured,
            precision="float32" if look else settings.precision,
            cuda_graph=settings.cuda_graph and not look,
            cache=self.out / "tensorrt" / f"rank{parallel.rank()}",
            ledger=account,
        )
        return oracle if look else self.wrap_oracle(oracle)

    def _query_batch(self, image: tuple[int, int, int], run_blank: Callable[[int], object]) -> int:
        """The images that the teacher gets at once: measured when the run first asks, then kept.

        The images that measure are blank and stay here: the ledger does not count them. The first process comes first.
        """
        settings = self.config.oracle
        belongs = {"teacher": self.teacher_digest, "provider": provider_names(settings.provider)[0]}
        belongs |= {"transport": settings.transport, "precision": settings.precision}
        asked = self.asked("deprivatize", "distill", "evaluate")["calls"] > 0
        return stored_batch(self.out / "oracle.json", belongs, asked, lambda: find_batch(run_blank, image))

    def load_generator(self) -> Generator:
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
        settings, weights = self.config.deprivatize, saved["state"]["generator"]
        if settings.ema:
            averaged = saved["state"]["average"]
            weights = {name: averaged[f"module.{name}"] for name in weights}
        generator = self.new_generator()
        generator.load_state_dict(weights)
        return generator.to(self.device).eval().requires_grad_(False)

    def new_generator(self) -> Generator:
        """G as deprivatize describes it, untrained."""
        settings = self.config.deprivatize
        return Generator(self.num_classes, self.config.data.size, self.image[0], settings.width, settings.nuisance)

    def load_weights(self, module: torch.nn.Module, name: str, path: str) -> None:
        """Load weights that the user gave as the setting called name; MekdError where there are none that fit."""
        weights = files.load_weights(Path(path), name)
        try:
            module.load_state_dict(weights, assign=any(x.is_meta for x in module.parameters()))
        except RuntimeError as error:
            raise StageError(f"{name} {path!r} does not fit the network: {error}") from error

    def place(self, module: Module) -> Module:
        """A network on the run's device, its weights laid out for channels_last convolutions.

        With several processes and engine.batch_norm synchronised, its batch norms see the whole batch.
        """
        placed = module.to(self.device).to(memory_format=torch.channels_last)
        if self.config.engine.batch_norm == "local" or parallel.world() == 1:
            return placed
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(placed)

    def latents(self, purpose: str, step: int, count: int, rows: slice | None = None) -> Latents:
        """Some rows of a step's count latents, each drawn from N(0, I); this process's part where none are named."""
        own = () if self.first_round is None else (self.first_round,)  # no round draws what an earlier one drew
        generator = generator_at(self.config.seed, purpose, *own, step, device=self.device)
        sizes = (self.num_classes, self.config.deprivatize.nuisance)
        rows = parallel.part(count) if rows is None else rows
        drawn = (torch.randn(count, size, generator=generator, device=self.device) for size in sizes)
        return Latents(*(part[rows] for part in drawn))

    # -- where a stage stands ------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> Path:
        """Where a stage's checkpoint lies."""
        if name == "deprivatize" and self.config.deprivatize.generator is not None:
            return reuse.generator_of(self.config.deprivatize.generator)
        return self.out / "checkpoints" / f"{name}.pt"

    def store(self, name: str) -> Path:
        """The folder of the answers called holdout or replay: this run's, or those of distill.store."""
        return Path(self.config.distill.store or self.out) / name

    def depends(self, name: str) -> dict[str, Any]:
        """What changes the result of a stage, by name: settings, the teacher, the generator, and no more."""
        found = fingerprint(self.config, name)
        if any(key.startswith("oracle.") for key in found):
            found["teacher"] = self.teacher_digest
        if self.class_names is not None and "oracle.classes" in found:  # the names, wherever their file lies
            found["oracle.classes"] = hashlib.sha256(repr(self.class_names).encode()).hexdigest()[:16]
        file = file_of(self.config.distill.student)
        if file is not None and "distill.student" in found:
            found["distill.student's file"] = files.digest(file)
        if name == "deprivatize":
            found["classes"] = self.num_classes
        if name == "distill" and self.origin is not None:
            found["store"] = self.origin["seed"]
        if name in ("holdout", "replay", "distill", "audit"):
            found["generator"] = self.generator_digest
        if name in ("deprivatize", "distill") and self.first_round is not None:
            found["first round"] = self.first_round
        return found

    @functools.cached_property
    def first_round(self) -> str | None:
        """A hash of the student that deprivatize.after goes on from."""
        return reuse.digest_of(self.config.deprivatize.after)

    @functools.cached_property
    def generator_digest(self) -> str:
        """A hash of the trained generator's weights."""
        hashed = hashlib.sha256()
        for name, value in self.load_generator().state_dict().items():
            hashed.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()[:16]

    def origin_of_answers(self, names: list[str] | None) -> dict[str, Any]:
        """What a store of this run's answers says of them, for other runs; names: those of the classes."""
        oracle = self.config.oracle
        return {
            "teacher": self.teacher_digest,
            "teacher_name": self.teacher_name,
            "generator": self.generator_digest,
            "classes": self.num_classes,
            "class_names": names,
            "seed": self.config.seed,
            "answers": {name: getattr(oracle, name) for name in reuse.ANSWERS},
        }

    @property
    def ledger(self) -> Path:
        """Where the accounts lie."""
        return self.out / "ledger"

    def asked(self, *stages: str) -> dict[str, int]:
        """The counts of what stages asked so far, over all processes."""
        return ledger.totals(self.ledger, *(name for stage in stages for name in ACCOUNTS[stage]))

    @functools.cached_property
    def tracks(self) -> track.Tracks:
        """Who is told the metrics and the pictures; the first process alone tells."""
        return track.Tracks(self.config.engine.track, self.out, self.log)

    # -- what is written -----------------------------------------------------------------------------------

    def log(self, line: str, screen: bool = True) -> None:
        """A line for the screen and for log.txt, of the first process."""
        if parallel.rank():
            return
        if screen:
            system.say(line)
        files.append(self.out / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    @contextlib.contextmanager
    def profiled(self, stage: str) -> Iterator[Callable[[], object]]:
        """Yields what a stage calls after each step: with engine.profile some are traced, in the folder profile."""
        if parallel.rank() or not self.config.engine.profile:
            yield lambda: None
            return
        from mekd.engine.profile import profiled

        with profiled(stage, self.out / "profile", self.log) as after_step:
            yield after_step

    def log_skipped(self) -> None:
        """Say which files data.on_error=skip left out so far, if any."""
        names = sorted({name for process in parallel.gather(self.data.left_out()) for name in process})
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            self.log(f"data: {len(names)} files could not be read and were left out (data.on_error is skip): {shown}")

    def save_config(self) -> None:
        """Write the resolved configuration into the run's folder, and what a remote teacher was found to be."""
        if parallel.rank() == 0:
            files.write_text(self.out / "config.yaml", dump_yaml(self.config))
        reach.keep(self)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A small result, whole or not at all, of the first process."""
        if parallel.rank():
            return
        files.write_text(self.out / name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small result, if it is there; DamagedError where it cannot be read."""
        path = self.out / name
        return files.read_json(path) if path.exists() else None
