"""Run a command on a machine with an RDMA device: on this one where it has one, else on a virtual one.

    python tests/rdma/vm.py [--timeout 600] [--java] [--pyverbs 59.0] COMMAND ...

The virtual machine boots Debian's kernel in QEMU over this machine's root file system, read-only under a layer
that is thrown away: every program and virtual environment here is there too. In it ``rxe0`` is a Soft-RoCE device.
pyverbs is the distribution's, or a version of PyPI's with the rdma-core that belongs to it (``vm_pyverbs.py``).
The exit status is the command's own; 124: it ran past the timeout; 125: the machine did not come up.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vm_image import CACHE, HERE, PACKAGES, Image, build_image, install_packages, pyverbs_directory
from vm_pyverbs import built_pyverbs

TIMED_OUT, NOT_BOOTED = 124, 125
_KVM_SECONDS = 30.0
# For time bounds see `sparktf.transport.testing.worlds`. What Java compiles with AVX crashes under emulation.
_EMULATED = {"SPARKTF_TEST_SLOWNESS": "4", "JAVA_TOOL_OPTIONS": "-XX:UseAVX=0"}
_KEPT = ("PATH", "HOME", "LANG", "JAVA_HOME", "JAVA_TOOL_OPTIONS")


@dataclass(frozen=True)
class Machine:
    """What the virtual machine is made of.

    Parameters
    ----------
    accelerator : str
        QEMU's ``-accel``.
    processors : int
        Virtual processors.
    memory : str
        As QEMU writes it; also holds what the command writes to files.
    """

    accelerator: str
    processors: int
    memory: str

    @property
    def emulated(self) -> bool:
        """Whether the processor's instructions are translated rather than run."""
        return self.accelerator.startswith("tcg")

    def command_line(self, image: Image, control: Path) -> list[str]:
        """Return the emulator's command line; `control` is the directory that host and guest share."""
        shared = "local,security_model=none,multidevs=remap"
        boot = "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr random.trust_cpu=on"
        words = (
            "qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -serial stdio "
            f"-machine q35 -accel {self.accelerator} -cpu max -smp {self.processors} -m {self.memory} "
            "-object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng"
        )
        return [
            *words.split(),
            *("-virtfs", f"{shared},path=/,mount_tag=host,readonly=on"),
            *("-virtfs", f"{shared},path={control},mount_tag=control"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", boot),
        ]


def run_here(command: list[str], timeout: float, pyverbs: Path) -> int:
    """Run the command on this machine, with the pyverbs in that directory where Python has none of its own."""
    environment = {**os.environ, "PYTHONPATH": _python_path(pyverbs)}
    try:
        return subprocess.run(command, env=environment, timeout=timeout, check=False).returncode
    except subprocess.TimeoutExpired:
        return TIMED_OUT


def kvm_works() -> bool:
    """Return whether a machine boots on KVM, by trying; inside another virtual machine it may exist and not work."""
    answer = CACHE / "kvm"
    if not answer.exists():
        machine = Machine("kvm", 1, "1G")
        works = os.access("/dev/kvm", os.W_OK) and run_in_machine(["true"], machine, _KVM_SECONDS, quiet=True) == 0
        answer.write_text("works" if works else "fails")
    return answer.read_text() == "works"


def run_in_machine(
    command: list[str], machine: Machine, timeout: float, pyverbs: Path | None = None, *, quiet: bool = False
) -> int:
    """Boot a virtual machine for one command; its output goes to ours, or nowhere."""
    image = build_image()
    control = Path(tempfile.mkdtemp(prefix="sparktf-vm-"))
    try:
        shutil.copy(HERE / "vm_guest.sh", control / "guest.sh")
        (control / "command.sh").write_text(_script(command, machine, pyverbs))
        begin = time.monotonic()
        nowhere = subprocess.DEVNULL if quiet else None
        emulator = subprocess.Popen(
            machine.command_line(image, control), stdin=subprocess.DEVNULL, stdout=nowhere, stderr=nowhere
        )
        try:
            emulator.wait(timeout)
        except subprocess.TimeoutExpired:
            _say(f"stopped after {timeout:.0f} s", quiet)
        finally:
            emulator.kill()
            emulator.wait()
        _say(f"{time.monotonic() - begin:.0f} s in all", quiet)
        return _status(control)
    finally:
        shutil.rmtree(control)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(f"vm: {text}", file=sys.stderr)


def _script(command: list[str], machine: Machine, pyverbs: Path | None) -> str:
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("SPARKTF_")}
    kept |= {"PYTHONPATH": _python_path(pyverbs), "TERM": "dumb"}
    if machine.emulated:
        kept = _EMULATED | kept
    exports = [f"export {name}={shlex.quote(value)}" for name, value in kept.items()]
    return "\n".join([*exports, f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}\n"])


def _python_path(pyverbs: Path | None) -> str:
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), pyverbs and str(pyverbs)]))


def _status(control: Path) -> int:
    status = control / "status"
    if status.exists():
        return int(status.read_text())
    return TIMED_OUT if (control / "started").exists() else NOT_BOOTED


def main() -> int:
    """Run what the command line asks for; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds in all, booting included")
    parser.add_argument("--java", action="store_true", help="the command runs Java")
    parser.add_argument("--processors", type=int, default=2)
    parser.add_argument("--memory", default="6G", help="gigabytes, for what is written to files too")
    parser.add_argument("--pyverbs", metavar="VERSION", help="of PyPI's, instead of the distribution's")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    # As an exception, so that the emulator is ended with this process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # A card that is not plugged in is no use to the tests.
    here = any("ACTIVE" in state.read_text() for state in Path("/sys/class/infiniband").glob("*/ports/*/state"))
    if not here:
        install_packages(PACKAGES)
    pyverbs = built_pyverbs(options.pyverbs) if options.pyverbs else pyverbs_directory()
    if here:
        return run_here(options.command, options.timeout, pyverbs)
    # Java under emulation survives only where one thread emulates all processors; all else is faster with many.
    emulator = f"tcg,tb-size=1024,thread={'single' if options.java else 'multi'}"
    machine = Machine("kvm" if kvm_works() else emulator, options.processors, options.memory)
    return run_in_machine(options.command, machine, options.timeout, pyverbs)


if __name__ == "__main__":
    sys.exit(main())
