"""What a task and the child that trains for it say to each other over a socket pair: who sends which kind of frame."""

from __future__ import annotations

# From the task. JOB: what to do, pickled; nobody else can open a socket pair. PIECE: of the model's archive, the last
# one empty. EXCHANGE and SWAP: the answers.
# From the child. EXCHANGE: something for all ranks. SWAP: something for one server, whose rank comes first. MET: it has
# met the others. PROGRESS: for the driver. RESULT: it is done. ERROR: it has failed.
JOB, PIECE, EXCHANGE, SWAP, MET, PROGRESS, RESULT, ERROR = range(1, 9)

# The job is the largest: whatever its program carries.
FRAME_LIMIT = 1 << 40
SEND_SECONDS = 60.0
