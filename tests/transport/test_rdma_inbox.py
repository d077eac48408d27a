"""The receiving half of an RDMA link, against a sender that keeps to the rules; no device is needed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparktf.transport.rdma_inbox import (
    CREDIT,
    DATA,
    OFFER,
    PLACED,
    SLOTS,
    Inbox,
    aligned,
    pack_immediate,
    pack_offer,
    unpack_immediate,
)

SLOT_BYTES = 256


class Sender:
    """Writes fragments into an inbox's slots, as far as they are free."""

    def __init__(self, memory, inbox):
        self.memory, self.inbox, self.sent, self.freed = memory, inbox, 0, 0

    def has_room(self):
        self.freed += self.inbox.owed
        self.inbox.owed = 0
        return self.sent - self.freed < SLOTS

    def write(self, kind, data):
        assert self.has_room()
        start = self.sent % SLOTS * SLOT_BYTES
        self.memory[start : start + len(data)] = np.frombuffer(data, np.uint8)
        self.sent += 1
        self.inbox.arrive(kind, len(data))


def pair():
    memory = np.zeros(SLOTS * SLOT_BYTES, np.uint8)
    inbox = Inbox(memory)
    return Sender(memory, inbox), inbox


@given(st.sampled_from([CREDIT, DATA, OFFER, PLACED]), st.integers(0, 2 * SLOTS))
def test_an_immediate_carries_kind_and_credits(kind, credits):
    immediate = pack_immediate(kind, credits)
    assert 0 <= immediate < 1 << 32
    assert unpack_immediate(immediate) == (kind, credits)


@given(
    st.lists(
        st.tuples(st.sampled_from([DATA, DATA, OFFER, PLACED]), st.integers(1, SLOT_BYTES), st.booleans()), max_size=60
    )
)
def test_fragments_are_read_in_order_and_every_slot_is_given_back(fragments):
    sender, inbox = pair()
    unread = []

    def read_one():
        kind, data, borrow = unread.pop(0)
        target = bytearray(len(data))
        if borrow and kind == DATA:
            lent = inbox.lend(len(data))
            target[:] = lent
            inbox.give_back()
        else:
            assert inbox.read(memoryview(target)) == len(data)
        # What is placed is not in the slot, and nothing of it is copied.
        assert target == (data if kind == DATA else bytes(len(data)))

    offered = []
    for number, (kind, length, borrow) in enumerate(fragments):
        while not sender.has_room():
            read_one()
        if kind == OFFER:
            offered.append((number << 20, number))
            sender.write(OFFER, pack_offer(offered[-1]))
        else:
            data = bytes([number % 251 + 1]) * length
            sender.write(kind, data)
            unread.append((kind, data, borrow))
    while unread:
        read_one()
    assert list(inbox.offers) == offered
    assert not inbox.ready
    sender.has_room()
    assert sender.freed == sender.sent


def test_pieces_that_share_a_fragment_begin_aligned():
    sender, inbox = pair()
    header, body = b"h" * 40, b"b" * 100
    sender.write(DATA, header + bytes(aligned(40) - 40) + body)
    first = bytearray(40)
    assert inbox.read(memoryview(first)) == 40
    assert first == header
    assert bytes(inbox.lend(100)) == body
    assert inbox.owed == 0
    inbox.give_back()
    assert inbox.owed == 1


def test_what_is_not_in_one_fragment_is_not_lent():
    sender, inbox = pair()
    sender.write(DATA, b"x" * 100)
    assert inbox.lend(101) is None
    assert inbox.lend(100) is not None
