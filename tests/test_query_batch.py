"""The query batch: requests are split without a trace, and the size is measured once and kept with the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mekd.config import Config, DataConfig, EngineConfig, OracleConfig, TeacherConfig
from mekd.engine.run import Run
from mekd.oracle import batch as query_batch
from mekd.oracle.base import Oracle
from mekd.oracle.batch import BatchError, find_batch, stored_batch
from mekd.oracle.ledger import Ledger
from mekd.oracle.ort import ModelError, OnnxOracle, ProviderError
from mekd.oracle.response import AnswerError
from onnx_files import FLOAT, SMALL, asked, echo, expected_small, pixels, values

IMAGE = (3, 224, 224)


class Teacher:
    """Takes first + m * each seconds of a clock of its own for m images, and has memory for some at once."""

    def __init__(self, first: float, each: float, holds: int = 10**6) -> None:
        self.first, self.each, self.holds = first, each, holds
        self.now, self.sizes = 0.0, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def __call__(self, m: int) -> None:
        self.sizes.append(m)
        if m > self.holds:
            raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 7")
        self.now += self.first + m * self.each


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Teacher]:
    def timed(*numbers: Any, **named: Any) -> Teacher:
        teacher = Teacher(*numbers, **named)
        monkeypatch.setattr(query_batch, "time", teacher)
        return teacher

    return timed


@pytest.mark.parametrize(
    ("first", "each", "found"),
    [
        (0.0, 1e-4, 1),  # a batch gains nothing: the smallest
        (1e-3, 0.0, 256),  # it gains everything: the largest
        (1e-4, 1e-4, 16),  # 16 images come within 5 % of 64, and 64 is where it stops to gain
    ],
)
def test_the_smallest_size_that_is_as_fast_as_any(
    timed: Callable[..., Teacher], first: float, each: float, found: int
) -> None:
    assert find_batch(timed(first, each), IMAGE) == found


def test_a_size_that_does_not_fit_ends_the_search(timed: Callable[..., Teacher]) -> None:
    teacher = timed(1e-3, 0.0, holds=20)
    assert find_batch(teacher, IMAGE) == 16
    assert max(teacher.sizes) == 32


def test_a_single_image_that_does_not_fit(timed: Callable[..., Teacher]) -> None:
    with pytest.raises(
        ProviderError, match=r"out of memory at a single image .*Failed to allocate.*: free some, or say"
    ):
        find_batch(timed(1e-3, 0.0, holds=0), IMAGE)


def test_another_failure_is_told_as_it_is() -> None:
    def broken(m: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        find_batch(broken, IMAGE)


@pytest.mark.parametrize(("side", "limit"), [(224, 3.0), (16, 0.3), (32, 0.3), (1024, 3.0)])
def test_the_search_is_short(timed: Callable[..., Teacher], side: int, limit: float) -> None:
    for each in (1e-5, 1e-3, 0.04):
        teacher = timed(each, each)
        find_batch(teacher, (3, side, side))
        assert teacher.now <= limit
    slow = timed(1.0, 1.0)
    assert find_batch(slow, (3, side, side)) == 1 and slow.sizes == [1, 1]


# -- the file ----------------------------------------------------------------------------------------------

BELONGS = {"teacher": "abc", "provider": "CPUExecutionProvider"}


def never() -> int:
    raise AssertionError("measured again")


def test_found_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "oracle.json"
    assert stored_batch(path, BELONGS, False, lambda: 8) == 8
    assert stored_batch(path, BELONGS, False, never) == 8
    assert stored_batch(path, BELONGS, True, never) == 8
    assert json.loads(path.read_text()) == {"batch": 8, "belongs": BELONGS}
    assert [p.name for p in path.parent.iterdir()] == ["oracle.json"]


def test_killed_while_it_is_measured(tmp_path: Path) -> None:
    def killed() -> int:
        raise KeyboardInterrupt

    path = tmp_path / "oracle.json"
    with pytest.raises(KeyboardInterrupt):
        stored_batch(path, BELONGS, False, killed)
    assert list(tmp_path.iterdir()) == []
    assert stored_batch(path, BELONGS, False, lambda: 4) == 4


def test_another_teacher_before_and_after_the_first_query(tmp_path: Path) -> None:
    path, other = tmp_path / "oracle.json", {**BELONGS, "teacher": "xyz"}
    stored_batch(path, BELONGS, False, lambda: 8)
    with pytest.raises(
        BatchError, match=r"oracle.json holds .* \(teacher was abc, is xyz\), and the run's ledger.*delete the file"
    ) as caught:
        stored_batch(path, other, True, never)
    assert "\n" not in str(caught.value) and json.loads(path.read_text())["belongs"] == BELONGS
    assert stored_batch(path, other, False, lambda: 16) == 16
    assert stored_batch(path, other, True, never) == 16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"batch": 1, "belongs": []}',
        '{"batch": 0, "belongs": {}}',
        '{"batch": true, "belongs": {}}',
        "nul",
    ],
)
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "oracle.json"
    path.write_text(text)
    with pytest.raises(BatchError, match=r"oracle.json is damaged .*delete it, and it is measured again"):
        stored_batch(path, BELONGS, True, never)
    assert path.read_text() == text


# -- an oracle that splits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("response", ["probs", "topk", "label"])
def test_pieces_answer_what_the_whole_answers(teacher_onnx: Path, batch: int, response: str) -> None:
    images = pixels(7, (1, 16, 16))
    whole = asked(teacher_onnx, response, k=3).query(images)
    oracle = asked(teacher_onnx, response, k=3, batch=batch)
    pieces = oracle.query(images)
    for a, b in zip(pieces.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(pieces.labels) == 7 and oracle.ledger.counts["calls"] == 1 and oracle.ledger.counts["queries"] == 7
    assert oracle.ledger.counts["bytes_up"] == images.nbytes


def test_measured_with_blank_images_that_cost_nothing(tmp_path: Path) -> None:
    def measure(run: Callable[[int], object]) -> int:
        for m in (1, 2, 64):
            run(m)
        return 2

    oracle = asked(echo(tmp_path / "x.onnx"), batch=measure)
    assert oracle.ledger.spent == 0
    images = pixels(5, SMALL)
    assert torch.equal(values(oracle.query(images)), values(asked(tmp_path / "x.onnx").query(images)))


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_that_is_no_size(tmp_path: Path, batch: int) -> None:
    with pytest.raises(ValueError, match=rf"batch is {batch} \(oracle.batch\); it must be at least 1, or null"):
        asked(echo(tmp_path / "x.onnx"), batch=batch)
    with pytest.raises(ValueError, match=rf"oracle.batch is {batch}; it must be at least 1, or null"):
        OracleConfig(batch=batch)


def test_a_file_for_one_size_has_no_other(tmp_path: Path) -> None:
    path = echo(tmp_path / "x.onnx", shape=(4, *SMALL), output=("scores", FLOAT, [4, 6]))
    with pytest.raises(
        ModelError, match=r"batch is 8 \(oracle.batch\); .*x.onnx takes 4 images at once: leave it null"
    ):
        asked(path, batch=8)
    images = pixels(6, SMALL)
    torch.testing.assert_close(values(asked(path, batch=lambda run: never()).query(images)), expected_small(images))


# -- a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(teacher_onnx: Path, tmp_path: Path) -> Run:
    own = tmp_path / "teacher.onnx"
    own.write_bytes(teacher_onnx.read_bytes())
    config = Config(
        data=DataConfig(name="digits", size=16),
        teacher=TeacherConfig(onnx=str(own)),
        oracle=OracleConfig(provider="cpu"),
        engine=EngineConfig(device="cpu"),
    )
    return Run(config, tmp_path / "run")


def opened(run: Run, name: str) -> Oracle:
    """The teacher with an account that is closed before it is opened again."""
    for account in ACCOUNTS:
        account.close()
    ACCOUNTS[:] = [Ledger(name, run.out / "ledger")]
    return run.open_oracle(ACCOUNTS[0])


ACCOUNTS: list[Ledger] = []


def counted(monkeypatch: pytest.MonkeyPatch, found: int) -> list[int]:
    """Let the search find that; the list grows by one at each search."""
    searches: list[int] = []

    def find(run_blank: Callable[[int], object], image: tuple[int, int, int]) -> int:
        run_blank(3)
        searches.append(found)
        return found

    monkeypatch.setattr("mekd.engine.run.find_batch", find)
    return searches


def test_stages_share_what_the_first_one_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = counted(monkeypatch, 2)
    oracle = opened(run, "deprivatize")
    oracle.query(pixels(5, (1, 16, 16)))
    assert oracle.ledger.counts["queries"] == 5 and oracle.ledger.counts["calls"] == 1
    counted(monkeypatch, 64)
    opened(run, "distill")
    opened(run, "deprivatize")
    assert searches == [2]
    assert json.loads((run.out / "oracle.json").read_text())["batch"] == 2


def test_the_search_itself_in_a_run(run: Run) -> None:
    assert opened(run, "distill").ledger.spent == 0
    kept = json.loads((run.out / "oracle.json").read_text())
    assert 1 <= kept["batch"] <= 256
    belongs = {"teacher", "provider", "transport", "precision"}
    assert set(kept["belongs"]) == belongs and kept["belongs"]["provider"] == "CPUExecutionProvider"


def test_a_size_of_the_users_is_not_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = counted(monkeypatch, 2)
    chosen = Run(Config(**{**vars(run.config), "oracle": OracleConfig(provider="cpu", batch=3)}), run.out)
    opened(chosen, "distill").query(pixels(5, (1, 16, 16)))
    assert searches == [] and not (run.out / "oracle.json").exists()


def test_another_teacher_in_the_same_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = counted(monkeypatch, 2)
    opened(run, "distill")
    with open(run.teacher_onnx, "ab") as file:  # another file with the same graph: an unknown field at its end
        file.write(bytes([0xFA, 0x07, 0x00]))
    oracle = opened(run, "distill")  # nothing was asked yet
    assert searches == [2, 2]
    oracle.query(pixels(1, (1, 16, 16)))
    with open(run.teacher_onnx, "ab") as file:
        file.write(bytes([0xFA, 0x07, 0x00]))
    with pytest.raises(ValueError, match=r"oracle.json holds a query batch found for another setting \(teacher was"):
        opened(run, "distill")
    assert searches == [2, 2]
    (run.out / "oracle.json").unlink()
    opened(run, "distill")
    assert searches == [2, 2, 2]


@pytest.mark.parametrize(("m", "batch"), [(1, None), (5, 1)])
def test_memory_that_one_image_exceeds_needs_no_smaller_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, m: int, batch: int | None
) -> None:
    oracle = asked(echo(tmp_path / "x.onnx"), batch=batch)

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("mekd.oracle.binding.torch.empty", full)
    with pytest.raises(AnswerError, match=rf"ran out of memory on {m} images: free some \(CUDA"):
        oracle.query(pixels(m, SMALL))


def test_memory_that_runs_out_says_which_setting_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = OnnxOracle(echo(tmp_path / "x.onnx"), "logits", providers="cpu")

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 7 GiB")

    monkeypatch.setattr("mekd.oracle.binding.torch.empty", full)
    with pytest.raises(
        AnswerError, match=r"ran out of memory on 5 images: say a smaller --oracle.batch \(CUDA.*7 GiB\)"
    ):
        oracle.query(pixels(5, SMALL))
    assert oracle.ledger.counts["uncertain"] == 5
