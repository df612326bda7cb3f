"""Probe finished runs for docs/experts.md, and find ten experts that name a concept.

    mxd train --model bundled --text stdlib --layer 3 --k 32 --expansion 8 --tokens 2M --warmup-tokens 80k --out RUN \
        --kind mxd transcoder skip-transcoder topk-sae shared-transcoder
    python benchmarks/experts.py probe RUN --name experts_bundled --data python FILE …
    python benchmarks/experts.py ten DEMO --student 3/mxd-k32 --name experts_demo

`probe` runs `mxd probe` (or takes what it wrote, with --reuse) and writes a table, the results and the pictures. `ten`
probes one student with Python's concepts, takes the ten latents that name different concepts best by the validation
part, and writes what they fire on and what they add to the model's logits.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from harness import RESULTS, machine, print_table, write_report
from mxd.evaluation.opening import load_run_model, read_finished_run
from mxd.evaluation.students import load_students
from mxd.models import block_activations
from mxd.probing.collecting import Probed
from mxd.probing.examples import SpanSet
from mxd.probing.picture import draw_probing
from mxd.probing.results import ProbeRow, Probing, SetResult, number_of_classes
from mxd.probing.sources import DataName, open_data
from mxd.probing.statistics import Quality
from mxd.probing.token_codes import TOKEN_IDENTITY, collect_tokens

CASES = 64
"""Strongest tokens of a latent over which its effect on the logits is averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    probe = commands.add_parser("probe")
    probe.add_argument("--data", nargs="+", default=["python"])
    probe.add_argument("--texts", default="10000")
    probe.add_argument("--reuse", action="store_true", help="take RUN/probing.json as it is")
    ten = commands.add_parser("ten")
    ten.add_argument("--student", required=True)
    for command in (probe, ten):
        command.add_argument("run", type=Path)
        command.add_argument("--name", required=True, help="name of the files in benchmarks/results")
        command.add_argument("--tokens", default="131072")
    args = parser.parse_args()
    if args.command == "probe":
        _probe(args)
    else:
        _ten(args)


def _probe(args: argparse.Namespace) -> None:
    if not args.reuse:
        counts = ["--tokens", args.tokens, "--texts", args.texts]
        words = [sys.executable, "-m", "mxd", "probe", args.run, *counts, "--data", *map(_data, args.data)]
        subprocess.run(words, check=True)
    # The command in the report is the one that makes everything.
    sys.argv = [word for word in sys.argv if word != "--reuse"]
    found = json.loads((args.run / "probing.json").read_text())
    sets = [(level, result) for level in ("sample_level",) for result in found[level]]
    sets += [("token_level", result) for result in found["token_level"]["sets"]]
    table = [line for level, result in sets for line in _lines(level, result)]
    print_table(table, args.name)
    description = json.loads((args.run / "run.json").read_text())
    kept = ("kind", "layer", "k", "expansion", "tokens", "seeds", "seed", "schedule")
    config = {name: description["config"][name] for name in kept} | {"model": Path(description["config"]["model"]).name}
    details = {
        "config": config,
        "facts": found["facts"] | {"model": config["model"]},
        "evaluation": _evaluated(args.run / "evaluation.json"),
        "latents that name a concept": _named(found["token_level"]["students"]),
        "classes": _classes(sets),
    }
    write_report(args.name, f"Probing the sparse layers of {config['model']}", table, machine(), details)
    # Drawn anew, so that --reuse follows the picture's design.
    for picture in draw_probing(_read(found), args.run):
        shutil.copy(picture, RESULTS / f"{args.name}_{picture.stem.removeprefix('probing-')}.png")


def _read(found: Mapping[str, Any]) -> Probing:
    """Return as much of what probing.json holds as its picture shows."""
    return Probing(
        facts=found["facts"],
        identity=found["identity"],
        texts=[_read_set(result) for result in found["sample_level"]],
        tokens=[_read_set(result) for result in found["token_level"]["sets"]],
    )


def _read_set(result: Mapping[str, Any]) -> SetResult:
    known = ("concept", "features", "layer", "kind", "k", "latents")
    rows = [
        ProbeRow(
            **{name: row[name] for name in known}, quality=Quality(**{name: row[name] for name in Quality._fields})
        )
        for row in result["rows"]
    ]
    kept = {name: result[name] for name in ("data", "examples", "total", "left_out", "documents")}
    groups = result.get("test_groups", {})
    return SetResult(**kept, parts=list(result["parts"].values()), skipped=[], rows=rows, test_groups=groups)


def _data(word: str) -> str:
    """Return the data.jsonl of a folder that has one: the folder's name says what it is."""
    return str(Path(word) / "data.jsonl") if (Path(word) / "data.jsonl").is_file() else word


def _lines(level: str, result: Mapping[str, Any]) -> list[dict[str, object]]:
    rows = cast("list[dict[str, Any]]", result["rows"])
    lines: list[dict[str, object]] = []
    for features in dict.fromkeys(row["features"] for row in rows):
        own = [row for row in rows if row["features"] == features]
        line: dict[str, object] = {
            "data": result["data"],
            "level": "texts" if level == "sample_level" else "tokens",
            "features": features,
        }
        for k in (1, 2, 5, 20, 100, None):
            scores = [row["f1"] for row in own if row["k"] == k]
            heading = "F1, all" if k is None else f"F1, best {k}"
            classes = number_of_classes(features, scores, len(result["examples"]))
            line[heading] = sum(scores) / classes if scores else ""
        for key, column in (("balanced_accuracy", "balanced accuracy, best 1"), ("roc_auc", "ROC AUC, best 1")):
            scores = [row[key] for row in own if row["k"] == 1 and row[key] is not None]
            line[column] = float(np.mean(scores)) if scores else ""
        lines.append(line)
    return lines


def _classes(sets: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, object]]:
    """Return the best single feature of each class, with its interval."""
    return [
        {"data": result["data"], "class": row["concept"], "features": row["features"], "latent": row["latents"][:1]}
        | {key: row[key] for key in ("f1", "f1_interval", "roc_auc", "average_precision")}
        for _, result in sets
        for row in result["rows"]
        if row["k"] == 1
    ]


def _evaluated(path: Path) -> list[dict[str, object]]:
    """Return how faithful the students are, where `mxd evaluate` has said so."""
    kept = ("id", "num_latents", "parameters", "fvu", "ce_increase", "dead_fraction", "always_on", "specialisation")
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [{name: row[name] for name in kept} for row in rows]


def _named(students: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return, of each student, how many latents name a concept, and how many do so with an F1 above a half."""
    counts: dict[str, dict[str, int]] = {}
    for name, student in students.items():
        well = [latent["concept"] for latent in student["latents"] if latent["f1"] > 0.5]
        counts[name] = {"all": len(student["latents"]), "F1 > .5": len(well), "their concepts": len(set(well))}
    return counts


def _ten(args: argparse.Namespace) -> None:
    run: Path = args.run
    words = [sys.executable, "-m", "mxd", "probe", run, "--tokens", args.tokens, "--data", "python", "--json"]
    output = subprocess.run([*words, "--student", args.student], check=True, stdout=subprocess.PIPE).stdout
    latents = json.loads(output)["token_level"]["students"][args.student]["latents"]
    best: dict[str, dict[str, Any]] = {}
    for latent in sorted(latents, key=lambda latent: -latent["skill_validation"]):
        best.setdefault(latent["concept"], latent)
    chosen = list(best.values())[:10]
    shown = _what_they_do(run, args.student, [latent["latent"] for latent in chosen], int(args.tokens))
    rows = [
        {
            "expert": latent["latent"],
            "concept": latent["concept"],
            "F1": latent["f1"],
            "precision": latent["precision"],
            "recall": latent["recall"],
            "average precision": latent["average_precision"],
            "firing rate": latent["firing_rate"],
            **what,
        }
        for latent, what in zip(chosen, shown, strict=True)
    ]
    print_table(rows, args.name)
    config = json.loads((run / "run.json").read_text())["config"]
    details = {"student": args.student, "recipe": config["recipe"], "latents": chosen}
    title = f"Ten experts of {args.student} that name a concept, chosen by validation"
    write_report(args.name, title, rows, machine(), details)


@torch.no_grad()
def _what_they_do(run: Path, name: str, latents: Sequence[int], num_tokens: int) -> list[dict[str, object]]:
    description = read_finished_run(run)
    [student] = load_students(run, description["students"], [name])
    language_model = load_run_model(run, description)
    model, tokenizer = cast(nn.Module, language_model.model), language_model.tokenizer
    layer = student.candidate.layer
    config = description["config"]
    probed = Probed(model, tokenizer, [student.candidate], config["context"], config["module"])
    data = open_data(DataName("python", None))
    assert isinstance(data, SpanSet), "python has spans"
    tokens = collect_tokens(probed, data, num_tokens)
    values = next(codes.values for codes in tokens.codes if codes.name == name).tocsc()
    ids = next(codes.values for codes in tokens.codes if codes.name == TOKEN_IDENTITY).indices
    shown: list[dict[str, object]] = []
    for latent in latents:
        column = values[:, [latent]].tocoo()
        sums = np.bincount(ids[column.row], weights=column.data, minlength=int(ids.max()) + 1)
        fires_on = [_written(tokenizer.decode([int(token)])) for token in np.argsort(-sums)[:6] if sums[token] > 0]
        strongest = column.row[np.argsort(-column.data, kind="stable")[:CASES]]
        effect = torch.zeros(config_vocabulary(model))
        for place in strongest:
            # The document's beginning up to the token, as far back as a context reaches.
            first = max(int(np.flatnonzero(tokens.documents == tokens.documents[place])[0]), place - probed.body + 1)
            context = torch.tensor([[t for t in (probed.bos,) if t is not None] + ids[first : place + 1].tolist()])
            x = block_activations(model, context, [layer], module_path=config["module"])[layer].x[0, -1:]
            atom = student.candidate.network.atoms(x.float(), torch.tensor([[latent]]))[0, 0]
            effect += _logits(model, atom) / len(strongest)
        order = effect.argsort(descending=True)
        shown.append(
            {
                "fires on": " ".join(fires_on),
                "promotes": " ".join(_written(tokenizer.decode([int(token)])) for token in order[:6]),
                "suppresses": " ".join(_written(tokenizer.decode([int(token)])) for token in order.flip(0)[:4]),
            }
        )
    return shown


def config_vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _logits(model: Any, vector: torch.Tensor) -> torch.Tensor:
    """Return what a vector added to the residual stream does to the logits directly, up to the last norm's scale."""
    centred = (vector - vector.mean()) * model.transformer.ln_f.weight
    return model.get_output_embeddings().weight.float() @ centred.float()


def _written(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", "↵").replace(" ", "·").replace("|", "¦") + "`"


if __name__ == "__main__":
    main()
