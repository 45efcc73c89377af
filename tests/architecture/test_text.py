"""What is committed speaks of the project alone, and can be read by anyone."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Joined here so that this file does not hold what it looks for.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.~-])/" + r"(work|root|home|tmp/team)/",
            r"(?<!\w)\.\./" + r"shared\b",
            r"\bissue " + r"#?\d",
            r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
            r"\bsub" + r"agent\b",
        )
    )
)

# Hosts that a committed text may point at, beside this machine and names without a dot. A package registry is
# configured where the project is installed.
HOSTS = {
    "127.0.0.1", "0.0.0.0", "[::1]", "arxiv.org", "docs.python.org", "github.com", "grafana.com",
    "huggingface.co", "json-schema.org", "prometheus.io", "sqlite.org", "www.sqlite.org",
    "www.w3.org",
}  # fmt: skip
RESERVED = (".test", ".invalid", ".example", "example.org", "example.com")

ADDRESS = re.compile(r"https?://(?:[^\s/@\"'<>]*@)?(\[[^\]\s]*\]|[A-Za-z0-9.-]+)")


def test_no_text_names_the_place_where_it_was_written(tracked_text: Mapping[str, str]) -> None:
    found = [
        f"{name}:{number} {match.group()}"
        for name, text in tracked_text.items()
        for number, line in enumerate(text.splitlines(), 1)
        for match in [FORBIDDEN.search(line)]
        if match
    ]
    assert found == []


def test_addresses_point_at_known_hosts(tracked_text: Mapping[str, str]) -> None:
    unknown = {
        f"{name}: {host}"
        for name, text in tracked_text.items()
        for host in ADDRESS.findall(text)
        if "." in host and host not in HOSTS and not host.endswith(RESERVED)
    }
    assert unknown == set()


def test_text_ends_with_one_newline_and_has_no_tabs_in_python(tracked_text: Mapping[str, str]) -> None:
    untidy = [
        name
        for name, text in tracked_text.items()
        if name.endswith((".py", ".md", ".toml", ".yml", ".yaml"))
        and text
        and (not text.endswith("\n") or text.endswith("\n\n") or (name.endswith(".py") and "\t" in text))
    ]
    assert untidy == []
