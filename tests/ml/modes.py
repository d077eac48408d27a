"""The two modes of training, for tests of what holds in both."""

from __future__ import annotations

import pytest

# Without staleness the updates of asynchronous workers are those of one process too, so that the same can be asked of
# both. Each asynchronous fit starts processes, so that most of them are among the long tests.
_SYNC, _ASYNC = {"mode": "sync"}, {"mode": "async", "maxStaleness": 0}
in_both_modes = pytest.mark.parametrize(
    "mode", [pytest.param(_SYNC, id="sync"), pytest.param(_ASYNC, id="async", marks=pytest.mark.long)]
)
