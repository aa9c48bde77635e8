"""What the program runs in: the image's Python, a lock file on top of it, or a container; and obstore for all of them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from holdfast.errors import ConfigError
from holdfast.runtime import contract

log = logging.getLogger(__name__)

DOCKER_SECONDS = 60.0
"""A daemon that starts with the machine may be so late (wall seconds)."""
KILL_SECONDS = 10.0
PIP_SECONDS = 300.0
CONSOLE_IN_CONTAINER = "/dev/holdfast-console"
IMPORT_OBSTORE = "import obstore"
PASSED_ON = ("HOLDFAST_", "AWS_EC2_METADATA_", "AWS_METADATA_", "GCE_METADATA_")
"""Of the machine's own variables, a container sees these alone. None of them is a secret."""

RunStep = Callable[[Sequence[str], str], None]
"""Runs a command, its output shown and kept; the words name it. Raises ConfigError when it fails."""


Started = tuple[list[str], dict[str, str]]
"""A command line, and the variables to start it with."""


class Surroundings(Protocol):
    def start(self, arguments: Sequence[str], is_python: bool, variables: Mapping[str, str]) -> Started:
        """How to start a program, from the code folder. `variables`: the job's and the agent's, for the program."""

    def has_obstore(self) -> bool:
        """Can its Python import obstore without our help?"""

    def kill(self) -> None:
        """End at once what a signal to the command's processes does not reach."""


class Image:
    """The machine's own Python, or an environment on top of it."""

    def __init__(self, python: str) -> None:
        self._python = python

    def start(self, arguments: Sequence[str], is_python: bool, variables: Mapping[str, str]) -> Started:
        # The tools beside the interpreter (torchrun) belong to it.
        path = os.pathsep.join([os.path.dirname(self._python), os.environ.get("PATH", os.defpath)])
        command = [*([self._python] if is_python else []), *arguments]
        return command, {**os.environ, "PATH": path, **variables}

    def has_obstore(self) -> bool:
        return subprocess.run([self._python, "-c", IMPORT_OBSTORE], capture_output=True).returncode == 0

    def kill(self) -> None:
        return


class Container:
    """The agent stays outside: the container may hold any Linux, and needs nothing of ours."""

    def __init__(self, image: str, name: str, work: Path) -> None:
        self._image, self._name, self._work = image, name, work

    def start(self, arguments: Sequence[str], is_python: bool, variables: Mapping[str, str]) -> Started:
        """https://docs.docker.com/reference/cli/docker/container/run/"""
        command = ["docker", "run", "--rm", "--init", "--name", self._name]
        # The host's network, so that the metadata service is one hop away; its IPC, for the loaders' shared memory.
        command += ["--network", "host", "--ipc", "host"]
        if shutil.which("nvidia-smi"):
            command += ["--gpus", "all"]
        command += ["--volume", f"{self._work}:{self._work}", "--workdir", str(self._work / "code")]
        seen = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | dict(variables)
        if (console := seen.pop(contract.CONSOLE, "")) and os.path.exists(console):
            is_device = stat.S_ISCHR(os.stat(console).st_mode)
            command += ["--device" if is_device else "--volume", f"{console}:{CONSOLE_IN_CONTAINER}"]
            seen[contract.CONSOLE] = CONSOLE_IN_CONTAINER
        store = urlsplit(seen.get(contract.STORE, ""))
        if store.scheme == "file":
            command += ["--volume", f"{unquote(store.path)}:{unquote(store.path)}"]
        for name, value in sorted(seen.items()):
            command += ["--env", f"{name}={value}"]
        return [*command, self._image, *(["python3"] if is_python else []), *arguments], dict(os.environ)

    def has_obstore(self) -> bool:
        command = ["docker", "run", "--rm", self._image, "python3", "-c", IMPORT_OBSTORE]
        return subprocess.run(command, capture_output=True).returncode == 0

    def kill(self) -> None:
        # A SIGKILL ends docker's client and leaves the container running.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["docker", "kill", self._name], capture_output=True, timeout=KILL_SECONDS)


def prepare(work: Path, orders: Mapping[str, Any], name: str, run_step: RunStep) -> Surroundings:
    """Get ready what `orders` (requirements, container) ask for. Raises ConfigError.

    `name`: of the container. May take minutes; `run_step` is where they go.
    """
    if orders.get("container"):
        return _container(work, orders["container"], name, run_step)
    if orders.get("requirements"):
        return Image(_environment_on_top(work, orders["requirements"], run_step))
    return Image(sys.executable)


def _container(work: Path, image: str, name: str, run_step: RunStep) -> Container:
    if not shutil.which("docker"):
        raise ConfigError(
            f"environment.container is {image!r}, and the machine's image has no docker; choose an image that has it, "
            "or install packages with environment.requirements"
        )
    give_up_at = time.monotonic() + DOCKER_SECONDS
    while (asked := subprocess.run(["docker", "version"], capture_output=True, text=True)).returncode:
        if time.monotonic() > give_up_at:
            raise ConfigError(f"environment.container: docker does not answer on this machine: {asked.stderr.strip()}")
        time.sleep(1.0)
    run_step(["docker", "pull", image], f"environment.container: {image} can't be pulled")
    return Container(image, name, work)


def _environment_on_top(work: Path, requirements: str, run_step: RunStep) -> str:
    """An environment that sees the image's packages and adds the lock file's; its interpreter."""
    folder = work / "env"
    why = f"environment.requirements: {requirements} can't be installed"
    run_step([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)], why)
    python = folder / "bin" / "python"
    if sys.prefix != sys.base_prefix:
        # The image's Python is an environment itself (AWS: /opt/pytorch), and one on top of it would see the packages of
        # the system's Python instead of those. https://docs.python.org/3/library/venv.html
        inner = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        Path(inner, "image.pth").write_text("".join(f"{path}\n" for path in paths))
    if importlib.util.find_spec("pip") is None:
        run_step([str(python), "-m", "ensurepip"], why)
    pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    run_step([str(python), *pip, "--requirement", str(work / "code" / requirements)], why)
    return str(python)


# -- obstore ----------------------------------------------------------------------------------------------------------


def provide_obstore(work: Path, store_url: str, version: str) -> str | None:
    """Make obstore importable where the store needs it: the image's own, the bundle's, or PyPI's `version`.

    The folder it was found in, for the program's PYTHONPATH; None where nothing had to be done. Raises ConfigError.
    """
    if urlsplit(store_url).scheme == "file" or _imports_obstore():
        return None
    carried = vendor_folder(work)
    if carried.is_dir():
        sys.path.append(str(carried))
        if _imports_obstore():
            log.info("obstore is the bundle's")
            return str(carried)
        sys.path.remove(str(carried))
    installed = work / "vendor-pip"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        ran = subprocess.run(
            [*pip, "--target", str(installed), f"obstore=={version}" if version else "obstore"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PIP_SECONDS,
        )
        said = ran.stdout.strip()
    except subprocess.TimeoutExpired:
        said = f"pip took longer than {PIP_SECONDS:.0f} s"
    sys.path.append(str(installed))
    if _imports_obstore():
        log.info("obstore was installed")
        return str(installed)
    raise ConfigError(
        f"the store {store_url} needs the package obstore, which {sys.executable} has not, the bundle brings for another "
        f"platform than {sysconfig.get_platform()}, and pip could not install; add it to the image. pip said:\n{said}"
    )


def vendor_folder(work: Path) -> Path:
    """Where the bundle's packages for this platform are."""
    return work / "vendor" / sysconfig.get_platform()


def obstore_for(around: Surroundings, work: Path, provided: str | None) -> str | None:
    """The folder that the program needs on its PYTHONPATH; None when its own Python has obstore.

    `provided`: what `provide_obstore` returned.
    """
    if provided is None and isinstance(around, Image):
        return None  # the image has it, and an environment on top sees what the image has
    carried = vendor_folder(work)
    folder = provided or (str(carried) if carried.is_dir() else None)
    return None if folder is None or around.has_obstore() else folder


def _imports_obstore() -> bool:
    importlib.invalidate_caches()
    try:
        importlib.import_module("obstore")
    except ImportError:
        return False
    return True
