"""What is imported is declared, and what is declared is pinned to the version that is tested."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = {"megalm", "launch", "tools"}
# Optional packages that PyPI does not have (flash-attn 3's is called so only when built from source).
NOT_ON_PYPI = {"apex", "flash_attn_interface"}
UNTESTED_EXTRAS = {"flash"}  # needs nvcc to install


def project() -> dict[str, list[Requirement]]:
    """Extra ("" for the base) -> what it requires."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = {"": table["dependencies"], **table["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def undeclared(files: list[Path], declared: set[str]) -> Iterator[str]:
    """Third-party modules that `files` import from distributions that are not in `declared`."""
    homes = packages_distributions()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - OURS - NOT_ON_PYPI - set(sys.stdlib_module_names):
                home = {canonicalize_name(name) for name in homes.get(top, [top])}
                if not home & declared:
                    yield f"{path.relative_to(path.parents[1])} imports {top}"


def test_imports_are_declared(tmp_path: Path) -> None:
    declared = {canonicalize_name(requirement.name) for group in project().values() for requirement in group}
    files = [path for folder in OURS for path in (REPOSITORY / folder).rglob("*.py")]
    assert files
    assert not list(undeclared(files, declared))

    (tmp_path / "x.py").write_text("import torch\nfrom requests.adapters import HTTPAdapter\n")
    assert [line.split()[-1] for line in undeclared([tmp_path / "x.py"], declared)] == ["requests"]


def test_declared_packages_are_pinned_within_their_range() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for extra, requirements in project().items():
        for requirement in requirements:
            if extra in UNTESTED_EXTRAS or requirement.name == "megalm":
                continue
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement} has no pin in constraints.txt"
            assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} excludes {pin}"


def test_the_base_is_small() -> None:
    base = {requirement.name for requirement in project()[""]}
    assert not base & {"transformers", "wandb", "tensorboard", "submitit", "flash-attn", "lm-eval", "apex"}
