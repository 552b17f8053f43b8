"""Attention backends against a loop over queries in fp64, and the choice between them."""

import dataclasses
import importlib
import inspect
import math
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.errors import MegalmError
from megalm.nn import kernels
from megalm.nn.kernels import BACKENDS, Mask, Requirements, attention, resolve, segment_bounds

BATCH, SEQ, HEADS, DIM = 2, 13, 4, 8
SEGMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 5, [0] * 12 + [1]])


def inputs(kv_heads: int = HEADS, keys: int = SEQ, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(BATCH, SEQ, HEADS, DIM), (BATCH, keys, kv_heads, DIM), (BATCH, keys, kv_heads, DIM)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The definition, one query at a time, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                scores, values = [], []
                for j in range(k.shape[1]):
                    past = j <= i
                    seen = mask.kind == "full" or past
                    if mask.kind == "prefix" and j < mask.prefix_lengths[b]:
                        seen = True
                    if mask.window is not None and abs(i - j) >= mask.window:
                        seen = False
                    if mask.query_segments is not None and mask.query_segments[b, i] != mask.key_segments[b, j]:
                        seen = False
                    if seen:
                        score = q[b, i, h] @ k[b, j, h // group] / math.sqrt(q.shape[-1])
                        if mask.slopes is not None:
                            score = score - mask.slopes[h].double() * abs(i - j)
                        scores.append(score)
                        values.append(v[b, j, h // group])
                rows.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.stack(rows).view(q.shape[0], q.shape[1], q.shape[2], -1)


MASKS = {
    "causal": Mask(),
    "full": Mask("full"),
    "prefix": Mask("prefix", prefix_lengths=torch.tensor([4, 9])),
    "segments": Mask(query_segments=SEGMENTS, key_segments=SEGMENTS),
    "full-segments": Mask("full", query_segments=SEGMENTS, key_segments=SEGMENTS),
    "window": Mask(window=4),
    "full-window": Mask("full", window=3),
    "window-segments": Mask(window=3, query_segments=SEGMENTS, key_segments=SEGMENTS),
    "alibi": Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "alibi-segments": Mask(
        slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]), query_segments=SEGMENTS, key_segments=SEGMENTS
    ),
}
CPU_BACKENDS = [name for name, backend in BACKENDS.items() if "cpu" in backend.devices and backend.module is None]


def difference(backend: str, mask: Mask, planted: Mask | None = None, kv_heads: int = 2) -> float:
    """Of output and gradients from the loops; `planted` is given to the backend instead of the mask."""
    mine, reference = inputs(kv_heads), inputs(kv_heads, dtype=torch.float64)
    out, expected = attention(*mine, planted or mask, backend), by_loops(*reference, mask)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(out, mine, seed)
    expected_gradients = torch.autograd.grad(expected, reference, seed.double())
    pairs = zip((out, *gradients), (expected, *expected_gradients), strict=True)
    return max((a.double() - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_the_definition(backend: str, mask: str) -> None:
    kind, alibi = MASKS[mask].kind, MASKS[mask].slopes is not None
    table = BACKENDS[backend]
    refusal = table.refusal(Requirements("cpu", table.dtypes[0], kind=kind, alibi=alibi, long=False))
    if backend == "blocks" and (alibi or kind == "prefix"):
        assert refusal
        return
    assert refusal is None
    assert difference(backend, MASKS[mask]) < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_grouped_heads(backend: str, kv_heads: int) -> None:
    assert difference(backend, Mask(), kv_heads=kv_heads) < 1e-5


@pytest.mark.parametrize(
    "right, wrong",
    [
        (MASKS["window"], Mask(window=5)),
        (MASKS["segments"], Mask()),
        (MASKS["prefix"], Mask("prefix", prefix_lengths=torch.tensor([5, 9]))),
        (MASKS["alibi"], Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.06]))),
        (MASKS["full"], Mask()),
    ],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_comparison_catches_a_wrong_mask(backend: str, right: Mask, wrong: Mask) -> None:
    table = BACKENDS[backend]
    if right.kind in table.kinds and (right.slopes is None or table.alibi):
        assert difference(backend, right, planted=wrong) > 1e-4


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_cross_attention_of_another_length(backend: str) -> None:
    q, k, v = inputs(2, keys=7)
    segments = torch.tensor([[0] * 3 + [1] * 3 + [2], [0] * 4 + [1] * 3])
    mask = Mask("full", query_segments=SEGMENTS, key_segments=segments)
    assert (attention(q, k, v, mask, backend) - by_loops(q, k, v, mask)).abs().max() < 1e-5


def test_bf16_stays_near_fp64() -> None:
    for backend in CPU_BACKENDS:
        q, k, v = inputs(2, dtype=torch.bfloat16)
        out = attention(q, k, v, Mask(), backend)
        assert out.dtype == torch.bfloat16
        assert (out.double() - by_loops(q, k, v, Mask())).abs().max() < 0.03


@pytest.mark.parametrize("queries", [100, 128, 130, 300])
@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_blocks_of_queries_see_all_their_keys(kind: str, window: int | None, queries: int) -> None:
    """More than one block, against the plain backend."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, queries, heads, 8, generator=draw) for heads in (4, 2, 2))
    segments = (torch.arange(queries) // 90).repeat(2, 1)
    for mask in (Mask(kind, window=window), Mask(kind, window=window, query_segments=segments, key_segments=segments)):
        expected = attention(q, k, v, mask, "plain")
        assert (attention(q, k, v, mask, "blocks") - expected).abs().max() < 1e-5
    narrower = min(window or queries, queries) - 1
    if narrower:
        expected = attention(q, k, v, Mask(kind, window=window), "plain")
        assert (attention(q, k, v, Mask(kind, window=narrower), "blocks") - expected).abs().max() > 1e-4


def test_segment_bounds() -> None:
    assert segment_bounds(SEGMENTS).tolist() == [0, 5, 8, 13, 25, 26]
    assert segment_bounds(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [0, 3, 6]
    assert segment_bounds(SEGMENTS).dtype == torch.int32


# ---- the packages, whose kernels need a GPU: what they are called with, played by a stand-in that computes on the CPU


def fake_flash(module: str, unlimited: int | None, returns_pair: bool) -> types.ModuleType:
    """A package with flash-attn's interface (dense and of variable length), over the plain backend."""
    fake = types.ModuleType(module)
    fake.calls, fake.deterministic = [], []

    def attend(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple, alibi_slopes: Tensor | None
    ) -> Tensor:
        left, right = window_size
        assert right in ((0, unlimited) if causal else (left,))
        window = None if left == unlimited else left + 1
        return attention(q, k, v, Mask("causal" if causal else "full", window=window, slopes=alibi_slopes), "plain")

    def flash_attn_func(q, k, v, causal=False, window_size=(unlimited,) * 2, alibi_slopes=None, deterministic=False):
        fake.calls.append("dense")
        fake.deterministic.append(deterministic)
        out = attend(q, k, v, causal, window_size, alibi_slopes)
        return (out, None) if returns_pair else out

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=False,
        window_size=(unlimited,) * 2,
        alibi_slopes=None,
        deterministic=False,
    ):
        fake.calls.append("varlen")
        fake.deterministic.append(deterministic)
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist() and bounds[-1] == len(q) == len(k)
        assert max(b - a for a, b in zip(bounds, bounds[1:], strict=False)) <= max_seqlen_q == max_seqlen_k
        parts = [
            attend(q[None, a:b], k[None, a:b], v[None, a:b], causal, window_size, alibi_slopes)[0]
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return (torch.cat(parts), None) if returns_pair else torch.cat(parts)

    fake.flash_attn_func, fake.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return fake


PACKAGES = {
    "flash2": ("flash_attn.flash_attn_interface", -1),
    "flash3": ("flash_attn_interface", -1),
    "flash4": ("flash_attn.cute", None),
}


def install(monkeypatch: pytest.MonkeyPatch, backend: str, returns_pair: bool = False) -> types.ModuleType:
    module, unlimited = PACKAGES[backend]
    fake = fake_flash(module, unlimited, returns_pair)
    if "." in module:
        parent = types.ModuleType("flash_attn")
        parent.__path__ = []
        monkeypatch.setitem(sys.modules, "flash_attn", parent)
    monkeypatch.setitem(sys.modules, module, fake)
    return fake


@pytest.mark.parametrize("returns_pair", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", PACKAGES)
def test_flash_packages_are_called_for_what_is_meant(
    backend: str, mask: str, returns_pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = MASKS[mask]
    table = BACKENDS[backend]
    if meant.kind not in table.kinds or (meant.slopes is not None and not table.alibi):
        needs = Requirements("cuda", torch.bfloat16, kind=meant.kind, alibi=meant.slopes is not None)
        assert table.refusal(needs)
        return
    fake = install(monkeypatch, backend, returns_pair)
    assert difference(backend, meant) < 1e-5
    assert fake.calls == ["dense" if meant.query_segments is None else "varlen"]


@pytest.mark.parametrize("kv_heads", [2, HEADS])
@pytest.mark.parametrize(
    "mask", [name for name, mask in MASKS.items() if mask.kind != "prefix" and mask.slopes is None]
)
def test_torchs_kernel_of_variable_length_is_called_for_what_is_meant(
    mask: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    right = inspect.signature(varlen.varlen_attn).parameters

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
        assert enable_gqa == (kv_heads < HEADS and "enable_gqa" in right) and "window_size" in right
        fake = fake_flash("fake", -1, returns_pair=False)
        causal = window_size[1] == 0
        return fake.flash_attn_varlen_func(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, causal, window_size)

    varlen_attn.__signature__ = inspect.signature(varlen.varlen_attn)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert difference("sdpa_varlen", MASKS[mask], kv_heads=kv_heads) < 1e-5


def test_flash_attn_4_alone_is_not_taken_for_flash_attn_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its package is a folder in a flash_attn without a module of its own, which imports all the same."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert importlib.import_module("flash_attn.cute")
        assert BACKENDS["flash4"].refusal(GPU) is None
        assert "does not import" in (BACKENDS["flash2"].refusal(GPU) or "")
    finally:
        for name in ("flash_attn", "flash_attn.cute"):
            sys.modules.pop(name, None)


def test_bounds_that_were_found_elsewhere_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensor they were given for, and of no other."""
    segments, other, bounds = torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0, 2, 4])
    kernels.remember_bounds(segments, bounds)
    assert segment_bounds(segments) is bounds
    assert segment_bounds(other).tolist() == [0, 4]


def test_bounds_of_segments_are_found_once() -> None:
    segments = torch.tensor([[0, 0, 1, 1]])
    assert segment_bounds(segments) is segment_bounds(segments)
    assert segment_bounds(torch.tensor([[0, 1, 1, 1]])).tolist() == [0, 1, 4]


@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_cudnn"])
def test_pinned_kernels_refuse_masks_of_tensors(backend: str) -> None:
    for feature in ("segments", "window", "alibi", "dropout", "unequal_lengths"):
        assert BACKENDS[backend].refusal(Requirements("cuda", torch.bfloat16, **{feature: True}))
    assert BACKENDS[backend].refusal(Requirements("cuda", torch.bfloat16, kind="prefix"))
    with pytest.raises(AssertionError):
        attention(*inputs(), Mask(window=2), backend)


@pytest.mark.parametrize(
    "keys, masked, allowed",
    [
        (64, True, {"EFFICIENT_ATTENTION", "MATH"}),
        (256, True, {"EFFICIENT_ATTENTION", "MATH"}),
        (1024, True, {"EFFICIENT_ATTENTION", "MATH"}),
        (1025, True, {"EFFICIENT_ATTENTION"}),
        (4096, True, {"EFFICIENT_ATTENTION"}),
        (1024, False, {"EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION", "MATH"}),
        (4096, False, {"EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION"}),
    ],
)
def test_gpu_kernels_that_are_safe_and_fit_in_memory(keys: int, masked: bool, allowed: set[str]) -> None:
    assert {kernel.name for kernel in kernels.gpu_kernels(keys, masked)} == allowed


@pytest.fixture
def switch() -> Iterator[Callable[[bool], None]]:
    """torch's switch for reproducible kernels, turned off again after the test."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mask", ["causal", "segments"])
@pytest.mark.parametrize("backend", PACKAGES)
def test_flash_packages_follow_torchs_switch(
    backend: str, mask: str, switch: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, backend)
    for deterministic in (False, True):
        switch(deterministic)
        attention(*inputs(), MASKS[mask], backend)
    assert fake.deterministic == [False, True]


# ---- the choice


def forget() -> None:
    resolve.cache_clear()
    kernels._why_not.cache_clear()


@pytest.fixture(autouse=True)
def _forget_choices() -> Iterator[None]:
    forget()
    yield
    forget()


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], broken: tuple[str, ...] = ()) -> None:
    """Installed packages import; the self-check of every backend passes unless broken."""
    for backend in installed:
        install(monkeypatch, backend)
    monkeypatch.setattr(
        kernels, "_self_check", lambda backend, needs: "its self-check failed" if backend.name in broken else None
    )


GPU = Requirements("cuda", torch.bfloat16)


def test_auto_takes_the_first_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, ())
    assert resolve("auto", GPU) == "sdpa_cudnn"
    forget()
    pretend_gpu(monkeypatch, ("flash2",))
    assert resolve("auto", GPU) == "sdpa_cudnn"
    forget()
    pretend_gpu(monkeypatch, ("flash2", "flash3"))
    assert resolve("auto", GPU) == "flash3"


def test_auto_passes_over_what_cannot_be_reproducible(
    switch: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As flash-attn 4 on Hopper; the choice is made anew when the switch has moved."""
    fake = install(monkeypatch, "flash4")
    right = fake.flash_attn_func

    def only_fast(*tensors: Tensor, deterministic: bool = False, **options: object) -> Tensor:
        assert not deterministic, "no deterministic gradients on this GPU"
        return right(*tensors, **options)

    fake.flash_attn_func = only_fast
    monkeypatch.setitem(BACKENDS, "flash4", dataclasses.replace(BACKENDS["flash4"], devices=("cpu",)))
    assert resolve("auto", Requirements("cpu", torch.bfloat16)) == "flash4"
    switch(True)
    assert resolve("auto", Requirements("cpu", torch.bfloat16)) == "sdpa"
    with pytest.raises(MegalmError, match="no deterministic gradients on this GPU"):
        resolve("flash4", Requirements("cpu", torch.bfloat16))


@pytest.mark.parametrize(
    "changes, chosen",
    [
        ({"segments": True}, "flash3"),
        ({"window": True}, "flash3"),
        ({"alibi": True}, "flash2"),
        ({"dropout": True}, "plain"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"kind": "prefix"}, "sdpa"),
        ({"device": "cpu"}, "sdpa"),
        ({"device": "cpu", "long": False}, "blocks"),
        ({"device": "cpu", "long": False, "segments": True, "window": True}, "blocks"),
        ({"device": "cpu", "long": False, "dtype": torch.float32}, "sdpa"),
        ({"device": "cpu", "long": False, "alibi": True}, "sdpa"),
    ],
)
def test_auto_takes_one_that_can(changes: dict, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, ("flash2", "flash3"))
    assert resolve("auto", Requirements(**{"device": "cuda", "dtype": torch.bfloat16} | changes)) == chosen


def test_auto_passes_over_a_kernel_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, ("flash3",), broken=("flash3", "sdpa_cudnn"))
    assert resolve("auto", GPU) == "sdpa_flash"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_kernel_is_compiled_only_if_its_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Requirements("cpu", torch.float32, segments=True, group=2)
    assert kernels._self_check(BACKENDS["sdpa"], needs, compiled=True) is None

    def otherwise_if_compiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return BACKENDS["plain"].run(q, k, v, mask) * (1.001 if torch.compiler.is_compiling() else 1.0)

    def in_pieces(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        torch._dynamo.graph_break()
        return BACKENDS["plain"].run(q, k, v, mask)

    for run, problem in ((otherwise_if_compiled, "output is"), (in_pieces, "self-check failed")):
        backend = dataclasses.replace(BACKENDS["sdpa"], run=run)
        monkeypatch.setitem(BACKENDS, "sdpa", backend)
        assert kernels._self_check(backend, needs) is None
        assert problem in str(kernels._self_check(backend, needs, compiled=True))


def test_a_near_tie_is_not_decided_by_a_clock() -> None:
    assert kernels.fastest({"flash3": 1.04, "flash4": 1.0, "sdpa": 3.0}) == "flash3"
    assert kernels.fastest({"flash3": 1.06, "flash4": 1.0, "sdpa": 3.0}) == "flash4"
    assert kernels.fastest({"flash3": 1.06, "flash4": 1.04, "sdpa": 1.0}) == "flash4"


def test_a_kernel_that_breaks_a_compiled_block_must_be_faster_by_more() -> None:
    times = {"flash3": 1.0, "sdpa_cudnn": 1.2, "sdpa": 1.3}
    assert kernels.fastest(times) == kernels.fastest(times, []) == kernels.fastest(times, list(times)) == "flash3"
    assert kernels.fastest(times, ["sdpa_cudnn", "sdpa"]) == "flash3", "1.25 against 1.2 is near"
    assert kernels.fastest(times | {"flash3": 1.1}, ["sdpa_cudnn", "sdpa"]) == "sdpa_cudnn"


def test_a_backend_whose_gradients_are_no_numbers_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As cuDNN's were for large batches only, where a self-check of two rows is passed."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        spoilt = (v - v.detach()) * (math.nan if len(v) > 2 else 1.0)
        return BACKENDS["plain"].run(q, k, v.detach() + spoilt, mask)

    monkeypatch.setitem(BACKENDS, "flash3", dataclasses.replace(BACKENDS["flash3"], run=run))
    needs = Requirements("cpu", torch.float32, head_dim=8)
    for batch, left in ((2, ["flash3", "plain"]), (3, ["plain"])):
        shape = kernels.Shape(batch=batch, seq=20, heads=2, kv_heads=2)
        assert list(kernels.measure(["flash3", "plain"], needs, shape, rounds=1, calls=1)) == left
    assert "flash3 fails at the run's shape: its gradients are not finite" in caplog.text


def test_backends_are_measured_in_turn_at_the_shape_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on only inside a backend; the first calls, which build and tune, take 100 times as long."""
    needs = Requirements("cpu", torch.float32, head_dim=8, group=2, segments=True, window=True)
    shape = kernels.Shape(batch=3, seq=20, heads=4, kv_heads=2, window=7)
    clock, order = [0.0], []

    def planted(name: str, takes: float) -> None:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
            assert (q.shape, k.shape, v.shape) == ((3, 20, 4, 8), (3, 20, 2, 8), (3, 20, 2, 8))
            assert mask.query_segments is not None and mask.query_segments[1].tolist() == sorted([0, 1, 2, 3] * 5)
            assert mask.window == 7
            if takes == math.inf:
                raise torch.OutOfMemoryError("out of memory")
            clock[0] += takes * (100 if name not in order else 1)
            order.append(name)
            return BACKENDS["plain"].run(q, k, v, mask)

        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], run=run))

    for name, takes in {"flash3": 0.03, "flash4": math.inf, "sdpa": 0.01}.items():
        planted(name, takes)
    monkeypatch.setattr(kernels, "_now", lambda device: clock[0])
    times = kernels.measure(["flash3", "flash4", "sdpa"], needs, shape, rounds=3, calls=2)
    assert times == pytest.approx({"flash3": 0.03, "sdpa": 0.01})
    assert order == ["flash3"] * 2 + ["sdpa"] * 2 + (["flash3"] * 2 + ["sdpa"] * 2) * 3


@pytest.mark.parametrize(
    "changes", [{}, {"segments": True, "window": True}, {"alibi": True}, {"kind": "prefix"}, {"dropout": True}]
)
def test_what_serves_can_be_measured(changes: dict) -> None:
    needs = Requirements("cpu", torch.bfloat16, head_dim=8, group=2, long=False, **changes)
    names = kernels.serving(needs)
    assert names[-1] == "plain" and names[0] == resolve("auto", needs)
    drawn = torch.get_rng_state()
    times = kernels.measure(names, needs, kernels.Shape(batch=2, seq=100, heads=4, kv_heads=2), rounds=1, calls=1)
    assert list(times) == names and all(its > 0 for its in times.values())
    assert torch.equal(torch.get_rng_state(), drawn), "a run's own random numbers stay"


def test_a_named_backend_that_cannot_serve_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("flash2", "flash3", "flash4"):
        with pytest.raises(MegalmError, match=f"attention_backend {backend} .* does not import .*auto"):
            resolve(backend, GPU)
    pretend_gpu(monkeypatch, ("flash2", "flash3"), broken=("flash2",))
    forget()
    with pytest.raises(MegalmError, match="flash3 cannot serve this run: it does not support alibi"):
        resolve("flash3", Requirements("cuda", torch.bfloat16, alibi=True))
    with pytest.raises(MegalmError, match="does not run on cpu"):
        resolve("flash3", Requirements("cpu", torch.bfloat16))
    with pytest.raises(MegalmError, match="does not compute in float32"):
        resolve("flash3", Requirements("cuda", torch.float32))
    with pytest.raises(MegalmError, match="self-check"):
        resolve("flash2", GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"segments": True, "window": True}, {"alibi": True}, {"kind": "prefix"}])
def test_self_check_passes_a_right_kernel_and_fails_a_wrong_one(
    changes: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Requirements("cpu", dtype, head_dim=16, group=2, **changes)
    assert kernels._self_check(BACKENDS["sdpa"], needs) is None

    def wrong_output(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return kernels._sdpa(q * 1.3, k, v, mask)

    def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return kernels._sdpa(q, k.detach() + (k - k.detach()) * 0.9, v, mask)

    def breaks(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        raise RuntimeError("no kernel image is available")

    for run, words in ((wrong_output, "output"), (wrong_gradient, "dk"), (breaks, "no kernel image")):
        planted = kernels.Backend("sdpa", run, devices=("cpu",))
        monkeypatch.setitem(BACKENDS, "sdpa", planted)
        assert words in (kernels._self_check(planted, needs) or "")


def scores_in_bf16(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Scores rounded before the softmax, as in Hugging Face's eager attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float()
    visible = mask.visible(q.shape[2], k.shape[2], q.device)
    return (scores.masked_fill(~visible, -math.inf).softmax(-1).to(q.dtype) @ v).transpose(1, 2)


def test_self_check_catches_scores_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Requirements("cpu", torch.bfloat16, long=False)
    assert kernels._self_check(BACKENDS["blocks"], needs) is None
    eager = kernels.Backend("eager", scores_in_bf16, devices=("cpu",))
    monkeypatch.setitem(BACKENDS, "eager", eager)
    assert "from the plain backend's" in (kernels._self_check(eager, needs) or "")


def test_blocks_are_as_exact_as_sdpa_where_scores_are_large() -> None:
    """Output and gradients in bf16, queries and keys of deviation 4; scores in bf16 are far worse."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, seed = (torch.randn(1, 256, 4, 64, generator=draw) * std for std in (4.0, 4.0, 1.0, 1.0))
    values = [x.bfloat16() for x in (q, k, v)]

    def error(function: Callable[..., Tensor]) -> float:
        results = []
        for f, dtype in ((function, torch.bfloat16), (kernels._plain, torch.float64)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in values]
            out = f(*leaves, Mask())
            results.append([out.detach().double(), *torch.autograd.grad(out, leaves, seed.to(dtype))])
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))

    assert error(kernels._blocks) < min(1.2 * error(kernels._sdpa), 0.01)
    assert error(scores_in_bf16) > 0.02


def test_alibi_without_a_mask_in_bf16() -> None:
    mask = Mask("full", slopes=MASKS["alibi"].slopes)
    q, k, v = inputs(dtype=torch.bfloat16)
    expected = by_loops(q, k, v, mask)
    for backend in ("plain", "sdpa"):
        assert (attention(q, k, v, mask, backend).double() - expected).abs().max() < 0.03


def test_choice_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert resolve("auto", Requirements("cpu", torch.bfloat16)) == "sdpa"
    assert torch.equal(before, torch.get_rng_state())
