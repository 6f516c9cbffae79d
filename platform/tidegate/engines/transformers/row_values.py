"""What is done with values [rows, vocabulary], and numbers of each row. On a CPU partly by NumPy and block
by block, which takes a fraction of PyTorch's time there."""

from __future__ import annotations

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
PROBABILITY_BITS = 30  # of a float32 from 0 to 1 and what rounding adds; the first two are 0
WORTH_LOOKING = 1 << 15  # values, of which the greatest are picked out before they are put in order
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
    return sent(torch.tensor(part), logits.device)


def rows_of(logits: Tensor, part: Sequence[int]) -> Tensor:
    at = places_of(part, logits)
    return logits[at] if isinstance(at, slice) else logits.index_select(0, at)


def in_blocks(values: Tensor, beyond: float) -> Tensor:
    """Show [rows, vocabulary] as [rows, blocks, BLOCK]; `beyond` fills up the last one."""
    if short := -values.shape[-1] % BLOCK:
        values = torch.nn.functional.pad(values, (0, short), value=beyond)
    return values.view(*values.shape[:-1], -1, BLOCK)


def greatest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the greatest of each row of [rows, vocabulary], and its place, of equal ones the first. What is
    no number is the greatest."""
    if values.is_cuda:
        best, place = values.max(dim=-1)
        return best, place
    numbers = values.float().numpy()
    places = numbers.argmax(axis=-1)
    found = np.take_along_axis(numbers, places[:, None], axis=-1)[:, 0]
    return torch.from_numpy(found).to(values.dtype), torch.from_numpy(places)


def are_finite(values: Tensor) -> Tensor:
    """Tell of each value whether it is finite."""
    if values.is_cuda:
        return torch.isfinite(values)
    return torch.from_numpy(np.isfinite(values.float().numpy()))


def likeliest(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `most` greatest of each row of [rows, vocabulary], the greatest first, and their places."""
    if values.is_cuda or most * BLOCK > values.shape[-1]:
        found, places = values.topk(most, dim=-1)
        return found, places
    blocks = in_blocks(values, -torch.inf)
    peaks = blocks.amax(dim=-1).topk(most, dim=-1)
    if most * BLOCK * 4 > values.shape[-1]:
        return no_less(values, peaks.values[:, -1:], most)
    # They are in the blocks whose greatest are the greatest.
    chosen = peaks.indices.sort(dim=-1).values
    some = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    found, places = no_less(some, peaks.values[:, -1:], most)
    return found, chosen.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def no_less(values: Tensor, least: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `most` greatest of each row of [rows, tokens], of which so many are no less than `least`
    [rows, 1], and their places."""
    if values.numel() >= WORTH_LOOKING:
        numbers = values.numpy()
        some, flat, is_taken = laid_left(numbers, numbers >= least.numpy(), -np.inf)
        if some.shape[-1] >= most:  # which it is not where they are no numbers
            places = np.zeros(some.shape, np.int64)
            places[is_taken] = flat % numbers.shape[-1]
            found, at = torch.from_numpy(some).topk(most, dim=-1)
            return found, torch.from_numpy(places).gather(-1, at)
    found, at = values.topk(most, dim=-1)
    return found, at


def keep_share(values: Tensor, shares: Tensor) -> Tensor:
    """Zero, in place, all but the greatest of probabilities [rows, tokens] that are together no less than
    `shares` [rows, 1]; of equal ones the first stay, and at least one of each row."""
    if values.is_cuda:
        return keep_share_by_bits(values, shares)
    last, surplus = last_of_share(values, shares)
    return without_last_ties(zeroed_below(values, last), last, surplus)


def last_of_share(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of the greatest of `values` [rows, tokens] that are together no less than `shares`
    [rows, 1], and how many as great as it are too many. At least one of each row counts.

    On CPU, by NumPy: it sorts in a twentieth of PyTorch's time, faster than it picks out what lies around a
    guess. Summed up from the greatest on: it is nothing to that which unlikely tokens are left out.
    """
    count, tokens = values.shape
    ordered = np.empty((count, tokens + -tokens % BLOCK), np.float32)
    ordered[:, :-tokens], ordered[:, -tokens:] = 0, values.numpy()
    ordered.sort(axis=-1)
    blocks = torch.from_numpy(ordered).view(count, -1, BLOCK)
    sums = blocks.sum(dim=-1).flip(-1)
    above = sums.cumsum(dim=-1) - sums
    begun = (above < shares).sum(dim=-1, keepdim=True).clamp_(min=1)
    border = (blocks.shape[1] - begun).unsqueeze(-1).expand(-1, -1, BLOCK)
    inside = blocks.gather(1, border).squeeze(1).flip(-1)
    reached = above.gather(-1, begun - 1) + inside.cumsum(dim=-1) - inside
    some = (reached < shares).sum(dim=-1, keepdim=True).clamp_(min=1)
    last = inside.gather(-1, some - 1)
    as_great = ordered.shape[-1] - torch.searchsorted(torch.from_numpy(ordered), last)
    return last, as_great - (begun - 1) * BLOCK - some


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
    numbers *= (numbers >= least.numpy()).astype(np.float32)
    return values


def without_last_ties(values: Tensor, least: Tensor, counts: Tensor) -> Tensor:
    """Zero, in place, so many (`counts` [rows, 1]) of the tokens in `values` [rows, tokens] that are equal to
    `least` [rows, 1], in each row the last ones."""
    if not counts.any():
        return values
    numbers, wanted = values.numpy(), counts.numpy()
    # Of what is 0 already there may be a lot.
    tied = np.flatnonzero(numbers == np.where((wanted > 0) & (least.numpy() > 0), least.numpy(), np.nan))
    rows, places = np.divmod(tied, numbers.shape[-1])
    from_last = np.cumsum(np.bincount(rows, minlength=len(numbers)))[rows] - np.arange(len(rows))
    is_surplus = from_last <= wanted[rows, 0]
    numbers[rows[is_surplus], places[is_surplus]] = 0
    return values


def renormalized(values: Tensor) -> Tensor:
    """Let each row sum to 1 again: `top_p` is a share of what earlier steps left. Summed in double: zeros
    that are left out change nothing that is seen."""
    return values.div_(values.sum(dim=-1, keepdim=True, dtype=torch.double).to(values.dtype))


def named_places(values: Tensor, ids: Sequence[array[int]]) -> tuple[Tensor, Tensor]:
    """Return `values` [rows, vocabulary] as one row, and the places in it of the ids that each row names."""
    begins = np.arange(len(ids)) * values.shape[-1]
    places = joined(ids, values)
    sizes = sent(torch.from_numpy(np.repeat(begins, [len(named) for named in ids])), values.device)
    return values.view(-1), places + sizes


def joined(parts: Sequence[array[Any]], like: Tensor) -> Tensor:
    """Lay numbers end to end, on the device of `like`."""
    together = np.concatenate([np.frombuffer(part, part.typecode) for part in parts])
    return sent(torch.from_numpy(together), like.device)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Make a tensor [rows, 1] of one value per row, in the type and on the device of `like`."""
    return sent(torch.tensor(values, dtype=like.dtype), like.device).unsqueeze(-1)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Send values from the host to a device. Out of pageable memory the host would wait there until all is
    done that the device has under way."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


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
