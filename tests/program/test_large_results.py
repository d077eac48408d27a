"""Results of more bytes than a signed 32-bit number counts."""

from __future__ import annotations

from typing import Any

import programs
import psutil
import pytest

from sparktf import run

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("no_leftovers")]

_BYTES = (2 << 30) + 1000


def test_a_result_of_over_two_gigabytes_comes_whole(spark: Any) -> None:
    if psutil.virtual_memory().available < 5 * _BYTES:
        pytest.skip("needs 11 GB of memory: the node's array, its pickle and the driver's")
    small, large = run(programs.returns_much, [1000, _BYTES], spark=spark, num_workers=2)
    assert small.nbytes == 1000
    assert (large.nbytes, int(large.min()), int(large.max())) == (_BYTES, 2, 2)
