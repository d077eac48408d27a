"""TFEstimator: a Keras model trained on a DataFrame by TensorFlow nodes inside Spark's executors."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyspark import keyword_only
from pyspark.ml import Estimator

from sparktf.cluster.connect import check_returnable, result_limit
from sparktf.cluster.job import GRPC, Payload, Program
from sparktf.cluster.launch import check_nodes, run_training, temporary_directory
from sparktf.cluster.pickling import pickled, portable
from sparktf.cluster.preflight import is_connect
from sparktf.distribute.buckets import gradient_bytes
from sparktf.distribute.checks import loss_reduction
from sparktf.distribute.custom_objects import custom_objects
from sparktf.distribute.fit import FitSettings
from sparktf.distribute.own_pace import check_servable
from sparktf.distribute.table_fit import check_tables
from sparktf.errors import ParamError
from sparktf.ml.archive import ModelArchive
from sparktf.ml.feed import Feed
from sparktf.ml.model import TFModel
from sparktf.ml.params import ASYNC, _TFEstimatorParams
from sparktf.ml.payload import payload_for
from sparktf.ml.persistence import EstimatorPersistence
from sparktf.ml.planning import plan_feed, spread_rows
from sparktf.ml.progress import ProgressPrinter
from sparktf.ml.summary import summarize

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame, SparkSession

_LOG = logging.getLogger("sparktf.ml")


class TFEstimator(Estimator[TFModel], _TFEstimatorParams, EstimatorPersistence):
    """Trains a Keras model on a DataFrame, on ``numWorkers`` TensorFlow nodes in Spark's executors.

    Parameters
    ----------
    model : keras.Model
        Compiled. It is read, never changed; its weights and its optimizer's state are where training starts. One that
        was never built (a Sequential without Input) is built on the nodes, from the shapes of the columns.
    modelFn : callable
        In place of `model`: a function of no arguments that returns a compiled model, called on every node.
    featuresCol, inputCols, inputMapping
        Where the model's inputs come from: one column (a number, an array, nested arrays, an MLlib vector, a string);
        several columns packed into one input; ``{model input: column or columns}``.
    labelCol, labelMapping
        The label column; ``{model output: column}`` for several outputs.
    weightCol : str
        Sample weights, one number a row, 0 or more.
    validationIndicatorCol : str
        A boolean column: rows where it is true are held out and evaluated at each epoch's end.
    predictionCol, probabilityCol, rawPredictionCol, outputMapping, predictBatchSize
        For the fitted model; see `TFModel`.
    batchSize : int
        Rows per worker and step. The global batch is ``batchSize * numWorkers``; in mode "async" an update is of one
        worker's rows, unless maxStaleness is 0.
    epochs : int
    shuffle : bool
        Permute each worker's rows anew in every epoch.
    seed : int
        Equal seeds on equal data in an equal world make bit-identical fits; in mode "async" where maxStaleness is 0.
    numWorkers : int
        Nodes; each takes a task slot of Spark.
    threadsPerWorker : int
        TensorFlow threads of a node; 0 for the executor's cores divided by the nodes on it.
    mode : {"sync", "async"}
        "sync": every step's gradient is that of one process on the global batch. "async": each worker goes at its own
        pace, sends its gradients to parameter servers, which apply them as they come, and goes on with the weights that
        it gets back; at an epoch's end all meet. A worker that is lost does not end the fit.
    numPs : int
        Parameter servers of mode "async"; each takes a task slot beside the workers'.
    maxStaleness : int or None
        For mode "async": no worker is more updates ahead of the slowest that still trains. 0: each update is the mean
        of all workers' gradients by rows, as in "sync". None: no bound.
    protocol : {"auto", "tcp", "shm", "rdma", "grpc"}
        How nodes exchange gradients.
    compression : {"none", "bf16"}
        "bf16": what travels between machines is rounded to bfloat16, sums stay float32; not for "grpc".
        In mode "async" it is gradients alone, on one machine too; weights come in full.
    callbacks : list of keras.callbacks.Callback
        Every node runs its own copies; those that write files run on the chief only.
    logDir : str
        Where the chief logs for TensorBoard, in the way of `keras.callbacks.TensorBoard`; one of yours among the
        callbacks takes its place. A path on the chief's machine, or a remote file system's (``"s3://..."``).
    tensorboard : bool
        Run TensorBoard beside the chief while the fit runs. Its URL is printed as it starts (in the executor's log on
        Spark Connect) and stands in the summary. Without logDir it shows what your own callback logs, or logs of its
        own that are removed with it. It listens on the executor's address and asks nobody for a password.
    verbose : {"auto", 0, 1, 2}
    timeout : float
        Seconds without progress after which a fit fails.

    Examples
    --------
    >>> est = TFEstimator(model=model, featuresCol="pixels", labelCol="digit", numWorkers=2, epochs=5)
    >>> fitted = est.fit(df)
    >>> fitted.transform(df).select("prediction")
    """

    @keyword_only
    def __init__(
        self,
        *,
        model: keras.Model | None = None,
        modelFn: Callable[[], keras.Model] | None = None,
        featuresCol: str = "features",
        inputCols: Sequence[str] | None = None,
        inputMapping: Mapping[str, str | list[str]] | None = None,
        labelCol: str = "label",
        labelMapping: Mapping[str, str] | None = None,
        weightCol: str | None = None,
        validationIndicatorCol: str | None = None,
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        outputMapping: Mapping[str, str] | None = None,
        batchSize: int = 32,
        epochs: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        numWorkers: int = 1,
        threadsPerWorker: int = 0,
        mode: str = "sync",
        numPs: int = 1,
        maxStaleness: int | None = None,
        protocol: str = "auto",
        compression: str = "none",
        predictBatchSize: int = 8192,
        callbacks: Sequence[Any] | None = None,
        logDir: str | os.PathLike[str] | None = None,
        tensorboard: bool = False,
        verbose: str | int = "auto",
        timeout: float = 300.0,
    ) -> None:
        super().__init__()
        self._set(**self._input_kwargs)  # type: ignore[attr-defined]  # keyword_only sets it

    @keyword_only
    def setParams(self, **params: Any) -> TFEstimator:
        """Set any of the constructor's Params by name."""
        return self._set(**params)

    def _fit(self, dataset: DataFrame) -> TFModel:
        started = time.monotonic()
        feed = self._checked_feed(dataset)
        objects = custom_objects()
        with temporary_directory() as directory, self._payload(dataset.sparkSession) as payload:
            result = run_training(
                spread_rows(dataset, feed, self.getNumWorkers(), self._servers()),
                self._program(portable(objects), feed),
                payload,
                FitSettings(self.getBatchSize(), self.getEpochs(), self.getShuffle(), self.getSeed()),
                world_size=self.getNumWorkers() + self._servers(),
                protocol=self.getProtocol(),
                compression=self.getCompression(),
                timeout=self.getTimeout(),
                threads=self.getThreadsPerWorker(),
                gradient_bytes=gradient_bytes(self.getModel()),
                directory=directory,
                on_progress=ProgressPrinter(self.getVerbose(), self.getEpochs()),
                log_dir=self.getLogDir(),
                tensorboard=self.getTensorboard(),
                num_ps=self._servers(),
                max_staleness=self.getMaxStaleness(),
            )
            trained = ModelArchive.from_file(result.model_path, move=True)
        summary = summarize(result, time.monotonic() - started)
        _LOG.info("gradients went over %s: %s", summary.protocol, summary.protocolReason)
        fitted = TFModel._create(trained, uid=self.uid, summary=summary, custom_objects=objects)
        return self._copyValues(fitted)

    def _checked_feed(self, dataset: DataFrame) -> Feed:
        """Plan the feed, and check columns, model and cluster as far as the driver can."""
        model, model_fn = self.getModel(), self.getModelFn()
        if (model is None) == (model_fn is None):
            given = "neither" if model is None else "both"
            raise ParamError(f"Expected one of model (a compiled keras.Model) and modelFn, received {given}.")
        if model is not None and (not getattr(model, "compiled", False) or model.optimizer is None):
            raise ParamError(
                f"Expected a compiled model, received {model.name!r} without optimizer and loss. Call "
                "model.compile(optimizer=..., loss=...) first."
            )
        if model is not None and (self.getNumWorkers() > 1 or self._servers()):
            loss_reduction(model)
        if model is not None and self._servers():
            check_servable(model, self.getNumPs())
        if model is not None:
            check_tables(model)
        if self.getProtocol() == GRPC and self._servers():
            raise ParamError(
                "Expected protocol 'auto', 'tcp', 'shm' or 'rdma' with mode='async', received 'grpc': TensorFlow's own "
                "collectives are for mode='sync'."
            )
        if self.getProtocol() == GRPC and self.getCompression() != "none":
            raise ParamError(
                f"Expected compression='none' with protocol='grpc', received {self.getCompression()!r}: TensorFlow's "
                "own ring sends gradients as they are. Choose another protocol."
            )
        feed = plan_feed(self, dataset.schema)
        check_nodes(dataset.sparkSession, self.getNumWorkers(), self._servers())
        return feed if model is None else feed.for_model(model)

    def _servers(self) -> int:
        return self.getNumPs() if self.getMode() == ASYNC else 0

    @contextlib.contextmanager
    def _payload(self, spark: SparkSession) -> Iterator[Payload | None]:
        """Hold what a job carries of the model; None where modelFn makes it."""
        if self.getModel() is None:
            yield None
            return
        with contextlib.closing(ModelArchive.from_model(self.getModel())) as archive:
            if is_connect(spark):
                # What is trained is at least as large as what goes out.
                check_returnable(archive.size, result_limit(spark))
            payload = payload_for(archive, spark)
        try:
            yield payload
        finally:
            payload.close()

    def _program(self, objects: Mapping[str, Any], feed: Feed) -> bytes:
        program = Program(self.getModelFn(), objects, tuple(self.getCallbacks() or ()), feed)
        parts = {"modelFn": program.model_fn, "callbacks": program.callbacks, "custom objects": objects}
        return pickled(program, parts)
