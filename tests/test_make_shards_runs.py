"""scripts/make_shards.py and its processes: stopped, killed, in parts, on a full disk, or after the
source has changed.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import full_disk
from forks import wait_for_end
from sources import fails, outcome, run, summary_of, write_files, write_photos
from tqdm import tqdm

# tqdm's own lock is shared with forked runs: one that is killed with it would hold up the others
tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


# -------------------------------------------------------------------------- processes, parts, stops


BUSY = ["--samples-per-shard", "5", "--drop-duplicates", "--max-watermark-probability", "0.8"]
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the workers by Linux's /proc"
)


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    run("folder", photos, *BUSY, "--output", output)
    expected = {"duplicate", "filter: max_watermark_probability"}
    assert summary_of(output)["dropped"].keys() == expected
    return outcome(output)


@pytest.fixture
def busy(photos, tmp_path):
    """Arguments of that run, into another folder."""
    return ["folder", photos, *BUSY, "--output", tmp_path / "out"]


def run_by_itself(*arguments, **options):
    """As a program of its own, whatever the tests before have made of Ctrl-C in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(*arguments, **options)


def start(arguments, **options):
    process = multiprocessing.get_context("fork").Process(
        target=run_by_itself, args=arguments, kwargs=options
    )
    process.start()
    return process


def test_the_number_of_processes_changes_nothing(busy, undisturbed, tmp_path):
    run(*busy, workers=5)
    assert outcome(tmp_path / "out") == undisturbed


def test_the_parts_of_an_array_together_are_the_whole(busy, undisturbed, tmp_path):
    for part in (3, 0, 4, 1, 2):
        assert not (tmp_path / "out" / "summary.json").exists()
        run(*busy, "--num-shards", 5, "--shard-index", part)
    assert outcome(tmp_path / "out") == undisturbed


def test_parts_may_run_side_by_side(busy, undisturbed, tmp_path):
    parts = [start([*busy, "--num-shards", 3, "--shard-index", part]) for part in range(3)]
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, 0, 0]
    assert outcome(tmp_path / "out") == undisturbed


@needs_proc
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(busy, undisturbed, tmp_path):
    """SIGKILL once so many files of the index, digests, shards and records are there."""
    output = tmp_path / "out"
    kills = kill_at(busy, output, (0, 1, 3, 4, 6, 9, 13, 16, 17, 20, 23, 26, 33, 37, 39))
    assert kills >= 8
    run(*busy, workers=2)
    assert outcome(output) == undisturbed
    assert not list(output.glob("*.tmp"))


def kill_at(command, output, numbers):
    """Run again and again, killed once so many files are there; how often it was."""
    kills = 0
    for num_files in numbers:
        process = start(command, workers=2)
        while process.is_alive() and sum(path.is_file() for path in output.rglob("*")) < num_files:
            time.sleep(0.001)
        if process.is_alive():
            kills += 1
            os.kill(process.pid, signal.SIGSTOP)  # it starts no more
            workers = workers_of(process)
            process.kill()
            process.join()
            wait_for_end(workers)  # with it, but not at once
    return kills


def workers_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return path.read_text().split() if path.is_file() else []


@needs_proc
@pytest.mark.parametrize("is_worker", [True, False])
def test_a_run_that_is_interrupted_ends_and_continues_later(is_worker, busy, undisturbed, tmp_path):
    """A worker is killed, or Ctrl-C reaches the run and its workers."""
    process = start(busy, workers=2)
    while process.is_alive() and not list((tmp_path / "out").glob("*.tar")):
        time.sleep(0.001)
    number = signal.SIGKILL if is_worker else signal.SIGINT
    for pid in workers_of(process)[:1] if is_worker else [process.pid, *workers_of(process)]:
        with suppress(ProcessLookupError):
            os.kill(int(pid), number)
    process.join(60)
    # 0: it was through before
    assert process.exitcode in (1 if is_worker else 130, 0)
    run(*busy)
    assert outcome(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_finished_shards_stay_and_lost_or_cut_ones_are_made_again(busy, undisturbed, tmp_path):
    output = tmp_path / "out"
    run(*busy)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    (output / "000003.tar").unlink()
    os.truncate(output / "000001.tar", 5000)
    (output / "summary.json").unlink()
    run(*busy)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"000001.tar", "000003.tar"}
    assert outcome(output) == undisturbed


def test_a_shard_of_which_nothing_is_left_is_not_written(photos, tmp_path):
    options = ["--samples-per-shard", "1", "--no-shuffle", "--max-caption-characters", "4"]
    for _ in range(2):
        run("folder", photos, "--output", tmp_path / "out", *options)
        shards = {f"{i:06d}.tar": 1 for i in range(0, 60, 5)}
        assert summary_of(tmp_path / "out")["shards"] == shards
        assert len(list((tmp_path / "out").glob("*.tar"))) == 12


@pytest.mark.parametrize(
    ("num_bytes", "name"), [(0, "files.jsonl"), (9_000, ".jsonl"), (20_000, ".tar")]
)
def test_a_full_disk_ends_in_one_line_with_the_file(
    num_bytes, name, busy, undisturbed, tmp_path, capsys
):
    with full_disk(num_bytes):
        line = fails(capsys, *busy).splitlines()[-1]
    assert line.startswith("error: ") and str(tmp_path / "out") in line and name in line
    assert not list(tmp_path.rglob("*.tmp"))
    run(*busy)
    assert outcome(tmp_path / "out") == undisturbed


# --------------------------------------------------------------------------- sources that change


ONE = {"a.jpg": 0, "a.txt": "one", "b.jpg": 1, "b.txt": "two", "c.jpg": 2}
CSV = {"t.csv": "path,caption\na.jpg,one\nb.jpg,two\nc.jpg,three\nd.jpg,four\n"}
TARS = {f"{name}.tar": [f"{name}.jpg", f"{name}.txt"] for name in "abc"}
COCO = {
    "c.json": '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}], '
    '"annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}]}'
}
CHANGES = [
    ("folder .", ONE, {"d.jpg": 3, "d.txt": "new"}, ["2 files", "d.jpg is new", "d.txt is new"]),
    ("folder .", ONE, {"a.txt": "1, corrected"}, ["a.txt has changed"]),
    ("folder .", ONE, {"b.jpg": 4}, ["b.jpg has changed"]),
    ("folder .", ONE, {"b.txt": None}, ["b.txt is gone"]),
    ("table t.csv", ONE | CSV, {"t.csv": CSV["t.csv"].replace("two", "2")}, ["t.csv has changed"]),
    ("table t.csv", ONE | CSV, {"a.jpg": 5}, ["a.jpg has changed"]),
    ("table t.csv", ONE | CSV, {"d.jpg": 3}, ["d.jpg is new"]),
    ("coco c.json", ONE | COCO, {"c.json": COCO["c.json"].replace("two", "2")}, ["c.json has"]),
    ("shards *.tar", TARS, {"b.tar": ["b.jpg", ("b.txt", "new")]}, ["b.tar has changed"]),
]


@pytest.mark.parametrize(("command", "files", "changes", "named"), CHANGES)
def test_a_source_that_has_changed_is_not_taken_for_the_old_one(
    command, files, changes, named, tmp_path, monkeypatch, capsys
):
    """Neither by a finished part of an array nor by one that has not begun."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, files)
    command = [*command.split(), "--output", "out", "--samples-per-shard", 1, "--num-shards", 2]
    for _ in range(2):  # as long as nothing has
        run(*command)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for name in changes:
        Path(name).unlink(missing_ok=True)
    write_files(tmp_path, changes)
    for part in (0, 1):
        message = fails(capsys, *command, "--shard-index", part)
        assert all(text in message for text in ["output: out", *named])
    after = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert after == before


# ---------------------------------------------------------------- other settings, other outcomes


def test_other_settings_need_another_folder(photos, tmp_path, capsys):
    command = ["folder", photos, "--output", tmp_path / "out"]
    run(*command)
    before = outcome(tmp_path / "out")
    message = fails(capsys, *command, "--seed", 1, "--min-longer-side", 50)
    assert "seed was 0, is 1" in message and "min_longer_side was 0, is 50" in message
    assert outcome(tmp_path / "out") == before


def test_tars_of_something_else_are_not_overwritten(photos, tmp_path, capsys):
    run("folder", photos, "--output", tmp_path / "once", "--samples-per-shard", 30)
    (tmp_path / "once" / "source.json").unlink()
    before = outcome(tmp_path / "once")
    command = ["shards", tmp_path / "once" / "*.tar", "--output", tmp_path / "once"]
    assert "source.json" in fails(capsys, *command)
    assert outcome(tmp_path / "once") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_score_stops_the_run_naming_the_sample_and_its_keys(
    workers, photos, tmp_path, capsys
):
    options = ["--min-aesthetic-score", 5, "--samples-per-shard", 9]
    command = ["folder", photos, "--output", tmp_path / "out", *options]
    message = fails(capsys, *command, workers=workers)
    assert "aesthetic score missing" in message and "caption, pwatermark" in message
    assert re.search(r"sample \d{3} of ", message)
    assert not list((tmp_path / "out").glob("*.t*"))
