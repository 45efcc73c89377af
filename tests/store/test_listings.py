"""Pages of adapters, and of all the names that lead to one."""

from __future__ import annotations

from types import ModuleType

import pytest

from timbre_store.store import Store


def test_pages_hold_each_name_s_latest_version_once(store: Store, samples: ModuleType) -> None:
    for name in ("c", "a", "e", "b", "d", "a"):
        latest = samples.upload(store, name, ord(name))
    samples.upload(store, "b", 1)
    store.set_alias("alias", "a")
    first = store.list(limit=2)
    second = store.list(limit=2, after=first.next_after)
    third = store.list(limit=2, after=second.next_after)
    names = [[(record.name, record.version) for record in page.items] for page in (first, second, third)]
    assert names == [[("a", 1), ("b", 2)], [("c", 1), ("d", 1)], [("e", 1)]]
    assert (first.next_after, second.next_after, third.next_after) == ("b", "d", None)
    assert first.items[0] == latest
    assert store.list(limit=5).next_after is None
    assert store.list(limit=5, after="e").items == ()


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7])
def test_names_and_aliases_are_listed_in_one_order_with_what_they_mean(
    store: Store, samples: ModuleType, limit: int
) -> None:
    for name, seed in (("c", 1), ("a", 2), ("a", 3), ("e", 4)):
        samples.upload(store, name, seed)
    for alias, target in (("d", "a"), ("b", "a@1"), ("f", "c")):
        store.set_alias(alias, target)
    found, after = [], None
    while True:
        page = store.names(limit, after)
        assert len(page.items) <= limit
        found += [(each.name, f"{each.record.name}@{each.record.version}") for each in page.items]
        assert all(each.record.digest == store.resolve(each.name).digest for each in page.items)
        if (after := page.next_after) is None:
            break
    assert found == [("a", "a@2"), ("b", "a@1"), ("c", "c@1"), ("d", "a@2"), ("e", "e@1"), ("f", "c@1")]
