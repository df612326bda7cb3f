import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mxd.atomic import JSON
from mxd.evaluation.curves import curve_svgs, read_curves
from mxd.evaluation.drawing import KIND_STYLES, describe, kind_style, split_student
from mxd.evaluation.expert_use import UseHistogram
from mxd.evaluation.frontier import draw_frontier, frontier_svg
from mxd.evaluation.grid import frontier_points
from mxd.evaluation.histograms import use_svgs
from mxd.evaluation.report import ExpertExample, ExpertPage, write_report
from mxd.evaluation.rows import EvaluationRow
from mxd.evaluation.tables import COLUMNS, SCRUTINY_COLUMNS, format_table, group_rows, markdown_table
from mxd.quantities import compact

VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use", "rect", "circle"}


HISTOGRAM = UseHistogram([0.001, 0.01, 0.1, 1.0], [3, 0, 2], 7)


def row(kind: str = "mxd", k: int = 32, layer: int = 8, ce_increase: float = 0.0123, seed: int = 0) -> EvaluationRow:
    return EvaluationRow(
        id=f"{kind}-k{k}" + (f"-seed{seed}" if seed else ""),
        model="gpt2",
        layer=layer,
        kind=kind,
        k=k,
        k_trained=k,
        num_latents=21_490,
        d_hidden=3072 if kind == "mxd" else None,
        activation="gelu" if kind == "mxd" else None,
        encoder="mlp" if kind == "mxd" else None,
        rank=None,
        normalize_experts=True,
        shared_expert=False if kind == "mxd" else None,
        selection="topk",
        shared_penalty=None,
        l1_coefficient=None,
        random_k=False,
        init="paper",
        seed=seed,
        parameters=37_751_808 if kind == "mxd" else 37_770_000,
        flops_per_token=42_500_000,
        tokens_trained=20_000_000,
        tokens_evaluated=262_144,
        documents_evaluated=512,
        l0=k - 0.5,
        nmse=abs(ce_increase) * 6,
        fvu=abs(ce_increase) * 7,
        ce_base=3.6,
        ce=3.6 + ce_increase,
        ce_increase=ce_increase,
        ce_increase_interval=(ce_increase - 0.001, ce_increase + 0.002),
        ce_zero=3.8,
        ce_mean=3.75,
        bits_per_byte_base=1.18,
        bits_per_byte=1.18 + ce_increase / 3,
        loss_recovered=1 - ce_increase / 0.2,
        loss_recovered_interval=None,
        kl=abs(ce_increase),
        kl_interval=(abs(ce_increase) * 0.9, abs(ce_increase) * 1.2),
        dead_fraction=0.125,
        specialisation=0.3 if kind == "mxd" else None,
        specialisation_constant_gain=0.4 if kind == "mxd" else None,
        ngram_agreement=(0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6),
        jacobian_cosine=0.9,
        stable_rank=12.5 if kind == "mxd" else 1.0,
        numerical_rank=768.0 if kind == "mxd" else 1.0,
        gini=0.5,
        top_share=0.75,
        effective_latents=120.5,
        top_energy_share=0.1,
        always_on=2,
        always_on_share=0.25,
        fvu_permuted=0.98,
        special_positions="replace",
        nmse_all_positions=None,
        fvu_all_positions=None,
    )


def frontier(ks: tuple[int, ...], layers: tuple[int, ...] = (8,), shift: float = 0.0) -> list[EvaluationRow]:
    losses = {"mxd": 0.003, "transcoder": 0.12, "another-kind": 0.01}
    return [
        row(kind, k, layer, loss / math.sqrt(k) - shift)
        for layer in layers
        for kind, loss in losses.items()
        for k in ks
    ]


def together() -> EvaluationRow:
    nothing = dict.fromkeys(["layer", "k", "num_latents", "d_hidden", "activation", "init", "seed", "parameters"])
    unmeasured = dict.fromkeys(["flops_per_token", "tokens_trained", "l0", "nmse", "fvu", "dead_fraction"])
    unmeasured |= dict.fromkeys(["specialisation", "specialisation_constant_gain", "ce_mean", "jacobian_cosine"])
    unmeasured |= dict.fromkeys(["stable_rank", "numerical_rank", "gini", "top_share", "always_on", "always_on_share"])
    unmeasured |= dict.fromkeys(["fvu_permuted", "k_trained", "encoder", "rank", "normalize_experts", "selection"])
    unmeasured |= dict.fromkeys(
        ["shared_expert", "l1_coefficient", "random_k", "effective_latents", "top_energy_share"]
    )
    return dataclasses.replace(row(), id="together", kind="together", **nothing, **unmeasured)


def all_layers(kind: str = "mxd", k: int = 32) -> EvaluationRow:
    return dataclasses.replace(row(kind, k, ce_increase=0.4), id=f"together/{kind}-k{k}", layer=None, nmse=None)


def records(steps: int = 500) -> list[dict[str, JSON]]:
    fvu = [[math.exp(-step / 100) / k + 0.01 for k in (16, 64)] for step in range(steps)]
    return [
        {"step": step, "tokens": 4096 * step, "students": {"mxd-k16": {"fvu": low}, "mxd-k64": {"fvu": high}}}
        for step, (low, high) in enumerate(fvu)
    ]


class Page(HTMLParser):
    """Checks that every element is closed, in order, and gathers text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [values[name] or "" for name in ("src", "href", "xlink:href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_row_survives_json() -> None:
    for original in (row(), row("transcoder"), together(), all_layers()):
        assert EvaluationRow.from_json(json.loads(json.dumps(original.to_json()))) == original
    diverged = dataclasses.replace(row(), ce=math.nan, fvu=math.inf)
    read = EvaluationRow.from_json(json.loads(json.dumps(diverged.to_json(), allow_nan=False)) | {"later": 1})
    assert math.isnan(read.ce)
    assert read.fvu is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": "32"}, "'k'"),
        ({"kind": None}, "'kind'"),
        ({"ngram_agreement": 0.9}, "'ngram_agreement'"),
        ({"ngram_agreement": ["0.9"]}, "'ngram_agreement'"),
        ({"ngram_agreement": None}, "'ngram_agreement'"),
        ({"kl_interval": [0.1]}, "'kl_interval'"),
        ({"kl_interval": [0.1, None]}, "'kl_interval'"),
    ],
)
def test_a_row_of_another_shape_is_refused(change: dict[str, JSON], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationRow.from_json(row().to_json() | change)
    with pytest.raises(ValueError, match="ce_base"):
        EvaluationRow.from_json({key: value for key, value in row().to_json().items() if key != "ce_base"})


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(frontier((32,)), id="one K"),
        pytest.param(frontier((16, 64)), id="two Ks"),
        pytest.param(frontier((16, 32, 64, 128, 256)), id="five Ks"),
        pytest.param(frontier((16, 32, 64), layers=(4, 8), shift=0.002), id="negative increases, two layers"),
        pytest.param([*frontier((16, 32, 64)), row(k=16, seed=1), together()], id="two seeds, all layers together"),
        pytest.param([row(k=k, seed=n) for k in (4, 8, 16) for n in range(3)] + [all_layers(k=4)], id="three seeds"),
        pytest.param([row(ce_increase=0.0)], id="a single perfect student"),
        pytest.param([row(ce_increase=math.nan)], id="a diverged student"),
    ],
)
def test_the_frontier_is_a_picture(rows: list[EvaluationRow], tmp_path: Path) -> None:
    path, vectors = tmp_path / "frontier.png", tmp_path / "frontier.svg"
    draw_frontier(rows, path, vectors)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000
    assert ElementTree.parse(vectors).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frontier.png", "frontier.svg"]


def test_there_must_be_something_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row with a K"):
        draw_frontier([together()], tmp_path / "frontier.png")
    with pytest.raises(ValueError, match="curve"):
        curve_svgs([])


def test_a_panel_for_the_page_takes_its_colours_from_the_page() -> None:
    points = frontier_points(frontier((16, 32, 64)))
    panel = frontier_svg(points, 8, "nmse")
    assert panel == frontier_svg(points, 8, "nmse")
    assert "var(--kind-mxd, #0072b2)" in panel
    assert "var(--ink, #1f2328)" in panel
    assert Page(panel).tags[0] == "svg"


def test_histograms_of_a_layer_and_kind_share_a_panel() -> None:
    silent = UseHistogram([0.1, 1.0], [0], 5)
    panels = use_svgs({"8/mxd-k16": HISTOGRAM, "8/mxd-k32": HISTOGRAM, "4/transcoder-k8": silent})
    assert len(panels) == 2
    text = Page(panels[0]).text
    for words in ("Layer 8: MxD, share of latents", "K = 16, 7 dead", "K = 32, 7 dead", "10%"):
        assert words in text
    assert "var(--kind-mxd, #0072b2)" in panels[0]
    assert "K = 8, 5 dead" in Page(panels[1]).text


def test_curves_are_thinned_to_means() -> None:
    broken: list[dict[str, JSON]] = [
        {"step": 600, "tokens": 1, "students": {"mxd-k16": {"fvu": None}}},
        {"step": 601},
    ]
    curves = read_curves([*records(500), *broken])
    assert [curve.student for curve in curves] == ["mxd-k16", "mxd-k64"]
    assert len(curves[0].fvu) == 167
    assert curves[0].tokens[0] == 4096
    assert curves[0].fvu[0] == pytest.approx(sum(math.exp(-step / 100) / 16 + 0.01 for step in range(3)) / 3)
    (panel,) = curve_svgs(curves)
    assert "K=16" in Page(panel).text
    assert "K=64" in Page(panel).text


def test_the_best_of_the_same_layer_and_k_is_marked() -> None:
    better, worse = row(ce_increase=-0.001), row("transcoder", ce_increase=0.02)
    groups = group_rows([worse, better, row(k=64), together()])
    assert [len(group.lines) for group in groups] == [2, 1, 1]
    first, second = (
        {column.field: cell for column, cell in zip(COLUMNS, line.cells, strict=True)} for line in groups[0].lines
    )
    assert second["ce_increase"].text == "−0.0010"
    assert first["ce_increase"].text == "+0.0200"
    assert second["loss_recovered"].text == "100.50%"
    assert [name for name, cell in second.items() if cell.best] == [
        "fvu",
        "nmse",
        "ce_increase",
        "loss_recovered",
        "kl",
    ]
    assert not any(cell.best for cell in (*first.values(), *groups[1].lines[0].cells))


def test_tables_of_text_hold_the_numbers() -> None:
    rows = [row(), row("transcoder", ce_increase=0.0456), row(layer=4), all_layers("transcoder")]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_table(rows))
    text = console.export_text()
    for expected in ("MxD", "Transcoder", "Layer 4", "Layer 8", "All layers", "+0.0123", "+0.0456", "37.8M", "12.5%"):
        assert expected in text
    assert "…" not in text
    markdown = markdown_table(rows).splitlines()
    assert len(markdown) == 2 + len(rows)
    assert len({line.count("|") for line in markdown}) == 1
    assert "**+0.0123**" in markdown[3] + markdown[4]


def test_the_second_table_holds_what_lies_behind_the_loss() -> None:
    worse = dataclasses.replace(row("transcoder"), ngram_agreement=(0.5,) * 8, jacobian_cosine=0.25)
    markdown = markdown_table([row(), worse, together()], SCRUTINY_COLUMNS).splitlines()
    assert len({line.count("|") for line in markdown}) == 1
    assert "| **95.0%** | **80.0%** | **60.0%** | **0.9000** | 0.9800 | 12.5 | 768.0 |" in markdown[2]
    assert "| 50.0% | 50.0% | 50.0% | 0.2500 |" in markdown[3]
    assert "| 95.0% | 80.0% | 60.0% | – | – | – |" in markdown[4]


def test_the_report_is_whole_and_escapes_what_it_shows(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    tokens = ["def", " f", "(x)", ":\n", "\treturn", evil, "\x00\r\n"]
    example = ExpertExample(tokens, [0.0, 0.0, 1.5, 0.0, 0.25, 3.0, 0.0], 5)
    rows = [*frontier((16, 32, 64)), *frontier((16,), layers=(4,)), together()]
    write_report(
        tmp_path / "report.html",
        title=f"Two layers {evil}",
        facts={"Model": "gpt2", evil: evil},
        rows=rows,
        curves=read_curves(records(20)),
        use={f"8/{kind}-k{k}": HISTOGRAM for kind in ("mxd", "another-kind") for k in (16, 32)},
        experts=[ExpertPage(7, 0.002, 3.0, [example] * 5), ExpertPage(9, 0.0, 0.0, [])],
        experts_of="mxd-k32",
        notes=[evil],
        footer="mxd 0.1.0",
    )
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.tags.count("script") == 2, "the frontier's numbers and what draws them"
    assert page.text.count(evil) == 1 + 1 + 2 + 1 + 5
    # Tokens keep their spaces; a line break is one, and shown as one.
    assert "(x):\n\treturn" + evil + "␀\n" in page.text
    assert page.tags.count("mark") == 5
    assert page.tags.count("tr") == 2 * (1 + len(rows) + 3)
    assert "fires on 0.2% of tokens" in page.text
    assert "Two experts of mxd-k32" in page.text
    assert all(address.startswith("#") for address in page.addresses)
    assert len({name for name in page.ids if not name.startswith(("m", "p", "C"))}) == 6 + 2 + 3
    assert page.tags.count("svg") == 2 * 4 + 1 + 2


def test_every_kind_has_a_mark_in_the_report_and_in_its_explorable_picture(tmp_path: Path) -> None:
    kinds = [*KIND_STYLES, "of-somebody-else"]
    write_report(
        tmp_path / "report.html", title="All", facts={}, rows=[row(kind, k) for kind in kinds for k in (8, 16)]
    )
    page = (tmp_path / "report.html").read_text()
    assert all(f"--kind:var(--kind-{kind})" in page for kind in kinds)
    shapes = page[page.index("const SHAPES") :]
    drawn = set(re.findall(r"\"?([\w^])\"?: \"M", shapes[: shapes.index("};")]))
    assert drawn == {kind_style(kind).marker for kind in kinds}


def test_a_long_context_is_cut_around_its_peak(tmp_path: Path) -> None:
    example = ExpertExample([f" w{i}" for i in range(128)], [float(i == 64) for i in range(128)], 64)
    path = tmp_path / "report.html"
    write_report(path, title="t", facts={}, rows=[], experts=[ExpertPage(0, 0.1, 1.0, [example])])
    text = Page(path.read_text(encoding="utf-8")).text
    assert "… w36 w37" in text
    assert "w78…" in text
    assert "Results" not in text


def test_names_and_counts() -> None:
    assert split_student("mxd-k16-h64-seed1") == ("mxd-h64", 16)
    assert split_student("topk-sae-k256") == ("topk-sae", 256)
    assert [compact(count) for count in (37_751_808, 999_999, 480e6, 999, 0)] == ["37.8M", "1M", "480M", "999", "0"]
    assert describe([row(), row("transcoder")]).startswith("37.8M parameters each · trained on 20M tokens")
    assert describe([row(), dataclasses.replace(row(), parameters=10_000_000)]).startswith("10M–37.8M parameters each")


def test_nothing_draws_at_import() -> None:
    modules = ["collect", "curves", "drawing", "expert_use", "frontier", "histograms", "report", "rows", "tables"]
    modules += ["jacobians", "specialisation"]
    imports = "; ".join(f"import mxd.evaluation.{module}" for module in modules)
    check = f"import sys; {imports}; assert not {{'matplotlib', 'transformers', 'datasets'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
