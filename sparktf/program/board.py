"""What the tasks of a run tell each other: one small all-gather several times a second, as long as any of them runs.

Each round gives every task the same picture at the same time, so that all decide alike: which exchange between
children is complete, whether the servers may end, whether the whole run hangs. A task that is gone ends the round of
all others with an error; nothing of it passes through the driver.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from sparktf.transport import Communicator

RUNNING, SERVING, DONE = "running", "serving", "done"


@dataclass
class Notice:
    """What one task tells in a round.

    Attributes
    ----------
    state : {"running", "serving", "done"}
        Of its child. ``"serving"``: it only waits for others, in ``tf.distribute.Server.join``.
    idle : float
        Seconds since the child last made progress.
    wants : int
        Pieces of the data that the child has asked for so far.
    stream : bool
        It reads the data as a stream.
    posts : dict of str to str
        By the exchange's name, what this rank puts in, as hexadecimal digits.
    """

    state: str = RUNNING
    idle: float = 0.0
    wants: int = 0
    stream: bool = False
    posts: dict[str, str] = field(default_factory=dict)


class Board:
    """One rank's view of the board.

    Parameters
    ----------
    communicator : Communicator
        The tasks'.

    Attributes
    ----------
    news : bool
        Something was posted here since the last round: the next one should come soon.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._members: dict[str, tuple[int, ...]] = {}
        self._complete: dict[str, list[bytes]] = {}
        self.mine = Notice()
        self.news = False
        self.notices = [Notice() for _ in range(communicator.size)]

    def post(self, name: str, payload: bytes, members: Sequence[int]) -> None:
        """Put something in for an exchange among some ranks; each of them posts under the same name once."""
        self._members[name] = tuple(members)
        self.mine.posts[name] = payload.hex()
        self.news = True

    def take(self, name: str) -> list[bytes] | None:
        """Return what all members have posted, in their order; None as long as one is missing."""
        return self._complete.pop(name, None)

    def round(self) -> list[Notice]:
        """Meet all other tasks once; return everyone's notice.

        Raises
        ------
        TransportError
            A task is gone, or did not come in time.
        """
        self.news = False
        told = self._communicator.all_gather_bytes(json.dumps(asdict(self.mine)).encode())
        self.notices = [Notice(**json.loads(notice)) for notice in told]
        for name, members in list(self._members.items()):
            if all(name in self.notices[rank].posts for rank in members):
                self._complete[name] = [bytes.fromhex(self.notices[rank].posts[name]) for rank in members]
                # All members see it complete in this round, so that none needs it in the next.
                del self._members[name], self.mine.posts[name]
        return self.notices
