"""A table that no process could hold alone."""

from __future__ import annotations

from pathlib import Path

import limited_ranks
import pytest

from sparktf.transport.testing.worlds import processes


@pytest.mark.long
def test_a_table_of_four_times_the_memory_of_a_process_trains(tmp_path: Path) -> None:
    with processes("tcp", limited_ranks.RANKS, limited_ranks.train_within_the_limit, tmp_path, 240.0) as ranks:
        for rank in ranks:
            assert rank.report(120.0) == {"event": "connected"}
        codes = [rank.exit_code(500.0) for rank in ranks]
        for rank, code in zip(ranks, codes, strict=True):
            if code == 0:
                # It has said no more: the end of what it says is all that there is.
                with pytest.raises(EOFError):
                    raise AssertionError(rank.report(1.0))
    assert codes == [0] * limited_ranks.RANKS


@pytest.mark.long
def test_one_process_alone_says_that_it_does_not_fit(tmp_path: Path) -> None:
    with processes("tcp", 1, limited_ranks.train_alone_within_the_limit, tmp_path, 240.0) as (rank,):
        assert rank.report(120.0) == {"event": "connected"}
        failed = rank.report(240.0)
    assert failed["error"] == "ParamError"
    assert "Expected a table whose part fits this node's memory, received 1,048,576 of" in failed["message"]
