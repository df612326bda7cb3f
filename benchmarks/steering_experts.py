"""What steering and ablating experts does that token-level probing has named, for docs/steering.md.

    python benchmarks/steering_experts.py RUN --student 3/mxd-k32 --experts benchmarks/results/experts_demo.json

The file of the experts is what `benchmarks/experts.py ten` writes: rows with `expert` and `concept`. Each expert is
given thirty times the 99th percentile of its own values at every position while the model writes ten texts of 32 tokens
behind a line of Python. Then each is ablated by itself on held-out text.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from harness import machine, print_table, write_report
from mxd.edits import Ablate, Edit
from mxd.evaluation.opening import open_run, read_finished_run
from mxd.evaluation.students import load_students
from mxd.steering.experiment import Experiment, Intervention
from mxd.steering.sampling import Sampling
from mxd.steering.side_effects import ELSEWHERE, FIRING, NEAR, side_effects

PROMPT = "def main(args):\n"
MOST_RAISED = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--student", required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--name", required=True, help="name of the files in benchmarks/results")
    parser.add_argument("--hardware", default="")
    args = parser.parse_args()
    experts: list[Mapping[str, Any]] = json.loads(args.experts.read_text())["rows"]
    description = read_finished_run(args.run)
    (student,) = (one.candidate for one in load_students(args.run, description["students"], [args.student]))
    opened = open_run(args.run, description, (), None, None)
    latents = [int(expert["expert"]) for expert in experts]
    sampling, intervention = Sampling(prompt=PROMPT), Intervention(strength=30.0, unit="p99")
    experiment = Experiment(opened.language_model, student, opened.text, sampling, intervention, latents)
    before = Counter(_words(opened.language_model.tokenizer, experiment.unsteered.texts))
    rows: list[dict[str, object]] = []
    for expert, latent in zip(experts, latents, strict=True):
        steered = next(experiment.rows([latent]), None)
        ablated = {
            effect.group: effect
            for effect in side_effects(
                cast("nn.Module", opened.language_model.model),
                student,
                (),
                (Edit(latents=(latent,), operation=Ablate()),),
                opened.text,
            )
        }
        more: Counter[str] = Counter()
        if steered is not None:
            more = Counter(_words(opened.language_model.tokenizer, steered.texts))
            more.subtract(before)
        raised = [repr(word) for word, count in more.most_common(MOST_RAISED) if count > 1]
        rows.append(
            {
                "expert": latent,
                "concept": expert["concept"],
                "tokens that steering writes most more of": ", ".join(raised) or "–",
                "KL": None if steered is None else round(steered.kl, 3),
                "coherence": None if steered is None else round(steered.coherence, 3),
                "loss": None if steered is None else round(steered.loss, 2),
                **{
                    f"ablated: change of loss, {short}": f"{ablated[group].after - ablated[group].before:+.4f}"
                    if group in ablated
                    else "–"
                    for group, short in ((FIRING, "where it fires"), (NEAR, "beside"), (ELSEWHERE, "elsewhere"))
                },
            }
        )
    print_table(rows, args.name)
    described = {**machine(), **({"hardware": args.hardware} if args.hardware else {})}
    details = {"student": args.student, "loss, not steered": round(experiment.unsteered.loss, 3), "prompt": PROMPT}
    write_report(args.name, f"Ten named experts of {args.student}, steered and ablated", rows, described, details)


def _words(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    return [
        str(tokenizer.decode([token]))
        for text in texts
        for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ]


if __name__ == "__main__":
    main()
