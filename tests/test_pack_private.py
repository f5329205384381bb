"""What mekd push knows of a run, by which it searches what goes up, from folders that hold no student."""

import os
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'mekd[hub]'")

from mekd import files
from mekd.hub.pack import Item, PackError, _check_private


def card(folder: Path, text: str) -> list[Item]:
    path = folder / "README.md"
    path.write_text(text)
    return [Item("README.md", path, "the model card")]


def test_a_folder_whose_name_is_no_utf8_is_searched_for(tmp_path: Path) -> None:
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    run.mkdir()
    _check_private(run, card(tmp_path, "Nothing of this machine."))
    with pytest.raises(PackError, match="the name of the run's folder"):
        _check_private(run, card(tmp_path, f"From {files.shown(run)}."))


@pytest.mark.parametrize("content", [b"oracle:\n  headers: {X-Key: literal-key-55\n", b"\xff\xfe\x00", b""])
def test_settings_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path, content: bytes) -> None:
    """Nobody would know what a card must not tell."""
    run = tmp_path / "run"
    run.mkdir()
    told = card(tmp_path, "literal-key-55")
    _check_private(run, told)  # of a folder that was pulled there are none
    (run / "config.yaml").write_text("oracle:\n  headers: {X-Key: literal-key-55}\n")
    with pytest.raises(PackError, match=r"what oracle\.headers\.X-Key says"):
        _check_private(run, told)
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(PackError, match=r"config\.yaml cannot be read as settings"):
        _check_private(run, told)
