"""`mxd privacy`: every command on files, its page, its JSON and its refusals."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mxd.privacy.demo
from mxd.privacy.certificate import Certificate
from mxd.privacy.classifiers import LogisticRegressionConfig, MlpConfig, load_classifier, save_classifier
from mxd.privacy.examples import Examples
from mxd.privacy.fitting import FitConfig, fit_classifier
from mxd.privacy.measures import measure_privacy
from mxd.privacy.page import Section, make_cases, write_page
from mxd.privacy.pareto_front import Front, FrontPoint, front_png
from tests.privacy_examples import CLASSES, blobs, trained
from tests.tiny_run import Command, assert_refused, command, tree

QUICK = ("--steps", 6, "--check-every", 3, "--optimizer", "adam", "--lr", 0.02, "--min-accuracy", 0)


@pytest.fixture
def mxd_command(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A logistic regression, a perceptron, and files of their examples."""
    place = tmp_path_factory.mktemp("privacy")
    whole = blobs(80, seed=1)
    for name, config in (
        ("logistic", LogisticRegressionConfig(d_in=4, num_classes=CLASSES)),
        ("mlp", MlpConfig(d_in=4, num_classes=CLASSES, hidden=(16,))),
    ):
        model = config.build()
        fit_classifier(model, whole, FitConfig(epochs=5, batch=16, lr=0.02))
        save_classifier(place / name, config, model)
    for name, examples in (
        ("protected", whole.take(slice(0, 8))),
        ("retained", whole.take(slice(8, 80))),
        ("test", blobs(30, seed=2)),
    ):
        assert isinstance(examples.inputs, Tensor)
        numpy.savez(place / f"{name}.npz", x=examples.inputs.numpy(), y=examples.labels.numpy())
    return place


def on(folder: Path, model: str = "mlp", *, test: bool = True) -> list[object]:
    given: list[object] = ["--model", folder / model]
    for name in ("protected", "retained", *(["test"] if test else [])):
        given += [f"--{name}", folder / f"{name}.npz"]
    return given


def test_induce_writes_a_model_and_a_page_and_resumes_to_the_same(
    mxd_command: Command, folder: Path, tmp_path: Path
) -> None:
    before = tree(folder)
    out = tmp_path / "run"
    ended = mxd_command("privacy", "induce", *on(folder), "--out", out, *QUICK, "--json")
    assert ended.status == 0
    found = json.loads(ended.out)
    assert found == json.loads((out / "privacy.json").read_text())
    assert found["after"]["protected"]["confidence_distance"] <= found["before"]["protected"]["confidence_distance"]
    assert tree(folder) == before
    told = load_classifier(out / "model").model
    x = torch.from_numpy(numpy.load(folder / "protected.npz")["x"])
    distance = (told(x).detach().softmax(-1).amax(-1) - 1 / CLASSES).clamp_min(0).mean()
    assert float(distance) == pytest.approx(found["after"]["protected"]["confidence_distance"], rel=1e-5)
    again = mxd_command("privacy", "induce", *on(folder), "--out", out, *QUICK)
    assert_refused(again, "privacy induce", "exists; pass --resume")
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert mxd_command("privacy", "induce", *on(folder), "--out", out, *QUICK, "--resume").status == 0
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    page = (out / "report.html").read_text()
    assert "Protected instances" in page
    assert page.count('class="card said"') == 8


def test_sweep_draws_the_front(mxd_command: Command, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    ended = mxd_command("privacy", "sweep", *on(folder), "--out", out, *QUICK, "--thetas", 0.25, 0.75)
    assert ended.status == 0
    found = json.loads((out / "front.json").read_text())
    assert [point["theta"] for point in found["points"]] == [None, 0.25, 0.75]
    assert found["measured_on"] == "test"
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "report.html").read_text()
    assert (out / "theta-0.25" / "model" / "config.json").is_file()


def test_evaluate_and_attack_report_in_json_and_in_a_table(mxd_command: Command, folder: Path) -> None:
    ended = mxd_command("privacy", "evaluate", *on(folder), "--json")
    found = json.loads(ended.out)
    assert set(found) == {"num_classes", "protected", "retained", "test", "neighbours"}
    shown = mxd_command("privacy", "evaluate", *on(folder), "--micro-batch", 7, "--device", "cpu")
    assert "neighbours" in shown.out
    assert "Computed on cpu." in shown.err
    assert_refused(
        mxd_command("privacy", "evaluate", *on(folder), "--micro-batch", 0),
        "privacy evaluate",
        "micro-batch must be at least 1; got 0",
    )
    steps = ("--low", "None", "--high", "None", "--steps", 3, "--relearn-steps", 3)
    attacked = json.loads(mxd_command("privacy", "attack", *on(folder), *steps, "--json").out)
    assert attacked["clean"] == found["protected"]
    assert attacked["pgd_confidence"]["confidence_distance"] >= attacked["clean"]["confidence_distance"]
    assert "relearned" in mxd_command("privacy", "attack", *on(folder), *steps).out


def test_certify_writes_a_model_with_a_certificate_that_holds(
    mxd_command: Command, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "certified"
    ended = mxd_command("privacy", "certify", *on(folder, "logistic"), "--out", out, "--json")
    assert ended.status == 0
    found = json.loads(ended.out)
    certificate = Certificate.from_json((out / "certificate.json").read_text())
    assert certificate.certified
    assert found["certificate"]["sigma"] == certificate.sigma
    assert json.loads((out / "privacy.json").read_text()) == found
    # What is computed from the weights without noise is in the owner's file, and in none that is published.
    whole = json.loads((out / "owner-only.json").read_text())
    assert Certificate.from_json(json.dumps(whole["certificate"])).public() == certificate
    for name in ("certificate.json", "privacy.json", "report.html"):
        assert not {"gradient_after", "step_residual", "without_noise"} & set(
            re.findall(r"\w+", (out / name).read_text())
        )
    seeded = mxd_command("privacy", "certify", *on(folder, "logistic"), "--out", tmp_path / "no", "--noise-seed", 1)
    assert_refused(seeded, "privacy certify", "the noise is seeded")
    assert load_classifier(out / "model").config == LogisticRegressionConfig(d_in=4, num_classes=CLASSES)
    assert "What the certificate rests on" in (out / "report.html").read_text()
    assert_refused(
        mxd_command("privacy", "certify", *on(folder, "logistic"), "--out", out), "privacy certify", "a new or an empty"
    )
    for wrong, words in (
        (("mlp", "--epsilon", 1), "a certificate needs a logistic regression"),
        (("logistic", "--weight-decay", 0), "weight_decay must be above 0"),
        (("logistic", "--uniformity", "square", "--weight-decay", 1e-9), "weight_decay"),
    ):
        refused = mxd_command("privacy", "certify", *on(folder, str(wrong[0])), "--out", tmp_path / "no", *wrong[1:])
        assert_refused(refused, "privacy certify", words)
        assert not (tmp_path / "no").exists()


def test_bad_input_ends_with_one_sentence_and_nothing_written(
    mxd_command: Command, folder: Path, tmp_path: Path
) -> None:
    before = tree(folder)

    def save(name: str, x: Any, y: Any) -> Path:
        numpy.savez(tmp_path / f"{name}.npz", x=x, y=y)
        return tmp_path / f"{name}.npz"

    retained = numpy.load(folder / "retained.npz")
    x, y = retained["x"], retained["y"]
    nan = x[:3].copy()
    nan[1, 1] = numpy.nan
    for name, wrong, words in (
        ("empty", save("empty", x[:0], y[:0]), "it is empty"),
        ("overlap", save("overlap", x[:5], y[:5]), "no row in common; 5 retained rows are also protected"),
        ("nan", save("nan", nan, y[:3]), "the protected set must hold finite numbers; 1 of its 3 examples"),
        ("labels", save("labels", x[:3] + 9, [0, 1, 7]), "labels of the protected set must lie in [0, 2]"),
        ("shape", save("shape", x[:3, :2], y[:3]), "must have one shape"),
        ("missing", tmp_path / "missing.npz", "does not exist"),
    ):
        given = ["--model", folder / "mlp", "--protected", wrong, "--retained", folder / "retained.npz"]
        for verb in ("induce", "sweep"):
            out = tmp_path / f"out-{name}"
            assert_refused(mxd_command("privacy", verb, *given, "--out", out), f"privacy {verb}", words)
            assert not out.exists()
    both = ["--protected", save("a", x[:3, :2], y[:3]), "--retained", save("b", x[3:9, :2], y[3:9])]
    ended = mxd_command("privacy", "evaluate", "--model", folder / "mlp", *both)
    assert_refused(ended, "privacy evaluate", "the model must take the protected examples, each of shape")
    assert_refused(
        mxd_command("privacy", "induce", *on(folder), "--out", tmp_path / "o", "--theta", 1),
        "privacy induce",
        "theta must lie strictly between 0 and 1; got 1.0",
    )
    assert_refused(
        mxd_command("privacy", "sweep", *on(folder), "--out", tmp_path / "o", *QUICK, "--thetas", 0.5, 1.5),
        "privacy sweep",
        "theta must lie strictly between 0 and 1; got 1.5",
    )
    assert_refused(
        mxd_command("privacy", "sweep", *on(folder), "--out", tmp_path / "o", *QUICK, "--thetas", 0.5, 0.5),
        "privacy sweep",
        "thetas must name at least one, each only once; got 0.5 0.5",
    )
    assert_refused(
        mxd_command("privacy", "induce", *on(folder), "--out", tmp_path / "o", "--recipe", "x"),
        "privacy induce",
        "recipe must be one of",
    )
    assert not (tmp_path / "o").exists()
    assert tree(folder) == before


def test_a_recipe_gives_the_defaults_and_what_is_given_beside_it_wins(
    mxd_command: Command, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = ("--recipe", "cifar100-vit-b16", "--steps", 2)
    assert mxd_command("privacy", "induce", *on(folder), "--out", out, *given).status == 0
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["steps"] == 2
    assert config["objective"] == {"theta": 0.75, "weight_decay": 0.05, "uniformity": "kl-p-u"}
    assert (config["lr"], config["min_accuracy"], config["schedule"]) == (1e-3, 0.86, "step")
    listed = mxd_command("privacy", "induce", "--recipe", "list")
    assert listed.status == 0
    assert re.search(r"cifar100-vit-b16 +vit-b-16 +CIFAR-100 +100 +0\.75 +60", listed.out)


def test_the_demo_writes_models_a_certificate_and_a_page(
    mxd_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxd.privacy.demo, "INDUCE", replace(mxd.privacy.demo.INDUCE, steps=2, check_every=1))
    monkeypatch.setattr(mxd.privacy.demo, "FIT", replace(mxd.privacy.demo.FIT, epochs=1))
    monkeypatch.setattr(mxd.privacy.demo, "NETWORK", replace(mxd.privacy.demo.NETWORK, widths=(4, 6)))
    out = tmp_path / "demo"
    out.mkdir()
    (out / mxd.privacy.demo.MARK).write_text("{}")
    ended = mxd_command("privacy", "demo", "--out", out)
    assert ended.status == 0
    assert "Certificate: weights released" in " ".join(ended.err.split())
    assert Certificate.from_json((out / "logistic-regression" / "certificate.json").read_text()).certified
    assert load_classifier(out / "network" / "model").model(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 12
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert_refused(mxd_command("privacy", "demo", "--out", tmp_path / "mine"), "privacy demo", "or an earlier demo")
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_the_digits_are_told_apart() -> None:
    data = mxd.privacy.demo.read_digits()
    assert [len(examples) for examples in data] == [20, 1237, 180, 360]
    assert sum(len(set(examples.digests())) for examples in data) >= 1790


class Tags(HTMLParser):
    """All tags that a page opens."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)


def test_what_instances_and_classes_say_is_escaped_on_the_page(tmp_path: Path) -> None:
    model: nn.Module = trained(blobs(30, seed=1))

    class Reader(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return model(input_ids[:, :4].float())

    protected = Examples(inputs={"input_ids": torch.arange(8).reshape(2, 4)}, labels=torch.tensor([0, 1]))
    cases = make_cases(
        Reader(),
        Reader(),
        protected,
        class_names=("<script>alert(1)</script>", "b\x1b[31m", "c"),
        texts=("<img src=x onerror=alert(2)>\x00", "y" * 1000),
    )
    measures = measure_privacy(Reader(), protected=protected, retained=protected)
    section = Section(heading="<h9>", before=measures, after=measures, cases=cases, note="<i>", facts={"<b>": "<u>"})
    front = Front((FrontPoint(None, 0.5, 0.9), FrontPoint(0.5, 0.1, 0.8)), "test")
    write_page(tmp_path / "page.html", title="<t>", lede="<l>", facts={"<f>": "<g>"}, sections=[section], front=front)
    text = (tmp_path / "page.html").read_text()
    parser = Tags()
    parser.feed(text)
    assert not {"script", "img", "h9", "u", "t", "l", "f"} & set(parser.names)
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "y" * 500 not in text
    assert front_png(front).startswith(b"\x89PNG")


def test_of_many_classes_a_page_shows_the_likeliest_before_and_the_rest_together() -> None:
    logits = torch.linspace(0, 4, 25).expand(1, 25)

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits.expand(len(x), 25)

    examples = Examples(inputs=torch.rand(1, 3, 4, 4), labels=torch.tensor([24]))
    (case,) = make_cases(Constant(), Constant(), examples)
    assert [bar.name for bar in case.bars] == [str(c) for c in range(15, 25)]
    assert [bar.is_label for bar in case.bars] == [False] * 9 + [True]
    assert case.other_before == pytest.approx(float(logits.softmax(-1)[0, :15].sum()), abs=1e-5)
    assert case.picture.startswith("data:image/png;base64,")
