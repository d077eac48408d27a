"""PyPI's pyverbs with the rdma-core that it belongs to, built side by side: its source distribution holds both.

pyverbs works with the libibverbs of its own version only, and few distributions have the latest one. Built in place,
both are used from the directory that they were built in, and nothing of the machine's own is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from vm_image import CACHE, install_packages

_PACKAGES = ("gcc", "cmake", "ninja-build", "pkg-config", "libnl-3-dev", "libnl-route-3-dev", "libudev-dev")
# From 3.1 on, it refuses a file of pyverbs 59.
_CYTHON = "cython<3.1"
_SECONDS = 3600.0


def built_pyverbs(version: str) -> Path:
    """Return a directory for PYTHONPATH that holds a version of PyPI's pyverbs; build it where the cache lacks it."""
    target = CACHE / f"pyverbs-{version}"
    # Built where it stays, as it knows its own place; so this file says whether it is complete.
    complete = target / "complete"
    if not complete.exists():
        install_packages(_PACKAGES)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        print(f"vm: building pyverbs {version} and its rdma-core; some five minutes", file=sys.stderr)
        _build(_download(version, target), target)
        complete.touch()
    return target / "build" / "python"


def _download(version: str, target: Path) -> Path:
    """Download the source distribution and unpack it; return the directory of rdma-core."""
    _run([*_pip("download"), "--no-deps", "--no-binary", "pyverbs", "--dest", target, f"pyverbs=={version}"])
    (archive,) = target.glob("pyverbs-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    return target / f"pyverbs-{version}" / "rdma-core"


def _build(source: Path, target: Path) -> None:
    _run([*_pip("install"), "--target", target / "cython", _CYTHON])
    # For the Python that runs the tests, whose Cython rdma-core looks for.
    path = os.pathsep.join(filter(None, [str(target / "cython"), os.environ.get("PYTHONPATH")]))
    options = [
        "-DIN_PLACE=1",
        "-DNO_MAN_PAGES=1",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
    ]
    _run(["cmake", "-GNinja", "-S", source, "-B", target / "build", *options], PYTHONPATH=path)
    _run(["ninja", "-C", target / "build"], PYTHONPATH=path)


def _pip(action: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", action]


def _run(command: list[str | Path], **environment: str) -> None:
    """Run a step; where it fails, say how it ended and leave."""
    merged = {**os.environ, **environment}
    done = subprocess.run(command, env=merged, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise SystemExit(f"{said}\nvm: this step failed: {' '.join(map(str, command))}")
