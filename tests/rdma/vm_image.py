"""The virtual machine's parts, made of Debian's packages: emulator, kernel, first file system.

What takes time is kept in a cache directory; an entry appears there only when it is complete.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".cache" / "rdma"
PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")

# pyverbs comes from the distribution unless another is asked for, as it must fit the machine's libibverbs.
PACKAGES = ("qemu-system-x86", "python3-pyverbs", "ibverbs-providers", "rdma-core", "iproute2")
# With what they depend on. Soft-RoCE asks the kernel for its checksum, which then looks for a modprobe that the
# first file system lacks; so that module goes ahead of it.
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "dummy", "crc32_generic", "rdma_rxe")


@dataclass(frozen=True)
class Image:
    """What an emulator boots.

    Attributes
    ----------
    kernel, initrd : Path
        The kernel, and its first file system.
    """

    kernel: Path
    initrd: Path


def install_packages(names: Sequence[str]) -> None:
    """Install what is missing of these packages of the distribution; only root can.

    Raises
    ------
    SystemExit
        A package is missing and cannot be installed; says which.
    """
    missing = [name for name in names if not _installed(name)]
    if not missing:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"The RDMA tests need packages of Debian: as root, run {' '.join(command)}")
    print(f"vm: installing {', '.join(missing)}", file=sys.stderr)
    if not _apt(command):
        # The list of packages may be missing or old.
        _apt(["apt-get", "update"])
        if not _apt(command):
            raise SystemExit(f"apt-get could not install {', '.join(missing)}; run {' '.join(command)} to see why.")


def pyverbs_directory() -> Path:
    """Return a directory for PYTHONPATH that holds the distribution's pyverbs and nothing else."""
    directory = CACHE / "python"
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / "pyverbs"
    if not link.is_symlink():
        link.symlink_to(PYVERBS)
    return directory


def build_image() -> Image:
    """Return the kernel and a first file system that loads Soft-RoCE; both are made where the cache lacks them."""
    CACHE.mkdir(parents=True, exist_ok=True)
    packages = CACHE / "packages"
    if not packages.is_dir():
        _download(packages)
    (modules,) = (packages / "lib" / "modules").iterdir()
    script = (HERE / "vm_init.sh").read_bytes()
    key = hashlib.sha256(script + repr((modules.name, _MODULES)).encode()).hexdigest()[:16]
    initrd = CACHE / f"initrd-{key}.gz"
    if not initrd.exists():
        _pack(initrd, script, packages / "bin" / "busybox", modules)
    return Image(packages / "boot" / f"vmlinuz-{modules.name}", initrd)


def _installed(package: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True, check=False
    )
    return asked.stdout.endswith(" installed")


def _apt(command: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0


def _download(target: Path) -> None:
    """Unpack Debian's current kernel, and a statically linked busybox, into one directory."""
    print("vm: downloading Debian's kernel", file=sys.stderr)
    asked = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=True)
    kernel = next(word for word in asked.stdout.split() if word.startswith("linux-image-") and word[12].isdigit())
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        # apt's own user cannot write there, which is a warning; a download that fails is an error.
        subprocess.run(
            ["apt-get", "download", kernel, "busybox-static"],
            cwd=scratch, check=True, timeout=600, capture_output=True,
        )  # fmt: skip
        files = Path(scratch, "files")
        for package in sorted(Path(scratch).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, files], check=True)
        busybox = files / "bin" / "busybox"
        (modules,) = (files / "lib" / "modules").iterdir()
        subprocess.run([busybox, "depmod", "-b", files, modules.name], check=True)
        files.rename(target)


def _pack(initrd: Path, script: bytes, busybox: Path, modules: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        root = Path(scratch, "root")
        (root / "bin").mkdir(parents=True)
        (root / "modules").mkdir()
        (root / "init").write_bytes(script)
        (root / "init").chmod(0o755)
        shutil.copy(busybox, root / "bin" / "busybox")
        order = _loading_order(modules)
        for module in order:
            shutil.copy(modules / module, root / "modules")
        (root / "modules.order").write_text("\n".join(Path(module).name for module in order))
        names = "\n".join(path.relative_to(root).as_posix() for path in sorted(root.rglob("*")))
        archive = subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"],
            cwd=root, input=names.encode(), capture_output=True, check=True,
        ).stdout  # fmt: skip
        packed = Path(scratch, "initrd.gz")
        packed.write_bytes(gzip.compress(archive, 1))
        packed.rename(initrd)


def _loading_order(modules: Path) -> list[str]:
    """Return the files of all modules needed, each after those that it depends on."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[module] = others.split()
    by_name = {Path(module).name.removesuffix(".ko").replace("-", "_"): module for module in needs}
    order: list[str] = []

    def visit(module: str) -> None:
        for other in needs[module]:
            visit(other)
        if module not in order:
            order.append(module)

    for name in _MODULES:
        # What is not there is part of the kernel itself.
        if name in by_name:
            visit(by_name[name])
    return order
