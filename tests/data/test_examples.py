"""Files of examples to predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data.examples import examples

THREE = Schema("tables:load", ("a", "b"), (3,))


def test_rows_of_a_table_with_names_or_without(tmp_path: Path) -> None:
    for head in ("", "age,height,weight\n"):
        rows = tmp_path / "rows.csv"
        rows.write_text(f"{head}1,2,3\n4,5,6.5\n")
        names, found = examples([rows], THREE, pixels=False, size=0)
        assert found.tolist() == [[1, 2, 3], [4, 5, 6.5]]
        assert len(names) == 2


@pytest.mark.parametrize(("cell", "said"), [("", "row 2 has ''"), ("tall", "row 2 has 'tall'")])
def test_a_cell_that_is_no_number_is_named(tmp_path: Path, cell: str, said: str) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"age,height,weight\n1,2,3\n4,{cell},6\n")
    with pytest.raises(DataError, match=f"rows.csv: {said}: wanted are numbers"):
        examples([rows], THREE, pixels=False, size=0)
