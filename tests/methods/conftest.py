"""What tests of methods share: modules such as `safemoe_parts`, and the fixtures of the game."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from advgame_parts import SEEDS

from tempering.core.config import build
from tempering.data.attacker import INSTRUCTIONS


@pytest.fixture
def game_seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEEDS), encoding="utf-8")
    return str(path)


@pytest.fixture
def short_instructions(monkeypatch):
    """A byte tokenizer makes hundreds of tokens of the real ones."""
    for category in ("harmful", "benign"):
        monkeypatch.setitem(INSTRUCTIONS, category, f"Rewrite it ({category}).")


@pytest.fixture
def quick_model(tiny_model_dir, tmp_path):
    """The tiny random model with half of its tokens as ends of a turn, so that what it writes stops."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    file = folder / "generation_config.json"
    own = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**own, "eos_token_id": [2, *range(160, 320)]}), encoding="utf-8")
    return str(folder)


@pytest.fixture
def game(quick_model, game_seeds, short_instructions, tmp_path):
    """A function: overrides -> a configuration of a small and quick game."""
    from tempering.methods.advgame.settings import AdvGameConfig

    def make(**over):
        tree = {
            "model": quick_model, "data": {"train": game_seeds}, "out": str(tmp_path / "run"), "steps": 3,
            "dtype": "float32", "max_length": 512, "ema": {"decay": 0.95},
            "rollout": {
                "seeds": 2, "attacks": 2, "responses": 2, "temperature": 1.0, "attacker_tokens": 6,
                "defender_tokens": 6,
            },
            "judges": {"attacker_response": "optimistic", "attacker_benign": "refusal"},
            "class_weights": {"harmful": 1.0, "benign": 1.0},
            "max_prompt_length": 440, "eval_every": 2, "eval_trees": 4, "checkpoint_every": 2, "lr": 1e-2,
            "nll_scale": 0.0,
            "lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "warm_start": {"rewrites": 0, "brief": 0}, "kl_every": 1,
        }  # fmt: skip
        for key, value in over.items():
            tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
        return build(AdvGameConfig, tree, "test")

    return make
