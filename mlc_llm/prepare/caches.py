"""What the environment says of downloads and caches: where they are kept, and from which hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlc_llm.prepare.cache import CacheHome, CachePolicy
from mlc_llm.prepare.download import HubAccess


@dataclass(frozen=True)
class Caches:
    """Where downloads and compiled libraries are kept, what may be done with them, which hub."""

    hub: HubAccess
    home: CacheHome
    download_policy: CachePolicy
    jit_policy: CachePolicy

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> Caches:
        """Read the MLC_ and HF_ variables. Raises OptionError."""
        return Caches(
            hub=HubAccess.from_environment(environ),
            home=CacheHome.from_environment(environ),
            download_policy=CachePolicy.parse("MLC_DOWNLOAD_CACHE_POLICY", environ),
            jit_policy=CachePolicy.parse("MLC_JIT_POLICY", environ),
        )
