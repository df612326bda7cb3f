import re
from pathlib import Path

import pytest
import torch

import mxd

README = Path(__file__).parent.parent / "README.md"


LAYERS_PAGE = README.parent / "docs/layers.md"


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_python_lines_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = mxd.find_mlp(mxd.load_language_model("bundled").model, 3)
    config = mxd.MixtureOfDecodersConfig(d_in=site.d_in, d_hidden=site.d_hidden, d_out=site.d_out, num_experts=64, k=32)
    layer = mxd.MixtureOfDecoders(config, torch.Generator().manual_seed(0))
    mxd.save(layer, tmp_path / "demo-run/layers/3/mxd-k32")
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks("python")
    exec(compile(lines, str(README), "exec"), {})
    assert capsys.readouterr().out.startswith("def main(argv):")


def test_every_option_that_the_readme_names_exists() -> None:
    from mxd.training.config import TrainConfig

    options = set(re.findall(r"--([a-z-]+)", "\n".join(blocks("sh"))))
    known = {name.replace("_", "-") for name in TrainConfig.__dataclass_fields__} | {"out", "resume"}
    assert options <= known


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


@pytest.mark.parametrize("lines", blocks("python", LAYERS_PAGE))
def test_the_examples_of_the_page_on_layers_run(lines: str) -> None:
    exec(compile(lines, str(LAYERS_PAGE), "exec"), {})
