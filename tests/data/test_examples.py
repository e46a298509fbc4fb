"""Files of examples to predict."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data.examples import examples

THREE = Schema("tables:load", ("a", "b"), (3,))


def test_rows_of_a_table_with_names_or_without(tmp_path: Path) -> None:
    for head in ("", "age,height,weight\n"):
        rows = tmp_path / "rows.csv"
        rows.write_text(f"{head}1,2,3\n4,5,6.5\n")
        names, found = examples([rows], THREE, resize=False)
        assert found.tolist() == [[1, 2, 3], [4, 5, 6.5]]
        assert len(names) == 2


@pytest.mark.parametrize(("cell", "said"), [("", "row 1 has ''"), ("tall", "row 1 has 'tall'")])
def test_a_cell_that_is_no_number_is_named(tmp_path: Path, cell: str, said: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"age,height,weight\n1,2,3\n4,{cell},6\n")
    with pytest.raises(DataError, match=f"rows.csv: {said}, which is not a number"):
        examples([rows], THREE, resize=False)


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("name", ["mass (kg; dry)", "mass (kg, dry, net)"])
def test_what_columns_names_have_of_their_own_separates_nothing(
    tmp_path: Path, name: str, separator: str
) -> None:
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as opened:
        csv.writer(opened, delimiter=separator).writerows([[name, "height", "width"], [1, 2, 3]])
    schema = Schema("table", ("a", "b"), (2,), columns=("width", name))
    assert examples([rows], schema, resize=False)[1][0].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("head", ["", "age,height,weight\n"])
def test_cells_may_be_separated_as_excel_does(tmp_path: Path, separator: str, head: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"\ufeff{head}1.5,2,3\n4,5,6\n".replace(",", separator), encoding="utf-8")
    assert examples([rows], THREE, resize=False)[1].tolist() == [[1.5, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("head", ["", "age;height;weight\n", "age;height (m, cm);weight\n"])
def test_numbers_may_have_decimal_commas_as_excel_writes_them(tmp_path: Path, head: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"{head}1,5;2;-3,25e1\n0,4;1,1;0,2\n")
    assert examples([rows], THREE, resize=False)[1].tolist() == pytest.approx(
        np.array([[1.5, 2, -32.5], [0.4, 1.1, 0.2]])
    )


def test_a_number_that_is_not_finite_is_found(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("1,2,3\n4,nan,6\n")
    with pytest.raises(DataError, match="not finite, the first in row 1"):
        examples([rows], THREE, resize=False)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"photos: holds no files of arrays \(\.npy"):
        examples([tmp_path / "photos"], THREE, resize=False)


def test_a_file_of_no_numbers_is_refused(tmp_path: Path) -> None:
    garbled, words = tmp_path / "garbled.npz", tmp_path / "words.npy"
    garbled.write_bytes(b"PK\3\4 and so on")
    np.save(words, np.array([["a", "b", "c"]]))
    with pytest.raises(DataError, match=r"garbled\.npz: cannot be read"):
        examples([garbled], THREE, resize=False)
    with pytest.raises(DataError, match=r"words\.npy: holds <U1, but the network takes numbers"):
        examples([words], THREE, resize=False)


class TestColumnsByName:
    """A run whose examples had columns with names."""

    NAMED = Schema("tables:load", ("a", "b"), (3,), columns=("age", "height", "2020"))

    def read(self, folder: Path, text: str) -> np.ndarray:
        rows = folder / "rows.csv"
        rows.write_text(text)
        return examples([rows], self.NAMED, resize=False)[1]

    def test_in_any_order_and_with_others(self, tmp_path: Path) -> None:
        text = "2020, label,height,age\n3,yes,2,1\n6,no,5,4\n"
        assert self.read(tmp_path, text).tolist() == [[1, 2, 3], [4, 5, 6]]

    def test_without_names_they_are_taken_as_they_stand(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, "1,2,3\n").tolist() == [[1, 2, 3]]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("age,hieght,2020\n1,2,3\n", "has no column 'height'; did you mean hieght?"),
            ("age,height,age,2020\n1,2,3,4\n", "has more than one column 'age'"),
            ("age,height,2020\n1,2,3\n4,5\n", "row 1 has 2 cells, but there are 3 columns"),
        ],
    )
    def test_what_cannot_be_matched_is_refused(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(DataError, match=re.escape(said)):
            self.read(tmp_path, text)
