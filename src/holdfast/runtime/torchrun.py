"""torchrun's command lines. https://docs.pytorch.org/docs/stable/elastic/run.html"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

MODULE = "torch.distributed.run"
TORCHRUN = ("-m", MODULE)
JOIN_SECONDS = 300
"""Who waits so long (wall) for the others of its formation leaves it; a machine that never comes must not hold the rest."""
GPUS_SECONDS = 60.0


def processes_here(asked: int) -> int:
    """Ranks of this machine: as many as asked for; 0: one per GPU, and one where there is none."""
    return asked or max(1, _gpus())


def _gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=GPUS_SECONDS)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def standalone(processes: int, program: Sequence[str]) -> list[str]:
    """Arguments for Python: ranks of this machine alone. What fails is the agent's to start again, not torchrun's."""
    return [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", "--max-restarts=0", *program]


def together(
    machines: int, processes: int, program: Sequence[str], *, rendezvous: str, meeting: str, address: str, hosts: bool
) -> list[str]:
    """Arguments for Python: this machine's ranks of many.

    `rendezvous`: its name. `meeting`: `host:port` where the machines meet; one of them `hosts` it. `address`: this one's.
    """
    return [
        *TORCHRUN,
        f"--nnodes={machines}",
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting}",
        f"--rdzv-id={rendezvous}",
        # Without is_host torchrun compares names, and on one computer every machine is called the same.
        f"--rdzv-conf=is_host={int(hosts)},join_timeout={JOIN_SECONDS}",
        f"--local-addr={address}",
        *program,
    ]
