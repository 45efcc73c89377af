"""Frames arrive whole, in order and within their size, however the bytes are cut."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timbre_server.engine.messages import (
    Abort,
    AdapterUse,
    FromEngine,
    Progress,
    SamplingParams,
    StepOutput,
    StepStats,
    Submit,
    ToEngine,
    TokenEvent,
    TokenLogprobs,
)
from timbre_server.engine.wire import AsyncChannel, Channel, FrameTooLarge, Framing, WireError

Pair = tuple[Channel[ToEngine], socket.socket]
MESSAGES = [
    Submit("a", [1, 2, 3], SamplingParams(logit_bias={5: 1.5}, seed=2**63), (AdapterUse("x", 0.5),), "salt"),
    Abort("a"),
]


def frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return struct.pack(">I", len(payload)) + payload


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    channel: Channel[ToEngine] = Channel(ours, msgspec.msgpack.Decoder(ToEngine), Framing(1000))
    yield channel, theirs
    channel.close()
    theirs.close()


def test_polling_an_empty_channel_gives_nothing_at_once(pair: Pair) -> None:
    assert pair[0].poll() == []
    assert not pair[0].closed


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_messages_arrive_however_they_are_cut(cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    channel: Channel[ToEngine] = Channel(ours, msgspec.msgpack.Decoder(ToEngine))
    stream, received = b"".join(map(frame, MESSAGES)), []
    while stream:
        size = cuts[len(received) % len(cuts)] if len(stream) > 40 else len(stream)
        theirs.sendall(stream[:size])
        stream = stream[size:]
        received += channel.poll()
    assert received == MESSAGES
    channel.close()
    theirs.close()


def test_what_came_before_the_peer_left_is_still_returned(pair: Pair) -> None:
    channel, peer = pair
    peer.sendall(frame(MESSAGES[0]) + frame(MESSAGES[1])[:-1])
    peer.close()
    assert channel.poll() == MESSAGES[:1]
    assert channel.closed
    assert channel.receive_payload() is None


def test_a_message_over_the_limit_is_not_sent_and_the_next_one_is(pair: Pair) -> None:
    channel, peer = pair
    with pytest.raises(FrameTooLarge, match="a frame holds 1000"):
        channel.send(Progress("x" * 2000))
    channel.send(Progress("short"))
    assert peer.recv(1000) == frame(Progress("short"))


def test_a_frame_announced_over_the_limit_is_refused_before_it_is_read(pair: Pair) -> None:
    channel, peer = pair
    peer.sendall(struct.pack(">I", 1001))
    with pytest.raises(WireError, match="announced a frame of 1001 bytes, at most 1000"):
        channel.poll()


@pytest.mark.parametrize("payload", [b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "Reboot"})])
def test_a_message_of_no_known_kind_is_refused(pair: Pair, payload: bytes) -> None:
    channel, peer = pair
    peer.sendall(struct.pack(">I", len(payload)) + payload)
    with pytest.raises(WireError, match="unknown kind"):
        channel.poll()


def test_sending_to_a_peer_that_is_gone_closes_the_channel(pair: Pair) -> None:
    channel, peer = pair
    peer.close()
    channel.send(Progress("nobody hears"))
    assert channel.closed


async def test_both_ends_understand_each_other() -> None:
    ours, theirs = socket.socketpair()
    engine: Channel[ToEngine] = Channel(theirs, msgspec.msgpack.Decoder(ToEngine))
    server: AsyncChannel[FromEngine] = await AsyncChannel.over(ours, msgspec.msgpack.Decoder(FromEngine))
    for message in MESSAGES:
        server.send(message)
    await asyncio.sleep(0)
    assert engine.poll() == MESSAGES
    scores = (None, TokenLogprobs(3, -0.5, 1, ((3, -0.5),)))
    output = StepOutput(StepStats(step_seconds=0.5), (TokenEvent("a", (3,), prompt_logprobs=scores),))
    engine.send(output)
    assert await server.receive() == output
    engine.close()
    assert await server.receive() is None
    await server.close()


async def test_a_large_message_crosses_whole_while_the_other_end_reads() -> None:
    ours, theirs = socket.socketpair()
    engine: Channel[ToEngine] = Channel(theirs, msgspec.msgpack.Decoder(ToEngine))
    server: AsyncChannel[FromEngine] = await AsyncChannel.over(ours, msgspec.msgpack.Decoder(FromEngine))
    request = Submit("big", list(range(400_000)), SamplingParams())
    server.send(request)
    received: list[ToEngine] = []
    while not received:
        received += engine.poll()
        await asyncio.sleep(0)
    assert received == [request]
    sending = asyncio.to_thread(engine.send, Progress("y" * 3_000_000))
    message, _ = await asyncio.gather(server.receive(), sending)
    assert isinstance(message, Progress)
    assert len(message.text) == 3_000_000
    await server.close()
    engine.close()


async def test_the_asynchronous_end_refuses_what_is_not_a_message() -> None:
    ours, theirs = socket.socketpair()
    server: AsyncChannel[FromEngine] = await AsyncChannel.over(ours, msgspec.msgpack.Decoder(FromEngine))
    theirs.sendall(struct.pack(">I", 1) + b"\xc1")
    with pytest.raises(WireError, match="unknown kind"):
        await server.receive()
    await server.close()
    theirs.close()
