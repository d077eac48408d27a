"""What comes from a socket, made up: it is understood, or refused with the errors that callers expect."""

import json
import socket
import struct
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparktf.errors import HandshakeError, PeerLostError, TransportError
from sparktf.transport.framing import FrameReader, pack_frame
from sparktf.transport.handshake import accept, initiate
from sparktf.transport.lookout import Lookout
from sparktf.transport.mesh import _exchange_addresses
from sparktf.transport.segment import PATH_BYTES, Segment, pack_path, unpack_path
from sparktf.transport.survey import _parse
from sparktf.transport.watch import Watch
from sparktf.transport.wire import HEADER_BYTES, describe_header, header_rows, pack_header

SECRET = b"the secret of this job"
LIMIT = 1000

frames = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=LIMIT)), max_size=5)
# JSON of any shape, cut anywhere, and brackets enough to exhaust a parser's stack.
texts = st.one_of(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
    st.just(b"[" * 4000),
)


@given(frames, st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_frames_are_found_however_the_stream_is_cut(sent, cuts):
    stream = b"".join(pack_frame(kind, payload) for kind, payload in sent)
    reader, received, start, turn = FrameReader(LIMIT), [], 0, 0
    while start < len(stream):
        received += reader.feed(stream[start : start + cuts[turn % len(cuts)]])
        start += cuts[turn % len(cuts)]
        turn += 1
    assert received == sent


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_gives_frames_within_the_limit_or_is_refused(pieces):
    reader = FrameReader(LIMIT)
    with suppress(TransportError):
        for piece in pieces:
            assert all(len(payload) <= LIMIT for _, payload in reader.feed(piece))


@settings(deadline=None)
@given(
    side=st.sampled_from([accept, initiate]),
    data=st.binary(max_size=300)
    | frames.map(lambda sent: b"".join(pack_frame(kind, payload) for kind, payload in sent)),
)
@example(side=accept, data=pack_frame(1, bytes(32) + b"{}") + pack_frame(3, bytes(32)))
@example(side=initiate, data=pack_frame(2, bytes(32) + b"[" * 3000) + pack_frame(3, bytes(32)))
def test_a_handshake_with_garbage_is_refused_and_nothing_else(side, data):
    left, right = socket.socketpair()
    with left, right:
        left.sendall(data)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeError):
            side(right, SECRET, {"rank": 0}, time.monotonic() + 5)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.integers(1, 1 << 40))
@example(struct.pack("<HBBHxxQQQ", 0x5F54, 2, 1, 0, 1, (1 << 64) - 1, 0), 8)
def test_any_header_can_be_put_into_words_and_announces_no_more_than_it_says(header, row_bytes):
    assert isinstance(describe_header(header), str)
    nbytes = int.from_bytes(header[-8:], "little")
    assert header_rows(header, row_bytes) * row_bytes in (0, nbytes)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 60), st.integers(1, 1 << 10))
def test_a_header_announces_the_rows_that_were_packed(number, rows, row_bytes):
    rows = min(rows, (1 << 63) // row_bytes)
    array = np.empty(0, np.uint8)
    header = pack_header("all_gather", array, number, rows=rows, nbytes=rows * row_bytes)
    assert header_rows(header, row_bytes) == rows


@given(st.integers(0, 255), texts)
def test_facts_are_a_dictionary_or_refused(kind, payload):
    with suppress(HandshakeError):
        assert isinstance(_parse(kind, payload, 1), dict)


@given(texts)
@example(b'{"rank": 1, "size": 2, "host": "x", "port": 1e999, "protocol": "tcp"}')
@example(b'{"rank": 1, "size": 2, "host": "x", "port": 1, "protocol": "shm"}')
def test_an_address_of_another_kind_is_refused(entry):
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(HandshakeError):
        _exchange_addresses(0, 2, lambda own: [own, entry], listener, "tcp")


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=100) | st.tuples(st.integers(0, 6), texts).map(lambda frame: pack_frame(*frame)))
@example(pack_frame(1, b'{"peer": 1e999, "reason": ""}'))
def test_control_messages_that_cannot_be_read_are_a_failure_of_the_peer_and_not_of_the_watch(data):
    ours, theirs = _tcp_pair()
    failures, failed = [], threading.Event()

    def on_failure(peer, reason, told):
        failures.append((peer, reason, told))
        failed.set()

    watch = Watch({3: ours}, on_failure, lambda peer: None, lambda: "testing")
    watch.start()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        # After a goodbye an end is in order.
        assert 2 in kinds(data) or failed.wait(5)
    watch.stop()
    assert all(isinstance(reason, str) for _, reason, _ in failures)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=100) | st.tuples(st.integers(0, 6), texts).map(lambda frame: pack_frame(*frame)))
@example(pack_frame(1, b'{"peer": 1e999, "reason": ""}'))
@example(pack_frame(2, b""))
def test_the_last_words_of_a_peer_that_ends_while_others_connect_are_a_goodbye_or_a_loss(data):
    ours, theirs = _tcp_pair()
    left = set()
    with ours:
        with theirs:
            theirs.sendall(data)
        lost = []
        try:
            Lookout([], {3: ours}, left).look(set())
        except PeerLostError as exc:
            lost.append(exc.peer)
        assert left == (set() if lost else {3})
        assert all(isinstance(peer, int) for peer in lost)
        assert lost or 2 in kinds(data)


def kinds(data):
    with suppress(TransportError):
        return [kind for kind, _ in FrameReader(1 << 16).feed(data)]
    return []


def _tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


@given(st.binary(min_size=PATH_BYTES, max_size=PATH_BYTES))
def test_a_path_that_is_none_is_an_error_of_the_system(packed):
    with pytest.raises(OSError):  # noqa: PT011 - which one is the system's business
        Segment.attach(unpack_path(packed), 100)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60))
def test_a_path_survives_packing(path):
    assert unpack_path(pack_path(path)) == path
