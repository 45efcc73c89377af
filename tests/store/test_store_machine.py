"""Any sequence of uploads, aliases, deletions, collections and restarts, against a model of a few lines."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from timbre_store.errors import InvalidAdapter, NameConflict, NotFound
from timbre_store.reader import open_adapter
from timbre_store.store import Store

NAMES = st.sampled_from(["a", "b", "c"])
SEEDS = st.integers(0, 3)
PINS = st.none() | st.integers(1, 4)


class StoreMachine(RuleBasedStateMachine):
    """The model: versions as name -> {version: seed}, the last version of each name, aliases as written."""

    def __init__(self, root: Path, samples: ModuleType) -> None:
        super().__init__()
        self.root = root
        self.samples = samples
        self.store: Store = samples.open_store(root)
        self.versions: dict[str, dict[int, int]] = {}
        self.last_version: dict[str, int] = {}
        self.aliases: dict[str, tuple[str, int | None]] = {}
        self.digests: dict[int, str] = {}

    def meant(self, name: str, pin: int | None) -> tuple[str, int] | None:
        """What a reference means in the model."""
        if name in self.aliases and pin is None:
            return self.meant(*self.aliases[name])
        own = self.versions.get(name, {})
        version = pin if pin is not None else max(own, default=0)
        return (name, version) if version in own else None

    @rule(name=NAMES, seed=SEEDS)
    def upload(self, name: str, seed: int) -> None:
        if name in self.aliases:
            with pytest.raises(NameConflict):
                self.samples.upload(self.store, name, seed)
            return
        own = self.versions.setdefault(name, {})
        if not own or own[max(own)] != seed:
            self.last_version[name] = self.last_version.get(name, 0) + 1
            own[self.last_version[name]] = seed
        record = self.samples.upload(self.store, name, seed)
        assert (record.name, record.version) == (name, max(own))
        assert self.digests.setdefault(seed, record.digest) == record.digest

    @rule(name=NAMES)
    def upload_something_bad(self, name: str) -> None:
        with pytest.raises((InvalidAdapter, NameConflict)):
            self.samples.upload_files(self.store, name, b'{"refuse": "no"}', self.samples.adapter(9)[1])

    @rule(alias=NAMES, name=NAMES, pin=PINS)
    def set_alias(self, alias: str, name: str, pin: int | None) -> None:
        target = name if pin is None else f"{name}@{pin}"
        if self.versions.get(alias) or name in self.aliases:
            with pytest.raises(NameConflict):
                self.store.set_alias(alias, target)
        elif self.meant(name, pin) is None:
            with pytest.raises(NotFound):
                self.store.set_alias(alias, target)
        else:
            record = self.store.set_alias(alias, target)
            assert (record.name, record.version) == self.meant(name, pin)
            self.aliases[alias] = (name, pin)

    @rule(name=NAMES, pin=PINS)
    def delete(self, name: str, pin: int | None) -> None:
        reference = name if pin is None else f"{name}@{pin}"
        if name in self.aliases and pin is None:
            assert self.store.delete(reference) == ()
            del self.aliases[name]
            return
        if self.meant(name, pin) is None:
            with pytest.raises(NotFound):
                self.store.delete(reference)
            return
        own = self.versions[name]
        left = {} if pin is None else {version: seed for version, seed in own.items() if version != pin}
        pointers = [version for target, version in self.aliases.values() if target == name]
        if any(version not in left if version is not None else not left for version in pointers):
            with pytest.raises(NameConflict):
                self.store.delete(reference)
            return
        before = self.seeds_in_use()
        self.versions[name] = left
        freed = {self.digests[seed] for seed in before - self.seeds_in_use()}
        assert set(self.store.delete(reference)) == freed

    @rule()
    def collect_garbage(self) -> None:
        self.store.collect_garbage(min_age_s=-1)
        in_use = self.seeds_in_use()
        contents = {self.samples.adapter(seed)[part] for seed in in_use for part in (0, 1)}
        assert len(self.samples.files_of(self.root)) == len(in_use) + len(contents)
        assert self.store.check_integrity() == ()

    @precondition(lambda self: any(self.versions.values()))
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.samples.open_store(self.root)

    @invariant()
    def every_reference_means_what_the_model_says(self) -> None:
        for name in ("a", "b", "c"):
            for pin in (None, 1, 2, 3, 4):
                reference = name if pin is None else f"{name}@{pin}"
                expected = self.meant(name, pin)
                if expected is None:
                    with pytest.raises(NotFound):
                        self.store.resolve(reference)
                    continue
                record = self.store.resolve(reference)
                assert (record.name, record.version) == expected
                assert record.digest == self.digests[self.versions[record.name][record.version]]

    @invariant()
    def listings_and_files_agree(self) -> None:
        latest = [(name, max(own)) for name, own in sorted(self.versions.items()) if own]
        assert [(record.name, record.version) for record in self.store.list(limit=9).items] == latest
        assert {(a.alias, a.name, a.version) for a in self.store.aliases()} == {
            (alias, name, pin) for alias, (name, pin) in self.aliases.items()
        }
        for seed in self.seeds_in_use():
            open_adapter(self.root, self.digests[seed])

    def seeds_in_use(self) -> set[int]:
        return {seed for own in self.versions.values() for seed in own.values()}

    def teardown(self) -> None:
        assert self.store.check_integrity() == ()
        self.store.close()


def test_any_sequence_of_changes_leaves_what_the_model_says(
    tmp_path_factory: pytest.TempPathFactory, samples: ModuleType
) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: StoreMachine(tmp_path_factory.mktemp("machine"), samples),
        settings=settings(
            max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
