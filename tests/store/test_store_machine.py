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

from timbre_store.errors import AdapterInUse, InvalidAdapter, NameConflict, NotFound
from timbre_store.reader import open_adapter
from timbre_store.recipe import Parent, Recipe
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

NAMES = st.sampled_from(["a", "b", "c"])
SEEDS = st.integers(0, 3)
Content = int | tuple[int, ...]
PINS = st.none() | st.integers(1, 4)


class StoreMachine(RuleBasedStateMachine):
    """The model: versions as name -> {version: content}, the last version of each name, aliases as written.

    The content is an upload's seed, or the seeds that a mix is made of.
    """

    def __init__(self, root: Path, samples: ModuleType) -> None:
        super().__init__()
        self.root = root
        self.samples = samples
        self.store: Store = samples.open_store(root)
        self.versions: dict[str, dict[int, Content]] = {}
        self.last_version: dict[str, int] = {}
        self.aliases: dict[str, tuple[str, int | None]] = {}
        self.digests: dict[Content, str] = {}

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
        self.count(name, seed, self.samples.upload(self.store, name, seed))

    def count(self, name: str, content: Content, record: AdapterRecord) -> None:
        """Adds a version to the model, which the store's answer must be."""
        own = self.versions.setdefault(name, {})
        if not own or own[max(own)] != content:
            self.last_version[name] = self.last_version.get(name, 0) + 1
            own[self.last_version[name]] = content
        assert (record.name, record.version) == (name, max(own))
        assert self.digests.setdefault(content, record.digest) == record.digest

    @rule(name=NAMES, seeds=st.lists(SEEDS, min_size=1, max_size=2, unique=True))
    def mix(self, name: str, seeds: list[int]) -> None:
        if any(seed not in self.digests for seed in seeds):
            return
        recipe = Recipe("linear", tuple(Parent(self.digests[seed], 0.5) for seed in seeds))
        if name in self.aliases:
            with pytest.raises(NameConflict):
                self.store.register_mix(name, recipe, self.samples.BASE)
        elif not self.contents_in_use() >= set(seeds):
            with pytest.raises(NotFound):
                self.store.register_mix(name, recipe, self.samples.BASE)
        else:
            self.count(name, tuple(seeds), self.store.register_mix(name, recipe, self.samples.BASE))

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
        left = {} if pin is None else {number: content for number, content in own.items() if number != pin}
        pointers = [version for target, version in self.aliases.values() if target == name]
        if any(version not in left if version is not None else not left for version in pointers):
            with pytest.raises(NameConflict):
                self.store.delete(reference)
            return
        before = self.contents_in_use()
        self.versions[name] = left
        after = self.contents_in_use()
        if not after >= {seed for mix in after if isinstance(mix, tuple) for seed in mix}:
            self.versions[name] = own
            with pytest.raises(AdapterInUse, match="the mix"):
                self.store.delete(reference)
            return
        assert set(self.store.delete(reference)) == {self.digests[content] for content in before - after}

    @rule()
    def collect_garbage(self) -> None:
        self.store.collect_garbage(min_age_s=-1)
        in_use = self.contents_in_use()
        mixes = {content for content in in_use if isinstance(content, tuple)}
        files = {self.samples.adapter(seed)[part] for seed in in_use - mixes for part in (0, 1)}
        of_mixes = len(mixes) + bool(mixes)  # A config each, and one file without tensors for all.
        assert len(self.samples.files_of(self.root)) == len(in_use) + len(files) + of_mixes
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
                content = self.versions[record.name][record.version]
                parts = [self.digests[seed] for seed in content] if isinstance(content, tuple) else []
                assert [part.adapter.digest for part in record.parts] == parts
                assert (record.name, record.version) == expected
                assert record.digest == self.digests[content]

    @invariant()
    def listings_and_files_agree(self) -> None:
        latest = [(name, max(own)) for name, own in sorted(self.versions.items()) if own]
        assert [(record.name, record.version) for record in self.store.list(limit=9).items] == latest
        assert {(a.alias, a.name, a.version) for a in self.store.aliases()} == {
            (alias, name, pin) for alias, (name, pin) in self.aliases.items()
        }
        meant = sorted((alias, *(self.meant(alias, None) or ())) for alias in self.aliases)
        named = [(each.name, each.record.name, each.record.version) for each in self.store.names(18).items]
        assert named == sorted([*((name, name, last) for name, last in latest), *meant])
        for content in self.contents_in_use():
            open_adapter(self.root, self.digests[content])

    def contents_in_use(self) -> set[Content]:
        return {content for own in self.versions.values() for content in own.values()}

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
