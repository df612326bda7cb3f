import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mxd

HEAVY = [
    "transformers",
    "datasets",
    "matplotlib",
    "rich",
    "tyro",
    "jinja2",
    "pyarrow",
    "tokenizers",
    "huggingface_hub",
    "triton",
]
PACKAGE = Path(mxd.__file__).parent


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_importing_the_package_imports_nothing_heavy_and_warns_of_nothing() -> None:
    code = f"import sys, mxd; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")


def test_every_public_name_exists() -> None:
    assert len(set(mxd.__all__)) == len(mxd.__all__)
    for name in mxd.__all__:
        assert hasattr(mxd, name)


def test_layers_and_kernels_import_torch_and_each_other_only() -> None:
    files = [*PACKAGE.glob("layers/*.py"), *PACKAGE.glob("kernels/*.py"), PACKAGE / "metrics.py", PACKAGE / "losses.py"]
    assert len(files) > 10
    for path in files:
        # Nothing but a call on a GPU imports these; the test above holds that.
        known = {"torch", "jaxtyping"} | ({"triton"} if path.stem.startswith("triton_") else set[str]())
        for name in imported(path):
            root = name.partition(".")[0]
            if root == "mxd":
                assert name.startswith(("mxd.layers", "mxd.kernels")), f"{path} imports {name}"
            else:
                assert root in known | sys.stdlib_module_names, f"{path} imports {name}"
