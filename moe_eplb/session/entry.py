"""Where a rank process begins. Apart from the worker, so that the parent can name it without importing torch."""

from __future__ import annotations

from multiprocessing.connection import Connection

from moe_eplb.session.unnamed_file import UnnamedFile

__all__ = ["rank_main"]


def rank_main(rank: int, size: int, store: UnnamedFile, pipe: Connection) -> None:
    """See `moe_eplb.session.worker.main`."""
    from moe_eplb.session.worker import main

    main(rank, size, store, pipe)
