"""What a node holds once its rows are spooled, whichever way it trains then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import Spool
from sparktf.transport import Communicator


@dataclass(frozen=True)
class SpooledNode:
    """A node with its rows.

    Parameters
    ----------
    specs : list of ColumnSpec
        Of the columns of the feed.
    spool : Spool
        Of a parameter server, without rows.
    communicator : Communicator
        Of all tasks.
    host : str
        The address of this node that the others reach.
    threads : int
        TensorFlow's.
    report : callable or None
        Receives progress; with an empty dict, that the node goes on.
    """

    specs: list[ColumnSpec]
    spool: Spool
    communicator: Communicator
    host: str
    threads: int
    report: Callable[[dict[str, Any]], None] | None

    @property
    def rank(self) -> int:
        """The node's."""
        return self.communicator.rank

    def alive(self) -> None:
        """Tell that this node goes on, in a phase that has no progress to report."""
        if self.report is not None:
            self.report({})
