"""Uploads that should not be: each is refused with the reason, and nothing of it stays."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from timbre_server.inspection import inspector, meta_sites

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def zipped(files: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../evil", files.tensors)
    return out.getvalue()


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('this ran')",))


def with_first_value(files: Any, value: float) -> bytes:
    tensors = load(files.tensors)
    next(iter(tensors.values())).view(-1)[0] = value
    return bytes(save(tensors))


def with_wrong_shape(files: Any) -> bytes:
    tensors = load(files.tensors)
    name = next(iter(tensors))
    return bytes(save({**tensors, name: torch.zeros(3, 3)}))


def with_surplus_tensor(files: Any) -> bytes:
    return bytes(save({**load(files.tensors), "base_model.model.unheard_of.weight": torch.zeros(2, 2)}))


HOSTILE_TENSORS: Mapping[str, Callable[[Any], bytes]] = {
    "pickle": lambda files: pickle.dumps(Exploit()),
    "zip": zipped,
    "safetensors with a zip behind": lambda files: files.tensors + zipped(files),
    "empty": lambda files: b"",
    "cut short": lambda files: files.tensors[:-1],
    "header of eight exabytes": lambda files: b"\xff" * 8 + b"{}",
    "NaN": lambda files: with_first_value(files, float("nan")),
    "infinite": lambda files: with_first_value(files, float("inf")),
    "wrong shape": with_wrong_shape,
    "surplus tensor": with_surplus_tensor,
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
async def test_tensors_that_are_not_an_adapters_are_refused_and_leave_nothing(
    serve: Callable[..., Any], adapter_files: Any, kind: str
) -> None:
    served, files = serve(), adapter_files()
    response = await served.upload(files, **{TENSORS: ("t", HOSTILE_TENSORS[kind](files))})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_invalid"), response.text
    assert served.stored_files() == []
    assert served.uploads == [None]


@pytest.mark.parametrize(
    "config",
    [
        b"", b"[]", b"{", b"null", b'{"peft_type": "LORA"', b'{"peft_type": 3}', b'{"peft_type": "NO_SUCH"}',
        b'{"peft_type": "LORA", "peft_type": "IA3"}', b'{"peft_type": "LORA", "r": NaN}', b"\xff\xfe",
        b"[" * 100_000, b'{"peft_type": "LORA", "r": 0}', b'{"peft_type": "LORA", "r": "8"}',
    ],
)  # fmt: skip
async def test_a_config_that_is_not_an_adapters_is_refused_and_leaves_nothing(
    serve: Callable[..., Any], adapter_files: Any, config: bytes
) -> None:
    served = serve()
    response = await served.upload(adapter_files(), **{CONFIG: ("c", config)})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_invalid"), response.text
    assert served.stored_files() == []


@pytest.mark.parametrize(
    "name", ["", "../evil", "a/b", "a:b", "a,b", "a b", "-a", "a" * 97, "a@1", "é", "\x00", ".."]
)
async def test_a_bad_name_is_refused(serve: Callable[..., Any], adapter_files: Any, name: str) -> None:
    served = serve()
    response = await served.upload(adapter_files(), name=(None, name))
    assert response.status_code == 400, response.text
    assert served.stored_files() == []


async def test_the_base_models_name_is_taken(serve: Callable[..., Any], adapter_files: Any) -> None:
    served = serve()
    response = await served.upload(adapter_files(), name=(None, "tiny"))
    assert (response.status_code, response.headers["x-should-retry"]) == (409, "false")


async def test_an_adapter_for_another_base_is_refused_by_name(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    wrong = await served.upload(adapter_files(), base_model=(None, "other-model"))
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "base_model_mismatch")
    assert (await served.upload(adapter_files(), base_model=(None, "tiny"))).status_code == 201


async def test_an_adapter_larger_than_all_adapter_memory_is_refused(
    serve: Callable[..., Any], adapter_files: Any, store: Any
) -> None:
    served = serve()
    inspect = inspector(meta_sites(served.engine.info.sites), budget_bytes=8, derive=lambda *_: None)
    store._registrar = replace(store._registrar, inspect=inspect)
    error = (await served.upload(adapter_files())).json()["error"]
    assert (error["code"], "adapter_memory_mib" in error["message"]) == ("adapter_invalid", True)


@pytest.mark.parametrize("missing", ["name", CONFIG, TENSORS])
async def test_a_form_without_a_part_is_refused_by_its_name(
    serve: Callable[..., Any], adapter_files: Any, missing: str
) -> None:
    served = serve()
    response = await served.upload(adapter_files(), **{missing: None})
    assert (response.status_code, response.json()["error"]["param"]) == (400, missing)
    assert served.stored_files() == []


@pytest.mark.parametrize("surplus", ["adapter_model.bin", "../../evil", "file", "\x00"])
async def test_a_part_that_is_not_expected_is_refused(
    serve: Callable[..., Any], adapter_files: Any, surplus: str
) -> None:
    served = serve()
    response = await served.upload(adapter_files(), **{surplus: ("x", b"x")})
    assert response.status_code == 400
    assert served.stored_files() == []


async def test_file_names_that_a_client_sends_are_never_used(
    serve: Callable[..., Any], adapter_files: Any, tmp_path: Path
) -> None:
    served, files = serve(), adapter_files()
    evil = {
        CONFIG: ("../../../evil.json", files.config),
        TENSORS: ("/tmp/evil\x00.safetensors", files.tensors),
    }
    assert (await served.upload(files, **evil)).status_code == 201
    assert list(tmp_path.rglob("*evil*")) == []


def raw_part(name: str, content: bytes) -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"--B", b"--B--", b"garbage", b"--B\r\n\r\nx\r\n--B--", raw_part("name", b"a"),
        raw_part("name", b"a") + raw_part("name", b"b") + b"--B--",
        raw_part("name", b"\xff") + raw_part(CONFIG, b"{}") + raw_part(TENSORS, b"x") + b"--B--",
        b"--B\r\n" + b"X-Header: y\r\n" * 1000, b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--",
        b"--B\r\nContent-Disposition: " + b"a" * 100_000, raw_part(TENSORS, b"x") + b"--C--",
    ],
)  # fmt: skip
async def test_a_malformed_form_is_refused_and_leaves_nothing(serve: Callable[..., Any], body: bytes) -> None:
    served = serve()
    response = await served.client.post(
        "/v1/adapters", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"}
    )
    assert response.status_code == 400, response.text
    assert served.stored_files() == []


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 300],
)
async def test_a_form_without_a_usable_boundary_is_refused(
    serve: Callable[..., Any], content_type: str
) -> None:
    response = await serve().client.post(
        "/v1/adapters", content=b"--B--", headers={"Content-Type": content_type}
    )
    assert response.status_code == 400


@pytest.mark.parametrize("content_type", ["application/zip", "text/plain", "application/x-tar", ""])
async def test_other_kinds_of_body_are_refused(serve: Callable[..., Any], content_type: str) -> None:
    response = await serve().client.post("/v1/adapters", content=b"x", headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "a"}, 400), ({"name": "a", "files": {}}, 400), ({"name": "a", "files": [], "x": 1}, 400),
        ({"name": "a", "files": {CONFIG: "sha256:" + "0" * 64, TENSORS: "sha256:" + "0" * 64}}, 404),
        ({"name": "a", "files": {CONFIG: "../../etc/passwd", TENSORS: "/etc/passwd"}}, 400),
        ({"name": "a", "files": {CONFIG: "sha256:" + "0" * 64, "../x": "sha256:" + "0" * 64}}, 400),
    ],
)  # fmt: skip
async def test_registering_what_is_not_here_is_refused(
    serve: Callable[..., Any], body: Any, status: int
) -> None:
    response = await serve().client.post("/v1/adapters", json=body)
    assert response.status_code == status, response.text


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"name": "\\ud800"}', '{"name": NaN}', "[" * 50_000])
async def test_registering_with_what_is_not_json_is_refused(serve: Callable[..., Any], text: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = await serve().client.post("/v1/adapters", content=text, headers=headers)
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_large_json_body_is_cut_off(serve: Callable[..., Any]) -> None:
    response = await serve().client.post("/v1/adapters", json={"name": "a" * 100_000})
    assert response.status_code == 413


async def chunks(total: int) -> AsyncIterator[bytes]:
    for _ in range(total // 65536):
        yield b"x" * 65536


async def test_a_blob_above_the_limit_is_cut_off_whether_or_not_it_says_its_length(
    serve: Callable[..., Any],
) -> None:
    served = serve()
    path = "/v1/blobs/sha256:" + "0" * 64
    for content in (b"x" * (1 << 21), chunks(1 << 21)):
        response = await served.client.put(path, content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert served.stored_files() == []


async def test_a_file_in_a_form_above_the_limit_is_cut_off(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    response = await served.upload(adapter_files(), **{TENSORS: ("t", b"x" * ((1 << 20) + 1))})
    assert response.status_code == 413
    assert served.stored_files() == []


async def test_a_blob_that_is_not_its_digest_is_refused(serve: Callable[..., Any]) -> None:
    served = serve()
    response = await served.client.put("/v1/blobs/sha256:" + "0" * 64, content=b"something else")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "digest_mismatch")
    assert served.stored_files() == []


@pytest.mark.parametrize(
    "digest", ["sha256:zz", "md5:" + "0" * 32, "sha256:" + "A" * 64, "..%2f..%2fetc%2fpasswd", "x" * 5000]
)
async def test_what_is_no_digest_is_never_a_path(serve: Callable[..., Any], digest: str) -> None:
    served = serve()
    assert (await served.client.head(f"/v1/blobs/{digest}")).status_code in (400, 404)
    assert (await served.client.put(f"/v1/blobs/{digest}", content=b"x")).status_code in (400, 404)
    assert served.stored_files() == []


async def test_an_upload_that_breaks_off_leaves_nothing(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served, files = serve(), adapter_files()
    sent: list[Any] = []
    pieces = iter(
        [raw_part("name", b"a") + raw_part(CONFIG, files.config), raw_part(TENSORS, files.tensors)[:200]]
    )

    async def receive() -> dict[str, Any]:
        piece = next(pieces, None)
        return (
            {"type": "http.disconnect"}
            if piece is None
            else {"type": "http.request", "body": piece, "more_body": True}
        )

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"timbre"), (b"content-type", b"multipart/form-data; boundary=B")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/adapters", "raw_path": b"/v1/adapters",
        "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http",
        "server": ("timbre", 80), "client": None,
    }  # fmt: skip
    await served.app(scope, receive, send)
    assert served.stored_files() == []
    assert served.answered == [("/v1/adapters", 499)]
