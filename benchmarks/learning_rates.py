"""Which learning rate each kind wants: the sweep behind `--lr auto`.

    python benchmarks/learning_rates.py --model MODEL --text TEXT --layer 2 --tokens 2M --json FILE

All rates of all kinds learn on one stream. The score is the fvu on held-out text after training.
"""

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mxd.bundled import held_out_modules
from mxd.cli.numbers import parse_count
from mxd.data.text import open_text
from mxd.data.tokens import held_out_contexts, special_tokens
from mxd.evaluation.faithfulness import Candidate, EvaluationText, reconstructions
from mxd.models import vocabulary_size
from mxd.training.config import TrainConfig
from mxd.training.decompose import make_plan
from mxd.training.plan import Plan
from mxd.training.streams import activation_stream
from mxd.training.student import Student, StudentConfig
from mxd.training.train import train


def sweep(plan: Plan, rates: list[float]) -> list[dict[str, object]]:
    """Train every kind at every rate and return a row each."""
    students = {
        (student.kind, rate): Student(
            f"{student.id}-lr{rate:g}", student.layer, student.build(), StudentConfig(lr=rate)
        )
        for student in plan.students
        for rate in rates
    }
    with tempfile.TemporaryDirectory() as folder:
        train(
            list(students.values()),
            activation_stream(plan),
            Path(folder),
            batch_tokens=plan.config.batch_tokens,
            schedule=plan.schedule,
            autocast=plan.resources.autocast,
        )
    config, tokenizer = plan.config, plan.language_model.tokenizer
    source = open_text(config.text, held_out_modules=held_out_modules())
    held_out = held_out_contexts(
        source,
        tokenizer,
        context=config.context,
        num_tokens=config.eval_tokens,
        vocab_size=vocabulary_size(plan.language_model.model),
    )
    text = EvaluationText(
        contexts=held_out.contexts, documents=held_out.documents, special_ids=special_tokens(tokenizer)
    )
    candidates = [Candidate(name=s.id, layer=s.layer, network=s.network) for s in students.values()]
    quality = reconstructions(plan.language_model.model, candidates, text)
    return [
        {"kind": kind, "lr": rate, "fvu": quality[student.id].content.fvu, "nmse": quality[student.id].content.nmse}
        for (kind, rate), student in students.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--tokens", type=parse_count, default=2_000_000)
    parser.add_argument("--batch-tokens", type=parse_count, default=4096)
    parser.add_argument("--expansion", type=int, default=32)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--kinds", nargs="+", default=["mxd", "transcoder", "skip-transcoder", "topk-sae"])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--hardware", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = TrainConfig(
        model=args.model,
        text=tuple(args.text),
        layer=(args.layer,),
        kind=tuple(args.kinds),
        k=(args.k,),
        rank=args.rank or "auto",
        tokens=args.tokens,
        # As the sweeps in results/ had it, whatever `auto` is now.
        warmup_tokens=args.tokens // 25,
        batch_tokens=args.batch_tokens,
        expansion=args.expansion,
        eval_tokens=32_768,
        threads=args.threads,
    )
    plan = make_plan(config)
    rows = sweep(plan, args.rates)
    table = Table("kind", *(f"{rate:g}" for rate in args.rates), title="fvu on held-out text by learning rate")
    for kind in args.kinds:
        table.add_row(kind, *(f"{row['fvu']:.4f}" for row in rows if row["kind"] == kind))
    Console().print(table)
    if args.json:
        facts = {
            "model": Path(args.model).name,
            "layer": args.layer,
            "tokens": args.tokens,
            "batch_tokens": args.batch_tokens,
            "expansion": args.expansion,
            "k": args.k,
            "width": plan.sites[args.layer].d_in,
            "precision": plan.resources.precision,
            "threads": plan.resources.threads,
            "torch": torch.__version__,
            "hardware": args.hardware,
            "date": date.today().isoformat(),
        }
        args.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
