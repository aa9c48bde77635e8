"""The start-up script that every machine of every cloud boots with."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files

from holdfast.errors import ConfigError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
INDENTATION = re.compile(r"^(?: {4})+", re.MULTILINE)
PYTHON = "HOLDFAST_PYTHON"
"""Path of the machine's interpreter; unset: the first of those that images bring."""
MAX_RUN_SECONDS = "HOLDFAST_MAX_RUN_SECONDS"
"""The machine powers itself off after so long, whatever it does; seconds of the cloud's clock."""
MAX_USER_DATA_BYTES = 16 * 1024
"""EC2's, before base64: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/user-data.html"""


def machine_environment(python: str, max_run_seconds: float) -> dict[str, str]:
    """What startup.sh itself reads: the interpreter, where the job names one, and when the machine ends in any case."""
    named = {PYTHON: python} if python else {}
    return {**named, MAX_RUN_SECONDS: f"{max_run_seconds:.0f}"}


def startup_script(environment: Mapping[str, str]) -> str:
    """User data: `environment` as quoted exports, the fetcher, then startup.sh.

    Raises ConfigError for a name no shell takes, and for more than a machine can be given.
    """
    for name in environment:
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"environment variable {name!r}: use letters, digits and underscores only")
    # Shellcheck wonders at values with $ or a backslash in single quotes: that nothing in them is expanded is the point.
    script = f"#!/bin/bash\n# shellcheck disable=SC1003,SC2016\n{exports(environment)}{_boot()}"
    if len(script.encode()) > MAX_USER_DATA_BYTES:
        raise ConfigError(
            f"the machine's environment makes {len(script.encode())} bytes of user data, over the {MAX_USER_DATA_BYTES} "
            f"that EC2 takes; shorten {max(environment, key=lambda name: len(environment[name]))}"
        )
    return script


def exports(environment: Mapping[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))


@functools.cache
def _boot() -> str:
    """fetch.py as a shell function that prints it, and startup.sh; without what only people read, to save room."""
    ours = files("holdfast.runtime")
    tree = _Shorten().visit(ast.parse(ours.joinpath("fetch.py").read_text()))
    fetcher = INDENTATION.sub(lambda found: found[0][::4], ast.unparse(ast.fix_missing_locations(tree)))
    fetcher = fetcher.replace("\n\n", "\n")
    lines = ours.joinpath("startup.sh").read_text().splitlines()
    script = "\n".join(line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return f"fetcher() {{\ncat << 'EOF'\n{fetcher}\nEOF\n}}\n{script}\n"


class _Shorten(ast.NodeTransformer):
    """Takes out docstrings and annotations, and the causes of errors, which are shown without; imports in one line."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        imports = [statement for statement in node.body if isinstance(statement, ast.Import)]
        others = [statement for statement in node.body if not isinstance(statement, ast.Import)]
        node.body = [ast.Import([name for statement in imports for name in statement.names]), *others]
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.Raise(node.exc, None)

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module in ("__future__", "typing") else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)


SHUTDOWN_SCRIPT = """#!/bin/bash
# GCP runs this when the machine is told to stop, from the folder that the start-up script was run from.
# The agent turns SIGTERM into a notice.
kill -TERM "$(cat "${HOLDFAST_WORK:-$PWD}/work/agent.pid")"
"""
