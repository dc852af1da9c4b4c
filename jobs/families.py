"""Score families that users added: the tables of a lake that Outback does not know by itself, found by what is stored."""

from schemas.catalog import Lake
from schemas.scores import OWN_COMMON, PREFIX, own_family
from schemas.table import Table
from schemas.tables import TABLES

_KNOWN = frozenset(table.name for table in TABLES)


def is_own(table: Table) -> bool:
    """Whether a user added it."""
    return table.name not in _KNOWN


def own_families(lake: Lake) -> list[Table]:
    """The families that users added to the lake, by name."""
    names = [name for name in lake.table_names() if name.startswith(PREFIX) and name not in _KNOWN]
    families = []
    for name in names:
        doc, columns = lake.stored_docs(name)
        scores = {column: meaning for column, meaning in columns.items() if column not in OWN_COMMON}
        families.append(own_family(name.removeprefix(PREFIX), doc, scores))
    return families


def all_tables(lake: Lake) -> tuple[Table, ...]:
    """Every table of the lake, made or not, in the order of the road, and then those that users added."""
    return (*TABLES, *own_families(lake))
