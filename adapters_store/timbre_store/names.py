"""Names and references, as clients write them.

    name        [A-Za-z0-9][A-Za-z0-9._-]{0,95}
    reference   name | name@<version> | name@sha256:<hex>

A name is an adapter's or an alias's; which one it is only the catalogue knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from timbre_store.digests import is_digest
from timbre_store.errors import InvalidName, NotFound

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def check_name(name: str) -> str:
    """The name itself. Raises: InvalidName."""
    if _NAME.fullmatch(name) is None:
        raise InvalidName(
            f"{name[:120]!r} is not a name; expected 1 to 96 of letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class Reference:
    """What a client asked for. At most one of ``version`` and ``digest`` is set; neither means the latest."""

    name: str
    version: int | None = None
    digest: str | None = None

    @staticmethod
    def parse(text: str) -> Reference:
        """Raises: NotFound, because text that is no reference cannot refer to anything."""
        name, at, pin = text.partition("@")
        if _NAME.fullmatch(name) is None:
            raise NotFound(f"no adapter {text[:200]!r}: expected name, name@version or name@sha256:…")
        if not at:
            return Reference(name)
        if is_digest(pin):
            return Reference(name, digest=pin)
        if _VERSION.fullmatch(pin) is None:
            raise NotFound(
                f"no adapter {text[:200]!r}: after '@' expected a version number or sha256:<64 hex>"
            )
        return Reference(name, version=int(pin))

    def __str__(self) -> str:
        pin = self.version if self.version is not None else self.digest
        return self.name if pin is None else f"{self.name}@{pin}"
