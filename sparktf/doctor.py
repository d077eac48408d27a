"""What this machine has for sparktf, and what to do about what is missing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sparktf.errors import ClusterError, ParamError
from sparktf.java import find_java, java_version
from sparktf.transport.rdma import preflight
from sparktf.transport.settings import Settings

__all__ = ["Finding", "examine", "report"]

_PACKAGES = ("pyspark", "keras", "pyarrow", "pandas", "numpy", "ml_dtypes")
_TENSORFLOW = ("tensorflow", "tensorflow-cpu")

_DEVICES = """
import json, tensorflow as tf
print(json.dumps([device.name for device in tf.config.list_physical_devices("GPU")]))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Parameters
    ----------
    name : str
        What was looked at.
    text : str
        What was found, and the fix where something is wrong.
    ok : bool
        False: training with Spark cannot work here as it is.
    """

    name: str
    text: str
    ok: bool = True


def examine() -> list[Finding]:
    """Look at this machine.

    Returns
    -------
    list of Finding
        In the order of the report; none starts Spark, one starts a process that imports TensorFlow.
    """
    looks: list[Callable[[], Finding]] = [
        _java,
        _python,
        _worker_python,
        _packages,
        _tensorflow,
        _loopback,
        _local_directories,
        _shared_memory,
        _rdma,
        _locked_memory,
    ]
    return [look() for look in looks]


def report(findings: list[Finding]) -> str:
    """Return the findings as lines for the screen, the verdict last."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{'ok  ' if f.ok else 'FAIL'} {f.name:<{width}}  {f.text}" for f in findings]
    failed = [finding.name for finding in findings if not finding.ok]
    verdict = f"cannot train here: fix {', '.join(failed)}" if failed else "ready to train"
    return "\n".join([*lines, verdict])


def _java() -> Finding:
    try:
        java = find_java()
    except ClusterError as error:
        return Finding("Java", str(error), ok=False)
    return Finding("Java", f"{java_version(java)} at {java}")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", f"{version} at {sys.executable}")


def _worker_python() -> Finding:
    name = os.environ.get("PYSPARK_PYTHON")
    if name is None:
        return Finding("Python of workers", "PYSPARK_PYTHON is unset; a local session takes this Python")
    found = shutil.which(name)
    if found is None:
        return Finding("Python of workers", f"PYSPARK_PYTHON={name} does not run; unset or correct it", ok=False)
    command = [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version != own:
        text = f"PYSPARK_PYTHON={name} is Python {version or 'unknown'}, the driver's is {own}; they must be equal"
        return Finding("Python of workers", text, ok=False)
    return Finding("Python of workers", f"{version} at {found}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Finding:
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Finding("packages", f"missing: pip install {' '.join(missing)}", ok=False)
    return Finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _tensorflow() -> Finding:
    version = next((found for name in _TENSORFLOW if (found := _version(name))), None)
    # In a process of its own: the driver does without TensorFlow, and a GPU's memory is given back.
    command = [sys.executable, "-c", _DEVICES]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment)
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        last = said.strip().splitlines()[-1] if said.strip() else type(error).__name__
        return Finding("TensorFlow", f"cannot be imported ({last}); pip install tensorflow", ok=False)
    devices = json.loads(answer.stdout.strip().splitlines()[-1])
    return Finding("TensorFlow", f"{version or 'unknown'}, {len(devices)} GPUs {' '.join(devices)}".rstrip())


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        text = f"127.0.0.1 cannot be reached ({error}); bring the loopback interface up, allow free ports"
        return Finding("ports", text, ok=False)
    return Finding("ports", f"free ports can be opened; this host is {socket.gethostname()}")


def _local_directories() -> Finding:
    directories = (os.environ.get("SPARK_LOCAL_DIRS") or tempfile.gettempdir()).split(",")
    unwritable = [name for name in directories if not os.access(name, os.W_OK)]
    if unwritable:
        text = f"{', '.join(unwritable)} cannot be written; set SPARK_LOCAL_DIRS to a local disk"
        return Finding("local directories", text, ok=False)
    sizes = [f"{name} ({shutil.disk_usage(name).free / 2**30:.0f} GiB free)" for name in directories]
    return Finding("local directories", ", ".join(sizes))


def _shared_memory() -> Finding:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return Finding("shared memory", "none")
    return Finding("shared memory", f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB free")


def _rdma() -> Finding:
    root = Path("/sys/class/infiniband")
    devices = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    try:
        trouble = preflight(Settings.from_environment())
    except ParamError as error:
        trouble = str(error)
    return Finding("RDMA", trouble or f"ready, with {' '.join(devices)}")


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    return Finding("locked memory", f"{soft / 2**20:.0f} MiB; RDMA registers its buffers within it (ulimit -l)")
