"""`mxd export`: layers in the formats of other tools."""

from pathlib import Path
from typing import Annotated

import tyro

from mxd.cli.output import notes, print_json
from mxd.interop import Format, export_run


def export(
    run: Annotated[Path, tyro.conf.Positional],
    format_: Annotated[Format, tyro.conf.arg(name="format")],
    out: Path,
    student: tuple[str, ...] = (),
    model: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Write a run's layers as sparsify, SAELens or circuit-tracer read them, where these compute exactly the same.

    Writes OUT/<student id>/, in which that tool's own loader finds its files, and OUT/README.md, which says what they
    are. What a format has no place for, such as every mxd, is left out and named, or refused where it was asked for.

    Args:
        run: Folder of a finished run.
        format_: Whose files to write; circuit-tracer's need a layer for every block of the model.
        out: Folder of the files; it must not exist, or be empty.
        student: Ids such as transcoder-k32 or 8/transcoder-k32; all that fit by default.
        model: Where the language model is now (a folder or hub id), if it is not where the run found it; only its
            config.json is read.
        json_: Print what was written and left out as one JSON object.
    """
    exported = export_run(run, out, format_, students=student, model=model)
    if json_:
        print_json(
            {
                "format": format_,
                "out": str(out),
                "files": [path.relative_to(out).as_posix() for path in exported.files],
                "left_out": [one._asdict() for one in exported.left_out],
            }
        )
        return
    console = notes()
    for one in exported.left_out:
        console.print(f"Left out {one.student}: {one.reason}")
    console.print(f"Wrote {len(exported.files)} files for {format_} to {out}.")
