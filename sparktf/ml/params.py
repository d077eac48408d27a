"""The Params of TFEstimator: what a fit must know beyond what scoring needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from pyspark.ml.param.shared import HasBatchSize, HasLabelCol, HasSeed, HasValidationIndicatorCol, HasWeightCol

from sparktf.cluster.job import GRPC
from sparktf.ml import converters as to
from sparktf.ml.grid import NOT_JSON, held, taken_out
from sparktf.ml.model_params import _TFModelParams, make_param
from sparktf.transport import protocols
from sparktf.transport.reduction import COMPRESSIONS

ASYNC = "async"

_PROTOCOLS = (*protocols(), GRPC)


class _TFEstimatorParams(_TFModelParams, HasLabelCol, HasWeightCol, HasValidationIndicatorCol, HasSeed, HasBatchSize):
    """Everything a fit must know beyond what scoring needs."""

    model = make_param("model", "a compiled keras.Model; it is read, never changed.", held("model"))
    modelFn = make_param(
        "modelFn",
        "a function of no arguments that returns a compiled keras.Model, called on every node.",
        held("modelFn"),
    )
    labelMapping = make_param(
        "labelMapping",
        "{model output: label column}, for models with several outputs; takes the place of labelCol.",
        to.column_mapping("labelMapping"),
    )
    batchSize = make_param(
        "batchSize",
        "rows per worker and step (1 or more); the global batch of mode 'sync' is batchSize * numWorkers.",
        to.integer("batchSize", 1),
    )
    epochs = make_param("epochs", "passes over the training rows (1 or more).", to.integer("epochs", 1))
    shuffle = make_param("shuffle", "permute each worker's rows anew in every epoch.", to.boolean("shuffle"))
    seed = make_param(
        "seed", "random seed; equal seeds make equal fits, in mode 'async' with maxStaleness 0.", to.integer("seed")
    )
    numWorkers = make_param(
        "numWorkers",
        "nodes that train together (1 or more); each takes one task slot.",
        to.integer("numWorkers", 1),
    )
    threadsPerWorker = make_param(
        "threadsPerWorker",
        "TensorFlow threads of each node; 0: the executor's cores divided by the nodes on it.",
        to.integer("threadsPerWorker", 0),
    )
    mode = make_param(
        "mode",
        "'sync': every step's gradient is that of the global batch; 'async': workers go at their own pace, on "
        "parameter servers.",
        to.choice("mode", ["sync", ASYNC]),
    )
    numPs = make_param("numPs", "parameter servers, for mode 'async' (1 or more).", to.integer("numPs", 1))
    maxStaleness = make_param(
        "maxStaleness",
        "for mode 'async': how many updates a worker may be ahead of the slowest; 0: updates are those of all "
        "workers together; None: any number.",
        to.integer("maxStaleness", 0),
    )
    protocol = make_param(
        "protocol",
        f"how nodes exchange gradients: {', '.join(_PROTOCOLS)}; 'auto' chooses and logs its choice, 'grpc' is "
        "TensorFlow's own.",
        to.choice("protocol", _PROTOCOLS, aliases={"grpc_rdma": "rdma"}),
    )
    compression = make_param(
        "compression",
        f"how gradients are encoded on the wire: {', '.join(COMPRESSIONS)}; sums stay float32.",
        to.choice("compression", COMPRESSIONS),
    )
    callbacks = make_param(
        "callbacks",
        "Keras callbacks; every node runs its own copies, the given objects are not updated.",
        held("callbacks"),
    )
    logDir = make_param(
        "logDir",
        "where the chief logs for TensorBoard: a directory on its machine, or one of a remote file system.",
        to.path("logDir"),
    )
    tensorboard = make_param(
        "tensorboard",
        "run TensorBoard beside the chief while a fit runs; its URL is printed.",
        to.boolean("tensorboard"),
    )
    verbose = make_param("verbose", "'auto', or Keras's 0, 1 or 2.", to.verbosity)
    timeout = make_param(
        "timeout",
        "seconds without any progress after which a fit fails (greater than 0); batches and epochs that end are "
        "progress, so that it must be longer than any callback, checkpoint or validation takes.",
        to.positive_seconds("timeout"),
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(model=None, modelFn=None, labelMapping=None, maxStaleness=None, callbacks=None)
        self._setDefault(logDir=None, tensorboard=False)
        # Spark's default seed is a hash that Python salts anew in every process.
        self._setDefault(seed=0, batchSize=32, epochs=1, shuffle=True, numWorkers=1, threadsPerWorker=0)
        self._setDefault(mode="sync", numPs=1, protocol="auto", compression="none")
        self._setDefault(verbose="auto", timeout=300.0)

    def _set(self, **kwargs: Any) -> Self:
        """Set Params by name; what stood in a search's grid is taken out of it."""
        taken = {name: kwargs.pop(name) for name in NOT_JSON if kwargs.get(name) is not None}
        super()._set(**kwargs)
        for name, value in taken.items():
            self._paramMap[self.getParam(name)] = taken_out(name, value)
        return self

    def setModel(self, value: Any) -> Self:
        """Set model, a compiled keras.Model."""
        return self._set(model=value)

    def getModel(self) -> Any:
        """Return the keras.Model given as model, None where there is none."""
        return self._get(self.model)

    def setModelFn(self, value: Callable[[], Any] | None) -> Self:
        """Set modelFn."""
        return self._set(modelFn=value)

    def getModelFn(self) -> Callable[[], Any] | None:
        """Return modelFn, None where it was not given."""
        function: Callable[[], Any] | None = self._get(self.modelFn)
        return function

    def setLabelCol(self, value: str) -> Self:
        """Set labelCol."""
        return self._set(labelCol=value)

    def setLabelMapping(self, value: Mapping[str, str] | None) -> Self:
        """Set labelMapping."""
        return self._set(labelMapping=value)

    def getLabelMapping(self) -> dict[str, str] | None:
        """Return labelMapping, None where it was not given."""
        mapping: dict[str, str] | None = self._get(self.labelMapping)
        return mapping

    def setWeightCol(self, value: str | None) -> Self:
        """Set weightCol."""
        return self._set(weightCol=value)

    def setValidationIndicatorCol(self, value: str | None) -> Self:
        """Set validationIndicatorCol."""
        return self._set(validationIndicatorCol=value)

    def setBatchSize(self, value: int) -> Self:
        """Set batchSize."""
        return self._set(batchSize=value)

    def setEpochs(self, value: int) -> Self:
        """Set epochs."""
        return self._set(epochs=value)

    def getEpochs(self) -> int:
        """Return epochs."""
        return int(self._get(self.epochs))

    def setShuffle(self, value: bool) -> Self:
        """Set shuffle."""
        return self._set(shuffle=value)

    def getShuffle(self) -> bool:
        """Return shuffle."""
        return bool(self._get(self.shuffle))

    def setSeed(self, value: int) -> Self:
        """Set seed."""
        return self._set(seed=value)

    def setNumWorkers(self, value: int) -> Self:
        """Set numWorkers."""
        return self._set(numWorkers=value)

    def getNumWorkers(self) -> int:
        """Return numWorkers."""
        return int(self._get(self.numWorkers))

    def setThreadsPerWorker(self, value: int) -> Self:
        """Set threadsPerWorker."""
        return self._set(threadsPerWorker=value)

    def getThreadsPerWorker(self) -> int:
        """Return threadsPerWorker."""
        return int(self._get(self.threadsPerWorker))

    def setMode(self, value: str) -> Self:
        """Set mode."""
        return self._set(mode=value)

    def getMode(self) -> str:
        """Return mode."""
        return str(self._get(self.mode))

    def setNumPs(self, value: int) -> Self:
        """Set numPs."""
        return self._set(numPs=value)

    def getNumPs(self) -> int:
        """Return numPs."""
        return int(self._get(self.numPs))

    def setMaxStaleness(self, value: int | None) -> Self:
        """Set maxStaleness."""
        return self._set(maxStaleness=value)

    def getMaxStaleness(self) -> int | None:
        """Return maxStaleness, None where there is no bound."""
        bound: int | None = self._get(self.maxStaleness)
        return bound

    def setProtocol(self, value: str) -> Self:
        """Set protocol."""
        return self._set(protocol=value)

    def getProtocol(self) -> str:
        """Return protocol."""
        return str(self._get(self.protocol))

    def setCompression(self, value: str) -> Self:
        """Set compression."""
        return self._set(compression=value)

    def getCompression(self) -> str:
        """Return compression."""
        return str(self._get(self.compression))

    def setCallbacks(self, value: Sequence[Any] | None) -> Self:
        """Set callbacks."""
        return self._set(callbacks=value)

    def getCallbacks(self) -> list[Any] | None:
        """Return callbacks, None where none were given."""
        callbacks: list[Any] | None = self._get(self.callbacks)
        return callbacks

    def setLogDir(self, value: str | os.PathLike[str] | None) -> Self:
        """Set logDir."""
        return self._set(logDir=value)

    def getLogDir(self) -> str | None:
        """Return logDir, None where it was not given."""
        log_dir: str | None = self._get(self.logDir)
        return log_dir

    def setTensorboard(self, value: bool) -> Self:
        """Set tensorboard."""
        return self._set(tensorboard=value)

    def getTensorboard(self) -> bool:
        """Return tensorboard."""
        return bool(self._get(self.tensorboard))

    def setVerbose(self, value: str | int) -> Self:
        """Set verbose."""
        return self._set(verbose=value)

    def getVerbose(self) -> str | int:
        """Return verbose."""
        verbose: str | int = self._get(self.verbose)
        return verbose

    def setTimeout(self, value: float) -> Self:
        """Set timeout, in seconds."""
        return self._set(timeout=value)

    def getTimeout(self) -> float:
        """Return timeout, in seconds."""
        return float(self._get(self.timeout))
