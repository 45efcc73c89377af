"""Between text and token ids: the tokenizer, what each token says, and the model's own chat template.

The only module of the server process that knows tokenizers. It knows no requests. A template comes from the
base model's folder alone, never from a client.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError
from tokenizers import Tokenizer

from timbre_server.errors import InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
TEXT_THREADS = 2
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MARK = "\u2581"


class TextCodec:
    """One model's tokenizer and template. Thread-safe; owns two threads, so `close` it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedModel(
                f"the tokenizer {type(tokenizer).__name__} has no fast form; expected a tokenizer.json, or a "
                "tokenizer that transformers can convert to one"
            )
        self._backend = backend
        self._tokenizer = tokenizer
        self._pieces = {index: piece for piece, index in backend.get_vocab(with_added_tokens=False).items()}
        self._added = backend.get_added_tokens_decoder()
        self._bytes_of_piece = _piece_reader(backend)
        self._reserved_variables = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        longest = max((len(piece) for piece in backend.get_vocab()), default=1)
        self.max_chars_per_token = longest

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], Result], timeout_s: float | None = None) -> Result:
        """Runs work off the event loop. Raises: TimeoutError; the thread then ends when the work does."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        return await asyncio.wait_for(future, timeout_s)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Text that spells a special token becomes that token."""
        # A batch of one: unlike the plain call it lets other threads run meanwhile.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, ids out of the vocabulary nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        token = self._added.get(token_id)
        return token is not None and token.special

    def token_bytes(self, token_id: int) -> bytes:
        """The very bytes that a token stands for, which may end inside a character."""
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        piece = self._pieces.get(token_id)
        return b"" if piece is None else self._bytes_of_piece(piece)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's template makes of a conversation.

        Raises: InvalidRequest where the model has no template, the template refuses the conversation, or a
        variable has a name that is not the template's.
        """
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; send a prompt to /v1/completions")
        if taken := self._reserved_variables & set(variables or {}):
            raise InvalidRequest(
                f"{sorted(taken)[0]!r} cannot be set for the template", param="chat_template_kwargs"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {str(error)[:200]}", param="messages"
            ) from error
        assert isinstance(text, str)
        return text


def load_text_codec(model_folder: Path) -> TextCodec | None:
    """The codec of a local model folder, or None where it has no tokenizer. Runs no code of the folder.

    Raises: UnsupportedModel where it has one that cannot be used.
    """
    if not any((model_folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # seconds; only whoever loads a tokenizer waits for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModel(f"the model's tokenizer cannot be loaded: {error}") from error
    return TextCodec(tokenizer)


def _piece_reader(backend: Tokenizer) -> Callable[[str], bytes]:
    """How this vocabulary writes bytes in its pieces, told from its decoder."""
    kinds = _decoder_kinds(backend)
    if "ByteLevel" in kinds:
        byte_of = _byte_level_alphabet()

        def read_byte_level(piece: str) -> bytes:
            if all(char in byte_of for char in piece):
                return bytes(byte_of[char] for char in piece)
            return piece.encode()

        return read_byte_level
    marks_words = kinds & {"ByteFallback", "Metaspace"}

    def read_plain(piece: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(piece) if "ByteFallback" in kinds else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return (piece.replace(_WORD_MARK, " ") if marks_words else piece).encode()

    return read_plain


def _decoder_kinds(backend: Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in (state, *state.get("decoders", ()))}


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies use for bytes: printable Latin-1 stands for itself, the
    others, in order, for the characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    shifted = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
