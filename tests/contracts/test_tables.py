from pathlib import Path

import pytest

from jobs.describe_tables import tables_as_markdown, tables_as_print
from schemas.table import Table
from schemas.tables import TABLES

by_name = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)


@by_name
def test_every_column_has_a_meaning_and_a_name_of_its_own(table: Table) -> None:
    assert table.doc
    assert all(column.doc.strip() for column in table.columns)
    assert len(set(table.names)) == len(table.names)


@by_name
def test_keys_are_required_columns_that_say_what_a_row_is(table: Table) -> None:
    columns = {column.name: column for column in table.columns}
    assert table.key
    for name in table.key:
        assert not columns[name].nullable
        assert not columns[name].provenance, f"{table.name}.{name}: two equal lakes would have different keys"


def test_table_names_are_distinct() -> None:
    assert len({table.name for table in TABLES}) == len(TABLES)


def test_the_tables_are_those_of_the_frozen_print(checkout: Path) -> None:
    frozen = (checkout / "tests" / "contracts" / "tables.txt").read_text(encoding="utf-8")
    assert tables_as_print(TABLES) == frozen, (
        "schemas/ and the frozen print differ. Lakes on disk have the frozen columns: add nullable columns, never "
        "rename, retype or remove one. If so, `make docs` renews the print; name the change in CHANGELOG.md."
    )


def test_the_docs_page_is_current(checkout: Path) -> None:
    page = (checkout / "docs" / "tables.md").read_text(encoding="utf-8")
    assert tables_as_markdown(TABLES) == page, "docs/tables.md is out of date: run `make docs`"
