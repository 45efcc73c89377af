from __future__ import annotations

import pytest

from timbre_methods import registry
from timbre_methods.errors import UnsupportedMethod
from timbre_methods.refusals import REFUSED, unknown_kind
from timbre_methods.registry import method_for, methods


@pytest.mark.parametrize("peft_type", sorted(REFUSED))
def test_a_known_kind_is_refused_with_the_reason_and_what_to_do(peft_type: str) -> None:
    message = unknown_kind(peft_type, methods())
    assert message.startswith(f"peft_type '{peft_type}' is known here and not served: ")
    assert "; " in REFUSED[peft_type], "what to do follows the reason"
    assert len(message) < 300


def test_the_registry_says_why() -> None:
    for peft_type, reason in (("INTLORA", "rounded"), ("SKETCHTUNE", "codebook"), ("SHADOW", "one cache")):
        with pytest.raises(
            UnsupportedMethod, match=f"'{peft_type}' is known here and not served: .*{reason}"
        ):
            method_for({"peft_type": peft_type, "r": 8})


def test_a_method_that_claims_a_kind_wins_over_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shadow(type(methods()["lora"])):  # type: ignore[misc]
        def claims(self, raw_config: object) -> bool:
            return raw_config == {"peft_type": "SHADOW"}

    served = Shadow()
    monkeypatch.setattr(registry, "_readers", lambda: {"shadow": served})
    assert method_for({"peft_type": "SHADOW"}) is served


def test_an_unknown_kind_is_told_the_nearest_methods() -> None:
    message = unknown_kind("LORAA", ["fourierft", "ia3", "lora", "shira", "spectral", "vera"])
    assert message.startswith(
        "no method here reads peft_type 'LORAA' with its options; the nearest of 6 methods are lora"
    )
    assert len(unknown_kind("Z" * 10_000, methods())) < 400
