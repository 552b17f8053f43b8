"""The attention seam: one function, and a table of the kernels that can stand behind it.

Shapes: q [batch, queries, heads, head_dim]; k and v [batch, keys, kv_heads, head_dim], where heads is a multiple of
kv_heads and query head h uses key head h // (heads / kv_heads).
"""

import importlib
import inspect
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakIdKeyDictionary

from megalm.errors import MegalmError, reason
from megalm.nn.dropout import AttentionDropout

logger = logging.getLogger(__name__)

MaskKind = Literal["causal", "full", "prefix"]
LONG = 1024
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. Every query must see at least one.

    Queries and keys are aligned at their starts (key j is in the past of query i if j <= i), unless query_positions
    says where queries stand.
    """

    kind: MaskKind = "causal"
    """`causal`: the past; `full`: everything; `prefix`: the past and the first prefix_lengths keys (T5, UniLM)."""
    window: int | None = None
    """Only keys at a distance below this."""
    query_segments: Tensor | None = None
    """[batch, queries] Only keys of the query's own segment. None: all are of one segment."""
    key_segments: Tensor | None = None
    """[batch, keys]"""
    prefix_lengths: Tensor | None = None
    """[batch]"""
    slopes: Tensor | None = None
    """[heads] ALiBi: the score falls by slope x distance."""
    query_positions: Tensor | None = None
    """[batch, queries] The number of the key at which each query stands. None: query i stands at key i."""
    dropout: AttentionDropout | None = None
    """Dropout of attention weights."""

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """True where the query sees the key: [batch or 1, 1, queries, keys]; None if every query sees every key."""
        i, j = self._places(queries, device), torch.arange(keys, device=device)
        conditions = []
        if self.kind == "causal":
            conditions.append(j <= i)
        elif self.kind == "prefix":
            assert self.prefix_lengths is not None, "a prefix mask needs prefix_lengths"
            conditions.append((j <= i) | (j < self.prefix_lengths[:, None, None, None]))
        if self.window is not None:
            conditions.append((i - j).abs() < self.window)
        if self.query_segments is not None:
            assert self.key_segments is not None
            conditions.append((self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None])
        if not conditions:
            return None
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen & condition
        return seen

    def bias(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """What ALiBi adds to the scores: [batch or 1, heads, queries, keys], fp32."""
        if self.slopes is None:
            return None
        distance = (self._places(queries, device) - torch.arange(keys, device=device)).abs()
        return -self.slopes[:, None, None] * distance

    def _places(self, queries: int, device: torch.device) -> Tensor:
        """Where queries stand among the keys: [batch or 1, 1, queries, 1]."""
        places = torch.arange(queries, device=device)[None] if self.query_positions is None else self.query_positions
        return places[:, None, :, None]


@dataclass(frozen=True)
class Requirements:
    """What a run asks of a backend."""

    device: str
    """`cpu` or `cuda`."""
    dtype: torch.dtype
    head_dim: int = 64
    group: int = 1
    """Query heads per key head."""
    kind: MaskKind = "causal"
    segments: bool = False
    window: bool = False
    alibi: bool = False
    dropout: bool = False
    unequal_lengths: bool = False
    """Keys are not as many as queries (cross-attention)."""
    cached: bool = False
    """Queries stand anywhere among the keys, which were computed before (generation)."""
    long: bool = True
    """More than LONG keys."""
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    """Gradients are to be the same bits every time: torch's switch, which every kernel follows or refuses."""


@dataclass(frozen=True)
class Backend:
    """One kernel: how to call it, what must be importable, and what it can do."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
    module: str | None = None
    install: str = ""
    """How to get the module."""
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = _HALF
    kinds: tuple[str, ...] = ("causal", "full")
    segments: bool = False
    window: bool = False
    alibi: bool = False
    dropout: bool = False
    unequal_lengths: bool = False
    cached: bool = False
    long: bool = True
    traceable: bool = False
    """torch.compile knows it, so that it can be part of what is compiled."""

    def refusal(self, needs: Requirements) -> str | None:
        """Why it cannot serve, or None."""
        if needs.device not in self.devices:
            return f"it does not run on {needs.device}"
        if needs.dtype not in self.dtypes:
            return f"it does not compute in {str(needs.dtype).removeprefix('torch.')}"
        if needs.kind not in self.kinds:
            return f"it has no {needs.kind} mask"
        lacks = {
            "segments": "packed documents (data.attend_across_documents: false)",
            "window": "a sliding window",
            "alibi": "alibi positions",
            "dropout": "reproducible attention dropout",
            "unequal_lengths": "cross-attention",
            "cached": "a cache of keys",
            "long": f"more than {LONG} tokens",
        }
        for feature, words in lacks.items():
            if getattr(needs, feature) and not getattr(self, feature):
                return f"it does not support {words}"
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # a kernel built for another torch or GPU fails in any way it likes
                return f"{self.module} does not import ({error}); {self.install}"
        return None


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v, written out, at least in fp32. The reference for the others."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    # [batch, kv_heads, group, queries or keys, head_dim]
    q5 = _heads_first(q.to(wide)).unflatten(1, (kv_heads, heads // kv_heads))
    k5, v5 = (_heads_first(x.to(wide)).unsqueeze(2) for x in (k, v))
    scores = (q5 @ k5.transpose(-1, -2) / math.sqrt(head_dim)).reshape(batch, heads, queries, keys)
    bias = mask.bias(queries, keys, q.device)
    if bias is not None:
        scores = scores + bias
    visible = mask.visible(queries, keys, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    weights = scores.softmax(dim=-1)
    if mask.dropout is not None:
        weights = mask.dropout.apply(weights)
    mixed = weights.unflatten(1, (kv_heads, heads // kv_heads)) @ v5
    return _heads_first(mixed.flatten(1, 2)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """torch's scaled_dot_product_attention, whichever kernel it takes for the mask."""
    queries, keys = q.shape[1], k.shape[1]
    simple = mask.kind != "prefix" and mask.query_segments is None and mask.window is None and mask.slopes is None
    simple = simple and mask.query_positions is None
    if simple and (mask.kind == "full" or queries == keys):
        return _call_sdpa(q, k, v, gpu_kernels(keys, masked=False), causal=mask.kind == "causal")
    seen = mask.visible(queries, keys, q.device)
    bias = mask.bias(queries, keys, q.device)
    if bias is not None:
        bias = bias.to(q.dtype) if seen is None else bias.to(q.dtype).masked_fill(~seen, -math.inf)
    return _call_sdpa(q, k, v, gpu_kernels(keys, masked=True), bias=seen if bias is None else bias)


def gpu_kernels(keys: int, masked: bool) -> list[SDPBackend]:
    """What torch may choose from on a GPU. masked: given a mask tensor.

    cuDNN's gradients can be NaN with a mask tensor (torch 2.11), and flash attention takes none. The math kernel keeps
    the scores of all pairs in memory, so it is for short sequences.
    """
    kernels = [SDPBackend.EFFICIENT_ATTENTION]
    if not masked:
        kernels += [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if keys <= LONG:
        kernels.append(SDPBackend.MATH)
    return kernels


def _call_sdpa(
    q: Tensor, k: Tensor, v: Tensor, kernels: list[SDPBackend], *, causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """kernels: on a GPU. bias: what is added to the scores, or True where the query sees the key."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    if not q.is_cuda:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
        return _heads_first(mixed)
    if grouped and not _knows_groups(q, k, v, bias, causal):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    with sdpa_kernel(kernels):
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
    return _heads_first(mixed)


def _knows_groups(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> bool:
    """Whether flash attention or cuDNN serves; of the others, the memory-efficient kernel knows no grouped heads."""
    if bias is not None or q.dtype not in _HALF:
        return False
    if torch.compiler.is_compiling():  # which cannot ask; traces() has tried it out
        return True
    asked = SDPAParams(q, k, v, bias, 0.0, causal, True)
    return can_use_flash_attention(asked) or can_use_cudnn_attention(asked)


def _blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Matrix products for every 128 queries and the keys that they can see: scores and softmax in fp32, the rest in
    the dtype of q.

    On a CPU in bf16 this takes half to three quarters of SDPA's time, whose backward pass does not use bf16
    instructions well. The trade: it keeps the attention weights, so it is for short sequences. Its errors are SDPA's.
    Scores in bf16 would save a tenth of the time, for ten times the error where scores are large.
    """
    keys = k.shape[1]
    reach = keys if mask.window is None else mask.window - 1
    ahead = 0 if mask.kind == "causal" else reach
    starts = range(0, q.shape[1], 128)
    seen = [slice(max(start - reach, 0), min(start + 128 + ahead, keys)) for start in starts]
    return _BlockAttention.apply(q, k, v, mask.visible(q.shape[1], keys, q.device), seen)


class _BlockAttention(torch.autograd.Function):
    """Attention of blocks of 128 queries, each to a slice of the keys.

    A key head meets the queries of its whole group as one matrix: [batch x kv_heads, group x block, head_dim].
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, seen: list[slice]) -> Tensor:
        """visible: [batch or 1, 1, queries, keys]. seen: of each block."""
        kv_heads = k.shape[2]
        group = q.shape[2] // kv_heads
        k3, v3 = _by_key_head(k, kv_heads), _by_key_head(v, kv_heads)
        wide = torch.promote_types(q.dtype, torch.float32)
        wide_k3 = k3.to(wide)
        mixed = torch.empty_like(q)
        weights = []
        for number, (block, out) in enumerate(zip(q.split(128, 1), mixed.split(128, 1), strict=True)):
            bias = torch.zeros((), dtype=wide, device=q.device)
            if visible is not None:
                rows = slice(128 * number, 128 * number + block.shape[1])
                hidden = ~visible[:, :, None, rows, seen[number]]  # [batch or 1, 1, 1, block, seen]
                bias = torch.zeros(hidden.shape, dtype=wide, device=q.device).masked_fill_(hidden, -math.inf)
                bias = bias.expand(-1, 1 if len(hidden) == 1 else kv_heads, group, -1, -1).flatten(2, 3).flatten(0, 1)
            block3 = _by_key_head(block, kv_heads).to(wide)
            scores = torch.baddbmm(bias, block3, wide_k3[:, seen[number]].transpose(1, 2), alpha=q.shape[3] ** -0.5)
            weights.append(scores.softmax(dim=-1).to(q.dtype))
            _put(out, torch.bmm(weights[-1], v3[:, seen[number]]), kv_heads)
        ctx.save_for_backward(q, k3, v3, *weights)
        ctx.seen = seen  # type: ignore[attr-defined]
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        q, k3, v3, *weights = ctx.saved_tensors
        batch, kv_heads = len(q), len(k3) // len(q)
        dq, dk3, dv3 = torch.empty_like(q), torch.zeros_like(k3), torch.zeros_like(v3)
        blocks = zip(ctx.seen, weights, q.split(128, 1), gradient.split(128, 1), dq.split(128, 1), strict=True)
        for seen, weight, block, d_mixed, d_block in blocks:
            d_values = _by_key_head(d_mixed, kv_heads)
            dv3[:, seen] += torch.bmm(weight.transpose(1, 2), d_values)
            d_weight = torch.bmm(d_values, v3[:, seen].transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weight, weight, -1, weight.dtype)
            dk3[:, seen] += torch.bmm(d_scores.transpose(1, 2), _by_key_head(block, kv_heads))
            _put(d_block, torch.bmm(d_scores, k3[:, seen]), kv_heads)
        scale = q.shape[3] ** -0.5
        dk, dv = (x.unflatten(0, (batch, kv_heads)).transpose(1, 2) for x in (dk3.mul_(scale), dv3))
        return dq.mul_(scale), dk, dv, None, None


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, seq, heads, head_dim] -> [batch x kv_heads, group x seq, head_dim], copied."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(len(x) * kv_heads, -1, x.shape[3])


def _put(out: Tensor, x: Tensor, kv_heads: int) -> None:
    """The inverse of _by_key_head, into `out`."""
    batch, seq, heads, head_dim = out.shape
    out.unflatten(2, (kv_heads, -1)).copy_(x.view(batch, kv_heads, -1, seq, head_dim).permute(0, 3, 1, 2, 4))


def _pinned(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, Mask], Tensor]:
    """SDPA held to one kernel; only for masks it knows without a tensor."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        assert mask.kind != "prefix" and mask.query_segments is None and mask.window is None and mask.slopes is None
        assert mask.kind == "full" or q.shape[1] == k.shape[1]
        return _call_sdpa(q, k, v, [kernel], causal=mask.kind == "causal")

    return run


_bounds = WeakIdKeyDictionary()
"""segment_bounds() of tensors that are still there: all blocks ask for those of the same one."""


def segment_bounds(segments: Tensor) -> Tensor:
    """Where segments start in the flattened batch, and its end: [batch, seq] -> [segments + 1], int32.

    On a GPU this waits for the device, because the number of segments is data, unless remember_bounds() was told; once
    for all blocks, for which a tensor of segments must not be changed in place.
    """
    if segments not in _bounds:
        _bounds[segments] = find_bounds(segments)
    return _bounds[segments]


def remember_bounds(segments: Tensor, bounds: Tensor) -> None:
    """Let segment_bounds() of this very tensor be what was found elsewhere: on the host, which waits for nobody."""
    _bounds[segments] = bounds


def find_bounds(segments: Tensor) -> Tensor:
    """As segment_bounds()."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begins = starts.flatten().nonzero().flatten()
    return F.pad(begins, (0, 1), value=segments.numel()).to(torch.int32)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """torch's own flash attention of variable length; without segments, each row is one."""
    from torch.nn.attention.varlen import varlen_attn

    batch, seq, heads, _ = q.shape
    if mask.query_segments is None:
        bounds = torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=q.device)
    else:
        bounds = segment_bounds(mask.query_segments)
    reach = -1 if mask.window is None else mask.window - 1
    options: dict[str, Any] = {"window_size": (reach, 0 if mask.kind == "causal" else reach)}
    if heads != k.shape[2] and "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 is not asked
        options["enable_gqa"] = True
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _first(varlen_attn(q, k, v, bounds, bounds, seq, seq, **options)).unflatten(0, (batch, seq))


def _flash(module: str, unlimited: int | None) -> Callable[[Tensor, Tensor, Tensor, Mask], Tensor]:
    """A flash-attn package: dense, or of variable length where there are segments.

    unlimited: how the package writes a window without an end. Its causal mask is aligned at the ends of queries and
    keys, which for equal lengths is ours.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        package = importlib.import_module(module)
        causal = mask.kind == "causal"
        window: tuple[int | None, int | None] = (unlimited, unlimited)
        if mask.window is not None:
            window = (mask.window - 1, 0 if causal else mask.window - 1)
        options: dict[str, object] = {"causal": causal, "window_size": window}
        if mask.slopes is not None:
            options["alibi_slopes"] = mask.slopes
        if torch.are_deterministic_algorithms_enabled():  # not every version and GPU knows it
            options["deterministic"] = True
        if mask.query_segments is None:
            return _first(package.flash_attn_func(q, k, v, **options))
        # the longest segment is at most a row; knowing it better would mean waiting for the device again
        bounds = segment_bounds(mask.query_segments)
        lengths = {"max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = package.flash_attn_varlen_func(*flat, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **lengths, **options)
        return _first(out).unflatten(0, q.shape[:2])

    return run


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """flash-attn 4, and some versions of 3, return the log-normaliser as well."""
    return result[0] if isinstance(result, tuple) else result


_ANY = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

BACKENDS = {
    backend.name: backend
    for backend in (  # the fastest first
        Backend(
            "flash3",
            _flash("flash_attn_interface", -1),
            module="flash_attn_interface",
            install="build it from the hopper folder of flash-attention",
            segments=True,
            window=True,
        ),
        Backend(
            "flash4",
            _flash("flash_attn.cute", None),
            module="flash_attn.cute",
            install="install flash-attn-4",
            segments=True,
            window=True,
        ),
        Backend("blocks", _blocks, devices=("cpu",), dtypes=(torch.bfloat16,), segments=True, window=True, long=False),
        Backend("sdpa_cudnn", _pinned(SDPBackend.CUDNN_ATTENTION), traceable=True),
        Backend(
            "flash2",
            _flash("flash_attn.flash_attn_interface", -1),  # flash-attn 4 alone has a folder flash_attn as well
            module="flash_attn.flash_attn_interface",
            install="install flash-attn",
            segments=True,
            window=True,
            alibi=True,
        ),
        Backend("sdpa_flash", _pinned(SDPBackend.FLASH_ATTENTION), traceable=True),
        Backend(
            "sdpa_varlen",
            _varlen,
            module="torch.nn.attention.varlen",
            install="take torch 2.11 or newer",
            segments=True,
            window=True,
        ),
        Backend(
            "sdpa",
            _sdpa,
            devices=("cpu", "cuda"),
            dtypes=_ANY,
            kinds=("causal", "full", "prefix"),
            segments=True,
            window=True,
            alibi=True,
            unequal_lengths=True,
            cached=True,
            traceable=True,
        ),
        Backend(
            "plain",
            _plain,
            devices=("cpu", "cuda"),
            dtypes=_ANY,
            kinds=("causal", "full", "prefix"),
            segments=True,
            window=True,
            alibi=True,
            dropout=True,
            unequal_lengths=True,
            cached=True,
        ),
    )
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str) -> Tensor:
    """Attention through a backend that resolve() named: [batch, queries, heads, head_dim], in q's dtype."""
    return BACKENDS[backend].run(q, k, v, mask)


@dataclass(frozen=True)
class Shape:
    """What one call of attention is given, on one rank."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    window: int = 33
    """Where there is one at all."""


def _sample(
    needs: Requirements, shape: Shape, *, document: int, std: float, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Mask]:
    """q, k, v, a gradient of the output, and a mask of the kind that is asked for. document: tokens of a segment. std:
    of queries and keys."""
    device = torch.device(needs.device)

    def normal(heads: int, std: float = 1.0) -> Tensor:
        x = torch.randn(shape.batch, shape.seq, heads, needs.head_dim, generator=draw, device=draw.device) * std
        return x.to(device, needs.dtype)

    q, k, v, gradient = (
        normal(shape.heads, std),
        normal(shape.kv_heads, std),
        normal(shape.kv_heads),
        normal(shape.heads),
    )
    places = torch.arange(shape.seq, device=device)
    segments = (places // document).repeat(shape.batch, 1) if needs.segments else None
    mask = Mask(
        kind=needs.kind,
        window=shape.window if needs.window else None,
        query_segments=segments,
        key_segments=segments,
        prefix_lengths=5 + 85 * torch.arange(shape.batch, device=device) if needs.kind == "prefix" else None,
        slopes=0.5 ** torch.arange(1, shape.heads + 1, device=device) if needs.alibi else None,
        query_positions=(places // 2).repeat(shape.batch, 1) if needs.cached else None,
    )
    return q, k, v, gradient, mask


def _self_check(backend: Backend, needs: Requirements, compiled: bool = False) -> str | None:
    """Compare output and gradients with the plain backend on a small input; why not to trust it, or None. compiled: of
    the backend as a part of what torch.compile builds.

    Queries and keys are large, as in trained models, so that attention is on few keys and the precision of the scores
    matters. The tolerance is twice the distance between numbers of the dtype, or 1e-4: kernels that round only their
    operands are within one, softmax over scores in bf16 is not within three.
    """
    seq = LONG + 256 if needs.long and needs.device == "cuda" else 256
    shape = Shape(batch=2, seq=seq, heads=2 * needs.group, kv_heads=2)
    q, k, v, out_gradient, mask = _sample(needs, shape, document=70, std=3.0, draw=torch.Generator().manual_seed(0))

    def attend(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
        return attention(q, k, v, mask, name)

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        whole = torch.compile(attend, fullgraph=True, dynamic=False) if compiled and name == backend.name else attend
        out = whole(inputs[0], inputs[1], inputs[2], name)
        return [out.detach(), *torch.autograd.grad(out, inputs, out_gradient.to(dtype))]

    def same(x: Tensor) -> Tensor:
        return x

    # a caller's recomputation must not see the tensors saved here; who compiles is in none
    hooks = nullcontext() if compiled else torch.autograd.graph.saved_tensors_hooks(same, same)
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            results = run(backend.name, needs.dtype)
            references = run("plain", torch.promote_types(needs.dtype, torch.float32))
    except Exception as error:  # whatever a kernel raises, another one can serve
        return f"its self-check failed ({reason(error)})"
    tolerance = max(1e-4, 2 * torch.finfo(needs.dtype).eps)
    for what, result, reference in zip(("output", "dq", "dk", "dv"), results, references, strict=True):
        distance = ((result - reference).norm() / reference.norm()).item()
        if not distance < tolerance:
            return f"its self-check failed ({what} is {distance:.1e} from the plain backend's, relatively)"
    return None


@cache
def traces(name: str, needs: Requirements) -> bool:
    """Whether torch.compile can take the backend into what it builds; on a GPU it is tried out."""
    backend = BACKENDS[name]
    if not backend.traceable or needs.device == "cpu":
        return backend.traceable
    if problem := _self_check(backend, needs, compiled=True):
        logger.warning("train.compile leaves attention %s outside: %s", name, problem)
        return False
    return True


@cache
def _why_not(name: str, needs: Requirements) -> str | None:
    """Why a backend cannot serve or is not to be trusted, or None."""
    backend = BACKENDS[name]
    return backend.refusal(needs) or (None if name == "plain" else _self_check(backend, needs))


def serving(needs: Requirements) -> list[str]:
    """The backends that are installed, suit and pass their self-check, in the order of BACKENDS; at least `plain`."""
    return [name for name in BACKENDS if _why_not(name, needs) is None]


@cache
def resolve(name: str, needs: Requirements) -> str:
    """The backend to use: `name` itself, or for `auto` the first that is installed, suits and passes its self-check.

    Raises MegalmError if a named backend cannot serve.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if _why_not(backend, needs) is None)
    if refusal := _why_not(name, needs):
        raise MegalmError(
            f"model.attention_backend {name} cannot serve this run: {refusal}; set it to auto to take one that can"
        )
    return name


NEAR = 1.05
"""Times of two backends that are this close decide nothing: another measurement may put the other first."""


APART = 1.25
"""What a backend that torch.compile leaves outside of a compiled block has against it: the block falls into pieces, and
what was one pass over memory with their ends becomes copies. A guess on the safe side, until it is measured."""


def fastest(seconds: dict[str, float], inside: Collection[str] | None = None) -> str:
    """Of backends in the order of BACKENDS, the first whose time is within NEAR of the shortest.

    inside: those that torch.compile takes into compiled blocks, where the time of all others counts APART times.
    """
    weighed = {name: its if inside is None or name in inside else APART * its for name, its in seconds.items()}
    return next(name for name, its in weighed.items() if its <= NEAR * min(weighed.values()))


def measure(
    names: Sequence[str], needs: Requirements, shape: Shape, rounds: int = 5, calls: int = 4
) -> dict[str, float]:
    """Seconds that attention takes forward and backward in each backend, for rows of four documents if they are
    segmented: the median of `rounds` of `calls`, with the backends in turn. One that fails at this shape, or whose
    gradients are no numbers there (of large batches this is known of cuDNN's), is left out.
    """
    draw = torch.Generator(needs.device).manual_seed(0)
    q, k, v, gradient, mask = _sample(needs, shape, document=-(-shape.seq // 4), std=1.0, draw=draw)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def gradients(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(q, k, v, mask, name), inputs, gradient)

    def seconds(name: str) -> float:
        begun = _now(needs.device)
        for _ in range(calls):
            gradients(name)
        return (_now(needs.device) - begun) / calls

    found: dict[str, list[float]] = {}
    for name in names:
        try:
            for _ in range(2):  # what is built or tuned at the first call is not part of its time
                if not all(x.isfinite().all() for x in gradients(name)):
                    raise FloatingPointError("its gradients are not finite")
            found[name] = []
        except Exception as error:  # whatever a kernel raises, another one can serve
            logger.warning("attention %s fails at the run's shape: %s", name, reason(error))
    for _ in range(rounds):
        for name, its in found.items():
            its.append(seconds(name))
    return {name: statistics.median(its) for name, its in found.items()}


def _now(device: str) -> float:
    """Seconds on a clock, when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
