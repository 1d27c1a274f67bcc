"""Counter-based randomness: every draw is a function of (seed, what it is for), never of what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """Returns a Philox generator for `key`, for example (seed, "mask", epoch, row)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def torch_seed(*key: int | str) -> int:
    """Returns a 63-bit seed for a generator of torch, for the same kinds of key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
