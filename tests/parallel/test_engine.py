"""What the engine gives to a device."""

from types import SimpleNamespace

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, join


def _bounds(copied: bool) -> list[int] | None:
    """On a rank: where segments of a micro-batch start, as far as it is known before attention asks. copied: to a
    device, for which a copy on the CPU stands in."""
    from megalm.nn import kernels
    from megalm.parallel import engine

    rows = torch.zeros(2, 4, dtype=torch.long)
    segments = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    here = SimpleNamespace(device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if copied:
            patch.setattr(engine, "send", lambda x, device: x.clone())
        sent = engine.Engine._send(here, (rows, segments, rows, rows[:, 0]))  # type: ignore[arg-type]
    assert torch.equal(sent[1], segments) and (sent[1] is segments) != copied
    known = kernels._bounds.get(sent[1])
    return None if known is None else known.tolist()


def test_where_segments_start_is_found_before_a_device_would_have_to_tell() -> None:
    assert run_ranks(1, _bounds, True) == [[0, 2, 4, 5, 7, 8]]
    assert run_ranks(1, _bounds, False) == [None], "a CPU finds it when it is asked for"


def _left_while_building(zero: int) -> list[set[torch.dtype]]:
    """On a rank: of what weights of the layers before it are, while each layer is drawn."""
    from megalm.models import decoder
    from megalm.training.build import build_engine

    initialize, layers, seen = decoder.initialize, [], []

    def recorded(layer: torch.nn.Module, *arguments: object) -> None:
        if not next(layer.parameters()).is_meta:  # of which only the shapes are asked
            seen.append({weight.dtype for before in layers for weight in before.parameters()})
            layers.append(layer)
        initialize(layer, *arguments)  # type: ignore[arg-type]

    run = config(parallel={"zero": zero}, train={"precision": "bf16"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "initialize", recorded)
        build_engine(run, join(run), torch.device("cpu"), lambda norm: True)
    return seen


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_model_is_never_whole_in_fp32(zero: int) -> None:
    """Ranks of one machine have its memory between them."""
    (seen,) = run_ranks(1, _left_while_building, zero)
    assert seen[0] == set() and seen[1:] == [{torch.bfloat16}] * 6
