import logging

import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf import transport  # noqa: E402
from sparktf.errors import HandshakeError, ParamError, ProtocolError  # noqa: E402
from sparktf.transport.doorman import Group  # noqa: E402
from sparktf.transport.testing import SECRET, results_of_threads  # noqa: E402


def connect(protocol="tcp", **changes):
    arguments = {"rank": 0, "size": 1, "exchange": lambda entry: [entry], "secret": b"secret", **changes}
    return transport.connect(protocol, **arguments)


def test_an_unknown_protocol_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ProtocolError, match=r"'auto', 'tcp'.*carrier pigeon"):
        connect("carrier pigeon")


@pytest.mark.parametrize("target", ["no_such_package:connect", "sparktf.transport:no_such_function", ":connect"])
def test_a_backend_that_cannot_be_imported_is_an_error_that_says_why(target):
    with pytest.raises(ProtocolError, match=r"Received: .*Is the package installed on every node\?"):
        connect(target, size=2)


def test_the_name_that_others_have_for_rdma_is_understood():
    with connect("grpc_rdma") as communicator:
        assert communicator.protocol == "rdma"


def test_auto_says_what_it_picked_and_why(caplog):
    with caplog.at_level(logging.INFO, "sparktf.transport"), connect("auto") as communicator:
        assert communicator.protocol == "tcp"
    assert "'auto' is 'tcp': " in caplog.text


def test_the_exchange_is_called_once_in_a_world_of_one():
    calls = []
    connect(exchange=lambda entry: calls.append(entry) or [entry]).close()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 1},
        {"rank": -1},
        {"size": 0},
        {"secret": b""},
        {"secret": "text"},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"host": "0.0.0.0"},
    ],
    ids=str,
)
def test_an_argument_that_cannot_work_is_refused(changes):
    with pytest.raises(ParamError, match="Received"):
        connect(**changes)


def test_an_exchange_of_another_world_is_refused():
    with pytest.raises(HandshakeError, match="Received: 2"):
        connect(exchange=lambda entry: [entry, entry])


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_nothing_that_could_be_logged_shows_the_secret(protocol):
    def main(comm):
        return repr(comm) + repr(vars(comm)) + repr(comm.another)

    group = Group(0, 2, "a job", SECRET, deadline=0.0)
    for shown in (*results_of_threads(protocol, 2, main), *results_of_threads(protocol, 1, main), repr(group)):
        assert "secret of tests" not in shown
