"""Where a command starts, and how it ends: 0 done, 2 cannot be met, 3 stopped by a fault, 130 interrupted."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mxd.allocator import keep_freed_memory
from mxd.printable import printable

DONE, CANNOT_BE_MET, FAULT, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status; what went wrong is one sentence on stderr.

    Set MXD_TRACEBACK=1 to see where an error comes from.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Our own bar tells how far the work is; a bar for each file loaded would stand in between.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_freed_memory()
    from mxd.runs.faults import TrainingFault, TrainingInterrupted
    from mxd.runs.snapshots import SnapshotError

    given = list(sys.argv[1:] if arguments is None else arguments)
    named = given[: 2 if given[:1] == ["privacy"] else 1]
    name = " ".join(["mxd", *(word for word in named if not word.startswith("-"))])
    try:
        _run(given)
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        _fail(name, str(error) or "interrupted.", INTERRUPTED, error)
    except (TrainingFault, SnapshotError) as error:
        _fail(name, str(error), FAULT, error)
    except BrokenPipeError:
        # Whoever read it has read enough, as `head` does; the interpreter would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        _fail(name, _sentence(error), CANNOT_BE_MET, error)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        remedy = "ask for fewer or smaller layers, or lower --batch-tokens, --buffer-tokens or --context"
        _fail(name, f"what was asked for must fit in memory; it does not ({error}); {remedy}.", CANNOT_BE_MET, error)
    sys.exit(DONE)


def _run(given: list[str]) -> None:
    """Run the command that was asked for."""
    from mxd.cli.reading import run_one_of
    from mxd.cli.train import LIST, recipe_named, show_recipes

    command, rest = given[:1], given[1:]
    if command == ["privacy"]:
        _run_privacy(rest, recipe_named(rest))
        return
    recipe = recipe_named(rest) if command in (["train"], ["pretrain"]) else None
    if recipe == LIST:
        from mxd.cli.pretrain import show_pretraining_recipes

        (show_recipes if command == ["train"] else show_pretraining_recipes)()
        return
    about = "Decompose the MLP layers of language models into sparse layers that can replace them."
    run_one_of(_commands(command, recipe, rest), "mxd", given, about=about)


def _commands(called: list[str], recipe: str | None, arguments: list[str]) -> dict[str, Callable[..., None]]:
    """Return every command by its name, with a recipe's or a run's values as defaults of the one that is called."""
    from mxd.cli.demo import demo
    from mxd.cli.edit import edit
    from mxd.cli.evaluate import evaluate
    from mxd.cli.explain import explain
    from mxd.cli.explore import explore
    from mxd.cli.export import export
    from mxd.cli.frontier import frontier
    from mxd.cli.pretrain import pretrain_from
    from mxd.cli.probe import probe
    from mxd.cli.steer import steer
    from mxd.cli.train import train, train_from

    return {
        "train": train_from(recipe, arguments) if called == ["train"] else train,
        "evaluate": evaluate,
        "frontier": frontier,
        "probe": probe,
        "steer": steer,
        "edit": edit,
        "explore": explore,
        "explain": explain,
        "export": export,
        "pretrain": pretrain_from(recipe if called == ["pretrain"] else None),
        "privacy": _privacy,
        "demo": demo,
    }


def _run_privacy(given: list[str], recipe: str | None) -> None:
    # Loaded here alone: it needs scikit-learn, which no other command should wait for.
    from mxd.cli.privacy import privacy_commands, show_privacy_recipes
    from mxd.cli.reading import run_one_of
    from mxd.cli.train import LIST

    if recipe == LIST:
        show_privacy_recipes()
        return
    about = "Make a model's weights uncertain on protected instances, and measure what it is worth."
    run_one_of(privacy_commands(recipe), "mxd privacy", given, about=about)


def _privacy() -> None:
    """Make weights uncertain on protected instances: induce, sweep, certify, evaluate, attack, demo."""


def _sentence(error: ValueError | OSError) -> str:
    """Return what our own errors say, and what to do where the system itself refused."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    place = "a file" if error.filename is None else error.filename
    return (
        f"{place} must be readable and writable as asked; the system says: {error.strerror}. "
        "Check the path, its permissions and the room on its disk."
    )


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has a class of its own for accelerators only.
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _fail(name: str, message: str, status: int, error: BaseException) -> NoReturn:
    if os.environ.get("MXD_TRACEBACK"):
        raise error
    # One line, whatever a library's message or the name of a file holds.
    print(printable(f"{name}: {' '.join(message.split())}"), file=sys.stderr)
    sys.exit(status)
