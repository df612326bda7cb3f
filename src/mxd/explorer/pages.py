"""The files of the pages, the same for the server and on disk."""

import hashlib
from functools import cache
from importlib.resources import files

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""Scripts and styles come from the page's own files only, and nothing from elsewhere."""

PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "explorer.css": "text/css; charset=utf-8",
    "explorer.js": "text/javascript; charset=utf-8",
}
"""What there is, and of which type."""

_SCRIPTS = ("data", "elements", "charts", "map", "latent", "text", "steer", "run", "app")
"""Parts of the one script, in this order: each file more is a request more before anything is seen."""


@cache
def page_file(name: str, *, live: bool) -> str:
    """Return one of the files.

    Args:
        name: Its name.
        live: Whether a server stands behind the page; else its data are files beside it.
    """
    if name == "explorer.js":
        return "\n".join(_read(f"{part}.js") for part in _SCRIPTS)
    text = _read(name)
    if name != "index.html":
        return text
    text = text.replace("{{policy}}", CONTENT_SECURITY_POLICY).replace("{{mode}}", "live" if live else "static")
    preload = '<link rel="preload" href="api/run" as="fetch" crossorigin="anonymous">' if live else ""
    text = text.replace("{{preload}}", preload)
    for part in ("explorer.css", "explorer.js"):
        # A browser may then keep the file for as long as it likes.
        version = hashlib.sha256(page_file(part, live=live).encode()).hexdigest()[:16]
        text = text.replace(f"page/{part}", f"page/{part}?{version}" if live else f"page/{part}")
    return text


def _read(name: str) -> str:
    return files("mxd").joinpath(f"explorer/page/{name}").read_text("utf-8")
