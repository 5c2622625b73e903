"""`temper export` of sealed experts: what was measured goes into the manifest, and decides whether they go out."""

import copy
import json

import pytest
import torch

from tempering.cli import run as command
from tempering.core.config import Config
from tempering.core.quarantine import VARIABLE, UnsafeExpertAccess, allow_unsafe_experts
from tempering.core.run import Run
from tempering.exporting import ExportConfig, run_export
from tempering.methods.safemoe import bundle as bundles
from tempering.methods.safemoe.bundle import EXPERTS, SIGNATURE, BundleError, open_bundle, public_key_of, seal
from tempering.methods.safemoe.experts import Experts, ExpertWeights
from tempering.methods.safemoe.keys import (
    PUBLIC_KEY,
    SECRET,
    BundleSettings,
    demanded_key,
    opening_secret,
    sealing_keys,
)
from tempering.methods.safemoe.release import GateNotMet, failures

BASE = {"id": "tiny/base", "revision": None, "sha256": "ab" * 32}
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def cheap_secrets(monkeypatch):
    monkeypatch.setattr(bundles, "STRETCH", 1 << 4)


def of_base(**keys):
    return evals(target="tiny", **keys)


def document(name, metric, value, target, n=120, sha256="11", **extra):
    metrics = {metric: {"value": value, "low": None, "high": None, "n": n, "unscored": 0, "judge": "a judge"}}
    return {"schema": 1, "eval": name, "target": target, "metrics": metrics, "data": {"sha256": sha256, "prompts": n},
            "settings": {"seed": 0}, "warnings": [], "rows": "not kept", **extra}  # fmt: skip


def evals(safe=0.95, refusal=0.2, capability=0.7, target="run", **keys):
    rows = (("safe_informative", "safe_rate", safe), ("over_refusal", "over_refusal_rate", refusal),
            ("capability", "capability_accuracy", capability))  # fmt: skip
    return {name: document(name, metric, value, target=target, **keys) for name, metric, value in rows}


class Settings(Config):
    """A run of safemoe as far as its export reads it."""

    model: str = "tiny"
    """Base."""
    bundle: BundleSettings = BundleSettings()
    """Keys."""


@pytest.fixture
def run(tmp_path):
    """A function: evals, settings -> a finished run of safemoe with a small bundle."""

    def make(found=None, name="run", control=None, **bundle):
        settings = BundleSettings(**bundle)
        made = Run.create(tmp_path / name, "safemoe", Settings(bundle=settings))
        secret, signing_key = sealing_keys(settings)
        weights = {"m": ExpertWeights(torch.ones(2, 1, 3), torch.ones(4, 2, 1), torch.ones(2))}
        experts = Experts(("fraud", "<b>theft</b>"), weights, dict(BASE), ({}, {}))
        manifest = {"settings": {"model": "tiny", "dtype": "float32", "k": 2}, "control": control}
        made.path("final/tokenizer.json").write_text("{}")
        seal(made.root / "final", experts, {"m": torch.ones(2, 3)}, manifest, secret=secret, signing_key=signing_key)
        write(made, {name: {**doc, "target": str(made.root)} for name, doc in (found or {}).items()})
        rows = [{"domain": domain} for domain in experts.domains]
        made.write_provenance(method="safemoe", unsafe=False, unsafe_experts="sealed", experts=rows, control=control)
        made.finish()
        return made.root

    return make


def write(made, found):
    for name, doc in found.items():
        made.write_json(f"evals/{name}.json", doc)


@pytest.fixture
def baseline(tmp_path):
    """Evals of the base: no refusals, and a point more capability."""
    made = Run.create(tmp_path / "base", "eval", Settings())
    write(made, of_base(safe=0.2, refusal=0.15, capability=0.71))
    return str(made.root)


def export(reference, out, **settings):
    return run_export(str(reference), ExportConfig(out=str(out), **settings))


# --- the gate, pure -----------------------------------------------------------------------------------


def test_the_bars_by_hand():
    """Wilson's lower end: 88 of 100 gives .802, 87 of 100 gives .790; differences of exactly 10 and 2 points pass."""
    base = of_base(refusal=0.15, capability=0.70)

    def said(**changes):
        return failures(evals(**{"safe": 0.95, "refusal": 0.15, "capability": 0.7, **changes}), base, ("tiny",))

    assert said() == []
    assert failures(evals(safe=0.88, n=100), of_base(refusal=0.2, n=100), ("tiny",)) == []
    [reason] = failures(evals(safe=0.87, n=100), of_base(refusal=0.2, n=100), ("tiny",))
    assert "87.0%" in reason and "79.0%" in reason
    [reason] = failures(evals(safe=1.0, n=99), of_base(n=99), ("tiny",))
    assert "99 scored answers" in reason
    assert said(refusal=0.25) == [] and "rises from 15.0% to 26.0%" in said(refusal=0.26)[0]
    assert said(capability=0.68) == [] and "falls from 70.0% to 67.0%" in said(capability=0.67)[0]
    assert said(refusal=0.0, capability=1.0) == []  # better is never a failure


def test_what_was_not_measured_or_not_on_the_same_prompts_does_not_pass():
    assert [reason.split(":")[0] for reason in failures({}, {}, ("tiny",))] == [
        "safe_rate", "over_refusal_rate", "capability_accuracy",
    ]  # fmt: skip
    assert all("base was not measured" in reason for reason in failures(evals(), {}, ("tiny",)))
    assert all("other prompts" in reason for reason in failures(evals(), of_base(sha256="22"), ("tiny",)))
    assert all("not the base" in reason for reason in failures(evals(), evals(target="gpt"), ("tiny", "tiny/base")))
    others = of_base()
    others["over_refusal"]["metrics"]["over_refusal_rate"]["judge"] = "another"
    [reason] = failures(evals(), others, ("tiny",))
    assert reason.startswith("over_refusal_rate: the base was judged by another")
    marked = evals(unsafe_override=True)
    assert len(failures(marked, of_base(), ("tiny",))) == 3
    assert all("the base, not this run" in reason for reason in failures(of_base(), of_base(), ("tiny",)))
    instead = evals(target="tiny (in place of runs/m, which was refused)")
    assert len([reason for reason in failures(instead, of_base(), ("tiny",)) if "the base, not" in reason]) == 3
    empty = copy.deepcopy(evals())
    empty["safe_informative"]["metrics"]["safe_rate"] |= {"value": None, "n": 0}
    assert "not measured" in failures(empty, of_base(), ("tiny",))[0]


# --- export -------------------------------------------------------------------------------------------


def test_a_bundle_that_meets_the_bars_goes_out_with_what_was_measured(run, baseline, tmp_path):
    root = run(evals())
    facts = export(root, tmp_path / "out", baseline=baseline)
    assert facts["release"] == {"met": True, "failures": [], "force_reason": None} and facts["format"] == "bundle"
    manifest = open_bundle(tmp_path / "out", BASE).manifest
    assert manifest["evals"]["safe_informative"]["metrics"]["safe_rate"]["value"] == 0.95
    assert manifest["base_evals"]["capability"]["metrics"]["capability_accuracy"]["value"] == 0.71
    assert "rows" not in manifest["evals"]["capability"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Release gate\n\nMet." in card and "sealed-unsafe-experts" in card and "| 95 % |" in card
    assert "fraud, &lt;b&gt;theft" in card and "<b>" not in card.split("---")[2]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert open_bundle(root / "final", BASE).manifest.get("evals") is None  # the run is as it was
    assert {p.name for p in tmp_path.iterdir()} == {"run", "base", "out"}


def test_a_bundle_that_does_not_stays_unless_a_reason_is_given_and_printed(run, baseline, tmp_path, capfd):
    root = run(evals(safe=0.5))
    with pytest.raises(GateNotMet, match=r"50\.0%"):
        export(root, tmp_path / "out", baseline=baseline)
    for blank in ("", "  "):
        with pytest.raises(GateNotMet):
            export(root, tmp_path / "out", baseline=baseline, force_reason=blank)
    assert command(["export", str(root), f"out={tmp_path / 'out'}"]) == 3
    assert "gate not met" in capfd.readouterr().err and not (tmp_path / "out").exists()
    assert command(["export", str(root), f"out={tmp_path / 'out'}", "force_reason=for <our> review"]) == 0
    release = open_bundle(tmp_path / "out", BASE).manifest["release"]
    assert release["force_reason"] == "for <our> review" and len(release["failures"]) == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Not met.** Released all the same, because: for &lt;our&gt; review" in card
    with pytest.raises(FileExistsError):
        export(root, tmp_path / "out", force_reason="again")


def test_what_is_damaged_is_not_exported_for_any_reason(run, baseline, tmp_path):
    root = run(evals())
    content = bytearray((root / "final" / EXPERTS).read_bytes())
    content[-1] ^= 1
    (root / "final" / EXPERTS).write_bytes(content)
    with pytest.raises(BundleError, match="experts"):
        export(root, tmp_path / "out", baseline=baseline, force_reason="anyway")
    assert command(["export", str(root), f"out={tmp_path / 'out'}", "force_reason=anyway"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_folder_brings_nothing_else_out(run, baseline, tmp_path):
    root = run(evals())
    (tmp_path / "private").write_text("private")
    (root / "final" / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"notes\.txt is a symbolic link"):
        export(root, tmp_path / "out", baseline=baseline)
    (root / "final" / "notes.txt").unlink()
    (root / "final" / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is not a plain file"):
        export(root, tmp_path / "out", baseline=baseline)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("half", ["none", "python", "environment"])
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_experts_do_not_go_out_in_the_open(run, tmp_path, monkeypatch, form, half):
    root = run(evals())
    if half == "environment":
        monkeypatch.setenv(VARIABLE, "1")
    for reference in (root, root / "final"):
        if half == "python":
            with allow_unsafe_experts(reason="a test"), pytest.raises(UnsafeExpertAccess):
                export(reference, tmp_path / "out", format=form)
        else:
            with pytest.raises(UnsafeExpertAccess):
                export(reference, tmp_path / "out", format=form)
    monkeypatch.setenv(VARIABLE, "1")
    with allow_unsafe_experts(reason="a test"), pytest.raises(ValueError, match="no weights to merge or export"):
        export(root, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_a_control_is_exported_only_with_the_override(run, baseline, tmp_path, monkeypatch):
    root = run(evals(), control="random_experts")
    with pytest.raises(UnsafeExpertAccess, match="random_experts"):
        export(root, tmp_path / "out", baseline=baseline)
    monkeypatch.setenv(VARIABLE, "1")
    with allow_unsafe_experts(reason="a test"):
        export(root, tmp_path / "out", baseline=baseline)
    assert "A control (`random_experts`)" in (tmp_path / "out" / "README.md").read_text()


def test_only_a_run_of_safemoe_gives_a_bundle(tmp_path, run):
    for reference in (str(tmp_path), "smollm2", str(run(evals()) / "final")):
        with pytest.raises(ValueError, match="not a safemoe run"):
            export(reference, tmp_path / "out", format="bundle")


def test_an_export_is_signed_over_card_and_tokenizer_with_the_key_that_is_named(run, baseline, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY.hex())
    monkeypatch.setenv("MY_SECRET", "a passphrase of enough length")
    root = run(evals(), secret_env="MY_SECRET")
    keys = {"signing_key_env": "MY_KEY", "secret_env": "MY_SECRET"}
    export(root, tmp_path / "out", baseline=baseline, bundle=keys)
    secret = b"a passphrase of enough length"
    open_bundle(tmp_path / "out", BASE, secret=secret, public_key=public_key_of(KEY))
    (tmp_path / "out" / "README.md").write_text("a better card")
    with pytest.raises(BundleError, match="signature"):
        open_bundle(tmp_path / "out", BASE, secret=secret, public_key=public_key_of(KEY))
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY.hex().encode() not in everything and secret not in everything


# --- keys ---------------------------------------------------------------------------------------------


def test_a_key_that_is_named_and_not_there_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match="NOT_SET"):
        sealing_keys(BundleSettings(secret_env="NOT_SET"))
    with pytest.raises(ValueError, match="NOT_SET"):
        opening_secret(BundleSettings(secret_env="NOT_SET"))
    monkeypatch.setenv("SHORT", "1234")
    with pytest.raises(ValueError, match="SHORT must hold 64 hexadecimal") as caught:
        sealing_keys(BundleSettings(signing_key_env="SHORT"))
    assert "1234" not in str(caught.value)


def test_the_environments_public_key_stands_above_the_runs(monkeypatch):
    settings = BundleSettings(public_key="00" * 32)
    assert demanded_key(settings) == bytes(32) and demanded_key(BundleSettings()) is None
    monkeypatch.setenv(PUBLIC_KEY, "11" * 32)
    assert demanded_key(settings) == demanded_key(BundleSettings()) == b"\x11" * 32
    monkeypatch.setenv(PUBLIC_KEY, "no key")
    with pytest.raises(ValueError, match=PUBLIC_KEY):
        demanded_key(settings)


def test_a_secret_is_hexadecimal_or_a_passphrase(monkeypatch):
    for text, want in (("ab" * 32, b"\xab" * 32), ("x" * 64, b"x" * 64), ("correct horse battery", None)):
        monkeypatch.setenv(SECRET, text)
        assert opening_secret(BundleSettings()) == (want or text.encode())


def test_a_settings_file_cannot_hold_a_key_in_place_of_its_name(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", KEY.hex())
    root = run(evals(), signing_key_env="MY_KEY", public_key=public_key_of(KEY).hex())
    assert KEY.hex() not in (root / "config.yaml").read_text()
    assert json.loads((root / "final" / SIGNATURE).read_text())["public_key"] == public_key_of(KEY).hex()
    (root / "final" / SIGNATURE).unlink()
    with pytest.raises(BundleError, match="signature"):  # absent, though the run's settings demand it
        export(root, tmp_path / "out", force_reason="anyway")
