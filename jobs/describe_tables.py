"""The tables as text: a page for people, and a frozen print that a test compares with the code.

`python -m jobs.describe_tables` writes both. The print says what a stored file depends on (names, types, keys), so a
change of it in a diff is a change of the lake; the page also says what each column means.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from schemas.table import Column, Table
from schemas.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tables.md"
PRINT = ROOT / "tests" / "contracts" / "tables.txt"
INTRODUCTION = """\
# Tables

Written by `make docs` from `schemas/`: change it there. Every table is append-only and has a key. A column marked
*provenance* says how a row came to be rather than what it says, and is left out of the table's content hash. A *ledger*
records executions and has no content hash.
"""


def tables_as_markdown(tables: Sequence[Table]) -> str:
    """Tables -> the docs page: one section each, one row per column with its meaning and unit."""
    return INTRODUCTION + "".join("\n" + "\n".join(_section(table)) + "\n" for table in tables)


def tables_as_print(tables: Sequence[Table]) -> str:
    """Tables -> the frozen print: names, types, keys, what may be null. Meanings are left out: they may be reworded."""
    return "\n".join(line for table in tables for line in _print(table)) + "\n"


def _section(table: Table) -> Iterator[str]:
    ledger = " A ledger." if table.ledger else ""
    yield f"## {table.name}\n\n{table.doc}{ledger} Key: {', '.join(f'`{name}`' for name in table.key)}.\n"
    yield "| column | type | null | meaning |\n|---|---|---|---|"
    for column in table.columns:
        provenance = " *(provenance)*" if column.provenance else ""
        doc = column.doc.replace("|", "\\|")
        yield f"| `{column.name}` | {_type(column)} | {'yes' if column.nullable else ''} | {doc}{provenance} |"


def _print(table: Table) -> Iterator[str]:
    yield f"{table.name} ({', '.join(table.key)}){' ledger' if table.ledger else ''}"
    for column in table.columns:
        marks = [
            _type(column),
            "nullable" if column.nullable else "required",
            "provenance" if column.provenance else "",
        ]
        yield f"  {column.name}: {' '.join(mark for mark in marks if mark)}"


def _type(column: Column) -> str:
    return str(column.type).replace(" not null", "")


def main() -> None:
    """Write the page and the print."""
    PAGE.write_text(tables_as_markdown(TABLES), encoding="utf-8")
    PRINT.write_text(tables_as_print(TABLES), encoding="utf-8")


if __name__ == "__main__":
    main()
