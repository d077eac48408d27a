"""Gradients over TensorFlow's own collectives: a ring over gRPC.

Only the gradients go this way; all else that ranks agree on uses the communicator. TensorFlow's cluster can be set up
once in a process, so this is for nodes in fresh ones.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from sparktf.distribute.exchange import Array, GradientExchange
from sparktf.distribute.reducer import GradientReducer, weigh
from sparktf.errors import PeerLostError, ProtocolError, TransportError, TransportTimeoutError
from sparktf.transport import Communicator, Settings
from sparktf.transport.ports import HeldPort, host_and_port

# Any number that TensorFlow itself does not count up to.
_GROUP_KEY = 0x5F54
# A peer's end is heard of within milliseconds; TensorFlow may hear of it first.
_WORD_SECONDS, _POLL_SECONDS = 2.0, 0.01
# After TensorFlow's own timeout, and within half of another, after which a job is ended without a name.
_MEETING_SECONDS = 4.0


def start_cluster(communicator: Communicator, host: str) -> Any:
    """Make this process a worker in a TensorFlow cluster of all ranks.

    Parameters
    ----------
    communicator : Communicator
        The rendezvous.
    host : str
        The address of this rank that the others reach.

    Returns
    -------
    object
        Keep it: the cluster ends with it.

    Raises
    ------
    ProtocolError
        Encryption was asked for.
    TransportError
        TensorFlow cannot listen.
    """
    import tensorflow as tf

    if Settings.from_environment().tls:
        raise ProtocolError(
            "Expected another protocol than 'grpc' with SPARKTF_TLS=1: TensorFlow's own collectives send gradients in "
            "clear text. Use protocol='tcp'."
        )

    # Held until TensorFlow serves: nobody else can take the port after the others have been told of it.
    with HeldPort(host) as held:
        mine = host_and_port(host, held.port)
        addresses = [address.decode() for address in communicator.all_gather_bytes(mine.encode())]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": addresses}), task_type="worker", task_id=communicator.rank, rpc_layer="grpc"
        )
        try:
            return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        except tf.errors.OpError as error:
            raise taken_port(error, held, mine) or TransportError(
                f"rank {communicator.rank}: expected TensorFlow to serve on {mine} and to meet the other ranks there. "
                f"Received: {error.message}."
            ) from error


def taken_port(error: BaseException, held: HeldPort, address: str) -> TransportError | None:
    """Return what to raise of an error where TensorFlow's server found its port taken; None for any other.

    TensorFlow itself names neither the port nor the reason, but to its log.

    Parameters
    ----------
    error : BaseException
    held : HeldPort
        The port that was held for the server.
    address : str
        Of the server, as the other nodes know it.
    """
    import tensorflow as tf

    if not isinstance(error, tf.errors.OpError) or "start gRPC server" not in error.message or not held.taken():
        return None
    return TransportError(
        f"Expected TensorFlow's server to listen on {address}, which was held for this node. Received: "
        f"{error.message!r}, for another server listens there: an earlier one of this program, where a node may start "
        "only one, or another program's that takes ports in use (SO_REUSEADDR). Run again for another port; ss -ltnp "
        "on that machine tells whose it is."
    )


class GrpcReducer(GradientReducer):
    """Sums gradients by TensorFlow's ``CollectiveReduceV2``, one op a bucket; see `GradientReducer`.

    Parameters
    ----------
    communicator : Communicator
        Of the same ranks as the cluster.
    timeout : float
        Seconds that one reduce may take.
    """

    def __init__(self, communicator: Communicator, timeout: float) -> None:
        super().__init__(communicator)
        self._timeout = timeout
        self._first_instances: dict[int, int] = {}
        self._instances = 0

    def _trace(self, exchange: GradientExchange, tensors: list[Any], slices: list[Any], share: Any) -> list[Any]:
        import tensorflow as tf

        def begin() -> Array:
            exchange.agree()
            return np.array(self._stop_requested, np.float32)

        stop = tf.numpy_function(self._guarded(begin), [], tf.float32, stateful=True)
        stop.set_shape(())
        results: list[Any] = [None] * len(tensors)
        for number, bucket in enumerate(exchange.buckets):
            parts = [tf.cast(tensors[place.gradient], bucket.dtype) for place in bucket.places]
            flat = [tf.reshape(weigh(part, share), (-1,)) for part in parts]
            summed = self._reduced(tf.concat([*flat, [tf.cast(stop, bucket.dtype)]], 0), exchange, number)
            *pieces, flag = tf.split(summed, [*(place.stop - place.start for place in bucket.places), 1])
            for place, piece in zip(bucket.places, pieces, strict=True):
                tensor = tensors[place.gradient]
                results[place.gradient] = tf.cast(tf.reshape(piece, tensor.shape), tensor.dtype)

        def finish(flag: Array, share: Array, *arrays: Array) -> list[Array]:
            self.stop_agreed = self.stop_agreed or bool(flag[0] > 0)
            return [np.array(0), *exchange.slices.join(float(share), arrays)]

        dtypes = [tf.int64, *(s.dtype for s in slices)]
        done, *gathered = tf.numpy_function(self._guarded(finish), [flag, share, *slices], dtypes, stateful=True)
        with tf.control_dependencies([done]):
            return [*(tf.identity(result) for result in results), *gathered]

    def _reduced(self, flat: Any, exchange: GradientExchange, number: int) -> Any:
        import tensorflow as tf

        if id(exchange) not in self._first_instances:
            # Exchanges are made, and so numbered, in one order on all ranks.
            self._first_instances[id(exchange)] = self._instances
            self._instances += len(exchange.buckets)
        return tf.raw_ops.CollectiveReduceV2(
            input=flat,
            group_size=self._communicator.size,
            group_key=_GROUP_KEY,
            instance_key=self._first_instances[id(exchange)] + number,
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
            communication_hint="ring",
            timeout_seconds=self._timeout,
            is_stateless=False,
            max_subdivs_per_device=-1,
        )

    def explain(self, error: BaseException) -> BaseException | None:
        """Find the peer behind a collective that failed: the communicator knows who is gone."""
        import tensorflow as tf

        known = super().explain(error)
        if known is not None or not isinstance(error, tf.errors.OpError):
            return known
        try:
            if isinstance(error, tf.errors.DeadlineExceededError) and "CollectiveReduce" in error.message:
                # Nobody has ended: a meeting tells which rank does not answer.
                self._communicator.timeout = min(_MEETING_SECONDS, self._timeout / 4)
                self._communicator.barrier()
            # Others' errors end a step as well, of files and servers; then the communicator has nothing to say.
            deadline = time.monotonic() + _WORD_SECONDS
            while isinstance(error, _lost()) and time.monotonic() < deadline:
                self._communicator.check()
                time.sleep(_POLL_SECONDS)
        except (PeerLostError, TransportTimeoutError) as reason:
            return reason
        return None


def _lost() -> tuple[type[Exception], ...]:
    """Return what TensorFlow raises where a peer is gone."""
    import tensorflow as tf

    return (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)
