"""`mxd demo`: everything once, with no argument and no network."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from mxd.atomic import json_text
from mxd.cli.output import notes
from mxd.evaluation.evaluate import evaluate_run, write_evaluation
from mxd.evaluation.tables import format_table
from mxd.locks import alone
from mxd.recipes import find_recipe
from mxd.runs.faults import TrainingInterrupted
from mxd.runs.run import is_run, locked, read_configuration
from mxd.training.decompose import decompose, make_plan

DEMO = find_recipe("demo").config()
"""The bundled model's middle layer, four kinds at matched parameters, at two Ks."""


def demo(out: Path = Path("demo-run")) -> None:
    """Decompose the bundled model's middle layer, evaluate it, and show the result. Takes a few minutes.

    Args:
        out: Folder of the run; an earlier demo there is removed.
    """
    place = out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # The run's own lock is held while it trains alone, and evaluating reads its folder too.
    with alone(place, f"another mxd demo is at work in {out}; wait for it, stop it or name another --out."):
        _demo(out)


def _demo(out: Path) -> None:
    console = notes()
    if is_run(out):
        _require_demo(out)
    plan = make_plan(DEMO)
    if is_run(out):
        # What was started as a demo may be going on as mxd train --resume.
        with locked(out):
            _require_demo(out)
            shutil.rmtree(out)
    console.print(
        f"Training {len(plan.students)} sparse layers at matched parameters to replace the MLP of layer "
        f"{DEMO.layer[0]} of mxd's bundled language model, on the source of Python's standard library …"
    )
    try:
        decompose(plan, out)
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        raise TrainingInterrupted(f"stopped by {str(error) or 'SIGINT'}; mxd demo starts it afresh.") from error
    console.print("Putting them back into the model, on modules that neither has seen …")
    evaluation = evaluate_run(out)
    write_evaluation(out, evaluation, title="mxd demo: one MLP, four kinds of sparse layer", footer="mxd demo")
    Console().print(format_table(evaluation.rows))
    console.print(
        f"\nLook at {out}/report.html (table, curves, ten experts) and {out}/frontier.png.\n"
        "Next, on your own model and text:\n"
        "  mxd train --model MODEL --text TEXT --layer 8 --kind mxd shared-transcoder --k 32 --tokens 10M --out RUN\n"
        "  mxd evaluate RUN\n"
        f'and in Python: mxd.load("{out}/layers/3/mxd-k32")'
    )


def _require_demo(out: Path) -> None:
    """Check that only a demo is about to be removed."""
    if read_configuration(out).get("config") != json.loads(json_text(asdict(DEMO))):
        raise ValueError(f"{out} must be an earlier demo to be replaced; it is another run; name another --out.")
