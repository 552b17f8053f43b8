"""By where a document comes from, and under which licence."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.errors import MegalmError


class DomainsSettings(Config):
    block: list[str] = []
    """Hosts to leave out, each with all that is below it: example.com is also www.example.com."""
    block_files: list[str] = []
    """Files of such hosts, one a line; `#` begins a remark, and lines of a hosts file (`0.0.0.0 example.com`) do
    too."""
    allow: list[str] = []
    """If there are any, only these hosts (and what is below them) go on; block wins over allow."""
    allow_files: list[str] = []
    """Files of such hosts."""
    block_words: list[str] = []
    """Leave out a page whose address holds one of these words between signs (`/casino-games/` holds casino)."""
    url_key: str = "url"
    """Where metadata have the address."""
    without_url: bool = True
    """Whether documents without an address go on."""


class Domains(ByDocument):
    """Lists of hosts (as RefinedWeb, section 3.1, begins with)."""

    kind: ClassVar[str] = "domains"
    Settings: ClassVar[type[Config]] = DomainsSettings
    settings: DomainsSettings

    @cached_property
    def _blocked(self) -> frozenset[str]:
        return _hosts(self.settings.block, self.settings.block_files)

    @cached_property
    def _allowed(self) -> frozenset[str]:
        return _hosts(self.settings.allow, self.settings.allow_files)

    def files(self) -> Sequence[str]:
        return [*self.settings.block_files, *self.settings.allow_files]

    def verdict(self, document: Document) -> Rejection | None:
        url = document.metadata.get(self.settings.url_key)
        if not isinstance(url, str) or not (host := host_of(url)):
            return None if self.settings.without_url else Rejection("no address")
        above = [host, *(host[place.end() :] for place in re.finditer(r"\.", host))]
        blocked = next((name for name in above if name in self._blocked), None)
        if blocked:
            return Rejection("blocked domain", blocked)
        if self._allowed and not any(name in self._allowed for name in above):
            return Rejection("domain not on the list", host)
        words = set(re.split(r"[^a-z0-9]+", url.lower())) if self.settings.block_words else set()
        found = next((word for word in self.settings.block_words if word.lower() in words), None)
        return Rejection("blocked word in the address", found) if found else None


def host_of(url: str) -> str:
    """Lower case, without port; empty if there is none."""
    try:
        return (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".").lower()
    except ValueError:  # a malformed IPv6 address
        return ""


def _hosts(names: Sequence[str], files: Sequence[str]) -> frozenset[str]:
    listed = list(names)
    for path in files:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MegalmError(f"the list of domains {path} cannot be read ({error}): name a text file") from None
        listed += [line.split("#")[0].split()[-1] for line in lines if line.split("#")[0].split()]
    return frozenset(name.lower().removeprefix("*.").strip(".") for name in listed)


class LicencesSettings(Config):
    allow: list[str] = []
    """If there are any, only documents under these go on: SPDX names (`MIT`, `CC-BY-4.0`), in any case; `CC-BY-*` is a
    family."""
    block: list[str] = []
    """These are left out; block wins over allow."""
    key: str = "license"
    """Where metadata have the licence: a name, a list of names (any of them allowed is enough, any blocked too much),
    or an address of Creative Commons."""
    without_licence: bool = False
    """Whether documents of which no licence is known go on."""


class Licences(ByDocument):
    """Lists of licences."""

    kind: ClassVar[str] = "licences"
    Settings: ClassVar[type[Config]] = LicencesSettings
    settings: LicencesSettings

    def verdict(self, document: Document) -> Rejection | None:
        value = document.metadata.get(self.settings.key)
        names = [_spdx(str(name)) for name in (value if isinstance(value, list | tuple) else [value]) if name]
        if not names:
            return None if self.settings.without_licence else Rejection("no licence known")
        blocked = next((name for name in names if _listed(name, self.settings.block)), None)
        if blocked:
            return Rejection("blocked licence", blocked)
        if self.settings.allow and not any(_listed(name, self.settings.allow) for name in names):
            return Rejection("licence not on the list", ", ".join(names))
        return None


_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(licenses|publicdomain)/([a-z-]+)(?:/(\d\.\d))?", re.IGNORECASE)


def _spdx(name: str) -> str:
    found = _CREATIVE_COMMONS.search(name)
    if not found:
        return name.strip().lower()
    family, kind, version = found.groups()
    prefix = "cc" if family.lower() == "publicdomain" and kind.lower() == "zero" else "cc-"
    kind = "0" if prefix == "cc" else kind.lower()
    return f"{prefix}{kind}" + (f"-{version}" if version else "")


def _listed(name: str, names: Sequence[str]) -> bool:
    lowered = map(str.lower, names)
    return any(name == other or (other.endswith("*") and name.startswith(other[:-1])) for other in lowered)
