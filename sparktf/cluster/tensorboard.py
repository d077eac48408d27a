"""A TensorBoard server as a process of its own, for as long as somebody trains."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from sparktf.cluster.leash import leashed
from sparktf.cluster.scratch import local_directory
from sparktf.errors import ClusterError

INSTALL = "pip install 'sparktf[tensorboard]'"

_POLL_SECONDS = 0.1
# It has nothing to save when it is stopped.
_STOP_SECONDS = 5.0
_LAST_WORDS_BYTES = 2000
# "TensorBoard 2.20.0 at http://127.0.0.1:43321/ (Press CTRL+C to quit)"
_ADDRESS = re.compile(r"^TensorBoard \S+ at (http://\S+)", re.MULTILINE)


class TensorBoard:
    """A TensorBoard server; it starts at once, and is up when :meth:`wait` returns.

    As a context manager it waits on entry and closes on exit. It dies with the thread that made it. It asks nobody for
    a password: whoever reaches its port sees the logs.

    Parameters
    ----------
    log_dir : str, optional
        A directory of this machine, made where it is missing, or one of a remote file system (``"s3://..."``), which
        TensorBoard gets as it is. Default: a directory of its own in Spark's local directories, removed by `close`.
    host : str
        The address to listen on; the port is a free one.
    timeout : float
        Seconds from its start until it answers.

    Attributes
    ----------
    log_dir : str
        Where to log to.

    Raises
    ------
    ClusterError
        The log directory cannot be written.
    """

    def __init__(self, log_dir: str | None = None, host: str = "127.0.0.1", timeout: float = 60.0) -> None:
        self._host, self._timeout = host, timeout
        self._deadline = time.monotonic() + timeout
        self._url: str | None = None
        # Spark removes it where this process is killed. TensorBoard leaves notes on itself among temporary files.
        self._private = tempfile.mkdtemp(prefix="sparktf-tensorboard-", dir=local_directory())
        # A file, for a pipe that nobody reads would fill up.
        self._output = os.path.join(self._private, "output")
        try:
            self.log_dir = writable_log_dir(log_dir or os.path.join(self._private, "logs"))
            self._process = self._start()
        except BaseException:
            shutil.rmtree(self._private)
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        # One process: the fast loader is a second one, which pays for logs far larger than a training's own.
        arguments = ["--logdir", self.log_dir, "--host", self._host, "--port", "0", "--load_fast", "false"]
        with open(self._output, "wb") as output:
            return subprocess.Popen(
                leashed([sys.executable, "-m", "tensorboard.main", *arguments]),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )

    def _environment(self) -> dict[str, str]:
        # Modules that Spark shipped with the job are on this process's path only.
        path = [p for p in sys.path if p]
        if "://" not in self.log_dir:
            # Where the import fails it does without TensorFlow: up in 0.6 s and 83 MB, not in 5.8 s and 688 MB.
            # A remote file system it reads by TensorFlow, which writes to it as well.
            with open(os.path.join(self._private, "tensorflow.py"), "w", encoding="utf-8") as module:
                module.write("raise ImportError('hidden from TensorBoard')\n")
            path.insert(0, self._private)
        return {
            **os.environ,
            "TMPDIR": self._private,
            # It shares its machine with training, whose GPUs it must not open.
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(path),
        }

    @property
    def pid(self) -> int:
        """The server's process, which is the leader of its process group."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where to look at it; waits until it is up."""
        return self.wait()

    def wait(self) -> str:
        """Wait until the server answers; return its URL.

        Raises
        ------
        ClusterError
            It ended, is not installed, or did not come up in time.
        """
        while self._url is None:
            self.check()
            printed = _ADDRESS.search(self._printed())
            if printed is not None and _answers(printed[1], self._deadline):
                self._url = printed[1]
            elif time.monotonic() > self._deadline:
                raise ClusterError(
                    f"Expected TensorBoard to answer on {self._host} within {self._timeout:g} s, received nothing. "
                    f"{self._last_words()}"
                )
            else:
                time.sleep(_POLL_SECONDS)
        return self._url

    def check(self) -> None:
        """Check that the server's process runs.

        Raises
        ------
        ClusterError
            It does not; with its last words.
        """
        status = self._process.poll()
        if status is None:
            return
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        words = self._last_words()
        hint = f" Install what it needs on every executor: {INSTALL}" if "No module named" in words else ""
        raise ClusterError(f"Expected TensorBoard to run on {self._host}, but it has ended ({how}).{hint} {words}")

    def close(self) -> None:
        """Stop the server and remove what is its own. May be called twice."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._private)

    def __enter__(self) -> Self:
        try:
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _printed(self) -> str:
        with open(self._output, encoding="utf-8", errors="replace") as output:
            return output.read()

    def _last_words(self) -> str:
        return f"Its last words:\n{self._printed()[-_LAST_WORDS_BYTES:].strip() or '(none)'}"


def writable_log_dir(log_dir: str) -> str:
    """Make a log directory, and return its absolute path; one of a remote file system is returned as it is.

    Raises
    ------
    ClusterError
        It cannot be written.
    """
    if "://" in log_dir:
        return log_dir
    try:
        os.makedirs(log_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=log_dir):
            return os.path.abspath(log_dir)
    except OSError as error:
        raise ClusterError(
            f"Expected a log directory that the chief can write to, received {log_dir!r}: {error}. It is a path on the "
            "chief's machine; take one that exists there, or a remote file system's."
        ) from error


def _answers(url: str, deadline: float) -> bool:
    """Ask for the front page, directly: a proxy would not find the machine."""
    address = urlsplit(url)
    # One more second, so that the last attempt is not one without any time.
    left = max(0.0, deadline - time.monotonic()) + 1.0
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=left)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()
