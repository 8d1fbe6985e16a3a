"""Work in a process of its own: for a package with our import name, for clean memory, for two models in turns.

The child calls `function(report, ...)`. Each `report(row)` hands a row to the parent and returns when the parent asks
for the next one, so that children whose rows are asked for alternately never run at the same time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Report = Callable[[Any], None]


class ChildError(RuntimeError):
    """The child ended before its function returned, or took too long."""


def rows(
    function: Callable[..., None], *arguments: Any, seconds: float | None = None, log: Path | None = None
) -> Generator[Any, None, None]:  # fmt: skip
    """What `function(report, *arguments)` reports; everything is pickled. Each row may take `seconds`.

    The child has the parent's environment and `sys.path`. What it prints goes to stderr, or both to the file `log`.
    """
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    child = context.Process(target=_serve, args=(other_end, log, function, arguments))
    child.start()
    other_end.close()
    try:
        while True:
            connection.send(None)
            if not connection.poll(seconds):
                raise ChildError(f"nothing came from its process; a row may take {seconds:g} s")
            yield connection.recv()
    except (EOFError, ConnectionError):  # it has ended, well or badly
        child.join()
    finally:
        child.kill()
        child.join()
        connection.close()
    if child.exitcode:
        raise ChildError(f"its process ended with code {child.exitcode}")


def _serve(
    connection: Connection,
    log: Path | None,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    if log is not None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
    os.dup2(2, 1)

    def wait() -> None:
        try:
            connection.recv()
        except EOFError:  # nobody is there to ask for more
            os._exit(1)

    def report(row: Any) -> None:
        connection.send(row)
        wait()

    wait()
    function(report, *arguments)
