"""The store of adapters: blobs, manifests, names. One process writes; `reader` is for all others.

It knows neither a method nor a tensor library: what an adapter means is asked of ``inspect``, and the values
are looked at as bytes. `FORMAT.md` says what lies on disk and what a crash leaves.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from weakref import finalize

from timbre_store.catalogue import Catalogue
from timbre_store.catalogue_file import open_catalogue
from timbre_store.content import ContentFolder, Removed
from timbre_store.durable import full_disk_as_store_full, make_folder
from timbre_store.errors import StoreUnavailable
from timbre_store.failpoints import Reach, pass_by
from timbre_store.inspection import Inspect
from timbre_store.integrity import find_faults
from timbre_store.layout import FILE_MODE, FOLDER_MODE, Layout
from timbre_store.limits import StoreLimits
from timbre_store.names import Reference, check_name
from timbre_store.recipe import Recipe
from timbre_store.records import AdapterRecord, Alias, Named, Page
from timbre_store.registrar import Registrar
from timbre_store.upload import Arrival, Upload
from timbre_store.writer import BlobWriter

NONE_CHANGED: Mapping[str, int] = MappingProxyType({})


class Store:
    """Every method may be called from any thread, and is durable when it returns.

    Opening takes the folder's lock, empties ``tmp`` and makes what is missing.

    ``derivations`` has the methods that derive tensors in another way than they once did, and by which count:
    of what was derived before nothing is taken again.

    Raises: StoreUnavailable if another process has the store open, or its catalogue cannot be read;
    StoreFull.
    """

    def __init__(
        self,
        root: Path,
        *,
        inspect: Inspect,
        limits: StoreLimits,
        derivations: Mapping[str, int] = NONE_CHANGED,
        clock: Callable[[], float] = time.time,
        reach: Reach = pass_by,
    ) -> None:
        self.root = root
        self._inspect = inspect
        self._derivations = derivations
        self._limits = limits
        self._clock = clock
        self._reach = reach
        self._layout = Layout(root)
        with full_disk_as_store_full():
            root.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            self._unlock = finalize(self, os.close, _take_lock(self._layout.lock))
        try:
            with full_disk_as_store_full():
                self._open()
        except BaseException:
            self._unlock()
            raise

    def _open(self) -> None:
        self._reach("open.locked")
        make_folder(self._layout.tmp)
        for leftover in self._layout.tmp.iterdir():
            leftover.unlink()
        self._reach("open.temps_removed")
        folders = (self._layout.blobs, self._layout.manifests)
        has_content = any(True for folder in folders for _ in folder.glob("sha256/*/*"))
        engine = open_catalogue(self._layout.catalogue, may_create=not has_content, reach=self._reach)
        self._catalogue = catalogue = Catalogue(engine, self._reach)
        blobs, manifests = folders
        self._blobs = ContentFolder(blobs, self._layout.tmp, catalogue.referenced_blobs, self._reach)
        self._manifests = ContentFolder(
            manifests, self._layout.tmp, catalogue.referenced_manifests, self._reach
        )
        self._registrar = Registrar(
            blobs=self._blobs,
            manifests=self._manifests,
            catalogue=catalogue,
            tmp=self._layout.tmp,
            inspect=self._inspect,
            derivations=self._derivations,
            limits=self._limits,
            clock=self._clock,
            reach=self._reach,
        )

    def close(self) -> None:
        """Let another process open the store. Nothing may be in progress."""
        self._catalogue.close()
        self._unlock()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Bytes in

    def begin_blob(self, max_bytes: int | None = None) -> BlobWriter:
        """A writer for a blob that stays, adapter or not, until `collect_garbage`. See `begin_upload`."""
        limit = self._limits.max_blob_bytes
        return self._blobs.begin(limit if max_bytes is None else min(max_bytes, limit))

    def begin_upload(self) -> Upload:
        """For the blobs of one adapter that arrive together with it: those that no adapter takes vanish."""
        return Upload(self._blobs, self._limits.max_blob_bytes)

    def has_blob(self, digest: str) -> bool:
        return self._blobs.has(digest)

    def blob_path(self, digest: str) -> Path:
        """Read-only. Raises: NotFound."""
        return self._blobs.require(digest)

    # Names

    def register(
        self, name: str, config_digest: str, tensors_digest: str, base_model: str | None
    ) -> AdapterRecord:
        """Make an adapter of two stored blobs: check everything, then give it the name's next version.

        The latest version itself is returned if its content is the same. A refusal stores nothing.
        ``base_model`` is the digest of the base that ``inspect`` checks against.

        Raises: InvalidAdapter or a subclass; NotFound for an absent blob; NameConflict if the name is an
        alias; DigestMismatch for a damaged blob; StoreFull.
        """
        return self.register_all([Arrival(name, config_digest, tensors_digest)], base_model)[0]

    def register_all(self, arrivals: Sequence[Arrival], base_model: str | None) -> tuple[AdapterRecord, ...]:
        """As `register`, each of them; a refusal of one stores none."""
        return self._registrar.register(arrivals, base_model)

    def check_name(self, name: str) -> None:
        """Whether an adapter may be called so. Raises: InvalidName; NameConflict if it is an alias."""
        self._registrar.check_names((name,))

    def register_mix(self, name: str, recipe: Recipe, base_model: str | None) -> AdapterRecord:
        """Give the name a version that stands for the weighted sum of stored adapters, none of them a mix.

        They cannot be deleted before it. Raises: NotFound for one that is gone; NameConflict if the name is
        an alias; StoreFull.
        """
        record = self._registrar.register_mix(name, recipe, base_model)
        return self.resolve(f"{name}@{record.version}")

    def resolve(self, reference: str) -> AdapterRecord:
        """What ``name``, ``name@3``, ``name@sha256:…`` or an alias means now. Raises: NotFound."""
        return self._catalogue.resolve(Reference.parse(reference))

    def get(self, reference: str) -> AdapterRecord:
        """`resolve`, for callers that show an adapter rather than run it."""
        return self.resolve(reference)

    def versions(self, name: str) -> tuple[AdapterRecord, ...]:
        """Oldest first; empty if the name has none."""
        return self._catalogue.versions_of(name)

    def list(self, limit: int, after: str | None = None) -> Page[AdapterRecord]:
        """The latest version of each name, by name, from the first one behind ``after``."""
        return self._catalogue.page(limit, after)

    def names(self, limit: int, after: str | None = None) -> Page[Named]:
        """What each name and each alias means now, by name, from the first one behind ``after``."""
        return self._catalogue.page_of_names(limit, after)

    def aliases(self, name: str | None = None) -> tuple[Alias, ...]:
        """Of one adapter, or all; by alias."""
        return self._catalogue.aliases(name)

    def set_alias(self, alias: str, target: str) -> AdapterRecord:
        """Point an alias, new or old, at ``name`` (its latest, always) or ``name@3`` (that one). What it
        resolves to now.

        Raises: InvalidName; NotFound if the target does not resolve; NameConflict if the alias is an
        adapter's name, or the target is an alias.
        """
        return self._catalogue.set_alias(check_name(alias), Reference.parse(target))

    def delete(self, reference: str) -> tuple[str, ...]:
        """Remove ``name`` (all versions), ``name@3`` or an alias. The digests that no name leads to any more.

        Their files stay until `collect_garbage`, for requests that were admitted before.

        Raises: NotFound; AdapterInUse if an alias would be left pointing at nothing.
        """
        freed = self._catalogue.delete(Reference.parse(reference))
        for manifest in freed:
            self._manifests.touch(manifest.digest)
            self._blobs.touch(manifest.config_digest)
            self._blobs.touch(manifest.tensors_digest)
            if manifest.derived_digest is not None:
                self._blobs.touch(manifest.derived_digest)
        return tuple(manifest.digest for manifest in freed)

    # Upkeep

    def collect_garbage(self, min_age_s: float) -> Removed:
        """Remove files that no adapter refers to and that came, or were let go, at least so long ago."""
        now_s = self._clock()
        return self._manifests.collect(min_age_s, now_s) + self._blobs.collect(min_age_s, now_s)

    def check_integrity(self) -> tuple[str, ...]:
        """Every fault found, in words; empty when all is well. Hashes every file: slow on a large store."""
        return find_faults(self._catalogue, self._layout)


def _take_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreUnavailable(
            "the store is open in another process; stop it, or choose another folder"
        ) from None
    return descriptor
