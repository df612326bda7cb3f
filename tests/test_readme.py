import json
import re
from pathlib import Path

import pytest
import torch

import mxd

README = Path(__file__).parent.parent / "README.md"
LAYERS_PAGE = README.parent / "docs/layers.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_python_lines_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # One in ten or so random rows of experts has an entry so small that float32 misses a rank.
    torch.manual_seed(0)
    without_a_run, with_the_demo = blocks(README)
    names: dict[str, object] = {}
    exec(compile(without_a_run, str(README), "exec"), names)
    assert capsys.readouterr().out.startswith("def main(argv):")
    layer = names["layer"]
    assert isinstance(layer, mxd.MixtureOfDecoders)
    torch.nn.init.normal_(layer.W_dec)
    mxd.save(layer, tmp_path / "demo-run/layers/3/mxd-k32")
    exec(compile(with_the_demo, str(README), "exec"), names)
    assert capsys.readouterr().out == "rank of an expert: 256 of 256\n"


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize("lines", blocks(LAYERS_PAGE))
def test_the_examples_of_the_page_on_layers_run(
    lines: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    Path("notes.txt").write_text("\n\n".join(words), encoding="utf-8")
    names: dict[str, object] = {}
    exec(compile(lines, str(LAYERS_PAGE), "exec"), names)
    if "Tied" in names:
        layer = names["layer"]
        assert type(layer) is names["Tied"]
        assert isinstance(layer, mxd.SparseLayer)
        assert (layer.kind, layer.d_out, layer.k, layer.provenance.layer) == ("tied", 256, 8, 3)
