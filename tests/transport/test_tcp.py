import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from counting import made_by_three

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf import transport  # noqa: E402
from sparktf.errors import HandshakeError, PeerLostError, TransportError, TransportTimeoutError  # noqa: E402
from sparktf.transport import Settings, doorman, guard, mesh  # noqa: E402
from sparktf.transport.dial import reach  # noqa: E402
from sparktf.transport.doorman import Group  # noqa: E402
from sparktf.transport.testing import (  # noqa: E402
    SECRET,
    MemoryExchange,
    TransportConformance,
    processes,
    results_of_threads,
    run_threads,
)
from sparktf.transport.wire import pack_header  # noqa: E402


class TestTcp(TransportConformance):
    protocol = "tcp"


def pair(exchange_of, timeout=90.0):
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
        thread.join(120)
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


def test_peers_come_through_once_strangers_that_took_all_the_room_have_timed_out(monkeypatch):
    monkeypatch.setattr(doorman, "_MOST_HANDSHAKES", 3)
    monkeypatch.setattr(doorman, "_STRANGER_SECONDS", 0.3)
    meeting = MemoryExchange(2)
    strangers = []

    def disturbed(rank):
        def exchange(entry):
            entries = meeting.of(rank)(entry)
            if rank == 1:
                card = json.loads(entries[0])
                strangers.extend(socket.create_connection((card["host"], card["port"]), 5) for _ in range(7))
            return entries

        return exchange

    begin = time.monotonic()
    assert pair(disturbed) == [[2.0] * 3] * 2
    assert 0.5 < time.monotonic() - begin < 3
    for stranger in strangers:
        stranger.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("sparktf-")]


def test_a_rank_that_dies_before_it_connects_is_named_long_before_the_timeout():
    meeting = MemoryExchange(2)

    def half(rank):
        def exchange(entry):
            entries = meeting.of(rank)(entry)
            if rank == 1:
                raise TransportError("dies here")
            return entries

        return exchange

    begin = time.monotonic()
    first, second = pair(half, timeout=30.0)
    assert time.monotonic() - begin < 2
    assert isinstance(first, PeerLostError)
    assert first.peer == 1
    assert str(second) == "dies here"


def fork_and_wait(comm):
    """As a program does that loads its data in forked processes; rank 0 only waits."""
    if comm.rank == 1 and os.fork() == 0:
        time.sleep(10)
        os._exit(0)
    comm.barrier()
    comm.recv(1 - comm.rank, np.ones(4))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_process_is_reported_at_once_where_processes_that_it_forked_live_on(tmp_path):
    with processes("tcp", 2, fork_and_wait, tmp_path, timeout=30.0) as ranks:
        for rank in ranks:
            assert rank.report()["event"] == "connected"
        time.sleep(1.0)
        begin = time.monotonic()
        ranks[1].signal(signal.SIGKILL)
        failure = ranks[0].report()
    assert (failure["error"], failure["peer"]) == ("PeerLostError", 1)
    assert failure["at"] - begin < 2


def test_a_rank_that_listens_and_does_not_come_is_named_at_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        meeting = MemoryExchange(2)

        def absent(rank):
            def exchange(entry):
                if rank == 0:
                    return meeting.of(rank)(entry)
                card = json.loads(entry) | {"port": listener.getsockname()[1]}
                meeting.of(rank)(json.dumps(card).encode())
                raise TransportError("stays away")

            return exchange

        first, _ = pair(absent, timeout=1.5)
    assert isinstance(first, TransportTimeoutError)
    assert "rank(s) 1" in str(first)


@pytest.mark.parametrize(("tls", "words"), [(False, False), (False, True), (True, True)])
def test_a_rank_that_dies_while_others_still_connect_is_reported_by_all_others(tls, words, monkeypatch):
    # Rank 1 has connected to rank 0 when it ends, and rank 2 is late; rank 3 has connected to both.
    connected, ended, begin = threading.Event(), threading.Event(), []
    reach = mesh.reach

    def staged(address, group, channel, peer):
        if group.rank == 2:
            connected.wait(10)
            ended.wait(10)
            time.sleep(1.0)
        return reach(address, group, channel, peer)

    def next_peer(waiting, missing, seconds):
        if waiting._group.rank == 1:
            connected.set()
            begin.append(time.monotonic())
            raise TransportError("the disk is full")
        return plain_next(waiting, missing, seconds)

    def tell(dying, error):
        if dying.rank == 1:
            ended.set()
        if words or dying.rank != 1:
            plain_tell(dying, error)

    plain_next, plain_tell = doorman.Doorman.next, mesh.Mesh._tell
    monkeypatch.setattr(mesh, "reach", staged)
    monkeypatch.setattr(doorman.Doorman, "next", next_peer)
    monkeypatch.setattr(mesh.Mesh, "_tell", tell)
    outcomes = run_threads("tcp", 4, lambda comm: comm.barrier(), timeout=30.0, settings=[Settings(tls=tls)] * 4)
    assert time.monotonic() - begin[0] < 4
    for outcome in (outcomes[0], outcomes[3]):
        assert isinstance(outcome, PeerLostError)
        assert outcome.peer == 1
    assert not words or outcomes[0].reason == "rank 1: the disk is full"
    # So late that the first it meets has given up as well.
    assert isinstance(outcomes[2], PeerLostError)
    assert outcomes[2].peer == 0


@pytest.mark.parametrize("tls", [False, True])
def test_a_rank_that_has_nothing_to_do_may_leave_while_others_still_connect(tls, monkeypatch):
    reach = mesh.reach

    def staged(address, group, channel, peer):
        if group.rank == 2 and peer == 1:
            time.sleep(1.0)
        return reach(address, group, channel, peer)

    def main(comm):
        if comm.rank == 0:
            return None
        # By now rank 0 is known to have left.
        time.sleep(0.5)
        comm.send(3 - comm.rank, np.full(4, comm.rank))
        return comm.recv(3 - comm.rank, np.zeros(4, int)).tolist()

    monkeypatch.setattr(mesh, "reach", staged)
    assert results_of_threads("tcp", 3, main, settings=[Settings(tls=tls)] * 3) == [None, [2] * 4, [1] * 4]


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
        thread.join(120)
    assert outcomes == [[b"\0", b"\1"]] * 2
    assert meeting.calls == [1, 1]


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ranks_meet_on_an_address_of_ipv6(host):
    if not Path("/proc/sys/net/ipv6").exists():
        pytest.skip("this kernel has no IPv6")
    meeting = MemoryExchange(2)
    outcomes = [None, None]

    def main(rank):
        with transport.connect(
            "tcp", rank=rank, size=2, exchange=meeting.of(rank), secret=SECRET, timeout=5, host=host
        ) as communicator:
            outcomes[rank] = communicator.all_reduce(np.ones(3)).tolist()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert outcomes == [[2.0] * 3] * 2


def test_a_stray_of_an_earlier_attempt_does_not_end_a_healthy_connect():
    meeting = MemoryExchange(2)
    refused = []

    def disturbed(rank):
        def exchange(entry):
            entries = meeting.of(rank)(entry)
            if rank == 1:
                card = json.loads(entries[0])
                earlier = Group(1, 2, "an earlier attempt's", SECRET, time.monotonic() + 5)
                # Before rank 1 itself comes.
                with pytest.raises(HandshakeError, match="job") as caught:
                    reach((card["host"], card["port"]), earlier, "data", 0)
                refused.append(str(caught.value))
                time.sleep(0.3)
            return entries

        return exchange

    assert pair(disturbed) == [[2.0] * 3] * 2
    assert "an earlier attempt's" in refused[0]


def test_a_rank_that_only_a_stray_has_called_says_so_at_the_timeout():
    group = Group(0, 2, "this attempt's", SECRET, time.monotonic() + 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener, doorman.Doorman(listener, group) as waiting:
        with pytest.raises(HandshakeError):
            reach(listener.getsockname(), replace(group, rank=1, job="an earlier attempt's"), "data", 0)
        with pytest.raises(TransportTimeoutError, match=r"Last refused: .*with job .an earlier attempt's"):
            waiting.next({1}, 10.0)


def test_two_groups_with_the_same_secret_do_not_mix():
    outcomes = [None, None]

    def group(number):
        outcomes[number] = run_threads("tcp", 3, lambda comm: float(comm.all_reduce(np.full(200_000, number))[-1]))

    threads = [threading.Thread(target=group, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert outcomes == [[0.0] * 3, [3.0] * 3]


def test_bytes_are_counted_as_the_ring_promises():
    length = 1_000_000

    def main(comm):
        comm.all_reduce(np.ones(length, np.float32))
        return comm.stats

    for stats in results_of_threads("tcp", 4, main):
        assert stats.bytes_sent == stats.bytes_received == 2 * 3 * length
        assert stats.operations == 1
        assert stats.seconds > 0


@pytest.mark.parametrize("tls", [False, True])
def test_what_a_connection_receives_into_is_counted(tls):
    made = made_by_three("tcp", lambda comm: comm.all_reduce(np.ones(300_000)), settings=[Settings(tls=tls)] * 2)
    assert made == [[1] * 3] * 2


def test_an_operation_that_moves_without_end_is_ended_and_names_the_rank_that_drips(monkeypatch):
    monkeypatch.setattr(guard, "LONGEST_TIMEOUTS", 2)
    array = np.zeros(100_000, np.uint8)

    def main(comm):
        if comm.rank == 0:
            begin = time.monotonic()
            with pytest.raises(
                TransportTimeoutError, match=r"recv from rank 1 \(operation 1\), waiting for rank 1: .*2 times"
            ):
                comm.recv(1, array)
            return time.monotonic() - begin
        sock = comm._links[0]._sock
        with suppress(OSError):
            sock.sendall(pack_header("send", array, 1))
            # Each byte long before the timeout.
            for _ in range(200):
                sock.sendall(b"x")
                time.sleep(0.1)
        return None

    took, _ = run_threads("tcp", 2, main, timeout=1.5)
    assert 3 < took < 8


@pytest.mark.parametrize("size", [6, 9])
def test_a_larger_world_reduces_both_small_and_large(size):
    def main(comm):
        return [comm.all_reduce(np.ones(length))[-1] for length in (1, 5_000, 50_000, 600_000)]

    assert results_of_threads("tcp", size, main) == [[size] * 4] * size


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
