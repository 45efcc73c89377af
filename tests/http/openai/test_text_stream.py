"""Tokens to text: whole characters, stop strings, and no dependence on how the text was divided."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from timbre_server.http.text import TextCodec
from timbre_server.http.text_stream import MAX_WINDOW_TOKENS, Detokenizer, StopMatcher, TextStream

TEXTS = st.text(st.sampled_from("aéb😀 \n中\u0301👩‍🚀") | st.characters(codec="utf-8"), max_size=40)


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """One token a byte."""
    from timbre_server.http.text import _byte_level_alphabet

    char_of = {byte: char for char, byte in _byte_level_alphabet().items()}
    return [tokenizer.token_to_id(char_of[byte]) for byte in raw]


def oracle(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(text=TEXTS)
def test_one_token_a_byte_gives_the_text_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(token) for token in byte_ids(tokenizer, text.encode())]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@given(text=TEXTS, prompt=TEXTS)
def test_the_prompt_is_no_part_of_the_text(codec: TextCodec, text: str, prompt: str) -> None:
    def decode(token_ids: list[int]) -> str:
        return codec.decode(token_ids, skip_special_tokens=True)

    context = codec.encode(prompt, add_special_tokens=False)
    detokenizer = Detokenizer(decode, context)
    ids = codec.encode(text, add_special_tokens=False)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text


@given(raw=st.binary(max_size=200))
def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer, raw: bytes) -> None:
    ids = byte_ids(tokenizer, raw)
    detokenizer = Detokenizer(tokenizer.decode)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    if len(ids) < MAX_WINDOW_TOKENS:
        assert streamed == tokenizer.decode(ids)
    else:
        assert streamed.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models have it: words with a mark, and bytes as ``<0xF0>``."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "▁b", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@given(text=st.text("ab é😀中", max_size=30))
def test_byte_fallback_vocabularies_keep_their_spaces_and_characters(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.encode(text.replace(" ", "▁")).ids
    prompt = tokenizer.encode("a").ids
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text


def test_a_character_that_is_never_finished_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(token) for token in byte_ids(tokenizer, b"ok\xf0\x9f")]
    assert pieces == ["o", "k", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_an_emoji_appears_with_its_last_byte_and_not_before(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    assert [detokenizer.push(token) for token in byte_ids(tokenizer, "a😀b".encode())] == [
        "a", "", "", "", "😀", "b",
    ]  # fmt: skip


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    include=st.booleans(),
)
def test_stop_strings_are_found_wherever_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include_in_output=include)
    shown, found, start = "", None, 0
    for size in [*cuts, *[1] * len(text)]:
        piece = text[start : start + size]
        start += size
        fresh, found = matcher.push(piece)
        shown += fresh
        if found is not None:
            break
        assert (shown + text[start:]) == text or text.startswith(shown)
    if found is None:
        shown += matcher.flush()
    assert (shown, found) == oracle(text, stops, include=include)


def test_nothing_of_a_stop_string_is_shown_before_it_is_complete() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("fine\nUse") == ("fine", None)
    assert matcher.push("ful") == ("\nUseful", None)
    assert matcher.push("\nUser") == ("", None)
    assert matcher.push(": more") == ("", "\nUser:")


@pytest.mark.parametrize("min_tokens", [0, 2, 3])
def test_stop_strings_do_not_count_in_the_first_min_tokens(tokenizer: Tokenizer, min_tokens: int) -> None:
    stream = TextStream(tokenizer.decode, [], StopMatcher(["ab"]), min_tokens=min_tokens)
    shown = ""
    for token in byte_ids(tokenizer, b"abxab"):
        shown += stream.push(token)
        if stream.stop is not None:
            break
    assert shown == ("" if min_tokens < 2 else "abx")


def test_without_a_tokenizer_nothing_is_said() -> None:
    stream = TextStream(None, [1, 2], StopMatcher([]))
    assert stream.push(3) + stream.finish() == ""
