"""Kinds of adapter that are known and not served, and what to say to those who bring one.

Looked at only where no method claims a config: a method that reads a kind wins over its entry here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from timbre_methods.config import shown

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "BONE": "PEFT replaced it by MISS; turn it into one with PEFT's scripts/convert-bone-to-miss.py",
        "INTLORA": (
            "its update is rounded together with every weight of its own quantised base, so that nothing is "
            "left to add to this one; merge it into its base and serve that as a model"
        ),
        "SHADOW": (
            "it runs a second network with a key-value cache of its own beside the base, and this server has "
            "one cache; train a LoRA"
        ),
        "SKETCHTUNE": (
            "it is a codebook for the codes of a sketched base, which everyone on the server would have to "
            "use; serve the sketched base as a model of its own"
        ),
    }
)
"""By ``peft_type``: why it is not served, and what to do."""

NUM_NEAREST = 5


def unknown_kind(peft_type: str, names: Iterable[str]) -> str:
    """What to say of a config that no method claims; ``names`` are the methods there are."""
    if peft_type in REFUSED:
        return f"peft_type {shown(peft_type)} is known here and not served: {REFUSED[peft_type]}"
    return f"no method here reads peft_type {shown(peft_type)} with its options; {nearest(peft_type, names)}"


def nearest(peft_type: str, names: Iterable[str]) -> str:
    """The methods whose names come nearest to it, best first; of a hostile text only the beginning counts."""
    known = list(names)
    close = get_close_matches(peft_type[:40].lower(), known, NUM_NEAREST, cutoff=0.0)
    return f"the nearest of {len(known)} methods are {', '.join(close)}"
