"""The routed model: back-ends against a per-token reference, equality with PEFT, and what routing may not change."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safemoe_parts import TARGETS, random_weights, routed, some_experts

from tempering.core.chat import Encoded, collate
from tempering.core.logprobs import hidden_states, kl_from_base
from tempering.core.policy import EXPERT_GATE, Policy
from tempering.core.records import Prompt
from tempering.core.sampling import LocalSampler
from tempering.methods.safemoe.attaching import attach, initial_routers
from tempering.methods.safemoe.backends import (
    BACKENDS,
    BLOCK_BYTES,
    Dispatch,
    calibrate,
    can_group,
    choose,
    usable,
)
from tempering.methods.safemoe.experts import (
    Experts,
    ExpertWeights,
    random_experts,
    read_adapter,
    require_named_base,
    stack_experts,
)
from tempering.methods.safemoe.guards import UnsafeExpertAccess, allow_unsafe_experts
from tempering.methods.safemoe.layers import Gating, route
from tempering.methods.safemoe.objective import balance_loss, z_loss

IDS = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def override(monkeypatch):
    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    with allow_unsafe_experts(reason="test"):
        yield


def logits(policy, ids=IDS, **kwargs):
    with torch.no_grad():
        return policy.model(input_ids=ids, **kwargs).logits


def prompts(*texts):
    return [Prompt(({"role": "user", "content": text},)) for text in texts]


# --- maths ---------------------------------------------------------------------------------------------


def reference_delta(x, idx, w, A, B, scale):
    """Eq. 4, one token and one expert at a time."""
    out = torch.zeros(len(x), B.shape[0], dtype=torch.float64)
    for n in range(len(x)):
        for j in range(idx.shape[1]):
            e = int(idx[n, j])
            if e < len(A):
                a, b = A[e].double(), B[:, e].double()
                out[n] += float(w[n, j]) * float(scale[e]) * (b @ (a @ x[n].double()))
    return out


def one_layer(K=5, r=8, d_in=24, d_out=40, N=11, k=2, dtype=torch.float32, null=False):
    g = torch.Generator().manual_seed(3)
    w = ExpertWeights(
        torch.randn(K, r, d_in, generator=g).to(dtype),
        torch.randn(d_out, K, r, generator=g).to(dtype),
        torch.rand(K, generator=g) + 0.5,
    )
    x = torch.randn(N, d_in, generator=g).to(dtype)
    V = torch.randn(K + null, d_in, generator=g)
    found = route(x, V, k, null_bias=torch.zeros(()) if null else None)
    return x, found, w


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_backend_is_the_sum_over_selected_experts(backend, dtype, null):
    x, found, w = one_layer(dtype=dtype, null=null)
    assert not null or (found.idx == 5).any()
    got = BACKENDS[backend](x, Dispatch(found.idx, found.w, 5, null), w, x.new_zeros(11, 40))
    want = reference_delta(x, found.idx, found.w, *w)
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    assert torch.linalg.norm(got.double() - want) <= limit * torch.linalg.norm(want)


def test_backends_share_a_routers_decision_without_mixing_it_up():
    """`auto` may choose another for each layer of a block."""
    x, found, w = one_layer()
    want = reference_delta(x, found.idx, found.w, *w)
    shared = Dispatch(found.idx, found.w, 5)
    for backend in [*BACKENDS.values(), *BACKENDS.values()]:
        assert torch.allclose(backend(x, shared, w, torch.zeros(11, 40)).double(), want, atol=1e-3)


@pytest.mark.parametrize("backend", ["fused", "gather", "grouped"])
def test_gradients_agree_with_eager(backend):
    x, found, w = one_layer()
    cotangent = torch.randn(11, 40, generator=torch.Generator().manual_seed(5))
    gradients = []
    for name in ("eager", backend):
        x_, w_ = x.clone().requires_grad_(), found.w.clone().requires_grad_()
        (BACKENDS[name](x_, Dispatch(found.idx, w_, 5), w, torch.zeros(11, 40)) * cotangent).sum().backward()
        gradients.append((x_.grad, w_.grad))
    for want, got in zip(*gradients, strict=True):
        assert torch.linalg.norm(got - want) <= 1e-4 * torch.linalg.norm(want)


def test_an_expert_without_tokens_and_a_batch_of_one_are_fine():
    x, _, w = one_layer()
    idx, weight = torch.tensor([[3]]), torch.ones(1, 1)
    for backend in BACKENDS.values():
        got = backend(x[:1], Dispatch(idx, weight, 5), w, torch.zeros(1, 40))
        assert torch.allclose(got.double(), reference_delta(x[:1], idx, weight, *w), atol=1e-3)


def test_the_router_gradient_is_the_finite_difference_where_decisions_have_a_margin(tiny_policy):
    policy = tiny_policy()
    routing = routed(policy)
    policy.train_only(EXPERT_GATE)
    batch = collate([[Encoded(IDS[0].tolist(), 4)]], 0)
    policy.scorer(batch).logprob.sum().backward()
    router = routing.routers["model.layers.0.mlp"]
    gradient = router.V.grad.clone()
    direction = torch.randn(router.V.shape, generator=torch.Generator().manual_seed(0)) * 1e-2
    values = []
    for sign in (1, -1):
        router.V.data += sign * direction * 0.05
        with torch.no_grad():
            values.append(float(policy.scorer(batch).logprob.double().sum()))
        router.V.data -= sign * direction * 0.05
    assert (values[0] - values[1]) / 0.1 == pytest.approx(float((gradient * direction).sum()), rel=5e-2, abs=1e-3)


def test_route_by_hand():
    """Logits 0, ln 2, ln 6, k = 2: experts 2 and 1, weights 6/8 and 2/8; switch 6/9 and 2/9; sigmoid 6/7 and 2/3."""
    V = torch.tensor([[0.0], [math.log(2)], [math.log(6)]])
    x = torch.ones(1, 1)
    found = route(x, V, 2)
    assert found.idx.tolist() == [[2, 1]]
    assert found.w[0].tolist() == pytest.approx([0.75, 0.25])
    assert route(x, V, 2, "switch").w[0].tolist() == pytest.approx([6 / 9, 2 / 9])
    assert route(x, V, 2, "sigmoid").w[0].tolist() == pytest.approx([6 / 7, 2 / 3])
    # Temperature 2 halves the logits: weights sqrt(6) : sqrt(2).
    assert route(x, V, 2, temperature=2.0).w[0, 0].item() == pytest.approx(6**0.5 / (6**0.5 + 2**0.5))
    dense = route(x, V, 7)
    assert dense.w[0].tolist() == pytest.approx([6 / 9, 2 / 9, 1 / 9])


def test_a_full_softmax_renormalised_over_the_selected_is_the_paper_s():
    x, V = torch.randn(9, 6), torch.randn(4, 6)
    switch, selected = route(x, V, 2, "switch"), route(x, V, 2)
    assert torch.allclose(switch.w / switch.w.sum(1, keepdim=True), selected.w, atol=1e-6)
    assert not torch.allclose(switch.w, selected.w, atol=1e-3)


def test_equal_logits_select_the_lowest_index():
    assert route(torch.ones(3, 4), torch.ones(6, 4), 2).idx.tolist() == [[0, 1]] * 3


def test_a_logit_that_is_not_finite_is_an_error():
    x = torch.ones(2, 3)
    x[1, 0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        route(x, torch.ones(4, 3), 2)


def test_routing_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert route(torch.randn(2, 3).bfloat16(), torch.randn(4, 3), 2).z.dtype is torch.float32


def test_top_one_of_selected_has_no_gradient_and_is_refused():
    V = torch.randn(4, 6, requires_grad=True)
    (route(torch.randn(5, 6), V, 1).w * torch.randn(5, 1)).sum().backward()
    assert not V.grad.any()
    from tempering.methods.safemoe.settings import SafeMoEConfig

    with pytest.raises(ValueError, match="k=1"):
        SafeMoEConfig(k=1)
    assert SafeMoEConfig(k=1, normalisation="switch").k == 1


def test_only_rows_that_were_selected_have_a_gradient():
    V = torch.randn(5, 6, requires_grad=True)
    found = route(torch.randn(2, 6), V, 2)
    (found.w * torch.randn(2, 2)).sum().backward()
    selected = set(found.idx.flatten().tolist())
    assert {e for e in range(5) if V.grad[e].any()} == selected


# --- equality with PEFT --------------------------------------------------------------------------------


def save_adapter(policy, folder, seed, r=4, **config):
    """A PEFT adapter with random A and B on a copy of the tiny model; returns its logits on IDS."""
    fresh = Policy.load(policy.source.reference, dtype="float32")
    model = get_peft_model(fresh.model, LoraConfig(r=r, lora_alpha=6, target_modules=list(TARGETS), **config))
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_one_hot_gate_is_that_lora_alone(tiny_policy, tmp_path, override):
    policy = tiny_policy()
    variants = [{}, {"r": 7}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 9}}]
    want = [save_adapter(policy, tmp_path / f"e{i}", i, **v) for i, v in enumerate(variants)]
    modules = stack_experts([read_adapter(tmp_path / f"e{i}") for i in range(4)])
    experts = Experts(("a", "b", "c", "d"), modules, {}, ({},) * 4)
    base = logits(policy)
    for backend in ("eager", "fused", "gather"):
        routing = attach(
            policy, experts, Gating(), initial_routers(policy, experts, Gating(), "normal", 0), backend=backend
        )
        for e in range(4):
            routing.use_static_gate(torch.eye(4)[e])
            assert (logits(policy) - want[e]).abs().max() <= 1e-5 * max(1, float(want[e].abs().max()))
        policy.drop_adapters()
    assert torch.equal(logits(policy), base)


def test_one_expert_is_plain_lora(tiny_policy, tmp_path):
    policy = tiny_policy()
    want = save_adapter(policy, tmp_path / "only", 0)
    experts = Experts(("only",), stack_experts([read_adapter(tmp_path / "only")]), {}, ({},))
    attach(policy, experts, Gating(), initial_routers(policy, experts, Gating(), "normal", 0), backend="eager")
    assert torch.allclose(logits(policy), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


# --- what is refused -----------------------------------------------------------------------------------


def edited(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"r": 5}, "r: "),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"something_new": 1}, "something_new"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"alpha_pattern": [3]}, "alpha_pattern"),
    ],
)
def test_an_expert_that_is_no_plain_lora_is_refused_by_name_and_field(tiny_policy, tmp_path, fields, named):
    save_adapter(tiny_policy(), tmp_path / "fraud", 0)
    edited(tmp_path / "fraud", **fields)
    with pytest.raises(ValueError, match=rf"expert fraud: .*{named}"):
        stack_experts([read_adapter(tmp_path / "fraud")])


def test_experts_that_do_not_fit_each_other_are_refused(tiny_policy, tmp_path):
    policy = tiny_policy()
    for name in ("a", "b"):
        save_adapter(policy, tmp_path / name, 0)
    a, b = (read_adapter(tmp_path / name) for name in ("a", "b"))
    with pytest.raises(ValueError, match="expert a: domain"):
        stack_experts([a, a])
    fewer = b._replace(tensors={k: v for k, v in b.tensors.items() if "down_proj" not in k})
    with pytest.raises(ValueError, match="expert b: target_modules: lacks"):
        stack_experts([a, fewer])
    broken = {k: v.clone() for k, v in b.tensors.items()}
    next(iter(broken.values()))[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expert b: .*not a finite"):
        stack_experts([a, b._replace(tensors=broken)])
    with pytest.raises(ValueError, match="expert b: unknown tensor"):
        stack_experts([a, b._replace(tensors=b.tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)})])
    half = {k: v for k, v in b.tensors.items() if not k.endswith("layers.0.mlp.up_proj.lora_B.weight")}
    with pytest.raises(ValueError, match=r"expert b: .*up_proj.lora_B is missing"):
        stack_experts([a, b._replace(tensors=half)])
    with pytest.raises(ValueError, match="there are none"):
        stack_experts([])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path / "empty")


@pytest.mark.parametrize("name", ["adapter_config.json", "lineage.json"])
def test_a_file_of_another_form_is_an_expert_that_cannot_be_read(tiny_policy, tmp_path, name):
    save_adapter(tiny_policy(), tmp_path / "fraud", 0)
    (tmp_path / "fraud" / name).write_text("[1]")
    with pytest.raises(ValueError, match=rf"expert .*fraud: cannot be read \({name} is no JSON object"):
        read_adapter(tmp_path / "fraud")


def test_an_expert_that_names_another_base_is_refused_by_that_name(tiny_policy, tmp_path):
    save_adapter(tiny_policy(), tmp_path / "fraud", 0)
    edited(tmp_path / "fraud", base_model_name_or_path="mistralai/Mistral-7B-v0.1")
    adapters = [read_adapter(tmp_path / "fraud")]
    with pytest.raises(ValueError, match=r"expert fraud: base_model_name_or_path is mistralai/Mistral-7B-v0\.1"):
        require_named_base(adapters, "Qwen/Qwen2.5-3B")
    require_named_base(adapters, "/models/Mistral-7B-v0.1")  # a copy of it
    known = [adapters[0]._replace(source=adapters[0].source | {"base_fingerprint": "ab"})]
    require_named_base(known, "elsewhere")  # weights tell more than names


def test_an_expert_of_a_transposed_layer_is_read_like_any_other(tiny_policy, tmp_path):
    """PEFT marks adapters of Conv1D (GPT-2) with fan_in_fan_out; the update is B A x all the same."""
    save_adapter(tiny_policy(), tmp_path / "fraud", 0)
    plain = stack_experts([read_adapter(tmp_path / "fraud")])
    edited(tmp_path / "fraud", fan_in_fan_out=True)
    marked = stack_experts([read_adapter(tmp_path / "fraud")])
    assert all(torch.equal(w.A, marked[name].A) and torch.equal(w.B, marked[name].B) for name, w in plain.items())


def test_attaching_is_all_or_nothing(tiny_policy):
    policy = tiny_policy()
    base, before = logits(policy), dict(policy.base.named_modules())
    experts = some_experts(policy)
    routers = initial_routers(policy, experts, Gating(), "normal", 0)
    name = "model.layers.1.mlp.up_proj"
    w = experts.modules[name]
    wrong = Experts(experts.domains, experts.modules | {name: w._replace(A=w.A[:, :, 1:])}, {}, experts.sources)
    elsewhere = Experts(experts.domains, {**experts.modules, "model.layers.9.mlp.up_proj": w}, {}, experts.sources)
    less = dict(list(routers.items())[:1])
    for ex, ro, message in [
        (wrong, routers, "up_proj is 32 -> 48"),
        (elsewhere, routers, "no layer model.layers.9"),
        (experts, less, "router model.layers.1.mlp: missing"),
        (experts, routers | {"more": torch.zeros(3, 32)}, "no such router"),
        (experts, {n: v[:2] for n, v in routers.items()}, "expected 3 finite rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(policy, ex, Gating(), ro, backend="eager")
        assert policy.routing is None and dict(policy.base.named_modules()).keys() == before.keys()
        assert torch.equal(logits(policy), base)


@pytest.mark.parametrize("operation", ["static", "routers", "merge", "export"])
def test_what_lets_an_expert_act_alone_is_refused(tiny_policy, tmp_path, operation, monkeypatch):
    policy = tiny_policy()
    routing = routed(policy)
    do = {
        "static": lambda: routing.use_static_gate(torch.tensor([0.0, 1.0, 0.0])),
        "routers": lambda: routing.replace_routers(routing.tensors()),
        "merge": policy.merge,
        "export": lambda: policy.export(tmp_path / "out"),
    }[operation]
    with pytest.raises(UnsafeExpertAccess):
        do()
    with allow_unsafe_experts(reason="half"), pytest.raises(UnsafeExpertAccess):
        do()
    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    with pytest.raises(UnsafeExpertAccess):
        do()
    with allow_unsafe_experts(reason="test"):
        if operation in ("merge", "export"):
            with pytest.raises(RuntimeError, match="mixed anew"):
                do()
        else:
            do()
    assert not (tmp_path / "out").exists()


# --- structure -----------------------------------------------------------------------------------------


def test_permuting_experts_with_their_rows_changes_nothing(tiny_policy):
    policy = tiny_policy()
    experts = some_experts(policy, 4)
    V = {n: v * 20 for n, v in initial_routers(policy, experts, Gating(), "normal", 0).items()}
    attach(policy, experts, Gating(), V, backend="eager")
    want = logits(policy)
    policy.drop_adapters()
    order = torch.tensor([2, 0, 3, 1])
    moved = {n: ExpertWeights(w.A[order], w.B[:, order], w.scale[order]) for n, w in experts.modules.items()}
    attach(
        policy,
        Experts(experts.domains, moved, {}, experts.sources),
        Gating(),
        {n: v[order] for n, v in V.items()},
        backend="eager",
    )
    assert torch.allclose(logits(policy), want, atol=1e-4)


@pytest.mark.parametrize(
    ("granularity", "names"),
    [
        ("block", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("model", ["model"]),
        ("module", [f"model.layers.{i}.mlp.{t}" for i in range(2) for t in TARGETS]),
    ],
)
def test_granularities_have_their_routers_and_differ(tiny_policy, granularity, names):
    policy = tiny_policy()
    routing = routed(policy, granularity=granularity)
    assert list(routing.routers) == names
    assert routing.routers[names[-1]].V.shape[1] == (48 if granularity == "module" else 32)
    logits(policy)
    assert set(routing.state.decisions) == set(names)


def test_a_layer_subset_leaves_the_other_layers_alone(tiny_policy):
    from tempering.methods.safemoe.experts import only_layers

    policy = tiny_policy()
    kept = only_layers(some_experts(policy), [1])
    assert len(kept.modules) == 3 and all(".1." in name for name in kept.modules)
    with pytest.raises(ValueError, match="layers=\\[7\\]"):
        only_layers(some_experts(policy), [7])


def test_random_experts_have_the_trained_ones_mean_size():
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = torch.nn.Linear(12, 20)

    experts = Experts(("a", "b"), random_weights(Holder(), 2), {}, ({}, {}))
    noise = random_experts(experts, 0)

    def norms(found):
        w = found.modules["gate_proj"]
        return [float(torch.linalg.norm(w.scale[e] * w.B[:, e] @ w.A[e])) for e in range(2)]

    mean = sum(norms(experts)) / 2
    assert norms(noise) == pytest.approx([mean, mean], rel=1e-4)
    assert not torch.equal(noise.modules["gate_proj"].A, random_experts(experts, 1).modules["gate_proj"].A)


def test_arrow_rows_are_the_experts_main_directions(tiny_policy):
    policy = tiny_policy()
    experts = some_experts(policy)
    V = initial_routers(policy, experts, Gating(), "arrow", 0)["model.layers.1.mlp"]
    w = experts.modules["model.layers.1.mlp.gate_proj"]
    for e in range(3):
        top = torch.linalg.svd(w.B[:, e] @ w.A[e]).Vh[0]
        assert abs(float(top @ V[e])) == pytest.approx(1, abs=1e-4)


# --- frozen --------------------------------------------------------------------------------------------


def test_switched_off_is_the_base_bit_for_bit(tiny_policy):
    policy = tiny_policy()
    base = logits(policy)
    routed(policy)
    assert not torch.allclose(logits(policy), base, atol=1e-2)
    with policy.reference():
        assert torch.equal(logits(policy), base)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert policy.routing.enabled and not torch.equal(logits(policy), base)
    policy.drop_adapters()
    assert policy.routing is None and torch.equal(logits(policy), base)


def test_flags_are_as_before_also_after_an_exception_inside_reference(tiny_policy):
    policy = tiny_policy()
    routed(policy)
    named = policy.train_only(EXPERT_GATE)
    assert [name for name, _ in named] == [f"model.layers.{i}.mlp.{EXPERT_GATE}.V" for i in range(2)]
    before = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    with pytest.raises(KeyError), policy.reference():
        assert not any(p.requires_grad for p in policy.model.parameters())
        raise KeyError
    assert {n: p.requires_grad for n, p in policy.model.named_parameters()} == before


def test_generating_changes_no_flag_and_no_mode(tiny_policy):
    policy = tiny_policy()
    routed(policy)
    policy.train_only(EXPERT_GATE)
    policy.base.train()
    LocalSampler(policy)(prompts("hello"), max_new_tokens=2)
    assert policy.base.training and len(policy.trainable_parameters()) == 2


def test_no_state_dict_holds_an_expert_and_the_base_is_known_by_its_own_weights(tiny_policy):
    policy = tiny_policy()
    fingerprint, names = policy.base_fingerprint(), set(policy.model.state_dict())
    routed(policy)
    extra = {n.replace(".base_layer", "") for n in policy.model.state_dict()} - names
    assert extra == {f"model.layers.{i}.mlp.{EXPERT_GATE}.V" for i in range(2)}
    assert policy.base_fingerprint() == fingerprint
    assert set(policy.adapter_state()) == extra


def test_routers_and_scales_stay_float32_in_a_half_precision_model(tiny_policy):
    policy = tiny_policy()
    routing = routed(policy, null_expert=True, gain="layer")
    policy.model.to(torch.bfloat16)
    router = routing.routers["model.layers.0.mlp"]
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    layer = policy.base.get_submodule("model.layers.0.mlp.gate_proj")
    assert (layer.A.dtype, layer.scale.dtype) == (torch.bfloat16, torch.float32)
    assert logits(policy).dtype is torch.bfloat16


def test_no_adapter_goes_on_top(tiny_policy):
    from safemoe_parts import LORA

    policy = tiny_policy()
    routed(policy)
    with pytest.raises(ValueError, match="on top of routed experts"):
        policy.add_adapter("more", LORA, 0)


# --- generation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["block", "module", "model"])
def test_cached_equals_uncached(tiny_policy, granularity):
    policy = tiny_policy()
    routed(policy, granularity=granularity)
    whole = logits(policy, IDS)
    with torch.no_grad():
        first = policy.model(input_ids=IDS[:, :5], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for t in range(5, 12):
            step = policy.model(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_pads_change_no_row(tiny_policy):
    policy = tiny_policy()
    routed(policy)
    row = IDS[:1, :7]
    alone = logits(policy, row)[0]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(policy, padded, attention_mask=mask, position_ids=positions)[0, 4:]
    assert torch.allclose(got, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_what_it_is_batched_with(tiny_policy, temperature):
    policy = tiny_policy()
    routed(policy)
    asked = prompts("hello", "how do I do it, and why is that so?", "no")
    settings = {"max_new_tokens": 8, "temperature": temperature, "n": 2, "seed": 4}
    together = LocalSampler(policy)(asked, **settings)
    alone = LocalSampler(policy, batch_rows=1)(asked, **settings)
    assert [[c.token_ids for c in g] for g in together] == [[c.token_ids for c in g] for g in alone]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("control", [{}, {"last_token": True}])
@pytest.mark.parametrize("granularity", ["block", "model"])
def test_checkpointing_changes_no_gradient(tiny_policy, granularity, control):
    found = []
    for checkpointing in (False, True):
        policy = tiny_policy()
        routing = routed(policy, granularity=granularity, **control)
        policy.train_only(EXPERT_GATE)
        if checkpointing:
            policy.base.gradient_checkpointing_enable({"use_reentrant": False})
            policy.base.train()
        batch = collate([[Encoded(IDS[0].tolist(), 4)], [Encoded(IDS[1, :9].tolist(), 3)]], 0)
        routing.state.statistics = {}
        with routing.state.batch(pins=torch.tensor([3, 2])):
            policy.scorer(batch).logprob.sum().backward()
        assert {s.tokens for s in routing.state.statistics.values()} == {24}
        found.append(torch.cat([p.grad.flatten() for _, p in policy.trainable_parameters()]))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6) and found[0].abs().sum() > 0


@pytest.mark.parametrize("control", [{"last_token": True}, {"first_tokens": 2}, {}])
def test_answers_are_scored_as_they_would_be_generated(tiny_policy, control):
    policy = tiny_policy()
    routed(policy, **control)
    prompt, answers = prompts("how do I do it?")[0], ["never do it", "ask them"]
    [scores] = LocalSampler(policy).score([prompt], [answers])
    start = LocalSampler(policy).prompt_ids(prompt)
    for answer, (nats, tokens) in zip(answers, scores, strict=True):
        ids = policy.tokenizer(answer, add_special_tokens=False)["input_ids"]
        found, cache = 0.0, None
        for feed, then in zip([start, *([i] for i in ids[:-1])], ids, strict=True):
            with torch.no_grad():
                out = policy.model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found += float(out.logits[0, -1].log_softmax(-1)[then])
        assert tokens == len(ids) and nats == pytest.approx(found, abs=1e-4)


def test_last_token_keeps_the_decision_of_the_prompts_end(tiny_policy):
    policy = tiny_policy()
    routing = routed(policy, last_token=True)
    with routing.state.batch(pins=torch.tensor([4, 6])):
        whole = logits(policy)
    for dispatch in routing.state.decisions.values():
        idx = dispatch.idx.view(2, 12, -1)
        assert (idx[0, 4:] == idx[0, 4]).all() and (idx[1, 6:] == idx[1, 6]).all()
    # Teacher-forced equals cached, row by row, since the prompts are of different lengths.
    for b, p in ((0, 4), (1, 6)):
        with torch.no_grad():
            out = policy.model(input_ids=IDS[b : b + 1, : p + 1], use_cache=True)
            parts, cache = [out.logits], out.past_key_values
            for t in range(p + 1, 12):
                parts.append(policy.model(input_ids=IDS[b : b + 1, t : t + 1], past_key_values=cache).logits)
        assert torch.allclose(torch.cat(parts, 1)[0], whole[b], atol=1e-4, rtol=1e-4)
    # And in a left-padded batch.
    sampler = LocalSampler(policy)
    asked = prompts("hello", "how do I do it, and why?")
    assert sampler(asked, max_new_tokens=6)[0][0].token_ids == sampler(asked[:1], max_new_tokens=6)[0][0].token_ids


def test_after_so_many_tokens_the_base_goes_on(tiny_policy):
    policy = tiny_policy()
    routing = routed(policy, first_tokens=2)
    live = []
    with torch.no_grad():
        out = policy.model(input_ids=IDS, use_cache=True)
        live.append(routing.state.live)
        for _ in range(3):
            out = policy.model(input_ids=IDS[:, :1], past_key_values=out.past_key_values, use_cache=True)
            live.append(routing.state.live)
    assert live == [True, True, False, False]


# --- extensions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "fused", "gather"])
def test_a_certain_null_expert_is_the_base(tiny_policy, backend):
    policy = tiny_policy()
    base = logits(policy)
    routing = routed(policy, backend=backend, null_expert=True)
    for router in routing.routers.values():
        router.null_bias.data.fill_(1e4)
    assert torch.allclose(logits(policy), base, atol=1e-5)


def test_gain_zero_is_the_base_and_the_start_of_a_trained_gain_the_paper(tiny_policy):
    policy = tiny_policy()
    base = logits(policy)
    routed(policy)
    paper = logits(policy)
    policy.drop_adapters()
    routed(policy, gain=0.0)
    assert torch.equal(logits(policy), base)
    policy.drop_adapters()
    routed(policy, gain="layer")
    assert torch.equal(logits(policy), paper)


def test_the_divergence_from_the_base_is_not_negative_and_zero_without_experts(tiny_policy):
    policy = tiny_policy()
    base = hidden_states(policy.model, IDS).flatten(0, 1).detach()
    assert kl_from_base(policy.model, base, base).abs().max() == 0
    routed(policy)
    with torch.no_grad():
        kl = kl_from_base(policy.model, hidden_states(policy.model, IDS).flatten(0, 1), base, chunk=5)
        want = torch.nn.functional.kl_div(
            logits(policy).flatten(0, 1).log_softmax(-1),
            policy.base.lm_head(base).log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
    assert (kl >= 0).all() and kl.mean() > 0
    assert torch.allclose(kl, want, atol=1e-4, rtol=1e-3)


def test_balance_is_one_when_even_and_grows_with_collapse():
    even = route(torch.eye(4), torch.eye(4) * 50, 2)
    assert float(balance_loss(even)) == pytest.approx(1)
    collapsed = route(torch.ones(4, 1), torch.tensor([[50.0], [0], [0], [0]]), 2)
    assert float(balance_loss(collapsed)) == pytest.approx(4)
    zeros = route(torch.ones(2, 1), torch.zeros(4, 1), 2)
    assert float(z_loss(zeros)) == pytest.approx(math.log(4) ** 2)


# --- auto ----------------------------------------------------------------------------------------------


def test_auto_measures_each_shape_once_and_takes_the_nearest_size(tiny_policy):
    _, _, w = one_layer()
    table = calibrate([w, w], 2)
    assert len(table) == 1 and set(next(iter(table.values()))) == {"1", "4", "16", "64", "256", "1024", "4096"}
    key = next(iter(table))
    table[key] |= {"4": "fused", "16": "gather"}
    assert (choose(table, w, 2, 7), choose(table, w, 2, 9)) == ("fused", "gather")
    assert "gather" in usable(w, 2, 64) and "gather" not in usable(w, 2, 65)


def test_a_product_that_the_allocator_would_ask_the_system_for_is_not_made_whole():
    _, _, w = one_layer()
    fits = BLOCK_BYTES // (2 * max(w.A.shape[2], w.B.shape[0]) * w.A.element_size()) - 1
    assert ("grouped" in usable(w, 2, fits)) == can_group(w)
    assert "grouped" not in usable(w, 2, 2 * fits)


def test_auto_computes_the_same_function(tiny_policy):
    policy = tiny_policy()
    routed(policy)
    want = logits(policy)
    policy.drop_adapters()
    routing = routed(policy, backend="auto")
    assert routing.table
    assert torch.allclose(logits(policy), want, atol=1e-4, rtol=1e-4)


def test_a_shape_that_the_grouped_kernel_cannot_take_is_found_by_trying():
    _, _, w = one_layer(r=3, d_in=7, d_out=5)
    assert not can_group(w)


def test_a_peft_adapter_of_the_model_still_loads_beside(tiny_policy, tmp_path):
    """The reference that other tests hold us to is PEFT's own loading."""
    policy = tiny_policy()
    want = save_adapter(policy, tmp_path / "a", 0)
    model = PeftModel.from_pretrained(policy.model, tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, want)
