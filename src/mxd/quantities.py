"""Numbers as people say them: counts, and amounts of memory."""


def compact(count: int | float) -> str:
    """Return a count in three digits and a unit.

    Example:
        >>> compact(37_751_808), compact(480e6), compact(999_999), compact(1.25e12), compact(950), compact(0)
        ('37.8M', '480M', '1M', '1.25T', '950', '0')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # From here on the smaller unit would round to four digits.
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:g}"


def gib(count: int) -> str:
    """Return a number of bytes in three digits and a binary unit, of memory and of disk alike.

    Example:
        >>> gib(3 * 2**29), gib(3 * 2**20), gib(2**30 - 1), gib(1536), gib(12), gib(3000 * 2**30)
        ('1.5 GiB', '3 MiB', '1 GiB', '1.5 KiB', '12 B', '3,000 GiB')
    """
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= 0.9995 * size:
            amount = count / size
            return f"{float(f'{amount:.3g}'):g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"
    return f"{count} B"


def counted(count: int, thing: str) -> str:
    """Return a count in full and what it counts, in the plural where it is not one.

    Example:
        >>> counted(1, "layer"), counted(1234, "document"), counted(0, "thread")
        ('1 layer', '1,234 documents', '0 threads')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
