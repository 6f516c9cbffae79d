"""The process beside a gateway that checks grammars: `python -m` this module.

A schema is a program: intersected patterns may take forever or a lot of memory, and nothing stops that from
within. So each check has a budget of CPU time after which the kernel ends this process, and the gateway
starts another.
"""

from __future__ import annotations

import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from tidegate.gateway.constraints import CPU_SECONDS, LENGTH, Checked, Constraint
from tidegate.gateway.grammars import check

MEMORY_BYTES = 1 << 29


def main() -> None:
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    serve(sys.stdin.buffer, sys.stdout.buffer)


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer one constraint after the other until there are no more."""
    constraints = msgspec.json.Decoder(Constraint)  # which holds numbers of any size
    while head := incoming.read(LENGTH.size):
        frame = incoming.read(LENGTH.unpack(head)[0])
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            checked = check(constraints.decode(frame))
        except MemoryError:
            checked = Checked(refusal="it takes too much memory to compile; simplify it")
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply = msgspec.msgpack.encode(checked)
        outgoing.write(LENGTH.pack(len(reply)) + reply)
        outgoing.flush()


if __name__ == "__main__":
    main()
