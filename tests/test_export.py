"""What is written as ONNX computes what torch computes, or is not written."""

import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd.oracle.export import Classifier, ExportError, export
from mekd.oracle.ort import OnnxOracle, open_session
from mekd.pixels import to_float

IMAGE = (3, 8, 8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 12


class Net(nn.Module):
    """A small CNN whose batch norm has seen data, as a trained one has."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, stride=2)
            self.norm = nn.BatchNorm2d(8)
            self.linear = nn.Linear(8, 5)
            nn.init.uniform_(self.norm.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(self.linear.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.norm(self.conv(images)).relu().mean((2, 3)))


def pixels(m: int) -> Tensor:
    return torch.randint(0, 256, (m, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(m))


def truth(unit: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, seed: int = 0) -> np.ndarray:
    """Logits of images in [0, 1], in float64 and without Classifier."""
    x = F.interpolate(unit.double(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    x = (x - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).double().view(-1, 1, 1)
    with torch.no_grad():
        return Net(seed).double().eval()(x).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same classifier in both transports, in a folder that export() has to make."""
    folder = tmp_path_factory.mktemp("export") / "new" / "folder"
    for transport in ("uint8", "float"):
        # In training mode, as after a training loop: batch statistics would be another function.
        classifier = Classifier(Net().train(), MEAN, STD, resize=SIDE).train()
        worst = export(classifier, folder / f"{transport}.onnx", IMAGE, transport)
        assert 0 <= worst <= 1e-5
    assert sorted(path.name for path in folder.iterdir()) == ["float.onnx", "uint8.onnx"]
    return {transport: folder / f"{transport}.onnx" for transport in ("uint8", "float")}


@pytest.mark.parametrize("m", [1, 2, 7, 16])
@pytest.mark.parametrize("transport", ["uint8", "float"])
def test_the_file_computes_what_torch_computes(exported: dict[str, Path], transport: str, m: int) -> None:
    session = open_session(exported[transport], "cpu")
    (source,), (sink,) = session.get_inputs(), session.get_outputs()
    # The batch is open, the rest is not.
    assert not isinstance(source.shape[0], int) and source.shape[1:] == list(IMAGE)
    assert source.type == {"uint8": "tensor(uint8)", "float": "tensor(float)"}[transport]
    assert sink.shape[1:] == [5]
    unit = pixels(m).float() / 255
    fed = pixels(m) if transport == "uint8" else unit
    found = session.run(None, {source.name: fed.numpy()})[0]
    expected = truth(unit)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("transport", ["uint8", "float"])
def test_the_file_can_be_asked(exported: dict[str, Path], transport: str) -> None:
    oracle = OnnxOracle(exported[transport], "logits", providers="cpu", transport=transport)
    assert oracle.image == IMAGE and oracle.num_classes == 5
    response = oracle.query(to_float(pixels(6)))
    np.testing.assert_allclose(response.tensors()[0], truth(pixels(6).float() / 255), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resize", [None, SIDE])
def test_classifier_takes_pixels_and_units_alike(resize: int | None) -> None:
    classifier = Classifier(nn.Identity(), MEAN, STD, resize=resize)
    images = pixels(4)
    prepared = classifier(images)
    torch.testing.assert_close(prepared, classifier(images.float() / 255))
    assert prepared.shape == (4, 3, resize or 8, resize or 8)
    if resize is None:
        expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(prepared, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_classifier_that_is_cast_feeds_its_network_so(dtype: torch.dtype) -> None:
    classifier = Classifier(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()), MEAN, STD)
    wanted = classifier(pixels(2))
    found = classifier.to(dtype)(pixels(2))
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=0.02, atol=0.02)


def test_the_default_preprocessing_is_ours() -> None:
    # Networks of this package see images in [-1, 1].
    torch.testing.assert_close(Classifier(nn.Identity())(pixels(4)), to_float(pixels(4)), rtol=0, atol=1e-6)


def test_preprocessing_is_no_weight() -> None:
    # A checkpoint of the network must not depend on the numbers around it.
    assert list(Classifier(Net()).state_dict()) == [f"net.{name}" for name in Net().state_dict()]


# -- exports that went wrong -------------------------------------------------------------------------------


def written_by(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """Let torch.onnx.export write that file, whatever it is asked to export."""

    def copy(model: nn.Module, args: Any, path: Path, **options: Any) -> None:
        print("[torch.onnx] Obtain model graph ...")
        warnings.warn("a note of the exporter", stacklevel=2)
        logging.getLogger("torch.onnx").warning("another one")
        shutil.copy(source, path)

    monkeypatch.setattr(torch.onnx, "export", copy)


@pytest.mark.parametrize("earlier", [False, True])
def test_another_function_is_not_kept(
    tmp_path: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    path = tmp_path / "teacher.onnx"
    if earlier:
        path.write_bytes(b"the earlier one")
    written_by(monkeypatch, exported["uint8"])
    with pytest.raises(ExportError, match=r"teacher.onnx differs from torch by .* 1e-4 is allowed"):
        export(Classifier(Net(seed=1), MEAN, STD, resize=SIDE), path, IMAGE)
    assert [p.name for p in tmp_path.iterdir()] == (["teacher.onnx"] if earlier else [])
    assert not earlier or path.read_bytes() == b"the earlier one"


def test_a_small_difference_is_not_kept_either(
    tmp_path: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by(monkeypatch, exported["uint8"])
    net = Net()
    with torch.no_grad():
        net.linear.bias[2] += 0.01
    with pytest.raises(ExportError):
        export(Classifier(net, MEAN, STD, resize=SIDE), tmp_path / "teacher.onnx", IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_kept(tmp_path: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    written_by(monkeypatch, exported["uint8"])
    net = Net()
    with torch.no_grad():
        net.linear.bias[2] = torch.nan
    with pytest.raises(ExportError):
        export(Classifier(net, MEAN, STD, resize=SIDE), tmp_path / "teacher.onnx", IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_the_right_function_is_kept_and_nothing_is_printed(
    tmp_path: Path,
    exported: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    path = tmp_path / "teacher.onnx"
    path.write_bytes(b"the earlier one")
    written_by(monkeypatch, exported["uint8"])
    logger = logging.getLogger("torch.onnx")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    assert export(Classifier(Net(), MEAN, STD, resize=SIDE), path, IMAGE) <= 1e-5
    assert path.read_bytes() == exported["uint8"].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.onnx"]
    assert capfd.readouterr() == ("", "") and len(recwarn) == 0 and logger.level == logging.WARNING


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (ZeroDivisionError("a fault"), ZeroDivisionError, "a fault"),  # no fault of the user's keeps its traceback
        (
            torch.onnx.OnnxExporterError("no rule\nfor aten::x"),
            ExportError,
            "does not take this network: no rule for a",
        ),
        (
            ModuleNotFoundError("No module named 'onnxscript'"),
            ExportError,
            r"lacks a package .*onnxscript.*'mekd\[onnx\]'",
        ),
    ],
    ids=["a bug", "refused", "not installed"],
)
def test_an_exporter_that_breaks_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], says: str
) -> None:
    def half(model: nn.Module, args: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch.onnx, "export", half)
    with pytest.raises(expected, match=says):
        export(Classifier(Net()), tmp_path / "teacher.onnx", IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_what_one_file_cannot_hold_is_known_before_it_is_written(tmp_path: Path) -> None:
    net = nn.Linear(30_000, 20_000, device="meta")  # 2.4 GB that are not there
    with pytest.raises(
        ExportError, match=r"teacher.onnx would hold 2.4 GB of weights, .*external_data=True.*--teacher.on"
    ):
        export(Classifier(net), tmp_path / "new" / "teacher.onnx", IMAGE)
    assert list(tmp_path.iterdir()) == []
