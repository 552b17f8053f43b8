"""Where training samples come from and in which order."""

from pydantic import Field, NonNegativeInt, PositiveFloat

from megalm.config import Config


class SourceConfig(Config):
    """One corpus of the blend: a folder that tools/write_shards.py wrote."""

    path: str
    """Shard folder (holds index.json)."""
    weight: PositiveFloat = 1.0
    """Share of samples drawn from it, relative to the other sources."""


class DataConfig(Config):
    """The training blend, the held-out corpora and how samples are cut."""

    sources: list[SourceConfig] = Field(default_factory=list)
    """Corpora to train on."""
    held_out: list[SourceConfig] = Field(default_factory=list)
    """Corpora for the held-out loss; weights are ignored."""
    tokenizer: str = ""
    """Tokenizer folder, a sentencepiece .model or a Hugging Face tokenizer.json; must match the shards."""
    attend_across_documents: bool = True
    """Tokens see earlier documents of their sample; false isolates each document and restarts its positions."""
    shuffle: bool = True
    """Permute samples by a key of seed, epoch and corpus; false keeps the order of the shards."""
    prefetch: NonNegativeInt = 2
    """Steps prepared ahead by a background thread."""
    verify_checksums: bool = False
    """Read every shard once at start and compare its checksum (sizes are always compared)."""
