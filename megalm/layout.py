"""Which rank does what. Pure arithmetic: no torch, no process group.

Ranks are numbered with the tensor axis fastest, then data, then pipeline: the order of megatron-core and of
DeepSpeed's PipeModelDataParallelTopology, so that ranks that talk most sit next to each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megalm.errors import MegalmError


def nearest(value: int, choices: Iterable[int]) -> int:
    """The choice closest to `value`; the smaller of two that are equally close."""
    return min(choices, key=lambda choice: (abs(choice - value), choice))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class Layout:
    """Degrees of the axes; their product is the number of ranks."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, world_size: int, *, tensor: int, pipeline: int) -> "Layout":
        """The layout of `world_size` ranks; the data degree is what tensor and pipeline leave.

        Raises MegalmError if they do not divide the ranks.
        """
        fixed = tensor * pipeline
        if world_size % fixed:
            below, above = world_size // fixed * fixed, (world_size // fixed + 1) * fixed
            ranks = " or ".join(str(n) for n in (below, above) if n)
            raise MegalmError(
                f"parallel.tensor {tensor} x parallel.pipeline {pipeline} = {fixed} does not divide the "
                f"{world_size} ranks: start {ranks} ranks, or choose degrees whose product divides {world_size}"
            )
        return cls(pipeline=pipeline, data=world_size // fixed, tensor=tensor)

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, tensor) coordinates of a rank."""
        assert 0 <= rank < self.world_size
        stage, rest = divmod(rank, self.data * self.tensor)
        return stage, *divmod(rest, self.tensor)

    def rank(self, stage: int, data: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return (stage * self.data + data) * self.tensor + tensor

    def accumulation(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches each rank runs per step. Raises MegalmError if the global batch does not split."""
        per_round = micro_batch_size * self.data
        if global_batch_size % per_round:
            choice = max(1, round(global_batch_size / per_round)) * per_round
            raise MegalmError(
                f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
                f"{micro_batch_size} x {self.data} data-parallel ranks = {per_round}: the nearest legal one is {choice}"
            )
        return global_batch_size // per_round

    def describe(self) -> str:
        return f"pipeline {self.pipeline} x data {self.data} x tensor {self.tensor} = {self.world_size} ranks"


def check_model(
    layout: Layout,
    *,
    num_attention_heads: int,
    num_key_value_heads: int,
    intermediate_size: int,
    padded_vocab_size: int,
    num_layers: int,
    stages: int,
) -> None:
    """Refuse a model that the layout cannot cut, with the numbers and the nearest legal choice.

    stages: pieces the layers are cut into (the pipeline degree, twice that for DualPipeV).
    """

    def problem(tensor: int) -> str | None:
        """Why this degree cannot cut the model, or None."""
        for what, size in (
            ("model.num_attention_heads", num_attention_heads),
            ("model.intermediate_size", intermediate_size),
        ):
            if size % tensor:
                return f"does not divide {what} {size}"
        if num_key_value_heads % tensor and tensor % num_key_value_heads:
            return f"and model.num_key_value_heads {num_key_value_heads} do not divide one another"
        return None

    tensor = layout.tensor
    if found := problem(tensor):
        ranks = layout.world_size
        degrees = [d for d in divisors(tensor * layout.data) if not problem(d) and padded_vocab_size % d == 0]
        raise MegalmError(
            f"parallel.tensor {tensor} {found}: the nearest degree that serves on {ranks} ranks is "
            f"{nearest(tensor, degrees)}"
        )
    if padded_vocab_size % tensor:
        raise MegalmError(
            f"parallel.tensor {tensor} does not divide the padded vocabulary of {padded_vocab_size} rows: "
            f"set model.pad_vocab_to_multiple_of to a multiple of {tensor}, such as {128 * tensor}"
        )
    if num_layers < stages:
        folds = stages // layout.pipeline
        degree = max((d for d in divisors(layout.pipeline * layout.data) if d * folds <= num_layers), default=1)
        schedule = " and parallel.pipeline_schedule to 1f1b" if folds > 1 and degree == 1 else ""
        raise MegalmError(
            f"model.num_layers {num_layers} cannot be cut into {stages} pipeline stages: "
            f"set parallel.pipeline to {degree}{schedule}, or add layers"
        )
