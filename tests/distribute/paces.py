"""Fit one model by workers that are threads, on parameter servers that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from groups import Fitted, Make, Task, fresh, prepared, rows_of
from servers import connected

from sparktf.distribute.client import ParameterClient
from sparktf.distribute.fit import FitSettings, fit_together
from sparktf.distribute.meeting import Meeting
from sparktf.distribute.own_pace import OwnPace, plain_optimizer
from sparktf.distribute.pair import connect_again
from sparktf.distribute.served import fresh_optimizer
from sparktf.distribute.server import ServerReport, serve
from sparktf.distribute.table_fit import tables_of
from sparktf.distribute.table_servers import leave_tables, links_with_workers, served_model_tables


@dataclass(frozen=True)
class Paced:
    """What came of it: each worker's `Fitted` or error, each server's report or error, who would save the model."""

    workers: list[Any]
    servers: list[Any]
    savers: list[int]

    def raise_first(self) -> Paced:
        for outcome in (*self.servers, *self.workers):
            if isinstance(outcome, BaseException):
                raise outcome
        return self


def by_workers(
    make: Make,
    task: Task,
    *,
    servers: int = 1,
    max_staleness: int | None = None,
    compression: str = "none",
    protocol: str = "tcp",
    timeout: float = 30.0,
    never_there: int | None = None,
) -> Paced:
    """Fit on all workers; a worker that raises leaves the others without a word.

    One is `never_there`: it ends between its first meeting with the servers and its links to their tables.
    """
    count = len(task.rows)
    ours, theirs = connected(protocol, count, servers, timeout)
    outcomes: dict[tuple[str, int], Any] = {}
    savers: list[int] = []

    def work(worker: int) -> Fitted:
        with ParameterClient(ours[worker], worker, max_staleness, compression) as client, ExitStack() as stack:
            if worker == never_there:
                raise RuntimeError("it breaks")
            model, given = prepared(make, task, worker)
            pairs = ours[worker] if tables_of(model) else []
            links = [stack.enter_context(connect_again(pair, timeout)) for pair in pairs]
            together = OwnPace(client, Meeting(client, worker, count), rows_of(task), task.batch_size, links)
            settings = FitSettings(batch_size=task.batch_size, epochs=task.epochs, shuffle=False, seed=task.seed)
            report = fit_together(model, together, *given, settings, task.callbacks(worker))
            if together.saves():
                together.bring_back_state(model)
                savers.append(worker)
            leave_tables(links)
            return Fitted(model, report)

    def attend(server: int) -> ServerReport:
        with ExitStack() as stack:
            pairs = [stack.enter_context(pair) for pair in theirs[server]]
            model = fresh(make)
            optimizer = plain_optimizer(model)
            links = links_with_workers(pairs, 60.0) if tables_of(model) else {}
            tables = served_model_tables(model, optimizer, server, servers, count, links, max_staleness == 0, timeout)
            done = serve(pairs, fresh_optimizer(optimizer), timeout)
            tables.join()
            return done

    def run(role: tuple[str, int], function: Callable[[], Any]) -> None:
        try:
            outcomes[role] = function()
        except BaseException as error:
            outcomes[role] = error

    roles: dict[tuple[str, int], Callable[[], Any]] = {("worker", w): lambda w=w: work(w) for w in range(count)}
    for s in range(servers):
        roles["server", s] = lambda s=s: attend(s)
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in roles.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "it hangs"
    return Paced([outcomes["worker", w] for w in range(count)], [outcomes["server", s] for s in range(servers)], savers)
