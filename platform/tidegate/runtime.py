"""Settings of the Python runtime for the long-running processes, gateway and replica."""

from __future__ import annotations

import gc

# Requests are short-lived objects without cycles. The default of 700 makes the collector run all the time
# and stops a busy gateway for 30 to 40 ms about once a second.
GC_THRESHOLD = (50_000, 20, 100)


def calm_collector() -> None:
    """Call once, when everything that stays is loaded: it is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
