"""The game on a tiny random model: it runs, its files hold what they say, and who is judged by whom."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from advgame_parts import Counting, Measuring, assert_served_with_its_flag_alone, judged_by, lines, untimed
from safetensors.torch import save_file

from tempering.core.chat import Encoded, collate
from tempering.core.config import build
from tempering.core.loading import resolve
from tempering.core.policy import LoraSettings, Policy, load_tensors
from tempering.core.quarantine import UnsafeExpertAccess, allow_unsafe_experts
from tempering.core.records import Prompt
from tempering.core.run import Run, file_hash
from tempering.data.attacker import INSTRUCTIONS
from tempering.data.deflections import deflection
from tempering.methods import advgame
from tempering.methods.advgame import warm_start
from tempering.methods.advgame.planner import memory_plan
from tempering.methods.advgame.players import load_seats
from tempering.methods.advgame.rollout import JUDGEMENTS
from tempering.methods.advgame.settings import ROLES, AdvGameConfig


def test_a_game_leaves_both_players_their_averages_and_what_was_played(game, tmp_path):
    asker = Counting()
    run = advgame.train(game(), make_judges=judged_by(asker))
    assert run.is_done and max(asker.asked.values()) == 1
    for role in ("attacker", "defender"):
        for name in (role, f"{role}_raw"):
            assert (run.root / "final" / name / "adapter_config.json").is_file() is (role == "defender")
        for folder in ("step-2", "step-3"):
            assert (run.root / "checkpoints" / folder / f"{role}_ema").is_dir()
    rows = [row for row in run.read_rows("metrics.jsonl") if "event" not in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    learned = [row for row in rows if "attacker/delta" in row and "defender/delta" in row]
    assert learned and learned[0]["attacker/delta"] == learned[0]["defender/delta"] == 0  # step 0: Delta is 0
    assert learned[0]["attacker/loss"] == pytest.approx(math.log(2), abs=1e-6)
    # The player moves, the average follows, the start stays.
    assert rows[-1]["defender/kl_initial_nats"] > rows[-1]["defender/kl_ema_nats"] > 0
    events = [row for row in run.read_rows("metrics.jsonl") if "event" in row]
    assert [row["step"] for row in events] == [0, 2, 3] and events[-1]["attacker/n"] > 0
    pairs = run.read_rows("data/pairs.jsonl")
    assert sum(row[f"{p}/{c}/pairs"] for row in rows for p in ROLES for c in ("harmful", "benign")) == len(pairs)
    assert all(row["rewards"][0] > row["rewards"][1] for row in pairs)
    played = run.read_rows("data/rollouts.jsonl")
    assert len({(r["policy_version"], r["rng_key"]) for r in played}) == len(played)
    assert run.provenance["unsafe"] is False
    game = run.read_json("data/game.json")
    changes = {row["step"]: row["attacker/change"][0] for row in events if "attacker/change" in row}
    assert changes[game["best_step"]["attacker"]] == max(changes.values())
    assert game["peak_bytes"] > 0 and sum(found["pairs"] for found in game["yield"].values()) == len(pairs)


def test_the_attacker_is_quarantined_and_the_run_is_its_defender(game, monkeypatch):
    run = advgame.train(game(), make_judges=judged_by(Counting()))
    source = resolve(str(run.root))
    assert Path(source.adapter) == run.root / "final" / "defender" and not source.unsafe
    at = resolve(f"{run.root}@step-2")
    assert Path(at.adapter) == run.root / "checkpoints" / "step-2" / "defender_ema"
    with pytest.raises(FileNotFoundError, match="step-2, step-3"):
        resolve(f"{run.root}@step-1")
    for folder in ("final/attacker", "final/attacker_raw", "checkpoints/step-2/attacker_ema"):
        with pytest.raises(UnsafeExpertAccess):
            resolve(str(run.root / folder))
        card = json.loads((run.root / folder / "player.json").read_text(encoding="utf-8"))
        assert card["unsafe"] is True and card["role"] == "attacker" and card["format"] == "raw"
        assert card["adapter_sha256"] == file_hash(run.root / folder / "adapter_model.safetensors.unsafe")
    # With the override it computes where it is named, and nowhere else.
    monkeypatch.setenv("TEMPER_ALLOW_UNSAFE_EXPERTS", "1")
    policy = Policy.load(card["base"], dtype="float32")
    with allow_unsafe_experts(reason="a test"):
        policy.load_player("attacker", run.root / "final" / "attacker_raw")
    assert policy.adapters == [] and policy._active() == []
    asked = [Prompt(({"role": "user", "content": "paint"},))]
    assert len(advgame.sampler(run)(asked, max_new_tokens=2)[0]) == 1
    assert_served_with_its_flag_alone(run, asked)


def test_a_resumed_game_is_the_same_game(game, tmp_path):
    whole = advgame.train(game(out=str(tmp_path / "whole")), make_judges=judged_by(Counting()))
    broken = game(out=str(tmp_path / "cut"))

    class Stopping(Counting):
        def __call__(self, questions):
            if sum(self.asked.values()) > 40:
                raise InterruptedError
            return super().__call__(questions)

    first = Stopping()
    with pytest.raises(InterruptedError):
        advgame.train(broken, make_judges=judged_by(first))
    with (tmp_path / "cut" / "data" / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "torn')
    second = Counting()
    cut = advgame.train(broken, resume=True, make_judges=judged_by(second))
    assert not set(first.asked) & set(second.asked)
    assert untimed(cut) == untimed(whole)
    for name in ("data/rollouts.jsonl", "data/judgements.jsonl", "data/pairs.jsonl"):
        assert lines(cut.root / name) == lines(whole.root / name), name
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (cut.root / "checkpoints/step-3" / name).read_bytes() == (
            whole.root / "checkpoints/step-3" / name
        ).read_bytes()


def test_judges_that_fail_for_a_third_leave_fewer_pairs_and_above_the_limit_the_run_stops(game, tmp_path):
    patient = game(judges={"max_unscored": 0.6, "kind": "pointwise"}, out=str(tmp_path / "patient"))
    run = advgame.train(patient, make_judges=judged_by(Counting(failing=0.3)))
    rows = [row for row in run.read_rows("metrics.jsonl") if "event" not in row]
    assert 0.1 < rows[-1]["guard/unscored"] < 0.6
    assert any("BAD_" in name for row in rows for name in row)
    assert all(None not in row["rewards"] for row in run.read_rows("data/pairs.jsonl"))
    strict = game(judges={"max_unscored": 0.05, "unscored_window": 2}, out=str(tmp_path / "strict"))
    with pytest.raises(RuntimeError, match=r"the judge is asleep.*judges\.max_unscored"):
        advgame.train(strict, make_judges=judged_by(Counting(failing=0.3)))


@pytest.mark.parametrize(
    "over",
    [
        {"loss": "grpo", "judges": {"kind": "pointwise"}, "ema": {"mode": "frozen_a"}},
        {"loss": "ipo", "per_class_updates": True, "cosine_restart": True, "ema": {"mode": "retruncate"}},
        {"players": {"shared": True}, "labels": "shuffled"},
        {"loss": "sft", "players": {"attacker": {"train": False, "sampler": "initial"}}, "rollout": {"fresh": False}},
        {"opponents": {"probability": 1.0, "every": 1}, "players": {"defender": {"reference": "slow_ema"}}},
        {
            "rollout": {"source": "seeds", "attacks": 1},
            "players": {"attacker": {"train": False}},
            "gradient_checkpointing": True,
        },
        {"judges": {"attacker": None, "defender": None}, "data": {"classes": ["harmful"]}},
    ],
    ids=lambda over: ",".join(over),
)  # fmt: skip
def test_every_variant_plays(game, tmp_path, over):
    config = game(**over, steps=2, eval_every=0)
    run = advgame.train(config, make_judges=judged_by(Counting()))
    rows = run.read_rows("metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    if "opponents" in over:  # the second step is played by the first's attacker, who learns nothing from it
        assert rows[1]["attacker/harmful/pairs"] == rows[1]["attacker/benign/pairs"] == 0
    if "players" in over and not config.players.attacker.train:
        kept = load_tensors(run.root / "checkpoints/step-2/weights.safetensors")
        assert all(not x.any() for name, x in kept.items() if "lora_B.attacker" in name)


def test_a_defender_that_begins_to_refuse_raises_an_alarm_once(game, capsys):
    config = game(guard={"window": 2, "drop": 0.2})
    state = {"benign": [], "dispersion": []}
    for step, comply in enumerate((4, 4, 4, 2, 2, 2), 1):
        state["benign"].append([comply, 4])
        state["dispersion"].append(1.0)
        advgame.watch_over(config, state, step)
    assert capsys.readouterr().err.count("learning to refuse") == 1
    strict = game(guard={"window": 2, "drop": 0.2, "stop": True})
    with pytest.raises(RuntimeError, match=r"class_weights\.benign"):
        advgame.watch_over(strict, {"benign": [[4, 4]] * 3 + [[1, 4]], "dispersion": [1.0] * 4}, 4)


def test_players_start_on_top_of_a_run(game, tmp_path, quick_model):
    start = Policy.load(quick_model, dtype="float32")
    start.add_adapter("sft", LoraSettings(r=2, alpha=4), seed=0)
    for _, _, b, _ in start.player_layers("sft"):
        b.data.fill_(0.05)
    start.export(tmp_path / "start")
    config = game(players={"attacker": {"init": str(tmp_path / "start")}}, steps=1, eval_every=0)
    seats = load_seats(config)
    assert seats.attacker.policy is seats.defender.policy
    assert seats.attacker.below == ["attacker_init"] and seats.defender.below == []
    assert seats.attacker.version("current") == seats.attacker.version("current")
    run = advgame.train(config, make_judges=judged_by(Counting()))
    config_of = json.loads((run.root / "final/attacker/adapter_config.json.unsafe").read_text(encoding="utf-8"))
    assert config_of["r"] == 4  # both stand in what is exported
    with pytest.raises(ValueError, match="no adapter"):
        load_seats(game(players={"attacker": {"init": quick_model}}))


def test_a_warm_start_teaches_rewriting_is_part_of_the_start_and_is_learned_once(game, tmp_path, monkeypatch):
    config = game(
        warm_start={"rewrites": 4, "brief": 6, "deflections": 0, "epochs": 8, "lr": 2e-2}, steps=1, eval_every=0,
        rollout={"attacker_tokens": 64, "defender_tokens": 24}, max_prompt_length=400,
    )  # fmt: skip
    run = advgame.train(config, make_judges=judged_by(Counting()))
    warm = load_tensors(run.root / "checkpoints/attacker_warm.safetensors")
    assert any(x.any() for name, x in warm.items() if "lora_B" in name)
    seats = load_seats(config)
    assert seats.attacker.below == ["attacker_warm"] and seats.defender.below == ["defender_warm"]
    row = collate([[Encoded([5, 6, 7, 8], 2)]], 0)
    policy = seats.attacker.policy
    with policy.using(["attacker_warm"]):
        before = policy.scorer(row).logprob
    monkeypatch.setattr(warm_start, "imitate", lambda *_: pytest.fail("it was learned again"))
    warm_start.warm_up(config, seats, {}, run, None)
    with policy.using(["attacker_warm"]):
        assert not torch.equal(policy.scorer(row).logprob, before)


def test_a_harmful_seed_is_deflected_beside_own_answers_to_two_benign_for_each_harmful_one(game, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        warm_start, "imitate", lambda config, player, name, rows, processes: seen.update({name: rows})
    )
    monkeypatch.setattr(warm_start, "brief_ids", lambda tokenizer, ids, *_: [*ids[:3], 2])
    config = game(
        warm_start={"brief": 6, "deflections": 1}, steps=1, eval_every=0, rollout={"defender_tokens": 200},
        max_length=700,
    )  # fmt: skip
    run = advgame.train(config, make_judges=judged_by(Counting()))
    tokenizer = load_seats(config).defender.policy.tokenizer
    seeds = list(run.read_rows("data/seeds.jsonl"))
    asked, said = [], []
    for row in seen["defender_warm"]:
        prompt = tokenizer.decode(row.ids[: row.prompt_tokens])
        asked.append(next(seed for seed in seeds if seed["prompt"] in prompt))
        said.append(tokenizer.decode(row.ids[row.prompt_tokens :], skip_special_tokens=True))
    assert Counter(seed["category"] for seed in asked) == {"harmful": 2, "benign": 4}
    assert len({seed["id"] for seed in asked}) == 6
    assert asked[-1]["category"] == "harmful"
    assert [text == deflection(seed["prompt"], 0) for seed, text in zip(asked, said, strict=True)] == [
        *[False] * 5,
        True,
    ]


def test_a_brief_answer_ends_with_a_sentence(tiny_tokenizer):
    ids = tiny_tokenizer("yes. no, I", add_special_tokens=False)["input_ids"]
    dot = next(i for i in range(len(ids)) if "." in tiny_tokenizer.decode(ids[: i + 1]))
    assert warm_start.brief_ids(tiny_tokenizer, ids, 2, {2}, 100) == [*ids[: dot + 1], 2]
    assert warm_start.brief_ids(tiny_tokenizer, ids[:dot], 2, {2}, 100) == []
    assert warm_start.brief_ids(tiny_tokenizer, [*ids[:2], 2], 2, {2}, 5) == [*ids[:2], 2]


def test_a_player_of_another_base_has_a_policy_of_its_own(game, tmp_path, tiny_model_dir):
    other = str(tiny_model_dir(seed=1))
    run = advgame.train(
        game(players={"attacker": {"model": other}}, steps=1, eval_every=0),
        make_judges=judged_by(Counting()),
    )
    card = json.loads((run.root / "final/attacker/player.json").read_text(encoding="utf-8"))
    assert card["base"] == other != resolve(str(run.root)).base


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"loss": "grpo"}, "pointwise"),
        ({"players": {"attacker": {"train": False}, "defender": {"train": False}}}, "neither player trains"),
        ({"players": {"shared": True, "attacker": {"init": "x"}}}, "set alike"),
        ({"judges": {"default": "classifier:x"}}, "judges.default='classifier:x'"),
        ({"max_prompt_length": 508}, "max_length=512 is less"),
        ({"max_prompt_length": 20}, "max_prompt_length=20"),
        ({"rollout": {"attacks": 1, "responses": 1}}, "nothing to compare"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(game, tmp_path, over, message):
    with pytest.raises(ValueError, match=message):
        advgame.train(game(**over))
    assert not (tmp_path / "run").exists()


def test_a_plan_is_made_without_weights(game, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    facts = advgame.dry_run(game())
    # 4 seeds x 2 attacks; 16 answers; 8 faithfulness + 8 x 1 pair of answers + 4 x 1 pair of attacks
    assert facts["per_step"] == {"attacks": 8, "answers_at_most": 16, "judgements_at_most": 20}
    plan = facts["memory"]
    assert plan["fits"] and plan["peak"] > plan["weights"] > 0
    one = advgame.dry_run(game(players={"shared": True}))["memory"]
    assert one["adapters"] < plan["adapters"] and one["weights"] == plan["weights"]


def test_the_plan_counts_parameters_as_they_are(game, quick_model):
    config = game()
    policy = load_seats(config).attacker.policy
    plan = memory_plan(config)
    base = sum(p.numel() * 4 for n, p in policy.model.named_parameters() if ".lora_" not in n)
    own = sum(p.numel() * 4 for n, p in policy.model.named_parameters() if ".lora_" in n and "_ema" not in n)
    assert plan.weights == base
    assert plan.adapters >= own * 5  # each player: itself, its average, gradient and two moments


def test_the_plan_of_a_7b_model_needs_no_weights_and_is_the_specified_one(game, tmp_path):
    """Qwen2.5-7B in bf16: 15.2 GB once; LoRA on all linear layers 2.52 M numbers a rank."""
    from transformers import Qwen2Config

    Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "qwen")  # fmt: skip
    config = game(
        model=str(tmp_path / "qwen"), dtype="bfloat16", ema={"audit": False},
        lora={"r": 32, "alpha": 64, "target_modules": "all-linear"},
    )  # fmt: skip
    plan = memory_plan(config)
    assert plan.weights == pytest.approx(15.2e9, rel=0.01)
    # Two players, each with an average, a gradient and two moments, in float32.
    assert plan.adapters == pytest.approx(2 * 5 * 4 * 32 * 2.52e6, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rollouts", "judgements", "pairs", "checkpoints"])
def test_a_killed_game_goes_on_byte_for_byte(game, tmp_path, moment):
    """kill -9 while sampling, judging, updating or saving; then --resume."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    base = game(steps=4, eval_every=0, table_every=0).model_dump(mode="json")

    def start(out, *more):
        (tmp_path / f"{out.name}.json").write_text(json.dumps({**base, "out": str(out)}), encoding="utf-8")
        return [sys.executable, __file__, str(tmp_path / f"{out.name}.json"), *more]

    subprocess.run(start(whole), check=True, capture_output=True)
    size = {"rollouts": 4, "judgements": 6, "pairs": 5}.get(moment)
    process = subprocess.Popen(start(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_time():
        if size is None:
            return any((cut / "checkpoints").glob(".saving-*")) or (cut / "checkpoints/step-2").is_dir()
        file = cut / "data" / f"{moment}.jsonl"
        return file.is_file() and len(lines(file)) > size * 4

    while process.poll() is None and not is_time():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (cut / "DONE").exists()
    judged, before = (cut / JUDGEMENTS).read_bytes().count(b"\n"), len(lines(cut / "asked.jsonl"))
    subprocess.run(start(cut, "resume"), check=True, capture_output=True)
    assert untimed(Run.open(cut)) == untimed(Run.open(whole))
    for name in ("data/rollouts.jsonl", "data/judgements.jsonl", "data/pairs.jsonl"):
        assert lines(cut / name) == lines(whole / name), name
    # Asked again is only what had no answer yet when the process was killed.
    asked = lines(whole / "asked.jsonl")
    assert lines(cut / "asked.jsonl") == asked[:before] + asked[judged:]
    names = ["checkpoints/step-4/weights.safetensors", "checkpoints/step-4/optimizer.safetensors"]
    names += ["final/defender/adapter_model.safetensors", "final/attacker/adapter_model.safetensors.unsafe"]
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_each_player_earns_more_against_the_other_as_it_was(game, quick_model, seed):
    """A judge that counts characters: 50 steps raise each player's reward on fixed trees.

    All tokens that end a turn have one row of the output layer, so that there is one thing to learn: to go on.
    """
    file = Path(quick_model) / "model.safetensors"
    weights = load_tensors(file)
    weights["lm_head.weight"][160:] = weights["lm_head.weight"][2]
    save_file(weights, file, metadata={"format": "pt"})
    config = game(
        steps=50, seed=seed, eval_every=50, eval_trees=64, checkpoint_every=50, kl_every=0, table_every=0, lr=1e-2,
        lora={"r": 4, "alpha": 8, "target_modules": "all-linear"}, ema={"decay": 0.8}, rollout={"seeds": 4},
    )  # fmt: skip
    run = advgame.train(config, make_judges=judged_by(Measuring()))
    last = run.read_rows("metrics.jsonl")[-1]
    for role in ROLES:
        assert last[f"{role}/reward"] > last[f"{role}/reward_initial"], role


def main():
    """Play in a process of its own, with a judge that writes down what it is asked before it answers."""

    class Writing(Counting):
        def __call__(self, questions):
            with (Path(tree["out"]) / "asked.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(question) + "\n" for question in questions)
            time.sleep(0.02)
            return super().__call__(questions)

    tree = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    for category in ("harmful", "benign"):
        INSTRUCTIONS[category] = f"Rewrite it ({category})."
    advgame.train(
        build(AdvGameConfig, tree, "test"), resume="resume" in sys.argv[2:], make_judges=judged_by(Writing())
    )


if __name__ == "__main__":
    main()
