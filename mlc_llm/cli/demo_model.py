"""`mlc_llm demo-model`: put the small model of the demo into the cache."""

from __future__ import annotations

from mlc_llm.cli.options import read_caches
from mlc_llm.cli.progress import show_progress


def demo_model() -> None:
    """Fetch the model of the demo (98 MB, once)."""
    from mlc_llm.prepare.demo import install_demo_model

    caches = read_caches()
    with show_progress() as progress:
        install_demo_model(home=caches.home, policy=caches.download_policy, progress=progress)
