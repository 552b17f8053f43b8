"""What model.attention_backend `auto` takes where kernels are measured: on a GPU, for which a CPU stands in here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import manifest as manifests
from tests.distributed.ranks import run_ranks
from tests.distributed.training import join
from tests.training.runs import curve, train_run

Settings = Callable[..., dict[str, Any]]
Times = dict[str, float]


@contextmanager
def kernels_that_take(seconds: Times) -> Iterator[list[str]]:
    """On this rank there are these kernels and `plain`. All compute as sdpa, and take so long by the clock of those who
    measure. Gives the list of those that are called."""
    from megalm.nn import kernels
    from megalm.training import build

    clock, called, sdpa = [0.0], [], kernels.BACKENDS["sdpa"].run

    def planted(name: str) -> kernels.Backend:
        def run(*arguments: Any) -> torch.Tensor:
            clock[0] += seconds[name]
            called.append(name)
            return sdpa(*arguments)

        here = ("cpu",) if name in seconds else ()
        return replace(kernels.BACKENDS[name], run=run, module=None, devices=here, dtypes=(torch.float32,))

    def forget() -> None:
        kernels.resolve.cache_clear()
        kernels._why_not.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for name in kernels.BACKENDS.keys() - {"plain"}:
            patch.setitem(kernels.BACKENDS, name, planted(name))
        patch.setattr(kernels, "_now", lambda device: clock[0])
        patch.setattr(build, "MEASURED", ("cpu",))
        forget()
        yield called
    forget()


def choice(tree: dict[str, Any], seconds: list[Times], kept: str | None = None) -> tuple[str, str]:
    """The backend that this rank takes, and what is said of it. seconds: of the kernels of each rank."""
    from megalm.training.build import choose_attention
    from megalm.training.config import RunConfig

    config = RunConfig.model_validate(tree)
    joined = join(config)
    with kernels_that_take(seconds[joined.rank]):
        config, words = choose_attention(config, joined, torch.device("cpu"), kept)
    return config.model.attention_backend, words


TIMES = {"flash3": 0.004, "flash2": 0.002, "sdpa": 0.003}
MEASURED = "; measured flash3 4.00 ms, flash2 2.00 ms, sdpa 3.00 ms"


def test_the_fastest_is_taken(settings: Settings) -> None:
    assert run_ranks(1, choice, settings(), [TIMES]) == [("flash2", MEASURED)]
    assert run_ranks(1, choice, settings(), [TIMES], "auto") == [("flash2", MEASURED)]
    assert run_ranks(1, choice, settings(), [TIMES | {"flash2": 0.005}])[0][0] == "sdpa"


def test_all_ranks_take_what_all_have(settings: Settings) -> None:
    """Rank 0 measures; rank 1 has not its fastest, and finds others fast."""
    other = {"flash3": 0.001, "sdpa": 0.009}
    expected = ("sdpa", "; measured flash3 4.00 ms, sdpa 3.00 ms")
    assert run_ranks(2, choice, settings(parallel={"tensor": 2}), [TIMES, other]) == [expected] * 2


def test_a_run_that_goes_on_keeps_its_kernel_if_it_is_there(settings: Settings) -> None:
    assert run_ranks(1, choice, settings(), [TIMES], "flash3") == [("flash3", "; as until now")]
    assert run_ranks(1, choice, settings(), [TIMES], "flash4") == [("flash2", MEASURED)]


@pytest.mark.parametrize(
    ("sections", "backend"),
    [
        ({"model": {"attention_backend": "plain"}}, "plain"),
        ({"train": {"deterministic": True}}, "auto"),
        ({"model": {"attention_dropout": 0.1}}, "auto"),  # only plain has it, and held-out rows want better
    ],
)
def test_what_leaves_no_choice_is_not_measured(sections: dict[str, Any], backend: str, settings: Settings) -> None:
    tree = settings()
    for section, changes in sections.items():
        tree[section] |= changes
    assert run_ranks(1, choice, tree, [TIMES]) == [(backend, "")]


def measured_run(tree: dict[str, Any], seconds: Times) -> set[str]:
    """A run with these kernels; the names of those that trained."""
    with kernels_that_take(seconds) as called:
        assert train_run(tree, sabotage=lambda run: called.clear()) == 0
        return set(called)


def test_a_whole_run_computes_with_one_kernel(settings: Settings) -> None:
    """Also after it was stopped, although by then another one is faster."""
    whole, stopped = settings("whole"), settings("stopped")
    steps = stopped["train"].pop("steps")
    stopped["train"]["steps"] = 4
    for tree in (whole, stopped):
        assert run_ranks(1, measured_run, tree, TIMES) == [{"flash2"}]
    folder = Path(stopped["run"]["directory"])
    saved = manifests.read(folder / "checkpoints" / "step-4").config
    assert saved["model"]["attention_backend"] == "flash2"
    stopped["train"]["steps"] = steps
    assert run_ranks(1, measured_run, stopped, TIMES | {"flash3": 0.001}) == [{"flash2"}]
    said = (folder / "said.txt").read_text()
    assert f"flash2{MEASURED}" in said and "flash2; as until now" in said and "attention_backend:" not in said
    assert curve(stopped) == curve(whole)


def run_without_a_compiler(tree: dict[str, Any]) -> int:
    """On a rank: a run as on a GPU, where train.compile `auto` compiles, but for which nothing can be compiled."""
    from megalm.parallel import device
    from megalm.training.config import RunConfig

    with pytest.MonkeyPatch.context() as patch, kernels_that_take(TIMES):
        patch.setattr(RunConfig, "compiles", lambda self, device: self.train.compile is not False)
        patch.setattr(device, "compiler_problem", lambda device: "there is none")
        return train_run(tree)


def test_the_choice_keeps_what_was_settled_before_it(settings: Settings) -> None:
    tree = settings(train={"compile": "auto"})
    assert run_ranks(1, run_without_a_compiler, tree) == [0]
    folder = Path(tree["run"]["directory"])
    saved = manifests.read(folder / "checkpoints" / "step-8").config
    assert (saved["train"]["compile"], saved["model"]["attention_backend"]) == (False, "flash2")
    assert "compiled" not in (folder / "said.txt").read_text()
