"""What judges that run a local model share: how it is loaded, where it runs, and batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tempering.core.loading import quiet_libraries
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


def weights_from_files(judge: str, kind: Any, model_id: str, **settings: Any) -> Any:
    """Load the model of a judge, all of whose weights must come from its files.

    Raises:
        ValueError: it cannot be had, or is of another kind: what its files lack would be random numbers.
    """
    with quiet_libraries():  # what it says of missing weights is an error here
        model, told = from_files(judge, kind, model_id, output_loading_info=True, **settings)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"judge {judge}: {model_id} is another kind of model: its files have no weights for "
            f"{', '.join(missing[:3])}, which it would judge by; name a model that was trained to judge"
        )
    return model


def from_files(judge: str, kind: Any, model_id: str, **settings: Any) -> Any:
    """Load something of a judge's model, `ID[@REVISION]`, through a class of transformers.

    Raises:
        ValueError: it cannot be had, with the first line of the reason.
    """
    name, _, revision = model_id.partition("@")
    try:
        return kind.from_pretrained(name, revision=revision or None, **settings)
    except Exception as error:  # a boundary: transformers raises OSError, ValueError, KeyError, safetensors' own ...
        reason = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(
            f"judge {judge}: {model_id} could not be loaded ({type(error).__name__}: {reason}); correct its id or "
            "path, or, where it is gated, accept its terms on its page and log in with `hf auth login`"
        ) from None


def device_of(name: str | None) -> str:
    """Return the device of this name, by default the first GPU, else the processor."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")
