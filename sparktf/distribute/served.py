"""The variables that live on one parameter server, and the optimizer that updates them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from sparktf.distribute.gate import Push
from sparktf.distribute.pair import Hello, Messages
from sparktf.distribute.shards import Array
from sparktf.distribute.slots import build_optimizer, pack, set_slots, slot_values, unpack
from sparktf.errors import ParamError


class ServedVariables:
    """Slices of a model's variables under the user's optimizer. Any thread may call.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Not built yet; its state lives here from now on.
    hello : Hello
        What the slices are.
    messages : dict of Push to Messages
        By worker and lane; may be added to.

    Attributes
    ----------
    rows : dict of Push to float
        By worker and lane: what the last push counts for in a mean with others; one of 0 counts for nothing.
    """

    def __init__(self, optimizer: Any, hello: Hello, messages: dict[Push, Messages]) -> None:
        import tensorflow as tf

        self._optimizer = optimizer
        self._messages = messages
        self._layout = hello.weights
        self._variables = [_variable(part.path, part.shape, part.dtype) for part in hello.parts]
        self._lock = threading.Lock()
        self._due: Sequence[Push] = ()
        self._reader: Push = (0, 0)
        self._sums: list[Array] = []
        self._parts: list[Array] = []
        self.rows: dict[Push, float] = {}
        self._slots = build_optimizer(optimizer, self._variables)
        self._first_version = self.version
        # Traced here, so that the first push takes no longer than the others.
        self._update = tf.function(self._traced_update).get_concrete_function()
        self._copy = tf.function(self._traced_copy).get_concrete_function()

    def assign(self, weights: Sequence[Array]) -> None:
        """Set the slices' values, before training begins."""
        for variable, value in zip(self._variables, weights, strict=True):
            variable.assign(value)

    @property
    def version(self) -> int:
        """Updates applied so far, those of earlier fits included."""
        return int(self._optimizer._iterations.numpy())

    @property
    def updates(self) -> int:
        """Updates applied here."""
        return self.version - self._first_version

    def apply(self, pushes: Sequence[Push]) -> None:
        """Apply, as one update, the mean by rows of the gradients that lie in some messages."""
        due = [push for push in pushes if self.rows[push] > 0]
        with self._lock:
            if due:
                self._due = due
                self._update()

    def copy_to(self, push: Push) -> int:
        """Write the newest weights into the message that answers a push; return their version."""
        with self._lock:
            self._reader = push
            self._copy()
            return self.version

    def state(self) -> bytes:
        """Return the optimizer's state, for `sparktf.distribute.slots.unpack`."""
        with self._lock:
            return pack(slot_values(self._optimizer, self._slots))

    def set_state(self, state: bytes) -> None:
        """Continue from an earlier fit's state of these slices."""
        with self._lock:
            set_slots(self._optimizer, self._slots, unpack(state))
            self._first_version = self.version

    def set_learning_rate(self, rate: float) -> None:
        """Follow a rate that a callback has set on a worker; optimizers with a schedule have their own."""
        import keras

        with self._lock:
            if isinstance(self._optimizer._learning_rate, keras.Variable):
                self._optimizer.learning_rate = rate

    def _traced_update(self) -> None:
        import tensorflow as tf

        if not self._variables:
            # A server of tables alone. Keras counts no step without variables, by which a schedule goes.
            self._optimizer._iterations.assign_add(1)
            return
        dtypes = [variable.dtype for variable in self._variables]
        gradients = tf.nest.flatten(tf.numpy_function(self._mean, [], dtypes, stateful=True))
        for gradient, variable in zip(gradients, self._variables, strict=True):
            gradient.set_shape(variable.shape)
        self._optimizer.apply(gradients, self._variables)

    def _traced_copy(self) -> None:
        import tensorflow as tf

        tf.numpy_function(self._store, [variable.value for variable in self._variables], [], stateful=True)

    def _mean(self) -> list[Array]:
        given = [self._messages[push].gradient_views for push in self._due]
        if len(given) == 1 and all(v.dtype == dtype for v, dtype in zip(given[0], self._layout.dtypes, strict=True)):
            # TensorFlow reads them where they were received.
            return given[0]
        if not self._sums:
            self._sums = self._layout.allocate()
        if not self._parts and len(given) > 1:
            self._parts = self._layout.allocate()
        rows = [self.rows[push] for push in self._due]
        for place, total in enumerate(self._sums):
            shares = [total.dtype.type(count / sum(rows)) for count in rows]
            np.multiply(given[0][place], shares[0], out=total, casting="same_kind")
            for views, share in zip(given[1:], shares[1:], strict=True):
                np.multiply(views[place], share, out=self._parts[place], casting="same_kind")
                np.add(total, self._parts[place], out=total)
        return self._sums

    def _store(self, *values: Array) -> None:
        for view, value in zip(self._messages[self._reader].weight_views, values, strict=True):
            np.copyto(view, value)


def _variable(path: str, shape: Sequence[int], dtype: str) -> Any:
    """Make a variable with the path that the model's has."""
    import keras

    *scopes, name = path.split("/")
    with ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        return keras.Variable(np.zeros(shape, dtype), dtype=dtype, trainable=True, name=name)


def check_optimizer(optimizer: Any) -> None:
    """Check that an optimizer can live on servers.

    Raises
    ------
    ParamError
        It is not a plain Keras 3 optimizer, or does what only a worker could.
    """
    import keras

    kind = type(optimizer)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ParamError(f"Expected an optimizer of keras.optimizers, received {kind.__module__}.{kind.__qualname__}.")
    if hasattr(optimizer, "inner_optimizer"):
        raise ParamError(
            f"Expected the optimizer itself, received a {kind.__name__} around it; Keras's compile makes one under "
            "mixed_float16 by itself."
        )
    if optimizer.gradient_accumulation_steps or optimizer.use_ema:
        raise ParamError(
            f"Expected an optimizer without gradient_accumulation_steps and use_ema for mode='async', received "
            f"{optimizer.gradient_accumulation_steps} and {optimizer.use_ema}. Use larger batches, or mode='sync'."
        )


def splits(optimizer: Any) -> bool:
    """Tell whether an optimizer updates rows of a variable as it would the whole.

    True for those of Keras that are known to be elementwise, unless they clip by a variable's norm.
    """
    import keras

    names = ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion")
    return optimizer.clipnorm is None and type(optimizer) in [getattr(keras.optimizers, name) for name in names]


def fresh_optimizer(optimizer: Any) -> Any:
    """Return an optimizer of the same settings that is not built: state comes from the chief."""
    return type(optimizer).from_config(optimizer.get_config()) if optimizer.built else optimizer
