"""Keep TensorFlow's start-up notices off the screen.

It writes some of them from native code before any setting is read: only the file descriptor can be held.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_stderr"]


# Two threads that held the descriptor at once would give it back in the wrong order.
_LOCK = threading.RLock()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what the block writes to file descriptor 2; show it after all if the block fails.

    Meant for one thread at start-up, around ``import tensorflow`` or ``import keras``: what other threads of the
    process write meanwhile is held as well.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _LOCK, tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
