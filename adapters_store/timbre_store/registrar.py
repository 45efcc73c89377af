"""From stored blobs, or from other adapters, to versions of names: checks first, then files, then rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from timbre_store.catalogue import Catalogue
from timbre_store.content import ContentFolder
from timbre_store.digests import verify_file
from timbre_store.durable import full_disk_as_store_full
from timbre_store.errors import DigestMismatch
from timbre_store.examine import UploadedFiles, examine
from timbre_store.failpoints import Reach
from timbre_store.inspection import Inspect
from timbre_store.limits import StoreLimits
from timbre_store.manifest import Manifest
from timbre_store.mix import NO_TENSORS, mix_config, mix_manifest
from timbre_store.names import check_name
from timbre_store.recipe import Recipe
from timbre_store.records import AdapterRecord
from timbre_store.upload import Arrival, Upload

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Registrar:
    """The part of a `Store` that makes adapters; the store says what each method promises."""

    blobs: ContentFolder
    manifests: ContentFolder
    catalogue: Catalogue
    tmp: Path
    inspect: Inspect
    derivations: Mapping[str, int]
    limits: StoreLimits
    clock: Callable[[], float]
    reach: Reach

    def register(self, arrivals: Sequence[Arrival], base_model: str | None) -> tuple[AdapterRecord, ...]:
        self.check_names([arrival.name for arrival in arrivals])
        files = {digest for each in arrivals for digest in (each.config_digest, each.tensors_digest)}
        with self.blobs.holding(*files), Upload(self.blobs, self.limits.max_blob_bytes) as upload:
            contents = {replace(arrival, name=""): arrival for arrival in arrivals}
            examined = {key: self._examined(each, base_model, upload) for key, each in contents.items()}
            manifests = [examined[replace(arrival, name="")] for arrival in arrivals]
            self.reach("register.examined")
            names = (arrival.name for arrival in arrivals)
            return self._record(tuple(zip(names, manifests, strict=True)))

    def register_mix(self, name: str, recipe: Recipe, base_model: str | None) -> AdapterRecord:
        self.check_names((name,))
        with Upload(self.blobs, self.limits.max_blob_bytes) as upload:
            for content in (mix_config(recipe), NO_TENSORS):
                with upload.begin_blob() as writer:
                    writer.write(content)
                    writer.commit()
            paths = [self.manifests.require(parent.digest) for parent in recipe.parents]
            parents = [Manifest.from_bytes(path.read_bytes()) for path in paths]
            return self._record([(name, mix_manifest(recipe, parents, base_model))])[0]

    def check_names(self, names: Collection[str]) -> None:
        """Raises: InvalidName; NameConflict for an alias."""
        for name in names:
            check_name(name)
        self.catalogue.check_names_are_free_for_adapters(names)

    def _examined(self, arrival: Arrival, base_model: str | None, upload: Upload) -> Manifest:
        """The manifest of two blobs that are held; what is derived for them is the upload's."""
        with self._scratch_file() as scratch:
            files = UploadedFiles(
                arrival.config_digest,
                self.blobs.require(arrival.config_digest),
                arrival.tensors_digest,
                self.blobs.require(arrival.tensors_digest),
                scratch,
            )
            self._offer_known(files, base_model)
            manifest = examine(files, base_model, self.inspect, self.limits)
            if files.derived_path.exists():
                digest = _taken_in(files.derived_path, upload)
                count = self.derivations.get(manifest.method, 1)
                manifest = replace(manifest, derived_digest=digest, derivation=count)
            return replace(manifest, recipe=arrival.recipe)

    @contextmanager
    def _scratch_file(self) -> Iterator[Path]:
        """A path in ``tmp`` where nothing is; what is there in the end is removed."""
        path = self.tmp / f"derived-{uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _offer_known(self, files: UploadedFiles, base_model: str | None) -> None:
        """Lay down what was derived for the same files on the same base before: it is not computed again.

        Not if the disk has damaged it meanwhile: the damage would be an adapter of its own."""
        known = self.catalogue.derived_digest_of(
            files.config_digest, files.tensors_digest, base_model, self.derivations
        )
        if known is None:
            return
        try:
            with full_disk_as_store_full():
                files.derived_path.hardlink_to(self.blobs.path(known))
            verify_file(files.derived_path, known)
        except FileNotFoundError:
            return
        except DigestMismatch:
            files.derived_path.unlink()

    def _record(self, arrivals: Sequence[tuple[str, Manifest]]) -> tuple[AdapterRecord, ...]:
        """The manifests' files first, then the rows: a row never refers to a file that is not durable."""
        contents = {manifest.to_bytes() for _, manifest in arrivals}
        with Upload(self.manifests, max(map(len, contents))) as upload:
            for content in contents:
                with upload.begin_blob() as writer:
                    writer.write(content)
                    writer.commit()
            return self.catalogue.add_versions(arrivals, self.clock())


def _taken_in(path: Path, upload: Upload) -> str:
    """The digest of a file that is now a blob of the upload. Raises: BlobTooLarge, StoreFull."""
    with path.open("rb") as file, upload.begin_blob() as writer:
        while piece := file.read(PIECE_BYTES):
            writer.write(piece)
        return writer.commit()
