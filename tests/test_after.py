"""A second round: it goes on from a first one's networks, student and paid answers, exactly resumed, privately."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from interrupted import stopped_at
from mekd import cli, files
from mekd.config import Config
from mekd.engine import after, checkpoint
from mekd.engine.deprivatize import deprivatize
from mekd.engine.run import Run
from mekd.fingerprint import fingerprint
from mekd.nets import Discriminator
from mekd.oracle.replay import Joined, Replay
from mekd.oracle.response import Response
from mekd.student import load_student
from test_run import Recorder, run_stages

FIRST = ["--deprivatize.alpha", "0", "--distill.replay", "40"]


@pytest.fixture(scope="module")
def first(teacher_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import tiny_settings

    return run_stages([*tiny_settings(teacher_onnx), *FIRST], tmp_path_factory.mktemp("first") / "run").out


@pytest.fixture
def again(tiny: list[str], first: Path) -> list[str]:
    return [*tiny, "--deprivatize.alpha", "0", "--distill.replay", "24", "--deprivatize.after", str(first)]


def test_a_discriminator_that_is_told_classes_begins_as_one_that_is_not() -> None:
    torch.manual_seed(0)
    told = Discriminator(16, 1, num_classes=4).eval()
    images, classes = torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(told(images, classes), told(images))
    told(images, classes).sum().backward()
    # The gradient of a class's vector is the sum of its images' features.
    features = told.features(images).flatten(1)
    assert told.classes.weight.grad is not None
    assert torch.allclose(told.classes.weight.grad[1], features[[1, 5]].sum(0), rtol=1e-5)
    with torch.no_grad():
        told.classes.weight.normal_()
    assert not torch.equal(told(images, classes), told(images, classes.roll(1)))
    assert not hasattr(Discriminator(16, 1), "classes")


def test_joined_stores_are_read_as_one(tmp_path: Path) -> None:
    parts, rows = [], []
    for i, count in enumerate((3, 5, 2)):
        images = torch.full((count, 1, 2, 2), i, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(count)
        probs, n = torch.rand(count, 4), torch.randn(count, 6)
        store = Replay(tmp_path / str(i), count)
        store.write(0, images, Response("probs", probs), n)
        parts.append(store)
        rows.append((images, probs, n))
    both = Joined(parts)
    images, probs, n = (torch.cat(column) for column in zip(*rows, strict=True))
    assert len(both) == 10
    for index in (torch.tensor([9, 0, 3, 3, 7, 2]), torch.tensor([4]), slice(None), slice(2, 9)):
        read, answer, nuisance = both.read(index)
        assert torch.equal(read, images[index]) and torch.equal(nuisance, n[index])
        assert answer.values is not None and torch.equal(answer.values, probs[index]) and answer.kind == "probs"
    both.will_need(torch.tensor([9, 0, 3]))


def test_it_goes_on_from_the_first_ones_networks(again: list[str], first: Path, tmp_path: Path) -> None:
    parsed = cli.parse([*again, "--out", str(tmp_path)])
    assert parsed is not None
    run = Run(*parsed)
    generator, discriminator = run.new_generator(), Discriminator(16, 1, width=4.0, num_classes=10)
    names = after.begin(run, {"generator": generator, "discriminator": discriminator})
    saved = files.load(first / "checkpoints" / "deprivatize.pt")["state"]
    assert all(torch.equal(value, saved["generator"][name]) for name, value in generator.state_dict().items())
    assert torch.equal(discriminator.linear.weight, saved["discriminator"]["linear.weight"])
    assert not discriminator.classes.weight.any()
    pixels = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(names(pixels), load_student(first)(pixels).argmax(1))


def test_nothing_private_is_sent_nothing_paid_twice_and_all_answers_are_learnt_from(
    again: list[str], first: Path, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    run = run_stages(again, tmp_path, wrap_oracle=lambda oracle: Recorder(oracle, seen))
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    private = {image.numpy().tobytes() for part, _ in run.data.once("local", 64) for image in part}
    sent = {image.numpy().tobytes() for part in seen for image in part}
    assert not sent & private
    assert run.asked("distill")["queries"] == 44  # the holdout's 20 and the store's 24
    earlier, _, _ = Replay(first / "replay", 40).read(slice(None))
    assert not sent & {image.numpy().tobytes() for image in earlier}
    mine = Replay(run.store("replay"), 24)
    both = Joined([*after.stores(str(first)), mine])
    assert len(both) == 64 and torch.equal(both.read(slice(0, 40))[0], earlier)
    # Without the first round's answers the student is another one.
    alone = tmp_path.with_name(f"{tmp_path.name}-alone")
    words = [*again[:-2], "--distill.store", str(run.out), "--out", str(alone)]
    assert cli.main(["distill", *words]) == 0
    both_again = [*words[:-1], str(tmp_path.with_name(f"{tmp_path.name}-both")), "--deprivatize.after", str(first)]
    assert cli.main(["distill", *both_again]) == 0
    students = [files.load(folder / "student.pt")["fc.weight"] for folder in (run.out, alone, Path(both_again[-3]))]
    assert torch.equal(students[0], students[2]) and not torch.equal(students[0], students[1])


def test_it_is_resumed_exactly(again: list[str], tmp_path: Path) -> None:
    weights = []
    for name in ("whole", "parts"):
        parsed = cli.parse([*again, "--out", str(tmp_path / name)])
        assert parsed is not None
        if name == "parts":
            with stopped_at(5), pytest.raises(checkpoint.Interrupted, match="stopped at step 5 of 9, saved"):
                deprivatize(Run(*parsed))
        deprivatize(Run(*parsed))
        weights.append(files.load(Run(*parsed).checkpoint("deprivatize"))["state"])
    for part in ("generator", "discriminator", "average"):
        assert all(torch.equal(weights[0][part][key], value) for key, value in weights[1][part].items()), part
    assert weights[0]["discriminator"]["classes.weight"].any(), "D has learnt of classes"


def test_a_third_round_learns_from_all_three(again: list[str], first: Path, tmp_path: Path) -> None:
    second = run_stages(again, tmp_path / "second").out
    third = run_stages([*again[:-1], str(second)], tmp_path / "third")
    assert [len(store) for store in after.stores(str(second))] == [40, 24]
    assert third.asked("distill")["queries"] == 44
    images = [Replay(folder / "replay", 24).read(slice(None))[0] for folder in (second, third.out)]
    assert not torch.equal(*images)
    draws = []
    for folder in (first, second):
        parsed = cli.parse([*again[:-1], str(folder), "--out", str(tmp_path / "none")])
        assert parsed is not None
        draws.append(Run(*parsed).latents("replay", 0, 4).code)
    assert not torch.equal(*draws), "each round asks about latents of its own"


def test_the_audit_attacks_a_discriminator_that_is_told_classes(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mekd import audit

    monkeypatch.setattr(audit, "LEAST", 10)
    words = [*tiny, *FIRST, "--audit.holdout", "40"]
    one = run_stages(words, tmp_path / "one")
    two = run_stages([*words, "--deprivatize.after", str(one.out)], tmp_path / "two")
    found = two.read_json("audit.json")
    assert found is not None and 0 <= found["membership_auc"] <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--deprivatize.after", "nowhere"], "deprivatize.after is 'nowhere'; it must be the folder of a run"),
        (["--seed", "3"], "seed is 3, and in deprivatize.after"),
        (["--audit.holdout", "30"], "audit.holdout is 30, and in deprivatize.after"),
        (["--oracle.response", "label"], "of another kind (oracle.response)"),
        (["--deprivatize.dp", "3", "--deprivatize.augment", "false"], "deprivatize.after goes on from what"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_costs_nothing(
    again: list[str], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *again, *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "ledger").exists()


def test_a_damaged_answer_of_the_first_round_is_known_before_anything_is_paid(
    again: list[str], first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(first, tmp_path / "damaged"))
    file = damaged / "replay" / "images.npy"
    content = bytearray(file.read_bytes())
    content[-300] ^= 1
    file.write_bytes(content)
    assert cli.main(["run", *again[:-1], str(damaged), "--out", str(tmp_path / "out")]) != 0
    assert "is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "ledger").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_a_first_round_whose_step_1_goes_on_is_refused(
    again: list[str], first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = Path(shutil.copytree(first, tmp_path / "longer"))
    config = yaml.safe_load((longer / "config.yaml").read_text())
    config["deprivatize"]["steps"] = 12
    (longer / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["run", *again[:-1], str(longer), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "deprivatize.after is" in said and "step 1 stands at step 9 of 12: finish that run first" in said


def test_another_teacher_is_refused(again: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mekd.nets import build
    from mekd.oracle.export import Classifier, export

    torch.manual_seed(1)
    export(Classifier(build("resnet8", 10, 1)), tmp_path / "other.onnx", (1, 16, 16))
    words = [*again, "--teacher.onnx", str(tmp_path / "other.onnx"), "--out", str(tmp_path / "out")]
    assert cli.main(["run", *words]) == 2
    assert "are those of" in (said := capsys.readouterr().err) and "give a run with this teacher" in said


def test_earlier_runs_are_not_touched_by_it() -> None:
    assert not {"deprivatize.after", "first round"} & fingerprint(Config(), "deprivatize").keys()
