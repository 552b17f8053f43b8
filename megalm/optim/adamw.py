"""AdamW (Loshchilov and Hutter 2019, algorithm 2): the one seam to its kernels.

torch: one tensor after the other, runs everywhere. torch_fused: one kernel for all, on GPUs and CPUs.
deepspeed: FusedAdam on a GPU, DeepSpeedCPUAdam for states on the host; both are compiled at first use.
apex: NVIDIA's FusedAdam, GPUs only.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from megalm import nvidia_apex
from megalm.errors import MegalmError
from megalm.optim.config import OptimizerConfig

KEY = "optimizer.implementation"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the moments in every implementation's state."""
_APEX = "apex.optimizers"

logger = logging.getLogger(__name__)


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, device: str, offload: bool
) -> torch.optim.Optimizer:
    """AdamW over `groups` with the implementation that `resolve_implementation` chooses (and the same errors)."""
    return _make(resolve_implementation(config.implementation, device, offload), groups, config, device, offload)


def resolve_implementation(implementation: str, device: str, offload: bool) -> str:
    """The implementation a run takes: the named one, or for `auto` the first that builds and passes its self-check.

    device: where the weights are, "cpu" or "cuda". offload: states and update are on the host.
    Raises MegalmError when the named one cannot serve; `auto` logs why it passed one over.
    """
    if implementation != "auto":
        if problem := _problem(implementation, device, offload):
            raise MegalmError(problem)
        return implementation
    if device == "cpu":
        candidates = ["torch_fused"]  # DeepSpeed's would be compiled for a minute first
    elif offload:
        candidates = ["deepspeed", "torch_fused"]
    else:
        candidates = ["apex", "deepspeed", "torch_fused"] if nvidia_apex.find(_APEX) else ["deepspeed", "torch_fused"]
    for candidate in candidates:
        problem = _problem(candidate, device, offload)
        if problem is None:
            return candidate
        logger.warning("%s: auto passes over %s: %s", KEY, candidate, problem)
    return "torch"


def updates(optimizer: torch.optim.Optimizer) -> int:
    """Steps the optimizer counts behind it."""
    # DeepSpeed's FusedAdam counts in the state of one parameter of each group only, apex's in the group.
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(max(counts)) if counts else int(optimizer.param_groups[0].get("step", 0))


def prepare(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], count: int) -> None:
    """Give every parameter moments, zero where there are none yet, and let the optimizer count `count` steps."""
    by_group = type(optimizer).__module__.startswith("apex.")
    for parameter in parameters:
        state = optimizer.state[parameter]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(parameter.data)
        if by_group:
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            fused = optimizer.defaults["fused"]
            state["step"] = torch.tensor(float(count), device=parameter.device if fused else "cpu")
        else:
            state["step"] = count
    if by_group:
        for group in optimizer.param_groups:
            group["step"] = count


def _problem(implementation: str, device: str, offload: bool) -> str | None:
    """Why the implementation cannot serve here, and the way out; None when it can."""
    if implementation == "torch":
        return None
    if implementation == "apex":
        if device == "cpu" or offload:
            return (
                f"{KEY} is apex, which updates on GPUs only, and the update is on the host here: "
                f"set {KEY} to auto, torch_fused or deepspeed"
            )
        try:
            nvidia_apex.require(KEY, _APEX)
        except MegalmError as error:
            return str(error)
    try:
        _self_check(implementation, device, offload)
    except Exception as error:  # compilers, loaders and kernels fail in many ways
        reason = " ".join(str(error.__cause__ or error).split())
        needs = {
            "torch_fused": "take a newer torch",
            "deepspeed": "install ninja and "
            + ("a C++ compiler" if device == "cpu" or offload else "the CUDA toolkit (nvcc) that torch was built for"),
            "apex": nvidia_apex.HOW_TO_INSTALL,
        }[implementation]
        return (
            f"{KEY} is {implementation}, which fails on this machine ({type(error).__name__}: {reason[:300]}): "
            f"{needs}, or set {KEY} to auto"
        )
    return None


def _self_check(implementation: str, device: str, offload: bool) -> None:
    """Two steps on a few numbers equal plain torch's."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1)
    where = "cpu" if offload else device

    def two_steps(name: str) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 10, device=where))
        optimizer = _make(name, [{"params": [weight], "weight_decay": 0.1}], config, device, offload)
        for gradient in (0.5, -0.25):
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(two_steps(implementation), two_steps("torch"), rtol=1e-4, atol=1e-5)


def _make(
    implementation: str, groups: list[dict[str, Any]], config: OptimizerConfig, device: str, offload: bool
) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if implementation == "torch":
        return torch.optim.AdamW(groups, **options, foreach=False)  # foreach would hold a copy of all weights
    if implementation == "torch_fused":
        return torch.optim.AdamW(groups, **options, fused=True)
    if implementation == "apex":
        return nvidia_apex.require(KEY, _APEX).FusedAdam(groups, **options, adam_w_mode=True)
    assert implementation == "deepspeed", implementation
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if device == "cpu" or offload:
        return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
    return FusedAdam(groups, **options, adam_w_mode=True)
