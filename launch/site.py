"""A site profile: what a user of one cluster would otherwise type on every command line."""

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megalm.config import Config, load

PROFILE = "MEGALM_SITE"
"""Environment variable that names the profile."""
OVERRIDES = "MEGALM_SITE_SET"
"""Environment variable with overrides of it, one KEY=VALUE per line."""


class Supervision(Config):
    """What the launcher does when something goes wrong."""

    restarts: NonNegativeInt = 3
    """Restarts after crashes, hangs and time limits without a new checkpoint in between, before a requeue and after it;
    after that the job ends in error."""
    backoff: PositiveFloat = 10.0
    """Seconds before the first restart; each further one waits twice as long, five minutes at most."""
    exclude_after: PositiveInt = 2
    """Failures after which a node is no longer used."""
    join_within: PositiveFloat = 300.0
    """Seconds in which every node must report after the job has started."""
    silent_after: PositiveFloat = 30.0
    """Seconds without a word from a node after which it counts as lost."""
    start_within: PositiveFloat = 1800.0
    """Seconds to the first step, loading of the checkpoint included, after which a run counts as hanging."""
    hang_after: PositiveFloat = 600.0
    """Seconds in which no rank gets anywhere after which a run counts as hanging."""
    requeue: Literal["auto", "never"] = "auto"
    """`never` leaves what remains to the next job of a chain."""


class Site(Config):
    """How jobs run at one site. Every key may be left out."""

    nodes: PositiveInt | None = None
    """Nodes per job."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs per node, and ranks if ranks_per_node is not given."""
    ranks_per_node: PositiveInt | None = None
    """Ranks per node where it is not the number of GPUs."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Account to charge."""
    time: str | None = None
    """Time limit, as Slurm spells it."""
    container: str | None = None
    """Image that the ranks run in (pyxis: srun --container-image)."""
    sbatch: list[str] = Field(default_factory=list)
    """More options for sbatch."""
    srun: list[str] = Field(default_factory=list)
    """More options for srun, such as --container-mounts."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank, such as NCCL_SOCKET_IFNAME."""
    supervise: Supervision = Supervision()
    """Restarts, hangs, requeueing."""


def of_environment(environment: Mapping[str, str] = os.environ, overrides: tuple[str, ...] = ()) -> Site:
    """The profile that MEGALM_SITE names, changed by MEGALM_SITE_SET and `overrides`. Raises MegalmError."""
    lines = [line for line in environment.get(OVERRIDES, "").splitlines() if line]
    path = environment.get(PROFILE) or os.devnull
    return load(path, Site, [*lines, *overrides], called="site profile", option="--site-set")
