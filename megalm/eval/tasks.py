"""The harness's tasks, its own or a user's, over data in a folder of this machine.

The harness has the datasets library find a dataset's files, which guesses what splits their names mean (`dev` is
`validation` to it), refuses folders with a loading script, and wants a README that lists subsets. Where files bear the
names of a task's subset and splits, they are what it reads.
"""

import csv
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from megalm.errors import MegalmError

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_tasks(names: Sequence[str], include: Sequence[Path]) -> tuple[TaskManager, list[Task | Group]]:
    """Tasks and groups by name, or by the path of a task file (.yaml), with their data read; and what knows them.

    include: folders of more task files. Datasets are looked for below the current folder.

    Raises MegalmError for a task that is not known or whose data cannot be read.
    """
    # the harness's own tasks are thousands of files: they are looked through where one of them may be meant
    folders: list[str | Path] = [*include]
    manager = TaskManager(include_path=folders, include_defaults=not all(Path(name).is_file() for name in names))
    manager._factory = _LocalFirst()
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            near = get_close_matches(name, manager.all_tasks, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise MegalmError(f"there is no task {name}{hint}: name a task file, or add its folder with --include")
    try:
        loaded = manager.load(list(names))
    except MegalmError:
        raise
    except Exception as error:  # a task file may name functions of its own, which import what they like
        raise MegalmError(f"{', '.join(names)} cannot be loaded ({_line(error)}): correct or leave out tasks") from None
    inside = {child for children in loaded["group_map"].values() for child in children}
    either: dict[str, Task | Group] = {**loaded["groups"], **loaded["tasks"]}
    return manager, [each for name, each in either.items() if name not in inside]


def find_files(folder: Path, subset: str | None, splits: Iterable[str]) -> dict[str, list[str]]:
    """Split -> its files, of those that are there, by their names; see docs/evaluation.md for what these may be."""
    found = {}
    for split in splits:
        stems = [split, f"{split}-*-of-*", f"data/{split}", f"data/{split}-*-of-*"]
        if subset not in (None, "default"):  # files of no subset would be taken for each
            stems = [f"{subset}/{stem}" for stem in stems] + [f"{split}/{subset}", f"{split}/{subset}_{split}"]
        matches = ([path for end in READERS for path in folder.glob(f"{stem}{end}")] for stem in stems)
        if files := next(filter(None, matches), None):
            found[split] = sorted(str(path.resolve()) for path in files)
    return found


class _LocalFirst(TaskFactory):
    """Tasks are built over files of find_files() where there are any, else as the harness does."""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        folder = Path(str(config.get("dataset_path")))
        files = find_files(folder, config.get("dataset_name"), _splits(config)) if folder.is_dir() else {}
        if not files:
            return config
        every = [path for paths in files.values() for path in paths]
        readers = {READERS[Path(path).suffix] for path in every}
        if len(readers) > 1:
            raise MegalmError(
                f"the files of {config['task']} in {folder.resolve()} are of several formats ({', '.join(readers)}): "
                "keep one of them"
            )
        (reader,) = readers
        options = {"data_files": files} | (_as_text(every) if reader == "csv" else {})
        return config | {"dataset_path": reader, "dataset_name": None, "dataset_kwargs": options}

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Task:
        try:
            return super()._build_task(entry, overrides)
        except MegalmError:
            raise
        except Exception as error:  # of datasets, of pyarrow, or of a task's own code over columns that are not there
            config = super()._load_full_config(entry, overrides)
            raise MegalmError(f"{_what(config, error)}: see docs/evaluation.md for files and columns") from error


def _what(config: dict[str, Any], error: Exception) -> str:
    """What is wrong with a task's data."""
    task, path, subset = config["task"], str(config.get("dataset_path")), config.get("dataset_name")
    folder, splits = Path(path).resolve(), _splits(config)
    dataset = f"the dataset {path}" + (f" (subset {subset})" if subset else "")
    if "/" in path and not folder.is_dir() and isinstance(error, OSError):
        return f"{task} needs {dataset}, and there is no folder {folder}"
    if folder.is_dir() and not (found := find_files(folder, subset, splits)):
        return f"{task} needs {dataset}, and {folder} has no files of it by name ({_line(error)})"
    missing = error.args[0] if isinstance(error, KeyError) and error.args else None
    if missing in splits:
        there = f"{folder} has only {', '.join(found)}" if folder.is_dir() else "it is not there"
        return f"{task} needs the split {missing} of {dataset}, and {there}"
    return f"the data of {task} cannot be read ({type(error).__name__}: {_line(error)})"


def _splits(config: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(config[key] for key in SPLITS if config.get(key)))


def _as_text(files: list[str]) -> dict[str, Any]:
    """Options to read .csv files as they are: 007 is no number in an answer, and "None" no missing one."""
    with open(files[0], encoding="utf-8-sig", newline="") as lines:
        columns = [name or f"Unnamed: {place}" for place, name in enumerate(next(csv.reader(lines), []))]
    text = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"features": text, "keep_default_na": False, "encoding": "utf-8-sig"}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
