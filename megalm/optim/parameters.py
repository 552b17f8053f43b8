"""Which parameters decay."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]],
    weight_decay: float,
    decays: Callable[[str, Parameter], bool],
) -> list[dict[str, Any]]:
    """Groups for an optimizer: first the parameters that `decays` picks, then the others, each in the order given.

    Frozen parameters are left out, and so is a group that would be empty.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
