"""Workers at their own pace: each sends its gradients to parameter servers, and all meet at an epoch's end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from sparktf.data.batches import StepPlan
from sparktf.distribute.asynchronous import check_variables, finish, push_and_pull, restore_pushing, start
from sparktf.distribute.checks import loss_reduction
from sparktf.distribute.client import ParameterClient
from sparktf.distribute.clock import StepClock
from sparktf.distribute.fit import FitSettings, RankRows
from sparktf.distribute.lockstep import step_plan, without_xla
from sparktf.distribute.meeting import Meeting
from sparktf.distribute.model import Coordination, distribute_model, restore_model
from sparktf.distribute.optimizer import find_optimizers
from sparktf.distribute.served import check_optimizer, splits
from sparktf.distribute.shards import check_shards, plan_shards
from sparktf.distribute.slots import build_optimizer, served, set_slots, slot_values, slots_of
from sparktf.distribute.state import broadcast_variables, seed_generators
from sparktf.distribute.table_servers import bring_back_tables, tables_at_servers
from sparktf.errors import ParamError
from sparktf.transport import Communicator


class OwnPace:
    """A worker of an asynchronous fit; see `sparktf.distribute.fit.Together`.

    It takes the steps of its own rows. With ``max_staleness=0`` all take as many, and servers apply the mean by rows of
    a step's gradients: updates are those of `sparktf.distribute.lockstep`.

    Parameters
    ----------
    client : ParameterClient
    meeting : Meeting
        Of all workers.
    rows : RankRows
        Of the workers.
    batch_size : int
        Rows per worker and step.
    links : sequence of Communicator
        To the servers' tables (see `sparktf.distribute.pair.connect_again`), where the model has such.

    Raises
    ------
    DataError
        No worker has rows.
    """

    def __init__(
        self,
        client: ParameterClient,
        meeting: Meeting,
        rows: RankRows,
        batch_size: int,
        links: Sequence[Communicator] = (),
    ) -> None:
        plan = step_plan(rows, batch_size)
        self._client = client
        self._links = links
        self._meeting = meeting
        self._all_rows = rows
        self._together = not client.overlaps
        self._stop_wanted = False
        self._had_state = False
        self.rank = meeting.rank
        self.rows = rows.training[self.rank]
        # One without rows takes a step that counts for nothing, for Keras's sake.
        self.steps = plan.steps if self._together else max(1, -(-self.rows // batch_size))
        own = StepPlan(rows=(self.rows,), batch_size=batch_size)
        self.clock = StepClock(plan, self.rank) if self._together else StepClock(own, 0)

    @property
    def stop_agreed(self) -> bool:
        """Whether a worker has asked all to stop."""
        return self._client.stopping

    def request_stop(self) -> None:
        """Ask all workers to stop: each does once it has the answer to a push of from then on."""
        self._stop_wanted = True

    def clear_stop(self) -> None:
        """Forget it, before a fit begins."""
        self._stop_wanted = False

    @contextlib.contextmanager
    def hold(self, model: Any, settings: FitSettings, notices: list[str]) -> Iterator[None]:
        """Hold the model and its optimizer in their distributed form.

        Raises
        ------
        ParamError
            The model's losses are not means or sums over the rows, or its optimizer cannot live on servers.
        """
        optimizer = plain_optimizer(model)
        sums = loss_reduction(model) == "sum"
        sharing = self._together and self._meeting.size > 1
        coordination = Coordination(
            self._meeting,
            self,
            self.clock,
            row_weight=self.rows / sum(self._all_rows.training),
            validation_rows=self._all_rows.validation[self.rank],
            sum_loss=sums and sharing,
            may_idle=sharing or self.rows == 0,
            lockstep=sharing,
            epoch_ends=lambda: finish(optimizer),
        )
        self._had_state = optimizer.built
        with without_xla(model, notices), contextlib.ExitStack() as stack:
            push_and_pull(optimizer, self._client, lambda: coordination.local_rows, lambda: self._stop_wanted)
            stack.callback(restore_pushing, optimizer)
            distribute_model(model, coordination)
            stack.callback(restore_model, model)
            stack.enter_context(tables_at_servers(model, self._links, coordination.table_share))
            yield

    def begin(self, model: Any, settings: FitSettings) -> None:
        """Bring the chief's weights and its optimizer's state to the servers, and from there to all workers."""
        optimizer = plain_optimizer(model)
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        state = slot_values(optimizer, slots_of(optimizer)) if self._had_state and self.rank == 0 else None
        start(optimizer, optimizer._trainable_variables, state)
        # BackupAndRestore runs on the chief only, and may have found an earlier fit that did not end.
        first = int(self._meeting.all_gather_bytes(str(int(model._initial_epoch or 0)).encode())[0])
        model._initial_epoch = first
        broadcast_variables(model.non_trainable_variables, self._meeting)
        seed_generators(model, settings.seed, self.rank)

    def end_epoch(self, model: Any, epoch: int) -> None:
        """Let all workers know whether one of them wants to stop."""
        wants = self._meeting.all_gather_bytes(b"stop" if self._stop_wanted or self.stop_agreed else b"go on")
        self._client.stopping = b"stop" in wants

    def saves(self) -> bool:
        """Decide, at the end, which worker saves the model: the first that is not lost. All of them ask."""
        return min(self._meeting.gather(b"")) == self.rank

    def bring_back_state(self, model: Any) -> None:
        """Give the optimizer, which is its plain self again, and the model's tables what the servers hold."""
        optimizer = plain_optimizer(model)
        values = self._client.state()
        if self._had_state:
            slots = slots_of(optimizer)
        else:
            variables, optimizer.built = list(optimizer._trainable_variables), False
            slots = build_optimizer(optimizer, variables)
        set_slots(optimizer, slots, values)
        bring_back_tables(model)

    def explain(self, error: BaseException) -> BaseException | None:
        """Return what was behind an error that TensorFlow raised in a step."""
        return self._client.failure

    def waited_seconds(self) -> float:
        """Return the seconds so far that this worker waited for servers and other workers."""
        return self._client.waited_seconds


def plain_optimizer(model: Any) -> Any:
    """Return a model's only optimizer, without the loss scaling around it.

    Raises
    ------
    ParamError
        It has several, or one that cannot live on servers.
    """
    optimizers = find_optimizers(model)
    if len(optimizers) != 1:
        raise ParamError(
            f"Expected a model with one optimizer for mode='async', received {len(optimizers)}. Use mode='sync'."
        )
    optimizer = getattr(optimizers[0], "inner_optimizer", optimizers[0])
    check_optimizer(optimizer)
    return optimizer


def check_servable(model: Any, servers: int) -> None:
    """Check, before a job begins, that parameter servers can hold what a compiled model trains.

    Raises
    ------
    ParamError
        They cannot: its optimizer, its constraints, or too few variables for so many servers.
    """
    optimizer = plain_optimizer(model)
    if model.built:
        variables = served(model.trainable_variables)
        check_variables(variables)
        if len(variables) < len(model.trainable_variables):
            # Every server holds a part of each table.
            return
        shapes = [tuple(v.shape) for v in variables]
        check_shards(plan_shards(shapes, [1] * len(shapes), servers, splits(optimizer)))
