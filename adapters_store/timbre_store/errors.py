"""Everything that the store can refuse or fail with.

StoreError
├── InvalidAdapter          the upload is at fault
│   ├── InvalidName         not a legal adapter or alias name
│   ├── UnsafeFile          a config, header or value that the format checks refuse
│   ├── UnsupportedMethod   for `Inspect`: no method reads it
│   └── UnexpectedTensor    for `Inspect`: tensors or sites do not fit the base
├── NotFound                no such name, version, alias, digest or blob
├── NameConflict            a name would be adapter and alias at once
│   └── AdapterInUse        an alias or a mix would be left pointing at nothing
├── DigestMismatch          bytes are not what their digest says
├── BlobTooLarge            more bytes than the limit, noticed while they arrive
├── StoreFull               the disk has no room, or fails to write
└── StoreUnavailable        the folder cannot be opened as a store

The messages say what was found, what was expected and what to do. They hold no paths: clients may see them.
"""

from __future__ import annotations


class StoreError(Exception):
    pass


class InvalidAdapter(StoreError):
    pass


class InvalidName(InvalidAdapter):
    pass


class UnsafeFile(InvalidAdapter):
    pass


class UnsupportedMethod(InvalidAdapter):
    pass


class UnexpectedTensor(InvalidAdapter):
    pass


class NotFound(StoreError):
    pass


class NameConflict(StoreError):
    pass


class AdapterInUse(NameConflict):
    pass


class DigestMismatch(StoreError):
    pass


class BlobTooLarge(StoreError):
    pass


class StoreFull(StoreError):
    pass


class StoreUnavailable(StoreError):
    pass
