"""What a program knows of its node and its cluster: the ``ctx`` of ``main(args, ctx)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from sparktf.errors import ParamError
from sparktf.program import wire
from sparktf.program.export import export_model
from sparktf.program.ingest import Batch, Batching, Ingest
from sparktf.program.job import ProgramJob
from sparktf.program.link import TaskLink, plain
from sparktf.program.roles import PS
from sparktf.program.training import Training
from sparktf.transport import Communicator

Item = TypeVar("Item")


class Context:
    """A node of a run, for its program. Made by `sparktf.run`.

    Attributes
    ----------
    rank : int
        This node's number, from 0; `sparktf.run` returns values in this order.
    world_size : int
        The number of nodes, of every role.
    num_workers : int
        The number of compute nodes: the chief and the other workers.
    job_name : str
        ``"chief"`` (rank 0, a worker too), ``"worker"``, ``"ps"`` or ``"evaluator"``.
    task_index : int
        This node's number among those of its role.
    is_chief : bool
    cluster_spec : dict of str to list of str
        TensorFlow's cluster, by job name; empty with ``cluster=False``. TF_CONFIG says the same.
    protocol : str
        What the communicator uses: ``"tcp"``, ``"shm"``, ``"rdma"``; ``"grpc"`` where that was asked for.
    log_dir : str or None
        Where summaries go, for TensorBoard.
    """

    def __init__(
        self,
        job: ProgramJob,
        rank: int,
        addresses: Sequence[str],
        communicator: Communicator | None,
        ring: Any,
        link: TaskLink,
        log_dir: str | None,
    ) -> None:
        self._job, self._link = job, link
        self._communicator = communicator
        self.rank, self.world_size = rank, job.roles.world_size
        self.num_workers = job.roles.num_workers
        self.job_name, self.task_index = job.roles.job_name(rank), job.roles.task_index(rank)
        self.is_chief = rank == 0
        self.cluster_spec = job.roles.cluster_spec(addresses) if job.cluster else {}
        self.protocol = job.protocol if communicator is None or ring is not None else communicator.protocol
        self.log_dir = log_dir
        host = addresses[rank].rpartition(":")[0] if addresses else ""
        self._training = Training(job, link, rank, host, ring)
        self._ingest = Ingest(list(job.feeds), rank, link.next_piece, link.leave_data)

    @property
    def communicator(self) -> Communicator:
        """The compute nodes' collectives: ranks are theirs, ``communicator.size`` is `num_workers`.

        Raises
        ------
        ParamError
            On a parameter server or an evaluator, and with ``cluster=False``.
        """
        if self._communicator is None:
            where = f"a {self.job_name}" if self._job.cluster else "a node of a run with cluster=False"
            raise ParamError(f"ctx.communicator: expected the chief or a worker of a cluster, received {where}.")
        return self._communicator

    def dataset(
        self,
        batch_size: int,
        name: str | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        repeat: int | None = 1,
        pad: bool = False,
        drop_remainder: bool = False,
        stream: bool = False,
    ) -> Any:
        """Return the rows that Spark feeds to this worker as a tf.data.Dataset of dicts of tensors by column name.

        Every row of the DataFrame is on one worker, once. All workers get the same number of batches: their sizes
        shrink at the end, to no rows where a worker has run out of them.

        Parameters
        ----------
        batch_size : int
            Rows per worker and step.
        name : str, optional
            Which DataFrame, where the run has several.
        shuffle : bool
            Permute this worker's rows, anew in each iteration.
        seed : int
        repeat : int or None
            Times that every row is given, one after the other; None: without end.
        pad : bool
            Fill short batches up with this worker's first rows, for programs that need batches of one size.
        drop_remainder : bool
            Leave out the rows that do not fill a batch on every worker.
        stream : bool
            Read the data as it comes, once: nothing is kept, a program that stops early leaves the rest unread (also by
            Spark where the run has ``repartition=False``), and batches are short where a piece of some 64 MiB ends.
            Otherwise all rows are spooled to local disk before the first batch: stopping early leaves none unread.

        Returns
        -------
        tf.data.Dataset
            Tensors of shape ``(rows, *shape)`` in the columns' own dtypes; decimals are float64, vectors float64.

        Raises
        ------
        ParamError
            There is no such DataFrame, or this node is no worker.
        DataError
            The rows hold nulls, or arrays of different lengths.
        """
        return self._fed().dataset(name, Batching(batch_size, shuffle, seed, repeat, pad, drop_remainder), stream)

    def batches(
        self,
        batch_size: int,
        name: str | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        repeat: int | None = 1,
        pad: bool = False,
        drop_remainder: bool = False,
        stream: bool = False,
    ) -> Iterator[Batch]:
        """Yield the rows that Spark feeds to this worker as dicts of numpy arrays by column name.

        Parameters and errors are those of `dataset`; strings come as objects of bytes.
        """
        return self._fed().batches(name, Batching(batch_size, shuffle, seed, repeat, pad, drop_remainder), stream)

    def _fed(self) -> Ingest:
        if self.rank >= self.num_workers:
            raise ParamError(f"Expected the chief or a worker to read the run's data, received a {self.job_name}.")
        return self._ingest

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """Return this worker's share of a sequence, such as file names: every ``num_workers``-th, from its own rank.

        Raises
        ------
        ParamError
            This node is no worker.
        """
        if self.rank >= self.num_workers:
            raise ParamError(f"ctx.shard: expected the chief or a worker, received a {self.job_name}.")
        return list(items)[self.rank :: self.num_workers]

    def distributed_optimizer(
        self,
        optimizer: Any,
        mode: str = "sync",
        max_staleness: int | None = None,
        compression: str | None = None,
    ) -> Any:
        """Make a Keras optimizer train with all workers, from the chief's weights on.

        With ``mode="sync"`` it applies the mean of all workers' gradients. Every worker takes the same number of steps,
        on batches of the same size where the mean is to be that of the rows (``drop_remainder`` or ``pad`` of
        `dataset`). With ``mode="async"`` each worker goes at its own pace: it sends gradients to the run's parameter
        servers (`parameter_server`) and takes their newest weights; one that is killed, other than the chief, does not
        end the run. ``fit`` ends on all workers together, with the same weights; a loop of your own calls
        ``optimizer.finalize_variable_values(variables)`` for that.

        Works in ``fit`` and in custom loops. XLA cannot hold either: where ``jit_compile`` is left to Keras it is off.

        Parameters
        ----------
        optimizer : keras.optimizers.Optimizer
            Changed in place, before it has made a step; a model saved with it loads as with the plain one.
        mode : {"sync", "async"}
        max_staleness : int or None
            For "async": no worker is ever more updates ahead of the slowest than this. 0: updates are those of "sync".
            None: no bound.
        compression : {"none", "bf16"}, optional
            How gradients travel; the run's by default.

        Returns
        -------
        keras.optimizers.Optimizer
            `optimizer`.

        Raises
        ------
        ParamError
            It is not a Keras 3 optimizer, this node is no worker, or the run has no servers for "async".
        """
        return self._training.optimizer(optimizer, self.communicator, mode, max_staleness, compression)

    def parameter_server(self, optimizer: Any) -> Any:
        """Serve a part of the model's variables until the workers are done; for nodes whose ``job_name`` is ``"ps"``.

        Which variables and tables there are, and their first values, the workers say.

        Parameters
        ----------
        optimizer : keras.optimizers.Optimizer
            As on the workers, which give theirs to `distributed_optimizer` with ``mode="async"``. The state lives here.

        Returns
        -------
        sparktf.distribute.server.ServerReport
            What was done.

        Raises
        ------
        ParamError
            This node is no parameter server, or the optimizer cannot live on servers.
        HandshakeError
            Workers have another optimizer, or differ in their models.
        """
        if self.job_name != PS:
            raise ParamError(f"ctx.parameter_server: expected a parameter server (ps), received a {self.job_name}.")
        return self._training.serve_parameters(optimizer)

    def serve(self) -> None:
        """Serve as a node of TensorFlow's cluster until the workers are done: a ``tf.distribute.Server`` and its join.

        For parameter servers, and for workers that a coordinator on the chief gives work to.
        """
        import tensorflow as tf

        server = tf.distribute.Server(
            tf.train.ClusterSpec(self.cluster_spec), job_name=self.job_name, task_index=self.task_index, protocol="grpc"
        )
        server.join()

    @property
    def workers_done(self) -> bool:
        """Whether the chief and all workers have returned: the time for an evaluator to come to its end."""
        return self._link.workers_done.is_set()

    def report(self, **values: Any) -> None:
        """Show values on the driver's screen, such as ``step=10, loss=0.5``: numbers, text, NumPy's, tensors."""
        self._link.tell(wire.PROGRESS, {name: plain(np.asarray(value).tolist()) for name, value in values.items()})

    def export(self, model: Any, path: str, overwrite: bool = False) -> str:
        """Write a model, on the chief; others return at once. It appears when it is complete, or not at all.

        Parameters
        ----------
        model : keras.Model or tf.Module
        path : str
            ``*.keras`` for a Keras archive, else a directory for a SavedModel; a local path or a URI that pyarrow or
            fsspec knows (``s3://``, ``hdfs://``, ``gs://``).
        overwrite : bool

        Returns
        -------
        str
            `path`.

        Raises
        ------
        ParamError
            There is something at `path` already.
        """
        if self.is_chief:
            export_model(model, path, overwrite)
        return path

    def close(self) -> None:
        """Leave the cluster in good order. May be called twice."""
        self._training.close()
        self._ingest.close()
        if self._communicator is not None:
            self._communicator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._communicator is not None:
            self._communicator.abort(f"{type(error).__name__}: {error}")
        self._training.__exit__(kind, error, traceback)
        self.close()
