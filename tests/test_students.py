"""Any student: by name from timm, or a factory of the user's own; looked at first, loaded afterwards."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mekd
from conftest import OWN_STUDENT
from mekd import cli
from mekd.nets import build
from mekd.nets.check import check_network
from mekd.student import FILE, Preprocess, StudentError


@pytest.fixture(autouse=True)
def path_of_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def needs_timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")


# By name.


@pytest.mark.parametrize("channels", [1, 3])
def test_timms_models_by_name(channels: int) -> None:
    needs_timm()
    net = build("timm:mobilenetv3_small_050", 7, channels).eval()
    assert net(torch.zeros(1, channels, 32, 32)).shape == (1, 7)
    assert next(net.parameters()).shape[1] == channels


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mobilenetv3_smal_050", "mobilenetv3_small_050"), ("zzz", "list_models()"), ("hf-hub:some/model", "no model")],
)
def test_unknown_names_of_timm_get_the_nearest_known(name: str, nearest: str) -> None:
    needs_timm()
    with pytest.raises(ValueError) as caught:
        build(f"timm:{name}", 7)
    assert repr(name) in str(caught.value) and nearest in str(caught.value)


@pytest.mark.parametrize(("package", "advice"), [("timm", "pip install timm"), ("torchvision", "mekd[vision]")])
def test_a_package_that_is_missing_is_named(package: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{package}:resnet18 needs {package}.*{advice.split('[')[0]}"):
        build(f"{package}:resnet18", 7)


def test_timms_models_are_looked_at_too() -> None:
    needs_timm()
    check_network(build("timm:mobilenetv3_small_050", 7), (3, 32, 32), 7)
    with pytest.raises(ValueError, match=r"raised AssertionError.*raise data\.size to 224"):
        check_network(build("timm:vit_tiny_patch16_224", 7), (3, 32, 32), 7)


# By a factory.


def test_a_factory_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are called with num_classes and channels, and may import what lies beside them."""
    (tmp_path / "widths_beside.py").write_text("WIDTH = 5\n")
    code = "from torch import nn\nfrom widths_beside import WIDTH\n\ndef make(*, channels, num_classes):\n"
    code += "    return nn.Sequential(nn.Conv2d(channels, WIDTH, 1), nn.Flatten(), nn.LazyLinear(num_classes))\n"
    (tmp_path / "some_net.py").write_text(code)
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "nets.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for name in ("some_package.nets:make", "some_net.py:make", str(tmp_path / "some_net.py:make")):
        net = build(name, 4, 1)
        assert isinstance(net, nn.Sequential) and net[0].weight.shape == (5, 1, 1, 1)
        assert net(torch.zeros(2, 1, 3, 3)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("none.py:make", None, ["no such file none.py"]),
        ("net.py:make", "x = 1", ["net.py has no function make"]),
        ("net.py:x", "x = 1", ["net.py has no function x"]),
        ("net.py:", "", ["nearest"]),
        ("net.py:a.b", "", ["FILE.py:function"]),
        ("net.py:make", "import no_such_package", ["net.py cannot be imported", "no_such_package", "net.py, line 1"]),
        ("net.py:make", "def make(:", ["net.py cannot be imported", "SyntaxError", "(net.py, line 1)"]),
        ("net.py:make", "exit(3)", ["net.py cannot be imported", "SystemExit: 3"]),
        ("net.py:make", "def make(num_classes, channels): exit(3)", ["make raised SystemExit: 3"]),
        ("no_such_package.nets:make", None, ["no_such_package.nets cannot be imported", "run from the folder"]),
        ("json:make", None, ["json has no function make"]),
        ("a b:make", None, ["package.module:function"]),
        ("net.py:make", "def make(n): pass", ["make cannot be called with num_classes and channels", "def factory"]),
        ("net.py:make", "def make(num_classes, channels):\n    1 / 0", ["make raised ZeroDivisionError", "line 2"]),
        ("net.py:make", "def make(num_classes, channels): return 'net'", ["make gave a str", "torch.nn.Module"]),
    ],
)
def test_a_factory_that_gives_no_network_says_why(
    name: str, code: str | None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / "net.py").write_text(code)
    with pytest.raises(ValueError) as caught:
        build(name, 7)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert "<frozen" not in str(caught.value), "no place in Python itself"


# Looked at before the first step.


class Net(nn.Module):
    """A linear network whose forward ends with what a test says."""

    def __init__(self, end: Callable[["Net", Tensor], object] = lambda net, x: x, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv, self.linear, self.end = nn.Conv2d(1, 4, 3, padding=1), nn.LazyLinear(7), end
        self.norm = nn.BatchNorm1d(7) if batch_norm else nn.Identity()
        self(torch.zeros(2, 1, 16, 16))

    def forward(self, images: Tensor) -> object:
        return self.end(self, self.norm(self.linear(F.relu(self.conv(images)).flatten(1))))


def frozen() -> nn.Module:
    return Net().requires_grad_(False)


def of_a_broken_weight() -> nn.Module:
    net = Net()
    nn.init.constant_(net.linear.weight, float("inf"))
    return net


def squeezing() -> nn.Module:
    """What a batch of two hides: one image alone loses its dimension."""
    return Net(lambda net, x: x.squeeze())


def for_64_pixels() -> nn.Module:
    """Convolutions that leave nothing of 16 or 32 pixels."""
    return nn.Sequential(nn.Conv2d(1, 4, 33), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))


class Viewing(Net):
    def forward(self, images: Tensor) -> object:
        return self.linear(self.conv(images).view(len(images), -1))


class Noted(Net):
    def get_extra_state(self) -> object:
        return "a note"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Net(lambda net, x: (x, x)), "training it gave a tuple.*logits \\(2, 7\\)"),
        (lambda: Net(lambda net, x: x[:, :5]), "gave \\(2, 5\\).*\\(2, 7\\)"),
        (lambda: Net(lambda net, x: x[..., None, None]), "gave \\(2, 7, 1, 1\\)"),
        (lambda: Net(lambda net, x: x.mean(0)), "gave \\(7,\\)"),
        (lambda: Net(lambda net, x: x.long()), "gave int64.*floats"),
        (lambda: Net(lambda net, x: x.softmax(1)), "probabilities.*leave out its softmax"),
        (lambda: Net(lambda net, x: x.detach()), "no gradient.*detach"),
        (lambda: Net(lambda net, x: x * 0 + 0 * net.linear.bias), "no gradient"),
        (lambda: Net(lambda net, x: x / 0), "NaN or infinity"),
        (of_a_broken_weight, "NaN or infinity"),
        (lambda: Net(lambda net, x: x * (x - x).sqrt()), "gradient is NaN"),
        (frozen, "no parameter that requires a gradient"),
        (nn.Flatten, "no parameter"),
        (squeezing, "in evaluation it gave \\(7,\\) for images \\(1, 1, 16, 16\\)"),
        (for_64_pixels, "raise data.size to 64"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 7)), "raised RuntimeError.*16 pixels \\(data.size\\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(7)), "1.weight has no size"),
        # Training hands images over channels last.
        (Viewing, "reshape"),
        (Noted, "_extra_state, which is no tensor"),
    ],
)
def test_what_cannot_learn_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_network(make(), (1, 16, 16), 7)


@pytest.mark.parametrize(
    "make",
    [
        Net,
        # Batch statistics of two images, and none in evaluation.
        lambda: Net(batch_norm=True),
        # A part that does not learn.
        lambda: nn.Sequential(Net().requires_grad_(False), nn.Linear(7, 7)),
        # Chance in training.
        lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(256, 7)),
    ],
)
def test_what_can_learn_is_taken(make: Callable[[], nn.Module]) -> None:
    net = make()
    before = torch.get_rng_state()
    check_network(net, (1, 16, 16), 7)
    assert torch.equal(before, torch.get_rng_state()), "a look at a network changes what is drawn after it"
    assert net.training


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # The networks of torchvision are looked at without memory.
        (["torchvision:alexnet"], ["'torchvision:alexnet'", "raise data.size to 64"]),
        (["torchvision:vit_b_16"], ["'torchvision:vit_b_16'", "raise data.size to 224"]),
        (["torchvision:googlenet"], ["'torchvision:googlenet'", "gave a GoogLeNetOutputs"]),
        (["NET:softmax"], ["distill.student is 'NET:softmax'", "leave out its softmax"]),
        (["NET:none"], ["distill.student is 'NET:none'", "NET has no function none"]),
        # What ONNX has no word for is known before anything is trained.
        (["NET:strange"], ["distill.student is 'NET:strange'", "the exporter does not take this network"]),
    ],
)
def test_a_run_with_a_student_that_cannot_learn_does_not_begin(
    tiny: list[str], words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0].startswith("torchvision"):
        pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'mekd[vision]'")
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def softmax(num_classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 256, num_classes), nn.Softmax(1))\n\n"
        "class Strange(nn.Module):\n"
        "    def __init__(self, n):\n        super().__init__()\n        self.linear = nn.Linear(256, n)\n\n"
        "    def forward(self, x):\n"
        "        x = self.linear(x.flatten(1))\n"
        "        return x if float(x.detach().sum()) > 1e9 else 2 * x\n\n"
        "def strange(num_classes, channels):\n    return Strange(num_classes)\n"
    )
    words = ["--distill.student", words[0].replace("NET", str(net))]
    assert cli.main(["run", *tiny, *words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part.replace("NET", str(net)) not in said] == [], said
    assert "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists(), "a refused run has written something"


def test_a_file_that_changed_is_another_student(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(OWN_STUDENT)
    words = [*tiny, "--distill.student", f"{tmp_path / 'net.py'}:small", "--out", str(tmp_path / "run")]
    assert cli.main(["deprivatize", *words]) == 0
    assert cli.main(["distill", *words]) == 0
    (tmp_path / "net.py").write_text(OWN_STUDENT.replace("ReLU", "GELU"))
    capsys.readouterr()
    assert cli.main(["distill", *words]) == 2
    assert "distill.student's file" in capsys.readouterr().err


# The result.


def pixels(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_both_files_say_what_they_are_and_answer_alike(finished: Path, tmp_path: Path) -> None:
    """The folder alone is enough, wherever it is handed on to: in torch and in ONNX Runtime."""
    folder = tmp_path / "handed on"
    folder.mkdir()
    for name in (FILE, "student.onnx", "own_net.py"):
        shutil.copy(finished / name, folder)
    student = mekd.load_student(folder)
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    with torch.inference_mode():
        logits = student(pixels())
    assert not student.training and logits.shape == (4, 10) and logits.std() > 0
    np.testing.assert_allclose(session.run(None, {"images": pixels().numpy()})[0], logits, rtol=1e-4, atol=1e-5)
    assert student.classes == tuple("0123456789")
    again = mekd.load_student(str(folder / FILE))
    assert torch.equal(again.eval()(pixels()), student(pixels()))

    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789")
    assert about["architecture"] == "own_net.py:small" and about["teacher"] == "teacher.onnx"
    assert Preprocess.read(about["preprocess"]) == Preprocess(16, 16, 1, 1.0, 0.0)
    assert "shorter side resized to 16" in about["preprocessing"] and "uint8" in about["preprocessing"]


def test_the_weights_say_how_their_images_are_made(finished: Path) -> None:
    """By the metadata alone: build, load, preprocess; no other way of mekd is used."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(finished / FILE, "pt") as file:
        about = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    net = build(str(finished / about["architecture"]), int(about["num_classes"]), int(about["channels"])).eval()
    net.load_state_dict(weights)
    how = json.loads(about["preprocess"])
    assert (how["scale"], how["offset"]) == (1 / 127.5, -1)
    with torch.inference_mode():
        torch.testing.assert_close(
            net(pixels() * how["scale"] + how["offset"]), mekd.load_student(finished)(pixels()), rtol=1e-4, atol=1e-5
        )


def test_files_that_are_missing_are_written_again(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, "--out", str(tmp_path)]
    assert cli.main(["deprivatize", *words]) == 0 and cli.main(["distill", *words]) == 0
    first = mekd.load_student(tmp_path)(pixels())
    (tmp_path / FILE).unlink()
    assert cli.main(["distill", *words]) == 0
    assert torch.equal(mekd.load_student(tmp_path)(pixels()), first)


def test_preprocessing_in_words_and_numbers() -> None:
    for scale, offset, said in [
        (1.0, 0.0, "uint8 from 0 to 255"),
        (1 / 255, 0.0, "float32, pixels / 255"),
        (1 / 127.5, -1.0, "pixels * 0.0078431373 + -1"),
    ]:
        how = Preprocess(32, 37, 3, scale, offset)
        assert said in how.words() and "resized to 37" in how.words() and "centre 32 x 32" in how.words()
        assert Preprocess.read(how.json()) == how


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "no such file.*mekd distill"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
        (lambda path: path.write_bytes(b"weights"), "damaged"),
        (lambda path: (path.parent / "own_net.py").unlink(), "no such file"),
        (
            lambda path: (path.parent / "own_net.py").write_text(OWN_STUDENT.replace("8", "9")),
            "cannot be loaded as own_net.py:small",
        ),
    ],
)
def test_what_is_no_student_is_named(
    damage: Callable[[Path], object], said: str, finished: Path, tmp_path: Path
) -> None:
    for name in (FILE, "own_net.py"):
        shutil.copy(finished / name, tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(ValueError, match=said):
        mekd.load_student(tmp_path)


@pytest.mark.parametrize("name", ["student.onnx", "student.pt"])
def test_another_file_of_a_student_is_told_from_a_damaged_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"whole")
    with pytest.raises(StudentError, match=f"give its run's folder, or its {FILE}"):
        mekd.load_student(tmp_path / name)


def test_weights_of_somebody_else_are_no_student(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    torch_files.save_file({"weight": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(StudentError, match="does not say architecture"):
        mekd.load_student(tmp_path)
