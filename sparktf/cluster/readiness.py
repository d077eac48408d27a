"""Ranks that get ready at different times: those that are show that they live, and notice who does not.

All of a group go through the same rounds until all are ready, however long that takes one of them; a round itself ends
within the communicator's timeout.
"""

from __future__ import annotations

from collections.abc import Callable

from sparktf.distribute.group import Group

# What a node may take to start, to import TensorFlow above all, beyond the job's timeout.
START_SECONDS = 120.0
_NOT_YET, _READY = b"", b"!"


def not_ready_yet(group: Group) -> None:
    """Take part in a round while this rank has nothing to put in. Call it well within the timeout, again and again."""
    group.all_gather_bytes(_NOT_YET)


def gather_when_ready(group: Group, mine: bytes = b"", alive: Callable[[], None] = lambda: None) -> list[bytes]:
    """Return what each rank has put in, as soon as all have.

    Parameters
    ----------
    group : Group
    mine : bytes
    alive : callable
        Called after every round in which a rank was not ready.
    """
    while not all(everyones := group.all_gather_bytes(_READY + mine)):
        alive()
    return [told[len(_READY) :] for told in everyones]
