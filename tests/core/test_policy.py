import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tempering.core.adapted_layers import KEPT, adapters_joined_once, default_targets
from tempering.core.policy import LoraSettings, Policy
from tempering.core.run import Run

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [20, 30, 40, 50, 60, 70, 80]])


def logits(policy_or_model):
    model = getattr(policy_or_model, "model", policy_or_model)
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def shake(policy, name, seed=1, size=0.05):
    """Give an adapter a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in policy.model.named_parameters():
        if f".lora_B.{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size


THREE = (LoraSettings(r=4), LoraSettings(r=4, alpha=8), LoraSettings(r=8, alpha=20))


def stack(policy, settings=THREE):
    for k, one in enumerate(settings):
        policy.add_adapter(f"stage_{k}", one, seed=7)
        shake(policy, f"stage_{k}", seed=k)
    return policy


def state_of(policy):
    return (
        {n: p.requires_grad for n, p in policy.model.named_parameters()},
        policy._active(),
        policy.model.training,
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
def test_a_fresh_adapter_is_the_base_exactly(tiny_policy, family):
    policy = tiny_policy(family)
    before = logits(policy)
    policy.add_adapter("a", LoraSettings(r=4), seed=1)
    assert torch.equal(logits(policy), before)
    shake(policy, "a")
    assert not torch.allclose(logits(policy), before, atol=1e-3)


def test_the_same_seed_draws_the_same_adapter_whatever_happened_before(tiny_policy):
    def drawn(noise, seed=5, name="a"):
        torch.rand(noise)
        policy = tiny_policy()
        policy.add_adapter(name, LoraSettings(r=4), seed=seed)
        return policy.adapter_state()

    first, again, other = drawn(1), drawn(3), drawn(1, seed=6)
    assert all(torch.equal(first[n], again[n]) for n in first)
    a_names = [n for n in first if "lora_A" in n]
    assert not any(torch.equal(first[n], other[n]) for n in a_names)
    values = [first[n] for n in a_names]
    assert not torch.equal(values[0], values[2])  # layers differ from one another
    bound = values[0].shape[1] ** -0.5
    assert 0.5 * bound < values[0].abs().max() <= bound


def test_only_the_trained_adapter_has_gradients(tiny_policy):
    policy = stack(tiny_policy())
    named = policy.train_only("stage_1")
    assert named and all(".stage_1." in name for name, _ in named)
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == {name for name, _ in named}


def test_reference_is_the_stack_without_its_newest(tiny_policy):
    policy = tiny_policy()
    base = logits(policy)
    policy.add_adapter("stage_0", LoraSettings(r=4), seed=1)
    shake(policy, "stage_0")
    first = logits(policy)
    policy.add_adapter("stage_1", LoraSettings(r=4), seed=1)
    shake(policy, "stage_1", seed=2)
    with policy.reference():
        assert torch.equal(logits(policy), first)
    with policy.reference(initial=True):
        assert torch.equal(logits(policy), base)
    with policy.using(["stage_1"]):
        only_second = logits(policy)
    assert not torch.allclose(only_second, first) and not torch.allclose(only_second, logits(policy))


@pytest.mark.parametrize("context", ["reference", "initial", "using", "using_none"])
@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_active_adapters_are_as_before_on_exit(tiny_policy, context, fails):
    policy = stack(tiny_policy())
    policy.train_only("stage_2")
    before, after_logits = state_of(policy), logits(policy)
    contexts = {
        "reference": lambda: policy.reference(),
        "initial": lambda: policy.reference(initial=True),
        "using": lambda: policy.using(["stage_0"]),
        "using_none": lambda: policy.using([]),
    }
    try:
        with contexts[context]():
            assert not any(p.requires_grad for p in policy.model.parameters())
            if fails:
                raise KeyError("in the middle")
    except KeyError:
        assert fails
    assert state_of(policy) == before
    assert torch.equal(logits(policy), after_logits)


def test_contexts_nest(tiny_policy):
    policy = stack(tiny_policy())
    policy.train_only("stage_2")
    before = state_of(policy)
    with policy.using(["stage_1"]):
        inside = logits(policy)
        with policy.reference(initial=True):
            pass
        assert torch.equal(logits(policy), inside)
    assert state_of(policy) == before


def test_an_unknown_adapter_leaves_everything_as_it_was(tiny_policy):
    policy = stack(tiny_policy())
    policy.train_only("stage_2")
    before = state_of(policy)
    with pytest.raises(ValueError, match="no adapter called nobody"), policy.using(["nobody"]):
        pass
    assert state_of(policy) == before


def test_full_training_has_no_reference(tiny_policy):
    policy = tiny_policy()
    policy.train_only("full")
    assert all(p.requires_grad for p in policy.model.parameters())
    with pytest.raises(RuntimeError, match="no second copy"), policy.reference():
        pass


def test_older_adapters_and_the_base_keep_every_byte_while_later_ones_train(tiny_policy):
    policy = stack(tiny_policy())
    policy.train_only("stage_2")
    before = policy.state()
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable_parameters()], lr=0.1)
    for _ in range(2):
        with policy.reference():
            logits(policy)
        policy.model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
    for name, tensor in policy.state().items():
        assert torch.equal(tensor, before[name]) == (".stage_2." not in name), name
    assert all(p.grad is None for n, p in policy.model.named_parameters() if ".stage_2." not in n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_exported_adapter_equals_the_stack_under_plain_peft(tiny_policy, tmp_path, dtype, rslora):
    settings = [LoraSettings(r=r, alpha=a, rslora=rslora) for r, a in ((4, 16), (4, 8), (8, 20))]
    policy = stack(tiny_policy(dtype=dtype), settings)
    policy.export(tmp_path / "final", {"method": "test"})
    assert all(p.dtype == torch.float32 for n, p in policy.model.named_parameters() if "lora_" in n)

    fresh = tiny_policy(dtype="float32")
    want = stack(fresh, settings)
    base = AutoModelForCausalLM.from_pretrained(policy.source.base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "final")).eval()
    want_logits = logits(want)
    assert (logits(loaded) - want_logits).abs().max() <= 1e-4 * want_logits.abs().max()
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 16, False)
    assert not config["alpha_pattern"] and not config["rank_pattern"]
    lineage = json.loads((tmp_path / "final" / "lineage.json").read_text())
    assert set(lineage["adapters"]) == {"stage_0", "stage_1", "stage_2"} and lineage["method"] == "test"


QV, ALL = LoraSettings(r=4, alpha=8), LoraSettings(r=3, alpha=6, target_modules="all-linear")


@pytest.mark.parametrize("settings", [[QV, ALL], [ALL, QV], [QV, LoraSettings(r=2, target_modules=["up_proj"])]])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_adapters_on_other_layers_stack_export_and_merge_as_one(tiny_policy, tmp_path, family, settings):
    policy = stack(tiny_policy(family), settings)
    want = logits(policy)
    policy.export(tmp_path / "final")
    base = AutoModelForCausalLM.from_pretrained(policy.source.base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "final")).eval()  # no warning of weights that it lacks
    ours = Policy.load(str(tmp_path / "final"), dtype="float32")
    policy.merge()
    for found in (loaded, ours, policy):
        assert (logits(found) - want).abs().max() <= 1e-4 * want.abs().max()
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    names = {name.rsplit(".", 1)[-1] for name, _ in ours.lora_layers()}
    assert set(config["target_modules"]) == names and not config["rank_pattern"]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_adapters_added_at_once_equal_pefts_one_after_the_other(tiny_policy, family, dtype, tolerance):
    policy = stack(tiny_policy(family, dtype=dtype), [LoraSettings(r=4, rslora=True), LoraSettings(r=8, alpha=20)])
    parameters = [parameter for _, parameter in policy.train_only("stage_1")]
    found = {}
    for way in ("ours", "peft"):
        if way == "peft":
            for _, layer in policy.lora_layers():
                del layer.forward
        out = policy.model(input_ids=IDS).logits.float()
        found[way] = [out, *torch.autograd.grad(out.square().mean(), parameters)]
    for ours, theirs in zip(found["ours"], found["peft"], strict=True):
        assert torch.linalg.norm(ours - theirs) <= tolerance * torch.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_joined_once_compute_the_same_bits_also_as_others_become_active(tiny_policy, dtype):
    policy = stack(tiny_policy(dtype=dtype))
    want, below = logits(policy), []
    with policy.reference():
        below.append(logits(policy))
    try:
        with adapters_joined_once(policy.model):
            assert all(torch.equal(logits(policy), want) for _ in range(2))
            with policy.reference():
                assert torch.equal(logits(policy), below[0])
            with adapters_joined_once(policy.model):
                assert torch.equal(logits(policy), want)
            assert all(KEPT in layer.__dict__ for _, layer in policy.lora_layers())  # the outer one still keeps
            raise KeyError
    except KeyError:
        shake(policy, "stage_2", seed=9)
    assert not torch.equal(logits(policy), want)  # outside nothing is kept, after an error too


def test_the_bias_of_a_foreign_adapter_counts(tiny_policy):
    policy = stack(tiny_policy(), [LoraSettings(r=4)])
    before = logits(policy)
    for _, layer in policy.lora_layers():
        b = layer.lora_B["stage_0"]
        b.bias = torch.nn.Parameter(torch.full((b.out_features,), 0.5))
    ours = logits(policy)
    for _, layer in policy.lora_layers():
        del layer.forward
    assert torch.equal(ours, logits(policy)) and not torch.allclose(ours, before)


def test_exporting_twice_replaces_the_first(tiny_policy, tmp_path):
    policy = stack(tiny_policy())
    policy.export(tmp_path / "final")
    shake(policy, "stage_2", seed=9)
    policy.export(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert torch.allclose(logits(Policy.load(str(tmp_path / "final"), dtype="float32")), logits(policy), atol=1e-3)


def test_run_adapter_and_model_folders_are_all_model_references(tiny_policy, tiny_model_dir, tmp_path):
    policy = stack(tiny_policy())
    run = Run.create(tmp_path / "run", "test", LoraSettings())
    policy.export(run.root / "final")
    want = logits(policy)
    for reference in (run.root, run.root / "final"):
        loaded = Policy.load(str(reference), dtype="float32")
        assert torch.allclose(logits(loaded), want, atol=1e-3)
        assert loaded.adapters == ["final"] and loaded.source.base == str(tiny_model_dir("llama"))
        with loaded.reference():
            assert torch.equal(logits(loaded), logits(tiny_policy()))
    policy.merge()
    policy.export(tmp_path / "merged")
    merged = Policy.load(str(tmp_path / "merged"), dtype="float32")
    assert merged.adapters == [] and torch.allclose(logits(merged), want, atol=1e-3)


def test_a_run_without_final_and_a_folder_that_is_no_model_are_errors(tmp_path):
    Run.create(tmp_path / "run", "test", LoraSettings())
    with pytest.raises(ValueError, match="has no final/ folder"):
        Policy.load(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is not a model"):
        Policy.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Policy.load(str(tmp_path / "nothing"))


def test_a_classifier_is_no_language_model(tiny_model_dir, tiny_tokenizer, tmp_path):
    """transformers would give it a head of random numbers, and it would answer."""
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tiny_model_dir()).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no language model: its files have no weights for lm_head\.weight"):
        Policy.load(str(tmp_path))


def test_an_adapter_refuses_another_base(tiny_policy, tiny_model_dir, tmp_path):
    stack(tiny_policy()).export(tmp_path / "final")
    lineage = json.loads((tmp_path / "final" / "lineage.json").read_text())
    lineage["base"] = str(tiny_model_dir("llama", seed=1))
    (tmp_path / "final" / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ValueError, match="was made for other base weights"):
        Policy.load(str(tmp_path / "final"), dtype="float32")
    lineage["base"] = str(tiny_model_dir("gpt_neox"))
    (tmp_path / "final" / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ValueError, match="does not load on"):
        Policy.load(str(tmp_path / "final"), dtype="float32")


def test_a_base_has_one_fingerprint_with_or_without_adapters_and_in_any_dtype(tiny_policy):
    plain = tiny_policy()
    assert plain.base_fingerprint() == stack(tiny_policy()).base_fingerprint()
    assert plain.base_fingerprint() == tiny_policy(dtype="bfloat16").base_fingerprint()
    assert plain.base_fingerprint() != tiny_policy(seed=1).base_fingerprint()


def test_a_base_that_differs_outside_the_adapted_layers_is_another(tiny_policy):
    """Refusal-ablated models change o_proj and down_proj only."""
    ablated = tiny_policy()
    with torch.no_grad():
        ablated.model.model.layers[1].self_attn.o_proj.weight *= 0.9
    assert ablated.base_fingerprint() != tiny_policy().base_fingerprint()


def test_merging_equals_stacking(tiny_policy):
    stacked, merged = stack(tiny_policy()), stack(tiny_policy())
    merged.merge()
    want = logits(stacked)
    assert merged.adapters == [] and not isinstance(merged.model, PeftModel)
    assert (logits(merged) - want).abs().max() <= 1e-5 * want.abs().max()


def test_dropping_adapters_gives_the_base_back_bit_for_bit(tiny_policy):
    policy = stack(tiny_policy())
    policy.drop_adapters()
    assert torch.equal(logits(policy), logits(tiny_policy()))
    policy.add_adapter("stage_0", LoraSettings(r=4), seed=7)
    assert torch.equal(logits(policy), logits(tiny_policy()))


def test_states_go_back_bit_for_bit_and_foreign_ones_are_refused(tiny_policy):
    policy, other = stack(tiny_policy()), tiny_policy()
    state = policy.adapter_state()
    for k, r in enumerate((4, 4, 8)):
        other.add_adapter(f"stage_{k}", LoraSettings(r=r, alpha=(32, 8, 20)[k]), seed=1)
    other.load_state(state)
    assert torch.equal(logits(other), logits(policy))
    assert other.adapter_hash(other.adapters) == policy.adapter_hash(policy.adapters)
    assert policy.adapter_hash(["stage_0"]) != policy.adapter_hash(["stage_1"]) != policy.adapter_hash([])
    with pytest.raises(ValueError, match="does not fit this model"):
        tiny_policy().load_state(state)


def test_default_targets_follow_the_architecture(tiny_policy):
    assert default_targets(tiny_policy().base) == ["q_proj", "v_proj"]
    assert default_targets(tiny_policy("gpt_neox").base) == ["query_key_value"]


def test_a_target_that_no_layer_has_is_an_error(tiny_policy):
    with pytest.raises(ValueError, match=r"lora.target_modules \['nobody'\]"):
        tiny_policy().add_adapter("a", LoraSettings(target_modules=["nobody"]), seed=1)


@pytest.mark.parametrize(("family", "per_block"), [("llama", 7), ("gpt_neox", 4)])
def test_all_linear_adapts_every_linear_layer_but_the_head_in_each_stacked_adapter(tiny_policy, family, per_block):
    policy = tiny_policy(family)
    for name in ("a", "b"):
        policy.add_adapter(name, LoraSettings(r=2, target_modules="all-linear"), seed=1)
        adapted = [layer for _, layer in policy.lora_layers() if name in layer.lora_A]
        assert len(adapted) == 2 * per_block
