"""The thread that has the model: takes jobs from a queue, works on all of them at a time, and never dies of one.

Used by the application; refuses to know about HTTP, and to write what was asked into a log.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        self._called: list[Job] = []
        """Those that one is answering now."""
        self._stepping = Stepping(target, config.batch_rows, config.batch_tokens) if target.in_steps else None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            ApiError: too many do (429), or the engine has been closed (503).
        """
        with self._wake:
            if self._closed:
                raise ApiError(503, "the server is going down", code="shutting_down")
            self._under_way = [one for one in self._under_way if not one.is_over]
            if len(self._under_way) >= self.config.max_queue:
                raise ApiError(
                    429, f"{self.config.max_queue} requests are waiting or being answered; try again later",
                    code="queue_full", headers={"Retry-After": "1"},
                )  # fmt: skip
            self._under_way.append(job)
            self._new.append(job)
            self._wake.notify()

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
        with allowed(self.config):  # what a thread inherits does not hold the override
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
                self._turn()

    @property
    def _is_stepping(self) -> bool:
        return self._stepping is not None and not self._stepping.is_idle

    def _sort(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._stepping is None or job.ask.routing:
                self._calls.append(job)
            else:
                self._stepping.take(job)

    def _turn(self) -> None:
        """Answer one group by a call, where some wait for that; then draw a token of everything else."""
        try:
            self._calls = deque(job for job in self._calls if not job.is_cancelled)
            if self._calls:
                self._call()
            if self._stepping is not None and not self._stepping.is_idle:
                self._stepping.turn()
                self.metrics.rows.set(len(self._stepping.live))
        except Interrupted:
            self._called = []
        except Exception as error:
            self._fail(error)

    def _call(self) -> None:
        rows_each = self.target.chooser.config.n if self.target.chooser is not None else 1
        self._called = together(list(self._calls), self.config.batch_rows, rows_each)
        for _ in self._called:
            self._calls.popleft()
        self.metrics.rows.set(sum(len(job.choices) for job in self._called) * rows_each)
        called = self._called
        answer(self.target, called, lambda: self._closed or all(job.is_cancelled for job in called))
        self._called = []

    def _fail(self, error: Exception) -> None:
        """Tell whoever was being answered; what was asked is in no log."""
        frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
        log(f"error: {type(error).__name__} while answering; {' < '.join(reversed(frames))}")
        left = [job for job in self._called if job.open]
        self._called = []
        if self._stepping is not None:
            left += self._stepping.abandon()
        for job in left:
            job.tell([ApiError(500, "the server failed to answer; its log says where", code="internal_error")])
