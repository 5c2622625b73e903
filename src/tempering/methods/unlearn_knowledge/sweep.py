"""Choosing the loss layer by short trials: `layer=sweep`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tempering.core.activations import blocks
from tempering.core.edit_optimiser import EditOptimiser
from tempering.core.policy import Policy
from tempering.core.probes import auroc, difference_of_means, mean_states
from tempering.core.progress import progress, say
from tempering.core.run import Run
from tempering.core.stats import forgotten
from tempering.core.training import Processes
from tempering.methods.unlearn_knowledge.measuring import FORGET, Measurer
from tempering.methods.unlearn_knowledge.settings import UnlearnKnowledgeConfig, plan, swept_layers
from tempering.methods.unlearn_knowledge.terms import Terms
from tempering.methods.unlearn_knowledge.texts import Corpus, contrasted

CANDIDATES, TRIAL_STEPS, PRICE = 5, 30, 10.0
FILE = "data/layers.json"


def swept(
    config: UnlearnKnowledgeConfig, policy: Policy, corpus: Corpus, measurer: Measurer, run: Run, processes: Processes
) -> int:
    """Return the layer that does best in a trial; the weights are as before. A resumed run reads what was found.

    Candidates are the blocks at 20 to 40 % of the depth whose mean states tell texts to forget best from texts to
    keep (AUROC of the difference of means, at most five; ties: the lower block). Each trains for 30 steps, without
    the simulated attack:

        score = clip((before - now) / (before - chance), 0, 1) - 10 KL      on development questions and neutral text

    Raises:
        ValueError: no development question asks about what is forgotten, or the model does not know it.
    """
    if not run.has(FILE):
        found = trials(config, policy, corpus, measurer, processes)
        if processes.is_main:
            run.write_json(FILE, found)
    processes.wait()
    rows = run.read_json(FILE)["layers"]
    for row in rows:
        say(", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                      for name, value in row.items()))  # fmt: skip
    best = max(rows, key=lambda row: (row["score"], -row["layer"]))
    return int(best["layer"])


def trials(
    config: UnlearnKnowledgeConfig, policy: Policy, corpus: Corpus, measurer: Measurer, processes: Processes
) -> dict[str, Any]:
    """Try the candidates; one row each."""
    chance = measurer.chance
    before = measurer.start_accuracy.get(FORGET)
    if before is None or before <= chance:
        raise ValueError(
            "layer=sweep needs development questions (`dev`: true) about what is forgotten, which the start model "
            "answers above chance; name a layer"
        )
    count = len(blocks(policy.model))
    aurocs = separations(config, policy, corpus, swept_layers(count))
    layers = sorted(sorted(aurocs, key=lambda layer: (-aurocs[layer], layer))[:CANDIDATES])
    objective = "cosine_rmu" if config.objective == "meta_cosine_rmu" else config.objective
    rows = []
    with progress("trials", len(layers) * TRIAL_STEPS) as advance:
        for layer in layers:
            trial = config.model_copy(update={"layer": layer, "objective": objective, "steps": TRIAL_STEPS})
            terms = Terms(trial, policy, plan(trial, count), corpus, processes)
            optimiser = EditOptimiser(terms.parameters, processes, trial.value("lr"))
            for t in range(TRIAL_STEPS):
                topic = t % len(terms.topics)
                f_rows, r_rows = terms.rows_of(t, topic)
                g_f, _ = terms.forget_gradient(f_rows, topic, t)
                g_r, _ = terms.retain_gradient(r_rows, t)
                optimiser.step({n: g_f[n] + g_r[n] for n in g_f}, t)
                advance(1)
            now = measurer.measure(TRIAL_STEPS)
            policy.undo_edit()
            gone = forgotten(before, now.accuracy[FORGET], chance) or 0.0
            rows.append({"layer": layer, "auroc": aurocs[layer], "forgotten": gone, "kl": now.kl,
                         "score": gone - PRICE * now.kl})  # fmt: skip
    return {"steps": TRIAL_STEPS, "layers": rows}


def separations(
    config: UnlearnKnowledgeConfig, policy: Policy, corpus: Corpus, layers: list[int]
) -> dict[int, float]:
    """Block -> AUROC with which the difference of mean states tells texts to forget from texts to keep."""
    rows = contrasted(config, policy.tokenizer, corpus)
    y = np.array([row.has_attribute for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        features = mean_states(
            policy, [row.tokens for row in rows], layers, Path(folder),
            skip_first=config.skip_first, batch_tokens=config.batch_tokens,
        )  # fmt: skip
        return {layer: auroc(difference_of_means(x, y), x, y) for layer, x in features.items()}
