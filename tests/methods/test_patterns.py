from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timbre_methods.errors import InvalidConfig
from timbre_methods.patterns import (
    MAX_EXPRESSION_LENGTH,
    MAX_KEY_LENGTH,
    MAX_KEYS,
    MAX_LOOPS,
    PathPatterns,
    full_match,
)

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "transformer.h.3.attn.c_attn",
    "lm_head",
    "a",
    "a.b",
    "aab.ab",
]


def as_peft_matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def matches(key: str, path: str) -> bool:
    return PathPatterns("alpha_pattern", {key: 1.0}).first(path) is not None


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "self_attnxq_proj",
        r"self_attn\.q_proj",
        "model.layers.0.self_attn.q_proj",
        "layers.1",
        "layers.1.*",
        r"layers\.\d+\.self_attn.*",
        r"layers\.(0|1)\..*",
        r".*\.(q_proj|down_proj)",
        "^model.*",
        "^layers.*",
        "lm_head$",
        "[a-m]+_?head",
        "[^q]_proj",
        r"[\w-]*",
        "(?:q|k)_proj",
        ".*?_proj",
        "(ab?)+.?(ab|b)",
        "a|b",
        "",
        "()",
        "|q_proj",
        "model$.*",
        "x^a",
        "self.attn.q_proj",
        "...._proj",
        ".",
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_key_matches_where_peft_says_so(key: str, path: str) -> None:
    assert matches(key, path) == as_peft_matches(key, path)


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$"])
KEYS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda choices: f"({'|'.join(choices)})"),
    ),
    max_leaves=6,
)
PIECES = st.sampled_from(["a", ".", r"\.", "[ab]", "[^a]", r"\w"])
SIGNS = st.sampled_from(["", "*", "+", "?", "*?"])
REPEATED = st.lists(
    st.builds(lambda key, sign: f"({key}){sign}", KEYS, SIGNS) | st.builds("{}{}".format, PIECES, SIGNS),
    min_size=1,
    max_size=3,
).map("".join)


@given(key=REPEATED, path=st.text("ab.", max_size=8))
def test_any_readable_key_matches_where_re_says_so(key: str, path: str) -> None:
    assert matches(key, path) == as_peft_matches(key, path)


@given(key=st.text("ab.\\dw[]()|^$*+?{}-,1", max_size=12), path=st.sampled_from(PATHS))
def test_any_key_is_refused_or_read_as_re_reads_it(key: str, path: str) -> None:
    try:
        actual = matches(key, path)
    except InvalidConfig:
        return
    assert actual == as_peft_matches(key, path)


def test_the_first_key_in_the_files_order_wins() -> None:
    values = {"q_proj": 1.0, "layers.0.self_attn.q_proj": 2.0, ".*": 3.0}
    assert PathPatterns("alpha_pattern", values).first("model.layers.0.self_attn.q_proj") == 1.0
    backwards = dict(reversed(values.items()))
    assert PathPatterns("alpha_pattern", backwards).first("model.layers.0.self_attn.q_proj") == 3.0
    assert PathPatterns("alpha_pattern", {"k_proj": 1.0}).first("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    "key",
    [
        "(a*)*",
        "(a+)+$",
        "((a|b+)?)*",
        "a{1,3}",
        "a**",
        "a*+",
        "*a",
        "a^*",
        "(a",
        "a)",
        "[a",
        "[z-a]",
        "[--a]",
        "[+--]",
        "a\\",
        r"\1",
        r"\s",
        "(?=a)",
        "(?P<x>a)",
        "a b",
        "(" * 20 + ")" * 20,
        "x" * (MAX_KEY_LENGTH + 1),
    ],
)
def test_a_key_outside_the_subset_is_refused_with_the_option(key: str) -> None:
    with pytest.raises(InvalidConfig, match="alpha_pattern"):
        PathPatterns("alpha_pattern", {key: 1.0})


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=f"at most {MAX_KEYS}"):
        PathPatterns("alpha_pattern", {f"layer{i}": 1.0 for i in range(MAX_KEYS + 1)})
    with pytest.raises(InvalidConfig, match=str(MAX_EXPRESSION_LENGTH)):
        PathPatterns("alpha_pattern", {f"layer[{i}]": 1.0 for i in range(MAX_EXPRESSION_LENGTH // 8)})
    with pytest.raises(InvalidConfig, match=f"{MAX_LOOPS} signs"):
        PathPatterns("alpha_pattern", {f"{i}.*": 1.0 for i in range(MAX_LOOPS + 1)})


def test_a_key_that_would_hang_re_is_followed_in_few_steps() -> None:
    key = "(a|a)?" * 40 + ".*.*.*.*.*b"
    assert not matches(key, "a" * 200)  # re would try 2**40 readings


@pytest.mark.parametrize(
    "expression", ["q_proj", r".*\.q_proj", r"model.*(q|v)_proj", r".*[01]\..*proj$", ""]
)
@pytest.mark.parametrize(
    "path", ["q_proj", "model.layers.1.self_attn.q_proj", "model.v_proj", "x.q_projx", ""]
)
def test_a_full_match_is_one_as_re_sees_it(expression: str, path: str) -> None:
    assert full_match("target_modules", expression)(path) == bool(re.fullmatch(expression, path))


@pytest.mark.parametrize("expression", ["(a+)+", "a" * 513, ".*" * 17, "(?!x).*", "a{3}"])
def test_a_full_match_beyond_the_subset_is_refused_with_its_option(expression: str) -> None:
    with pytest.raises(InvalidConfig, match=r"target_modules: .*write the module names out"):
        full_match("target_modules", expression)
