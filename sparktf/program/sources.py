"""The text of functions that travel by value, such as those of a notebook's cells, on its way to the nodes.

AutoGraph translates Python to TensorFlow graphs from its text, and tracebacks show it; pickling takes only bytecode.
Without it an ``if`` on a tensor, in a ``tf.function`` of a notebook, would be an error on the nodes alone.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Mapping


def sources_of(pickled: bytes) -> dict[str, str]:
    """Return the text of the files that pickled functions come from, by the file's name, as far as it is known here.

    Parameters
    ----------
    pickled : bytes
        By cloudpickle: code objects hold their file's name.
    """
    # Python keeps what was typed into a notebook or an interpreter where it keeps the lines of files.
    names = {*linecache.cache, getattr(sys.modules.get("__main__"), "__file__", None) or ""}
    used = {name for name in names if name and name.encode("utf-8", "surrogateescape") in pickled}
    texts = {name: "".join(linecache.getlines(name)) for name in used}
    return {name: text for name, text in texts.items() if text}


def lend_sources(sources: Mapping[str, str]) -> None:
    """Let this process find the text of files that it does not have."""
    for name, text in sources.items():
        if not os.path.exists(name):
            # As the standard library notes what no file holds: without a time, which is never looked at again.
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
