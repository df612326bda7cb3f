"""Which documents are held out from training, decided by each document's identity alone."""

import hashlib

HELD_OUT_SHARE = 0.05
"""Share of all documents that no training sees."""


def is_held_out(identity: str) -> bool:
    """Whether the document with this identity (its content, or its path for `stdlib`) is kept for evaluation.

    The decision hashes the identity, so it is the same in every run, on every machine, in any order.

    Example:
        >>> sum(is_held_out(f"document {n}") for n in range(10_000)) / 10_000
        0.0519
    """
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8, person=b"mxd held out").digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64
