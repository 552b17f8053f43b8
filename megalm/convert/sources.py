"""Where a model's weights come from: a checkpoint of any layout, or a Hugging Face folder. Both are read by parts."""

import math
import re
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.checkpoint import tensors
from megalm.checkpoint.tensor_file import CODES
from megalm.checkpoint.tensors import WEIGHT, Reader
from megalm.convert import architectures
from megalm.convert.folder import CONFIG_FILE, Weights, read_json
from megalm.convert.mapping import Same, Vocabulary
from megalm.errors import MegalmError
from megalm.models import tuning as tunings
from megalm.models.config import ModelConfig, TuningConfig, saved_config
from megalm.nn.adapter import ADAPTERS, MAGNITUDE, A, B, merged

TABLES = ("embedding.table.weight", "head.weight")
"""Weights with a row per token id, and rows of zeros that pad them."""
_BLOCK = 1 << 20
"""Numbers compared at a time."""


class Source(ABC):
    """The weights of a model, by megalm's full names. A context manager."""

    path: Path
    config: ModelConfig
    """With kernels chosen anew: those of the machine that trained it may not be here."""
    dtypes: dict[str, str]
    """Full name -> name of the dtype a weight is kept in, or of that of the forward pass it was trained in."""
    shapes: dict[str, tuple[int, ...]]
    """Full name -> shape, the padded vocabulary included."""

    @abstractmethod
    def __enter__(self) -> "Source": ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last, fp32, all of which there are; little more than that is read."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last of a weight, fp32; below the last token id a table has rows of zeros without end."""
        if name not in TABLES:
            return self._rows(name, first, last)
        assert self.config.vocab_size is not None
        rows = torch.zeros(last - first, *self.shapes[name][1:])
        there = min(last, self.config.vocab_size)
        if first < there:
            rows[: there - first] = self._rows(name, first, there)
        return rows

    def whole(self, name: str) -> Tensor:
        """A whole weight, fp32."""
        return self.rows(name, 0, self.shapes[name][0])

    def stretch(
        self,
        name: str,
        shape: tuple[int, ...],
        shard_dim: int | None,
        tensor_rank: int,
        tensor_size: int,
        start: int,
        count: int,
    ) -> Tensor:
        """Numbers start..start+count of the flattened slice `tensor_rank` of `tensor_size` along shard_dim, fp32.

        shape: of the whole tensor, which may have another number of rows that pad the vocabulary.
        """
        if shard_dim:  # a matrix that is cut along its columns
            width = shape[1] // tensor_size
            first, last = start // width, -(-(start + count) // width)
            block = self.rows(name, first, last)[:, tensor_rank * width : (tensor_rank + 1) * width]
        else:
            width = math.prod(shape[1:])
            start += 0 if shard_dim is None else tensor_rank * math.prod(shape) // tensor_size
            first, last = start // width, -(-(start + count) // width)
            block = self.rows(name, first, last)
        skipped = start - first * width
        return block.reshape(-1)[skipped : skipped + count]


class CheckpointSource(Source):
    """A checkpoint of any layout. Adapters are merged into its weights, which so compute what it computes."""

    tuning: TuningConfig
    adapters: dict[str, tuple[int, ...]]
    """Full name -> shape of every parameter of its adapters, which saved() gives."""

    def __init__(self, path: Path):
        """path: a run folder (its newest), or a checkpoint folder.

        Raises MegalmError if there is none, or if it is incomplete or of another version.
        """
        self.path = folder = checkpoints.resolve(path)
        self.manifest = manifests.read(folder)
        self.files = tensors.weight_files(self.manifest)
        checkpoints.refuse_damaged(folder, manifests.faults(folder, self.manifest, self.files, checksums=False))
        version = self.manifest.versions.get("megalm", "unknown")
        self.config, self.tuning = saved_config(self.manifest.config, folder, version)
        saved = {name: tuple(entry["shape"]) for name, entry in self.manifest.parameters.items()}
        self.shapes = architectures.shapes(self.config)
        self.adapters = {name: shape for name, shape in saved.items() if name.rpartition(".")[2] in ADAPTERS}
        self.dtypes = {name: self.manifest.parameters[name]["dtype"] for name in self.shapes if name in saved}
        if saved != tunings.shapes(self.config, self.tuning):
            raise MegalmError(
                f"checkpoint {folder} holds other weights than its config describes: use the version of megalm that "
                f"wrote it, {version}"
            )
        self._reader = Reader(folder, self.manifest)

    def __enter__(self) -> "CheckpointSource":
        self._reader.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.__exit__(*exception)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        rows = self.saved(name, first, last)
        module, _, kind = name.rpartition(".")
        if kind != "weight" or f"{module}.{A}" not in self.adapters:
            return rows
        left, right = self.saved(f"{module}.{A}", 0, self.tuning.rank), self.saved(f"{module}.{B}", first, last)
        magnitude = self.saved(f"{module}.{MAGNITUDE}", first, last) if self.tuning.method == "dora" else None
        return merged(rows, left, right, self.tuning.alpha / self.tuning.rank, magnitude)

    def saved(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last of a parameter as it was saved, fp32."""
        shape = self.shapes.get(name) or self.adapters[name]
        width = math.prod(shape[1:])
        flat = self._reader.stretch(name, WEIGHT, None, 0, 1, first * width, (last - first) * width)
        return flat.view(last - first, *shape[1:])


class FolderSource(Source):
    """A Hugging Face folder."""

    def __init__(self, path: Path):
        """Raises MegalmError if it is not one, if it is not whole, or if megalm has not its architecture."""
        self.path = path
        self.described = read_json(path / CONFIG_FILE)
        self.architecture, self.config = architectures.of_json(self.described, str(path / CONFIG_FILE))
        self.shapes = architectures.shapes(self.config)
        self.entries = architectures.entries(self.architecture, self.config)
        self._weights = Weights(path)
        try:
            self._names = self._check()
        except BaseException:
            self._weights.__exit__()
            raise
        self._entry = {name: (entry, i) for entry in self.entries for i, name in enumerate(entry.ours)}
        self.dtypes = {name: self._weights.dtype(self._names[entry.theirs]) for name, (entry, _) in self._entry.items()}

    def __enter__(self) -> "FolderSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self._weights.__exit__(*exception)

    def _check(self) -> dict[str, str]:
        """Every tensor's name -> the one it has in this folder, which may leave out the first part (`model.`).

        Raises MegalmError for the first that is missing, unknown, of another shape or not a float.
        """
        there, names = set(self._weights.names()), {}
        expected = architectures.their_shapes(self.architecture, self.config)
        for name, shape in expected.items():
            short = name.partition(".")[2]
            found = name if name in there else short
            if found not in there:
                raise MegalmError(
                    f"{self.path} has no tensor {name}, which its {CONFIG_FILE} describes: copy the folder again, or "
                    "correct that file"
                )
            if self._weights.shape(found) != shape:
                raise MegalmError(
                    f"{self.path}: the tensor {found} is {list(self._weights.shape(found))}, and {CONFIG_FILE} "
                    f"describes {list(shape)}: the two do not belong together"
                )
            if (dtype := self._weights.dtype(found)) not in CODES:
                raise MegalmError(
                    f"{self.path}: the tensor {found} is {dtype}, and only {', '.join(CODES)} are read: save it as one"
                )
            names[name] = found
        tied = architectures.tied(self.architecture, self.config)
        for name in sorted(there - set(names.values())):
            if name in tied:
                if not self._equal(name, names[tied[name]]):
                    raise MegalmError(
                        f"{self.path} has a head {name} that is not its embedding: set tie_word_embeddings to false in "
                        f"its {CONFIG_FILE}"
                    )
            elif not re.search(self.architecture.ignored, name):
                raise MegalmError(
                    f"{self.path} has a tensor {name}, which no {self.architecture.model_class} has: it is another "
                    "architecture"
                )
        return names

    def _equal(self, head: str, table: str) -> bool:
        """Whether two tables, the second of which is known to be one, hold the same numbers."""
        count, width = shape = self._weights.shape(table)
        if self._weights.shape(head) != shape or self._weights.dtype(head) not in CODES:
            return False
        step = max(1, _BLOCK // width)
        parts = ((first, min(first + step, count)) for first in range(0, count, step))
        return all(
            torch.equal(self._weights.rows(head, *part).float(), self._weights.rows(table, *part).float())
            for part in parts
        )

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        entry, index = self._entry[name]
        place = self._names[entry.theirs]
        if type(entry.mapping) in (Same, Vocabulary):
            return self._weights.rows(place, first, last).float()
        return self.restore(entry)[index][first:last]

    def restore(self, entry: architectures.Entry) -> list[Tensor]:
        """All of megalm's tensors that one of the folder's is made of, fp32."""
        place = self._names[entry.theirs]
        return list(entry.mapping.restore(self._weights.whole(place), self.config))


def open_source(path: Path) -> Source:
    """A checkpoint (or a run), or a Hugging Face folder. Raises MegalmError if it is neither, or not whole."""
    if not path.exists():
        raise MegalmError(f"{path} does not exist: name a Hugging Face folder, a run folder or RUN/checkpoints/step-N")
    return FolderSource(path) if (path / CONFIG_FILE).exists() else CheckpointSource(path)
