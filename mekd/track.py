"""A run's metrics and pictures in the trackers that people use: TensorBoard, Weights & Biases, trackio, MLflow."""

import functools
import hashlib
import importlib.util
import json
import netrc
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from mekd import files
from mekd.errors import UsageError

#: Where the trackers that write beside the run do so, and what each was told already.
FOLDER, TOLD = "tracks", "tracks.json"
PROJECT = "mekd"


def check(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker of engine.track that is not installed; nothing is opened."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"engine.track has {name!r}, which is not installed: pip install {name}")


class Tracker(Protocol):
    """One of them: id names what it goes on with when a run goes on."""

    id: str | None

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a stage, after that many steps."""

    def picture(self, name: str, path: Path) -> None:
        """A picture of the finished run."""

    def close(self) -> None:
        """Write what waits."""


class Tracks:
    """What engine.track names, opened when there is something to tell; nothing of it stops a run.

    A point is told once: a stage that takes steps again after it was stopped tells them no second time, and a stage of
    other settings in the same folder, another student say, is told under a name of its own: distill-2.
    """

    def __init__(self, names: Sequence[str], out: Path, warn: Callable[[str], None]) -> None:
        self._names, self._out, self._warn = tuple(names), out, warn
        self._open: dict[str, Tracker | None] = {}
        self._told: dict[str, dict[str, Any]] = {}

    def metrics(self, stage: str, series: Mapping[str, Any], step: int, values: Mapping[str, float | None]) -> None:
        """Tell the numbers of a stage; series: what they are a result of. A number that is none is left out."""
        digest = hashlib.sha256(repr(sorted(series.items())).encode()).hexdigest()[:16]
        known = {name: value for name, value in values.items() if value is not None}

        def tell(tracker: Tracker, told: dict[str, Any]) -> None:
            digests = told["series"].setdefault(stage, [])
            if digest not in digests:
                digests.append(digest)
            number = digests.index(digest) + 1
            tag, last = stage if number == 1 else f"{stage}-{number}", told["last"]
            new = {name: value for name, value in known.items() if step > last.get(f"{tag}/{name}", -1)}
            if new:
                # Written first: of a kill between both comes a point too few and never one twice.
                last.update({f"{tag}/{name}": step for name in new})
                self._remember()
                tracker.metrics(tag, step, new)

        self._each(tell)

    def picture(self, name: str) -> None:
        """Tell a picture of the run's folder, unless it is the one that was told last."""
        digest = files.digest(self._out / name)

        def tell(tracker: Tracker, told: dict[str, Any]) -> None:
            if told["pictures"].get(name) != digest:
                told["pictures"][name] = digest
                self._remember()
                tracker.picture(name, self._out / name)

        self._each(tell)

    def close(self) -> None:
        """Let each write what waits."""
        for name, tracker in self._open.items():
            if tracker is not None:
                self._try(name, tracker.close)
        self._open = {}

    def _each(self, tell: Callable[[Tracker, dict[str, Any]], None]) -> None:
        for name in self._names:
            self._try(name, functools.partial(self._tell, name, tell))

    def _tell(self, name: str, tell: Callable[[Tracker, dict[str, Any]], None]) -> None:
        if name not in self._open:
            path = self._out / TOLD
            kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
            self._told[name] = kept.get(name) or {"id": None, "series": {}, "last": {}, "pictures": {}}
            self._open[name] = None  # of one that does not open nothing more is wanted
            (self._out / FOLDER).mkdir(parents=True, exist_ok=True)
            tracker = self._open[name] = OPEN[name](self._out, self._told[name]["id"])
            self._told[name]["id"] = tracker.id
        if (opened := self._open[name]) is not None:
            tell(opened, self._told[name])

    def _remember(self) -> None:
        path = self._out / TOLD
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        files.write_text(path, json.dumps(kept | self._told) + "\n")

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # whatever a tracker raises, the run matters more
            self._open[name] = None
            why = re.sub(r"//[^/\s]+@", "//…@", " ".join(f"{type(error).__name__}: {error}".split()))[:300]
            self._warn(f"{name} (engine.track) failed and is told nothing more; the run goes on ({why})")


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, out: Path, id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = id
        self._writer: Any = SummaryWriter(str(out / FOLDER / "tensorboard"))

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)
        self._writer.flush()

    def picture(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases as the user set it up; offline where nobody is logged in and no mode is set.

    What it collects by itself stays here: paths, arguments, host, packages, what is printed, git, code.
    """

    def __init__(self, out: Path, id: str | None) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, save_code=False, disable_job_creation=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
            host="here", quiet=True,
        )  # fmt: skip
        mode: Any = None if os.environ.get("WANDB_MODE") or _logged_in() else "offline"
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=out.name, id=id, resume="allow", mode=mode,
            dir=str(out / FOLDER), settings=settings,
        )  # fmt: skip
        self.id: str | None = str(self._run.id)
        self._stages: set[str] = set()

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:  # its own count of steps only rises, and each stage begins at 0
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def picture(self, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


def _logged_in() -> bool:
    """Whether Weights & Biases would find a key, without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Trackio:
    """trackio, in its own folder on this machine; in a Space only where TRACKIO_SPACE_ID says so."""

    def __init__(self, out: Path, id: str | None) -> None:
        import trackio

        self._trackio: Any = trackio
        self.id: str | None = id or f"{out.name}-{os.urandom(3).hex()}"
        trackio.init(PROJECT, name=self.id, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def picture(self, name: str, path: Path) -> None:
        self._trackio.log({name: self._trackio.Image(str(path))})

    def close(self) -> None:
        self._trackio.finish()


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI says, else in its own files where the command runs."""

    def __init__(self, out: Path, id: str | None) -> None:
        from mlflow import MlflowClient

        self._client: Any = MlflowClient()
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            id = str(self._client.create_run(experiment, run_name=out.name).info.run_id)
        else:
            self._client.update_run(id, status="RUNNING")
        self.id: str | None = id

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self.id, f"{stage}/{name}", value, step=step)

    def picture(self, name: str, path: Path) -> None:
        self._client.log_artifact(self.id, str(path), str(Path(name).parent) if "/" in name else None)

    def close(self) -> None:
        self._client.set_terminated(self.id)


#: How each is opened: with the run's folder, and its id where the run goes on.
OPEN: Mapping[str, Callable[[Path, str | None], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow,
}  # fmt: skip
