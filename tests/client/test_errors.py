"""The client's errors match the server's table, whatever is added to it."""

from __future__ import annotations

import pytest

from timbre_client.errors import BY_CODE, BY_STATUS, ServerFault, UnexpectedStatus, error_of
from timbre_server.http.errors import ERROR_KINDS, STATUS_KINDS, ErrorKind, error_body

KINDS = [*ERROR_KINDS.values(), *STATUS_KINDS.values()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.status}-{kind.code}")
def test_every_error_of_the_server_has_a_class_of_its_own(kind: ErrorKind) -> None:
    error = error_of(kind.status, error_body(kind, "what was found"), {})
    assert type(error) is not UnexpectedStatus or kind.status in {405}
    assert (error.status, error.code, error.message) == (kind.status, kind.code, "what was found")


def test_codes_that_the_client_knows_are_the_server_s() -> None:
    assert set(BY_CODE) <= {kind.code for kind in KINDS}
    assert set(BY_STATUS) <= {kind.status for kind in KINDS}


def test_a_body_that_is_no_error_object_leaves_the_status_to_speak() -> None:
    error = error_of(502, ["not", "ours"], {"x-request-id": "r-1", "retry-after": "2"})
    assert type(error) is ServerFault
    assert (str(error), error.request_id, error.retry_after_s) == ("HTTP 502 (HTTP 502, None)", "r-1", 2.0)


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (503, {}, True),
        (500, {"x-should-retry": "false"}, False),
        (409, {"x-should-retry": "true"}, True),
        (404, {}, False),
    ],
)
def test_the_server_s_word_on_trying_again_wins(status: int, headers: dict[str, str], expected: bool) -> None:
    assert error_of(status, {}, headers).retryable is expected
