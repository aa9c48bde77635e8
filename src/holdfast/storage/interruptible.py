"""Calls into native code that leave Python's signal handlers their turn."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def interruptible(call: Callable[P, T]) -> Callable[P, T]:
    """The same call; while it waits in the main thread, signals are heard.

    Python runs handlers in the main thread, between its own instructions. Native code that waits a minute for a busy
    store would keep a machine's shutdown notice as long. A handler that raises leaves the call to end by itself.
    """

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.current_thread() is not threading.main_thread():
            return call(*args, **kwargs)
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(call(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        worker = threading.Thread(target=work, name=f"holdfast-{call.__name__}")
        worker.start()
        worker.join()
        if errors:
            raise errors[0]
        return results[0]

    return called
