"""The store: whole and verified, or not there. Run: pytest tests/test_store.py"""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import disk
from posttrain.store import SNAPSHOTS, Origin, Store

PARENTS = {"base": "0" * 64}


def commit(store: Store, stage: str = "warm", text: str = "weights", attempt: int = 1) -> Path:
    folder = store.partial(stage)
    (folder / "model").mkdir()
    (folder / "model" / "a.bin").write_text(text)
    (folder / "notes.txt").write_text("n")
    store.commit(Origin(stage=stage, kind="warmup", config_hash="c", parents=PARENTS), attempt)
    return store.path / stage


def test_commit_writes_a_manifest_of_every_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = commit(store)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(f["path"], f["size"]) for f in manifest["files"]] == [
        ("notes.txt", 1),
        ("model/a.bin", 7),
    ]
    # sha256 of "n"
    assert manifest["files"][0]["sha256"].startswith("1b16b1df538ba12dc3f97edbb85caa7050d46c148134290")
    assert (manifest["stage"], manifest["kind"], manifest["attempt"]) == ("warm", "warmup", 1)
    assert manifest["parents"] == PARENTS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["warm"]
    assert store.is_complete("warm", "c", PARENTS)


def test_partial_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.partial("warm") / "old.bin").write_text("x")
    assert store.why_redo("warm", "c", PARENTS) == "stopped in the middle"
    assert list(store.partial("warm").iterdir()) == []


def test_every_damage_is_seen_and_named(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def why() -> str | None:
        return store.why_redo("warm", "c", PARENTS)

    assert why() == "not run yet"
    folder = commit(store)
    (folder / "model" / "a.bin").write_text("weightz")  # one byte, same size
    assert why() == "model/a.bin was changed (sha256 differs)"
    (folder / "model" / "a.bin").write_text("weig")
    assert why() == "model/a.bin has 4 bytes instead of 7"
    (folder / "model" / "a.bin").unlink()
    assert why() == "model/a.bin is missing"
    (folder / "manifest.json").write_text('{"stage": "warm"')
    assert why() == "manifest.json is broken"
    (folder / "manifest.json").unlink()
    assert why() == "manifest.json is missing"


def test_other_config_or_parents_are_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)
    assert store.why_redo("warm", "other", PARENTS) == "its config changed"
    assert store.why_redo("warm", "c", {"base": "1" * 64}) == "source base changed"
    assert store.why_redo("warm", "c", PARENTS | {"more": "0"}) == "source more changed"
    assert store.why_redo("warm", "c", {}) == "source base changed"


def test_old_output_stays_until_the_new_one_is_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, text="first")
    before = store.manifest_hash("warm")
    (store.partial("warm") / "half.bin").write_text("half")
    assert (tmp_path / "warm" / "model" / "a.bin").read_text() == "first"
    store.discard("warm")
    assert store.manifest_hash("warm") == before
    commit(store, text="second", attempt=2)
    assert (tmp_path / "warm" / "model" / "a.bin").read_text() == "second"
    assert store.manifest_hash("warm") != before


def test_lock_finishes_a_commit_that_was_decided(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)
    (tmp_path / "warm").rename(tmp_path / ".partial-warm")  # killed just before the rename
    (tmp_path / "warm").mkdir()  # and in the middle of removing the old output
    with store.lock():
        assert store.is_complete("warm", "c", PARENTS)
    assert not store.is_partial("warm")


def test_lock_does_not_finish_a_copied_or_torn_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = commit(store)
    (store.partial("copy") / "manifest.json").write_text((folder / "manifest.json").read_text())
    torn = store.partial("torn")
    text = (folder / "manifest.json").read_text().replace('"warm"', '"torn"')
    (torn / "manifest.json").write_text(text)  # and none of the files
    with store.lock():
        pass
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "torn").exists()


def test_snapshots_are_no_part_of_the_output(tmp_path: Path) -> None:
    store = Store(tmp_path)
    snapshot = store.partial("warm") / SNAPSHOTS / "step-00000003"
    snapshot.mkdir(parents=True)
    (snapshot / "big.bin").write_text("x")
    (store.partial_path("warm") / "out.txt").write_text("y")
    store.commit(Origin(stage="warm", kind="warmup", config_hash="c", parents={}), 1)
    assert [file.path for file in store.manifest("warm").files] == ["out.txt"]
    assert not (tmp_path / "warm" / SNAPSHOTS).exists()


def test_a_link_in_the_output_is_our_mistake(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.partial("warm") / "link").symlink_to("/etc/hostname")
    with pytest.raises(AssertionError, match="a stage may write files only"):
        store.commit(Origin(stage="warm", kind="warmup", config_hash="c", parents={}), 1)


HOLD = """
import os, sys, time
from pathlib import Path
from posttrain.store import Store
with Store(Path(sys.argv[1])).lock():
    if os.fork() == 0:      # a child that outlives its parent must not keep the lock
        os.close(1)
        time.sleep(30)
    print(os.getpid(), flush=True)
    time.sleep(30)
"""


def test_a_second_driver_is_refused_and_death_frees_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not store.is_locked()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        try:
            assert store.is_locked()
            with pytest.raises(ValueError) as refused, store.lock():
                pass
            assert str(refused.value) == (
                f"another driver (process {pid}) is at work in {tmp_path}; "
                "wait for it, stop it, or choose another folder with --out"
            )
            driver.kill()
            driver.wait()
            with store.lock():
                assert store.is_locked()
            assert not store.is_locked()
        finally:
            os.killpg(driver.pid, 9)


def test_the_own_process_cannot_lock_twice(tmp_path: Path) -> None:
    with Store(tmp_path).lock():
        with pytest.raises(ValueError, match="another driver"), Store(tmp_path).lock():
            pass
        assert Store(tmp_path).is_locked()  # asking does not give the lock up
        ask = multiprocessing.get_context("spawn").Process(target=_expect_locked, args=(tmp_path,))
        ask.start()
        ask.join()
        assert ask.exitcode == 0


def _expect_locked(path: Path) -> None:
    assert Store(path).is_locked()


def test_require_space_names_folder_and_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path / "not" / "made" / "yet")
    store.require_space(1)
    with pytest.raises(disk.DiskFull) as error:
        store.require_space(1 << 60)
    assert str(error.value).startswith(f"no disk space in {store.path} (")
    assert f"bytes free, {1 << 60} needed); make room there or choose" in str(error.value)
    assert not (tmp_path / "not").exists()


def test_full_disk_is_recognised_through_libraries(tmp_path: Path) -> None:
    assert disk.is_full(OSError(28, "No space left on device"), tmp_path)
    assert disk.is_full(Exception("I/O error: No space left on device (os error 28)"), tmp_path)
    wrapped = ValueError("could not save")
    wrapped.__cause__ = OSError(122, "Disk quota exceeded")
    assert disk.is_full(wrapped, tmp_path)
    assert not disk.is_full(OSError(2, "No such file or directory"), tmp_path)
    assert not disk.is_full(RuntimeError("shapes differ"), tmp_path)


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    disk.write_json(path, {"a": float("nan"), "p": Path("q"), "n": [1, (2.5,)]})
    assert json.loads(path.read_text()) == {"a": None, "p": "q", "n": [1, [2.5]]}
    with pytest.raises(TypeError, match="cannot write object as JSON"):
        disk.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["p"] == "q"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
