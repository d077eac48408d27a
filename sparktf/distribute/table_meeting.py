"""How ranks find each other for tables: a communicator for each two of them, in each direction, all at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from sparktf.errors import HandshakeError, TransportTimeoutError
from sparktf.transport import Communicator

Exchange = Callable[[bytes], list[bytes]]

# A rank that serves waits for requests as long as the others compute; one that dies is heard of at once.
_SERVING_SECONDS = 7 * 24 * 3600.0
_LOOK_SECONDS = 0.05


def connect_everyone(communicator: Communicator) -> tuple[dict[int, Communicator], dict[int, Communicator]]:
    """Connect each two ranks twice; every rank calls this.

    Parameters
    ----------
    communicator : Communicator
        The group's.

    Returns
    -------
    asking, serving : dict of int to Communicator
        By the other's rank. Who asks is rank 0 of the pair, who serves rank 1.

    Raises
    ------
    HandshakeError
        Some rank could not connect.
    TransportError
        A rank was lost.
    """
    rank = communicator.rank
    others = [peer for peer in range(communicator.size) if peer != rank]
    meeting = _Meeting([(rank, peer) for peer in others] + [(peer, rank) for peer in others])

    def join(pair: tuple[int, int]) -> Communicator:
        side = pair.index(rank)
        timeout = _SERVING_SECONDS if side else communicator.timeout
        return communicator.another(rank=side, size=2, exchange=meeting.exchange_of(pair), timeout=timeout)

    made = meeting.run(join, communicator)
    asking = {pair[1]: link for pair, link in made.items() if pair[0] == rank}
    return asking, {pair[0]: link for pair, link in made.items() if pair[1] == rank}


class _Meeting:
    """Threads that each connect a pair, and put what these exchange into one exchange of the group."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self._pairs = pairs
        self._news = threading.Condition()
        self._given: dict[str, str] = {}
        # By rank; of nobody where they could not be had.
        self._answers: dict[int, dict[str, str]] | None = None
        self._failed = False
        self._made: dict[tuple[int, int], Communicator] = {}
        self._errors: list[BaseException] = []

    def exchange_of(self, pair: tuple[int, int]) -> Exchange:
        """Return what a pair's `connect` calls, once."""
        name = f"{pair[0]} {pair[1]}"

        def exchange(payload: bytes) -> list[bytes]:
            with self._news:
                self._given[name] = payload.hex()
                self._news.notify_all()
                # run() sees to it that there is an answer, whatever happens.
                self._news.wait_for(lambda: self._answers is not None, _SERVING_SECONDS)
                told = [(self._answers or {}).get(side, {}).get(name) for side in pair]
            if None in told:
                raise HandshakeError("A rank could not open its end of a connection for sharded tables.")
            return [bytes.fromhex(part) for part in told if part is not None]

        return exchange

    def run(
        self, join: Callable[[tuple[int, int]], Communicator], communicator: Communicator
    ) -> dict[tuple[int, int], Communicator]:
        """Connect all pairs."""
        threads = [threading.Thread(target=self._join, args=(join, pair), daemon=True) for pair in self._pairs]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 2 * communicator.timeout
        try:
            self._answer(self._all_given(communicator))
            self._await(threads, communicator, deadline)
        except BaseException as error:
            self._give_up(f"{type(error).__name__}: {error}")
            raise
        return self._made

    def _all_given(self, communicator: Communicator) -> dict[int, dict[str, str]]:
        """Return what the pairs of each rank have to say."""
        with self._news:
            # One that fails before it has given anything is missed by its peer, which is told so.
            self._news.wait_for(lambda: len(self._given) + len(self._errors) >= len(self._pairs), communicator.timeout)
            mine = json.dumps(self._given).encode()
        return {rank: json.loads(told) for rank, told in enumerate(communicator.all_gather_bytes(mine))}

    def _answer(self, answers: dict[int, dict[str, str]]) -> None:
        with self._news:
            self._answers = self._answers or answers
            self._news.notify_all()

    def _give_up(self, reason: str) -> None:
        """Leave nothing connected: not what is, nor what is about to be."""
        self._answer({})
        with self._news:
            self._failed = True
            made = list(self._made.values())
        for link in made:
            link.abort(reason)

    def _await(self, threads: list[threading.Thread], communicator: Communicator, deadline: float) -> None:
        while any(thread.is_alive() for thread in threads) and not self._errors:
            # A rank that dies meanwhile is heard of here; the threads themselves would wait long.
            communicator.check()
            if time.monotonic() > deadline:
                missing = sorted({peer for pair in set(self._pairs) - set(self._made) for peer in pair})
                raise TransportTimeoutError(
                    f"Expected ranks {missing} to connect for sharded tables within twice {communicator.timeout:g} s "
                    "(timeout); they have not. Raise timeout where nodes are that slow."
                )
            for thread in threads:
                thread.join(_LOOK_SECONDS / len(threads))
        if self._errors:
            raise self._errors[0]

    def _join(self, join: Callable[[tuple[int, int]], Communicator], pair: tuple[int, int]) -> None:
        try:
            link = join(pair)
        except BaseException as error:  # raised again by run()
            with self._news:
                self._errors.append(error)
                self._news.notify_all()
            return
        with self._news:
            self._made[pair] = link
            late = self._failed
        if late:
            link.abort("connecting for sharded tables has failed")
