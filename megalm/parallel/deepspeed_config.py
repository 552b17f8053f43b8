"""DeepSpeed's JSON, derived from megalm's config."""

from typing import Any

from megalm.parallel.config import ParallelConfig

OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16.enabled": "train.precision",
    "fp16.fp16_master_weights_and_grads": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "data_types": "train.precision",
    "torch_autocast": "train.precision",
    "communication_data_type": "train.precision",
    "prescale_gradients": "train.global_batch_size and train.micro_batch_size",
    "gradient_predivide_factor": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "elasticity": "train.global_batch_size and train.micro_batch_size",
    "zero_optimization.compute_grad_norm": "optimizer.gradient_clipping",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.mics_shard_size": "parallel.zero",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_optimizer",  # weights on the host are not proved
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_param": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload_use_pin_memory": "parallel.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "parallel.offload_optimizer",
    "pipeline": "parallel.pipeline_schedule",
    "tensor_parallel": "parallel.tensor",
    "activation_checkpointing": "parallel.recompute",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "checkpoint": "checkpoint",
    "steps_per_print": "logging.every",
}
"""Keys of DeepSpeed's config that megalm decides, and the megalm key that decides them."""

REFUSED = {
    "zero_optimization.round_robin_gradients": "DeepSpeed then keeps fp32 weights elsewhere than it says, and a "
    "checkpoint would hold them under other names",
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed makes the groups of ranks for it once only",
}
"""Keys that do not work with the rest, and why."""


def _merge(base: dict[str, Any], extra: dict[str, Any], path: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        name = f"{path}{key}"
        if name in OWNED:
            raise ValueError(f"deepspeed.{name} is decided by megalm: set {OWNED[name]} instead")
        if name in REFUSED:
            raise ValueError(f"deepspeed.{name} cannot be used ({REFUSED[name]}): leave it out")
        if isinstance(value, dict):
            inner = merged.get(key)
            merged[key] = _merge(inner if isinstance(inner, dict) else {}, value, f"{name}.")
        elif inside := [owned for owned in OWNED if owned.startswith(f"{name}.")]:
            raise ValueError(
                f"deepspeed.{name} is a mapping of keys, not {value}: leave it out, or name keys in it other than "
                f"{', '.join(inside)}, which megalm decides"
            )
        else:
            merged[key] = value
    return merged


def check_pass_through(extra: dict[str, Any]) -> None:
    """Raise ValueError for a `deepspeed:` key that megalm owns, or that does not work."""
    _merge({}, extra)


def derive(
    parallel: ParallelConfig,
    *,
    precision: str,
    micro_batch_size: int,
    accumulation: int,
    data_parallel: int,
    gradient_clipping: float,
    largest_bucket: int,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """The config DeepSpeed is started with.

    largest_bucket: parameters a rank holds, about; DeepSpeed allocates whole communication buckets, which must not
    dwarf a small model.
    """
    bucket = min(500_000_000, largest_bucket + largest_bucket % 2)  # DeepSpeed asks for an even number
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * data_parallel,
        # With ZeRO 0 the engine's own norm leaves out every stage but the first: ours is used (engine.StepGuard).
        "gradient_clipping": gradient_clipping if parallel.zero else 0.0,
        "steps_per_print": 2**31 - 1,
        # It waits for the GPU before and after every micro-batch, to measure what megalm measures itself.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": parallel.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        # Stages exchange hidden states that differ between tensor ranks under sequence parallelism.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if precision == "bf16":
        # A gradient joins its fp32 sum as soon as it is there and is freed, instead of after the backward pass.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision != "fp32":
        # The sums over micro-batches are fp32; those over ranks would be in the weights' own type.
        config["communication_data_type"] = "fp32"
    if parallel.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return _merge(config, extra)
