"""Weights that stay in the memory of their node while their model sleeps (`scaling.zero: Parked`).

    last replica leaves ──leave_to_holder──> holder (`parking_holder`): copies the files into memory of its
                                own, seals it, tells the registry; ends when nobody wants them any more
    next replica ──borrow──> opens the holder's memory as files, and loads from them as from any folder

A holder's memory is a `memfd` per file: it cannot be paged out as a file's cache is, needs no right to lock
memory, cannot be written any more by anybody, and is gone with the holder and with who has it open.

What always holds.
- What is borrowed is what the holder copied, by device and inode, and the source's files are still those that
  it copied, by inode, size and time. Else, and wherever anything is amiss, the replica reads its folder.
- What was copied had the revision's digest, where the revision has one: looking again would prove no more.
- A holder has its place's lock as long as it lives. A place without a holder is of no use to anybody.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tidegate.replica_args import ReplicaArgs
from tidegate.serving import node_files

HOLDER = "tidegate.serving.parking_holder"
LOCK, MANIFEST, BYTES = "lock", "manifest.json", "bytes"  # of a place
ADMISSION = "admission"  # the lock under which places are taken
OWNER = ".owner"  # of a folder that shows a holder's memory; who reads checkpoints leaves hidden files out

Identity = tuple[int, ...]  # of a file


class HeldFile(msgspec.Struct, frozen=True):
    """A file in the holder's memory: its descriptor there, what it is, and what it was copied from."""

    name: str
    descriptor: int
    held: Identity
    source: Identity
    is_weights: bool


class Manifest(msgspec.Struct, frozen=True):
    pid: int
    digest: str
    files: list[HeldFile]


class HolderArgs(msgspec.Struct, frozen=True):
    """`leaving` is the replica's process, `node` the one that a holder must not outlive: Ray's."""

    replica: ReplicaArgs
    leaving: int
    node: int


@dataclass(slots=True)
class Borrowed:
    """A folder that shows a holder's memory, as long as this process has it open."""

    path: Path
    bytes: int
    _weights: list[int]
    _others: list[int]

    def loaded(self) -> None:
        """The weights are in the engine. What is small stays: a process that prepares prompts may start
        again."""
        _close(self._weights)

    def close(self) -> None:
        self.loaded()
        _close(self._others)
        shutil.rmtree(self.path, ignore_errors=True)


def leave_to_holder(args: ReplicaArgs) -> None:
    """Start a holder, where there is none, that waits until this process is gone. Raises `OSError`. It leaves
    its parent at once: Ray ends the children of a worker with it."""
    if is_held(place_of(args)):
        return
    held = HolderArgs(args, os.getpid(), os.getppid())
    subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-m", HOLDER, msgspec.json.encode(held).decode()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )


def borrow(args: ReplicaArgs) -> Borrowed | None:
    """Return what a holder has of this revision; None where nothing, or nothing that is sure. Blocks."""
    try:
        place = place_of(args)
        if not is_held(place):
            return None
        manifest = msgspec.json.decode((place / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None
    if manifest.digest != args.digest:
        return None
    opened: list[int] = []
    try:
        for each in manifest.files:
            opened.append(os.open(f"/proc/{manifest.pid}/fd/{each.descriptor}", os.O_RDONLY | os.O_CLOEXEC))
            if identity(os.fstat(opened[-1])) != each.held:
                raise OSError("another holder came in its place")
            if identity((Path(args.engine.path) / each.name).stat()) != each.source:
                raise OSError("the source has changed")
        path = _shown(place.name, manifest.files, opened)
    except OSError:
        _close(opened)
        return None
    files = list(zip(manifest.files, opened, strict=True))
    return Borrowed(
        path,
        sum(each.held[2] for each in manifest.files),
        [descriptor for each, descriptor in files if each.is_weights],
        [descriptor for each, descriptor in files if not each.is_weights],
    )


def root() -> Path:
    """The folder of this machine's places. Raises `OSError` where it is somebody else's."""
    return node_files.folder(node_files.PARKED)


def place_of(args: ReplicaArgs) -> Path:
    """Where a holder of this revision tells of itself."""
    return root() / node_files.name_of(args)


def identity(found: os.stat_result) -> Identity:
    """What tells a file from another, and from itself with other contents."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def is_held(place: Path) -> bool:
    """Whether a holder lives."""
    with suppress(FileNotFoundError), locked(place / LOCK, wait=False) as got:
        return not got
    return False


@contextmanager
def locked(file: Path, *, wait: bool = True, makes: bool = False) -> Iterator[bool]:
    """Have the lock of a file, or False where another process has it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if makes else 0), 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _shown(name: str, files: Iterable[HeldFile], descriptors: Iterable[int]) -> Path:
    """Make a folder with a link to each descriptor of this process, which its children can follow too. It has
    the same path in each waking where that is free: what an engine compiles may be kept by it."""
    with locked(root() / ADMISSION, makes=True):
        folder = next(filter(_is_free, (root() / f"{name}-{count}" for count in itertools.count())))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        (folder / OWNER).write_text(str(os.getpid()))
    for each, descriptor in zip(files, descriptors, strict=True):
        link = folder / each.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
    return folder


def _is_free(folder: Path) -> bool:
    """Whether nobody shows anything there; who was killed left links that lead nowhere."""
    try:
        return not Path(f"/proc/{int((folder / OWNER).read_text())}").exists()
    except (OSError, ValueError):
        return True


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
