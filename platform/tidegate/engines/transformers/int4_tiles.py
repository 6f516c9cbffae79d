"""Computes with 4-bit weights by the tiles for bfloat16 that some processors have (AMX).

PyTorch's own kernel (`int4`) multiplies in float32 there too, which for many rows takes three to nine times
as long (ADR 31). `int4_tiles.c` takes the same packed weights and gives the same but for the order of its
sums. It is compiled where it first runs, or with an image (`python -m` and this module's name); without a C
compiler PyTorch's kernel stays.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tidegate.engines.transformers.int4 import Int4Linear

log = logging.getLogger(__name__)

BLOCK = 64  # divides the outputs
SOURCE = Path(__file__).with_suffix(".c")
FOLDER = Path(sys.prefix) / "lib" / "tidegate"  # goes with what it was compiled for
FLAGS = (
    *("-O3", "-std=gnu11", "-shared", "-fPIC"),
    *(f"-m{name}" for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16")),
    *(f"-m{name}" for name in ("fma", "amx-tile", "amx-bf16")),
)
COMPILE_SECONDS = 60  # it takes half a second
TOLERANCE = 0.005  # of outputs in bfloat16, beside the kernel of PyTorch


class TiledInt4Linear(Int4Linear):
    """An `Int4Linear` whose products the operator computes."""

    sums: bool

    def hold(self, codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> None:
        super().hold(codes, zeros, scales, groups)
        self.sums = bool(self.scales[..., 1].any())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, self.in_features)
        found = tiled_product(rows, *self.kernel, self.order, self.bias, self.sums)
        return found.view(*inputs.shape[:-1], self.out_features)


def tiled_product(
    inputs: Tensor,
    packed: Tensor,
    size: int,
    scales: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    sums: bool,
) -> Tensor:
    """Compute what `int4_product` does. `sums`: whether anything is added to a group's weights."""
    rows = inputs.to(torch.bfloat16).contiguous()
    if order is not None:
        rows = rows.index_select(1, order)
    kept = torch.empty(0)
    if sums:
        kept = rows.float().view(rows.shape[0], scales.shape[0], size).sum(-1)
    held = rows.new_empty([rows.shape[0], scales.shape[1]])
    torch.ops.tidegate.int4_product(held, rows, packed, scales, kept, size)
    found = held.to(inputs.dtype)
    if bias is not None:
        found += bias
    return found


def int4_linear(plain: nn.Linear) -> Int4Linear:
    """Return what stands for a linear layer whose weights will have 4 bits, as fast as this machine can."""
    kind = TiledInt4Linear if plain.out_features % BLOCK == 0 and has_tiles() else Int4Linear
    return kind(plain)


@cache
def has_tiles() -> bool:
    """Make the operator ready in this process. Tells whether it is, and computes as PyTorch's kernel does."""
    if not torch.cpu._is_amx_tile_supported():
        return False
    try:
        with tempfile.TemporaryDirectory() as own:
            ctypes.CDLL(str(_library(Path(own))))
        if torch.cpu._init_amx() and _is_alike():
            return True
        log.warning("4-bit weights are computed without tiles: the operator computes otherwise here")
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        log.warning("4-bit weights are computed without tiles, slower: %s", error)
    return False


def _library(own: Path) -> Path:
    """Return the compiled operator: the environment's, or where that cannot be written to one in the folder
    `own`, which is nobody else's."""
    try:
        return compile_operator(FOLDER)
    except OSError:
        return compile_operator(own)


def compile_operator(folder: Path) -> Path:
    """Return the compiled operator in this folder, compiled now unless it was before.

    Raises OSError where the folder cannot be written to or there is no compiler, RuntimeError with what a
    compiler says, and subprocess.TimeoutExpired.
    """
    told = (SOURCE.read_bytes(), *FLAGS, torch.__version__)
    name = f"int4_tiles-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    path = folder / name
    if path.is_file():
        return path
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler is installed (Debian: apt install gcc)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        found = Path(made) / name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(found)]
        libraries = Path(torch.__file__).parent / "lib"
        command += [f"-L{libraries}", "-Wl,--no-as-needed", "-l:libtorch_cpu.so"]
        ended = subprocess.run(  # noqa: S603  # our own source
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
        if ended.returncode:
            raise RuntimeError(f"{compiler} does not compile {SOURCE.name}: {ended.stderr.strip()[:500]}")
        found.replace(path)
    return path


def _is_alike() -> bool:
    """Compare with PyTorch's kernel, for rows with tiles and without, which get the same bits. Whoever asks may
    be making a model that has no memory yet."""
    depth, size = 256, 64
    with torch.device("cpu"), torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        plain, tiled = (kind(nn.Linear(depth, BLOCK)) for kind in (Int4Linear, TiledInt4Linear))
        codes, zeros = (torch.randint(16, shape, generator=generator) for shape in ((depth, BLOCK), (4, BLOCK)))
        scales = torch.rand(4, BLOCK, generator=generator)
        inputs = torch.randn(70, depth, generator=generator).bfloat16()
        for layer in (plain, tiled):
            layer.hold(codes.to(torch.uint8), zeros.to(torch.uint8), scales, torch.arange(depth) // size)
        expected, found = plain(inputs), tiled(inputs)
        same = all(torch.equal(tiled(inputs[:rows]), found[:rows]) for rows in (1, 2, 3, 17))
    error = torch.linalg.vector_norm(found.float() - expected.float()) / expected.float().norm()
    return same and float(error) <= TOLERANCE


if __name__ == "__main__":
    sys.stdout.write(f"{compile_operator(FOLDER)}\n")
