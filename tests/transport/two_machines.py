"""A backend for the conformance suite: ``auto`` where ranks believe to be on two machines, dealt in turn."""

from sparktf.transport import auto
from sparktf.transport.settings import Settings


def connect(*, rank, settings, **arguments):
    return auto.connect(rank=rank, settings=Settings(host_id="left" if rank % 2 == 0 else "right"), **arguments)
