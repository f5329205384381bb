"""What `python -m bench compare` calls slower: medians apart, and spreads that do not meet."""

from pathlib import Path

import pytest

from bench import compare

HEAD = "op,case,impl,median_s,p20_s,p80_s\n"


def table(path: Path, **rows: tuple[float, float, float]) -> str:
    path.write_text(HEAD + "".join(f"kl,{name},cpp,{','.join(map(str, times))}\n" for name, times in rows.items()))
    return str(path)


def test_slower_faster_and_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table(tmp_path / "a.csv", slow=(1, 0.9, 1.1), noisy=(1, 0.5, 2), quick=(2, 1.9, 2.1), gone=(1, 1, 1))
    after = table(tmp_path / "b.csv", slow=(1.5, 1.4, 1.6), noisy=(1.5, 0.7, 3), quick=(1, 0.9, 1.1))
    assert compare.main([before, after]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 rows only in the first"
    assert lines[1] == "slower  1.50x  kl slow cpp  1e+03 ms (900-1.1e+03) -> 1.5e+03 ms (1.4e+03-1.6e+03)"
    assert lines[2].startswith("faster  2.00x  kl quick cpp")
    assert lines[3] == "3 rows in both: 1 slower, 1 faster, the others within their spread"
    assert compare.main([before, before]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("op,case\nkl,1\n", "no column median_s, p20_s, p80_s"),
        ("", "no column median_s"),
        (HEAD + "kl,other,cpp,1,1,1\n", "no row in common"),
        (None, "No such file"),
    ],
)
def test_mistakes_are_named(content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "b.csv"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit):
        compare.main([table(tmp_path / "a.csv", one=(1, 1, 1)), str(other)])
    assert said in capsys.readouterr().err
