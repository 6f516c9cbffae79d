"""Where the replicas of a node leave files for those that come after them: of this user alone."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from tidegate.replica_args import NODE_FOLDER_VARIABLE, ReplicaArgs, find_redis_url

CHECKS = "checks"  # what self-checks found; see `engines.transformers.check_record`
PARKED = "parked"  # see `parking`


def folder(kind: str) -> Path:
    """Return the node's folder of this kind, made where there is none: where the host says, or among the
    system's temporary ones. Raises `OSError` where it is somebody else's, or open to others."""
    given = os.environ.get(NODE_FOLDER_VARIABLE)
    found = Path(given, kind) if given else Path(tempfile.gettempdir(), f"tidegate-{kind}-{os.getuid()}")
    found.mkdir(mode=0o700, parents=bool(given), exist_ok=True)
    is_what = found.lstat()
    if not stat.S_ISDIR(is_what.st_mode) or is_what.st_uid != os.getuid() or is_what.st_mode & 0o077:
        raise PermissionError(f"{found} is not a folder of this user alone")
    return found


def name_of(args: ReplicaArgs) -> str:
    """Name a revision; another platform's has another."""
    whose = (find_redis_url(args.redis_url), args.key_prefix, args.model, args.revision)
    return hashlib.sha256("\0".join(whose).encode()).hexdigest()[:32]


def check_record(args: ReplicaArgs) -> Path | None:
    """Return the file in which this node remembers the self-check of a revision; None where it has none."""
    with suppress(OSError):
        return folder(CHECKS) / name_of(args)
    return None
