"""Text that others wrote, such as names of files and classes, made safe to print."""


def printable(text: str) -> str:
    r"""Return a text with an escape in place of each character that a terminal could obey or not print.

    Control characters, line breaks, marks that turn the direction of writing, and the half characters that stand for
    undecodable bytes in names of files.

    Example:
        >>> print(printable("red\x1b[31m"))
        red\x1b[31m
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
