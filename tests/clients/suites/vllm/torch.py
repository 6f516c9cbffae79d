"""The two names of torch that these tests use."""

from numpy import iinfo as iinfo
from numpy import int64 as long

__all__ = ["iinfo", "long"]
