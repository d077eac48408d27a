"""Where TensorFlow meets the transport: synchronous data-parallel training of a Keras model.

Words used in this package:

global batch
    The rows that all ranks together feed into one step; ``K`` rows, ``k`` of them on this rank.
share
    ``k / K``, the weight of this rank's gradient in the step. A rank that has run out of rows has share 0: it
    is *idle*, takes the step on a row of zeros, contributes nothing and keeps its metrics as they were.
reducer
    Sums the ranks' gradients, each weighted by its share, over the communicator. That sum is the gradient of one
    process on the global batch, for every loss that averages over rows.
"""
