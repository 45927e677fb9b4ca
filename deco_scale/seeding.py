"""Keys of random generators."""

_MASK = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """64-bit key of some integers (splitmix64's finaliser, folded)."""
    key = 0
    for part in parts:
        key = (key ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key
