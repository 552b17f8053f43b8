"""Strict, typed, frozen configuration. Imports nothing that takes seconds."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A branch of the tree: unknown keys and wrong types are errors, values do not change, fields are documented."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
