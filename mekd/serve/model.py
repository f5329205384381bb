"""The served classifier: an ONNX file, and what is given away of its answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mekd.errors import UsageError
from mekd.oracle.binding import DTYPES
from mekd.oracle.meaning import Reading, probe, probe_images, read
from mekd.oracle.ort import feeder, find_input
from mekd.oracle.response import AnswerError
from mekd.oracle.session import ModelError, ProviderError, open_session
from mekd.serve.defence import Defence
from mekd.serve.protocol import Spec

#: The protocol's names of ONNX Runtime's types.
_DATATYPES = {
    "tensor(uint8)": "UINT8",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
RESPONSES = ("logits", "probs", "topk", "label")
DEFAULT_K = 5


class Model:
    """An ONNX classifier, asked with arrays and answering what response allows.

    response: "logits", "probs", "topk" (the best k), "label", or None for the file's own output as it is. output,
    output_name, num_classes, classes, mean and std are read as by OnnxOracle. image: (ch, H, W) where the file leaves
    it open. batch: images of one run at most. defence: what is done to probabilities before they are
    given. takes and gives are its tensors, as the protocol describes them. Raises UsageError, ModelError,
    ProviderError.
    """

    def __init__(
        self,
        path: Path,
        response: str | None = None,
        *,
        k: int | None = None,
        decimals: int | None = None,
        output: str = "auto",
        output_name: str | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        image: tuple[int, int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch: int = 64,
        provider: str = "auto",
        defence: Defence | None = None,
    ) -> None:
        if not path.exists():
            raise UsageError(f"FILE.onnx is {str(path)!r}; no such file. Give the path of an ONNX classifier")
        if k is not None and response != "topk":
            raise UsageError(f"--k is {k}, but --response is {response or 'not given'}: it must be topk")
        if classes and num_classes not in (None, len(classes)):
            raise UsageError(f"--num_classes is {num_classes}, and --classes lists {len(classes)}: give one of them")
        self.response, self.decimals, self.classes = response, decimals, list(classes or ())
        self._defence = defence
        if defence and response in (None, "logits"):
            raise UsageError(
                f"--noise and --mislead change probabilities, and --response is {response or 'not given'}: it must be "
                "probs, topk or label"
            )
        try:
            self._open(path, image, mean, std, batch, provider)
            self._reading = self._read(path, output, output_name, num_classes or len(self.classes) or None)
        except (ModelError, ProviderError) as error:  # they name the settings of mekd run
            raise type(error)(_own_options(str(error))) from error
        if response == "logits" and self._reading.kind == "probs":
            raise UsageError(f"--response is 'logits'; {path} answers probabilities: it must be probs, topk or label")
        count = self._reading.classes or len(self.classes)
        self.k = min(DEFAULT_K, count) if k is None else k
        if self.k > count:
            raise UsageError(f"--k is {k}; {path} has {count} classes: it must be between 1 and {count}")
        if defence and self._reading.kind in ("index", "names"):
            raise UsageError(
                f"--noise and --mislead change probabilities; {path} answers classes alone: leave them out"
            )
        self._as_it_is = response in (None, "logits") or self._reading.kind in ("index", "names")
        self.gives = self._gives(count)

    # -- opening -------------------------------------------------------------------------------------------

    def _open(
        self,
        path: Path,
        image: tuple[int, int, int] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        batch: int,
        provider: str,
    ) -> None:
        self._session = open_session(path, provider)
        source, self.image, self._last = find_input(self._session, path, image)
        if image is not None and self.image != image:
            raise UsageError(f"--image is {image}; {path} takes {self.image}")
        fixed = source.shape[0] if isinstance(source.shape[0], int) else None
        self._fixed, self._batch = fixed, fixed or batch
        dtype = DTYPES[source.type]
        for option, numbers in (("--mean", mean), ("--std", std)):
            if numbers is None:
                continue
            if dtype == torch.uint8:
                raise UsageError(f"{option} is given, but {path} takes the pixels 0 to 255 themselves: leave it out")
            if len(numbers) not in (1, self.image[0]) or (option == "--std" and min(numbers) <= 0):
                raise UsageError(
                    f"{option} is {' '.join(map(str, numbers))}; it must be 1 or {self.image[0]} numbers"
                    + (" above 0" if option == "--std" else "")
                )
        self._feed = feeder(dtype, mean or (0.0,), std or (1.0,), self._last, torch.device("cpu"))
        row = (*self.image[1:], self.image[0]) if self._last else self.image
        self.takes = Spec(source.name, _DATATYPES[source.type], row)

    def _read(self, path: Path, output: str, output_name: str | None, num_classes: int | None) -> Reading:
        """How the file's output is read, for the response that was asked for."""
        images = self._feed(probe_images(self.image))
        seen = probe(self._session, path, self.takes.name, images, self._fixed or 2)

        def reading(response: str) -> Reading:
            return read(
                self._session, path, seen, response,
                output=output, output_name=output_name, num_classes=num_classes, classes=self.classes or None,
            )  # fmt: skip

        if self.response is not None:
            return reading(self.response)
        try:
            return reading("probs")
        except ModelError as error:
            try:
                return reading("label")
            except ModelError:
                raise error from None  # the first says more of a file with scores

    def _gives(self, count: int) -> list[Spec]:
        if self._as_it_is:
            declared = next(o for o in self._session.get_outputs() if o.name == self._reading.name)
            return [Spec(declared.name, _DATATYPES[declared.type], self._reading.row)]
        if self.response == "probs":
            return [Spec("probs", "FP32", (count,))]
        if self.response == "topk":
            return [Spec("values", "FP32", (self.k,)), Spec("indices", "INT64", (self.k,))]
        return [Spec("label", "INT64", ())]

    # -- asking --------------------------------------------------------------------------------------------

    def run(self, images: np.ndarray) -> np.ndarray:
        """The file's own output for images (m, *row), in runs of batch."""
        parts = []
        for start in range(0, len(images), self._batch):
            part = images[start : start + self._batch]
            missing = self._fixed - len(part) if self._fixed else 0
            if missing:
                part = np.concatenate([part, np.repeat(part[:1], missing, 0)])
            parts.append(self._session.run([self._reading.name], {self.takes.name: part})[0])
        return parts[0][: len(images)] if len(parts) == 1 else np.concatenate(parts)[: len(images)]

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (H, W, ch), 0 to 255, as the file takes an image: (1, *row)."""
        return self._feed(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)).numpy()

    def tensors(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """What is given away of the file's output (m, ...), by the names in gives."""
        if self._as_it_is:
            floating = raw.dtype.kind == "f"
            return {self._reading.name: self._rounded(torch.from_numpy(raw)).numpy() if floating else raw}
        probs = self._probs(raw)
        if self.response == "probs":
            return {"probs": self._rounded(probs).numpy()}
        best, indices = probs.sort(dim=-1, descending=True, stable=True)
        if self.response == "topk":
            return {"values": self._rounded(best[:, : self.k]).numpy(), "indices": indices[:, : self.k].numpy()}
        return {"label": indices[:, 0].numpy()}

    def classified(self, tensors: dict[str, np.ndarray], name: str, best: int) -> np.ndarray:
        """The best classes of a given tensor of scores as words "value:index[:name]" (m, best)."""
        values = tensors[name]
        rows = values.reshape(len(values), -1)
        order = np.argsort(-rows, axis=1, kind="stable")[:, :best]
        named = self.classes if rows.shape[1] == len(self.classes) or "indices" in tensors else []
        words = []
        for row, columns in enumerate(order):
            for column in columns:
                index = tensors["indices"][row, column] if "indices" in tensors else column
                words.append(f"{rows[row, column]:f}:{index}" + (f":{named[index]}" if named else ""))
        return np.array(words, dtype=object).reshape(order.shape)

    def pairs(self, raw: np.ndarray, best: int | None, threshold: float) -> list[dict[str, Any]]:
        """The answer to one image as labels and scores, best first; best: so many of them at most."""
        if self._reading.kind == "names":
            return [{"label": str(raw.reshape(-1)[0]), "score": 1.0}]
        if self._reading.kind == "index":
            return [{"label": self._label(int(raw.reshape(-1)[0])), "score": 1.0}]
        scores, indices = self._probs(raw)[0].sort(descending=True, stable=True)
        given = {"topk": self.k, "label": 1}.get(self.response or "", len(scores))
        chosen = list(zip(scores.tolist(), indices.tolist(), strict=True))[: min(given, best or given)]
        return [
            {"label": self._label(index), "score": score if self.decimals is None else round(score, self.decimals)}
            for score, index in chosen
            if score >= threshold
        ]

    def _label(self, index: int) -> str:
        if not 0 <= index < (self._reading.classes or 0):
            raise AnswerError(f"the model answered class {index}; there are {self._reading.classes}")
        return self.classes[index] if self.classes else str(index)

    def _probs(self, raw: np.ndarray) -> Tensor:
        scores = self._reading.scores(torch.from_numpy(raw))
        probs = scores.softmax(-1) if self._reading.kind == "logits" else scores
        return self._defence(probs) if self._defence else probs

    def _rounded(self, values: Tensor) -> Tensor:
        return values if self.decimals is None else values.round(decimals=self.decimals)


def _own_options(message: str) -> str:
    """A message of the teacher's settings, with the names that they have as options here."""
    if message.startswith("teacher.onnx is "):
        message = "FILE.onnx is " + message.removeprefix("teacher.onnx is ")
    message = message.replace("give image=(ch, H, W)", "give --image CH H W")
    return message.replace("--oracle.", "--").replace("oracle.", "--")
