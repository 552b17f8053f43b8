"""Reading, layering, overriding, validating, printing and describing configuration."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, model_validator

from megalm.config import Config, describe, dump, load
from megalm.errors import MegalmError
from megalm.training.config import RunConfig

REPOSITORY = Path(__file__).resolve().parent.parent

RUN = """\
run:
  directory: runs/x
data:
  sources:
    - path: a
  tokenizer: t
train:
  steps: 100
  global_batch_size: 8
  micro_batch_size: 2
  sequence_length: 64
"""


class Anything(Config):
    """One branch of free keys, to test reading and layering alone."""

    free: dict[str, Any] = Field(default_factory=dict)
    """Anything."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    return tmp_path


def message(path: str, *overrides: str, root: type[Config] = RunConfig) -> str:
    """What `load` says is wrong: one line."""
    with pytest.raises(MegalmError) as caught:
        load(path, root, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def free(path: str = "run.yaml", *overrides: str) -> dict[str, Any]:
    return load(path, Anything, overrides).free


# ---- scalars ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e9", 1e9),
        ("1E+2", 100.0),
        (".5", 0.5),
        ("1.5e3", 1500.0),
        ("-2.", -2.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("0x10", 16),
        ("-7", -7),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("", None),
        ("off", "off"),
        ("yes", "yes"),
        ("007", "007"),
        ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"),
        ("1e", "1e"),
        ("'3'", "3"),
    ],
)
def test_scalars(folder: Path, text: str, value: Any) -> None:
    Path("run.yaml").write_text(f"free: {{a: {text}}}")
    read = free()["a"]
    assert (read, type(read)) == (value, type(value))


def test_pyyaml_alone_reads_these_numbers_as_text() -> None:
    """The reason for our own resolvers; if PyYAML changes, they can go."""
    assert yaml.safe_load("[3e-4, 1e9, off]") == ["3e-4", "1e9", False]


def test_numbers_fit_their_field(folder: Path) -> None:
    config = load("run.yaml", RunConfig, ["train.steps=1e9", "train.global_batch_size=1_000", "optimizer.eps=1e-6"])
    assert (config.train.steps, type(config.train.steps)) == (10**9, int)
    assert config.train.global_batch_size == 1000
    assert config.optimizer.eps == 1e-6
    assert load("run.yaml", RunConfig, ["model.rope_theta=500000"]).model.rope_theta == 500000.0
    assert "train.steps should be a valid integer, not 1.5" in message("run.yaml", "train.steps=1.5")
    assert "should be a valid integer, not Infinity" in message("run.yaml", "train.steps=.inf")
    for value, shown in ((".inf", "Infinity"), (".nan", "NaN")):
        for key in ("optimizer.learning_rate", "optimizer.eps", "model.rope_theta"):
            assert f"{key} should be a finite number, not {shown}" in message("run.yaml", f"{key}={value}")


# ---- what is wrong, and where ----


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("  steps: 100", "  stepz: 100", "run.yaml:8: unknown key train.stepz; did you mean train.steps?"),
        ("run:", "runn:", "run.yaml:1: unknown key runn; did you mean run?"),
        ("- path: a", "- pathh: a", "run.yaml:5: unknown key data.sources.0.pathh; did you mean data.sources.0.path?"),
        ("  steps: 100", "  steps: ten", 'run.yaml:8: train.steps should be a valid integer, not "ten"'),
        ("  steps: 100", "  steps: true", "run.yaml:8: train.steps should be a valid integer, not true"),
        ("  steps: 100", "  steps: '100'", 'run.yaml:8: train.steps should be a valid integer, not "100"'),
        ("  steps: 100", "  steps: 0", "run.yaml:8: train.steps should be greater than 0, not 0"),
        ("  steps: 100", "  steps: [1]", "run.yaml:8: train.steps should be a valid integer, not [1]"),
        ("  directory: runs/x", "  directory: 5", "run.yaml:2: run.directory should be text"),
        ("- path: a", "- a", 'run.yaml:5: data.sources.0 should be a mapping of keys, not "a"'),
        ("  tokenizer: t", "  tokenizer: t\n  held_out: a", 'run.yaml:7: data.held_out should be a list, not "a"'),
        ("  steps: 100\n", "", "run.yaml:7: train.steps is missing: add it to the file, or give --set train.steps="),
        ("run:\n  directory: runs/x\n", "", "run.yaml: run.directory is missing"),
        (
            "  tokenizer: t",
            "  tokenizer: t\n  tokenizer: u",
            "run.yaml:7: key tokenizer is given twice (first at run.y",
        ),
        ("run:", "run: {", "not valid YAML"),
        ("run:", "? [a]\n: 1\nrun:", "run.yaml:1: a key is text, not a list or a mapping"),
        ("  steps: 100", "  steps: !!python/name:os.system 1", "run.yaml:8: not valid YAML"),
        ("  steps: 100", "  steps: &loop [*loop]", "run.yaml:8: this YAML alias contains itself"),
    ],
)
def test_errors_name_file_line_and_key(folder: Path, written: str, instead: str, expected: str) -> None:
    assert written in RUN
    Path("run.yaml").write_text(RUN.replace(written, instead, 1))
    assert expected in message("run.yaml")


def test_the_text_that_the_errors_are_planted_in_is_right(folder: Path) -> None:
    assert load("run.yaml", RunConfig).train.steps == 100


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate=1e-3", "did you mean optimizer.learning_rate?"),
        ("every=5", "did you mean checkpoint.every, evaluate.every or logging.every?"),
        ("weight=5", "did you mean data.sources.N.weight or data.held_out.N.weight?"),
        ("train.learning_rat=1", "did you mean optimizer.learning_rate?"),
        ("train.qqq=1", "; known here: steps, global_batch_size, micro_batch_size, sequence_length, precision"),
        ("model.rope_scaling={kind: yarn, factor: 2, factr: 2}", "did you mean model.rope_scaling.factor?"),
    ],
)
def test_unknown_keys_name_the_closest_known_one(folder: Path, override: str, expected: str) -> None:
    found = message("run.yaml", override)
    assert found.startswith(f"--set {override}: unknown key ")
    assert expected in found


def test_errors_after_the_first_are_counted(folder: Path) -> None:
    Path("run.yaml").write_text(RUN.replace("  steps: 100", "  stepz: 3"))
    # The missing train.steps is a consequence: the key that is unknown comes first.
    assert message("run.yaml").endswith("did you mean train.steps? (and 1 more error)")
    assert message("run.yaml", "q=1").endswith("(and 2 more errors)")


def test_an_empty_file_lacks_every_required_key(folder: Path) -> None:
    Path("empty.yaml").write_text("# nothing yet\n")
    assert message("empty.yaml").startswith("empty.yaml: run.directory is missing: add it")
    assert message("empty.yaml").endswith("(and 4 more errors)")


def test_impossible_combinations_name_every_key_involved(folder: Path) -> None:
    found = message("run.yaml", "train.micro_batch_size=3")
    assert found == (
        "run.yaml:9, --set train.micro_batch_size=3: "
        "train.global_batch_size 8 is not a multiple of train.micro_batch_size 3: the nearest legal one is 9"
    )
    found = message("run.yaml", "parallel.zero=2", "parallel.pipeline=2")
    assert found.startswith("--set parallel.zero=2, --set parallel.pipeline=2: parallel: zero 2 with pipeline 2")
    # A key left at its default has no place.
    assert message("run.yaml", "parallel.context=2").startswith("--set parallel.context=2: parallel: context 2 is not")


def test_a_combination_of_defaults_only_names_the_section(folder: Path) -> None:
    class Section(Config):
        """Never right."""

        number: int = 1
        """A number."""

        @model_validator(mode="after")
        def _never(self) -> "Section":
            raise ValueError("this cannot be")

    class Root(Config):
        """A root."""

        section: Section | None = None
        """A section."""

    Path("never.yaml").write_text("\nsection: {}\n")
    assert message("never.yaml", root=Root) == "never.yaml:2: section: this cannot be"


@pytest.mark.parametrize("content", [b"- a\n", b"text", b"a: \xff\n", b"a: \x00\n", b"a: 1\n---\nb: 2\n"])
def test_files_that_are_no_mapping_are_refused(folder: Path, content: bytes) -> None:
    Path("bad.yaml").write_bytes(content)
    assert "bad.yaml" in message("bad.yaml")


def test_missing_files_are_named_with_the_closest(folder: Path) -> None:
    assert message("runn.yaml") == "config file runn.yaml does not exist; did you mean run.yaml?"
    assert message("nowhere/qqqqqq.yaml") == "config file nowhere/qqqqqq.yaml does not exist: check the path"
    assert "cannot be read" in message(".")


# ---- extends ----


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def test_extends_is_relative_to_its_file_and_later_wins(folder: Path) -> None:
    write(
        {
            "parts/deep/a.yaml": "free: {x: {one: a, two: a, three: a}, l: [1, 2, 3], s: a}",
            "parts/b.yaml": "extends: deep/a.yaml\nfree: {x: {two: b, three: b}, l: [4]}",
            "parts/c.yaml": "free: {x: {three: c}, s: {now: a mapping}}",
            "run.yaml": "extends: [parts/b.yaml, parts/c.yaml]\nfree: {x: {four: run}}",
        }
    )
    x = {"one": "a", "two": "b", "three": "c", "four": "run"}
    assert free() == {"x": x, "l": [4], "s": {"now": "a mapping"}}


def test_two_files_may_extend_the_same_one(folder: Path) -> None:
    write(
        {
            "base.yaml": "free: {a: 0, b: 0, c: 0}",
            "left.yaml": "extends: base.yaml\nfree: {a: 1}",
            "right.yaml": "extends: base.yaml\nfree: {b: 1}",
            "run.yaml": "extends: [left.yaml, right.yaml]",
        }
    )
    # Right extends base too, but says nothing about `a`: base comes once, before both.
    assert free() == {"a": 1, "b": 1, "c": 0}
    write({"run.yaml": "extends: [left.yaml, right.yaml, parts/../base.yaml]"})
    assert free() == {"a": 1, "b": 1, "c": 0}
    write({"run.yaml": "extends: [right.yaml, base.yaml, left.yaml]\nfree: {c: 1}"})
    assert free() == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"run.yaml": "extends: run.yaml"}, "run.yaml:1: extends goes in a circle (run.yaml -> run.yaml)"),
        (
            {"run.yaml": "extends: p/a.yaml", "p/a.yaml": "\nextends:\n  - ../run.yaml"},
            "p/a.yaml:3: extends goes in a circle (run.yaml -> p/a.yaml -> run.yaml)",
        ),
        ({"run.yaml": "\nextends: zz.yaml"}, "run.yaml:2: config file zz.yaml does not exist"),
        (
            {"run.yaml": "extends: model/tiny.yml", "model/tiny.yaml": ""},
            "config file model/tiny.yml does not exist; did you mean model/tiny.yaml?",
        ),
        ({"run.yaml": "extends: 5"}, "run.yaml:1: extends is a path or a list of paths, not 5"),
        ({"run.yaml": "extends: {a: b}"}, 'run.yaml:1: extends is a path or a list of paths, not {"a": "b"}'),
    ],
)
def test_extends_that_leads_nowhere(folder: Path, files: dict[str, str], expected: str) -> None:
    write(files)
    assert expected in message("run.yaml")


def test_errors_name_the_file_the_key_came_from(folder: Path) -> None:
    write({"parts/base.yaml": RUN + "  stepz: 1\n", "top.yaml": "extends: parts/base.yaml\n"})
    assert "parts/base.yaml:12: unknown key train.stepz" in message("top.yaml")
    write({"parts/base.yaml": RUN, "top.yaml": "extends: parts/base.yaml\n\nrun:\n  sed: 1\n"})
    assert "top.yaml:4: unknown key run.sed; did you mean run.seed?" in message("top.yaml")


# ---- --set ----


def test_overrides_apply_in_order_after_the_file(folder: Path) -> None:
    config = load(
        "run.yaml",
        RunConfig,
        [
            "train.steps=5",
            "train.steps=7",
            "data.sources.0.path=b",
            "data.sources.1.path=c",
            "data.held_out.0={path: h, weight: 2}",
            "model.rope_scaling.kind=linear",
            "model.rope_scaling.factor=2",
            "train={precision: fp32}",
            "logging.wandb.mode=off",
            "run.directory=a=b",
        ],
    )
    assert config.train.steps == 7
    assert [source.path for source in config.data.sources] == ["b", "c"]
    assert (config.data.held_out[0].path, config.data.held_out[0].weight) == ("h", 2.0)
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 2.0
    assert config.train.precision == "fp32" and config.train.global_batch_size == 8  # mappings merge
    assert config.logging.wandb.mode == "off"
    assert config.run.directory == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "--set train.stepz=3: unknown key train.stepz; did you mean train.steps?"),
        ("train.steps", "--set train.steps: write a dotted key, = and a value, such as --set train.steps=100"),
        ("=3", "--set =3: write a dotted key"),
        ("train..steps=3", "--set train..steps=3: write a dotted key"),
        ("train.steps.x=3", "--set train.steps.x=3: train.steps is 100, which has no key x"),
        ("data.sources.2.path=c", "data.sources is a list of 1: after it comes an index from 0 to 1"),
        ("data.sources.path=c", "data.sources is a list of 1: after it comes an index from 0 to 1"),
        ("data.sources.-1.path=c", "data.sources is a list of 1: after it comes an index from 0 to 1"),
        ("run.directory=[a", "--set run.directory=[a: not valid YAML"),
        ("run.directory={a: 1, a: 2}", "key a is given twice"),
        ("run.directory=", "--set run.directory=: run.directory should be text"),
        ("extends=other.yaml", "--set extends=other.yaml: unknown key extends"),
    ],
)
def test_wrong_overrides_are_named(folder: Path, override: str, expected: str) -> None:
    assert expected in message("run.yaml", override)


# ---- properties ----

names = st.text("abcdefgh_", min_size=1, max_size=3)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
trees = st.dictionaries(
    names, st.recursive(scalars, lambda inner: st.dictionaries(names, inner, max_size=3)), max_size=3
)


def merged(base: Any, over: Any) -> Any:
    """The rule of layering, in the plainest words."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {key: merged(base.get(key), over[key]) if key in over else base[key] for key in [*base, *over]}


@given(st.dictionaries(st.text(), values, max_size=4))
def test_dump_then_load_is_the_identity(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    config = Anything(free=content)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    again = load(str(path), Anything)
    assert again == config
    assert dump(again) == dump(config)
    assert yaml.safe_load(dump(config)) == {"free": content}, "any reader of YAML sees the same values"


@given(st.lists(trees, min_size=1, max_size=4))
def test_extends_and_set_both_merge_by_the_rule(tmp_path_factory: pytest.TempPathFactory, layers: list[Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    expected: Any = {}
    for number, layer in enumerate(layers):
        expected = merged(expected, copy.deepcopy(layer))
        (folder / f"layer{number}.yaml").write_text(dump(Anything(free=layer)), encoding="utf-8")
    names = ", ".join(f"layer{number}.yaml" for number in range(len(layers)))
    (folder / "layered.yaml").write_text(f"extends: [{names}]")
    assert load(str(folder / "layered.yaml"), Anything).free == expected
    # A chain, each extending the one before, is the same as the list.
    for number, layer in enumerate(layers[1:], start=1):
        text = f"extends: layer{number - 1}.yaml\n" + dump(Anything(free=layer))
        (folder / f"layer{number}.yaml").write_text(text, encoding="utf-8")
    assert load(str(folder / f"layer{len(layers) - 1}.yaml"), Anything).free == expected
    # So are overrides.
    flow = [f"free={yaml.safe_dump(layer, default_flow_style=True, width=10**6)}" for layer in layers[1:]]
    assert load(str(folder / "layer0.yaml"), Anything, flow).free == expected


@given(trees, st.lists(names, min_size=1, max_size=3), st.integers())
def test_set_changes_its_key_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], parts: list[str], value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "set.yaml"
    path.write_text(dump(Anything(free=tree)), encoding="utf-8")
    expected = copy.deepcopy(tree)
    inner: Any = expected
    for part in parts[:-1]:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            assert "which has no key" in message(str(path), f"free.{'.'.join(parts)}={value}", root=Anything)
            return
    inner[parts[-1]] = value
    assert free(str(path), f"free.{'.'.join(parts)}={value}") == expected


def test_the_run_config_round_trips(folder: Path) -> None:
    config = load(
        "run.yaml", RunConfig, ["model.rope_scaling={kind: yarn, factor: 2}", "deepspeed={a: 1e-9, b: '1e9'}"]
    )
    Path("again.yaml").write_text(dump(config))
    assert load("again.yaml", RunConfig) == config
    assert config.deepspeed == {"a": 1e-9, "b": "1e9"}
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


# ---- describing ----


def test_every_field_and_branch_is_documented() -> None:
    branches = describe(RunConfig)
    assert {"", "train", "model.rope_scaling", "data.sources.N", "logging.wandb"} <= {branch.key for branch in branches}
    undocumented = [f"{branch.key}.{key.name}" for branch in branches for key in branch.keys if not key.meaning]
    assert not undocumented
    # pydantic hands a class without a docstring its parent's.
    assert not [branch.key for branch in branches if branch.meaning in ("", Config.__doc__)]


def test_describe_says_type_bounds_and_default() -> None:
    class Leaf(Config):
        """A leaf."""

        rate: float = Field(0.5, gt=0, le=1)
        """Share."""
        kind: Literal["a", "b"] = "a"
        """Choice."""
        size: PositiveInt | None = None
        undocumented: list[int] = Field(default_factory=list)

    class Root(Config):
        """A root."""

        leaves: list[Leaf]
        """Leaves."""

    root, leaf = describe(Root)
    assert [(key.name, key.type, key.default) for key in root.keys] == [("leaves", "list of sections", "required")]
    assert (leaf.key, leaf.meaning) == ("leaves.N", "A leaf.")
    assert [(key.type, key.default, key.meaning) for key in leaf.keys] == [
        ("number > 0, ≤ 1", "`0.5`", "Share."),
        ("`a`, `b`", "`a`", "Choice."),
        ("integer > 0 or null", "`null`", ""),
        ("list of integers", "`[]`", ""),
    ]


def test_the_page_is_current_and_the_check_notices_when_it_is_not(tmp_path: Path) -> None:
    tool = REPOSITORY / "tools" / "write_config_docs.py"

    def check(tool: Path) -> tuple[int, str]:
        result = subprocess.run(
            [sys.executable, str(tool), "--check"], capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}
        )
        return result.returncode, result.stderr

    assert check(tool) == (0, "")

    # A copy of the tool beside a page with one word changed, and beside none.
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    copied = tmp_path / "tools" / tool.name
    copied.write_text(tool.read_text())
    page = (REPOSITORY / "docs" / "config.md").read_text()
    assert "Optimizer steps." in page
    for stale in (page.replace("Optimizer steps.", "Steps."), None):
        if stale:
            (tmp_path / "docs" / "config.md").write_text(stale)
        else:
            (tmp_path / "docs" / "config.md").unlink()
        assert check(copied) == (
            1,
            "docs/config.md is not current: run `python tools/write_config_docs.py` and commit it\n",
        )


# ---- the light door ----


def test_loading_imports_nothing_heavy(folder: Path) -> None:
    script = (
        "import sys\n"
        "from megalm.config import load\n"
        "from megalm.training.config import RunConfig\n"
        "load('run.yaml', RunConfig)\n"
        "print(*({'torch', 'deepspeed', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    assert result.stdout.split() == []
