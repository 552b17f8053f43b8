"""What DeepSpeed itself says of a config, in one sentence: `deepspeed:` may hold any of its keys."""

import copy
import difflib
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from pydantic import ValidationError

from megalm.errors import MegalmError, reason


class _Noting(dict[str, Any]):
    """A config that notes which keys are looked for."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # `key in config.keys()` is another way to ask
        return self


def check(config: dict[str, Any], grid: PipelineParallelGrid) -> None:
    """Raises MegalmError for what DeepSpeed does not understand of a config, or would not even look at. grid: of the
    process groups, which have been made."""
    noting = _Noting(copy.deepcopy(config))
    way_out = "correct it under deepspeed, or leave it out"
    try:
        DeepSpeedConfig(noting, mpu=grid)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MegalmError(f"{error.title}: {where}: {first['msg']}: {way_out}") from error
    except Exception as error:  # DeepSpeed reads most of it unchecked
        raise MegalmError(f"DeepSpeed does not read its config ({reason(error)}): {way_out}") from error
    for key in config:
        if key not in noting.asked:
            close = difflib.get_close_matches(key, noting.asked, n=1)
            like = f", but {close[0]}" if close else ""
            raise MegalmError(f"DeepSpeed has no key {key}{like}: {way_out}")
