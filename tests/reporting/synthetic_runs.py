"""Synthetic run folders, small and deterministic, with everything that a report reads."""

import json
import random

import yaml

PROMPTS = {"harm": 60, "over_refusal": 40, "capability": 50}
METRIC = {"harm": "harmful_rate", "over_refusal": "over_refusal_rate", "capability": "capability_accuracy"}
CATEGORIES = ("fraud", "harassment", "break-ins", "tampering")
JUDGE = "rules/1 parser 1"


def write_eval(root, name, rate, *, target, system=None, n=None, seed=0, kind=None, judge=JUDGE, rows=True,
               unscored=0, completion=None, numbers=None, metric=None, attack=None):  # fmt: skip
    """Write `evals/NAME.json(l)`: the first round(rate * n) prompts of a keyed shuffle have outcome true."""
    from tempering.core.stats import bootstrap_mean, wilson

    kind = kind or name
    metric, n = metric or METRIC.get(kind, kind), n or PROMPTS.get(kind, 40)
    order = sorted(range(n), key=lambda i: random.Random(f"{name}{i}").random())
    positive = set(order[: round(rate * n)])
    lines = []
    for i in range(n):
        outcome = numbers[i] if numbers is not None else i in positive
        if i >= n - unscored:
            outcome = None
        word = {True: "yes", False: "no", None: "unscored"}.get(outcome, "number")
        lines.append({
            "id": f"{kind}-{i:03d}", "prompt_id": f"{kind}-{i:03d}",
            "prompt": f"{kind} prompt {i}: how would one go about the thing numbered {i}?",
            "category": CATEGORIES[i % 4], "attack": attack,
            "completion": completion or (
                "Sure. First one looks at the thing, then one does it, step by step." if outcome
                else "I can't help with that, but here is what would be fine instead."
            ),
            "finish": "stop", "metric": metric, "outcome": outcome,
            "verdict": {
                "score": None if outcome is None else float(outcome > 0), "label": word, "reason": "by rule",
                "judge": judge,
            },
        })  # fmt: skip

    def aggregate(some):
        scored = [r["outcome"] for r in some if r["outcome"] is not None]
        got = wilson(sum(scored), len(scored)) if numbers is None else bootstrap_mean(scored)
        name_ = f"{metric}/{attack}" if attack else metric
        return {name_: {**got._asdict(), "n": len(scored), "unscored": len(some) - len(scored), "judge": judge}}

    breakdown = {c: aggregate([r for r in lines if r["category"] == c]) for c in CATEGORIES}
    document = {
        "schema": 1, "eval": kind, "target": target, "system": system, "metrics": aggregate(lines),
        "breakdown": breakdown if kind == "harm" else {}, "settings": {"max_new_tokens": 64, "seed": seed},
        "cost": {"seconds": 12.5, "prompt_tokens": 100, "completion_tokens": 900}, "warnings": [],
    }  # fmt: skip
    folder = root / "evals"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    if rows:
        text = "".join(json.dumps(r) + "\n" for r in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_run(root, method="eval", *, done=True, provenance=None, **config):
    """Write `config.yaml`, `provenance.json` and `DONE`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(yaml.safe_dump({"method": method, "model": "smollm2", **config}))
    facts = {
        "created": "2026-01-02T03:04:05Z", "command": ["temper", method], "versions": {"tempering": "0.1.0"},
        **(provenance or {}),
    }  # fmt: skip
    (root / "provenance.json").write_text(json.dumps(facts), encoding="utf-8")
    if done:
        (root / "DONE").write_text("2026-01-02T04:04:05Z\n")
    return root


def write_training(root, *, stages=3, steps=40, pairs=60, seed=0):
    """Write metrics, scores, plan, exposure and the difficulty summary of a staged run."""
    rng = random.Random(seed)
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(stages * steps):
        stage, t = divmod(step, steps)
        margin = 0.004 * step + rng.gauss(0, 0.08) + 0.3 * t / steps
        lines.append({
            "step": step, "loss": 0.69 - margin / 3, "lr": 5e-5 * (1 - t / steps), "tokens": 900,
            "seconds": 0.8, "stage": stage, "stage_step": t, "competence": (t / steps) ** 0.5, "distinct_in_batch": 8,
            "pool": max(8, int(pairs * (t / steps) ** 0.5)), "grad_norm": 1.0, "reward_chosen": margin / 2,
            "reward_rejected": -margin / 2, "accuracy": 0.8,
        })  # fmt: skip
        if t in (0, steps // 2, steps - 1):
            lines.append({
                "event": "heldout", "step": step, "stage": stage, "margin_stage": 0.6 * t / steps,
                "margin_initial": 0.01 * step, "margin_raw": 3 + step / 20, "accuracy": 0.7,
                "logprob_chosen": -40 - step / 30, "logprob_rejected": -44 - step / 10,
            })  # fmt: skip
    scores = {f"p{i:04d}": rng.gauss(0.1, 0.2) for i in range(stages * pairs)}
    ranked = sorted(scores, key=lambda p: -scores[p])
    plan = [ranked[k * pairs : (k + 1) * pairs] for k in range(stages)]
    exposure = [
        {"id": p, "stage": k, "draws": round(10 * (1 - i / pairs)), "expected": 10 * (1 - i / pairs)}
        for k, ids in enumerate(plan)
        for i, p in enumerate(ids)
    ]
    rows = {
        "metrics.jsonl": lines,
        "data/scored.jsonl": [
            {"id": p, "split": "train", "score": s, "scorer": "logprob_margin"} for p, s in scores.items()
        ],
        "data/plan.jsonl": [
            {"stage": k, "ids": ids, "n": pairs, "T": steps, "B": 8, "E": 5} for k, ids in enumerate(plan)
        ],
        "data/exposure.jsonl": exposure,
    }
    for name, some in rows.items():
        (root / name).write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    summary = {"share_negative": 0.31, "spearman_length": -0.12, "iqr": 0.27, "warnings": []}
    (data / "difficulty.json").write_text(json.dumps(summary))


def write_base(root):
    """A run that measured the start model."""
    write_run(root)
    for name, rate in (("harm", 50 / 60), ("over_refusal", 1 / 40), ("capability", 30 / 50)):
        write_eval(root, name, rate, target="smollm2", system="base")
    write_eval(
        root, "prefill", 0.9, kind="redteam", metric="attack_success_rate", attack="prefill",
        target="smollm2", system="base",
    )  # fmt: skip
    return root


def write_tempered(root):
    """A trained run with its own evals."""
    provenance = {
        "judges": {"filter": "llm qwen rubric 1a2b", "report": JUDGE},
        "data_licences": {"demo pairs": "Apache-2.0"},
        "cost": {
            "scoring": {"seconds": 41, "tokens": 9}, "reference": {"seconds": 12, "tokens": 9},
            "training": {"seconds": 188, "tokens": 9},
        },
        "parents": ["smollm2"],
    }  # fmt: skip
    write_run(root, "staged_competence", provenance=provenance, lr=5e-5, beta=0.1, seed=42)
    write_training(root)
    for name, rate in (("harm", 7 / 60), ("over_refusal", 2 / 40), ("capability", 29 / 50)):
        write_eval(root, name, rate, target=str(root))
    write_eval(root, "prefill", 0.3, kind="redteam", metric="attack_success_rate", attack="prefill", target=str(root))
    return root


ARMS = {
    "standard_dpo": (0.40, 0.05),
    "staged_competence": (0.15, 0.05),
    "control_random_buckets": (0.30, 0.05),
    "control_low_beta": (0.17, 0.05),
}


def write_comparison(root, arms=ARMS, seeds=(0, 1, 2), kl=None):
    """A parent run with arms; `kl` gives each arm's mean KL."""
    write_run(root, "staged_competence")
    for arm, (harm, over_refusal) in arms.items():
        for seed in seeds:
            child = root / "arms" / f"{arm}-seed{seed}"
            write_run(
                child,
                "staged_competence",
                seed=seed,
                provenance={"cost": {"training": {"seconds": 100 + seed}}},
            )
            write_training(child, steps=20, seed=seed)
            shift = (seed - 1) / 60
            write_eval(child, "harm", harm + shift, target=str(child))
            write_eval(child, "over_refusal", over_refusal, target=str(child))
            write_eval(child, "capability", 0.58 + shift, target=str(child))
            level = (kl or {}).get(arm, 5.0)
            numbers = [level + 0.1 * ((i * 7 + seed) % 5 - 2) for i in range(40)]
            write_eval(child, "separation", 0, metric="kl_initial", numbers=numbers, target=str(child))
    return root
