"""Where TensorFlow meets the transport: data-parallel training of a Keras model, in step or at each worker's own pace.

Words used in this package:

global batch
    The rows that all ranks together feed into one step; ``K`` rows, ``k`` of them on this rank.
share
    ``k / K``, the weight of this rank's gradient in the step. A rank that has run out of rows has share 0: it
    is *idle*, takes the step on a row that counts for nothing, contributes nothing and keeps its metrics as they were.
reducer
    Sums the ranks' gradients, each weighted by its share, over the communicator. That sum is the gradient of one
    process on the global batch, for every loss that averages over rows.
parameter server
    A process that holds a part of the variables (a *shard*, made of *slices*) and the optimizer's state. Workers
    *push* gradients to it and *pull* weights; its *version* is the number of updates it has made.
staleness
    How many updates a worker is ahead of the slowest, and so how old the weights may be by which it computes.
table
    What a `ShardedEmbedding` looks ids up in. Its rows are spread over the nodes; one node's part is a *shard* too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparktf.distribute.embedding import ShardedEmbedding

__all__ = ["ShardedEmbedding"]


def __getattr__(name: str) -> Any:
    """Import the layer when it is first used: it brings Keras."""
    if name != "ShardedEmbedding":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = import_module("sparktf.distribute.embedding").ShardedEmbedding
    globals()[name] = value
    return value
