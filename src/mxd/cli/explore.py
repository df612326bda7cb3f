"""`mxd explore`: what every latent of a run does, in the browser."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from mxd.cli.output import notes
from mxd.explorer.collect import CollectConfig, collect
from mxd.explorer.database import DATABASE_FILE, identify_run, read_facts, reading, require_database
from mxd.explorer.export import export as export_pages
from mxd.explorer.library import Library
from mxd.runs.run import read_configuration

_EVERYTHING = CollectConfig()


def explore(
    run: Annotated[Path, tyro.conf.Positional],
    config: Annotated[CollectConfig, tyro.conf.arg(name="")] = _EVERYTHING,
    database: Path | None = None,
    recollect: bool = False,
    export: Path | None = None,
    serve: bool = True,
    port: int = 8321,
) -> None:
    """Collect what the latents of a finished run do on a text, and show it as pages in the browser.

    The first call writes RUN/explorer.sqlite; later ones open it. The pages are served to this machine only, until
    Ctrl-C.

    Args:
        run: Folder of a finished run.
        config: What to collect.
        database: Where the database is; RUN/explorer.sqlite by default.
        recollect: Collect anew where there is a database already; labels and notes are kept.
        export: Write the pages, without those that need the model, as files to this folder, and serve nothing.
        serve: Serve the pages; --no-serve only collects.
        port: Where to serve; if it is in use, the next free one is taken.
    """
    console = notes()
    if not 1 <= port <= 65535:
        raise ValueError(f"port must lie in [1, 65535]; got {port}.")
    read_configuration(run)
    path = database if database is not None else run / DATABASE_FILE
    if recollect or not path.exists():
        collect(run, path, config)
        console.print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
    identity = identify_run(run)
    require_database(path, identity)
    _require_as_asked(path, config)
    library = Library(database=path, run=run, identity=identity)
    if export is not None:
        count = export_pages(library, export)
        console.print(f"Wrote {count} files to {export}; open {export / 'index.html'} in a browser.")
    elif serve:
        _serve(library, config, port, console)


def _require_as_asked(path: Path, config: CollectConfig) -> None:
    """Check that a database holds what this call asks for, where it asks for something."""
    with reading(path) as connection:
        collected: dict[str, Any] = read_facts(connection)["collected"]
    places = ("device", "model")
    asked = {name: value for name, value in asdict(config).items() if name not in places and value not in (None, ())}
    for name, value in asked.items():
        held = collected[name]
        if held != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(
                f"{path} must hold what was asked for; its {name} is {held or 'the default'}, not {value}. Collect it "
                "anew with --recollect, or leave the option out."
            )


def _serve(library: Library, config: CollectConfig, port: int, console: Console) -> None:
    from mxd.explorer.live import LiveModel
    from mxd.explorer.server import LOOPBACK, listen, make_app, serve

    bound = listen(port)
    taken = int(bound.getsockname()[1])
    if taken != port:
        console.print(f"Port {port} is in use; taking {taken}.")
    app = make_app(library, LiveModel(library.run, library.students(), config.device, config.model), taken)
    console.print(f"Open http://{LOOPBACK}:{taken}/ in a browser; Ctrl-C ends it.")
    try:
        serve(app, bound)
    except KeyboardInterrupt:
        console.print("Stopped.")
