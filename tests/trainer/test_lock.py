"""Two processes never write to one run."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from dataclasses import replace

import pytest
from trainer.test_resume import config_for, run_until_crash
from trainer.tiny import offline_config, tiny_config

from fastrl.trainer import lock, loop, setup
from fastrl.trainer.lock import LOCK, hold
from fastrl.trainer.setup import train


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


@pytest.fixture
def holder():
    """A function that has another process hold a folder, and returns that process."""
    context, started = multiprocessing.get_context("fork"), []

    def work(folder, ready):
        with hold(folder):
            ready.set()
            multiprocessing.Event().wait()

    def start(folder):
        ready = context.Event()
        process = context.Process(target=work, args=(folder, ready), daemon=True)
        process.start()
        started.append(process)
        assert ready.wait(20)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_held_folder_is_refused_with_the_process_that_holds_it_and_free_when_that_is_killed(tmp_path, holder):
    process = holder(tmp_path)
    message = rf"{tmp_path}: expected a folder .*, got process {process.pid} on .*Wait"
    with pytest.raises(ValueError, match=message), hold(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()  # the other's, still
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()  # a stale one
    with hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
        with pytest.raises(ValueError, match=str(os.getpid())), hold(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()


def test_a_lock_is_not_taken_on_a_file_that_its_holder_removed_meanwhile(tmp_path, monkeypatch):
    flock, handles = fcntl.flock, []

    def removed_before(handle, how):
        if not handles:
            (tmp_path / LOCK).unlink()
        handles.append(handle)
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", removed_before)
    with hold(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="a folder that nothing writes to"), hold(tmp_path):
            pass
    assert len(handles) == 2


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuses)
    with pytest.warns(UserWarning, match="no locks here .*: start one process at a time"), hold(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_a_system_without_such_locks_is_refused_by_name_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(ValueError, match=r"train: system: expected Linux, macOS .* On Windows, WSL runs it"):
        train(tiny_config(tmp_path, steps=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [tiny_config, offline_config])
def test_two_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch, config):
    """The other one takes the name while this one loads its model."""
    original = setup.prepare

    def slowly(config):
        run = original(config)
        run.directory.mkdir()
        return run

    monkeypatch.setattr(setup, "prepare", slowly)
    assert train(config(tmp_path, steps=1)).report.parent.name == "run-2"
    assert not list((tmp_path / "run").iterdir())
    assert not (tmp_path / "run-2" / LOCK).exists()


def test_a_run_that_still_goes_on_cannot_be_resumed_beside_itself(tmp_path, holder):
    config = config_for(tmp_path, steps=3, save_every=1)
    run_until_crash(config, 3)
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    process = holder(tmp_path / "run")
    again = replace(config, resume=config.run_dir)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        train(again)
    assert all(path.read_bytes() == was for path, was in written.items())
    process.kill()
    process.join()
    assert train(again).status == "finished"


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path, monkeypatch):
    def fails():
        assert (tmp_path / "run").is_dir()
        raise ValueError("no facts")

    monkeypatch.setattr(loop, "environment", fails)
    with pytest.raises(ValueError, match="no facts"):
        train(tiny_config(tmp_path))
    assert not (tmp_path / "run").exists()
