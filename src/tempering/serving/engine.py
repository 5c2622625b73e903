"""The thread that has the model: takes jobs from a queue, works on all of them at a time, and never dies of one.

Used by the application; refuses to know about HTTP, and to write what was asked into a log.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from tempering.core.adapted_layers import adapters_joined_once
from tempering.core.sampling import Interrupted
from tempering.serving.calling import answer, together
from tempering.serving.errors import ApiError
from tempering.serving.jobs import Job
from tempering.serving.log import log
from tempering.serving.settings import ServeConfig
from tempering.serving.stepping import Stepping
from tempering.serving.target import Target, allowed

if TYPE_CHECKING:
    from tempering.serving.metrics import Metrics


class Engine:
    """Work on requests in a thread of its own."""

    def __init__(self, target: Target, config: ServeConfig, metrics: Metrics) -> None:
        self.target, self.config, self.metrics = target, config, metrics
        self._wake = threading.Condition()
        self._new: deque[Job] = deque()
        self._under_way: list[Job] = []
        self._calls: deque[Job] = deque()
        """Jobs that a whole call of the sampler answers."""
        self._stepping = Stepping(target, config.batch_rows, config.batch_tokens) if target.in_steps else None
        self._closed = self._has_died = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            ApiError: 503: the engine has been closed, or its thread has died.
        """
        with self._wake:
            if self._closed:
                raise ApiError(503, "the server is going down", code="shutting_down")
            if not self.is_alive:
                raise ApiError(503, "the server cannot answer any more: restart it", code="engine_dead")
            self._under_way = [one for one in self._under_way if not one.is_over]
            self._under_way.append(job)
            self._new.append(job)
            self._wake.notify()

    @property
    def is_alive(self) -> bool:
        """Whether there is a thread that works."""
        return self._thread.is_alive() and not self._has_died

    @property
    def under_way(self) -> int:
        """How many requests wait or are answered."""
        return sum(not job.is_over for job in list(self._under_way))

    def close(self, timeout_s: float = 5.0) -> bool:
        """Drop all work and end the thread; returns whether it has ended within the time."""
        with self._wake:
            self._closed = True
            for job in self._under_way:
                job.cancel()
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            # What a thread inherits does not hold the override. Weights do not change while they are served.
            with allowed(self.config), self._joining():
                self._work()
        except BaseException as error:  # a boundary: nobody waits for a thread that has died
            with self._wake:
                self._has_died = True
                self._fail(error, self._under_way)

    def _joining(self) -> AbstractContextManager[None]:
        local = self.target.local
        return adapters_joined_once(local.policy.model) if local is not None else nullcontext()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._new or self._calls or self._is_stepping):
                    self.metrics.rows.set(0)
                    self._wake.wait()
                if self._closed:
                    return
                fresh = list(self._new)
                self._new.clear()
            self._sort(fresh)
            self._calls = deque(job for job in self._calls if not job.is_cancelled)
            if self._calls:
                self._call()
            if self._is_stepping:
                self._step()

    @property
    def _is_stepping(self) -> bool:
        return self._stepping is not None and not self._stepping.is_idle

    def _sort(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._stepping is None or job.ask.routing:
                self._calls.append(job)
            else:
                self._stepping.take(job)

    def _call(self) -> None:
        """Answer one group of those that wait for a call."""
        rows_each = self.target.chooser.config.n if self.target.chooser is not None else 1
        called = together(list(self._calls), self.config.batch_rows, rows_each)
        for _ in called:
            self._calls.popleft()
        self.metrics.rows.set(sum(len(job.choices) for job in called) * rows_each)
        try:
            answer(self.target, called, lambda: self._closed or all(job.is_cancelled for job in called))
        except Interrupted:
            pass
        except Exception as error:
            self._fail(error, called)

    def _step(self) -> None:
        """Draw a token of everything that is drawn in steps."""
        assert self._stepping is not None
        try:
            self._stepping.turn()
        except Exception as error:
            self._fail(error, self._stepping.abandon())
        self.metrics.rows.set(len(self._stepping.live))

    def _fail(self, error: BaseException, jobs: Sequence[Job]) -> None:
        """Tell whoever was being answered; what was asked is in no log."""
        frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
        log(f"error: {type(error).__name__} while answering; {' < '.join(reversed(frames))}")
        fault = ApiError(500, "the server failed to answer; its log says where", code="internal_error")
        if isinstance(error, ConnectionError):
            fault = ApiError(502, "nothing answers behind this server; its log says where", code="target_failed")
        for job in jobs:
            if not job.is_over:
                job.tell([fault])
