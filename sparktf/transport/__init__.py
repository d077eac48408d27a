"""Bytes and arrays between the processes of one job; knows neither Spark nor TensorFlow.

The words used here:

communicator
    A process's handle on its group: collectives and point-to-point transfers over one protocol.
rank, size
    A process's number in the group, ``0 <= rank < size``, and how many there are (the world size).
collective
    An operation that every rank calls, in the same order and with matching arguments.
protocol
    How bytes travel, by a short name (``"tcp"``). ``"auto"`` picks one and logs which and why.
exchange
    The rendezvous: a function ``bytes -> list[bytes]`` that gives every rank what all ranks put in,
    ordered by rank. Spark's barrier all-gather is one. Addresses travel through it, tensors never.
secret
    Bytes that only the processes of this job know. Both ends of every connection prove that they have it;
    what travels afterwards is not encrypted.
shard
    The part of an array that one rank holds after a reduce-scatter, bounded as ``numpy.array_split`` does.
timeout
    Seconds without progress after which an operation fails. A slow operation that moves is never cut off.

After an operation has failed the communicator is dead: what its connections hold is unknown, so every later
operation raises too. Close it and connect again.
"""

from sparktf.transport.contract import Communicator, Stats
from sparktf.transport.registry import connect, protocols
from sparktf.transport.settings import Settings

__all__ = ["Communicator", "Settings", "Stats", "connect", "protocols"]
