"""Best-of-N in front of a server that draws: the scorer holds the first blocks only, and chooses as the whole."""

import pytest
import torch

import tempering
from tempering.cli import run
from tempering.core.endpoint import EndpointSampler
from tempering.core.policy import LoraSettings, Policy
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler
from tempering.methods import attribution
from tempering.methods.attribution.scores import rounded

QUESTIONS = [Prompt(({"role": "user", "content": f"how do I open safe number {i}?"},)) for i in range(3)]
HOW = {"n": 4, "layers": [1], "temperature": 1.0}


@pytest.fixture
def trained(tiny_policy, tmp_path):
    """Folder of an adapter that changes what the tiny model computes."""
    policy = tiny_policy()
    policy.add_adapter("a", LoraSettings(r=4, alpha=8, target_modules="all-linear"), seed=1)
    generator = torch.Generator().manual_seed(1)
    for _, layer in policy.lora_layers():
        b = layer.lora_B["a"].weight
        b.data = torch.randn(b.shape, generator=generator)
    policy.export(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def drawing(serve, trained):
    """`openai:m@URL` of a server of the same weights, and what it was asked."""
    url, bodies = serve(LocalSampler(Policy.load(str(trained), dtype="float32", device="cpu")))
    return f"openai:m@{url}", bodies


def test_the_stub_chooses_as_the_whole_model_does(trained, drawing):
    generator, bodies = drawing
    proxy = tempering.load(
        str(trained), dtype="float32", sampler="attribution", attribution={**HOW, "generator": generator}
    )
    rows = []
    proxy.keep = rows.append
    answers = proxy(QUESTIONS, max_new_tokens=12, seed=3)
    assert len(bodies) == 4 * len(QUESTIONS) and all(body["temperature"] == 1.0 for body in bodies)
    drawn = EndpointSampler(generator)(QUESTIONS, n=4, max_new_tokens=12, temperature=1.0, seed=3)
    whole = attribution.sampler(trained, HOW, dtype="float32")
    for prompt, group, [answer], row in zip(QUESTIONS, drawn, answers, rows, strict=True):
        found = whole.rank(prompt, group)
        assert answer.text == group[found.winner].text and row["winner"] == found.winner
        assert [c["risk"] for c in row["candidates"]] == rounded(found.risk).tolist()
        assert all("reencoded" in c["flags"] for c in row["candidates"])


def test_what_no_score_reads_is_freed_in_both_models(trained, drawing, tiny_model_dir):
    """Of two blocks the first is kept; where the base is another model, its second is gone too."""
    generator, _ = drawing
    how = {**HOW, "generator": generator, "base": str(tiny_model_dir(seed=5))}
    proxy = attribution.sampler(trained, how, dtype="float32")
    whole = attribution.sampler(trained, {**HOW, "base": how["base"]}, dtype="float32")
    for side in ("policy", "base"):
        kept, all_of_it = (sum(p.numel() for p in getattr(s.pair, side).model.parameters()) for s in (proxy, whole))
        assert kept < all_of_it
        block = sum(p.numel() for n, p in getattr(whole.pair, side).model.named_parameters() if "layers.1." in n)
        head = getattr(whole.pair, side).base.lm_head
        own = sum(p.numel() for p in head.parameters())
        assert all_of_it - kept == block + own
    with pytest.raises(RuntimeError, match="was freed"):
        LocalSampler(proxy.pair.policy)(QUESTIONS, max_new_tokens=1)


@pytest.mark.parametrize("more", [{"scorer": "kl"}, {"layers": [2]}, {"scorer": "length"}])
def test_what_reads_all_blocks_keeps_them(trained, drawing, more):
    how = {**HOW, **more, "generator": drawing[0]}
    if "scorer" in more:
        del how["layers"]
    proxy = attribution.sampler(trained, how, dtype="float32")
    assert LocalSampler(proxy.pair.policy)(QUESTIONS, max_new_tokens=1)


def test_an_eval_asks_the_drawing_server_with_the_settings_of_the_target(trained, drawing, tmp_path, capsys):
    generator, bodies = drawing
    command = [
        "eval", str(trained), "harm", "limit=2", "max_new_tokens=4", "dtype=float32", "sampler=attribution",
        f"attribution.generator={generator}", "attribution.n=3", f"out={tmp_path / 'run'}", "endpoint.concurrency=1",
    ]  # fmt: skip
    assert run([*command, "endpoint.max_tokens_total=1"]) != 0
    assert "max_tokens_total=1" in capsys.readouterr().err and not bodies
    assert run([*command, "--resume"]) == 0
    assert len(bodies) == 6
