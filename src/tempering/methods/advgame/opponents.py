"""Past attackers, whom the defender meets again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tempering.core.training import generator
from tempering.data.attacker import CATEGORIES, Category
from tempering.methods.advgame.players import Player
from tempering.methods.advgame.settings import AdvGameConfig

OPPONENTS = 7
"""Stream of the draws of opponents; those of the classes' seeds are 0 and 1."""


class Pool:
    """Past attackers: their averages every so many steps, from the oldest to the newest."""

    def __init__(self, config: AdvGameConfig, attacker: Player) -> None:
        self.config, self.attacker, self.settings = config, attacker, config.opponents
        self.kept: list[tuple[int, dict[str, Tensor]]] = []

    @property
    def steps(self) -> list[int]:
        """After which steps those that are kept were taken."""
        return [step for step, _ in self.kept]

    def meets(self, t: int, category: Category) -> bool:
        """Draw whether a class is attacked by a past attacker in this step, and let it take its place."""
        if not (self.settings.probability and self.kept):
            return False
        draw = generator(self.config.seed, OPPONENTS + CATEGORIES.index(category), t).random()
        # One past attacker a step: classes are sampled together.
        _, state = self.kept[
            int(generator(self.config.seed, OPPONENTS + len(CATEGORIES), t).integers(len(self.kept)))
        ]
        self.attacker.networks.take_past(state)
        return bool(draw < self.settings.probability)

    def keep(self, step: int) -> None:
        """Take the attacker's average in, where it is time to."""
        if self.settings.probability and step % self.settings.every == 0:
            self.kept = [*self.kept, (step, self.attacker.networks.snapshot())][-self.settings.size :]

    def state(self) -> dict[str, Tensor]:
        """Copy what a resumed run needs."""
        return {f"past-{step}:{name}": tensor for step, own in self.kept for name, tensor in own.items()}

    def load_state(self, state: Mapping[str, Tensor], steps: Sequence[int]) -> None:
        """Put back what `state` returned."""
        starts = [(step, f"past-{step}:") for step in steps]
        self.kept = [(s, {n.removeprefix(p): x for n, x in state.items() if n.startswith(p)}) for s, p in starts]
