"""Keras's optimizers for rows of a table: only those that a step touches are read and written.

A row that every step touches goes as under Keras's own optimizer. Others keep their slots as they are meanwhile (the
moments of Adam do not fade, momentum does not go on); Adam's bias correction counts the table's updates, not the row's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparktf.errors import ParamError

Array = np.ndarray[Any, Any]

# What Keras's optimizers can do beside their own step that rows of a table cannot follow, and why.
_REFUSED = {
    "weight_decay": "it would change rows that no step touches",
    "clipnorm": "the norm is that of the whole table's gradient, parts of which are on other nodes",
    "global_clipnorm": "the norm is that of all gradients, those of the table are on other nodes",
    "use_ema": "the average moves for rows that no step touches",
    "loss_scale_factor": "gradients of a table are not scaled back",
    "gradient_accumulation_steps": "a table is updated in every step",
}


class SparseOptimizer(ABC):
    """Updates some rows of a table, each once.

    Parameters
    ----------
    config : mapping
        As the Keras optimizer's ``get_config()`` gives it; its learning rate is not looked at.

    Attributes
    ----------
    slots : dict of str to float
        What it keeps for every element, and with what that begins.
    """

    slots: dict[str, float]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self._clip = config.get("clipvalue")
        self.slots = {}

    @property
    def name(self) -> str:
        """The name of Keras's class."""
        return type(self).__name__

    def update(self, values: Array, gradients: Array, slots: Mapping[str, Array], rate: float, step: int) -> None:
        """Update rows and their slots in place.

        Parameters
        ----------
        values : ndarray of float32, (n, dim)
        gradients : ndarray of float32, (n, dim)
            Each row's whole gradient. Left as it is.
        slots : mapping of str to ndarray of float32, (n, dim)
        rate : float
            The learning rate.
        step : int
            Of the table, from 1.
        """
        if self._clip is not None:
            gradients = np.clip(gradients, -np.float32(self._clip), np.float32(self._clip))
        self._step(values, gradients, slots, np.float32(rate), step)

    @abstractmethod
    def _step(self, w: Array, g: Array, slots: Mapping[str, Array], rate: Any, step: int) -> None: ...

    def _of(self, name: str) -> Any:
        return np.float32(self.config[name])


class SGD(SparseOptimizer):
    """Gradient descent, with momentum or without."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.slots = {"momentum": 0.0} if config["momentum"] else {}

    def _step(self, w: Array, g: Array, slots: Mapping[str, Array], rate: Any, step: int) -> None:
        if not slots:
            w -= g * rate
            return
        m, momentum = slots["momentum"], self._of("momentum")
        m *= momentum
        m -= g * rate
        w += m * momentum - g * rate if self.config["nesterov"] else m


class Adagrad(SparseOptimizer):
    """Duchi, Hazan, Singer, "Adaptive Subgradient Methods", 2011."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.slots = {"accumulator": float(config["initial_accumulator_value"])}

    def _step(self, w: Array, g: Array, slots: Mapping[str, Array], rate: Any, step: int) -> None:
        accumulator = slots["accumulator"]
        accumulator += np.square(g)
        w -= rate * g / np.sqrt(accumulator + self._of("epsilon"))


class Adam(SparseOptimizer):
    """Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if config.get("amsgrad"):
            raise ParamError("Expected Adam without amsgrad for a sharded table, received amsgrad=True.")
        self.slots = {"m": 0.0, "v": 0.0}

    def _step(self, w: Array, g: Array, slots: Mapping[str, Array], rate: Any, step: int) -> None:
        m, v = slots["m"], slots["v"]
        one = np.float32(1)
        # In single precision, as Keras does it.
        fade_m, fade_v = self._of("beta_1") ** np.float32(step), self._of("beta_2") ** np.float32(step)
        alpha = rate * np.sqrt(one - fade_v) / (one - fade_m)
        m += (g - m) * np.float32(1 - self.config["beta_1"])
        v += (np.square(g) - v) * np.float32(1 - self.config["beta_2"])
        w -= m * alpha / (np.sqrt(v) + self._of("epsilon"))


class Ftrl(SparseOptimizer):
    """McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.slots = {"accumulator": float(config["initial_accumulator_value"]), "linear": 0.0}

    def _step(self, w: Array, g: Array, slots: Mapping[str, Array], rate: Any, step: int) -> None:
        accumulator, linear = slots["accumulator"], slots["linear"]
        power, l1 = -self._of("learning_rate_power"), self._of("l1_regularization_strength")
        l2 = self._of("l2_regularization_strength") + self._of("beta") / (np.float32(2) * rate)
        after = accumulator + np.square(g)
        shrunk = g + np.float32(2) * self._of("l2_shrinkage_regularization_strength") * w
        linear += shrunk - (after**power - accumulator**power) / rate * w
        w[:] = (np.clip(linear, -l1, l1) - linear) / (after**power / rate + np.float32(2) * l2)
        accumulator[:] = after


KNOWN: dict[str, type[SparseOptimizer]] = {cls.__name__: cls for cls in (SGD, Adagrad, Adam, Ftrl)}


def sparse_optimizer(name: str, config: Mapping[str, Any]) -> SparseOptimizer:
    """Make one by the name and the configuration of a Keras optimizer.

    Raises
    ------
    ParamError
        There is none of this name, or the configuration asks for what rows of a table cannot follow.
    """
    if name not in KNOWN:
        raise ParamError(
            f"Expected one of {', '.join(KNOWN)} of keras.optimizers for a sharded table, received {name}. Give the "
            "layer one of its own: ShardedEmbedding(..., optimizer=keras.optimizers.Adagrad(0.1))."
        )
    for option, why in _REFUSED.items():
        if config.get(option):
            raise ParamError(
                f"Expected an optimizer without {option} for a sharded table, received {config[option]!r}: {why}. Give "
                "the layer an optimizer of its own: ShardedEmbedding(..., optimizer=...)."
            )
    return KNOWN[name](config)


def sparse_optimizer_of(optimizer: Any) -> SparseOptimizer:
    """Make one that does what a Keras optimizer does.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Also one that is distributed.

    Raises
    ------
    ParamError
    """
    kind = getattr(type(optimizer), "_sparktf_original", type(optimizer))
    if hasattr(optimizer, "inner_optimizer"):
        raise ParamError(
            f"Expected no {kind.__name__} for a sharded table, whose gradients it would not scale back; Keras's "
            "compile makes one under mixed_float16. Use the policy mixed_bfloat16, which needs none."
        )
    name = kind.__name__ if kind.__module__.startswith("keras.") else f"{kind.__module__}.{kind.__qualname__}"
    return sparse_optimizer(name, optimizer.get_config())
