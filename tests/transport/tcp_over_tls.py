"""A backend for the conformance suite: ``tcp`` with encryption."""

from sparktf.transport import tcp
from sparktf.transport.settings import Settings


def connect(*, settings, **arguments):
    return tcp.connect(settings=Settings(tls=True), **arguments)
