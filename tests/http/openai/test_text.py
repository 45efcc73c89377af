"""The tokenizer side: bytes of tokens, templates, and model folders with and without a tokenizer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from timbre_server.errors import InvalidRequest, UnsupportedModel
from timbre_server.http.text import TextCodec, load_text_codec

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
MESSAGES = [{"role": "user", "content": "hi"}]


@given(text=st.text(max_size=30))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text, add_special_tokens=False)
    assert b"".join(map(codec.token_bytes, ids)) == text.encode()


def test_special_tokens_are_told_apart(codec: TextCodec) -> None:
    [start] = codec.encode("<|im_start|>", add_special_tokens=False)
    assert codec.is_special(start)
    assert codec.token_bytes(start) == b"<|im_start|>"
    assert not codec.is_special(0)
    assert codec.decode([start], skip_special_tokens=True) == ""


def test_ids_outside_the_vocabulary_have_no_bytes(codec: TextCodec) -> None:
    assert codec.token_bytes(10**6) == b""


def test_byte_fallback_and_word_marks_are_read_as_bytes(make_codec: Callable[..., TextCodec]) -> None:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "▁a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    codec = make_codec(tokenizer)
    assert codec.token_bytes(0xF0) == b"\xf0"
    assert codec.token_bytes(258) == b" a"


def test_a_vocabulary_without_a_decoder_gives_its_pieces(make_codec: Callable[..., TextCodec]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"ab": 0, "▁c": 1, "?": 2}, unk_token="?"))
    codec = make_codec(tokenizer)
    assert (codec.token_bytes(0), codec.token_bytes(1)) == (b"ab", "▁c".encode())


def test_a_template_cannot_be_given_the_tokenizers_own_options(codec: TextCodec) -> None:
    for name in ("chat_template", "tokenize", "conversation", "tools", "documents"):
        with pytest.raises(InvalidRequest, match=name):
            codec.render_chat(MESSAGES, variables={name: True})


def test_a_template_cannot_reach_python(tokenizer: Tokenizer, make_codec: Callable[..., TextCodec]) -> None:
    codec = make_codec(tokenizer, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        codec.render_chat(MESSAGES)


async def test_work_in_a_thread_is_not_waited_for_longer_than_its_time(codec: TextCodec) -> None:
    released = threading.Event()
    with pytest.raises(TimeoutError):
        await codec.in_thread(lambda: released.wait(60), 0.01)
    released.set()
    assert await codec.in_thread(lambda: 7, 60) == 7
    assert await asyncio.gather(*(codec.in_thread(lambda: 7) for _ in range(5))) == [7] * 5


def test_a_folder_is_loaded_with_its_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="T {{ messages[0].content }}")
    saved.save_pretrained(tmp_path)
    codec = load_text_codec(tmp_path)
    assert codec is not None
    assert codec.render_chat(MESSAGES) == "T hi"
    assert codec.encode("hell", add_special_tokens=True) == tokenizer.encode("hell").ids
    codec.close()


def test_a_folder_without_a_tokenizer_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_text_codec(tmp_path) is None


def test_a_folder_with_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "9.9"}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="tokenizer cannot be loaded"):
        load_text_codec(tmp_path)


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", **config}))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UnsupportedModel):
        load_text_codec(tmp_path)
    assert not marker.exists()


def test_a_tokenizer_that_has_no_fast_form_is_refused_by_name() -> None:
    class OnlyPython:
        pass

    with pytest.raises(UnsupportedModel, match="OnlyPython"):
        TextCodec(OnlyPython())  # type: ignore[arg-type]


def test_the_longest_piece_bounds_the_characters_of_a_token(make_codec: Callable[..., TextCodec]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "four": 1}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<start>", special=True)])
    assert make_codec(tokenizer).max_chars_per_token == len("<start>")


def test_the_routes_are_imported_without_torch() -> None:
    code = (
        "import sys, timbre_server.http.completions, timbre_server.http.chat; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.strip() == "False"
