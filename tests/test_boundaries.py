"""What may know what: the machine needs a Python and nothing else, placement touches nothing, the wheel is the library."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

REPOSITORY = Path(__file__).parents[1]
SOURCES = REPOSITORY / "src"
ON_THE_MACHINE = ("holdfast.checkpoint", "holdfast.runtime", "holdfast.storage", "holdfast.queues")
CLOUDS_AND_FLOWS = ("prefect", "boto3", "botocore", "google")
NOT_IN_THE_IMAGE = ("pydantic", "yaml", "psutil", "numpy", "torch")
IMPORT_ALL_OF = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"refused: {name}")

packages, REFUSED = sys.argv[1].split(), sys.argv[2].split()
sys.meta_path.insert(0, Refuse())
for name in REFUSED:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert str(error) == f"refused: {name}"
    else:
        sys.exit(f"{name} could be imported: this proves nothing")
for package in packages:
    for module in [package, *(m.name for m in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."))]:
        # The first runs the agent, the others import the library that they adapt.
        if not module.endswith(".__main__") and not module.startswith("holdfast.adapters."):
            importlib.import_module(module)
            print(module)
"""


def modules(*packages: str) -> set[str]:
    """By their files, so that none is forgotten."""
    found = set()
    for package in packages:
        for path in (SOURCES / package.replace(".", "/")).rglob("*.py"):
            name = ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
            found |= {name} - {f"{package}.__main__"}
    return found


def import_all(packages: tuple[str, ...], refused: tuple[str, ...], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", IMPORT_ALL_OF, " ".join(packages), " ".join(refused)],
        env={"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
    )


def test_what_runs_on_the_machine_needs_neither_prefect_nor_a_cloud_s_library_nor_torch() -> None:
    ran = import_all(ON_THE_MACHINE, CLOUDS_AND_FLOWS + NOT_IN_THE_IMAGE)
    assert ran.returncode == 0, ran.stderr
    assert set(ran.stdout.split()) == modules(*ON_THE_MACHINE)


def test_what_runs_on_the_machine_needs_no_installed_package_at_all() -> None:
    ran = import_all(ON_THE_MACHINE, (), "-S")
    assert ran.returncode == 0, ran.stderr


def test_the_import_hook_of_these_tests_refuses_what_it_says() -> None:
    assert "refused: psutil" in import_all(("holdfast.drivers.local",), ("psutil",)).stderr
    assert "refused: pydantic" in import_all(("holdfast.supervision",), ("pydantic",)).stderr


def test_the_whole_library_imports_without_prefect() -> None:
    ran = import_all(("holdfast",), ("prefect", "boto3", "botocore", "google"))
    assert ran.returncode == 0, ran.stderr
    assert "holdfast.supervision.training_run" in ran.stdout.split()


def imported_by(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources(package: str) -> list[Path]:
    return sorted((SOURCES / package.replace(".", "/")).rglob("*.py"))


@pytest.mark.parametrize("path", sources("holdfast.placement"), ids=lambda path: path.name)
def test_placement_does_no_io_and_does_not_ask_what_time_it_is(path: Path) -> None:
    touching = {"os", "io", "subprocess", "socket", "pathlib", "shutil", "urllib", "http", "time", "random", "logging"}
    assert {name.partition(".")[0] for name in imported_by(path)} & touching == set()
    calls = {node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    names = {
        call.id if isinstance(call, ast.Name) else call.attr
        for call in calls
        if hasattr(call, "id") or hasattr(call, "attr")
    }
    assert names & {"open", "print", "now", "utcnow", "today"} == set()


@pytest.mark.parametrize("package", ON_THE_MACHINE)
def test_what_runs_on_the_machine_knows_no_driver_and_no_policy(package: str) -> None:
    forbidden = ("holdfast.drivers", "holdfast.placement", "holdfast.supervision", "holdfast.ledger", "holdfast.model")
    for path in sources(package):
        assert not [name for name in imported_by(path) if name.startswith(forbidden)], path


@pytest.mark.parametrize("package", ["flows", "tasks", "holdfast.placement", "holdfast.supervision", "holdfast.ledger"])
def test_nobody_asks_whether_a_cloud_is_the_local_one(package: str) -> None:
    """Only who makes the local cloud knows it: the demonstration, the rehearsal, the simulation and the block of its account."""
    root = SOURCES if package.startswith("holdfast") else REPOSITORY
    makers = {"demo.py", "rehearse.py", "rehearsal.py", "simulate_command.py"}
    for path in sorted((root / package.replace(".", "/")).rglob("*.py")):
        if path.name not in makers:
            assert not [name for name in imported_by(path) if name.startswith("holdfast.drivers.local")], path


def test_the_wheel_holds_the_library_and_nothing_of_the_application() -> None:
    tool = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = find_packages(
        **{**tool["packages"]["find"], "where": str(REPOSITORY / tool["packages"]["find"]["where"][0])}
    )
    assert {name.partition(".")[0] for name in shipped} == {"holdfast"}
    assert {path.parent for path in sources("holdfast")} == {SOURCES / name.replace(".", "/") for name in shipped}
    scripts = {path.relative_to(SOURCES) for path in SOURCES.rglob("*.sh")}
    assert scripts == {Path("holdfast/runtime/startup.sh")}
    assert tool["package-data"] == {"holdfast.runtime": ["*.sh"], "holdfast.market": ["*.csv"]}


@pytest.mark.parametrize("package", ["flows", "tasks", "blocks"])
def test_our_names_are_packages_of_their_own_so_that_no_installed_one_wins(package: str) -> None:
    assert (REPOSITORY / package / "__init__.py").is_file()
