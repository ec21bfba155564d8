"""Counter-based random numbers: each is a function of what it is for.

`(run seed, step, position in the global batch, purpose)` is the key of a stream of its own, so that
noise, timesteps, crops and dropout are the same on any number of workers and after any
interruption. Owns keys and streams; uses no global generator.
"""

import hashlib
from functools import lru_cache

import torch

MASK_63 = (1 << 63) - 1


def key(*names: int | str) -> int:
    """A 63-bit hash of these names in this order."""
    text = "\0".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & MASK_63


def generator(*names: int | str) -> torch.Generator:
    """A generator on the CPU, where a seed gives the same numbers on every machine."""
    return torch.Generator().manual_seed(key(*names))


def uniform(*names: int | str) -> float:
    """One number in [0, 1)."""
    return (key(*names) >> 10) / 2**53  # all 63 bits could round to 1


def normal(shape: tuple[int, ...], *names: int | str) -> torch.Tensor:
    """Standard normal numbers, float32 on the CPU."""
    return torch.randn(shape, generator=generator(*names))


@lru_cache(maxsize=8)
def permutation(size: int, *names: int | str) -> tuple[int, ...]:
    """The numbers below `size`, shuffled."""
    return tuple(torch.randperm(size, generator=generator(*names)).tolist())


def keep_mask(keys_B: torch.Tensor, num: int, drop: float) -> torch.Tensor:
    """(B, num) bool, True with probability 1 - drop: a hash of each key and index, on any device.

    The 32-bit finalizer of MurmurHash3 over counters, in int64 so that all devices agree.
    """
    index_N = torch.arange(num, device=keys_B.device, dtype=torch.int64)
    low_B1 = (keys_B & 0xFFFFFFFF)[:, None]
    high_B1 = ((keys_B >> 32) & 0xFFFFFFFF)[:, None]
    hashed_BN = _mix(_mix(index_N[None, :] ^ low_B1) ^ high_B1)
    return hashed_BN >= int(drop * 2**32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
