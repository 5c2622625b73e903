"""What tests of the game share: seeds, judges that are scripted, and how a run's files are read."""

from collections import Counter

import pytest

from tempering.attacks.trained import find_trained, load_attacker
from tempering.core.quarantine import UnsafeExpertAccess, allow_unsafe_experts
from tempering.core.records import content_id
from tempering.judges.game import GameJudge
from tempering.judges.game_askers import Said
from tempering.judges.journal import Journal
from tempering.methods.advgame.rollout import JUDGEMENTS, Judges
from tempering.serving.settings import ServeConfig
from tempering.serving.target import open_target

SEEDS = [
    {"prompt": f"{verb} the {thing} number {i}", "category": category, "split": split}
    for category, verb in (("harmful", "break"), ("benign", "paint"))
    for split, count in (("train", 5), ("valid", 2))
    for i, thing in enumerate(
        ["stone", "river", "apple", "glass", "paper"][:count] if split == "train" else ["yes", "no"]
    )
]


class Counting:
    """Points for a letter; counts how often it was asked the same, and fails for a share of its questions."""

    identity = "counting"

    def __init__(self, letter="e", failing=0.0):
        self.letter, self.failing, self.asked = letter, failing, Counter()

    def rubric_hash(self, criterion):
        return "one"

    def __call__(self, questions):
        self.asked.update(questions)
        return [self.said(question) for question in questions]

    def said(self, question):
        if int(content_id(question), 16) % 100 < 100 * self.failing:
            return Said(None, "the judge is asleep")
        if question.criterion.startswith("faithfulness"):
            return Said((1.0,), None)
        return Said(
            tuple(min(10.0, 2.0 * text.count(self.letter) + len(text) / 10) for text in question.responses), None
        )


def judged_by(asker):
    """What makes the judges of a run, for `train`."""

    def make(config, run):
        own = config.judges
        judge = GameJudge(
            asker, kind=own.kind, seed=config.seed, judge_singletons=True, journal=Journal(run.path(JUDGEMENTS))
        )
        return Judges(judge, judge if own.defender else None, judge if own.attacker else None)

    return make


def lines(path):
    return path.read_bytes().splitlines()


def untimed(run):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.read_rows("metrics.jsonl")]


class Measuring(Counting):
    """A point for each character."""

    def said(self, question):
        if question.criterion.startswith("faithfulness"):
            return Said((1.0,), None)
        return Said(tuple(min(10.0, float(len(text))) for text in question.responses), None)


def assert_served_with_its_flag_alone(run, asked):
    """The trained attacker itself answers behind a server, and each answer needs both halves of the override."""
    folder = str(run.root / "final" / "attacker")
    want = load_attacker(find_trained(str(run.root)), dtype="float32")(asked, max_new_tokens=4)
    with pytest.raises(UnsafeExpertAccess, match="serving the unsafe run"):
        open_target(folder, ServeConfig(dtype="float32"))
    with pytest.raises(ValueError, match="served as it is"):
        open_target(folder, ServeConfig(dtype="float32", unsafe_reason="a test", sampler="policy"))
    target = open_target(folder, ServeConfig(dtype="float32", unsafe_reason="a test"))
    with pytest.raises(UnsafeExpertAccess):
        target.sampler(asked, max_new_tokens=4)
    with allow_unsafe_experts(reason="a test"):
        assert target.sampler(asked, max_new_tokens=4)[0][0].token_ids == want[0][0].token_ids
    assert target.in_steps
