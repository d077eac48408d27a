import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.errors import PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.framing import FrameReader, pack_frame, recv_frame, send_frame


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3_000_000])
def test_a_frame_arrives_as_it_was_sent(pair, size):
    left, right = pair
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    thread = threading.Thread(target=send_frame, args=(left, 7, memoryview(payload), 5))
    thread.start()
    assert recv_frame(right, 5, size) == (7, payload)
    thread.join(5)


def test_a_frame_over_the_limit_is_refused_before_it_is_read(pair):
    left, right = pair
    send_frame(left, 1, bytes(100), 1)
    with pytest.raises(TransportError, match="at most 99 bytes"):
        recv_frame(right, 1, 99)


def test_waiting_for_a_frame_ends_at_the_timeout(pair):
    with pytest.raises(TransportTimeoutError):
        recv_frame(pair[1], 0.05, 10)


def test_sending_to_a_peer_that_does_not_read_ends_at_the_timeout(pair):
    with pytest.raises(TransportTimeoutError):
        send_frame(pair[0], 1, bytes(20_000_000), 0.1)


def test_a_connection_that_closes_within_a_frame_is_a_lost_peer(pair):
    left, right = pair
    left.sendall(pack_frame(1, b"whole")[:-2])
    left.close()
    with pytest.raises(PeerLostError, match="2 of 5 bytes"):
        recv_frame(right, 1, 10)


@given(
    frames=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=6),
    cuts=st.lists(st.integers(1, 30), min_size=1),
)
def test_a_reader_gives_the_same_frames_however_the_stream_is_cut(frames, cuts):
    stream = b"".join(pack_frame(kind, payload) for kind, payload in frames)
    reader, got, turn = FrameReader(100), [], 0
    while stream:
        size = cuts[turn % len(cuts)]
        got += reader.feed(stream[:size])
        stream, turn = stream[size:], turn + 1
    assert got == frames
