from __future__ import annotations

import pytest

from timbre_store.errors import InvalidName, NotFound
from timbre_store.names import Reference, check_name

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize("name", ["a", "Pirate", "7b", "a.b-c_d", "x" * 96, "a..b", "sha256"])
def test_a_name_of_letters_digits_and_marks_is_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-a", "_a", ".a", "a/b", "a b", "a@1", "a\n", "a\0", "é", "x" * 97, "../a", "a%2f"],
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName, match="expected 1 to 96"):
        check_name(name)


def test_a_reference_says_latest_version_or_digest() -> None:
    assert Reference.parse("a") == Reference("a", None, None)
    assert Reference.parse("a@3") == Reference("a", 3, None)
    assert Reference.parse(f"a@{DIGEST}") == Reference("a", None, DIGEST)


@pytest.mark.parametrize("text", ["a", "a@3", f"a@{DIGEST}"])
def test_a_reference_is_written_as_it_was_read(text: str) -> None:
    assert str(Reference.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "@1",
        "a@",
        "a@0",
        "a@-1",
        "a@01",
        "a@1.0",
        "a@x",
        "a@1@1",
        f"a@{DIGEST.upper()}",
        f"a@{DIGEST}0",
        "a@sha256:",
        "a@\N{FULLWIDTH DIGIT ONE}",
        "a@" + "9" * 19,
        "a/../b",
        "a\n",
        "x" * 5000,
    ],
)
def test_text_that_is_no_reference_finds_nothing(text: str) -> None:
    with pytest.raises(NotFound) as refusal:
        Reference.parse(text)
    assert len(str(refusal.value)) < 400
