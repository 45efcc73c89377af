"""Which module paths a PEFT pattern key means, matched in bounded time.

The keys of ``alpha_pattern`` come from a file and are regular expressions: PEFT asks for each module
path whether ``(.*\\.)?(KEY)$`` matches, and takes the first key in the file's order that does. Python's
`re` can be made to run for ages by such a key, so it never sees one. This module reads a subset of the
language, and follows all possible readings at once: the work grows with the length of key times path.

Read: letters, digits, ``_``, ``-``, ``.`` (any character), escapes (``\\.``, ``\\d``, ``\\w``), classes
(``[0-9a]``), groups, ``|``, ``^``, ``$``, and ``*``, ``+``, ``?`` (also lazy) on what has no ``*`` or ``+``
inside. Everything else is refused by name, never read differently from PEFT. It knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from timbre_methods.errors import InvalidConfig

MAX_KEYS = 4096
MAX_KEY_LENGTH = 256
MAX_EXPRESSION_LENGTH = 512
"""Of all keys together that are more than a name; names with dots are matched in another way."""
MAX_LOOPS = 16
"""Signs ``*`` and ``+`` in all keys together."""
MAX_DEPTH = 8

_NAME = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)
_LITERALS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_ESCAPED_LITERALS = frozenset(".-_[](){}*+?|^$\\/")

Ends = frozenset[int]
Node = Callable[[str, Ends], Ends]
"""From a text and the positions where a piece may begin to the positions where it may end."""
Accepts = Callable[[str], bool]


class PathPatterns:
    """PEFT's pattern keys with their values, in the file's order.

    Raises `InvalidConfig` for a key outside the subset above or too many of them, naming ``option``.
    """

    def __init__(self, option: str, values: Mapping[str, float]) -> None:
        if len(values) > MAX_KEYS:
            raise InvalidConfig(f"{option}: found {len(values)} keys, expected at most {MAX_KEYS}")
        expressions = [key for key in values if not _NAME.fullmatch(key)]
        loops = sum(key.count("*") + key.count("+") for key in expressions)
        if sum(map(len, expressions)) > MAX_EXPRESSION_LENGTH or loops > MAX_LOOPS:
            raise InvalidConfig(
                f"{option}: the keys that are more than module names may have {MAX_EXPRESSION_LENGTH} "
                f"characters and {MAX_LOOPS} signs * and + together; write the module names out"
            )
        self._entries = [(_whole_path_test(option, key), value) for key, value in values.items()]

    def first(self, path: str) -> float | None:
        """The value of the first key that matches the module path, or None."""
        return next((value for matches, value in self._entries if matches(path)), None)


def full_match(option: str, expression: str) -> Accepts:
    """Whether an expression of the same subset matches a whole path, as `re.fullmatch` does.

    Raises `InvalidConfig` for an expression outside the subset or too long, naming ``option``.
    """
    loops = expression.count("*") + expression.count("+")
    if len(expression) > MAX_EXPRESSION_LENGTH or loops > MAX_LOOPS:
        raise InvalidConfig(
            f"{option}: an expression may have {MAX_EXPRESSION_LENGTH} characters and {MAX_LOOPS} signs "
            "* and +; write the module names out"
        )
    node = _Reader(option, expression).read()
    return lambda path: len(path) in node(path, frozenset([0]))


def _whole_path_test(option: str, key: str) -> Accepts:
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidConfig(
            f"{option}: a key has {len(key)} characters, expected at most {MAX_KEY_LENGTH}: {key[:40]!r}..."
        )
    if _NAME.fullmatch(key):
        return lambda path: _name_matches(key, path)
    node = _Reader(option, key).read()

    def matches(path: str) -> bool:
        starts = frozenset([0, *(i + 1 for i, character in enumerate(path) if character == ".")])
        return len(path) in node(path, starts)

    return matches


def _name_matches(name: str, path: str) -> bool:
    start = len(path) - len(name)
    if start < 0 or (start > 0 and path[start - 1] != "."):
        return False
    tail = path[start:]
    return tail == name or all(k in (c, ".") for k, c in zip(name, tail, strict=True))


class _Reader:
    """A recursive descent over one key: alternatives, sequences, pieces with their repetition."""

    def __init__(self, option: str, key: str) -> None:
        self._option = option
        self._key = key
        self._at = 0

    def read(self) -> Node:
        node, _ = self._alternatives(depth=0)
        if self._at < len(self._key):
            raise self._refusal("a ')' without its '('")
        return node

    def _refusal(self, what: str) -> InvalidConfig:
        return InvalidConfig(
            f"{self._option}: cannot read the key {self._key!r}: {what}; "
            "write the module names out, or use only . \\. [] () | ^ $ * + ?"
        )

    def _peek(self) -> str:
        return self._key[self._at : self._at + 1]

    def _take(self, what: str) -> str:
        character = self._peek()
        if not character:
            raise self._refusal(f"it ends inside {what}")
        self._at += 1
        return character

    def _alternatives(self, depth: int) -> tuple[Node, bool]:
        if depth > MAX_DEPTH:
            raise self._refusal(f"groups are nested deeper than {MAX_DEPTH}")
        choices, loops = [], False
        while True:
            nodes = []
            while self._peek() not in ("", "|", ")"):
                node, has_loop = self._piece(depth)
                nodes.append(node)
                loops |= has_loop
            choices.append(_sequence(nodes))
            if self._peek() != "|":
                return _either(choices), loops
            self._at += 1

    def _piece(self, depth: int) -> tuple[Node, bool]:
        is_anchor = self._peek() in ("^", "$")
        node, has_loop = self._atom(depth)
        sign = self._peek()
        if sign not in ("*", "+", "?") or not sign:
            return node, has_loop
        if has_loop or is_anchor:
            raise self._refusal(f"{sign!r} on an anchor or on a group that repeats inside")
        self._at += 1
        if self._peek() == "?":  # lazy: another order of trying, the same matches
            self._at += 1
        if self._peek() and self._peek() in "*+?":
            raise self._refusal("two repetitions in a row")
        return _repeated(node, sign), sign != "?"

    def _atom(self, depth: int) -> tuple[Node, bool]:
        character = self._take("a piece")
        if character == "(":
            if self._key.startswith("?:", self._at):
                self._at += 2
            node, has_loop = self._alternatives(depth + 1)
            if self._take("a group") != ")":
                raise self._refusal("a '(' without its ')'")
            return node, has_loop
        if character == "[":
            return _One(self._class()), False
        if character == "\\":
            return _One(self._escape()), False
        if character == ".":
            return _One(lambda c: c != "\n"), False
        if character == "^":
            return (lambda text, starts: starts & {0}), False
        if character == "$":
            return (lambda text, starts: starts & {len(text)}), False
        if character in _LITERALS:
            return _One(_is(character)), False
        raise self._refusal(f"unexpected {character!r}")

    def _escape(self) -> Accepts:
        character = self._take("an escape")
        if character == "d":
            return str.isdecimal
        if character == "w":
            return lambda c: c.isalnum() or c == "_"
        if character in _ESCAPED_LITERALS:
            return _is(character)
        raise self._refusal(f"the escape '\\{character}'")

    def _class(self) -> Accepts:
        negated = self._peek() == "^"
        if negated:
            self._at += 1
        members: list[Accepts] = []
        while self._peek() != "]" or not members:
            members.append(self._class_member())
        self._at += 1
        return lambda c: negated != any(accepts(c) for accepts in members)

    def _class_member(self) -> Accepts:
        first = self._take("a class")
        if first == "\\":
            return self._escape()
        if first not in _LITERALS | {"."}:
            raise self._refusal(f"{first!r} in a class")
        if self._peek() != "-" or self._key[self._at + 1 : self._at + 2] == "]":
            return _is(first)
        self._at += 1
        last = self._take("a class")
        if last not in _LITERALS or last < first or "-" in (first, last):
            raise self._refusal(f"the range {first}-{last}")
        return lambda c: first <= c <= last


def _is(character: str) -> Accepts:
    return lambda c: c == character


class _One:
    """The node of one character."""

    def __init__(self, accepts: Accepts) -> None:
        self._accepts = accepts

    def __call__(self, text: str, starts: Ends) -> Ends:
        return frozenset(i + 1 for i in starts if i < len(text) and self._accepts(text[i]))

    def run(self, text: str, starts: Ends) -> Ends:
        """Where a run of one or more such characters may end, each character seen once."""
        reached: set[int] = set()
        for start in starts:
            end = start + 1
            while end not in reached and end <= len(text) and self._accepts(text[end - 1]):
                reached.add(end)
                end += 1
        return frozenset(reached)


def _sequence(nodes: list[Node]) -> Node:
    def ends(text: str, starts: Ends) -> Ends:
        for node in nodes:
            if not starts:
                break
            starts = node(text, starts)
        return starts

    return ends


def _either(nodes: list[Node]) -> Node:
    if len(nodes) == 1:
        return nodes[0]
    return lambda text, starts: frozenset().union(*(node(text, starts) for node in nodes))


def _repeated(node: Node, sign: str) -> Node:
    def ends(text: str, starts: Ends) -> Ends:
        if sign == "?":
            return starts | node(text, starts)
        if isinstance(node, _One):
            reached = node.run(text, starts)
        else:
            reached = fresh = node(text, starts)
            while fresh:
                fresh = node(text, fresh) - reached
                reached |= fresh
        return reached if sign == "+" else reached | starts

    return ends
