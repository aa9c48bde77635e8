"""The persist process: a process of its own, without PyTorch, so that the training's interpreter never waits for it.

It outlives a training process that crashes for as long as the commit it has begun takes, and the machine's end ends it.

    python -m holdfast.checkpoint.persist FILE      FILE: number of a connected socket, inherited
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.checkpoint.commits import CheckpointId
from holdfast.checkpoint.persister import Offer, Orders, Persister, Ranks
from holdfast.checkpoint.reporting import Reporter, Surroundings
from holdfast.checkpoint.slots import Slot
from holdfast.storage import DirectoryStore, open_store

NICENESS = 10
LINE_BYTES = 65536


def main() -> int:
    """Talks with committer.py's `Committer`: lines of JSON, and the slots' memory as files."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # an orderly shutdown leaves time, and that is what it is for
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    connection = socket.socket(fileno=int(sys.argv[1]))
    around = Surroundings.from_environment()
    assert around
    listener = Listener(connection)
    listener.tell({"kind": "ready"})
    orders = listener.orders()
    if orders is None:
        return 0
    store = open_store(around.store_url)
    persister = Persister(
        store,
        around.run_id,
        around.attempt,
        orders,
        Reporter(around),
        around.clock.speed,
        listener.tell,
        # What goes elsewhere is durable sooner by the time of the copy, and outlives the machine. A local disk does not,
        # and two processors that copy and write at once take more from a loop on two than they gain.
        reads_along=not isinstance(store, DirectoryStore),
    )
    threading.Thread(target=listener.listen, args=(persister,), daemon=True).start()
    persister.work()
    return 0


class Listener:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._slots: list[Slot] = []
        self._retire: Callable[[list[Slot]], None] = lambda slots: None
        self._rest, self._files = b"", []
        self._lock = threading.Lock()

    def tell(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def orders(self) -> Orders | None:
        for message in self._messages():
            parent = message["parent"]
            return Orders(
                ranks=Ranks(**message["ranks"]),
                max_to_keep=message["max_to_keep"],
                compression=message["compression"],
                budget_seconds=message["budget_seconds"],
                parent=CheckpointId.parse(parent) if parent else None,
            )
        return None

    def listen(self, persister: Persister) -> None:
        self._retire = persister.retire
        try:
            for message in self._messages():
                if message["kind"] in ("announce", "offer"):
                    folder = message["folder"]
                    persister.offer(
                        Offer(
                            number=message["number"],
                            slot=self._slots[message["slot"]],
                            step=message["step"],
                            began=message["began"],
                            hold_seconds=message["hold_seconds"],
                            folder=Path(folder) if folder else None,
                            is_copied=message["kind"] == "offer",
                        )
                    )
        finally:  # also when a message was not understood: the training then starts another process
            persister.orphan()

    def _messages(self) -> Any:
        """Each whole line; the files that come with the word 'slots' become our slots. Ends with the connection."""
        while True:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                message = json.loads(line)
                if message["kind"] == "slots":
                    self._renew(message["sizes"])
                    continue
                yield message
            try:
                data, more, _, _ = socket.recv_fds(self._connection, LINE_BYTES, 8)
            except OSError:
                return
            if not data:
                return
            self._files += more
            self._rest += data

    def _renew(self, sizes: list[int]) -> None:
        self._retire(self._slots)
        self._slots = [Slot(file, size) for file, size in zip(self._files, sizes, strict=True)]
        self._files = []


if __name__ == "__main__":
    sys.exit(main())
