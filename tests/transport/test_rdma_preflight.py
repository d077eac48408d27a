"""What asking for RDMA says where it cannot be had; what needs a device is in ``tests/rdma``."""

import enum
import multiprocessing
import os
import resource
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import HandshakeError, ParamError, ProtocolError, TransportError  # noqa: E402
from sparktf.transport import Settings, rdma, rdma_adapter, rdma_device, rdma_fabric  # noqa: E402
from sparktf.transport.rdma_queue import Card, QueuePair  # noqa: E402
from sparktf.transport.testing import run_threads  # noqa: E402

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.fixture
def without_pyverbs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    rdma_device.load_verbs.cache_clear()
    yield
    rdma_device.load_verbs.cache_clear()


@pytest.mark.usefixtures("without_pyverbs")
def test_without_pyverbs_every_rank_is_told_what_to_install():
    outcomes = run_threads("rdma", 3, lambda comm: None)
    assert all(isinstance(outcome, ProtocolError) for outcome in outcomes)
    assert all("apt-get install python3-pyverbs" in str(outcome) for outcome in outcomes)


@pytest.mark.usefixtures("without_pyverbs")
def test_preflight_says_what_connecting_would():
    assert "pyverbs is not installed" in rdma.preflight(Settings())


def test_too_little_locked_memory_is_named_with_the_limit(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.setattr(rdma_device, "_may_lock_any", lambda: False)
    rdma_device.check_locked_memory(8 << 20)
    with pytest.raises(ProtocolError, match=r"needs 9 MiB of locked memory.*may lock: 8.0 MiB \(ulimit -l\)"):
        rdma_device.check_locked_memory(9 << 20)
    with pytest.raises(ProtocolError, match=r"needs 6 MiB of locked memory for its links, and 3 MiB for gradients"):
        rdma_device.check_locked_memory(6 << 20, 3 << 20)


class Opened:
    """In place of a device that could be opened."""

    def __init__(self, settings):
        pass

    def close(self):
        pass


def say_what_is_missing(soft, pipe):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, soft))
    if os.getuid() == 0:
        # Root may lock any amount.
        os.setuid(65534)
    rdma.Adapter = Opened
    pipe.send(rdma.preflight(Settings()))


@pytest.mark.parametrize(("soft", "said"), [(64 << 10, "protocol 'rdma' needs 8 MiB of locked memory"), (8 << 20, "")])
def test_preflight_knows_that_the_links_would_not_fit_into_locked_memory(soft, said):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=say_what_is_missing, args=(soft, theirs))
    child.start()
    assert ours.poll(60)
    missing = ours.recv()
    child.join(60)
    assert missing.startswith(said)
    assert bool(missing) == bool(said)


def broken_pyverbs(kind, text):
    """The modules that are imported, of which what they are asked first fails."""
    device = f"def get_device_list():\n    raise {kind}({text!r})\n"
    modules = dict.fromkeys(("addr", "cq", "enums", "mr", "pd", "qp", "wr"), "")
    return modules | {"__init__": "", "device": device, "pyverbs_error": "class PyverbsError(Exception):\n    pass\n"}


BINARY = "PyObject size changed, may indicate binary incompatibility. Expected 80 from C header, got 72"
OLDER = "module 'pyverbs.device' has no attribute 'Context'"


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"__init__": f"raise ValueError({BINARY!r})"}, BINARY),
        ({"__init__": "import os; os.no_such_function"}, "no_such_function"),
        (broken_pyverbs("AttributeError", OLDER), OLDER),
    ],
    ids=["ValueError", "AttributeError", "opening"],
)
def test_a_broken_pyverbs_ends_no_job_but_one_that_asked_for_it(modules, said, tmp_path, monkeypatch):
    (tmp_path / "pyverbs").mkdir()
    for name, text in modules.items():
        (tmp_path / "pyverbs" / f"{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    rdma_device.load_verbs.cache_clear()
    try:
        apart = [Settings(host_id="a"), Settings(host_id="b")]
        outcomes = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason), settings=apart)
        assert [outcome[0] for outcome in outcomes] == ["tcp", "tcp"]
        assert "no RDMA" in outcomes[0][1]
        outcomes = run_threads("rdma", 2, lambda comm: None)
        assert all(isinstance(outcome, ProtocolError) for outcome in outcomes)
        assert said in str(outcomes[0])
        assert said in rdma.preflight(Settings())
    finally:
        rdma_device.load_verbs.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]:
            del sys.modules[name]


def refuse(*_):
    raise VerbsError("no more of them")


class VerbsError(Exception):
    pass


def test_a_device_that_refuses_a_channel_is_named():
    adapter = SimpleNamespace(name="mlx5_0", context=None)
    adapter.verbs = SimpleNamespace(cq=SimpleNamespace(CompChannel=refuse), Error=VerbsError)
    with pytest.raises(TransportError, match="making a completion channel on mlx5_0 failed: no more of them"):
        rdma_adapter.open_channel(adapter)


def test_a_device_that_refuses_a_receive_request_says_so():
    pair = QueuePair.__new__(QueuePair)
    pair._error, pair._receive, pair._pair = VerbsError, None, SimpleNamespace(post_recv=refuse)
    with pytest.raises(TransportError, match="refuses a receive request: no more of them"):
        pair.receive()


class PortState(enum.IntEnum):
    IBV_PORT_DOWN = 1
    IBV_PORT_ACTIVE = 4


def test_constants_are_found_in_the_module_and_in_its_enumerations():
    # As an older Cython makes them, and as a newer one does.
    older = SimpleNamespace(**PortState.__members__, __name__="pyverbs.enums", other=7)
    newer = SimpleNamespace(ibv_port_state=PortState, IBV_WC_STANDARD_FLAGS=127, size_t=int)
    assert vars(rdma_device.constants(older)) == {"IBV_PORT_DOWN": 1, "IBV_PORT_ACTIVE": 4}
    assert vars(rdma_device.constants(newer)) == {
        "IBV_PORT_DOWN": 1,
        "IBV_PORT_ACTIVE": 4,
        "IBV_WC_STANDARD_FLAGS": 127,
    }


def gid(index, text, kind="v2", port=1):
    return SimpleNamespace(gid_index=index, port_num=port, gid_type=kind, text=text)


@pytest.mark.parametrize(
    ("entries", "best"),
    [
        ([gid(0, "fe80::1"), gid(1, "0000:0000:0000:0000:0000:ffff:0a4d:0001")], 1),
        ([gid(0, "0000:0000:0000:0000:0000:ffff:0a4d:0001", "v1"), gid(1, "fe80::1", "v1"), gid(2, "fe80::1")], 2),
        ([gid(0, "fe80::1", "ib")], 0),
        ([gid(0, "0000:0000:0000:0000:0000:ffff:0a4d:0001", port=2), gid(3, "fe80::1")], 3),
    ],
)
def test_the_default_gid_is_one_of_roce_v2_and_of_an_ipv4_address(entries, best):
    texts = {(entry.port_num, entry.gid_index): entry.text for entry in entries}
    context = SimpleNamespace(query_gid_table=lambda _: entries, query_gid=lambda port, index: texts[port, index])
    verbs = SimpleNamespace(e=SimpleNamespace(IBV_GID_TYPE_ROCE_V2="v2"))
    assert rdma_device._best_gid(verbs, context, 1) == best


def test_the_environment_chooses_device_port_and_gid(monkeypatch):
    assert Settings.from_environment() == Settings()
    for name, value in (("DEVICE", "mlx5_1"), ("PORT", "2"), ("GID_INDEX", "3")):
        monkeypatch.setenv(f"SPARKTF_RDMA_{name}", value)
    assert Settings.from_environment() == Settings(rdma_device="mlx5_1", rdma_port=2, rdma_gid_index=3)


@pytest.mark.parametrize(("name", "value"), [("PORT", "0"), ("PORT", "one"), ("GID_INDEX", "-1"), ("DEVICE", "")])
def test_a_variable_that_cannot_be_meant_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(f"SPARKTF_RDMA_{name}", value)
    with pytest.raises(ParamError, match="Received"):
        Settings.from_environment()


def test_a_card_survives_its_way():
    card = Card(7, 1 << 23, "fe80::1", 0, 5, 1 << 46, 4711)
    assert Card.from_json(card.to_json()) == card


@given(JSON, st.sampled_from(sorted(Card.__dataclass_fields__)))
def test_what_is_no_card_is_refused(value, field):
    card = Card(7, 1 << 23, "fe80::1", 0, 5, 1 << 46, 4711).to_json()
    if type(value) is type(card[field]):
        return
    with pytest.raises(HandshakeError, match="card"):
        rdma_fabric._read_card({"card": {**card, field: value}}, 0)
    with pytest.raises(HandshakeError, match="card"):
        rdma_fabric._read_card({"card": value}, 0)
