"""What judges that run a local model share: batches of similar length, and where the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tempering.core.records import Completion, Prompt, Verdict


def judge_batches(
    identity: str,
    groups: Sequence[tuple[Prompt, Sequence[Completion]]],
    score: Callable[[list[tuple[Prompt, str]]], list[Verdict]],
    batch_size: int,
    on_done: Callable[[int], None] | None,
) -> list[list[Verdict]]:
    """Judge what can be judged in batches of similar length; failed completions are unscored, empty ones score 0."""
    verdicts: dict[tuple[int, int], Verdict] = {}
    open_ = []
    for g, (prompt, completions) in enumerate(groups):
        for i, c in enumerate(completions):
            if c.finish == "error":
                reason = f"no completion: {c.error or 'sampling failed'}"
                verdicts[g, i] = Verdict(None, identity, reason=reason)
            elif not c.text.strip():
                verdicts[g, i] = Verdict(0.0, identity, "degenerate", "empty answer")
            else:
                open_.append((g, i, prompt, c.text))
    open_.sort(key=lambda x: len(x[3]))
    for start in range(0, len(open_), batch_size):
        part = open_[start : start + batch_size]
        for (g, i, _, _), verdict in zip(part, score([(p, text) for _, _, p, text in part]), strict=True):
            verdicts[g, i] = verdict
    if on_done:
        on_done(len(groups))
    return [[verdicts[g, i] for i in range(len(cs))] for g, (_, cs) in enumerate(groups)]


def device_of(name: str | None) -> str:
    """Return the device of this name, by default the first GPU, else the processor."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")
