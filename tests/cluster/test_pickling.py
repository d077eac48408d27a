"""What cannot go to the nodes is named, and what can is pickled once."""

from __future__ import annotations

import pickle
import threading

import pytest

from sparktf.cluster.pickling import pickled
from sparktf.errors import ParamError


class Counted:
    """Counts how often it is pickled."""

    times = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        type(self).times += 1
        return Counted, ()


def test_what_can_be_pickled_is_pickled_once() -> None:
    main = Counted()
    assert isinstance(pickle.loads(pickled((main, 1), {"main": main, "args": 1}))[0], Counted)
    assert Counted.times == 1


def test_the_part_that_cannot_be_pickled_is_named() -> None:
    main, args = Counted(), threading.Lock()
    with pytest.raises(ParamError, match=r"^args: expected what can be pickled .* received TypeError: .*lock"):
        pickled((main, args), {"main": main, "args": args})


def test_where_no_part_is_at_fault_all_are_named() -> None:
    with pytest.raises(ParamError, match=r"^main or args: expected what can be pickled"):
        pickled(threading.Lock(), {"main": 1, "args": 2})
