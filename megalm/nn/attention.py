"""Multi-head attention (Vaswani et al. 2017), grouped-query and multi-query (Ainslie et al. 2023, Shazeer 2019)."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.nn.adapter import adapter_of
from megalm.nn.cache import KeyValueCache
from megalm.nn.config import BlockConfig, RopeScaling
from megalm.nn.dropout import AttentionDropout, Dropout
from megalm.nn.kernels import LONG, Mask, MaskKind, Requirements, attention, resolve
from megalm.nn.layers import Layers
from megalm.nn.norm import RMSNorm
from megalm.nn.position import alibi_slopes, rotary_angles, rotary_tables, rotate


class Attention(nn.Module):
    """Self-attention over the stream, or cross-attention from the stream to a context.

    Under tensor parallelism a rank computes heads / T query heads, and the key and value heads that they need: its
    share of them where T divides their number, else one of them, cut from projections that every rank holds whole.
    """

    def __init__(
        self,
        config: BlockConfig,
        layers: Layers,
        *,
        std: float,
        output_std: float,
        seed: int,
        site: str,
        kind: MaskKind = "causal",
        segmented: bool = True,
        cross: bool = False,
        recompute: bool = False,
    ) -> None:
        """site: this place in the network, the key of its dropout. segmented: False promises that segment_ids are all
        equal, so that they need not be looked at. cross: keys and values come from a context, whose positions do not
        enter. recompute: from queries, keys and values on, compute again in the backward pass rather than keep.
        """
        super().__init__()
        hidden, width, bias = config.hidden_size, config.head_width, config.attention_bias
        heads, kv_heads, ranks = config.num_attention_heads, config.key_value_heads, layers.tensor_size
        assert heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0), "refused by the layout"
        self.config = config
        self.layers = layers
        self.kind: MaskKind = "full" if cross else kind
        self.segmented = segmented
        self.position = "none" if cross else config.position
        self.cross = cross
        self.recompute = recompute
        self.first_head = layers.tensor_rank * heads // ranks
        self.query = layers.column(hidden, heads * width, bias=bias, std=std)
        self.shares_kv = kv_heads % ranks != 0
        kv_projection = layers.linear if self.shares_kv else layers.column
        self.key = kv_projection(hidden, kv_heads * width, bias=bias, std=std)
        self.value = kv_projection(hidden, kv_heads * width, bias=bias, std=std)
        self.output = layers.row(heads * width, hidden, bias=config.attention_output_bias, std=output_std)
        # a rank normalises its own heads only, so the gradient of a shared weight is a partial sum
        head_norm = partial(RMSNorm, width, config.norm_eps, config.norm_implementation, layers.partial)
        self.query_norm = head_norm() if config.qk_norm else None
        self.key_norm = head_norm() if config.qk_norm else None
        self.dropout = Dropout(config.attention_dropout, seed, f"{site}.weights")
        self.tables: tuple[Tensor, Tensor] | None = None
        """Rotary ones, in a compiled block."""
        self.slopes: Tensor | None = None
        """ALiBi's of this rank's heads, in a compiled block."""
        self.compiled_backend: str | None = None
        """The kernel that torch.compile takes into what it compiles."""
        self.cache: KeyValueCache | None = None
        """Set for the length of a forward pass that goes on where earlier ones ended (eval.inference)."""

    def forward(
        self,
        hidden: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        sample_ids: Tensor,
        *,
        context: Tensor | None = None,
        context_segments: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states -> hidden states.

        segment_ids and positions [batch, seq]; sample_ids and prefix_lengths [batch]; for cross-attention, context:
        the encoder's hidden states, and context_segments [batch, context_seq].
        """
        assert self.cross == (context is not None)
        batch, seq = positions.shape
        x = self.layers.enter(hidden)  # [tokens, hidden]
        source = x if context is None else self.layers.enter(context)
        # [batch, seq, this rank's heads, head_dim]
        q = self.query(x).view(batch, seq, -1, self.config.head_width)
        k = self._project_kv(self.key, source).view(batch, -1, *self._kv_shape())
        v = self._project_kv(self.value, source).view(batch, -1, *self._kv_shape())
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        key_segments = context_segments if self.cross else segment_ids
        mask = Mask(
            kind=self.kind,
            window=None if self.cross else self.config.sliding_window,
            query_segments=segment_ids if self.segmented else None,
            key_segments=key_segments if self.segmented else None,
            prefix_lengths=prefix_lengths,
            slopes=self._slopes(q.device) if self.position == "alibi" else None,
            dropout=self._attention_dropout(sample_ids),
        )
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(self._mix, q, k, v, positions, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = self._mix(q, k, v, positions, mask)
        return self.output(mixed.reshape(batch * seq, -1))

    def _kv_shape(self) -> tuple[int, int]:
        """This rank's key heads, and their width."""
        kv_heads = 1 if self.shares_kv else self.config.key_value_heads // self.layers.tensor_size
        return kv_heads, self.config.head_width

    def _project_kv(self, projection: nn.Module, source: Tensor) -> Tensor:
        """Keys or values of this rank: [tokens, hidden] -> [tokens, its key heads x head_dim]."""
        if not self.shares_kv:
            return projection(source)
        width, group = self.config.head_width, self.config.num_attention_heads // self.config.key_value_heads
        head = self.first_head // group
        rows = slice(head * width, (head + 1) * width)
        weight, bias = projection.weight, projection.bias
        assert isinstance(weight, Tensor)
        weight = self.layers.partial(weight)[rows]
        out = F.linear(source, weight, self.layers.partial(bias)[rows] if isinstance(bias, Tensor) else None)
        adapter = adapter_of(projection)  # whose hook only sees calls of the whole projection
        return out if adapter is None else adapter.add(projection, source, out, rows)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """Values mixed by attention, with the shape of q."""
        if self.position == "rotary":
            angles = self._angles(positions)
            q, k = rotate(q, *angles), rotate(k, *angles)
        if self.cache is not None:
            assert self.kind == "causal" and not self.segmented, "a cached row is one segment, read from its start"
            begun = self.cache.begun
            k, v = self.cache.extend(k, v, positions)
            if begun:
                mask = replace(mask, query_positions=positions)
        return self._attend(q, k, v, mask)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin: two [batch, seq, 1, rotary width / 2]."""
        if self.tables is not None and torch.compiler.is_compiling():
            cos, sin = self.tables
            return cos[positions][:, :, None], sin[positions][:, :, None]
        return rotary_angles(positions, *self._rotary())

    def _rotary(self) -> tuple[int, float, RopeScaling | None]:
        return self.config.rotary_width, self.config.rope_theta, self.config.rope_scaling

    def prepare_to_compile(self, device: torch.device, backend: str | None) -> None:
        """Have ready what torch.compile cannot look up. backend: the kernel that it takes in; None keeps it apart."""
        if self.position == "rotary":
            # Each kernel would find sines anew for every head, which takes it longer than to read its numbers.
            self.tables = rotary_tables(self.config.max_position_embeddings, *self._rotary(), device)
        if self.position == "alibi":
            self.slopes = self._slopes(device)
        self.compiled_backend = backend
        if backend is None:
            self._attend = torch.compiler.disable(self._attend)  # type: ignore[method-assign]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        if self.compiled_backend is not None and torch.compiler.is_compiling():
            return attention(q, k, v, mask, self.compiled_backend)
        needs = Requirements(
            device=q.device.type,
            dtype=q.dtype,
            head_dim=q.shape[3],
            group=q.shape[2] // k.shape[2],
            kind=mask.kind,
            segments=mask.query_segments is not None,
            window=mask.window is not None,
            alibi=mask.slopes is not None,
            dropout=mask.dropout is not None,
            unequal_lengths=q.shape[1] != k.shape[1] and mask.query_positions is None,
            cached=mask.query_positions is not None,
            long=k.shape[1] > LONG,
        )
        # A kernel is named for training: what it has not, generation does not want either.
        backend = self.config.attention_backend if self.cache is None else "auto"
        return attention(q, k, v, mask, resolve(backend, needs))

    def _slopes(self, device: torch.device) -> Tensor:
        """ALiBi's, of this rank's heads: [heads / T]."""
        if self.slopes is not None and torch.compiler.is_compiling():
            return self.slopes
        heads = self.config.num_attention_heads
        return alibi_slopes(heads, device)[self.first_head :][: heads // self.layers.tensor_size]

    def _attention_dropout(self, sample_ids: Tensor) -> AttentionDropout | None:
        if not self.dropout.active:
            return None
        return AttentionDropout(self.dropout.p, self.dropout.key, sample_ids, self.first_head)


def requirements(
    config: BlockConfig, *, device: str, dtype: torch.dtype, segmented: bool, sequence_length: int | None = None
) -> Requirements:
    """What a decoder of this config asks of its attention backend in training, so that a run can resolve and log it.

    sequence_length: of the run. Default: the longest that the config allows.
    """
    return Requirements(
        device=device,
        dtype=dtype,
        head_dim=config.head_width,
        group=config.num_attention_heads // config.key_value_heads,
        segments=segmented,
        window=config.sliding_window is not None,
        alibi=config.position == "alibi",
        dropout=config.attention_dropout > 0,
        long=(sequence_length or config.max_position_embeddings) > LONG,
    )
