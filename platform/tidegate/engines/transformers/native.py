"""Compiles and loads operators of our own for what PyTorch computes slowly on some processors (ADR 31).

Each is one file of C beside this one, for PyTorch's stable interface: it needs neither PyTorch's headers nor
C++, only a C compiler, where it first runs or when an image is made (`python -m` and this module's name).
What uses one asks whether it is there, and has another way where it is not.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs
import torch

log = logging.getLogger(__name__)

FOLDER = Path(sys.prefix) / "lib" / "tidegate"  # goes with what it was compiled for
SOURCES = Path(__file__).parent
HEADER = SOURCES / "native.h"
OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma")
OPERATORS = {  # the file's name, and what the compiler may use
    "attention": AVX512,
    "int4_tiles": (*AVX512, "-mamx-tile", "-mamx-bf16"),
}
COMPILE_SECONDS = 60  # it takes 1 to 3


def is_ready(name: str, is_alike: Callable[[], bool]) -> bool:
    """Make an operator ready in this process. Tells whether it is, and computes what it should."""
    try:
        _load(name)
        # Whoever asks may be making a model that has no memory yet.
        with torch.device("cpu"), torch.inference_mode():
            if is_alike():
                return True
        log.warning("the operator %s is not used: it computes otherwise here than PyTorch", name)
    except Exception as error:  # of the compiler, the loader or PyTorch: nothing needs it
        log.warning("the operator %s is not used, which is slower: %s", name, error)
    return False


def _load(name: str) -> None:
    """Load the operator: the environment's, or where that cannot be, the user's, or one that is compiled for
    this process alone. Raises what went wrong with the last."""
    with tempfile.TemporaryDirectory() as own:
        folders: list[Callable[[], Path]] = [
            lambda: FOLDER,
            lambda: platformdirs.user_cache_path("tidegate", appauthor=False) / "operators",
            lambda: Path(own),
        ]
        for folder in folders:
            try:
                path = compile_operator(name, folder())
                ctypes.CDLL(str(path))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                failed = error
            else:
                return
        raise failed


def compile_operator(name: str, folder: Path) -> Path:
    """Return the compiled operator in this folder, compiled now unless it was before.

    Raises OSError where the folder cannot be written to, somebody else can, or there is no compiler,
    RuntimeError with what a compiler says, and subprocess.TimeoutExpired.
    """
    source, options = SOURCES / f"{name}.c", (*OPTIONS, *OPERATORS[name])
    told = (source.read_bytes(), HEADER.read_bytes(), options, torch.__version__)
    path = folder / f"{name}-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    if path.is_file():
        for each in (folder, path):
            told_of = each.stat()
            if told_of.st_uid not in (0, os.getuid()) or told_of.st_mode & stat.S_IWOTH:
                raise PermissionError(f"{each} may be somebody else's: remove it")
        return path
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler is installed (Debian: apt install gcc)")
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        found = Path(made) / path.name
        _run([compiler, *options, str(source), "-o", str(found), *_libraries()])
        found.chmod(0o755)  # whatever the umask, or the next process takes it for somebody else's
        found.replace(path)
    return path


def _libraries() -> Sequence[str]:
    """PyTorch's library, which the process has loaded, by the name that it has there."""
    return (f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-l:libtorch_cpu.so")


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(  # noqa: S603  # our own source
        command, capture_output=True, errors="replace", timeout=COMPILE_SECONDS, check=False
    )
    if ended.returncode:
        raise RuntimeError(f"{command[0]} does not compile it: {ended.stderr.strip()[:500]}")


def main() -> int:
    """Compile all operators for the environment that this runs in. Returns the exit status."""
    for name in OPERATORS:
        try:
            sys.stdout.write(f"{compile_operator(name, FOLDER)}\n")
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
