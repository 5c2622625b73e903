"""Unlearning knowledge: oracles of the objectives, and laws of a run on toys of four blocks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tempering.core.activations import blocks
from tempering.core.config import build
from tempering.core.edit_optimiser import EditOptimiser
from tempering.core.policy import Policy, load_tensors
from tempering.core.run import Run
from tempering.core.text_rows import Tokens, collate_rows
from tempering.core.training import Processes
from tempering.exporting import ExportConfig, run_export
from tempering.methods import unlearn_knowledge as method
from tempering.methods.unlearn_knowledge import sweep
from tempering.methods.unlearn_knowledge.measuring import Measured, Measurer, check_start
from tempering.methods.unlearn_knowledge.meta import Attacker, Pools, differentiated_through, draw_attack
from tempering.methods.unlearn_knowledge.objectives import draw_target, norm_of, npo, simnpo
from tempering.methods.unlearn_knowledge.settings import MetaSettings, UnlearnKnowledgeConfig, plan
from tempering.methods.unlearn_knowledge.terms import Terms
from tempering.methods.unlearn_knowledge.texts import is_query, tokenize

OBJECTIVES = [
    "meta_cosine_rmu", "cosine_rmu", "rmu", "adaptive_rmu", "grad_diff", "npo", "simnpo", "circuit_breakers",
]  # fmt: skip
WORDS = ["stone", "river", "apple", "glass", "paper", "copper", "maple", "velvet", "falcon", "marble"]


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory, tiny_tokenizer):
    """A function: family -> folder of a random float32 model of four blocks, D = 32."""
    made = {}

    def make(family="llama"):
        if family not in made:
            config = AutoConfig.for_model(
                family, vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=2, pad_token_id=0,
                max_position_embeddings=256,
            )  # fmt: skip
            folder = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config)
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.data.mul_(4)
            model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
            model.generation_config.pad_token_id = tiny_tokenizer.pad_token_id
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def config(toy_dir, tmp_path):
    """A function: settings -> configuration with two topics of ten texts and twelve to keep."""

    def rows(name, count, start):
        texts = [" ".join(WORDS[(start + i * k) % 10] for k in range(1, 4 + i % 5)) for i in range(count)]
        lines = [json.dumps({"id": f"{name}{i}", "text": f"{name} {i} {text}"}) for i, text in enumerate(texts)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return str(file)

    def make(family="llama", out="run", **settings):
        tree = {
            "model": str(toy_dir(family)), "out": str(tmp_path / out), "dtype": "float32", "steps": 4,
            "data": {
                "train": {"bio": rows("bio", 10, 1), "cyber": rows("cyber", 10, 3)}, "retain": rows("keep", 12, 5),
                "neutral": rows("calm", 4, 7),
            },
            "batch_rows": 4, "retain_rows": 4, "measure_every": 4, "checkpoint_every": 1,
            "meta": {"every": 1, "warmup": 0, "steps": 2, "checkpoints": [1, 2], "rank": 2},
        }  # fmt: skip
        for key, value in settings.items():
            tree[key] = (
                {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
            )
        return build(UnlearnKnowledgeConfig, tree, "test")

    return make


@pytest.fixture
def terms(config):
    """A function: settings -> the terms of a training, ready for its first step."""

    def make(family="llama", **settings):
        c = config(family, **settings)
        policy = Policy.load(c.model, dtype="float32")
        settled, corpus = plan(c, 4), tokenize(c, policy.tokenizer)
        return Terms(c, policy, settled, corpus, Processes(policy.device))

    return make


# --- oracles --------------------------------------------------------------------------------------------


def test_npo_at_the_start_is_a_constant_and_its_gradient_minus_that_of_the_nll():
    nll = torch.tensor([3.0, 5.0], requires_grad=True)
    loss = npo(nll, nll.detach(), 0.1)
    assert loss.tolist() == pytest.approx([13.8629] * 2, abs=1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), nll)
    assert gradient.tolist() == pytest.approx([-1.0, -1.0])


def test_simnpo_by_hand():
    """-(2 / 4.5) log sigmoid(9) = .4444 * 1.2340e-4."""
    assert simnpo(torch.tensor([8.0]), torch.tensor([4.0]), 4.5, 0.0).item() == pytest.approx(5.4845e-5, rel=1e-3)


@pytest.mark.parametrize(("width", "spread"), [(4096, 0.005), (576, 0.013)])
def test_uniform_directions_share_a_cosine_of_three_quarters(width, spread):
    config = UnlearnKnowledgeConfig(objective="rmu", compat="wmdp", seed=42)
    u = draw_target(config, 2, width, 10, torch.float32).directions[:, 0]
    assert float(u[0] @ u[1]) == pytest.approx(0.75, abs=3 * spread) and bool((u >= 0).all())
    v = draw_target(UnlearnKnowledgeConfig(), 2, width, 10, torch.float32).directions[:, 0]
    assert abs(float(v[0] @ v[1])) < 0.2 and v.norm(dim=-1).tolist() == pytest.approx([1, 1])


def test_several_directions_are_orthonormal_and_dealt_by_a_saved_table():
    config = UnlearnKnowledgeConfig(n_directions=4)
    target = draw_target(config, 2, 24, 11, torch.float32)
    assert torch.allclose(target.directions[1] @ target.directions[1].T, torch.eye(4), atol=1e-5)
    ids = torch.tensor([[3, 4, 3]])
    assert torch.equal(target.at(1, ids)[0, 0], target.directions[1][target.table[3]])
    assert torch.equal(target.at(1, ids)[0, 0], target.at(1, ids)[0, 2])
    again = draw_target(config, 2, 24, 11, torch.float32)
    assert torch.equal(again.directions, target.directions) and torch.equal(again.table, target.table)


def test_layers_that_the_loss_cannot_see_are_refused():
    with pytest.raises(ValueError, match="block 9 is above the loss layer 7"):
        plan(UnlearnKnowledgeConfig(edit_layers=[7, 9]), 30)
    with pytest.raises(ValueError, match="name blocks from 0"):
        plan(UnlearnKnowledgeConfig(objective="npo", edit_layers=[-1]), 30)
    with pytest.raises(ValueError, match="blocks 0 to 29"):
        plan(UnlearnKnowledgeConfig(layer=30), 30)
    assert plan(UnlearnKnowledgeConfig(objective="circuit_breakers"), 32).loss_layers == [10, 20]
    whole = plan(UnlearnKnowledgeConfig(objective="npo"), 4)
    assert whole.edit_layers == [0, 1, 2, 3] and whole.is_whole


# --- laws of the terms ----------------------------------------------------------------------------------


def gradients(found):
    return torch.cat([g.flatten() for g in found[0].values()])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_splitting_a_batch_changes_nothing(objective, terms):
    whole, split = terms(objective=objective), terms(objective=objective, batch_tokens=40)
    f_rows, r_rows = whole.rows_of(1, 1)
    for t in (whole, split):
        for p in t.parameters.values():
            p.data += 0.01 * torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view(p.shape)
    for name, rows, more in (("forget_gradient", f_rows, (1, 3)), ("retain_gradient", r_rows, (3,))):
        a, b = getattr(whole, name)(rows, *more), getattr(split, name)(rows, *more)
        assert torch.allclose(gradients(a), gradients(b), rtol=1e-3, atol=1e-4 * float(gradients(a).abs().max()))
        assert gradients(a).abs().max() > 0


@pytest.mark.parametrize(("family", "objective"), [("llama", "cosine_rmu"), ("qwen2", "adaptive_rmu")])
def test_padding_and_its_side_change_nothing(family, objective, terms, monkeypatch):
    def loss(left, extra):
        t = terms(family, objective=objective, cache_reference=False)

        def batch(rows):
            longer = [*rows, rows[0]._replace(ids=rows[0].ids * 4)] if extra else rows
            made = collate_rows(longer, t.pad, t.config.skip_first, left=left)
            return type(made)(*(None if part is None else part[: len(rows)] for part in made))

        monkeypatch.setattr(t, "batch", batch)
        rows, _ = t.rows_of(0, 0)
        for p in t.parameters.values():
            p.data *= 1.01
        return [t.state_forget(rows, 4.0, 0).item(), t.state_retain(rows, 4.0).item()]

    want = loss(False, False)
    for left, extra in ((True, False), (False, True), (True, True)):
        assert loss(left, extra) == pytest.approx(want, rel=1e-4)


def test_early_exit_equals_the_full_pass_and_runs_no_later_block(terms):
    t = terms(objective="cosine_rmu")
    rows, _ = t.rows_of(0, 0)
    ran = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks(t.policy.model))]
    early = t.forget_gradient(rows, 0, 0)
    assert set(ran) == {0, 1}
    batch = t.batch(rows)
    states = t.policy.model(input_ids=batch.ids, output_hidden_states=True).hidden_states
    h = states[2]  # the output of block 1
    x = 1 - torch.cosine_similarity(h, t.target.at(0, batch.ids).expand_as(h), dim=-1)
    loss = ((x * batch.mask).sum(-1) / batch.mask.sum(-1)).mean()
    full = torch.autograd.grad(loss, list(t.parameters.values()))
    assert early[1]["forget"] == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(gradients(early), torch.cat([g.flatten() for g in full]), atol=1e-6)
    for handle in handles:
        handle.remove()


def test_a_cached_reference_is_the_computed_one(terms):
    cached, computed = terms(objective="cosine_rmu"), terms(objective="cosine_rmu", cache_reference=False)
    assert cached.frozen.kept and not computed.frozen.kept
    _, rows = cached.rows_of(2, 0)
    a, b = (t.frozen.of(rows, t.batch(rows)) * t.batch(rows).mask[..., None] for t in (cached, computed))
    assert torch.allclose(a, b, atol=1e-5)


def test_rows_of_two_files_with_one_id_keep_their_own_states(terms, tmp_path, config):
    config()
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "keep.jsonl").read_text().replace('"keep ', '"and also '))
    t = terms(objective="cosine_rmu", data={"retain": [str(tmp_path / "keep.jsonl"), str(other)]})
    rows = [t.corpus.retain[0], t.corpus.retain[12]]
    assert rows[0].id == rows[1].id and rows[0].ids != rows[1].ids
    batch = t.batch(rows)
    kept, computed = (f.of(rows, batch) * batch.mask[..., None] for f in (t.frozen, t.frozen_forget))
    assert torch.allclose(kept, computed, atol=1e-5)


def test_compat_equals_an_independent_loop_step_for_step(terms):
    """Two models, left padding with the end token, flat means, and the AdamW that transformers once had."""
    t = terms(objective="rmu", compat="wmdp", coefficient=[6.5, 3.0], alpha=100, lr=1e-2, shuffle=False, skip_first=0)
    theirs, frozen = (Policy.load(t.config.model, dtype="float32").model for _ in range(2))
    weights = [theirs.model.layers[i].mlp.down_proj.weight for i in (0, 1)]
    for p in theirs.parameters():
        p.requires_grad_(any(p is w for w in weights))
    torch.manual_seed(42)
    u = [torch.rand(1, 1, 32) for _ in range(2)]
    u = [c * x / x.norm() for c, x in zip((6.5, 3.0), u, strict=True)]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    corpus = t.corpus

    def states(model, rows):
        width = max(len(r.ids) for r in rows)
        ids = torch.tensor([[2] * (width - len(r.ids)) + r.ids for r in rows])
        mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rows])
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]

    optimiser = EditOptimiser(t.parameters, t.processes, 1e-2, is_compat=True)
    for i in range(3):
        topic, j = i % 2, i // 2
        x_f, x_r = corpus.forget[t.topics[topic]][4 * j : 4 * j + 4], corpus.retain[4 * j : 4 * j + 4]
        h_f, h_r = states(theirs, x_f), states(theirs, x_r)
        loss = torch.nn.functional.mse_loss(h_f, u[topic].expand_as(h_f))
        loss = loss + 100 * torch.nn.functional.mse_loss(h_r, states(frozen, x_r).detach())
        for w, g, a, b in zip(weights, torch.autograd.grad(loss, weights), m, v, strict=True):
            a.mul_(0.9).add_(0.1 * g)
            b.mul_(0.999).add_(0.001 * g * g)
            size = 1e-2 * math.sqrt(1 - 0.999 ** (i + 1)) / (1 - 0.9 ** (i + 1))
            w.data -= size * a / (b.sqrt() + 1e-6)
        f_rows, r_rows = t.rows_of(i, topic)
        assert [r.id for r in f_rows] == [r.id for r in x_f] and [r.id for r in r_rows] == [r.id for r in x_r]
        g_f, _ = t.forget_gradient(f_rows, topic, i)
        g_r, _ = t.retain_gradient(r_rows, i)
        optimiser.step({n: g_f[n] + g_r[n] for n in g_f}, i)
    for ours, w in zip(t.parameters.values(), weights, strict=True):
        assert torch.allclose(ours, w, atol=1e-6)


def test_a_dead_edited_tensor_and_a_gradient_that_is_not_finite_stop_the_run(terms):
    t = terms(objective="cosine_rmu")
    zero = {n: torch.zeros_like(p) for n, p in t.parameters.items()}
    with pytest.raises(RuntimeError, match="no gradient reaches model"):
        EditOptimiser(t.parameters, t.processes, 1e-3).step(zero, 0)
    with pytest.raises(RuntimeError, match="not finite at step 3"):
        EditOptimiser(t.parameters, t.processes, 1e-3).step({n: g + torch.nan for n, g in zero.items()}, 3)


# --- the simulated attack -------------------------------------------------------------------------------


@pytest.mark.parametrize("adversary", ["lora", "full"])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_the_first_order_meta_gradient_is_autograd_at_the_attacked_weights(adversary, entropy, terms):
    t = terms(meta={"adversary": adversary, "entropy": entropy, "lr": [0.05, 0.05], "checkpoints": [2]})
    found = t.meta_gradient(0, 0, math.inf, {})
    # Once more with nothing of ours: a plain model that has the attacker's changes in its weights, row by row.
    model = AutoModelForCausalLM.from_pretrained(t.config.model, dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    before = {name: w.clone() for name, w in weights.items()}
    if adversary == "lora":
        for name, layer in t.policy.lora_layers():
            a, b = (half["attacker"].weight.detach() for half in (layer.lora_A, layer.lora_B))
            weights[f"{plain(name)}.weight"] += b @ a  # alpha is the rank
    else:
        for name, weight in t.attacker.overlay.items():
            weights[plain(name)].copy_(weight)
    attacked = [name for name, w in weights.items() if not torch.equal(w, before[name])]
    assert {name.rpartition("proj")[0].rpartition(".")[2] for name in attacked if "proj" in name} >= {"down_", "q_"}
    rows, loss = [t.pools[0].query[i] for i in query_rows(t)], 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        out = model(input_ids=ids, output_hidden_states=True)
        h, log_p = out.hidden_states[t.plan.layer + 1][0], out.logits[0].log_softmax(-1)
        price = 1 - torch.cosine_similarity(h, t.target.at(0, ids).reshape(1, -1), dim=-1)
        price = price + entropy * (log_p.exp() * log_p).sum(-1)
        loss = loss + price[1:].mean() / len(rows)  # the first token counts in no loss
    want = torch.autograd.grad(loss, [model.get_parameter(plain(name)) for name in found])
    for ours, theirs in zip(found.values(), want, strict=True):
        assert float(theirs.norm()) > 0
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


def plain(name):
    """What a parameter is called in a model without PEFT around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def query_rows(t):
    from tempering.core.training import stream_rows
    from tempering.methods.unlearn_knowledge.meta import STREAM_QUERY

    pool = t.pools[0].query
    return stream_rows(len(pool), min(4, len(pool)), 0, 42, STREAM_QUERY)


def test_every_topic_is_attacked_however_rarely_attacks_come(terms):
    t = terms(steps=8, meta={"every": 2})
    assert [t.meta_gradient(i, i % 2, 1.0, {}) is not None for i in range(8)] == [True, True, False, False] * 2


def test_states_as_they_were_are_those_before_the_attack(terms, monkeypatch):
    t = terms(target="anti_frozen", meta={"adversary": "full", "lr": [0.05, 0.05]})
    rows = [t.pools[0].query[i] for i in query_rows(t)]
    want, seen, query_loss = t.frozen_forget.of(rows, t.batch(rows)), [], t.query_loss
    monkeypatch.setattr(t, "query_loss", lambda *given: (seen.append(given[3]), query_loss(*given))[1])
    t.meta_gradient(0, 0, 1.0, {})
    assert len(seen) == 2 and all(torch.equal(h0, want) for h0 in seen)


def test_an_attack_on_bfloat16_weights_is_not_rounded_away(terms):
    t = terms(meta={"adversary": "full", "lr": [4e-5, 4e-5]})
    t.policy.model.bfloat16()
    attack, rows = draw_attack(t.config.meta, 0, 0, False), t.rows_of(0, 0)[0]
    t.attacker.reset(0, 0, attack)
    start = {n: p.clone() for n, p in t.attacker.overlay.items()}
    for _ in range(12):
        t.attacker.learn(lambda: t.token_nll(rows, rows), True)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (t.attacker.overlay[name] != start[name]).float().mean() > 0.5


def test_a_persistent_attacker_goes_from_benign_texts_on_to_harmful_ones():
    settings = MetaSettings(adversary="persistent", reset_every=40, mix={"retain_then_forget": 1.0})
    attack = draw_attack(settings, 1, 0, has_mcq=False)
    assert 8 < attack.benign_steps < 40
    rows = [[Tokens(name, name, [1, 2])] for name in ("support", "query", "benign", "mcq")]
    taken = [Pools(*rows).batch(attack, step, step, 1, 0)[0].id for step in (0, attack.benign_steps)]
    assert taken == ["benign", "support"]


@pytest.mark.parametrize("adversary", ["lora", "full", "persistent"])
def test_an_attack_leaves_nothing_behind(adversary, terms):
    t = terms(meta={"adversary": adversary, "reset_every": 1})
    before = {n: p.detach().clone() for n, p in t.policy.base_parameters().items()}
    flags = {n: p.requires_grad for n, p in t.policy.model.named_parameters()}
    state, ids = torch.get_rng_state(), t.batch(t.rows_of(0, 0)[0]).ids
    with torch.no_grad():
        want = t.policy.model(input_ids=ids).logits
    assert t.meta_gradient(0, 0, 1.0, {}) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: p.requires_grad for n, p in t.policy.model.named_parameters()} == flags
    assert all(torch.equal(p, before[n]) for n, p in t.policy.base_parameters().items())
    with torch.no_grad():
        assert torch.equal(t.policy.model(input_ids=ids).logits, want)
    assert sum(len(m._forward_hooks) for m in t.policy.model.modules()) == 0
    t.attacker.drop()
    assert not any("lora" in n for n, _ in t.policy.model.named_parameters())
    assert all(p.grad is None for p in t.policy.model.parameters())


def test_differentiating_through_the_attack_equals_finite_differences():
    """Two numbers of theta, three of phi, float64; the first-order gradient differs."""
    torch.manual_seed(0)
    a, b = (torch.randn(3, 2, dtype=torch.float64) for _ in range(2))

    def inner(theta, phi):
        return ((a @ theta["w"] + phi["v"]).tanh() - 0.5).square().sum()

    def query(theta, phi):
        return (b @ theta["w"] * phi["v"]).sin().sum()

    theta, phi = {"w": torch.randn(2, dtype=torch.float64)}, {"v": torch.randn(3, dtype=torch.float64)}

    def value(w):
        own = {"v": phi["v"]}
        for _ in range(3):
            v = own["v"].detach().requires_grad_()
            (g,) = torch.autograd.grad(inner({"w": w}, {"v": v}), v)
            own = {"v": v.detach() - 0.1 * g}
        return float(query({"w": w}, own))

    second, first = (differentiated_through(inner, query, theta, phi, 0.1, 3, order=n)["w"] for n in (2, 1))
    step = torch.eye(2, dtype=torch.float64) * 1e-6
    numeric = [(value(theta["w"] + e) - value(theta["w"] - e)) / 2e-6 for e in step]
    assert second.tolist() == pytest.approx(numeric, rel=1e-3)
    assert first.tolist() != pytest.approx(numeric, rel=1e-3)


def test_the_meta_gradient_is_never_longer_than_the_forget_gradient(terms):
    t = terms()
    assert norm_of(list(t.meta_gradient(0, 0, 1e-3, {}).values())) == pytest.approx(1e-3, rel=1e-4)


def test_records_of_support_and_query_are_disjoint(terms):
    t = terms()
    for pool in t.pools:
        assert pool.support and pool.query
        assert not {r.record for r in pool.support} & {r.record for r in pool.query}
    assert is_query("bio0", 99) and not is_query("bio0", 1)


def test_an_attack_is_drawn_from_its_settings():
    settings = MetaSettings(mix={"mcq": 1.0}, scope="below", lr=(1e-4, 1e-3))
    attack = draw_attack(settings, 1, 5, has_mcq=False)
    assert attack.kind == "forget_ce" and not attack.is_everywhere and 1e-4 <= attack.lr <= 1e-3
    assert attack == draw_attack(settings, 1, 5, has_mcq=False) != draw_attack(settings, 1, 6, has_mcq=False)
    then = draw_attack(MetaSettings(mix={"retain_then_forget": 1.0}), 1, 0, has_mcq=False)
    assert 0 < then.benign_steps <= 8


# --- runs -----------------------------------------------------------------------------------------------


def train(config):
    return method.train(config)


@pytest.mark.parametrize(
    "objective", [*OBJECTIVES[:3], *(pytest.param(o, marks=pytest.mark.slow) for o in OBJECTIVES[3:])]
)
def test_only_the_selected_tensors_change_and_the_run_is_a_model(objective, config):
    c = config(objective=objective, lr=1e-2)
    run = train(c)
    before, after = Policy.load(c.model, dtype="float32"), Policy.load(str(run.root), dtype="float32")
    edited = load_tensors(run.root / "final" / "edit.safetensors")
    own = dict(after.base_parameters())
    for name, parameter in before.base_parameters().items():
        assert torch.equal(parameter, own[name]) == (name not in edited), name
    if objective in ("cosine_rmu", "rmu"):
        assert list(edited) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    after.revert_edit()
    assert all(torch.equal(p, own[n]) for n, p in before.base_parameters().items())
    assert (run.root / "final" / "directions.safetensors").is_file()
    assert run.provenance["reconstruction"] is True and run.provenance["claim"] == "none"
    rows = [row for row in run.read_rows("metrics.jsonl") if "event" not in row]
    assert [row["topic"] for row in rows] == ["bio", "cyber", "bio", "cyber"]


def test_export_merges_the_edit_and_says_that_no_adapter_holds_it(config, tmp_path):
    run = train(config(objective="cosine_rmu", lr=1e-2))
    with pytest.raises(ValueError, match="no adapter holds; use format=merged"):
        run_export(str(run.root), ExportConfig(out=str(tmp_path / "adapter"), format="adapter"))
    assert run_export(str(run.root), ExportConfig(out=str(tmp_path / "merged")))["format"] == "merged"
    edited, merged = (Policy.load(str(root), dtype="float32") for root in (run.root, tmp_path / "merged"))
    own = edited.base_parameters()
    assert not merged.originals and all(torch.equal(p, own[n]) for n, p in merged.base_parameters().items())
    names = ("tokenizer.json", "chat_template.jinja")  # those of the start model, byte for byte
    start = Path(run.config["model"])
    assert all((run.root / "final" / n).read_bytes() == (start / n).read_bytes() for n in names)


def test_no_attack_equals_cosine_rmu_step_for_step(config):
    plain = train(config(objective="cosine_rmu", out="plain"))
    unattacked = train(config(objective="meta_cosine_rmu", out="meta", meta={"weight": 0}))
    assert edit_bytes(plain) == edit_bytes(unattacked)


def edit_bytes(run):
    return (run.root / "final" / "edit.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "cosine_rmu"},
        {"objective": "meta_cosine_rmu", "meta": {"disruption_mask": True}},
        pytest.param(
            {"objective": "meta_cosine_rmu", "meta": {"adversary": "persistent", "reset_every": 1}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective": "rmu", "dtype": "bfloat16", "max_kl": 10.0, "measure_every": 1}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(settings, config, monkeypatch):
    want = train(config(out="want", **settings))
    learn, step, calls = Attacker.learn, EditOptimiser.step, []

    def break_inside(self, *args):  # the second attack step of the third outer step, or that step itself
        calls.append(1)
        if len(calls) == (6 if hasattr(self, "adam") and settings["meta"].get("adversary") is None else 3):
            raise KeyboardInterrupt
        return (learn if hasattr(self, "adam") else step)(self, *args)

    is_meta = settings["objective"] == "meta_cosine_rmu"
    monkeypatch.setattr(*((Attacker, "learn") if is_meta else (EditOptimiser, "step")), break_inside)
    with pytest.raises(KeyboardInterrupt):
        train(config(out="got", **settings))
    monkeypatch.undo()
    got = method.train(config(out="got", **settings), resume=True)
    assert edit_bytes(got) == edit_bytes(want)
    a, b = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in x.read_rows("metrics.jsonl")] for x in (got, want)
    )
    assert a == b


def test_too_much_drift_goes_back_to_the_best_measured_step(config):
    start = Policy.load(config().model, dtype="float32").base_parameters()
    run = train(config(objective="rmu", lr=0.5, alpha=0.0, max_kl=1e-6, measure_every=1))
    assert all(torch.equal(t, start[n]) for n, t in load_tensors(run.root / "final" / "edit.safetensors").items())
    assert run.is_done and max(r["step"] for r in run.read_rows("metrics.jsonl")) == 1


def test_bfloat16_weights_train_on_float32_copies(terms):
    t = terms(objective="cosine_rmu")
    parameters = {n: torch.nn.Parameter(p.detach().bfloat16()) for n, p in t.parameters.items()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimiser = EditOptimiser(parameters, t.processes, 1e-5)
    for i in range(50):
        optimiser.step({n: torch.ones_like(p).float() for n, p in parameters.items()}, i)
    for n, copy in optimiser.copies.items():
        assert torch.allclose(copy, before[n].float() - 50e-5, atol=1e-5)
        assert torch.equal(parameters[n], copy.bfloat16())


def test_an_adapter_is_trained_where_one_is_asked_for(config):
    run = train(config(objective="circuit_breakers", adapter={"r": 2, "target_modules": "all-linear"}, lr=1e-2))
    assert not (run.root / "final" / "edit.safetensors").exists()
    assert Policy.load(str(run.root), dtype="float32").adapters == ["final"]


@pytest.mark.parametrize(("target", "retain"), [("random_per_token", "mse"), ("anti_frozen", "kl")])
def test_every_target_and_price_trains(target, retain, config):
    run = train(config(objective="cosine_rmu", target=target, retain=retain, norm_guard=0.1))
    assert all(math.isfinite(row["loss"]) for row in run.read_rows("metrics.jsonl") if "event" not in row)


def test_evals_follow_where_their_questions_are_known(config):
    assert method.evals_after(UnlearnKnowledgeConfig()) == "unlearned_facts"
    assert method.evals_after(config()) is None
    assert method.evals_after(UnlearnKnowledgeConfig(objective="probe", probes_only=True)) is None


def test_a_dry_run_lists_the_tensors_and_writes_nothing(config):
    c = config(objective="rmu")
    found = method.dry_run(c)
    assert found["tensors"] == {f"model.layers.{i}.mlp.down_proj.weight": [32, 48] for i in (0, 1)}
    assert found["trained"] == 2 * 32 * 48 and not Path(c.out).exists()


def test_the_forget_loss_falls_and_what_is_kept_stays(config):
    run = train(config(objective="cosine_rmu", steps=30, lr=1e-2, alpha=1.0, batch_rows=8, retain_rows=8))
    rows = [r for r in run.read_rows("metrics.jsonl") if "event" not in r]
    assert rows[-1]["forget"] < rows[0]["forget"] - 0.2 and rows[-1]["retain"] < 0.3


# --- probes, sweep, equal KL ----------------------------------------------------------------------------


@pytest.fixture
def many(config, tmp_path):
    """A function: settings -> configuration with enough texts of each sort for probes."""

    def make(**settings):
        def rows(name, word):
            lines = [
                json.dumps({"id": f"{name}{i}", "text": f"{WORDS[i % 10]} {word} {WORDS[i % 7]} {i}"})
                for i in range(60)
            ]
            file = tmp_path / f"{name}.jsonl"
            file.write_text("\n".join(lines) + "\n")
            return str(file)

        data = {"train": rows("bad", "apple"), "retain": rows("good", "river")}
        return config(data=data, layers=[1, 2], objective="probe", lr=1e-2, alpha=1.0, batch_rows=60, **settings)

    return make


def test_probes_tell_texts_to_forget_from_texts_to_keep_and_serve_another_run(many, tmp_path):
    bank = train(many(out="bank", probes_only=True))
    assert bank.is_done and not bank.has("final")
    worth = {row["layer"]: row for row in bank.read_json("probes/probes.json")["layers"]}
    assert worth[1]["auroc"] > 0.9
    run = train(many(out="second", probes=str(bank.root)))
    assert (run.root / "probes/probes.json").read_bytes() == (bank.root / "probes/probes.json").read_bytes()
    edited = load_tensors(run.root / "final" / "edit.safetensors")
    assert list(edited) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 2)]
    assert {"1.direction", "2.direction"} <= set(load_tensors(run.root / "final" / "directions.safetensors"))
    rows = [r for r in run.read_rows("metrics.jsonl") if "event" not in r]
    assert rows[0]["retain"] == pytest.approx(0, abs=1e-5) and rows[-1]["forget"] < rows[0]["forget"]
    other = train(many(out="third", probes=str(bank.root), directions="random"))
    a, b = (load_tensors(r.root / "final" / "directions.safetensors")["1.direction"] for r in (run, other))
    assert not torch.allclose(a, b)


def test_layers_are_swept_by_short_trials_that_leave_nothing_behind(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "swept_layers", lambda count: [0, 1, 2])
    monkeypatch.setattr(sweep, "TRIAL_STEPS", 2)
    c = config(objective="cosine_rmu", layer="sweep", lr=1e-2, data={"questions": questions_file(tmp_path)})
    policy = Policy.load(c.model, dtype="float32")
    corpus, measurer = tokenize(c, policy.tokenizer), Measurer(c, policy)
    with pytest.raises(ValueError, match="needs development questions"):
        sweep.trials(c, policy, corpus, measurer, Processes(policy.device))
    measurer.start_accuracy, measurer.dev = {"forget": 0.75}, measurer.questions
    before = {n: p.detach().clone() for n, p in policy.base_parameters().items()}
    seen = []

    def measure(step):  # the second candidate forgets all, the others nothing; what is edited has really changed
        seen.append(list(policy.edited))
        assert any(not torch.equal(p, before[n]) for n, p in policy.edited.items())
        return Measured(step, {"forget": 0.25 if len(seen) == 2 else 0.75}, 0.01, 1.0, None)

    monkeypatch.setattr(measurer, "measure", measure)
    run = Run.create(tmp_path / "swept", "unlearn_knowledge", c)
    assert sweep.swept(c, policy, corpus, measurer, run, Processes(policy.device)) == 1
    assert [row["score"] for row in run.read_json(sweep.FILE)["layers"]] == pytest.approx([-0.1, 0.9, -0.1])
    assert not policy.edited and not policy.originals and policy.trainable is None
    assert all(torch.equal(p, before[n]) for n, p in policy.base_parameters().items())
    assert sweep.swept(c, policy, corpus, measurer, run, Processes(policy.device)) == 1 and len(seen) == 3


def test_going_back_on_the_line_meets_the_kl(config):
    run = train(config(objective="rmu", lr=0.1, alpha=0.0, max_kl=1e-3, back="line", measure_every=1))
    far, last = [row for row in run.read_rows("metrics.jsonl") if row.get("event") == "measured"]
    assert far["kl"] > 1e-3 >= last["kl"] > 0 and 0 < last["back"] < 1


# --- wrong input ----------------------------------------------------------------------------------------


def questions_file(tmp_path, count=20, question="which one is thing"):
    rows = [
        {"id": f"q{i}", "question": f"{question} {i}?", "options": WORDS[:4], "answer": i % 4} for i in range(count)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


def test_a_start_model_at_chance_is_refused_with_the_reason(config, tmp_path):
    c = config(data={"questions": questions_file(tmp_path)})
    with pytest.raises(ValueError, match=r"knows no more than chance.*of 20 questions right.*chance is 25%"):
        train(c)
    assert not (tmp_path / "run").exists()
    run = train(config(objective="cosine_rmu", allow_chance=True, data={"questions": questions_file(tmp_path)}))
    assert run.provenance["claim"] == "none" and run.provenance["known_before"]["n"] == 20


def test_texts_to_forget_that_hold_a_question_are_named_row_by_row(config, tmp_path):
    c = config(data={"questions": questions_file(tmp_path, question="bio")})
    texts = tmp_path / "bio.jsonl"
    texts.write_text(texts.read_text() + '{"id": "leak", "text": "So BIO 3? Nobody knows."}\n')
    policy = Policy.load(c.model, dtype="float32")
    with pytest.raises(ValueError, match="leak holds q3") as error:
        check_start(c, Measurer(c, policy))
    assert "Nobody" not in str(error.value)


def test_questions_of_the_attacker_that_are_asked_afterwards_are_named(config, tmp_path):
    asked = questions_file(tmp_path)
    given = tmp_path / "given.jsonl"
    given.write_text(Path(asked).read_text().splitlines()[3].replace('"q3"', '"mine"') + "\n")
    c = config(data={"questions": asked, "attack_questions": str(given)}, allow_chance=True)
    with pytest.raises(ValueError, match="mine is q3; remove"):
        train(c)


def test_a_text_cannot_be_forgotten_and_kept(config, tmp_path):
    c = config()
    keep = tmp_path / "keep.jsonl"
    keep.write_text(keep.read_text() + (tmp_path / "bio.jsonl").read_text().splitlines()[3] + "\n")
    with pytest.raises(ValueError, match=r"1 text.* rows bio3"):
        train(c)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"compat": "wmdp"}, "objective=rmu"),
        ({"objective": "rmu", "n_directions": 2}, "n_directions"),
        ({"retain": "cos"}, "norm_guard"),
        ({"probes": "runs/bank"}, "has no probes"),
        ({"objective": "npo", "layer": "sweep"}, "layer=sweep"),
        ({"meta": {"checkpoints": [9]}}, "attack steps from 1 to"),
        ({"meta": {"adversary": "persistent"}, "checkpoint_every": 7}, "a multiple of"),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, told, config):
    with pytest.raises(ValueError, match=told):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "told"), [({"coefficient": [1.0]}, "one for each topic"), ({"max_length": [9]}, "bio")]
)
def test_numbers_per_topic_must_match_the_topics(settings, told, config):
    with pytest.raises(ValueError, match=told):
        train(config(objective="rmu", **settings))


def test_no_text_reaches_metrics_or_terminal(config, capfd):
    run = train(config())
    shown = capfd.readouterr()
    written = "".join(p.read_text() for p in (run.root / "metrics.jsonl", run.root / "provenance.json"))
    assert "marble" not in shown.out + shown.err + written and "marble" in (run.root.parent / "bio.jsonl").read_text()


# --- processes ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, torch
from pathlib import Path
from tempering.core.config import build, read_yaml
from tempering.methods import unlearn_knowledge as m
from tempering.methods.unlearn_knowledge.meta import Attacker
torch.set_num_threads(1)
learn, calls = Attacker.learn, []

def die(self, *args):  # the second attack step of the third outer step
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(self, *args)

Attacker.learn = die
m.train(build(m.CONFIG, read_yaml(Path(sys.argv[1])), "test"), resume=Path(sys.argv[1]).with_suffix("").exists())
"""


@pytest.mark.slow
def test_a_run_that_was_killed_inside_an_attack_ends_in_the_same_bytes(config, tmp_path):
    import yaml

    (tmp_path / "die.py").write_text(KILLED)

    def run(name, die_at):  # all in processes of their own: two processes may round differently
        c = config(objective="meta_cosine_rmu", out=name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(c.model_dump(mode="json")))
        command = [sys.executable, str(tmp_path / "die.py"), str(tmp_path / f"{name}.yaml"), str(die_at)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert (run("want", 0), run("got", 6), run("got", 0)) == (0, -9, 0)
    assert edit_bytes(Run.open(tmp_path / "got")) == edit_bytes(Run.open(tmp_path / "want"))


TWO = """
import sys, torch
from pathlib import Path
from tempering.core.config import build, read_yaml
from tempering.methods import unlearn_knowledge as m
torch.set_num_threads(1)
m.train(build(m.CONFIG, read_yaml(Path(sys.argv[1])), "test"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["meta_cosine_rmu", "npo"])
def test_two_processes_equal_one(objective, config, tmp_path):
    import yaml

    one = train(config(objective=objective, out="one", steps=3))
    tree = {**config(objective=objective, out="two", steps=3).model_dump(mode="json")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    subprocess.run([*command, str(tmp_path / "two.py"), str(tmp_path / "two.yaml")], check=True, capture_output=True)
    a = load_tensors(one.root / "final" / "edit.safetensors")
    b = load_tensors(tmp_path / "two" / "final" / "edit.safetensors")
    start = Policy.load(config().model, dtype="float32").base_parameters()
    for n in a:
        assert torch.allclose(a[n], b[n], atol=0.02 * float((a[n] - start[n]).abs().max()))
