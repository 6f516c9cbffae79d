"""Frames on a socket between a replica and a process of its own: a length, and so many bytes."""

from __future__ import annotations

import socket
import struct

LENGTH = struct.Struct("<I")
PART_BYTES = 1 << 20  # read at once


def send(lane: socket.socket, frame: bytes) -> None:
    lane.sendall(LENGTH.pack(len(frame)) + frame)


def receive(lane: socket.socket) -> bytes | None:
    """Returns None where the lane is closed."""
    head = _receive(lane, LENGTH.size)
    return None if head is None else _receive(lane, LENGTH.unpack(head)[0])


def _receive(lane: socket.socket, size: int) -> bytes | None:
    got = bytearray()
    while len(got) < size:
        part = lane.recv(min(size - len(got), PART_BYTES))
        if not part:
            return None
        got += part
    return bytes(got)
