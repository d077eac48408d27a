"""A local Spark session made right: Java found, the workers' Python set, quiet logs, everything on loopback.

For laptops, tests, notebooks and examples. On a cluster the session comes from ``spark-submit`` or the
platform, and :func:`local_session` then returns it as it is.
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparktf.java import find_java, spark_java_home

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["find_java", "local_session"]

# PySpark 4.3 says this for every UDF and toPandas under pandas 3; sparktf is tested with both.
_PANDAS_NOTICE = "PySpark does not yet fully support pandas"

_LOOPBACK = "127.0.0.1"


def local_session(
    master: str | None = "local[2]",
    app_name: str = "sparktf",
    *,
    connect: bool = False,
    **conf: object,
) -> SparkSession:
    """Return the Spark session of this process, making a local one where there is none.

    A session that exists already, and the one that ``spark-submit`` prepares, are returned as they are. What
    ``conf``, ``spark-defaults.conf``, ``PYSPARK_SUBMIT_ARGS`` and the environment set is never overridden.

    Parameters
    ----------
    master : str or None
        ``local[n]``: n task slots in one process. ``local-cluster[executors,cores,MiB]``: executors in
        processes of their own. None: what the user's Spark configuration says, else ``local[*]``.
    app_name : str
        The name that Spark shows.
    connect : bool
        Return a Spark Connect session to a local server (the ``connect`` extra).
    **conf : object
        Spark settings, dots in their names: ``local_session(**{"spark.driver.memory": "4g"})``.

    Returns
    -------
    SparkSession
        Stop it with ``.stop()``; otherwise it ends with the process.

    Raises
    ------
    ClusterError
        No Java 17 or newer was found; the message says what to install.
    """
    from pyspark.sql import SparkSession

    if (existing := _existing_session()) is not None:
        return existing
    builder = SparkSession.builder.appName(app_name)
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        # Under spark-submit the JVM runs already, with the settings that the user gave there.
        return builder.config(map=dict(conf)).getOrCreate()  # type: ignore[arg-type]
    _quiet_warnings()
    user = _user_settings()
    master = master or user.get("spark.master", "local[*]")
    settings: dict[str, Any] = dict(
        _merged(_settings(master), user, {name: _as_text(value) for name, value in conf.items()})
    )
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    builder = builder.config(map=settings)
    with _environment(_launch_environment(master)), warnings.catch_warnings():
        # A Connect client repeats the server's own settings to it and warns of each that is fixed by then.
        warnings.filterwarnings("ignore", message="Failed to set spark", category=UserWarning)
        return (builder.remote(master) if connect else builder.master(master)).getOrCreate()


def _existing_session() -> SparkSession | None:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is None and SparkContext._active_spark_context is not None:
        # Active sessions are per thread: another thread's context must not be configured anew.
        return SparkSession.builder.getOrCreate()
    return active


def _settings(master: str) -> dict[str, str]:
    # A URI: its escapes leave no blank at which Spark would split the options.
    quiet = f"-Dlog4j2.configurationFile={(Path(__file__).parent / 'log4j2-quiet.properties').as_uri()}"
    # MLlib looks for the system's BLAS and complains where there is none; its own in Java does as well.
    quiet += " -Ddev.ludovic.netlib.blas.allowNative=false"
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.extraJavaOptions": quiet,
        "spark.executor.extraJavaOptions": quiet,
        "spark.executorEnv.PYTHONWARNINGS": f"ignore:{_PANDAS_NOTICE}:FutureWarning",
        # Spark's 200 is for clusters; each empty partition costs a task.
        "spark.sql.shuffle.partitions": "4",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # Spark's 1 GiB is short for a cached image set beside its own needs.
        "spark.driver.memory": "2g",
    }
    if master.startswith("local"):
        settings |= {"spark.driver.host": _LOOPBACK, "spark.driver.bindAddress": _LOOPBACK}
    return settings


def _merged(ours: dict[str, str], user: dict[str, str], call: dict[str, str]) -> dict[str, str]:
    """Return the settings to start with: the call's, and ours where neither it nor the user says anything."""
    given = user | call
    merged = {name: value for name, value in ours.items() if name not in given} | call
    for name in ("spark.driver.extraJavaOptions", "spark.executor.extraJavaOptions"):
        if name in given:
            # These are lists: ours come first, so that the user's own logging still has the last word.
            merged[name] = f"{ours[name]} {given[name]}"
    return merged


def _launch_environment(master: str) -> dict[str, str]:
    """Return what the JVM and its executors need in their environment, where the user has not set it."""
    environment = {"JAVA_HOME": str(spark_java_home(find_java()))}
    if master.startswith("local"):
        # A machine whose name resolves to nothing, or to an address that is down, still works.
        environment["SPARK_LOCAL_IP"] = os.environ.get("SPARK_LOCAL_IP", _LOOPBACK)
    if master.startswith("local-cluster"):
        environment["SPARK_HOME"] = str(_temporary_spark_home())
    return environment


def _temporary_spark_home() -> Path:
    """Return a Spark home of links, removed at exit.

    local-cluster writes its executors' files to ``$SPARK_HOME/work``, whatever else is configured; with pip's
    Spark that is inside the installed package, and shared by all local clusters of the machine.
    """
    from pyspark.find_spark_home import _find_spark_home

    home = Path(tempfile.mkdtemp(prefix="sparktf-local-cluster-"))
    for entry in Path(_find_spark_home()).iterdir():
        if entry.name != "work":
            (home / entry.name).symlink_to(entry)
    (home / "work").mkdir()
    atexit.register(_stop_and_remove, home)
    return home


def _stop_and_remove(home: Path) -> None:
    if (session := _existing_session()) is not None:
        session.stop()
    shutil.rmtree(home, ignore_errors=True)


def _user_settings() -> dict[str, str]:
    """Return what the user's spark-defaults.conf and PYSPARK_SUBMIT_ARGS say: it wins over ours."""
    home = os.environ.get("SPARK_CONF_DIR") or os.path.join(os.environ.get("SPARK_HOME", ""), "conf")
    defaults = Path(home) / "spark-defaults.conf"
    settings = parse_defaults(defaults.read_text()) if defaults.is_file() else {}
    return settings | parse_submit_arguments(os.environ.get("PYSPARK_SUBMIT_ARGS", ""))


def parse_defaults(text: str) -> dict[str, str]:
    """Return the settings of a ``spark-defaults.conf``: a name, blanks or "=", a value; "#" comments."""
    lines = (re.match(r"\s*([^\s=:#]+)\s*[=:]?\s*(.*?)\s*$", line) for line in text.splitlines())
    return {match[1]: match[2] for match in lines if match}


def parse_submit_arguments(text: str) -> dict[str, str]:
    """Return the settings that a ``PYSPARK_SUBMIT_ARGS`` line makes by ``--conf`` and by its short forms."""
    words = shlex.split(text)
    named = {"--master": "spark.master", "--driver-memory": "spark.driver.memory"}
    settings = {}
    for option, value in pairwise(words):
        if option == "--conf":
            name, _, value = value.partition("=")
            settings[name] = value
        elif option in named:
            settings[named[option]] = value
    return settings


def _as_text(value: object) -> str:
    # Spark reads "true", not Python's "True".
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quiet_warnings() -> None:
    warnings.filterwarnings("ignore", message=_PANDAS_NOTICE, category=FutureWarning)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set variables while the JVM starts: it keeps them, this process does not."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
