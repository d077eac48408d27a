"""What a node does once its partition is spooled: Keras's ``fit`` together with the others."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sparktf.cluster.connect import check_returnable
from sparktf.cluster.fit_logs import with_tensorboard
from sparktf.cluster.job import Program, TrainJob
from sparktf.cluster.scratch import local_directory, scratch_directory
from sparktf.cluster.spooling import agree_on_rows, split_rows
from sparktf.cluster.stand_in import stand_in
from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import Spool
from sparktf.data.tfdata import evaluation_dataset, training_dataset
from sparktf.distribute.build import build_model
from sparktf.distribute.client import ParameterClient
from sparktf.distribute.custom_objects import why_missing
from sparktf.distribute.fit import FitReport, Order, RankRows, fit_together
from sparktf.distribute.group import Group
from sparktf.distribute.lockstep import fit_rank
from sparktf.distribute.meeting import Meeting
from sparktf.distribute.optimizer import find_optimizers
from sparktf.distribute.own_pace import OwnPace
from sparktf.distribute.pair import connect_again
from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.table_fit import tables_of
from sparktf.distribute.table_servers import leave_tables
from sparktf.errors import ParamError
from sparktf.transport import Communicator


def make_model(path: str | None, program: Program, seed: int) -> Any:
    """Return the job's compiled model, from its archive or its function.

    Parameters
    ----------
    path : str or None
        The archive.
    program : Program
    seed : int
        Set before the function is called, so that every rank and every fit initialises alike.

    Raises
    ------
    ParamError
        modelFn returned something else than a compiled model.
    """
    import keras

    # Numpy takes 32 bits.
    keras.utils.set_random_seed(seed % 2**32)
    if path is not None:
        return load_model(path, program.custom_objects)
    assert program.model_fn is not None  # the driver has checked that one of the two is given
    model = program.model_fn()
    if not isinstance(model, keras.Model) or not getattr(model, "compiled", False):
        what = "a model that is not compiled" if isinstance(model, keras.Model) else type(model).__name__
        raise ParamError(f"Expected modelFn to return a compiled keras.Model, received {what}.")
    return model


@contextlib.contextmanager
def archive_file(pieces: Iterable[bytes] | None) -> Iterator[str | None]:
    """Hold an archive in a file of Spark's local directories; None gives None."""
    if pieces is None:
        yield None
        return
    with scratch_directory("sparktf-") as directory:
        path = os.path.join(directory, "model.keras")
        with open(path, "wb") as file:
            file.writelines(pieces)
        yield path


def load_model(path: str, objects: Mapping[str, Any]) -> Any:
    """Return the model of a ``.keras`` archive. It is the job's own: Lambda layers are allowed.

    Parameters
    ----------
    path : str
    objects : mapping of str to object
        The job's custom objects, which are registered.

    Raises
    ------
    ParamError
        It is made of a class that this process cannot find.
    """
    import keras

    # A layer of ours that the file may hold, for Keras to find.
    import_module("sparktf.distribute.embedding")
    with warnings.catch_warnings():
        # A model that was never trained has no optimizer variables to load, and Keras warns of that.
        warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
        try:
            return keras.saving.load_model(path, safe_mode=False)
        except TypeError as error:
            # Keras has no exception class for it.
            missing = re.search(r"Could not locate (?:class|function) '([^']+)'", str(error))
            if missing is None:
                raise
            advice = "Decorate it with @keras.saving.register_keras_serializable(), or give a modelFn"
            raise ParamError(
                f"model: expected classes and functions that nodes can find. Received from Keras: {missing[0]}: "
                f"{why_missing(missing[1], objects) or advice}."
            ) from error


@dataclass(frozen=True)
class _Prepared:
    """What a fit is given: see `sparktf.distribute.fit.fit_together`."""

    training: Callable[[Order, int], Any]
    validation: Any
    callbacks: list[Any]


def agree_on_partitions(specs: list[ColumnSpec], spool: Spool, group: Group) -> RankRows:
    """Tell all ranks how many rows this one's partition has to train on and to validate on."""
    ours, held_out = split_rows(spool, _validation(specs))
    return agree_on_rows(spool, len(ours), len(held_out), group)


def train(
    job: TrainJob,
    program: Program,
    model: Any,
    specs: list[ColumnSpec],
    spool: Spool,
    communicator: Communicator,
    report: Callable[[dict[str, Any]], None] | None,
    save: bool,
    reducer: GradientReducer | None = None,
) -> dict[str, Any]:
    """Train a model on a spooled partition, in lockstep with the other ranks.

    Parameters
    ----------
    job : TrainJob
    program : Program
    model : keras.Model
        Trained in place.
    specs : list of ColumnSpec
    spool : Spool
    communicator : Communicator
    report : callable or None
        Receives progress.
    save : bool
        Save the trained model.
    reducer : GradientReducer, optional
        Sums the gradients; by default over the communicator.

    Returns
    -------
    dict
        What there is to tell of the fit, JSON-able. Under ``"saved"`` the path of the trained model, a ``.keras`` file
        in a directory of its own that the caller removes; None where it was not saved.

    Raises
    ------
    ClusterError
        The model is larger than what can come back.
    """
    rows = agree_on_partitions(specs, spool, communicator)
    given = _prepare(job, program, model, specs, spool, rows, communicator)
    reducer = reducer or GradientReducer(communicator, job.compression)
    fitted = fit_rank(
        model, communicator, rows, given.training, given.validation, job.settings, given.callbacks, report, reducer
    )
    return {"saved": _save(model) if save else None, **_describe(fitted, rows, spool)}


def train_at_own_pace(
    job: TrainJob,
    program: Program,
    model: Any,
    specs: list[ColumnSpec],
    spool: Spool,
    rows: RankRows,
    client: ParameterClient,
    rank: int,
    report: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Train a model on a spooled partition, at this worker's own pace, on parameter servers.

    Parameters
    ----------
    rows : RankRows
        Of all workers.
    client : ParameterClient
    rank : int

    Returns
    -------
    dict
        As `train` does, whose the other parameters are; one of the workers has saved the model.
    """
    meeting = Meeting(client, rank, job.num_workers)
    given = _prepare(job, program, model, specs, spool, rows, meeting)
    with contextlib.ExitStack() as stack:
        servers = client.communicators if tables_of(model) else ()
        links = [stack.enter_context(connect_again(pair, job.timeout)) for pair in servers]
        together = OwnPace(client, meeting, rows, job.settings.batch_size, links)
        fitted = fit_together(model, together, given.training, given.validation, job.settings, given.callbacks, report)
        saves = together.saves()
        if saves:
            together.bring_back_state(model)
        leave_tables(links)
    return {"saved": _save(model) if saves else None, **_describe(fitted, rows, spool)}


def _prepare(
    job: TrainJob, program: Program, model: Any, specs: list[ColumnSpec], spool: Spool, rows: RankRows, group: Group
) -> _Prepared:
    """Make the datasets, and build the model from their shapes."""
    settings = job.settings
    ours, held_out = split_rows(spool, _validation(specs))
    pack, pack_y = program.feed.packs(model)
    arrangement: dict[str, Any] = {
        "features": [s.name for s in specs if s.kind == "feature"],
        "labels": [s.name for s in specs if s.kind == "label"],
        "weight": next((s.name for s in specs if s.kind == "weight"), None),
        "pack": pack,
        "pack_y": pack_y,
    }

    names = [s.name for s in specs if s.kind in ("feature", "label", "weight")]
    idle = stand_in(spool, names, ours, rows.training, group)

    def training(order: Order, steps: int) -> Any:
        return training_dataset(spool, lambda: ours[order()], settings.batch_size, steps, idle=idle, **arrangement)

    held_out_batches = None
    if sum(rows.validation) > 0:
        held_out_batches = evaluation_dataset(spool, held_out, settings.batch_size, **arrangement)
    build_model(model, _first_batch(training))
    if program.model_fn is not None:
        check_savable(model)
    check_returnable(state_bytes(model), job.result_limit)
    return _Prepared(training, held_out_batches, with_tensorboard(program.callbacks, job.log_dir))


def check_savable(model: Any) -> None:
    """Check that Keras can save a function's model, before it has trained for hours.

    Raises
    ------
    ParamError
        It cannot.
    """
    import keras

    try:
        keras.saving.serialize_keras_object(model)
    except (TypeError, ValueError, NotImplementedError) as exc:
        raise ParamError(
            f"Expected modelFn to return a model that Keras can save, received {model.name!r}, which it cannot: {exc}. "
            "Custom classes need get_config() and @keras.saving.register_keras_serializable()."
        ) from exc


def _validation(specs: list[ColumnSpec]) -> str | None:
    return next((s.name for s in specs if s.kind == "validation"), None)


def state_bytes(model: Any) -> int:
    """Return the bytes of a built model's variables and its optimizers'."""
    import tensorflow as tf

    variables = [*model.variables, *(v for optimizer in find_optimizers(model) for v in optimizer.variables)]
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in {id(v): v for v in variables}.values())


def _save(model: Any) -> str:
    # Made only now, so that a node that is killed while it trains leaves nothing behind.
    directory = tempfile.mkdtemp(prefix="sparktf-", dir=local_directory())
    try:
        path = os.path.join(directory, "trained.keras")
        model.save(path)
    except BaseException:
        shutil.rmtree(directory)
        raise
    return path


def _describe(fitted: FitReport, rows: RankRows, spool: Spool) -> dict[str, Any]:
    return {
        "fit_seconds": fitted.seconds,
        "communicate_seconds": fitted.communicate_seconds,
        "epoch_seconds": fitted.epoch_seconds,
        "steps_per_epoch": fitted.steps_per_epoch,
        "history": fitted.history,
        "notices": fitted.notices,
        "rows": list(rows.training),
        "validation_rows": list(rows.validation),
        "spooled_bytes": spool.nbytes,
        "process": os.getpid(),
    }


def _first_batch(training: Callable[[Order, int], Any]) -> Any:
    """Return a batch without rows, for its shapes."""
    import numpy as np

    return next(iter(training(lambda: np.zeros(0, np.int64), 1)))
