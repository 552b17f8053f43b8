"""Twenty steps of training give Hugging Face Trainer's losses to 1e-5 and gradient norms to 1e-4 (relative, fp32).

Both start from the same weights and see the same masked, ragged batches, which each side splits into micro-batches,
accumulation and ranks in ways of its own. Loss and norm are those that Trainer logs: on its side stand its own model,
shift and count of the labels, reduction, clipping and choice of what decays; only the learning rates are megalm's.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.optim import schedule
from megalm.training import build
from megalm.training.config import RunConfig
from tests.distributed import sabotage
from tests.distributed.ranks import run_ranks
from tests.distributed.training import STEPS, config, global_batch, join, micro_batches

# fp32 sums of a few hundred terms in another order, over 20 steps of AdamW.
LOSS, NORM = 1e-5, 1e-4
Curve = list[tuple[float, float]]

RUN = {
    "model": {"num_layers": 2},
    "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.3, "gradient_clipping": 1.8},
    "schedule": {"kind": "cosine", "warmup_steps": 4, "min_ratio": 0.1},
}

TRAINER = {1: [16, 4, 2], 2: [4]}
"""Splits of the 16 rows of a step: ranks, and rows of a micro-batch."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, micro-batch 16": (1, {"train": {"micro_batch_size": 16}}),
    "one rank, micro-batch 4": (1, {"train": {"micro_batch_size": 4}}),
    "one rank, micro-batch 2": (1, {}),
    "data 2, ZeRO 1": (2, {"parallel": {"zero": 1}}),
    "data 4, ZeRO 2": (4, {"parallel": {"zero": 2}}),
    "data 2, ZeRO 3": (2, {"parallel": {"zero": 3}}),
    "tensor 2 x pipeline 2": (4, {"parallel": {"tensor": 2, "pipeline": 2}, "train": {"micro_batch_size": 8}}),
}


def megalm_curve(run: RunConfig, plant: Callable[[], None] | None = None) -> Curve:
    """(loss, gradient norm) of each step in the engine of this rank's layout. plant: breaks something first."""
    if plant:
        plant()
    joined = join(run)
    engine, _ = build.build_engine(run, joined, torch.device("cpu"), lambda norm: True)
    results = [
        engine.step(micro_batches(step, run, joined.data_rank, joined.layout), rate(step, run)) for step in range(STEPS)
    ]
    return [(result.loss, result.grad_norm) for result in results]


def rate(step: int, run: RunConfig) -> float:
    return schedule.learning_rate(step, run.schedule, run.optimizer.learning_rate, run.train.steps)


def rows(run: RunConfig) -> list[dict[str, torch.Tensor]]:
    """The rows of all steps. Trainer shifts labels itself, and -100 keeps a token out of loss and count."""
    result = []
    for step in range(STEPS):
        tokens, mask, _ = global_batch(step, run)
        labels = np.where(np.pad(mask, ((0, 0), (1, 0))), tokens, -100)
        result += [{"input_ids": torch.from_numpy(x), "labels": torch.from_numpy(y)} for x, y in zip(tokens, labels)]
    return result


def trainer_curves(
    run: RunConfig, sizes: list[int], folder: Path, rows: Callable[[RunConfig], list[Any]] = rows
) -> list[Curve]:
    """Trainer's curve for each size of micro-batch, on this process's share of the ranks."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    torch.set_num_threads(1)
    import transformers

    class Trainer(transformers.Trainer):
        """Takes megalm's learning rates."""

        def create_scheduler(self, *_: Any, **__: Any) -> Any:
            def share(step: int) -> float:
                return rate(step, run) / run.optimizer.learning_rate

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
            return self.lr_scheduler

    ranks = int(os.environ["WORLD_SIZE"])
    curves = []
    for size in sizes:
        settings = trainer_settings(
            run,
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=run.train.global_batch_size // (size * ranks),
            average_tokens_across_devices=True,
            ddp_find_unused_parameters=False,
            ddp_backend="gloo",
        )
        trainer = Trainer(llama(run), settings, train_dataset=rows(run))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        curves.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log])
    return curves


def trainer_settings(run: RunConfig, folder: Path, **changes: Any) -> Any:
    """transformers' settings of megalm's optimizer, samples in their order, each step told and nothing kept."""
    import transformers

    optimizer = run.optimizer
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "adamw_torch",
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.gradient_clipping,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**settings | changes)


def llama(run: RunConfig) -> Any:
    """transformers' Llama with megalm's weights of step 0."""
    import transformers

    from megalm.models.decoder import build_model, decoder
    from megalm.nn.layers import Layers
    from tests.models.test_decoder_parity import theirs_from_ours

    ours = run.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_attention_heads,
            num_key_value_heads=ours.num_key_value_heads,
            intermediate_size=ours.feed_forward_width,
            rms_norm_eps=ours.norm_eps,
            use_cache=False,
        )
    )
    weights = build_model(decoder(ours, Layers(), seed=0), run.run.seed).named_weights()
    model.load_state_dict(theirs_from_ours({name: w.detach() for name, w in weights.items()}, ours, "llama"))
    return model


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Trainer's curve for each of its splits."""
    run, curves = config(**RUN), {}
    for ranks, sizes in TRAINER.items():
        each = run_ranks(ranks, trainer_curves, run, sizes, tmp_path_factory.mktemp("trainer"))[0]
        curves |= {f"{ranks} ranks, micro-batch {size}": curve for size, curve in zip(sizes, each)}
    return curves


def worst(curve: Curve, reference: Curve) -> tuple[float, float]:
    """Largest relative difference of losses and of gradient norms."""
    ours, theirs = np.array(curve), np.array(reference)
    assert ours.shape == theirs.shape == (STEPS, 2)
    loss, norm = (np.abs(ours - theirs) / theirs).max(axis=0)
    return loss, norm


def test_clipping_bites_in_some_steps(trainer: dict[str, Curve]) -> None:
    norms = [norm for curve in trainer.values() for _, norm in curve]
    assert min(norms) < RUN["optimizer"]["gradient_clipping"] < max(norms)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_follows_trainer(name: str, trainer: dict[str, Curve]) -> None:
    ranks, sections = LAYOUTS[name]
    curve = run_ranks(ranks, megalm_curve, config(**RUN | sections))[0]
    for split, reference in trainer.items():
        loss, norm = worst(curve, reference)
        assert loss < LOSS and norm < NORM, f"{name} and {split}: loss off by {loss:.1e}, gradient norm by {norm:.1e}"


def decay_of_norms() -> None:
    right = build.parameter_groups
    build.parameter_groups = lambda named, decay, _, *rest: right(named, decay, lambda *parameter: True, *rest)


def schedule_one_step_early() -> None:
    right = schedule.learning_rate
    schedule.learning_rate = lambda step, *rest: right(step + 1, *rest)


@pytest.mark.parametrize(
    "plant", [sabotage.mean_of_micro_batch_means, decay_of_norms, schedule_one_step_early], ids=lambda f: f.__name__
)
def test_planted_bugs_are_caught(plant: Callable[[], None], trainer: dict[str, Curve]) -> None:
    curve = run_ranks(1, partial(megalm_curve, plant=plant), config(**RUN))[0]
    for split, reference in trainer.items():
        loss, norm = worst(curve, reference)
        assert loss > LOSS or norm > NORM, f"{plant.__name__} went unseen beside {split}"
