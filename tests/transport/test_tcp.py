import json
import socket
import threading
import time

import numpy as np
import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf import transport  # noqa: E402
from sparktf.errors import HandshakeError, TransportError, TransportTimeoutError  # noqa: E402
from sparktf.transport.doorman import Group  # noqa: E402
from sparktf.transport.testing import (  # noqa: E402
    SECRET,
    MemoryExchange,
    TransportConformance,
    run_threads,
)


class TestTcp(TransportConformance):
    protocol = "tcp"


def pair(exchange_of, timeout=5.0):
    """Connect two ranks, each with ``exchange_of(rank)``; return their sums, or what they raised."""
    outcomes = [None, None]

    def main(rank):
        try:
            with transport.connect(
                "tcp",
                rank=rank,
                size=2,
                exchange=exchange_of(rank),
                secret=SECRET,
                timeout=timeout,
                host="127.0.0.1",
            ) as communicator:
                outcomes[rank] = communicator.all_reduce(np.ones(3)).tolist()
        except TransportError as exc:
            outcomes[rank] = exc

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def test_strangers_neither_block_nor_kill_the_listener():
    meeting = MemoryExchange(2)
    strangers = []

    def disturbed(rank):
        def exchange(entry):
            entries = meeting.of(rank)(entry)
            if rank == 1:
                card = json.loads(entries[0])
                # They come before rank 1 does: one in garbage, one hanging up, twenty silent.
                for number in range(22):
                    stranger = socket.create_connection((card["host"], card["port"]), 5)
                    strangers.append(stranger)
                    if number == 0:
                        stranger.sendall(b"\x00\xffGET / HTTP/1.1\r\n\r\n")
                    elif number == 1:
                        stranger.close()
            return entries

        return exchange

    begin = time.monotonic()
    assert pair(disturbed) == [[2.0] * 3] * 2
    assert time.monotonic() - begin < 3
    for stranger in strangers:
        stranger.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("sparktf-")]


def test_a_rank_that_dies_before_it_connects_is_named():
    meeting = MemoryExchange(2)

    def half(rank):
        def exchange(entry):
            entries = meeting.of(rank)(entry)
            if rank == 1:
                raise TransportError("dies here")
            return entries

        return exchange

    first, second = pair(half, timeout=0.5)
    assert isinstance(first, TransportTimeoutError)
    assert "rank(s) 1" in str(first)
    assert str(second) == "dies here"


@pytest.mark.parametrize("entry", [b"", b"not json", b"[]", b'{"rank": 0, "size": 3, "host": "x", "port": 1}'])
def test_an_exchange_that_returns_something_else_is_refused(entry):
    outcomes = pair(lambda rank: lambda own: [own, entry] if rank == 0 else [entry, own], timeout=1.0)
    assert all(isinstance(outcome, TransportError) for outcome in outcomes)


def test_an_address_that_is_not_ours_is_an_error_that_says_what_to_pass():
    with pytest.raises(TransportError, match="host="):
        transport.connect("tcp", rank=0, size=2, exchange=lambda entry: [entry] * 2, secret=b"s", host="192.0.2.1")


def test_the_default_address_connects():
    meeting = MemoryExchange(2)
    outcomes = [None, None]

    def main(rank):
        with transport.connect(
            "tcp", rank=rank, size=2, exchange=meeting.of(rank), secret=SECRET, timeout=5
        ) as communicator:
            outcomes[rank] = communicator.all_gather_bytes(bytes([rank]))

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == [[b"\0", b"\1"]] * 2
    assert meeting.calls == [1, 1]


def test_two_groups_with_the_same_secret_do_not_mix():
    outcomes = [None, None]

    def group(number):
        outcomes[number] = run_threads("tcp", 3, lambda comm: float(comm.all_reduce(np.full(200_000, number))[-1]))

    threads = [threading.Thread(target=group, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == [[0.0] * 3, [3.0] * 3]


def test_bytes_are_counted_as_the_ring_promises():
    length = 1_000_000

    def main(comm):
        comm.all_reduce(np.ones(length, np.float32))
        return comm.stats

    for stats in run_threads("tcp", 4, main):
        assert stats.bytes_sent == stats.bytes_received == 2 * 3 * length
        assert stats.operations == 1
        assert stats.seconds > 0


@pytest.mark.parametrize("size", [6, 9])
def test_a_larger_world_reduces_both_small_and_large(size):
    def main(comm):
        return [comm.all_reduce(np.ones(length))[-1] for length in (1, 5_000, 50_000, 600_000)]

    assert run_threads("tcp", size, main) == [[size] * 4] * size


def test_the_listener_is_bound_to_its_address_and_closed_once_all_are_here():
    meeting = MemoryExchange(2)
    cards = []

    def watched(rank):
        def exchange(entry):
            entries = meeting.of(rank)(entry)
            cards[:] = [json.loads(card) for card in entries]
            # Everybody listens by now, on the loopback address that was asked for and no other.
            own = cards[rank]
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", own["port"]), 5)
            return entries

        return exchange

    assert pair(watched) == [[2.0] * 3] * 2
    for card in cards:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((card["host"], card["port"]), 5)


@pytest.mark.parametrize(
    ("name", "value"), [("job", "an earlier attempt's"), ("size", 4), ("version", "0.0.1"), ("rank", 3), ("rank", "1")]
)
def test_a_peer_that_holds_the_secret_but_belongs_elsewhere_is_refused_by_what_differs(name, value):
    group = Group(rank=0, size=3, job="this attempt's", secret=SECRET, deadline=time.monotonic() + 5)
    theirs = Group(rank=1, size=3, job="this attempt's", secret=SECRET, deadline=0).identity("data", 0)
    assert group.check(theirs) == 1
    with pytest.raises(HandshakeError, match=f"{name}.*Received"):
        group.check(theirs | {name: value})
