"""A spool may be larger than the memory of the process that writes and reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import resource, sys
import numpy as np, pyarrow as pa
from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import SpoolWriter

# Private memory only: pages of mapped files are the kernel's to drop, as on a node.
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
limit = used + (192 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
rows, width, batches = 8_192, 784, 40
spec = ColumnSpec("x", (width,), "float32", "x")
offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
with SpoolWriter([spec], sys.argv[1]) as writer:
    for number in range(batches):
        values = pa.array(np.full(rows * width, number, np.float32))
        writer.append(pa.record_batch([pa.ListArray.from_arrays(offsets, values)], ["x"]))
        del values
    spool = writer.finish()
with spool:
    order = np.random.default_rng(0).permutation(spool.rows)
    for start in range(0, spool.rows, 8_192):
        indices = order[start : start + 8_192]
        taken = spool.take(indices)["x"]
        assert (taken[:, 0] == indices // rows).all()
    print(spool.nbytes, limit)
"""


def test_a_spool_five_times_the_allowed_memory_is_written_and_read_in_any_order(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    spooled, _ = map(int, run.stdout.split())
    assert spooled > 5 * (192 << 20)
    assert not list(tmp_path.iterdir())
