"""One rank of `test_cable.py`, in a network namespace of its own: reduces until something breaks, and reports it."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from sparktf import transport
from sparktf.errors import TransportError
from sparktf.transport.testing import SECRET, FileExchange


def main(rank, host, directory, timeout):
    exchange = FileExchange(Path(directory), rank, 2)
    arguments = {"rank": rank, "size": 2, "exchange": exchange, "secret": SECRET, "timeout": timeout, "host": host}
    with transport.connect("tcp", **arguments) as comm:
        comm.barrier()
        print("connected", flush=True)
        try:
            while True:
                comm.all_reduce(np.ones(1 << 18, np.float32))
        except TransportError as exc:
            print(json.dumps({"error": type(exc).__name__, "message": str(exc), "at": time.monotonic()}), flush=True)


main(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
