"""Every loss equals TRL 1.16 to 1e-5 on a tiny random Llama, with an adapter that does something, on the same tokens.

TRL makes the batch; its token ids and masks are what both sides score.
"""

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tempering.core.chat import Encoded, collate
from tempering.core.policy import LoraSettings, Policy
from tempering.core.preference import LOSSES, LossOptions, PairScores, kto_desirable, kto_kl, kto_undesirable
from tempering.methods.staged_competence import StagedCompetenceConfig, StepTotals, step_share

pytestmark = [  # of transformers, about its own spelling of an argument that TRL sets
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]

TOLERANCE = 1e-5
BETA = 0.3
PAIRS = [
    {
        "prompt": f"how do I {thing}?",
        "chosen": "no, I cannot" + "." * i,
        "rejected": "yes sure, here is" + " how" * (4 - i),
    }
    for i, thing in enumerate(("stone", "river water", "apple", "glass it"))
]


@pytest.fixture
def trainer(tiny_model_dir, tiny_tokenizer, tmp_path):
    """A function: TRL's trainer and config class, dataset, settings -> the trainer, its adapter filled at random."""

    def make(trainer_class, config_class, rows, **settings):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama", scale=3.0), dtype=torch.float32)
        args = config_class(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=len(rows),
            beta=settings.pop("beta", BETA),
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            report_to=[],
            **settings,
        )
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        made = trainer_class(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer,
            peft_config=lora,
        )  # fmt: skip
        torch.manual_seed(1)
        for name, parameter in made.model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.2)
        return made

    return make


@pytest.fixture
def ours(tiny_model_dir):
    """A function: a TRL trainer -> our policy with the same adapter."""

    def make(trainer):
        policy = Policy.load(str(tiny_model_dir("llama", scale=3.0)), dtype="float32", device="cpu")
        policy.add_adapter("default", LoraSettings(r=4, alpha=8), seed=0)
        theirs = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}
        policy.load_state(theirs)
        policy.train_only("default")
        return policy

    return make


def rows_of(ids, attention, completion):
    """Rows of a padded batch as prompt and completion; pads may stand on either side."""
    rows = []
    for i, a, c in zip(ids, attention.bool(), completion.bool(), strict=True):
        rows.append(Encoded(i[a].tolist(), int((~c[a]).sum())))
    return rows


def sums(policy, rows):
    scores = policy.scorer(collate([[row] for row in rows], policy.tokenizer.pad_token_id))
    return scores.logprob, scores.tokens


def pair_scores(policy, rows):
    (now, tokens), n = sums(policy, rows), len(rows) // 2
    with policy.reference():
        before, _ = sums(policy, rows)
    return PairScores(now[:n], now[n:], before[:n], before[n:], tokens[:n], tokens[n:])


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def dpo_rows(batch):
    return rows_of(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"])
@pytest.mark.parametrize("precompute", [False, True])
def test_losses_with_a_reference_equal_dpo_trainer(trainer, ours, loss, precompute):
    from trl import DPOConfig, DPOTrainer

    theirs = trainer(DPOTrainer, DPOConfig, PAIRS, loss_type=[loss], label_smoothing=0.1 if loss == "robust" else 0.0)
    policy, batch = ours(theirs), batch_of(theirs)
    if precompute:  # what `precompute_ref_log_probs` puts into a batch
        theirs.precompute_ref_logps = True
        reference = pair_scores(policy, dpo_rows(batch))
        batch |= {"ref_chosen_logps": reference.ref_chosen, "ref_rejected_logps": reference.ref_rejected}
    want = theirs.compute_loss(theirs.model, batch)
    scores = pair_scores(policy, dpo_rows(batch))
    got = LOSSES[loss](scores, LossOptions(BETA, label_smoothing=0.1)).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), abs=TOLERANCE)
    assert float(scores.delta.detach().abs().min()) > 1e-3  # the adapter does something

    want.backward()
    got.backward()
    gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {n for n, _ in policy.trainable_parameters()}
    for name, parameter in policy.trainable_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3), name


def cpo_rows(batch):
    return [
        row
        for side in ("chosen", "rejected")
        for row in rows_of(
            batch[f"{side}_input_ids"],
            batch[f"{side}_attention_mask"],
            (batch[f"{side}_labels"] != -100) & batch[f"{side}_attention_mask"].bool(),
        )
    ]


@pytest.mark.parametrize(("loss", "settings"), [
    ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}),
    ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
])  # fmt: skip
def test_losses_without_a_reference_equal_cpo_trainer(trainer, ours, loss, settings):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    beta = settings.get("beta", BETA)
    theirs = trainer(CPOTrainer, CPOConfig, PAIRS, **settings)
    policy, batch = ours(theirs), batch_of(theirs)
    want = theirs.compute_loss(theirs.model, batch)
    scores = pair_scores(policy, cpo_rows(batch))
    config = StagedCompetenceConfig(loss=loss, beta=beta, gamma=1.0)
    got, _ = step_share(scores, config, StepTotals(len(PAIRS), float(scores.chosen_tokens.sum())))
    assert float(got.detach()) == pytest.approx(float(want.detach()), abs=TOLERANCE)


def test_the_odds_ratio_term_equals_orpo_trainer(trainer, ours):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    theirs = trainer(ORPOTrainer, ORPOConfig, PAIRS)
    policy, batch = ours(theirs), batch_of(theirs)
    chosen, rejected = theirs.concatenated_forward(theirs.model, batch)[:2]
    want = -theirs.odds_ratio_loss(chosen, rejected)[0]
    got = LOSSES["orpo"](pair_scores(policy, cpo_rows(batch)), LossOptions(BETA))
    assert got.tolist() == pytest.approx(want.tolist(), abs=TOLERANCE)


def test_kto_equals_kto_trainer(trainer, ours):
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for p in PAIRS for side in ("chosen", "rejected")]  # fmt: skip
    theirs = trainer(KTOTrainer, KTOConfig, rows)
    policy, batch = ours(theirs), batch_of(theirs)
    want = float(theirs.compute_loss(theirs.model, batch).detach())

    def deltas(prefix):
        found = rows_of(*(batch[f"{prefix}{k}"] for k in ("input_ids", "attention_mask", "completion_mask")))
        now, _ = sums(policy, found)
        with policy.reference():
            before, _ = sums(policy, found)
        return now - before

    delta, label = deltas(""), batch["label"].bool()
    z = kto_kl(float(deltas("KL_").detach().sum()), len(rows))
    parts = [kto_desirable(delta[label], z, BETA), kto_undesirable(delta[~label], z, BETA)]
    assert float(torch.cat(parts).mean().detach()) == pytest.approx(want, abs=TOLERANCE)
