"""Ports of this computer: which are free, and who is connected to one."""

from __future__ import annotations

import random
import socket
from pathlib import Path

ESTABLISHED = "01"
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
FIRST_PORT, LAST_PORT = 20000, 32000
"""Below the kernel's own choice for outgoing connections (32768 and up), which could take a port before its server does."""


def connections_to(port: int) -> int:
    """Established TCP connections to a port of this machine; a request in flight is on one of them.

    Source of the columns: https://www.kernel.org/doc/Documentation/networking/proc_net_tcp.txt
    """
    count = 0
    for table in TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except FileNotFoundError:  # no IPv6
            continue
        for line in lines:
            _, local, _, state = line.split(maxsplit=4)[:4]
            count += state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port
    return count


def free_port(taken: tuple[int, ...] = ()) -> int:
    """One that nobody listens on. Raises OSError when none is found."""
    for port in random.sample(range(FIRST_PORT, LAST_PORT), 200):
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {FIRST_PORT} and {LAST_PORT}")
