"""Frames on a stream socket: a length of four bytes, big-endian, then one MessagePack message.

The engine's side is synchronous (`Channel`), the server's asynchronous (`AsyncChannel`). Both refuse frames
over a limit, on the way out and on the way in, and treat a peer that is gone, even amid a frame, as the end
of the stream. What the messages mean is not known here; the decoder that is handed in checks their types.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
READ_BYTES = 1024 * 1024
_LENGTH = struct.Struct(">I")

Incoming = TypeVar("Incoming")


class WireError(Exception):
    """The peer does not keep to the protocol: the connection is of no more use."""


class FrameTooLarge(WireError):
    """Nothing was sent; the connection is still good for smaller messages."""


class Framing:
    """Messages to frames, within a size."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()

    def frame(self, message: msgspec.Struct) -> bytes:
        """Raises FrameTooLarge."""
        payload = self._encoder.encode(message)
        if len(payload) > self.max_bytes:
            raise FrameTooLarge(
                f"a {type(message).__name__} takes {len(payload)} bytes, a frame holds {self.max_bytes}"
            )
        return _LENGTH.pack(len(payload)) + payload

    def payload_size(self, header: bytes | bytearray | memoryview) -> int:
        """Raises WireError where the peer announces more than a frame may hold."""
        size: int = _LENGTH.unpack(header)[0]
        if size > self.max_bytes:
            raise WireError(f"the peer announced a frame of {size} bytes, at most {self.max_bytes} are taken")
        return size


class Channel(Generic[Incoming]):
    """The synchronous end. Owns the socket. Not for several threads."""

    def __init__(
        self,
        connection: socket.socket,
        decoder: msgspec.msgpack.Decoder[Incoming],
        framing: Framing | None = None,
    ) -> None:
        self._connection = connection
        self._decoder = decoder
        self._framing = framing or Framing()
        self._received = bytearray()
        self.closed = False
        """The peer has gone; messages that it sent before may still be returned."""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Send all of a message, waiting for a slow peer. A peer that is gone sets `closed` instead.

        Raises FrameTooLarge.
        """
        frame = self._framing.frame(message)
        try:
            self._connection.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            self.closed = True

    def receive_payload(self) -> bytes | None:
        """Wait for the next frame, whatever is in it; None: the peer has gone. Raises WireError."""
        while (payload := self._next_payload()) is None and not self.closed:
            self._read(0)
        return payload

    def poll(self) -> list[Incoming]:
        """The messages that have arrived, without waiting. Raises WireError."""
        while not self.closed and self._read(socket.MSG_DONTWAIT):
            pass
        messages = []
        while (payload := self._next_payload()) is not None:
            messages.append(decoded(self._decoder, payload))
        return messages

    def close(self) -> None:
        self._connection.close()
        self.closed = True

    def _read(self, flags: int) -> bool:
        """Read what is there once; whether there may be more."""
        try:
            piece = self._connection.recv(READ_BYTES, flags)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            piece = b""
        self.closed = not piece
        self._received += piece
        return bool(piece)

    def _next_payload(self) -> bytes | None:
        start = _LENGTH.size
        if len(self._received) < start:
            return None
        end = start + self._framing.payload_size(self._received[:start])
        if len(self._received) < end:
            return None
        payload = bytes(self._received[start:end])
        del self._received[:end]
        return payload


class AsyncChannel(Generic[Incoming]):
    """The asynchronous end, on the running loop. `send` never waits: what the peer has not read is kept."""

    def __init__(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        decoder: msgspec.msgpack.Decoder[Incoming],
        framing: Framing | None = None,
    ) -> None:
        self._reader, self._writer = streams
        self._decoder = decoder
        self._framing = framing or Framing()

    @classmethod
    async def over(
        cls, connection: socket.socket, decoder: msgspec.msgpack.Decoder[Incoming]
    ) -> AsyncChannel[Incoming]:
        """Take a connected stream socket over."""
        connection.setblocking(False)
        return cls(await asyncio.open_unix_connection(sock=connection, limit=READ_BYTES), decoder)

    def send(self, message: msgspec.Struct) -> None:
        """Raises FrameTooLarge. To a peer that is gone nothing is sent."""
        frame = self._framing.frame(message)
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> Incoming | None:
        """The next message; None: the peer has gone. Raises WireError."""
        try:
            header = await self._reader.readexactly(_LENGTH.size)
            payload = await self._reader.readexactly(self._framing.payload_size(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return decoded(self._decoder, payload)

    async def close(self) -> None:
        """End the stream now; what the peer has not read is lost."""
        self._writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def decoded(decoder: msgspec.msgpack.Decoder[Incoming], payload: bytes) -> Incoming:
    """A frame's message. Raises WireError where it is none of the decoder's types."""
    try:
        return decoder.decode(payload)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise WireError(f"the peer sent a message of an unknown kind: {error}") from error
