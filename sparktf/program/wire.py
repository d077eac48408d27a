"""What a task and its child say to each other over their socket pair: kinds of frames, and who sends them."""

from __future__ import annotations

# From the task. JOB: what to run, pickled; it comes from Spark's own channel, and nobody else can open a socket pair.
# ANSWER: to a POST or WANT, JSON. STOP: the workers are done.
# From the child. POST: something for an exchange. WANT: a piece of the data. LEAVE: no more of them. PROGRESS: for the
# driver. SERVING: it only waits for others. PAIRED: it has met all parameter servers, which go on where it is lost.
# RESULT: main has returned. ERROR: it has not.
JOB, ANSWER, STOP, POST, WANT, LEAVE, PROGRESS, SERVING, PAIRED, RESULT, ERROR = range(1, 12)

# The job is the largest: whatever the user's function carries.
FRAME_LIMIT = 1 << 40
SEND_SECONDS = 60.0
# Descriptors in one message; Linux takes 253.
DESCRIPTORS = 64
