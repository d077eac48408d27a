"""Environments of their own for what the benchmarks compare with, apart from the project's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def make_environment(directory: Path, module: str, what: str) -> Path | None:
    """Make the environment that a directory's requirements.txt asks for, where it is missing.

    Parameters
    ----------
    directory : Path
        The environment goes into its ``.venv``.
    module : str
        What must be importable there.
    what : str
        Its name and size, for people.

    Returns
    -------
    Path or None
        Its Python; None where it could not be made.
    """
    environment = directory / ".venv"
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"making {environment} ({what}) ...", flush=True)
        if subprocess.run([sys.executable, "-m", "venv", str(environment)]).returncode == 0:
            requirements = ["-r", str(directory / "requirements.txt")]
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements])
    found = python.exists() and subprocess.run([str(python), "-c", f"import {module}"], capture_output=True)
    return python if found and found.returncode == 0 else None
