"""One node of a run, as its task sees it: what the child says and needs, and when it is time to end."""

from __future__ import annotations

import json
import logging
import select
import time
from typing import Any

from sparktf.cluster.control import ControlClient
from sparktf.cluster.tensorboard import TensorBoard
from sparktf.errors import ClusterError, NodeError, PeerLostError, told_error
from sparktf.program import wire
from sparktf.program.board import DONE, RUNNING, SERVING, Board
from sparktf.program.feeder import Feeder
from sparktf.program.job import ProgramJob
from sparktf.program.output import OutputForwarder
from sparktf.program.process import ChildProcess
from sparktf.program.roles import EVALUATOR, PS, WORKER
from sparktf.transport import Communicator
from sparktf.transport.framing import recv_frame, send_frame

_LOG = logging.getLogger("sparktf.program")

# Between rounds of the board: the longest that one child waits for what another has sent.
_TICK_SECONDS = 0.1
# Of a child that has returned from main, or been told to stop, to come to its end.
_EXIT_SECONDS, _STOP_SECONDS = 2.0, 5.0
# A child makes progress where it uses more of a core than this; TensorFlow's idle threads use less than a thousandth.
_BUSY = 0.01
_ALIVE_SECONDS = 5.0


class _RunEnds(Exception):
    """Every node is done, found out in the middle of something."""


class Node:
    """One node, seen from its task.

    Parameters
    ----------
    job : ProgramJob
    communicator : Communicator
        The tasks'.
    control : ControlClient
    child : ChildProcess
    feeder : Feeder
    tensorboard : TensorBoard, optional
        That runs beside this node.

    Attributes
    ----------
    lost : str or None
        How the child was lost, where the others went on without it.
    """

    def __init__(
        self,
        job: ProgramJob,
        communicator: Communicator,
        control: ControlClient,
        child: ChildProcess,
        feeder: Feeder,
        tensorboard: TensorBoard | None = None,
    ) -> None:
        self._job, self._rank, self._control, self._child = job, communicator.rank, control, child
        self._role = job.roles.job_name(self._rank)
        self._board = Board(communicator)
        self._feeder, self._tensorboard = feeder, tensorboard
        self._output = OutputForwarder(child.outputs, control, job.roles.describe(self._rank))
        self._exchange: str | None = None
        self._news = self._failed = self._paired = False
        self.lost: str | None = None
        self._stop_at: float | None = None
        self._returned_at: float | None = None
        self._met_at = self._told_at = self._progress_at = self._measured_at = time.monotonic()
        self._cpu_seconds = 0.0

    def tell_job(self, host: str, threads: int, log_dir: str | None) -> None:
        """Send the child what it is to do.

        Parameters
        ----------
        host : str
            The address of this node that the others reach.
        threads : int
            For TensorFlow.
        log_dir : str or None
        """
        from pyspark import cloudpickle

        told = {"job": self._job, "rank": self._rank, "host": host, "threads": threads, "log_dir": log_dir}
        self._send(wire.JOB, cloudpickle.dumps(told))  # type: ignore[no-untyped-call]

    def run(self) -> None:
        """Serve the child until every node of the run is done.

        Raises
        ------
        NodeError
            The program failed here, ended without a word, or hangs.
        DataError
            The DataFrame holds what cannot be fed.
        TransportError
            It failed on another rank.
        """
        try:
            while True:
                self._listen(0 if self._board.news else _TICK_SECONDS)
                self._meet()
                self._stop_when_done()
                self._check_progress()
                self._feeder.spool(self._board, self._while_spooling)
                self._answer()
        except _RunEnds:
            self._output.drain(_EXIT_SECONDS, self._ended)
        except PeerLostError:
            self._hear_last_words()
            raise

    def _meet(self) -> None:
        self._tell_alive()
        self._board.mine.idle = time.monotonic() - self._progress_at
        self._met_at = time.monotonic()
        if all(notice.state == DONE for notice in self._board.round()):
            raise _RunEnds

    def _while_spooling(self) -> None:
        self._progress_at = time.monotonic()
        if self._progress_at - self._met_at > _TICK_SECONDS:
            self._listen(0)
            self._meet()
            self._answer()

    def _tell_alive(self) -> None:
        now = time.monotonic()
        if now - self._told_at > min(_ALIVE_SECONDS, self._job.timeout / 4):
            self._control.alive()
            self._told_at = now
            self._check_tensorboard()

    def _check_tensorboard(self) -> None:
        if self._tensorboard is not None:
            try:
                self._tensorboard.check()
            except ClusterError as error:
                # A screen that broke must not end the program.
                self._output.show("stderr", [f"TensorBoard is gone, the run goes on: {error}"])
                self._tensorboard = None

    def _listen(self, seconds: float) -> None:
        """Take what the child says and prints for some seconds, or until it has news for the board."""
        until = time.monotonic() + seconds
        self._news = False
        while True:
            self._take_in(max(0.0, until - time.monotonic()))
            if self._news or time.monotonic() >= until:
                break
        self._end_child()

    def _take_in(self, seconds: float) -> None:
        ended = self._ended()
        speaks = self._board.mine.state != DONE
        sources: list[Any] = [*self._child.outputs.values(), *[self._child.frames] * speaks]
        ready = select.select(sources, [], [], seconds)[0]
        if self._output.forward(ready):
            self._progress_at = time.monotonic()
        if self._child.frames in ready:
            self._hear()
        elif speaks and ended:
            # Processes that it has forked may hold its end of the connection.
            self._lost()

    def _hear(self) -> None:
        try:
            kind, payload = recv_frame(self._child.frames, wire.SEND_SECONDS, wire.FRAME_LIMIT)
        except PeerLostError:
            self._lost()
            return
        self._progress_at = time.monotonic()
        self._news = kind != wire.PROGRESS
        if kind == wire.POST:
            told = json.loads(payload)
            self._exchange = told["name"]
            self._board.post(told["name"], bytes.fromhex(told["payload"]), told["members"])
        elif kind == wire.WANT:
            self._feeder.want(self._board, json.loads(payload)["stream"])
        elif kind == wire.LEAVE:
            self._feeder.leave()
        elif kind == wire.PROGRESS:
            self._output.report(json.loads(payload))
        elif kind == wire.SERVING:
            self._board.mine.state = SERVING
        elif kind == wire.PAIRED:
            self._paired = True
        elif kind == wire.RESULT:
            self._board.mine.state = DONE
            self._returned_at = time.monotonic()
        elif kind == wire.ERROR:
            self._failed = True
            self._output.drain(_EXIT_SECONDS, self._ended)
            raise told_error(json.loads(payload), self._rank)

    def _hear_last_words(self) -> None:
        """Raise what the child has failed with, where others heard of that first and have left for it."""
        # A child tells its task before it tells the others: what it has said is here by now. Of one that has failed
        # nothing is left to hear: it may itself have failed for the lost peer.
        while not self._failed and self._board.mine.state != DONE and select.select([self._child.frames], [], [], 0)[0]:
            self._hear()

    def _lost(self) -> None:
        """Say what became of a child that has closed its end without a word."""
        self._output.drain(_EXIT_SECONDS, self._ended)
        if self._stop_at is not None:
            # What was told to stop may end as it likes.
            self._news = True
            self._board.mine.state = DONE
            return
        # A chief cannot be spared: a program gets its result from it, and has it save the model.
        if self._paired and self._role == WORKER and self._killed():
            self._go_on_without(self._child.end())
            return
        raise NodeError(f"the program's process ended before main returned ({self._child.end()})", self._rank)

    def _go_on_without(self, how: str) -> None:
        """Let the others go on: servers have seen for themselves that this worker is lost; for tasks it is done."""
        self.lost = how
        self._output.show("stderr", [f"lost ({how}); the others go on"])
        self._board.mine.state, self._exchange = DONE, None
        self._feeder.lose(self._board)
        # What it has started may be there still.
        self._returned_at = time.monotonic()

    def _killed(self) -> bool:
        # One that has ended by itself, if without a word, has failed.
        status = self._child.status()
        return status is not None and status < 0

    def _ended(self) -> bool:
        return self._child.status() is not None

    def _end_child(self) -> None:
        """End a child that should have come to its end by itself."""
        now = time.monotonic()
        if self._returned_at is not None and now - self._returned_at > _EXIT_SECONDS:
            # TensorFlow's servers may keep a process from its end.
            self._child.close()
            self._returned_at = None
        if self._stop_at is not None and now > self._stop_at and self._board.mine.state != DONE:
            self._child.close()
            self._board.mine.state = DONE

    def _check_progress(self) -> None:
        """Find out whether the run hangs: no node has used its processor or said a word for the timeout."""
        if self._stop_at is not None:
            # It has a deadline, and the others are done.
            return
        now, window = time.monotonic(), min(1.0, self._job.timeout / 8)
        if now - self._measured_at > window and self._board.mine.state != DONE:
            used = self._child.cpu_seconds()
            if used - self._cpu_seconds > _BUSY * (now - self._measured_at):
                self._progress_at = now
            self._measured_at, self._cpu_seconds = now, used
        idle = {
            rank: notice.idle
            for rank, notice in enumerate(self._board.notices)
            if notice.state == RUNNING and self._job.roles.job_name(rank) != PS
        }
        # The one that has been silent for longest is most likely what the others wait for.
        if not idle or min(idle.values()) < self._job.timeout or max(idle, key=lambda r: (idle[r], -r)) != self._rank:
            return
        stopped = self._child.stopped()
        what = "its process is stopped" if stopped else "the program hangs, or waits for what never comes"
        raise NodeError(f"no node has made progress for {self._job.timeout:g} s (timeout): {what}", self._rank)

    def _stop_when_done(self) -> None:
        """Tell the child that the workers are done, where it serves them or waits for that."""
        compute = [self._board.notices[rank].state for rank in self._job.roles.compute_ranks]
        if compute[0] != DONE or RUNNING in compute or self._stop_at is not None or self._board.mine.state == DONE:
            return
        self._stop_at = time.monotonic() + (self._job.timeout if self._role == EVALUATOR else _STOP_SECONDS)
        self._send(wire.STOP, b"")

    def _answer(self) -> None:
        """Give the child what it waits for, if it is there."""
        if self._exchange is not None and (parts := self._board.take(self._exchange)) is not None:
            self._exchange = None
            self._send(wire.ANSWER, json.dumps([part.hex() for part in parts]).encode())
        if (piece := self._feeder.answer(self._board)) is not None:
            told, spools = piece
            descriptors = [fd for spool in spools for fd in spool.fds()]
            self._child.send_descriptors(descriptors)
            for spool in spools:
                spool.close()
            self._send(wire.ANSWER, json.dumps({**told, "descriptors": len(descriptors)}).encode())

    def _send(self, kind: int, payload: bytes) -> None:
        try:
            send_frame(self._child.frames, kind, payload, wire.SEND_SECONDS)
        except PeerLostError:
            # Its exit status is looked at where its own words are awaited.
            _LOG.info("the child of rank %d is gone", self._rank)
