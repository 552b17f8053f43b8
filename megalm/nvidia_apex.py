"""NVIDIA apex, which is not on PyPI: the PyPI project of that name is something else.

NVIDIA's package is known by its `apex.optimizers`. The search imports nothing, so the other project's code never runs.
"""

import importlib
import importlib.util
import logging
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from megalm.errors import MegalmError

HOW_TO_INSTALL = "install NVIDIA's from source (https://github.com/NVIDIA/apex), with its CUDA extensions"

logger = logging.getLogger(__name__)


def find(*parts: str) -> ModuleType | None:
    """The first of `parts` (modules) if NVIDIA apex is here and all import, else None.

    The log says why when another package of that name, or a broken build, is here.
    """
    spec = installed()
    if spec is None:
        return None
    try:
        return _load(spec, parts)
    except MegalmError as error:
        logger.warning("not used: %s", error)
        return None


def require(key: str, *parts: str) -> ModuleType:
    """The first of `parts` for the config key that named apex.

    Raises MegalmError when apex is absent, another one or broken.
    """
    spec = installed()
    if spec is None:
        raise MegalmError(f"{key} is apex, but apex is not installed: {HOW_TO_INSTALL}, or set {key} to auto")
    try:
        return _load(spec, parts)
    except MegalmError as error:
        raise MegalmError(f"{key} is apex, but {error}, or set {key} to auto") from error


def installed() -> ModuleSpec | None:
    """Whatever package of that name is here, not imported."""
    return importlib.util.find_spec("apex")


def is_nvidias(spec: ModuleSpec) -> bool:
    return PathFinder.find_spec("apex.optimizers", spec.submodule_search_locations or []) is not None


def _load(spec: ModuleSpec, parts: tuple[str, ...]) -> ModuleType:
    where = spec.origin or ", ".join(spec.submodule_search_locations or [])
    if not is_nvidias(spec):
        raise MegalmError(
            f"the package apex at {where} is not NVIDIA's (the PyPI project of that name is another one): "
            f"uninstall it and {HOW_TO_INSTALL}"
        )
    try:
        return [importlib.import_module(part) for part in parts][0]
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        raise MegalmError(
            f"NVIDIA apex at {where} does not import ({type(error).__name__}: {error}): "
            f"rebuild it for this torch and CUDA ({HOW_TO_INSTALL})"
        ) from error
