import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_activation_cache import (
    PASS,
    SIZES,
    Model,
    assert_right,
    contexts_of_text,
    files_of,
    no_model,
    open_cache,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from mxd.data import activation_cache
from tests.test_activation_cache import Model, assert_right, open_cache
written = 0
def kill(path):
    global written
    written += 1
    if written == 6:
        path.write_bytes(path.read_bytes()[:-100])
        os.kill(os.getpid(), signal.SIGKILL)
activation_cache.settle_file = kill
assert_right(open_cache(Path(sys.argv[1]), Model()), 0, 18)
"""


def test_a_process_killed_while_it_writes_leaves_whole_shards_and_the_next_goes_on(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, env=environment)
    assert ended.returncode == -signal.SIGKILL
    left = "layer-4/.00000001.safetensors.partial"
    assert left in files_of(tmp_path)
    assert open_cache(tmp_path, no_model, num_contexts=12).coverage().bytes_missing == SIZES[4]
    model = Model()
    # The random tables of two processes are not the same: what the other one wrote is read, not compared.
    cache = open_cache(tmp_path, model, num_contexts=18)
    cache.read(0, contexts_of_text(18))
    assert sorted(model.ran) == sorted([(4, PASS)] * 2 + [(1, PASS), (4, PASS)] * 2)
    assert left not in files_of(tmp_path)
    assert open_cache(tmp_path, no_model, num_contexts=18).coverage().bytes_missing == 0
    open_cache(tmp_path, no_model).read(0, contexts_of_text(18))


def test_a_cache_that_another_run_begins_at_the_same_moment_is_no_strangers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = Path.iterdir, Model()

    def meanwhile(folder: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", plain)
        assert_right(open_cache(tmp_path, model), 0, 6)
        return plain(folder)

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    open_cache(tmp_path, no_model).read(0, contexts_of_text(6))


def test_runs_that_write_at_one_time_take_turns_and_compute_nothing_twice(tmp_path: Path) -> None:
    models, failed = [Model(), Model(), Model()], list[BaseException]()

    def run(model: Model) -> None:
        try:
            assert_right(open_cache(tmp_path, model), 0, 30)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sum(len(model.ran) for model in models) == 5 * 2 * 2
    assert_right(open_cache(tmp_path, no_model), 0, 30)
