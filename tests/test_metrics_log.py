import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mxd.atomic import JSON
from mxd.runs.metrics_log import MetricsLog, MetricsSink, TensorBoardSink, WandbSink, flatten_record, read_metrics


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, first_step=0) as log:
        for step in (0, 10, 20, 30):
            log.log({"step": step, "students": {"a": {"loss": math.nan, "fvu": 0.5, "rates": [math.inf, 1]}}})
        assert len(read_metrics(path)) == 4
    assert "NaN" not in path.read_text()
    with path.open("a") as file:
        file.write('{"step": 40, "stu')
    assert [record["step"] for record in read_metrics(path)] == [0, 10, 20, 30]
    with MetricsLog(path, first_step=20) as log:
        log.log({"step": 20})
    assert read_metrics(path) == [
        {"step": 0, "students": {"a": {"loss": None, "fvu": 0.5, "rates": [None, 1]}}},
        {"step": 10, "students": {"a": {"loss": None, "fvu": 0.5, "rates": [None, 1]}}},
        {"step": 20},
    ]
    MetricsLog(path, first_step=0).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\n[3]\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert "Line 2" in caplog.text
    assert "Line 3" in caplog.text


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", first_step=0) as log, pytest.raises(ValueError, match="'step'"):
        log.log({"loss": 1.0})


def test_flattened_records_hold_finite_numbers_only() -> None:
    record: dict[str, JSON] = {
        "step": 1,
        "tokens": 5,
        "note": "x",
        "done": True,
        "students": {"mxd-k16": {"fvu": 0.5, "loss": math.nan, "l0": None}},
    }
    assert flatten_record(record) == {"tokens": 5, "students/mxd-k16/fvu": 0.5}


@pytest.mark.parametrize("module", [None, ModuleType("a folder of that name")])
def test_a_missing_extra_is_one_sentence(
    tmp_path: Path, module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(ValueError, match=r"pip install 'mxd\[wandb\]'"):
        WandbSink(project="p", folder=tmp_path, configuration={}, name="n", identity="i")
    with pytest.raises(ValueError, match=r"pip install 'mxd\[tensorboard\]'"):
        TensorBoardSink(tmp_path, first_step=0)


def test_sinks_pass_on_flattened_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Service:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append(("log", record, step))

        def finish(self) -> None:
            calls.append(("finish",))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("close",))

    def start(**settings: object) -> Service:
        calls.append(("init", settings["id"], settings["resume"]))
        return Service()

    def open_writer(folder: str, purge_step: int) -> Service:
        calls.append(("open", folder, purge_step))
        return Service()

    for name, attribute, function in (
        ("wandb", "init", start),
        ("torch.utils.tensorboard", "SummaryWriter", open_writer),
    ):
        module = ModuleType(name)
        setattr(module, attribute, function)
        monkeypatch.setitem(sys.modules, name, module)
    sinks: list[MetricsSink] = [
        WandbSink(project="p", folder=tmp_path, configuration={"k": 1}, name="n", identity="i"),
        TensorBoardSink(tmp_path, first_step=5),
    ]
    for sink in sinks:
        sink.log({"step": 6, "students": {"a": {"fvu": 0.5}}})
        sink.close()
    assert calls == [
        ("init", "i", "allow"),
        ("open", str(tmp_path), 5),
        ("log", {"students/a/fvu": 0.5}, 6),
        ("finish",),
        ("students/a/fvu", 0.5, 6),
        ("close",),
    ]
