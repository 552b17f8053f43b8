"""The recipe: a data set's definition, in one file.

    name: notes
    directory: data/notes
    sources: [{name: notes, path: raw/notes/*.jsonl.gz}]
    steps:
      - kind: language
        keep: [en, zh]
      - kind: exact_documents
    output: {text: {format: jsonl}}

A step's keys stand beside its kind. A kind is one of those in megalm/curate/steps/, or `module:Class` for a step of
your own.
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, ValidationError, model_validator

from megalm.config import Config
from megalm.curate.step import Merging, Step
from megalm.curate.steps.registry import KINDS
from megalm.errors import MegalmError

Format = Literal["auto", "warc", "wet", "html", "jsonl", "parquet", "text", "code"]
STEPS = "megalm.curate.steps"
"""Package of the steps."""


class Source(Config):
    """Where documents come from."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Begins the ids of its documents, and is their metadata `source`."""
    path: str | list[str]
    """A file, a folder, a pattern (`*`, `**`) or a URL that fsspec knows (`s3://...`), with a pattern or without; or a
    list of them."""
    format: Format = "auto"
    """`auto` goes by the names of the files: .warc.gz, .wet.gz, .html, .jsonl, .parquet, .txt, .md, .rst."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of its documents that is read, chosen by a hash of their ids."""
    text_field: str = "text"
    """Key or column of the text, in JSONL and Parquet."""
    extensions: list[str] | None = None
    """Of a folder, files with these extensions only. Default: those of its format."""
    largest_megabytes: PositiveInt = 64
    """Larger records and files are put aside: they would have to be held in memory whole."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """What all its documents have, such as {license: CC-BY-4.0}."""


class TextOutput(Config):
    """Documents as text, in files of a task and a chunk each."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    """`jsonl` is compressed by zstd."""


class ShardsOutput(Config):
    """Documents as ids, in the shards that training reads."""

    tokenizer: str
    """Folder, .model or tokenizer.json."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of documents that goes to shards/held_out, by a hash of their group or text."""
    by_source: bool = False
    """A folder of shards for each source (shards/SOURCE/train), which training can then blend by weight."""
    shard_megabytes: PositiveInt = 256
    """A shard is closed when it has reached this size."""


class Output(Config):
    """What is written."""

    text: TextOutput | None = TextOutput()
    """Text, or null."""
    shards: ShardsOutput | None = None
    """Shards, or null."""


class Audit(Config):
    """What the report looks at."""

    samples: int = Field(5, ge=0, le=100)
    """Removed documents that are shown, for every reason of a step."""
    sample_characters: PositiveInt = 600
    """Of each of them."""
    tokenizer: str | None = None
    """Counts tokens at every step, on a sample. Default: that of output.shards, and without shards none."""
    count_by: list[str] = Field(default_factory=lambda: ["source", "language"])
    """Metadata by which the documents that are kept are counted."""


class Batches(Config):
    """How much is done at a time. It decides memory, what an interruption costs and the names of the files."""

    documents: PositiveInt = 256
    """Documents that a step sees at a time, at most."""
    characters: PositiveInt = 8_000_000
    """A batch ends when it has reached so many."""
    per_chunk: PositiveInt = 32
    """Batches from one saved state to the next; each chunk is a file of the output."""


class Recipe(Config):
    """A data set, from its sources to its files."""

    name: str
    """For the report."""
    directory: str
    """Folder that everything is written to."""
    sources: Annotated[list[Source], Field(min_length=1)]
    """Where documents come from."""
    steps: list[dict[str, Any]] = Field(default_factory=list)
    """What is done to them, in order: `kind` and the step's own keys."""
    output: Output = Output()
    """What is written."""
    tasks: int = Field(64, ge=1, le=100_000)
    """Parts that the sources are split into; as many processes can work at once. At most 100,000: files are named and
    put in order by five digits of the task, and each task has a state that every report reads."""
    batches: Batches = Batches()
    """How much is done at a time."""
    audit: Audit = Audit()
    """What the report looks at."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        names = [source.name for source in self.sources]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"sources.{index}.name {name} is the name of two sources: ids need different ones")
        if self.output.text is None and self.output.shards is None:
            raise ValueError("output.text and output.shards are both null: name one of them")
        build(self.steps)
        return self


def build(steps: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The steps of a recipe, with their settings checked. Raises ValueError that names the key."""
    return [_step(f"steps.{index}", step) for index, step in enumerate(steps)]


def phases(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """(first, last + 1) of the steps of each phase: every merging step begins one."""
    merging = [index for index, step in enumerate(steps) if isinstance(step, Merging)]
    bounds = [0, *merging, len(steps)]
    return list(zip(bounds[:-1], bounds[1:]))


def _step(key: str, given: Mapping[str, Any]) -> Step:
    settings = dict(given)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"{key} has no kind: write kind: NAME (docs/curation.md lists them)")
    found = step_class(kind, f"{key}.kind")
    try:
        return found(found.Settings.model_validate(settings))
    except ValidationError as error:
        raise ValueError(_sentence(key, kind, found, error.errors(include_url=False)[0])) from None
    except MegalmError as error:
        raise ValueError(f"{key} ({kind}): {error}") from None


def _sentence(key: str, kind: str, found: type[Step], problem: Any) -> str:
    where = ".".join([key, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        *above, name = problem["loc"]
        return f"{where} is unknown to the step {kind}{_closest(str(name), _known(found.Settings, above))}"
    if problem["type"] == "missing":
        return f"{where} is missing: the step {kind} needs it"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    return f"{where} ({kind}): {problem['msg'].removeprefix('Input ')}, not {problem['input']!r}"


def _known(settings: type[Config], above: Sequence[Any]) -> list[str]:
    """The keys there are below the keys and numbers `above`."""
    for place in above:
        field = settings.model_fields.get(str(place))
        for inside in get_args(field.annotation) if field else ():
            if isinstance(inside, type) and issubclass(inside, Config):
                settings = inside
    return list(settings.model_fields)


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known) or 'no keys'}"


def step_class(kind: str, key: str = "step") -> type[Step]:
    """The class of a kind of step. Raises ValueError with the closest known kind, or what is wrong with a class, and
    where the kind was named: `key`."""
    target = kind
    if ":" not in kind:
        if kind not in KINDS:
            raise ValueError(f"{key} {kind} is no kind of step{_closest(kind, sorted(KINDS))}")
        target = f"{STEPS}.{KINDS[kind]}"
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{key} {kind} cannot be imported ({error}): pip install 'megalm[curate]'") from error
    except AttributeError:
        raise ValueError(f"{key} {kind}: the module {module} has no class {name}") from None
    if not (isinstance(found, type) and issubclass(found, Step)):
        raise ValueError(f"{key} {kind} is not a megalm.curate.step.Step: derive it from one")
    return found
