"""`holdfast checkpoints`: what is in a run's checkpoints, whether it is whole, where two differ; export, import, prune."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from flows.checkpoints_display import (
    facts_of,
    instant,
    print_comparison,
    progress_bar,
    size,
    table_of,
    terminal,
    verdict,
)
from flows.server import prefect_server
from holdfast.checkpoint import inspection
from holdfast.errors import ConfigError, DamagedCheckpointError
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import DirectoryStore, ObjectStore, open_store

DEFAULT_STORE = ".holdfast"
ALL = "all"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("checkpoints", help="look at a run's checkpoints, verify, compare, export, prune them")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, command: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = verbs.add_parser(name, help=help)
        added.add_argument(
            "--store",
            default=DEFAULT_STORE,
            help=f"a folder, a URL (file://, s3://, gs://), or the name of a store block (default: the folder {DEFAULT_STORE})",
        )
        added.set_defaults(command=_interruptible(command))
        return added

    which = f"'{inspection.NEWEST}' (the default), a step, or an id such as 0002-000000000070"
    listed = verb("list", list_command, "a run's checkpoints, or the runs that have some")
    listed.add_argument("run", nargs="?", default="", help="id of a run")
    show = verb("show", show_command, "what a checkpoint holds and says of itself, and whether it is whole")
    check = verb("verify", verify_command, "read every byte of a checkpoint, or of all, and say what is damaged")
    export = verb("export", export_command, "write a checkpoint for programs that know nothing of Holdfast")
    for one in (show, check, export):
        one.add_argument("run", help="id of a run")
        also = f"; '{ALL}': each of the run's" if one is check else ""
        one.add_argument("checkpoint", nargs="?", default=inspection.NEWEST, help=which + also)
    diff = verb("diff", diff_command, "where two checkpoints differ; status 1 when their states do")
    diff.add_argument("which", nargs="+", metavar="WHICH", help="RUN A B, or RUN@A OTHER-RUN@B")
    export.add_argument(
        "--to",
        type=Path,
        required=True,
        help="FILE.safetensors, FILE.pt, or a folder (DCP, or a directory checkpoint's files)",
    )
    export.add_argument(
        "--component", default="", help="only this one, as attach() was told (.safetensors: default model)"
    )
    export.add_argument(
        "--rename", action="append", default=[], metavar="COMPONENT=KEY", help="of a DCP folder: the key it gets"
    )
    taken = verb("import", import_command, "begin a run where another program's checkpoint ends")
    taken.add_argument("path", type=Path, help="a DCP folder, a torch.save file or a safetensors file")
    taken.add_argument("--run", required=True, help="id of the new run")
    taken.add_argument("--step", type=int, required=True, help="how many steps were done")
    taken.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="KEY=NAME",
        help="the name that attach() is told; nothing after the = leaves it out",
    )
    prune = verb("prune", prune_command, "delete old checkpoints")
    prune.add_argument("run", help="id of a run")
    prune.add_argument(
        "--keep", type=int, required=True, help="how many of the newest stay; the newest that is whole always does"
    )
    prune.add_argument(
        "--list", action="store_true", dest="only_list", help="say what would be deleted, and delete nothing"
    )


def store_of(name: str) -> ObjectStore:
    """Folders and URLs need no Prefect. Raises ConfigError."""
    if name.startswith("file://") or ("://" not in name and (name.startswith(".") or "/" in name)):
        return open_store(name)
    if "://" in name:
        from blocks.store import CheckpointStore

        return CheckpointStore(url=name).store()
    with prefect_server():
        from blocks import load_store

        return load_store(name).store()


def existing_store_of(name: str) -> ObjectStore:
    """The same, unless it is a folder that is not there."""
    store = store_of(name)
    if isinstance(store, DirectoryStore) and not store.root.is_dir():
        raise ConfigError(f"store {name!r}: there is no folder {store.root}")
    return store


# -- looking ----------------------------------------------------------------------------------------------------------


def list_command(options: argparse.Namespace) -> int:
    store = existing_store_of(options.store)
    if not options.run:
        return _list_runs(store, options.store)
    table = table_of("checkpoint", "step", "attempt", "kind", "ranks", "size", "made at", "parent", "")
    damaged = 0
    for one in inspection.glance(store, options.run):
        damaged += bool(one.problem)
        table.add_row(
            str(one.id), str(one.id.step), str(one.id.attempt), one.kind, str(one.world_size), size(one.size_bytes),
            instant(one.manifest), one.manifest.get("parent") or "", verdict(one.problem),
        )  # fmt: skip
    terminal().print(table)
    return 1 if damaged else 0


def show_command(options: argparse.Namespace) -> int:
    store = existing_store_of(options.store)
    checkpoint = inspection.find(store, options.run, options.checkpoint)
    look = next(one for one in inspection.glance(store, options.run) if one.id == checkpoint)
    problem, holds = look.problem, []
    if look.manifest:
        try:
            with progress_bar(f"reading {checkpoint}", look.bytes_to_read) as advance:
                inspection.verify(store, options.run, checkpoint, advance)
            if look.kind == "state":
                holds = inspection.holdings(inspection.open_state(store, options.run, checkpoint))
        except DamagedCheckpointError as error:
            problem = problem or str(error)
    out = terminal()
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in facts_of(options.run, look, problem):
        facts.add_row(name, escape(value) if name != "state" else value)
    out.print(facts)
    if holds:
        table = table_of("component", "tensors", "elements", "size")
        for one in holds:
            table.add_row(escape(one.name), str(one.tensors), f"{one.elements:,}", size(one.size_bytes))
        out.print(table)
    if look.manifest:
        table = table_of("object", "size", "checksum")
        for name, entry in look.manifest["objects"].items():
            sums = (
                f"SHA-256 {entry['sha256'][:16]}…" if "sha256" in entry else f"CRC-32 of {len(entry['crc32'])} pieces"
            )
            table.add_row(escape(name), size(entry["size_bytes"]), sums)
        out.print(table)
    return 1 if problem else 0


def verify_command(options: argparse.Namespace) -> int:
    store = existing_store_of(options.store)
    looks = inspection.glance(store, options.run)
    if options.checkpoint != ALL:
        chosen = inspection.find(store, options.run, options.checkpoint)
        looks = [one for one in looks if one.id == chosen]
    damaged = 0
    with progress_bar("verifying", sum(one.bytes_to_read for one in looks)) as advance:
        for one in looks:
            problem = ""
            try:
                inspection.verify(store, options.run, one.id, advance)
            except (DamagedCheckpointError, ConfigError) as error:
                problem = str(error)
                damaged += 1
            terminal().print(f"{one.id}  {size(one.size_bytes):>9}  {verdict(problem, read=True)}", soft_wrap=True)
    return 1 if damaged else 0


def diff_command(options: argparse.Namespace) -> int:
    from holdfast.checkpoint.comparison import compare_files, compare_states

    store = existing_store_of(options.store)
    (run, which), (other_run, other_which) = _two(options.which)
    here, there = inspection.find(store, run, which), inspection.find(store, other_run, other_which)
    looks = [
        next(one for one in inspection.glance(store, name) if one.id == one_id)
        for name, one_id in ((run, here), (other_run, there))
    ]
    for look in looks:
        if look.problem:
            raise DamagedCheckpointError(f"{look.id}: {look.problem}")
    if looks[0].kind != looks[1].kind:
        raise ConfigError(f"{here} is a {looks[0].kind}, {there} a {looks[1].kind}: they can't be compared")
    if looks[0].kind == "state":
        with progress_bar("comparing", sum(look.bytes_to_read for look in looks)) as advance:
            found = compare_states(
                inspection.open_state(store, run, here), inspection.open_state(store, other_run, there), advance
            )
    else:
        found = compare_files(looks[0].manifest, looks[1].manifest)
    print_comparison(
        found,
        f"{run}@{here}" if run != other_run else str(here),
        f"{other_run}@{there}" if run != other_run else str(there),
    )
    return 0 if found.same_state else 1


# -- writing ----------------------------------------------------------------------------------------------------------


def export_command(options: argparse.Namespace) -> int:
    from holdfast.checkpoint import export
    from holdfast.checkpoint.commits import Checkpoints

    store = existing_store_of(options.store)
    checkpoint = inspection.find(store, options.run, options.checkpoint)
    manifest = Checkpoints(store, options.run).manifest(checkpoint)
    suffix, to, component = options.to.suffix.lower(), options.to, options.component
    if re.match("[a-z0-9]+:/", str(to)):
        raise ConfigError(f"--to {to}: an export is written to this computer; name a file or folder, and copy it then")
    if suffix in (".bin", ".ckpt", ".pickle", ".pkl", ".tar", ".zip"):
        raise ConfigError(f"--to {to}: write .safetensors or .pt for a file, and no such ending for a folder")
    if options.rename and suffix in (".safetensors", ".pt", ".pth"):
        raise ConfigError("--rename is for DCP folders: the other files are loaded by component")
    if manifest.get("kind") != "state" or component == "files":
        total = sum(entry["size_bytes"] for entry in manifest["objects"].values())
        with progress_bar(f"exporting {checkpoint}", total) as advance:
            left_out = export.to_folder(store, options.run, checkpoint, manifest, to, advance)
    else:
        content = inspection.open_state(store, options.run, checkpoint)
        if suffix == ".safetensors":
            component = component or "model"
        total = export.size_of(content, component)
        with progress_bar(f"exporting {checkpoint}", total) as advance:
            if suffix == ".safetensors":
                left_out = export.to_safetensors(content, to, component, advance)
            elif suffix in (".pt", ".pth"):
                left_out = export.to_torch_file(content, to, component, advance)
            else:
                left_out = export.to_dcp(content, to, component, _names(options.rename), advance)
    written = sum(path.stat().st_size for path in ([to] if to.is_file() else to.rglob("*")) if path.is_file())
    terminal().print(
        f"{checkpoint} of run {escape(options.run)} -> {escape(str(to))} ({size(written)})", soft_wrap=True
    )
    if left_out:
        terminal().print(f"left out, since no tensors: {escape(', '.join(left_out))}", soft_wrap=True)
    return 0


def import_command(options: argparse.Namespace) -> int:
    from holdfast.checkpoint.importing import as_components, import_state, read_program_state
    from holdfast.supervision.opening import RUN_ID

    if not RUN_ID.fullmatch(options.run):
        raise ConfigError(f"--run {options.run}: a run's id has small letters, digits and hyphens, 80 at most")
    store = store_of(options.store)
    _refuse_live(store, options.run, "nothing is imported into it")
    state = read_program_state(options.path)
    components, values, random_states = as_components(state, _names(options.rename))
    checkpoint = import_state(store, options.run, options.step, components, values, random_states, options.path.name)
    out = terminal()
    out.print(
        f"run {escape(options.run)} begins with checkpoint {checkpoint}: attach() is to be given {escape(', '.join(components))}",
        soft_wrap=True,
    )
    if values:
        out.print(f"in run.state: {escape(', '.join(map(str, values)))}", soft_wrap=True)
    if not random_states:
        out.print("no random states were in it: the program goes on with those that it begins with")
    return 0


def prune_command(options: argparse.Namespace) -> int:
    store = existing_store_of(options.store)
    if options.keep < (least := _kept_while_live(store, options.run)):
        _refuse_live(store, options.run, f"it keeps {least}: give --keep {least} or more, or wait for its end")
    looks = {one.id: one for one in inspection.glance(store, options.run)}
    with progress_bar("looking for the newest whole one", None) as advance:
        doomed = inspection.superfluous(store, options.run, options.keep, advance)
    if not options.only_list:
        inspection.remove(store, options.run, doomed)
    out = terminal()
    for one in doomed:
        out.print(f"{'would delete' if options.only_list else 'deleted'} {one}  {size(looks[one].size_bytes)}")
    freed = size(sum(looks[one].size_bytes for one in doomed))
    out.print(f"{len(doomed)} of {len(looks)} checkpoints, {freed}; {len(looks) - len(doomed)} stay")
    return 0


# -- live runs --------------------------------------------------------------------------------------------------------


def _is_live(store: ObjectStore, run: str) -> bool:
    """Does a flow work on it? A program that was started by hand is not seen."""
    from holdfast.supervision.ownership import Ownership

    return Ownership(store, _base(run)).has_live_owner()


def _refuse_live(store: ObjectStore, run: str, why: str) -> None:
    if _is_live(store, run):
        raise ConfigError(f"run {run!r} is being worked on, and {why}")


def _kept_while_live(store: ObjectStore, run: str) -> int:
    """How many checkpoints the run's job keeps; 0 where nobody knows."""
    from holdfast.ledger.journal import Journal

    for entry in Journal(store, journal_prefix(_base(run))).read():
        if entry.kind == "run-started":
            kept = (entry.fields.get("job") or {}).get("checkpointing") or {}
            return int(kept.get("max_to_keep") or 0)
    return 0


def _base(run: str) -> str:
    return run.partition("/members/")[0]


# -- arguments --------------------------------------------------------------------------------------------------------


def _list_runs(store: ObjectStore, name: str) -> int:
    found = inspection.runs(store)
    if not found:
        terminal().print(f"no run has a checkpoint in {escape(name)}")
        return 0
    table = table_of("run", "checkpoints", "newest")
    for run, ids in found.items():
        table.add_row(escape(run), str(len(ids)), str(ids[-1]))
    terminal().print(table)
    return 0


def _two(which: list[str]) -> list[tuple[str, str]]:
    if len(which) == 3 and "@" not in "".join(which):
        return [(which[0], which[1]), (which[0], which[2])]
    if len(which) == 2 and all("@" in one for one in which):
        return [(run, checkpoint) for run, _, checkpoint in (one.rpartition("@") for one in which)]
    raise ConfigError(f"diff {' '.join(which)}: write diff RUN A B, or diff RUN@A OTHER-RUN@B")


def _names(pairs: list[str]) -> dict[str, str]:
    for one in pairs:
        if not re.fullmatch(r"[^=]+=[^=]*", one):
            raise ConfigError(f"--rename {one}: write OLD=NEW")
    return {old: new for old, _, new in (one.partition("=") for one in pairs)}


def _interruptible(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run
