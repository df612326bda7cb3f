import errno
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.atomic import JSON
from mxd.runs import snapshots
from mxd.runs.snapshots import SnapshotError, load_newest_snapshot, save_snapshot

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
    torch.bool,
]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(restored: Tensor, saved: Tensor) -> None:
    assert restored.dtype == saved.dtype
    assert restored.shape == saved.shape
    assert bits(restored) == bits(saved.resolve_conj())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_plain(folder: Path, step: int) -> Path:
    return save_snapshot(folder, step, {"w": torch.full((1000,), float(step))}, {"position": step})


@st.composite
def random_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), max_size=4)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        # Random bytes: NaN payloads, infinities and subnormal numbers have to survive too.
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
        found[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=random_tensors(), state=st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_a_snapshot_comes_back_bit_for_bit(tmp_path: Path, tensors: dict[str, Tensor], state: dict[str, JSON]) -> None:
    folder = tmp_path / "snapshots"
    shutil.rmtree(folder, ignore_errors=True)
    save_snapshot(folder, 7, tensors, state)
    snapshot = load_newest_snapshot(folder)
    assert snapshot is not None
    assert snapshot.step == 7
    assert snapshot.state == state
    assert snapshot.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(snapshot.tensors[name], tensor)


def test_shared_strided_conjugated_and_learned_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "again": base,
        "row": base[1],
        "tail": base.view(-1)[5:],
        "transposed": base.T,
        "expanded": torch.ones(1).expand(5),
        "nothing": base[:0],
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(3),
    }
    save_snapshot(tmp_path, 0, tensors, {})
    snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None
    for name, tensor in tensors.items():
        assert_same_bits(snapshot.tensors[name], tensor)
    snapshot.tensors["base"].zero_()
    assert torch.equal(snapshot.tensors["again"], base)
    reloaded = load_newest_snapshot(tmp_path)
    assert reloaded is not None
    assert torch.equal(reloaded.tensors["base"], base)


def test_views_of_one_buffer_that_do_not_overlap_are_not_copied() -> None:
    buffer = torch.zeros(10)
    views = {"b": buffer[5:], "a": buffer[:5]}
    written = snapshots._without_overlap(views)
    assert {name: tensor.data_ptr() for name, tensor in written.items()} == {
        name: tensor.data_ptr() for name, tensor in views.items()
    }


def test_keys_that_are_no_strings_do_not_break_the_checksum(tmp_path: Path) -> None:
    counts: dict[int, int] = {2: 0, 10: 1}
    save_snapshot(tmp_path, 1, {}, {"deep": {"counts": counts}})
    snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None
    assert snapshot.state == {"deep": {"counts": {"2": 0, "10": 1}}}


def test_only_the_newest_two_snapshots_remain(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100):
        save_plain(tmp_path, step)
    assert names(tmp_path) == ["0000000010", "0000000100"]
    snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None
    assert snapshot.step == 100


def test_a_snapshot_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_plain(tmp_path, 3)
    save_snapshot(tmp_path, 3, {}, {"second": True})
    snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None
    assert snapshot.state == {"second": True}
    assert names(tmp_path) == ["0000000003"]


def test_a_snapshot_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    snapshot = save_plain(tmp_path, 1)
    assert (snapshot / "tensors.safetensors").stat().st_mode == (snapshot / "state.json").stat().st_mode


def test_no_snapshot_is_none(tmp_path: Path) -> None:
    assert load_newest_snapshot(tmp_path / "absent") is None
    (tmp_path / ".0000000003.partial").mkdir()
    assert load_newest_snapshot(tmp_path) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rewrite(path: Path) -> None:
    path.write_text("null")


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, truncate, empty, rewrite, Path.unlink])
def test_a_damaged_snapshot_is_passed_over(
    tmp_path: Path, file: str, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    save_plain(tmp_path, 10)
    newest = save_plain(tmp_path, 20)
    if damage is truncate and file == "state.json":
        truncate(newest / file)  # the final newline, without which the JSON is still whole
    damage(newest / file)
    with caplog.at_level(logging.WARNING):
        snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None
    assert snapshot.step == 10
    assert str(newest) in caplog.text
    assert "damaged" in caplog.text
    save_plain(tmp_path, 15)
    assert names(tmp_path) == ["0000000010", "0000000015"]


def test_when_all_snapshots_are_damaged_it_says_so(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save_plain(tmp_path, step) / "tensors.safetensors")
    with pytest.raises(ValueError, match=r"All 2 snapshots in .* are damaged"):
        load_newest_snapshot(tmp_path)


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    save_plain(tmp_path, 1)
    with pytest.raises(ValueError, match="dtype"):
        save_snapshot(tmp_path, 2, {"w": torch.zeros(1, dtype=torch.complex128)}, {})
    with pytest.raises(ValueError, match="__metadata__"):
        save_snapshot(tmp_path, 2, {"__metadata__": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="JSON"):
        save_snapshot(tmp_path, 2, {}, {"loss": math.nan})
    with pytest.raises(TypeError, match="JSON"):
        save_snapshot(tmp_path, 2, {}, {"nested": {"tensor": torch.zeros(1)}})
    with pytest.raises(ValueError, match="at least 0"):
        save_snapshot(tmp_path, -1, {}, {})
    assert names(tmp_path) == ["0000000001"]


@pytest.mark.parametrize("call", ["save_file", "settle_file", "sync_file", "sync_folder", "_rename_into_place"])
def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_snapshot(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_plain(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, call, full)
        with pytest.raises(SnapshotError, match=r"step 2 could not .*No space left.*0000000001; free .*--resume\.$"):
            save_plain(tmp_path, 2)
    assert names(tmp_path) == ["0000000001"]
    save_plain(tmp_path, 2)
    assert names(tmp_path) == ["0000000001", "0000000002"]


def test_a_failed_replacement_brings_the_old_snapshot_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_plain(tmp_path, 1)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(SnapshotError):
            save_snapshot(tmp_path, 1, {}, {})
    snapshot = load_newest_snapshot(tmp_path)
    assert snapshot is not None
    assert snapshot.state == {"position": 1}
    assert names(tmp_path) == ["0000000001"]


KILLING_SCRIPT = """
import os, pathlib, resource, shutil, signal, sys
import torch
from mxd.runs import snapshots

root = pathlib.Path(sys.argv[1])
tensors = lambda step: {"w": torch.full((1000,), float(step))}
save = lambda folder, step, run: snapshots.save_snapshot(folder, step, tensors(step), {"run": run})
operations, deadly = 0, None
os.fsync = lambda _: None  # only a power cut would miss it

def count(*_):
    global operations
    operations += 1
    if operations == deadly:
        os.kill(os.getpid(), signal.SIGKILL)

def half_written(content, path, save_file=snapshots.save_file):
    save_file(content, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    count()
    path.write_bytes(whole)

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}

def die_in_child(folder, step):
    global deadly
    os.fsync = lambda _: count()
    snapshots.save_file = half_written
    sys.addaudithook(lambda event, _: count() if event in EVENTS else None)
    save(folder, step, "new")
    os._exit(0)

def check(existing, step):
    global deadly
    for deadly in range(1, 1000):
        folder = root / f"{len(existing)}-{step}-{deadly}"
        for earlier in existing:
            save(folder, earlier, "old")
        child = os.fork()
        if child == 0:
            die_in_child(folder, step)
        status = os.waitpid(child, 0)[1]
        snapshot = snapshots.load_newest_snapshot(folder)
        found = (snapshot.step, snapshot.state["run"])
        assert found in {(max(existing), "old"), (step, "new")}, found
        assert torch.equal(snapshot.tensors["w"], tensors(snapshot.step)["w"])
        save(folder, step + 10, "later")
        left = sorted(path.name for path in folder.iterdir())
        assert len(left) == 2 and left[-1] == f"{step + 10:010d}", left
        shutil.rmtree(folder)
        if os.waitstatus_to_exitcode(status) == 0:
            assert found == (step, "new")
            return deadly
        assert os.WTERMSIG(status) == signal.SIGKILL, status

print(check([10, 20], 30), check([10], 10))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
save_full = root / "limited"
try:
    save(save_full, 1, "too large")
except snapshots.SnapshotError as error:
    print(os.listdir(save_full), error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_file_operation_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLING_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    counts, limited = done.stdout.splitlines()
    assert all(int(count) > 20 for count in counts.split()), counts
    assert limited.startswith("[] The snapshot of step 1 could not be written")
    assert "File too large" in limited
