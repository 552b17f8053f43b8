"""Which parameters decay, and how fast each learns."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]],
    weight_decay: float,
    decays: Callable[[str, Parameter], bool],
    rate_scale: Callable[[str, Parameter], float] = lambda name, parameter: 1.0,
    in_head: Callable[[str, Parameter], bool] = lambda name, parameter: False,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: first of the parameters that `decays` picks, then of the others, in the order given.

    A group holds parameters that agree in all of this, and beside them `rate_scale`, their share of the learning rate,
    and `head`, whether `in_head` picks them. Frozen parameters are left out.
    """
    found: dict[tuple[bool, float, bool], list[Parameter]] = {}
    for name, p in named_parameters:
        if p.requires_grad:
            found.setdefault((decays(name, p), rate_scale(name, p), in_head(name, p)), []).append(p)
    return [
        {"params": found[key], "weight_decay": weight_decay if key[0] else 0.0, "rate_scale": key[1], "head": key[2]}
        for key in sorted(found, key=lambda key: not key[0])
    ]
