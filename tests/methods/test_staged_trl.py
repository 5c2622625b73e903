"""The curriculum under TRL: what each trainer sees is the plan, and the reference moves after each stage."""

import math

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tempering.methods.staged_competence.curriculum import Curriculum, stage_schedule
from tempering.methods.staged_competence.trl import (
    StagedCompetenceMixin,
    StreamPlan,
    StreamSampler,
    apart,
    generation_stream,
    train_staged,
    whole_batches,
)

pytestmark = [  # of transformers, about its own spelling of an argument that TRL sets
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
STAGES = [[f"id{i}" for i in (3, 1, 4, 0)], [f"id{i}" for i in (9, 2, 6, 5, 8, 7)]]
EPOCHS, BATCH = (2, 1), 4


def number(text):
    return int("".join(c for c in text if c.isdigit()))


def rows(kind="pairs"):
    prompts = [f"question {i}?" for i in range(10)]
    if kind == "prompts":
        return [{"row_id": f"id{i}", "prompt": p} for i, p in enumerate(prompts)]
    if kind == "labelled":
        return [
            {"row_id": f"id{i}", "prompt": p, "completion": "no" if i % 2 else "yes sure", "label": bool(i % 2)}
            for i, p in enumerate(prompts)
        ]
    return [{"row_id": f"id{i}", "prompt": p, "chosen": "no", "rejected": "yes sure"} for i, p in enumerate(prompts)]


@pytest.fixture
def plan():
    return StreamPlan(STAGES, EPOCHS, Curriculum(stages=2, min_pool=2), seed=7)


@pytest.fixture
def train(tiny_model_dir, tiny_tokenizer, tmp_path, plan):
    """A function: trainer, config class, rows -> the result, and the prompt numbers of every batch as it was seen."""

    def run(trainer_class, config_class, data, handover="copy", plan=plan, **settings):
        seen, kwargs = [], settings.pop("trainer", {})

        class Watching(trainer_class):
            def training_step(self, model, inputs, *args, **kw):
                seen.append(read(self, inputs))
                return super().training_step(model, inputs, *args, **kw)

        def read(trainer, inputs):
            if isinstance(inputs, list):  # GRPO: rows, still as text
                return [number(row["prompt"]) for row in inputs]
            key = "chosen_input_ids" if "chosen_input_ids" in inputs else "input_ids"
            texts = trainer.processing_class.batch_decode(inputs[key], skip_special_tokens=False)
            return [number(text.partition("?")[0]) for text in texts]

        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama", scale=3.0), dtype=torch.float32)
        args = config_class(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[], logging_steps=1, save_strategy="no",
            learning_rate=1e-2, disable_tqdm=True, max_steps=1, **settings,
        )  # fmt: skip
        result = train_staged(
            Watching, args, model, Dataset.from_list(data), plan, handover, peft_config=LORA,
            processing_class=tiny_tokenizer, **kwargs,
        )  # fmt: skip
        return result, seen

    return run


def planned(plan, k, batch=BATCH):
    """Row ids of each batch, from the pure schedule alone."""
    schedule = stage_schedule(len(plan.stages[k]), batch, plan.epochs[k], plan.curriculum, plan.seed, k)
    return [[plan.stages[k][n] for n in row] for row in schedule]


def expected(plan, batch=BATCH):
    return [planned(plan, k, batch) for k in range(len(plan.stages))]


def flat_numbers(batches):
    return [number(i) for stage in batches for row in stage for i in row]


def first_losses(result):
    return [next(row["loss"] for row in log if "loss" in row) for log in result.logs]


@pytest.mark.parametrize("handover", ["copy", "merge"])
def test_dpo_sees_the_plan_and_starts_every_stage_at_its_reference(train, plan, handover):
    result, seen = train(DPOTrainer, DPOConfig, rows(), handover)
    assert result.batches == expected(plan)
    # DPO's micro-batch is the chosen rows, then the rejected ones of the same pairs.
    assert all(batch[: len(batch) // 2] == batch[len(batch) // 2 :] for batch in seen)
    assert [i for batch in seen for i in batch[: len(batch) // 2]] == flat_numbers(result.batches)
    for loss in first_losses(result):
        assert loss == pytest.approx(math.log(2), abs=1e-4)
    assert [len([row for row in log if "loss" in row]) for log in result.logs] == [2, 2]
    assert isinstance(result.model, PeftModel)
    assert list(result.model.peft_config) == ["default"]


def test_the_adapter_of_the_first_stage_goes_on_in_the_second(train, plan):
    """Under `copy` the second stage starts where the first ended: its last loss is below ln 2, its first is not."""
    result, _ = train(DPOTrainer, DPOConfig, rows())
    losses = [[row["loss"] for row in log if "loss" in row] for log in result.logs]
    assert losses[0][-1] < math.log(2) - 1e-3
    assert any(p.abs().max() > 0 for n, p in result.model.named_parameters() if ".lora_B." in n)


@pytest.mark.parametrize(("trainer_class", "config_class", "settings"), [
    (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    (ORPOTrainer, ORPOConfig, {}),
])  # fmt: skip
def test_losses_without_reference_see_the_plan(train, plan, trainer_class, config_class, settings):
    result, seen = train(trainer_class, config_class, rows(), **settings)
    assert result.batches == expected(plan)
    assert [i for batch in seen for i in batch] == flat_numbers(result.batches)


def test_kto_sees_the_plan_with_partners_that_answer_other_prompts(train, tiny_tokenizer):
    plan = StreamPlan(STAGES, EPOCHS, Curriculum(stages=2, sampling="coverage"), seed=7)
    result, seen = train(KTOTrainer, KTOConfig, rows("labelled"), plan=plan)
    assert [[sorted(b) for b in stage] for stage in result.batches] == [
        [sorted(b) for b in stage] for stage in expected(plan)
    ]
    assert [i for batch in seen for i in batch] == flat_numbers(result.batches)
    assert all(len(set(batch)) == len(batch) for batch in seen)


def test_grpo_paces_generation_batches(train, plan):
    def reward(completions, **_):
        return [float(len(text) % 7) for text in completions]

    result, seen = train(
        GRPOTrainer, GRPOConfig, rows("prompts"), num_generations=2, max_completion_length=4, beta=0.1,
        trainer={"reward_funcs": reward},
    )  # fmt: skip
    # Batch 2 x 2 accumulation = generation batches of 4 completions: two prompts, paced together.
    assert result.batches == expected(plan, batch=2)
    # Each generation batch is taken once for each of its two micro-batches, every prompt for two completions.
    assert seen == [[number(i) for i in row for _ in range(2)] for stage in result.batches for row in stage
                    for _ in range(2)]  # fmt: skip
    steps = sum(map(len, result.batches))
    assert len([row for log in result.logs for row in log if "loss" in row]) == steps
    assert all(math.isfinite(row["loss"]) for log in result.logs for row in log if "loss" in row)


def test_rows_that_trl_drops_are_left_out_by_id(train, plan):
    data = rows()
    data[1]["prompt"] += " long" * 100  # id1, the second of the first stage
    result, seen = train(DPOTrainer, DPOConfig, data, max_length=64)
    assert all("id1" not in row for row in result.batches[0])
    left = plan._replace(stages=[[i for i in STAGES[0] if i != "id1"], STAGES[1]])
    assert result.batches == expected(left)
    assert [i for batch in seen for i in batch[: len(batch) // 2]] == flat_numbers(result.batches)


def test_kto_is_prepared_again_without_the_rows_that_trl_drops(train):
    plan = StreamPlan(STAGES, EPOCHS, Curriculum(stages=2, sampling="coverage"), seed=7)
    data = rows("labelled")
    data[9]["prompt"] += " long" * 100  # id9, the first of the second stage
    result, seen = train(KTOTrainer, KTOConfig, data, plan=plan, max_length=64)
    assert "id9" not in {i for stage in result.batches for row in stage for i in row}
    left = plan._replace(stages=[STAGES[0], [i for i in STAGES[1] if i != "id9"]])
    assert [sorted(b) for b in result.batches[1]] == [sorted(b) for b in expected(left)[1]]
    assert [i for batch in seen for i in batch] == flat_numbers(result.batches)


def test_the_plan_of_a_run_is_read_from_its_folder(tmp_path, tiny_model_dir, pairs_file):
    from tempering.core.config import build
    from tempering.methods import staged_competence

    tree = {
        "model": str(tiny_model_dir("llama")), "out": str(tmp_path / "run"), "data": {"train": pairs_file},
        "dtype": "float32", "difficulty": {"scorer": "random"}, "curriculum": {"stages": 2, "epochs": 1},
        "batch_pairs": 4,
    }  # fmt: skip
    run = staged_competence.train(build(staged_competence.CONFIG, tree, "test"))
    plan = StreamPlan.read(run.root)
    drawn = run.read_rows("data/exposure.jsonl")
    for k in range(2):
        ids = [i for row in planned(plan, k) for i in row]
        assert {row["id"]: row["draws"] for row in drawn if row["stage"] == k} == {
            i: ids.count(i) for i in plan.stages[k]
        }


def test_generations_and_iterations_repeat_in_trls_order():
    """TRL's own sampler over the same prompts, unshuffled, is the oracle."""
    from trl.trainer.utils import RepeatSampler

    theirs = RepeatSampler(range(6), mini_repeat_count=3, batch_size=2, repeat_count=4, shuffle=False)
    assert generation_stream([[0, 1], [2, 3], [4, 5]], 3, 4) == list(theirs)


def test_equal_prompts_are_kept_apart():
    for keys in (["a", "b"], ["a", "a", "b", "b"], ["a", "a", "b", "c", "c"], ["a", "b", "b", "c", "b", "d"]):
        order = apart(keys)
        assert sorted(order) == list(range(len(keys)))
        assert all(keys[order[n]] != keys[order[n - 1]] for n in range(len(keys)))
    with pytest.raises(ValueError, match="too few prompts"):
        apart(["a", "a", "a", "b"])


def test_a_short_batch_is_refused():
    with pytest.raises(ValueError, match="batch of 1 where TRL takes 2"):
        whole_batches([[0, 1], [2]], 2)


def test_a_trainer_without_a_stream_says_so():
    with pytest.raises(RuntimeError, match="set `stream`"):
        StagedCompetenceMixin()._get_train_sampler()
    assert list(StreamSampler([2, 0, 2])) == [2, 0, 2]


@pytest.mark.parametrize(("change", "message"), [
    ({"data": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}, "no column 'row_id'"),
    ({"data": rows()[:5]}, "not in the dataset"),
    ({"data": rows() + rows()[:1]}, "not distinct"),
    ({"lora": None}, "give peft_config"),
    ({"handover": "stack"}, "expected copy or merge"),
])  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_loaded(plan, change, message):
    data = Dataset.from_list(change.get("data", rows()))
    with pytest.raises(ValueError, match=message):
        train_staged(
            DPOTrainer, None, None, data, plan, change.get("handover", "copy"), peft_config=change.get("lora", LORA)
        )
