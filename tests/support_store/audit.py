"""What must be true of a store at any moment (invariant 13)."""

from __future__ import annotations

from stillframe.still.container import Container
from stillframe.store.backends.objects import Backend
from stillframe.store.catalog import Catalog, read_catalog
from stillframe.store.records import data_key, entry_of
from stillframe.store.wholes import open_form


def audit(backend: Backend) -> Catalog:
    """Every entry's data is there, whole, and what the entry says; so is its whole form, if one
    counts; else every parent is in the catalog.

    Returns:
        The catalog.
    """
    catalog = read_catalog(backend)
    assert not catalog.damaged
    for entry in catalog.entries.values():
        with Container(backend.open(data_key(entry.name))) as file:
            assert entry_of(file, entry.name) == entry
            for number in range(file.index.frame_count):
                file.read_stored(number)
        assert catalog.chain(entry)
        with open_form(backend, entry.name) as file:
            assert file.stands_in == (catalog.is_whole(entry) and entry.parent is not None)
            assert file.id == entry.id
            for number in range(file.index.frame_count) if file.stands_in else ():
                file.read_stored(number)
    return catalog
