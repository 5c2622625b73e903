"""What has to hold before the first step: a scorer that knows nothing of the probes' texts, and something to
unlearn.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tempering import judges
from tempering.core.policy import Policy
from tempering.core.progress import say
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler
from tempering.core.stats import Comparison, paired_bootstrap
from tempering.judges.toxicity import known_corpora, trained_on
from tempering.methods.unlearn_toxicity.settings import UnlearnToxicityConfig
from tempering.methods.unlearn_toxicity.texts import corpora_of, openings


def load_scorer(config: UnlearnToxicityConfig) -> judges.Judge:
    """Make the scorer.

    Raises:
        ValueError: it was trained on a data set that the probes' texts come from: its fall would be no evidence.
    """
    scorer = judges.load_judge(config.scorer, "toxic")
    corpora, known = corpora_of(config), trained_on(scorer)
    if shared := sorted(known_corpora(corpora) & (known or frozenset())):
        raise ValueError(
            f"scorer={config.scorer} was trained on {', '.join(shared)}, and so are the probes (data.probe, "
            "data.corpora): it would confirm itself; name another, such as scorer=rules"
        )
    if known is None and corpora:
        say(f"[yellow]{config.scorer}: it is not known what it was trained on; the probes' texts are of {corpora}[/]")
    return scorer


def expected_maximum(
    policy: Policy, prompts: Sequence[Prompt], scorer: judges.Judge, config: UnlearnToxicityConfig
) -> list[float]:
    """The largest toxicity of a few continuations of each prompt."""
    groups = LocalSampler(policy, fmt="raw")(
        prompts, n=config.check.samples, max_new_tokens=config.check.max_new_tokens, temperature=1.0, top_p=0.9,
        seed=config.seed,
    )  # fmt: skip
    found = judges.judge_groups(scorer, list(zip(prompts, groups, strict=True)))
    return [max((v.score or 0.0) for v in verdicts) for verdicts in found]


def check_start(config: UnlearnToxicityConfig, policy: Policy, scorer: judges.Judge) -> dict[str, object]:
    """Ask whether the start model is more toxic after rude text than after neutral text; returns what was found.

    Raises:
        ValueError: it is not, and `allow_chance` is false.
    """
    if not config.check.prompts:
        return {"claim": "none", "reason": "check.prompts=0"}
    rude, plain = openings(config, config.check.prompts)
    a, b = (expected_maximum(policy, side, scorer, config) for side in (rude, plain))
    return judged_start(a, b, allow_chance=config.allow_chance, scorer=scorer.identity)


def judged_start(
    rude: Sequence[float], plain: Sequence[float], *, allow_chance: bool, scorer: str
) -> dict[str, object]:
    """Compare the maxima after both sorts of text, by bootstrap over the pairs.

    Raises:
        ValueError: the interval of the difference holds zero, and `allow_chance` is false.
    """
    found: Comparison = paired_bootstrap(rude, plain)
    facts = {
        "expected_max_toxicity": round(statistics.fmean(rude), 4),
        "neutral": round(statistics.fmean(plain), 4),
        "difference": [round(found.difference, 4), round(found.low, 4), round(found.high, 4)],
        "prompts": len(rude),
        "scorer": scorer,
    }
    if found.low > 0:
        return {"claim": "toxicity", **facts}
    if not allow_chance:
        raise ValueError(
            "the start model is not measurably more toxic after rude text "
            f"({facts['expected_max_toxicity']}) than after neutral text ({facts['neutral']}; difference "
            f"{found.low:.3f} to {found.high:.3f}, {len(rude)} texts each): there is nothing to unlearn; use "
            "another model, more check.prompts, or allow_chance=true, which claims nothing"
        )
    return {"claim": "none", **facts}
