"""Who may import whom (the design's "The house"), and which names files may bear.

The rules read the source, so that they hold for what a test run never imports. Each is tried on planted violations.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Rooms of megalm (packages, and the modules directly in it) -> the rooms each may import. Everyone may import errors.
ALLOWED = {
    "errors": set[str](),
    "config": set[str](),
    "layout": set[str](),
    "disk": set[str](),
    "command_line": set[str](),
    "nvidia_apex": set[str](),
    "nn": {"config", "nvidia_apex"},
    "models": {"nn", "config"},
    "parallel": {"nn", "optim", "layout", "config"},
    "tokenizer": {"config"},
    "data": {"tokenizer", "config", "disk"},
    "curate": {"tokenizer", "data", "config", "disk"},  # data: its shards are the output
    "optim": {"config", "nvidia_apex"},
    "metrics": {"config"},
    "checkpoint": {"config", "disk"},
    # nn: the factory of layers, the cache of keys; layout: which models a tensor degree can cut
    "convert": {"models", "nn", "checkpoint", "tokenizer", "config"},
    "eval": {"models", "nn", "checkpoint", "tokenizer", "layout", "config"},
    "sft": {"data", "tokenizer", "nn", "metrics", "config"},  # metrics: a run's records and pictures, for its report
}
ALLOWED["training"] = set(ALLOWED)
ALLOWED["train"] = {*ALLOWED}

# Rooms that stay usable where torch is not installed or would take seconds to import.
WITHOUT_TORCH = ["config", "errors", "layout", "tokenizer", "data", "curate"]
HEAVY = {"torch", "torchvision", "deepspeed", "megatron", "transformers", "accelerate", "flash_attn", "apex", "lm_eval"}


def sources(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every Python file below root/folder."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it; `known` tells modules from what is in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names}
    return found


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports, for megalm, launch and tools."""
    files = list(sources(root, "megalm", "launch", "tools"))
    known = {".".join(name.split(".")[:depth]) for name, _ in files for depth in range(1, name.count(".") + 2)}
    return {name: imports(name, path, known) for name, path in files}


def room(module: str) -> str | None:
    """The room of megalm that a module is in; None outside megalm and for megalm itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megalm" and len(parts) > 1 else None


def wrong_directions(root: Path) -> list[str]:
    """Imports that the table forbids."""
    wrong = []
    for module, imported in graph(root).items():
        top = module.split(".")[0]
        for target in sorted(imported):
            to = target.split(".")[0]
            if top == "megalm" and to in ("launch", "tools", "benchmarks", "tests"):
                wrong.append(f"{module} imports {target}: megalm never looks back at {to}")
            if top in ("launch", "tools") and to in ("launch", "tools") and to != top:
                wrong.append(f"{module} imports {target}: launch and tools share megalm, not each other")
            here, there = room(module), room(target)
            if here is None or there is None or there in (here, "errors"):
                continue
            if here not in ALLOWED:
                wrong.append(f"{module}: the room {here} is not in the table of this test and of the design")
            elif there not in ALLOWED[here]:
                wrong.append(f"{module} imports {target}: {here} may import {sorted(ALLOWED[here])}")
    return wrong


def cycles(root: Path) -> list[str]:
    """Circles among rooms, and among modules (imports inside functions count)."""
    modules = {name: set(imported) for name, imported in graph(root).items()}
    rooms: dict[str, set[str]] = {}
    for name, imported in modules.items():
        if here := room(name):
            rooms.setdefault(here, set()).update(
                there for target in imported if (there := room(target)) and there != here
            )
    found = []
    for edges in (rooms, modules):
        done: set[str] = set()

        def visit(node: str, path: tuple[str, ...], edges: dict[str, set[str]], done: set[str]) -> None:
            if node in path:
                found.append(" -> ".join((*path[path.index(node) :], node)))
            elif node not in done:
                for target in sorted(edges.get(node, ())):
                    visit(target, (*path, node), edges, done)
                done.add(node)

        for node in sorted(edges):
            visit(node, (), edges, done)
    return found


def heavy_imports(root: Path) -> list[str]:
    """Imports of torch and the like in launch and in the rooms without torch, directly or through our own modules."""
    modules = graph(root)
    wrong = []
    for start in sorted(modules):
        if start.split(".")[0] != "launch" and room(start) not in WITHOUT_TORCH:
            continue
        seen, waiting = {start}, [start]
        while waiting:
            module = waiting.pop()
            for target in sorted(modules[module]):
                if target.split(".")[0] in HEAVY:
                    wrong.append(f"{start} reaches {target} through {module}")
                if target in modules and target not in seen:
                    seen.add(target)
                    waiting.append(target)
    return wrong


def loaded_inits(root: Path) -> list[str]:
    """`__init__.py` files that hold more than a docstring (megalm's own also has __version__)."""
    wrong = []
    for name, path in sources(root, "megalm", "launch"):
        if path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        rest = tree.body[1:] if ast.get_docstring(tree) else tree.body
        if name == "megalm":
            rest = [node for node in rest if not (isinstance(node, ast.Assign) and _names(node) == ["__version__"])]
        if rest or not ast.get_docstring(tree):
            wrong.append(f"{name}/__init__.py holds a docstring only")
    return wrong


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def shadowing_names(root: Path) -> list[str]:
    """Files that would hide a module from a script beside them (Python puts a script's folder first on the path)."""
    taken = {*sys.stdlib_module_names, *installed()} - {"megalm"}
    files = [path for folder in ("tools", "benchmarks", "megalm") for path in sorted((root / folder).glob("*.py"))]
    return [f"{path.relative_to(root)} bears the name of a module" for path in files if path.stem in taken]


@cache
def installed() -> frozenset[str]:
    """Top-level modules of what is installed."""
    return frozenset(packages_distributions())


def nameless_rooms(root: Path) -> list[str]:
    """Files and folders whose name says nothing about what is in them."""
    nameless = {"utils", "util", "helpers", "helper", "misc", "common"}
    files = [path for _, path in sources(root, "megalm", "launch", "tools")]
    return [f"{path.relative_to(root)}: name the room" for path in files if {path.stem, path.parent.name} & nameless]


Rule = Callable[[Path], list[str]]
RULES: list[Rule] = [wrong_directions, cycles, heavy_imports, loaded_inits, shadowing_names, nameless_rooms]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rules(rule: Rule) -> None:
    assert not rule(REPOSITORY)


def test_the_rules_see_the_repository() -> None:
    modules = graph(REPOSITORY)
    assert "megalm.nn.config" in modules["megalm.models.config"]
    assert "torch" in modules["megalm.nn.layers"]
    assert "megalm.nn.init" in modules["megalm.nn.layers"], "`from package import module` names the module"
    assert {room(name) for name in modules if room(name)} <= set(ALLOWED)


CLEAN = {
    "megalm/__init__.py": '"""Doc."""\n\n__version__ = "1"\n',
    "megalm/errors.py": "",
    "megalm/config.py": "from megalm.errors import MegalmError\n",
    "megalm/train.py": "import megalm.training.build\n",
    "megalm/nn/__init__.py": '"""Doc."""\n',
    "megalm/nn/norm.py": "import torch\n",
    "megalm/nn/block.py": "from . import norm\nfrom megalm import config\n",
    "megalm/models/decoder.py": "from megalm.nn.block import Block\n",
    "megalm/data/shards.py": "import numpy\nfrom megalm.tokenizer import load\n",
    "megalm/tokenizer/load.py": "import sentencepiece\n",
    "megalm/training/build.py": "from megalm.models import decoder\nimport megalm.data.shards\n",
    "launch/__init__.py": '"""Doc."""\n',
    "launch/submit.py": "import os\n",
    "tools/make_shards.py": "import megalm.data.shards\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in (CLEAN | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_tree_passes(rule: Rule, tmp_path: Path) -> None:
    assert not rule(plant(tmp_path, {}))


@pytest.mark.parametrize(
    ("rule", "name", "text", "expected"),
    [
        (wrong_directions, "megalm/nn/x.py", "import megalm.models.decoder", "nn may import"),
        (wrong_directions, "megalm/nn/x.py", "from megalm import data", "megalm.nn.x imports megalm.data"),
        (wrong_directions, "megalm/nn/x.py", "from ..data import shards", "megalm.nn.x imports megalm.data.shards"),
        (
            wrong_directions,
            "megalm/nn/__init__.py",
            "from ..data import shards",
            "megalm.nn imports megalm.data.shards",
        ),
        (wrong_directions, "megalm/parallel/x.py", "def f():\n    import megalm.models.decoder", "parallel may import"),
        (wrong_directions, "megalm/data/x.py", "from launch import submit", "megalm never looks back at launch"),
        (wrong_directions, "launch/x.py", "import tools.make_shards", "not each other"),
        (wrong_directions, "megalm/attic/x.py", "import megalm.config", "the room attic is not in the table"),
        (wrong_directions, "megalm/models/x.py", "import megalm.train", "megalm.models.x imports megalm.train"),
        (cycles, "megalm/nn/norm.py", "import megalm.nn.block", "megalm.nn.block -> megalm.nn.norm -> megalm.nn.block"),
        (cycles, "megalm/nn/norm.py", "def f():\n    from .block import B", "megalm.nn.block -> megalm.nn.norm -> "),
        (cycles, "megalm/nn/x.py", "import megalm.models.decoder", "models -> nn -> models"),
        (heavy_imports, "megalm/data/x.py", "from torch import nn", "megalm.data.x reaches torch"),
        (heavy_imports, "megalm/tokenizer/x.py", "import transformers", "megalm.tokenizer.x reaches transformers"),
        (heavy_imports, "launch/x.py", "def f():\n    import torch.cuda", "launch.x reaches torch.cuda"),
        (heavy_imports, "launch/x.py", "import megalm.nn.block", "launch.x reaches torch through megalm.nn.norm"),
        (loaded_inits, "megalm/nn/__init__.py", '"""Doc."""\nimport os', "megalm.nn/__init__.py"),
        (loaded_inits, "megalm/nn/__init__.py", "", "megalm.nn/__init__.py"),
        (loaded_inits, "megalm/nn/__init__.py", '"""Doc."""\n__version__ = "1"', "megalm.nn/__init__.py"),
        (loaded_inits, "megalm/__init__.py", '"""Doc."""\nSTATE = {}', "megalm/__init__.py"),
        (shadowing_names, "tools/inspect.py", "", "tools/inspect.py"),
        (shadowing_names, "megalm/tokenize.py", "", "megalm/tokenize.py"),
        (shadowing_names, "tools/transformers.py", "", "tools/transformers.py"),
        (shadowing_names, "benchmarks/profile.py", "", "benchmarks/profile.py"),
        (nameless_rooms, "megalm/nn/utils.py", "", "megalm/nn/utils.py"),
        (nameless_rooms, "megalm/nn/utils/x.py", "", "megalm/nn/utils/x.py"),
    ],
)
def test_each_rule_catches_a_planted_violation(rule: Rule, name: str, text: str, expected: str, tmp_path: Path) -> None:
    found = rule(plant(tmp_path, {name: text}))
    assert any(expected in line for line in found), found


def test_commands_begin_without_what_takes_seconds() -> None:
    """Their --help is there at once, and so is main_guard, which Ctrl-C finds from then on."""
    tools = [name for name, _ in sources(REPOSITORY, "tools")]
    slow = sorted(HEAVY | {"matplotlib"})
    script = (
        "import importlib, sys\n"
        f"for name in {tools!r}:\n"
        "    known = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        f"    for each in {slow!r}:\n"
        "        if each in set(sys.modules) - known: print(name, 'imports', each)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_rooms_without_torch_import_without_torch() -> None:
    """What the source does not show: a library that imports torch by itself."""
    rooms = [
        name for name, _ in sources(REPOSITORY, "launch", "megalm") if room(name) in WITHOUT_TORCH or "launch" in name
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {rooms!r}: importlib.import_module(name)\n"
        f"print(*set({sorted(HEAVY)!r}) & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
