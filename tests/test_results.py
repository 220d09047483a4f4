"""Results as rows, and the tables of the documents that are made from them."""

import csv
import shutil
from pathlib import Path

import pytest

from lowpass.benchmarks.headline import draw
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import FIGURE, ORIGIN, RESULTS, Row, kept_rows, read_rows, write_rows
from lowpass.benchmarks.tables import BLOCK, TABLES, documents, filled, main
from lowpass.pipeline.base.errors import InputError, RunError

ROOT = Path(__file__).parent.parent


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        Row({"model": "a", "batch": 8}, "p50_ms", 0.1 + 0.2, 0.25, 0.5),
        Row({"model": "a", "seed": 1}, "not_measured", "no GPU, or none that is free"),
    ]
    path = tmp_path / "study.csv"
    write_rows(path, rows, describe(), "python -m somewhere --out a,b", commit="abc1234")
    first, second = read_rows(path)
    assert list(first) == ["model", "batch", "seed", *FIGURE, *ORIGIN]
    assert (first["model"], first["batch"], first["seed"]) == ("a", "8", "")
    assert float(first["value"]) == 0.1 + 0.2 and (first["low"], first["high"]) == ("0.25", "0.5")
    assert second["value"] == "no GPU, or none that is free" and second["low"] == ""
    assert first["commit"] == "abc1234" and first["command"] == "python -m somewhere --out a,b"
    assert "torch " in first["versions"] and "cores" in first["machine"]


def test_rows_of_another_run_are_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    old = [Row({"seed": seed, "what": what}, "times", 1 / 3, 0.1) for seed in (0, 1) for what in ("a", "b")]
    write_rows(path, old, describe(), "the first", commit="abc1234")
    before = path.read_text().splitlines()
    kept = kept_rows(path, {"seed": "1"})
    write_rows(path, [*kept, Row({"seed": 1, "what": "a"}, "times", 2)], describe(), "the second", commit="def5678")
    after = path.read_text().splitlines()
    assert after[:3] == before[:3] and len(after) == 4 and after[3].endswith("def5678,the second")
    assert kept_rows(tmp_path / "none.csv", {}) == []


def test_what_is_no_table_of_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a table of results"):
        read_rows(tmp_path / "other.csv")
    with pytest.raises(InputError, match="cannot read"):
        read_rows(tmp_path / "none.csv")


def test_every_committed_figure_says_how_it_came_about() -> None:
    for path in sorted((ROOT / RESULTS).glob("*.csv")):
        rows = read_rows(path)
        assert all(row[origin] for row in rows for origin in ORIGIN), path
        assert all(row["figure"] and row["value"] for row in rows), path
        assert path.name in (ROOT / RESULTS / "README.md").read_text(), path


def test_documents_hold_the_tables_of_the_results() -> None:
    found = set()
    for document in documents(ROOT):
        text = document.read_text()
        assert filled(text, ROOT / RESULTS) == text, f"{document}: run `python -m lowpass.benchmarks.tables`"
        found |= {block[2] for block in BLOCK.finditer(text)}
    assert found == set(TABLES)


def test_an_edited_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / RESULTS, tmp_path / RESULTS)
    monkeypatch.chdir(tmp_path)
    main(check=True, results=RESULTS)
    lines = list(csv.reader((RESULTS / "serving.csv").open()))
    row = next(line for line in lines if line[0] == "deit_small" and "throughput_gain" in line)
    row[lines[0].index("value")] = "9.99"
    with (RESULTS / "serving.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    with pytest.raises(RunError, match=r"README\.md"):
        main(check=True, results=RESULTS)
    main(check=False, results=RESULTS)
    assert "9.99x" in Path("README.md").read_text()
    main(check=True, results=RESULTS)


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(InputError, match="no table 'none'"):
        filled("<!-- table: none -->\n<!-- /table -->", ROOT / RESULTS)


def test_the_picture_of_the_readme_shows_what_was_measured() -> None:
    left, right = draw(ROOT / RESULTS).axes
    assert len(left.patches) == len(right.patches) == 12  # four candidates at three batch sizes
    assert all(bar.get_height() > 1 for bar in (*left.patches, *right.patches))


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140 and len(text.split()) <= 1300
