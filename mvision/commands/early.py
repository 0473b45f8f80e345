"""What a command starts before it imports torch and the libraries of models, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

from mvision.data.loading.workers import pick_workers, worker_context


def expect_workers(workers: int | None, assignments: Sequence[str] = (), config_follows: bool = False) -> None:
    """Start the server of the processes that load images, so that both import at the same time.

    Args:
        workers: their number as it was asked for; None: by the number of cores.
        assignments: of the command line, which may say that there are none.
        config_follows: a config that has not been read may say so; then nothing is started here.
    """
    unknown = workers is None and (config_follows or any(entry.startswith("data.workers") for entry in assignments))
    if not unknown and pick_workers(workers, on_cuda=False) > 0:
        worker_context()
