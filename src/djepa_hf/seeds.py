"""Seeds of their own for things that must not depend on each other."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed from numbers and words; 32 bits, because CPU generators ignore the rest."""
    return int.from_bytes(hashlib.sha256(",".join(map(str, parts)).encode()).digest()[:4])
