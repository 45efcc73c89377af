"""From tokens to text, one token at a time: whole characters only, and nothing of a stop string shown early.

Knows a decode function and nothing else of the tokenizer. The text is a function of the tokens alone; how
they were divided into events does not matter, so a stream and a single answer say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first new token is decoded with: many vocabularies drop a leading space."""
MAX_WINDOW_TOKENS = 64
"""Tokens decoded together while no whole character comes; only garbage gets there."""


class Detokenizer:
    """Decodes a growing list of tokens through a short window, never giving out half a character."""

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._num_new = 0
        self._known = decode(self._window).rstrip(REPLACEMENT) if self._window else ""
        """The part of the window's text that was given out, or belongs to the prompt."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token and was not before."""
        self._window.append(token_id)
        self._num_new += 1
        text = self._decode(self._window)
        if len(self._window) > MAX_WINDOW_TOKENS:
            return self._start_over(text)
        whole = text.rstrip(REPLACEMENT)
        if not whole.startswith(self._known):
            return ""
        fresh = whole[len(self._known) :]
        self._known = whole
        if whole == text and text:
            self._shorten()
        return fresh

    def finish(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        return self._start_over(self._decode(self._window)) if self._window else ""

    def _shorten(self) -> None:
        """Keeps only the tokens since the last time that the text ended in a whole character."""
        recent = self._window[-self._num_new :]
        known = self._decode(recent)
        if known:
            self._window, self._known, self._num_new = recent, known, 0

    def _start_over(self, text: str) -> str:
        if text.startswith(self._known):
            fresh = text[len(self._known) :]
        else:  # a run of byte tokens that one broken byte at its end has turned into U+FFFD altogether
            fresh = self._decode(self._window[-self._num_new :])
        self._window, self._known, self._num_new = [], "", 0
        return fresh


class StopMatcher:
    """Finds the stop string that is complete first, and holds back what may be the beginning of one.

    Among stop strings complete at the same character the longest counts. One automaton a string
    (Knuth, Morris and Pratt), so the work does not depend on how the text is divided.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include_in_output
        self._borders = [_borders(text) for text in self._stop]
        self._matched = [0] * len(self._stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string that ended it)."""
        if not self._stop:
            return text, None
        start = len(self._held)
        buffer = self._held + text
        for index in range(start, len(buffer)):
            complete = self._advance(buffer[index])
            if complete is not None:
                end = index + 1 if self._include else index + 1 - len(complete)
                return buffer[:end], complete
        cut = len(buffer) - max(self._matched)
        self._held = buffer[cut:]
        return buffer[:cut], None

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stop)
        return held

    def _advance(self, char: str) -> str | None:
        longest: str | None = None
        for which, text in enumerate(self._stop):
            length = self._matched[which]
            while length and text[length] != char:
                length = self._borders[which][length - 1]
            length += text[length] == char
            if length == len(text):
                if longest is None or length > len(longest):
                    longest = text
                length = self._borders[which][length - 1]
            self._matched[which] = length
        return longest


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[length] != text[index]:
            length = borders[length - 1]
        length += text[length] == text[index]
        borders[index] = length
    return borders


class TextStream:
    """Detokeniser and stop strings together: what one sequence says. ``decode`` None: it says nothing."""

    def __init__(
        self,
        decode: Decode | None,
        prompt_token_ids: Sequence[int],
        matcher: StopMatcher,
        *,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt_token_ids) if decode is not None else None
        self._matcher = matcher
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.stop: str | None = None
        """The stop string that ended the text; nothing may be pushed after it."""

    def push(self, token_id: int) -> str:
        """Text that may be shown now. The first ``min_tokens`` tokens' text is not searched for stops."""
        if self._detokenizer is None:
            return ""
        self._num_tokens += 1
        fresh = self._detokenizer.push(token_id)
        if self._num_tokens <= self._min_tokens:
            return fresh
        shown, self.stop = self._matcher.push(fresh)
        return shown

    def finish(self) -> str:
        """The rest, when the tokens have ended for another reason than a stop string."""
        if self._detokenizer is None or self.stop is not None:
            return ""
        shown, self.stop = self._matcher.push(self._detokenizer.finish())
        return shown if self.stop is not None else shown + self._matcher.flush()
