"""A directory of files, committed as a whole and restored as a whole. Needs no PyTorch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.errors import AlreadyExistsError, ConfigError, DamagedCheckpointError
from holdfast.storage import ObjectStore
from holdfast.storage.keys import is_key

KIND = "directory"
FILES = "files/"
PIECE_BYTES = 4 * 1024 * 1024


class FolderCommitter:
    """Commits folders for one attempt of a run."""

    def __init__(self, store: ObjectStore, run_id: str, attempt: int, policy: CheckpointPolicy) -> None:
        self._checkpoints = Checkpoints(store, run_id)
        self._attempt, self._policy = attempt, policy
        self._resumed: CheckpointId | None = None
        self.damaged: list[tuple[str, str]] = []
        """Name and error of each checkpoint that was found damaged."""

    def commit(self, folder: Path, step: int, extra: dict[str, Any] | None = None) -> int:
        """Make the folder's files durable as the checkpoint of `step`; their bytes.

        Raises ConfigError for what is no plain file, TransientError when the store can't take it now.
        """
        if self._checkpoints.superseded(self._attempt):
            raise ConfigError(f"attempt {self._attempt} was replaced by a later one: it commits nothing any more")
        files = {FILES + name: file_pieces(path) for name, path in plain_files(folder)}
        manifest = {"kind": KIND, "attempt": self._attempt, "step": step, **(extra or {})}
        try:
            size_bytes = self._checkpoints.commit(CheckpointId(self._attempt, step), files, manifest)
        except AlreadyExistsError:
            return 0
        self._checkpoints.prune(self._attempt, self._policy.max_to_keep)
        return size_bytes

    def restore(self, into: Path) -> tuple[int, Path] | None:
        """Write the newest whole folder to `<into>/<step>`; its step and place, or None when there is none.

        Raises ConfigError when there are checkpoints and none is whole.
        """
        return self._checkpoints.newest_valid(
            lambda checkpoint, manifest: self._restore(checkpoint, manifest, into),
            lambda checkpoint, error: self.damaged.append((str(checkpoint), error)),
        )

    def _restore(self, checkpoint: CheckpointId, manifest: dict[str, Any], into: Path) -> tuple[int, Path] | None:
        if manifest.get("kind") != KIND:
            return None
        staged, target = into / f"{checkpoint.step}.restoring", into / str(checkpoint.step)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for name in manifest["objects"]:
            relative = PurePosixPath(name.removeprefix(FILES))
            if relative.is_absolute() or ".." in relative.parts:
                raise DamagedCheckpointError(f"{checkpoint} has a file outside its folder: {name!r}")
            path = staged / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._checkpoints.read(checkpoint, manifest, name))
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        return checkpoint.step, target


def folder_given(directory: str | Path | None) -> Path | None:
    """What `attach` was told: where its files really are. Raises ConfigError for what is no folder, and for files that could not be saved."""
    if directory is None or directory == "":
        return None
    if not isinstance(directory, str | Path):
        raise ConfigError(f"attach(directory={directory!r}): it must be the path of a folder")
    folder = Path(directory).resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"attach(directory={str(directory)!r}): that is a file; name the folder that it lies in")
    for _ in plain_files(folder):
        pass
    return folder


def plain_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative name and path of every file. Raises ConfigError for links and special files, which would not come back,
    and for names that no object of a store can have. A file that is gone again when it is looked at is left out.
    """
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names + [one for one in folders if Path(parent, one).is_symlink()]):
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file():
                if not os.path.lexists(path):
                    continue
                raise ConfigError(f"checkpoint folder: {path} is no plain file; write a copy instead of a link")
            relative = path.relative_to(folder).as_posix()
            if not _is_name(relative):
                raise ConfigError(
                    f"checkpoint folder: a file is called {relative!r}, which no object of a store can be; rename it"
                )
            yield relative, path


def _is_name(relative: str) -> bool:
    try:
        return is_key(FILES + relative)
    except UnicodeEncodeError:
        return False


def copy_of(folder: Path) -> Path:
    """The same files in a temporary folder, for a commit that takes a while. Raises OSError and ConfigError; there is no
    copy then.
    """
    copy = Path(tempfile.mkdtemp(prefix="holdfast-snapshot-"))
    try:
        for name, path in plain_files(folder):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed just now
                shutil.copyfile(path, target)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Have the folder hold these, by their names in a checkpoint, and nothing else. The folder itself stays: it may be a
    mount point.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    for name, body in files.items():
        relative = PurePosixPath(name.removeprefix(FILES))
        if relative.is_absolute() or ".." in relative.parts:
            raise DamagedCheckpointError(f"a file outside its folder: {name!r}")
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def file_pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
