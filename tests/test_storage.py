"""data/storage.py: web servers that misbehave; read directly and through streams."""

import gzip
import os
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from test_shards import make_shards, make_stream, same, take

from data import storage
from data.shards import build_loader
from data.storage import ShardError, is_other, open_shard, shard_states
from data.tar import count_samples, read_shard


class Server(ThreadingHTTPServer):
    """Serves a folder. statuses: of the next answers; cuts: the bytes after which they break."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.has_ranges, self.cuts, self.statuses = folder, True, [], []
        self.shift = 0  # of the ranges that it gives
        self.ranges = []  # (first byte, end) of each answer

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server, path = self.server, self.server.folder / self.path.strip("/").partition("?")[0]
        status = server.statuses.pop(0) if server.statuses else (200 if path.is_file() else 404)
        if status != 200:
            self.send_error(status)
            return
        data = path.read_bytes()
        start, end = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if server.has_ranges and asked:
            start, end = int(asked[1]), int(asked[2]) + 1 + server.shift
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{zlib.crc32(data)}"')
        self.end_headers()
        if with_body:
            server.ranges.append((start, end))
            self.wfile.write(data[start:end][: server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    # small, so that small shards take several requests and jumps
    monkeypatch.setattr(storage, "REMOTE_BUFFER", 8192)
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def urls(server, paths):
    return [server.url(path.rpartition("/")[2]) for path in paths]


def test_a_shard_on_a_server_reads_like_the_local_one(tmp_path, server):
    (path,) = make_shards(tmp_path, [30])
    assert list(read_shard(server.url("s-000.tar"))) == list(read_shard(path))
    assert count_samples(server.url("s-000.tar?token=1%2F2")) == 30
    (tmp_path / "z.tar.gz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    assert list(read_shard(server.url("z.tar.gz?x=a.b"))) == list(read_shard(path))


def test_a_shard_in_another_store_reads_like_the_local_one(tmp_path):
    (path,) = make_shards(tmp_path, [30])
    fsspec.filesystem("memory").pipe_file("/store/a.tar", (tmp_path / "s-000.tar").read_bytes())
    assert list(read_shard("memory://store/a.tar")) == list(read_shard(path))


def test_the_state_of_a_shard_is_another_once_it_is_made_anew(tmp_path, server):
    (path,) = make_shards(tmp_path, [3])
    names = [path, server.url("s-000.tar"), server.url("none.tar"), str(tmp_path / "none.tar")]
    before = shard_states(names)
    assert shard_states(names) == before and before[2:] == ["", ""]
    make_shards(tmp_path, [3], bad=[1])  # of the same size
    after = shard_states(names)
    assert all(map(is_other, before[:2], after[:2])) and not is_other("", after[0])
    assert after[0].startswith("10240 bytes, ") and after[1].startswith("size 10240, ETag ")
    os.utime(path, (1, 1))
    assert shard_states([path]) == after[:1]


def test_of_a_large_shard_parts_are_compared_and_a_time_alone_does_not_make_it_another(tmp_path):
    path, size = tmp_path / "a.tar", storage.PARTS * storage.PART_BYTES

    def state(size, changed=None, time=1):
        path.write_bytes(bytes(size))
        if changed is not None:
            with path.open("r+b") as file:
                file.seek(changed)
                file.write(b"1")
        os.utime(path, (time, time))
        return shard_states([str(path)])[0]

    first, touched = state(size + 1), state(size + 1, time=2)
    assert first != touched and not is_other(first, touched)
    assert is_other(first, state(size + 1, changed=0)) and is_other(first, state(size + 1, size))
    # up to that size no byte escapes
    assert is_other(state(size), state(size, changed=storage.PART_BYTES * 7 // 2))


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_lost_connection_is_taken_up_where_it_broke(tmp_path, server, has_ranges):
    make_shards(tmp_path, [30])
    data = (tmp_path / "s-000.tar").read_bytes()
    server.has_ranges = has_ranges
    with open_shard(server.url("s-000.tar")) as file:
        start = file.read(5000)
        server.ranges.clear()
        server.cuts = [2000, 7000, 0, 1]
        assert start + file.read() == data
    begins = [first for first, _ in server.ranges]
    assert begins == sorted(begins) and (not has_ranges or min(begins) >= 5000)


def test_a_connection_that_is_lost_again_and_again_gives_up(tmp_path, server):
    make_shards(tmp_path, [10])
    server.cuts = [500] * 100  # less than the shortest request
    with pytest.raises(ShardError, match=r"s-000\.tar: .*\(try 5\)") as error:
        list(read_shard(server.url("s-000.tar")))
    assert error.value.reason == "unreadable"


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_jump_reads_from_there(tmp_path, server, has_ranges):
    make_shards(tmp_path, [30])
    server.has_ranges = has_ranges
    data = (tmp_path / "s-000.tar").read_bytes()
    with open_shard(server.url("s-000.tar")) as file:
        for start, size in ((9000, 600), (25000, 10), (len(data) + 50, 10)):
            file.seek(start)
            assert file.read(size) == data[start : start + size]
    if has_ranges:
        assert min(first for first, _ in server.ranges) == 9000


@pytest.mark.parametrize(
    ("name", "statuses", "tries"),
    [("missing.tar", [], 1), ("s-000.tar", [403] * 20, 1), ("s-000.tar", [503] * 20, 5)],
)
def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(
    tmp_path, server, name, statuses, tries
):
    (path,) = make_shards(tmp_path, [3])
    server.statuses = [503, 503, 429, 429, 500, 500]
    assert list(read_shard(server.url("s-000.tar"))) == list(read_shard(path))
    server.statuses = statuses
    with pytest.raises(ShardError, match=rf"{name}: .*\(try {tries}\)"):
        list(read_shard(server.url(name)))


def test_a_server_that_answers_with_another_range_is_refused(tmp_path, server):
    make_shards(tmp_path, [10])
    server.shift = -7
    with pytest.raises(ShardError, match=r"given \d+"):
        list(read_shard(server.url("s-000.tar")))


def test_a_stream_from_a_server_has_the_order_of_the_local_one_and_resumes(tmp_path, server):
    paths = make_shards(tmp_path, [9, 8, 7])
    server.cuts = [5000, 0, None, None] * 1000

    def loader(shards):
        return build_loader(make_stream(shards, batch_size=3), num_workers=2)

    expected = take(iter(loader(paths)), 12)
    whole = loader(urls(server, paths))
    same(take(iter(whole), 5), expected[:5])
    resumed = loader(urls(server, paths))
    resumed.load_state_dict(whole.state_dict())
    same(take(iter(resumed), 7), expected[5:])


def test_the_first_url_is_tried_before_any_worker_starts(tmp_path, server):
    paths = make_shards(tmp_path, [3])
    with pytest.raises(ShardError, match=r"none\.tar"):
        build_loader(make_stream([*paths, server.url("none.tar")]), 2)
    build_loader(make_stream(paths), 2)
    assert server.ranges == []
