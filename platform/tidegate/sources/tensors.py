"""Reads the headers of safetensors files, and single bytes of their tensors. It loads no weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from tidegate.errors import SourceError

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own bound
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
PAGE_BYTES = 4096  # of a tensor that is looked at
LFS_POINTER = b"version https://git-lfs"
MOST_LFS_BYTES = 1024  # the pointer format's own bound


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor where it lies: `start` is the offset of its first byte in `file`."""

    name: str
    file: Path
    kind: str  # as safetensors names types: F32, BF16, I32, ...
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def pages(self) -> list[range]:
        """Return the places in `file` of its first, middle and last page; of all of it where that is less."""
        if self.size <= 3 * PAGE_BYTES:
            return [range(self.start, self.start + self.size)]
        starts = (0, (self.size - PAGE_BYTES) // 2, self.size - PAGE_BYTES)
        return [range(self.start + each, self.start + each + PAGE_BYTES) for each in starts]

    def raw_row(self, index: int, columns: int) -> bytes:
        """Read the first `columns` numbers of one row of an I32 matrix; a vector is its row 0."""
        with self.file.open("rb") as file:
            file.seek(self.start + 4 * index * self.shape[-1])
            return file.read(4 * columns)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by their names. Raises `SourceError`."""
    try:
        with path.open("rb") as file:
            first = file.read(8)
            if LFS_POINTER.startswith(first):
                raise lfs_pointer(path)
            (length,) = struct.unpack("<Q", first)
            if length > MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        if path.stat().st_size < max((each.start + each.size for each in found.values()), default=0):
            raise ValueError("the file ends too early")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        message = f"{path} is not a whole safetensors file: {error}; download or copy it again."
        raise SourceError("SourceFormat", message) from error
    return found


def lfs_pointer(path: Path) -> SourceError:
    return SourceError(
        "SourceFormat",
        f"{path} is a git-LFS pointer and not the file itself: run `git lfs pull` there, or download it "
        "again.",
    )


def _tensor(path: Path, name: str, entry: dict[str, object], data: int) -> StoredTensor:
    kind, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"{name} has no shape or no place")
    begin, end = offsets
    found = StoredTensor(name, path, kind, tuple(int(side) for side in shape), data + begin, end - begin)
    if found.size != found.count * ITEM_BYTES.get(kind, 0) and kind in ITEM_BYTES:
        raise ValueError(f"{name} has {found.size} bytes, but its shape {list(shape)} of {kind} takes others")
    return found
