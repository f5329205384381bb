"""precision: auto is decided once, by a measurement of the first process, and stays with the run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from flat_settings import replaced
from mekd.config import Config
from mekd.engine import run as runs
from mekd.engine import train
from mekd.engine.run import Run
from mekd.fingerprint import BFLOAT16, fingerprint, resolve
from mekd.settings import dump_yaml

STAGES = ("teacher", "deprivatize", "distill")


def decided(config: Config) -> dict[str, str]:
    return {stage: getattr(config, stage).precision for stage in STAGES}


@pytest.mark.parametrize("faster", [True, False])
def test_auto_is_bfloat16_where_it_is_faster(faster: bool) -> None:
    found = decided(resolve(Config(), {}, lambda device: faster))
    assert found == {stage: "bfloat16" if faster and stage in BFLOAT16 else "float32" for stage in STAGES}


def test_what_is_named_is_not_measured() -> None:
    config = Config()
    for stage in STAGES:
        config = replaced(f"{stage}.precision", "float32", config)
    assert decided(resolve(config, {"distill.precision": "bfloat16"}, lambda device: 1 / 0)) == dict.fromkeys(
        STAGES, "float32"
    )


@pytest.mark.parametrize("was", ["float32", "bfloat16"])
def test_a_run_keeps_what_was_decided_wherever_it_goes_on(
    was: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "faster_in_bfloat16", lambda device: was == "bfloat16")
    first = Run(Config(), tmp_path)
    first.save_config()
    monkeypatch.setattr(runs, "faster_in_bfloat16", lambda device: was != "bfloat16")  # another machine
    again = Run(Config(), tmp_path)
    assert decided(again.config) == decided(first.config)
    assert fingerprint(again.config, "distill")["distill.precision"] == first.config.distill.precision
    assert decided(Run(Config(), tmp_path / "other").config) != decided(first.config)


@pytest.mark.parametrize("text", ["", "{", "- 1", "distill: 3", "distill: {precision: null}"])
def test_a_saved_configuration_that_says_nothing_is_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert decided(Run(Config(), tmp_path).config) == decided(Run(Config(), tmp_path / "none").config)


def test_the_measurement_draws_no_random_numbers_and_says_the_same_twice() -> None:
    state = torch.manual_seed(0).get_state()
    train.faster_in_bfloat16.cache_clear()
    found = train.faster_in_bfloat16("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert found is train.faster_in_bfloat16("cpu")
    assert train.faster_in_bfloat16("nonsense") is False  # the run says what is wrong with it


def test_no_precision_that_is_unknown() -> None:
    for stage in STAGES:
        with pytest.raises(ValueError, match=rf"{stage}\.precision.*'half'.*auto, float32, bfloat16|'half'"):
            replaced(f"{stage}.precision", "half")
    assert dataclasses.is_dataclass(replaced("distill.precision", "float16"))
    assert "precision: auto" in dump_yaml(Config())
