"""Trees that are played ahead, so that players learn while judges are waited for.

    staleness 0   step t is played by the weights of step t, and nothing else happens meanwhile
    staleness k   in step t: attacks of step t + k, by the weights of step t        while step t is still judged
                             a player learns from step t                           while those attacks are checked
                             answers of step t + k, by the same weights
                             the other player learns, averages, saving             while step t + k is judged

So every tree is exactly k steps old, fewer in the first k steps: nothing is dropped, and nothing depends on how long
anything took. The players compute in the caller's thread alone. One more thread asks judges, in the order in which
trees were drawn, so that both journals have one order, and a resumed run is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tempering.data.attacker import Category
from tempering.methods.advgame.networks import Weights
from tempering.methods.advgame.pairs import Tree
from tempering.methods.advgame.rollout import Dealer, Table, judging_metrics
from tempering.methods.advgame.settings import AdvGameConfig

Deal = Callable[[Category, int, Weights | None], Table]
"""Set a class's table for a step; by this attacker, or by the one whose turn it is."""


@dataclass
class Round:
    """The trees of one step on their way."""

    t: int
    drawn_at: int
    """The step whose weights play."""
    tables: list[Table]
    dealer: Dealer
    """Its own, since what judges say of it is counted with it."""
    checked: Future[list[Tree]]
    judged: Future[list[Tree]] | None = None
    """Once it is answered."""

    def to_row(self) -> dict[str, Any]:
        """What a resumed run needs, to find what was written by weights that are gone."""
        attackers = {table.category: table.attacker for table in self.tables}
        return {"t": self.t, "drawn_at": self.drawn_at, "attackers": attackers, "versions": self.dealer.versions}


class Rounds:
    """Gives each step its trees, played now or ahead."""

    def __init__(self, config: AdvGameConfig, dealer: Dealer, deal: Deal) -> None:
        self.config, self.dealer, self.deal = config, dealer, deal
        self.staleness = config.rollout.staleness
        self.ahead: list[Round] = []
        """From the next step to learn from on."""
        self.waited = 0.0
        """Seconds in which the players had nothing to do but wait for judges."""
        self._thread = ThreadPoolExecutor(1, "judges") if self.staleness else None

    def begin(self, t: int) -> None:
        """Draw what step t has to draw: the attacks of step t + staleness, and in the first step of those before."""
        if not self.staleness:
            return
        after = self.ahead[-1].t + 1 if self.ahead else t
        for s in range(after, min(t + self.staleness + 1, self.config.steps)):
            self.answer()
            self._draw(s, t, self.dealer.apart())

    def play(self, t: int, categories: Sequence[Category]) -> tuple[list[Table], list[Tree]]:
        """Return the tables and trees of some classes in step t, with their rewards."""
        if not self.staleness:
            tables = [self.deal(category, t, None) for category in categories]
            return tables, self.dealer.play(*tables)
        own = self.ahead[0]
        assert own.t == t
        if own.judged is None:
            self.answer()
        assert own.judged is not None
        trees = self._result(own.judged)
        return (
            [table for table in own.tables if table.category in categories],
            [tree for tree in trees if tree.category in categories],
        )

    def answer(self) -> None:
        """Have the attacks that were drawn last answered, once they are checked."""
        if not (self.ahead and self.ahead[-1].judged is None):
            return
        assert self._thread is not None
        own = self.ahead[-1]
        trees = own.dealer.answer(own.tables, self._result(own.checked))
        self._count(own)
        own.judged = self._thread.submit(own.dealer.grade, trees)

    def end(self, t: int) -> tuple[dict[str, float], int, int]:
        """Close step t; returns `judging_metrics` of it, with how old its trees were and how long was waited."""
        if not self.staleness:
            return judging_metrics(self.dealer.judges)
        own = self.ahead.pop(0)
        self.dealer.reasons.update(own.dealer.reasons)
        found, unscored, asked = judging_metrics(own.dealer.judges)
        found |= {"staleness": t - own.drawn_at, "waited_seconds": round(self.waited, 3)}
        self.waited = 0.0
        return found, unscored, asked

    def settle(self) -> None:
        """Wait until no judge is at work: whoever asks one next is alone."""
        for own in self.ahead:
            self._result(own.judged or own.checked)

    def state(self) -> list[dict[str, Any]]:
        """What a resumed run needs of what is under way; all of it is answered."""
        return [own.to_row() for own in self.ahead]

    def load_state(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put back what `state` returned: samples from their journal, judgements from theirs or by asking."""
        for row in rows:
            self._draw(row["t"], row["drawn_at"], self.dealer.apart(row["versions"]), row["attackers"])
            self.answer()

    def close(self) -> None:
        """Let the judges end what they are at, and ask no more."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _draw(self, s: int, t: int, dealer: Dealer, attackers: dict[Category, Weights] | None = None) -> None:
        assert self._thread is not None
        named = attackers or {}
        tables = [self.deal(c, s, named.get(c))._replace(staleness=s - t) for c in self.config.data.classes]
        trees = dealer.attack(tables)
        own = Round(s, t, tables, dealer, self._thread.submit(dealer.check, trees))
        self._count(own)
        self.ahead.append(own)

    def _count(self, own: Round) -> None:
        """Count what was written; what is replayed was counted when it was."""
        if not own.dealer.is_replaying:
            self.dealer.tokens += own.dealer.tokens
        own.dealer.tokens = 0

    def _result(self, future: Future[list[Tree]]) -> list[Tree]:
        began = time.monotonic()
        try:
            return future.result()
        finally:
            self.waited += time.monotonic() - began
