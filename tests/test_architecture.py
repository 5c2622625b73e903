"""The structure that design and style ask for: imports point one way, fields are read, recipes parse."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import tempering
from tempering.api import METHODS, eval_config, method_module
from tempering.core.config import build, read_yaml

SRC = Path(tempering.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

MAY_IMPORT = {
    "core": {"core"},
    "data": {"core", "data"},
    "judges": {"core", "data", "judges"},
    "attacks": {"core", "data", "judges", "attacks"},
    "evals": {"core", "data", "judges", "attacks", "evals"},
    "methods": {"core", "data", "judges", "methods"},
    "reporting": {"core", "reporting"},
    "plugins": {"core", "data", "judges", "attacks", "evals", "plugins"},
    "serving": {"core", "attacks", "methods", "serving", "api"},
}
LEAVES = {"records", "preference", "policy_gradient", "stats", "draws"}


def layer(path: Path) -> str:
    parts = path.relative_to(SRC).parts
    return parts[0] if len(parts) > 1 else "top"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("tempering.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_one_way(path):
    if layer(path) in ("top", "cli"):
        return
    for name in imports(path):
        assert name.split(".")[1] in MAY_IMPORT[layer(path)], f"{path.name} imports {name}"


def test_a_method_never_imports_a_method_nor_an_eval_a_method():
    for path in FILES:
        if layer(path) == "methods":
            own = path.relative_to(SRC / "methods").parts[0].removesuffix(".py")
            others = {n.split(".")[2] for n in imports(path) if n.startswith("tempering.methods.")} - {own}
            assert not others, f"{path} imports {others}"


def test_leaves_of_core_import_nothing_of_ours():
    for name in LEAVES:
        assert not imports(SRC / "core" / f"{name}.py")


def test_importing_the_package_does_not_load_torch():
    code = "import sys, tempering, tempering.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def config_classes():
    found: dict[str, tuple[type[BaseModel], Path]] = {}
    for path in FILES:
        if not re.search(r"^class .*Config\)", path.read_text(encoding="utf-8"), re.MULTILINE):
            continue
        module = ".".join(["tempering", *path.relative_to(SRC).with_suffix("").parts]).removesuffix(".__init__")
        namespace = __import__(module, fromlist=["_"])
        for value in vars(namespace).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module:
                found[f"{module}.{value.__name__}"] = (value, path)
    return found


@pytest.mark.parametrize("name", sorted(config_classes()))
def test_every_configuration_field_is_described_and_read(name):
    cls, _ = config_classes()[name]
    sources = "\n".join(p.read_text(encoding="utf-8") for p in FILES)
    for field, info in cls.model_fields.items():
        if not name.endswith("_Base"):
            assert info.description, f"{name}.{field} has no description"
        assert re.search(rf"\.{field}\b", sources), f"nothing reads {name}.{field}"


def require_evals(wanted):
    """What a recipe measures after training: a list of evals, or a recipe of them."""
    tree = read_yaml(SRC / "recipes" / "eval" / f"{wanted}.yaml") if isinstance(wanted, str) else {"evals": wanted}
    eval_config(tree.pop("evals"), tree)


def test_every_recipe_of_evals_parses():
    for path in sorted((SRC / "recipes" / "eval").glob("*.yaml")):
        require_evals(path.stem)
        assert f"-c recipes/eval/{path.name}" in path.read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_parses(method):
    from tempering.attributing import ControlsConfig
    from tempering.compare import CompareConfig, plan_jobs

    of_another_command = {"controls": ControlsConfig} if method == "attribution" else {}
    recipes = sorted((SRC / "recipes" / method).glob("*.yaml"))
    assert recipes
    for path in recipes:
        tree = read_yaml(path)
        if "arms" not in tree:
            require_evals(tree.pop("evals", []))
        assert path.read_text(encoding="utf-8").startswith("#"), f"{path.name} has no header"
        assert f"-c {path.stem}" in path.read_text(encoding="utf-8"), f"{path.name} does not say how to run it"
        if "arms" in tree:
            plan_jobs(build(CompareConfig, tree, str(path)), method)
        else:
            build(of_another_command.get(path.stem, method_module(method).CONFIG), tree, str(path))


def test_every_method_has_what_the_command_line_calls():
    for name in METHODS:
        module = method_module(name)
        assert name == module.METHOD and module.CONFIG and module.train and module.dry_run


def test_no_tracked_text_names_a_machine():
    root = SRC.parent.parent
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(^|[^\w.-])/(home|root|Users)/\w")
    for name in listed:
        path = root / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert name.startswith("tests/test_architecture") or not pattern.search(text), (
                f"{name} names a local path"
            )


def arms_of(name):
    from tempering.compare import CompareConfig, plan_jobs

    config = build(CompareConfig, read_yaml(SRC / "recipes" / "staged_competence" / f"{name}.yaml"), name)
    return config, {job: settings for job, module, settings in plan_jobs(config, "staged_competence") if module}


@pytest.mark.parametrize("name", ["compare", "losses"])
def test_the_arms_of_a_comparison_differ_in_what_they_do_not_share(name):
    config, arms = arms_of(name)
    plain = [str(s.model_dump(exclude={"out", "seed"})) for job, s in arms.items() if job.endswith("seed0")]
    assert len(plain) == len(set(plain)) > 9
    for settings in arms.values():
        assert settings.lr == config.shared["lr"] and settings.data.train == config.shared["data"]["train"]


def test_a_control_keeps_what_makes_it_one():
    """`shared` once overrode the recipes: the random control was the method itself, which it therefore matched."""
    _, arms = arms_of("compare")
    assert arms["control_random_buckets-seed0"].difficulty.scorer == "random"
    assert arms["control_low_beta-seed0"].beta == pytest.approx(arms["staged_competence-seed0"].beta / 3, rel=1e-3)
