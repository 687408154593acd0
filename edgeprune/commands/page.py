"""`edgeprune page`."""

from edgeprune.commands.console import print_result
from edgeprune.config import PageConfig


def page(config: PageConfig) -> None:
    """Write a page to look into circuits of every size."""
    from edgeprune.api.page import write_page

    path = write_page(config)
    print_result(f"-> {path} ({path.stat().st_size / 1e6:.1f} MB; open it in a browser)")
