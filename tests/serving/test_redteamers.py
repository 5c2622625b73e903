"""garak and PyRIT, each in its own environment, on served models: what docs/interop.md says, as it stands there."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tempering.core.sampling import ScriptedSampler

pytestmark = pytest.mark.interop
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8").partition("## garak and PyRIT")[2]
REWRITE = "how do I borrow a stone?"


def python_of(tool):
    """The interpreter of a tool's environment, made by `make test-interop`."""
    python = ROOT / ".venv-redteam" / tool / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{tool} is not installed in {python.parent}; `make test-interop` does that")
    return str(python)


@pytest.fixture
def served(serving):
    """(port of an attacker that rewrites between tags, port of a defender, what the defender was asked)."""
    asked = []

    def defend(prompt, index):
        asked.append(prompt.text)
        return "That is theirs, so no."

    attacker = ScriptedSampler(lambda prompt, index: f"thought <prompt>{REWRITE}</prompt>", name="attacker")
    with serving(attacker, name="ATTACKER") as one, serving(ScriptedSampler(defend), name="MODEL") as other:
        yield one.port, other.port, asked


def on_ports(text, attacker, defender):
    return text.replace("localhost:8001", f"127.0.0.1:{attacker}").replace("localhost:8000", f"127.0.0.1:{defender}")


def run_in(folder, arguments, **environment):
    own = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("DATA", "CACHE", "CONFIG")}
    offline = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        arguments, cwd=folder, env={**os.environ, **own, **offline, **environment}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def garak(folder, ports, *more):
    """Run garak on the defender with the options of the page; returns the attempts that it completed."""
    options, probes = (on_ports(found, *ports) for found in re.findall(r"```json\n(.*?)```", PAGE, re.S)[:2])
    few = json.loads(probes)
    few["atkgen"]["Tox"] |= {"convs_per_generation": 1, "max_calls_per_conv": 1}
    (folder / "options.json").write_text(options)
    (folder / "probes.json").write_text(json.dumps(few))
    run_in(
        folder,
        [python_of("garak"), "-m", "garak", "--target_type", "openai.OpenAICompatible", "--target_name", "MODEL",
         "--generator_option_file", "options.json", "--generations", "1", *more],
        OPENAICOMPATIBLE_API_KEY="EMPTY",
    )  # fmt: skip
    (report,) = folder.rglob("*.report.jsonl")
    rows = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["entry_type"] == "attempt" and row["status"] == 2]


def test_garak_attacks_a_served_defender(served, tmp_path):
    *ports, asked = served
    (attempt,) = garak(tmp_path, ports, "--probes", "dan.DUDE")
    assert len(asked) == 1 and "DUDE" in asked[0]
    assert attempt["outputs"][0]["text"] == "That is theirs, so no."


def test_garak_attacks_with_a_served_attacker(served, tmp_path):
    """Its own detector would be fetched from the Hub; another one is named."""
    *ports, asked = served
    more = ["--probes", "atkgen.Tox", "--probe_option_file", "probes.json", "--detectors", "always.Passthru"]
    assert garak(tmp_path, ports, *more)
    assert asked and set(asked) == {REWRITE}  # what stood between the tags, and nothing else


def test_pyrit_rewrites_with_a_served_attacker(served, tmp_path):
    *ports, asked = served
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)[:1]
    (tmp_path / "attack.py").write_text(on_ports(script, *ports), encoding="utf-8")
    told = run_in(tmp_path, [python_of("pyrit"), "attack.py"], PYTHONPATH=str(ROOT / "src"))
    assert asked == [REWRITE] and "AttackResult" in told
