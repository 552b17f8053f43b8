"""Low-rank adapters on projections: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024).

Shapes: tokens = batch x seq; T is the tensor-parallel degree; a projection's weight W is [out, in], cut along either
dimension or whole (megalm.nn.layers). With A [rank, in] and B [out, rank], the projection computes

    LoRA: x (W + s B A)^T + b                    DoRA: x (m (W + s B A) / |W + s B A|)^T + b

where |.| is the norm of every row, a constant to autograd (DoRA, section 4.3), and m [out] its trained magnitude. B
starts at zero and m at |W|, so the model starts as it was. Both are as peft computes them.

The new parameters are the projection's own (`lora_A`, `lora_B`, `lora_magnitude`): its weight keeps its full name, and
what loads and saves by name needs to know nothing of adapters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.nn.init import Spec, declare, spec_of
from megalm.nn.layers import Layers

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
ADAPTERS = (A, B, MAGNITUDE)
"""Names of an adapter's parameters."""
_WHOLE = slice(None)


@dataclass(frozen=True)
class Adapter:
    """The forward hook of an adapted projection.

    cut: the dimension along which tensor parallelism cuts W, or None. scale: s. directional: whether it is DoRA.
    """

    layers: Layers
    cut: int | None
    scale: float
    directional: bool

    def __call__(self, projection: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return self.add(projection, inputs[0], out)

    def add(self, projection: nn.Module, x: Tensor, out: Tensor, rows: slice = _WHOLE) -> Tensor:
        """The adapted projection's output from the plain one's, `out`. rows: of W that out was computed with."""
        left, right = projection.get_parameter(A), projection.get_parameter(B)
        if self.cut == 1:  # [tokens, in / T] -> a share of [tokens, rank] on each rank
            update = F.linear(self.layers.reduce(F.linear(x, left)), self.layers.replicated(right))
        else:
            update = F.linear(F.linear(x, self.layers.partial(left)), self._of_outputs(right)[rows])
        if not self.directional:
            return out + self.scale * update
        magnitude = self._of_outputs(projection.get_parameter(MAGNITUDE))[rows]
        ratio = (magnitude / self.row_norms(projection, rows).to(magnitude.dtype)).to(out.dtype)
        bias = projection.bias
        plain = out - self._of_outputs(bias)[rows] if isinstance(bias, Tensor) else out
        return out + (ratio - 1) * plain + ratio * (self.scale * update)

    def _of_outputs(self, parameter: Tensor) -> Tensor:
        """A parameter with a row per output, as its gradient needs it."""
        if self.cut == 0:
            return parameter
        return self.layers.replicated(parameter) if self.cut == 1 else self.layers.partial(parameter)

    @torch.no_grad()
    def row_norms(self, projection: nn.Module, rows: slice = _WHOLE, dtype: torch.dtype = torch.float32) -> Tensor:
        """|W + s B A| of rows of this rank's slice, in `dtype` or W's own if that is wider: [out] or [out / T]."""
        weight = projection.get_parameter("weight")[rows]
        wide = torch.promote_types(weight.dtype, dtype)
        left, right = projection.get_parameter(A).to(wide), projection.get_parameter(B)[rows].to(wide)
        squares = torch.addmm(weight.to(wide), right, left, alpha=self.scale).square_().sum(dim=1)
        return (self.layers.total(squares) if self.cut == 1 else squares).sqrt_()


def adapt(projection: nn.Module, layers: Layers, *, rank: int, alpha: float, directional: bool) -> None:
    """Give a projection, which `layers` made, an adapter. directional: DoRA. s is alpha / rank."""
    weight = projection.get_parameter("weight")
    cut = spec_of(weight).shard_dim
    outputs, inputs = weight.shape
    # The variance of peft's uniform draw, which is Kaiming's with a = sqrt(5): within +-1 / sqrt(in).
    width = inputs * (layers.tensor_size if cut == 1 else 1)
    made: dict[str, tuple[tuple[int, ...], Spec]] = {
        A: ((rank, inputs), Spec(std=(3 * width) ** -0.5, shard_dim=1 if cut == 1 else None)),
        B: ((outputs, rank), Spec(value=0.0, shard_dim=0 if cut == 0 else None, matrix=True)),
    }
    if directional:
        made[MAGNITUDE] = ((outputs,), Spec(value=1.0, shard_dim=0 if cut == 0 else None))
    for name, (shape, spec) in made.items():
        parameter = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
        declare(parameter, spec)
        if spec.shard_dim is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # for DeepSpeed's norm
        projection.register_parameter(name, parameter)
    adapter = Adapter(layers, cut, alpha / rank, directional)
    projection.adapter = adapter  # type: ignore[assignment]
    projection.register_forward_hook(adapter)


def adapter_of(module: nn.Module) -> Adapter | None:
    found = getattr(module, "adapter", None)
    return found if isinstance(found, Adapter) else None


def merged(weight: Tensor, left: Tensor, right: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """Rows of the plain weight that computes what an adapted one does: weight [rows, in], left [rank, in], right
    [rows, rank], magnitude [rows] or None for LoRA."""
    summed = torch.addmm(weight, right, left, alpha=scale)
    if magnitude is None:
        return summed
    return summed * (magnitude / torch.linalg.vector_norm(summed, dim=1))[:, None]
