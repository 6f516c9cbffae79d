"""What is done with values [rows, vocabulary], and numbers of each row. On a CPU partly by NumPy and block
by block, which takes a fraction of PyTorch's time there."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of float32 logits that are worked on at once: log probabilities of them, or their values sorted, take a few
# times as much.
LOGITS_BYTES = 64 << 20
CACHE_BYTES = 2 << 20  # as many on CPU where nothing has to be read twice from memory
PILOT = 32  # of so many tokens one stands for all where a guess will do
LEAST_PILOT, PILOTS = 8, 1000  # of closer guesses: no more than one of 8 tokens, and about 1,000
SORTED_WHOLE = 1024  # tokens, up to which a row is sorted whole
PROBABILITY_BITS = 30  # of a float32 from 0 to 1 and what rounding adds; the first two are 0
BLOCK = 64  # tokens that are summed up, or of which the greatest is found, before all of them are


def rows_at_once(vocabulary: int) -> int:
    """Return how many rows of logits are within `LOGITS_BYTES`; one always is."""
    return max(1, LOGITS_BYTES // (torch.float32.itemsize * vocabulary))


def in_parts(rows: Iterable[int], logits: Tensor, *, key: Any = None) -> Iterator[list[int]]:
    """Split rows by their `key`, and each into as many as are worked on at once."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row) if key is not None else 0, []).append(row)
    size = rows_at_once(logits.shape[-1])
    if not logits.is_cuda:
        size = max(1, min(size, CACHE_BYTES // (torch.float32.itemsize * logits.shape[-1])))
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def places_of(part: Sequence[int], logits: Tensor) -> slice | Tensor:
    """Return what picks these rows, in ascending order: neighbours without a copy."""
    if part[-1] - part[0] + 1 == len(part):
        return slice(part[0], part[-1] + 1)
    return torch.tensor(part, device=logits.device)


def rows_of(logits: Tensor, part: Sequence[int]) -> Tensor:
    at = places_of(part, logits)
    return logits[at] if isinstance(at, slice) else logits.index_select(0, at)


def in_blocks(values: Tensor, beyond: float) -> Tensor:
    """Show [rows, vocabulary] as [rows, blocks, BLOCK]; `beyond` fills up the last one."""
    if short := -values.shape[-1] % BLOCK:
        values = torch.nn.functional.pad(values, (0, short), value=beyond)
    return values.view(*values.shape[:-1], -1, BLOCK)


def greatest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the greatest of each row of [rows, vocabulary], and its place, of equal ones the first."""
    if values.is_cuda:
        best, place = values.max(dim=-1)
        return best, place
    # With its place it takes PyTorch four times as long on CPU: so only in a block.
    blocks = in_blocks(values.float(), -torch.inf)
    best, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks.gather(1, block.view(-1, 1, 1).expand(-1, -1, BLOCK)).squeeze(1).max(dim=-1).indices
    return best.to(values.dtype), (block * BLOCK + inside).clamp_(max=values.shape[-1] - 1)


def likeliest(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `most` greatest of each row of [rows, vocabulary], the greatest first, and their places."""
    if values.is_cuda or most * BLOCK * 4 > values.shape[-1]:
        found, places = values.topk(most, dim=-1)
        return found, places
    # They are in the blocks whose greatest are the greatest.
    blocks = in_blocks(values, -torch.inf)
    chosen = blocks.amax(dim=-1).topk(most, dim=-1).indices.sort(dim=-1).values
    some = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    found, places = some.topk(most, dim=-1)
    return found, chosen.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def descending(values: Tensor) -> Tensor:
    """Sort each row. By NumPy, which takes a twentieth of the time."""
    ordered = np.negative(values.numpy())
    ordered.sort(axis=-1)
    return torch.from_numpy(np.negative(ordered, out=ordered))


def keep_share(values: Tensor, shares: Tensor) -> Tensor:
    """Zero, in place, all but the greatest of probabilities [rows, tokens] that are together no less than
    `shares` [rows, 1]; of equal ones the first stay, and at least one of each row."""
    if values.is_cuda:
        return keep_share_by_bits(values, shares)
    if values.shape[-1] < SORTED_WHOLE:
        last, surplus = by_sorting(values, shares)
        return without_last_ties(zeroed_below(values, last), last, surplus)
    numbers, wanted = values.numpy(), shares.numpy()
    # Some tokens tell about where it is, by what the unlikely ones have together: so only what lies around
    # that has to be sorted. Their error goes with the square root of how many they are.
    pilot = max(LEAST_PILOT, numbers.shape[-1] // PILOTS)
    some, at = pilots(values, pilot, 1 - wanted)
    slack = math.ceil(1.1 * math.sqrt(some.shape[-1]))
    wide = np.zeros((len(some), some.shape[-1] + 2 * slack + 1), np.float32)
    wide[:, slack : -slack - 1], wide[:, -slack - 1 :] = some, np.inf
    rows = np.arange(len(some))[:, None]
    lowest, highest = wide[rows, at], wide[rows, at + 2 * slack]
    is_above = numbers > highest
    before = (numbers * is_above).sum(axis=-1, keepdims=True)  # `where` takes four times as long
    is_inside = numbers >= lowest
    is_inside ^= is_above
    band, places, is_taken = laid_left(numbers, is_inside, 0.0)
    ordered = descending(torch.from_numpy(band))
    reached = torch.from_numpy(before) + ordered.cumsum(dim=-1) - ordered
    last, surplus, count = border(ordered, reached, shares)
    # Beside the border there has to be more of the band: by each row's own, whatever the others are.
    widths = np.count_nonzero(is_taken, axis=-1)[:, None]
    missed = np.flatnonzero((before >= wanted) | (count.numpy() >= widths)).tolist()
    if missed:
        last[missed], surplus[missed] = by_sorting(values[missed], shares[missed])
    zeroed_below(values, last)
    if missed:
        values[missed] = without_last_ties(values[missed], last[missed], surplus[missed])
        surplus[missed] = 0
    # Those equal to the last one lie in the band, of which there is less to look through.
    rows, columns = np.nonzero((band == last.numpy()) & is_taken)
    ranks = np.cumsum(np.bincount(rows, minlength=len(numbers)))[rows] - np.arange(len(rows))  # from the end
    is_surplus = ranks <= surplus.numpy()[rows, 0]
    rows, columns = rows[is_surplus], columns[is_surplus]
    begins = np.cumsum(widths) - widths[:, 0]
    values.view(-1).numpy()[places[begins[rows] + columns]] = 0
    return values


def keep_share_by_bits(values: Tensor, shares: Tensor) -> Tensor:
    """As `keep_share`, by nothing that sorts or that a device's host has to wait for.

    Numbers from 0 on are ordered as their bits are. So the least that is kept is found bit by bit, the
    highest first: the greatest number such that all no less than it are together no less than the share.
    """
    bits = values.view(torch.int32)
    least = torch.zeros_like(shares, dtype=torch.int32)
    for bit in reversed(range(PROBABILITY_BITS)):
        reached = torch.where(bits >= least + (1 << bit), values, 0.0).sum(dim=-1, keepdim=True)
        least = least.add(reached >= shares, alpha=1 << bit)
    last = torch.minimum(least, bits.amax(dim=-1, keepdim=True)).view(torch.float32)
    is_above, is_last = values > last, values == last
    short = shares - torch.where(is_above, values, 0.0).sum(dim=-1, keepdim=True)
    count = (short / last).ceil().clamp_(min=1)
    return values.mul_(is_above | (is_last & (is_last.cumsum(dim=-1, dtype=torch.int32) <= count)))


def pilots(probabilities: Tensor, every: int, spare: Any) -> tuple[Any, Any]:
    """Return some of each row's probabilities [rows, tokens], one of so many, the least first; and how many
    of these stand for tokens that are together less than `spare` [rows, 1]."""
    some = np.sort(probabilities.numpy()[:, ::every], axis=-1)
    reached = torch.from_numpy(some).cumsum(dim=-1).numpy()  # NumPy takes three times as long
    return some, np.count_nonzero(reached * every < spare, axis=-1)[:, None]


def by_sorting(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of the greatest of `values` [rows, tokens] that are together no less than `shares`
    [rows, 1], and how many as great as it are too many. At least one of each row counts."""
    ordered = descending(values)
    return border(ordered, ordered.cumsum(dim=-1) - ordered, shares)[:2]


def border(ordered: Tensor, reached: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last of `ordered` [rows, tokens] before which is `reached` less than `shares` [rows, 1], how
    many as great come behind it, and how many count."""
    counts = np.count_nonzero(reached.numpy() < shares.numpy(), axis=-1)[:, None]
    np.maximum(counts, 1, out=counts)
    least = ordered.numpy()[np.arange(len(counts))[:, None], counts - 1]
    surplus = np.count_nonzero(ordered.numpy() >= least, axis=-1)[:, None] - counts
    return torch.from_numpy(least), torch.from_numpy(surplus), torch.from_numpy(counts)


def laid_left(numbers: Any, kept: Any, beyond: float) -> tuple[Any, Any, Any]:
    """Return what is kept of `numbers` [rows, tokens], in its order and with `beyond` behind it; where in all
    of them [kept] it was; and what of the first is not `beyond`."""
    count, vocabulary = numbers.shape
    flat = np.flatnonzero(kept)
    sizes = np.diff(np.searchsorted(flat, np.arange(count + 1) * vocabulary))[:, None]
    is_taken = np.arange(max(1, sizes.max())) < sizes
    some = np.full(is_taken.shape, beyond, np.float32)
    some[is_taken] = numbers.reshape(-1)[flat]
    return some, flat, is_taken


def zeroed_below(values: Tensor, least: Tensor) -> Tensor:
    """Zero, in place, what of `values` [rows, tokens] is below `least` [rows, 1]."""
    if values.is_cuda:
        return values.mul_(values >= least)
    numbers = values.numpy()  # which NumPy compares in a fifth of the time
    numbers *= numbers >= least.numpy()
    return values


def without_last_ties(values: Tensor, least: Tensor, counts: Tensor) -> Tensor:
    """Zero, in place, so many (`counts` [rows, 1]) of the tokens in `values` [rows, tokens] that are equal to
    `least` [rows, 1], in each row the last ones."""
    numbers = values.numpy()
    for row, count in enumerate(counts.flatten().tolist()):
        if count:
            numbers[row, np.flatnonzero(numbers[row] == least[row].item())[-count:]] = 0
    return values


def renormalized(values: Tensor) -> Tensor:
    """Let each row sum to 1 again: `top_p` is a share of what earlier steps left. Summed in double: zeros
    that are left out change nothing that is seen."""
    return values.div_(values.sum(dim=-1, keepdim=True, dtype=torch.double).to(values.dtype))


def named_places(values: Tensor, ids: Sequence[array[int]]) -> tuple[Tensor, Tensor]:
    """Return `values` [rows, vocabulary] as one row, and the places in it of the ids that each row names."""
    begins = np.arange(len(ids)) * values.shape[-1]
    places = joined(ids, values)
    sizes = torch.from_numpy(np.repeat(begins, [len(named) for named in ids])).to(values.device)
    return values.view(-1), places + sizes


def joined(parts: Sequence[array[Any]], like: Tensor) -> Tensor:
    """Lay numbers end to end, on the device of `like`."""
    together = np.concatenate([np.frombuffer(part, part.typecode) for part in parts])
    return torch.from_numpy(together).to(like.device)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a tensor [rows, 1] of one value per row, in the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


class Transfer:
    """Tensors on their way to the host: from a device as one, which nothing waits for until they are read."""

    def __init__(self, told: Sequence[Tensor]) -> None:
        self._told = told
        self._arrived: torch.cuda.Event | None = None
        if told[0].is_cuda:
            laid = packed(told)
            self._laid = torch.empty(laid.shape, dtype=laid.dtype, pin_memory=True)
            self._laid.copy_(laid, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def lists(self) -> list[Any]:
        if self._arrived is None:
            return [part.tolist() for part in self._told]
        self._arrived.synchronize()
        return unpacked(self._laid, self._told)


def to_host(told: Sequence[Tensor]) -> list[Any]:
    """Return the tensors as lists; from a device in one transfer."""
    return Transfer(told).lists()


def packed(told: Sequence[Tensor]) -> Tensor:
    """Lay tensors end to end as bytes, widest types first, so that each begins at a multiple of its own."""
    ordered = sorted(told, key=lambda part: -part.element_size())
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in ordered])


def unpacked(laid: Tensor, told: Sequence[Tensor]) -> list[Any]:
    """Read what `packed` laid end to end; of `told` only types and shapes count."""
    found: dict[int, Any] = {}
    begin = 0
    for place in sorted(range(len(told)), key=lambda place: -told[place].element_size()):
        end = begin + told[place].nbytes
        found[place] = laid[begin:end].view(told[place].dtype).view(told[place].shape).tolist()
        begin = end
    return [found[place] for place in range(len(told))]
