"""data/storage.py: local files, web servers that misbehave, commands; read directly and through streams."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_shards import make_shards, make_stream, same, take

from data import storage
from data.shards import build_loader
from data.storage import PipeFile, ShardError, check_first_remote, open_shard
from data.tar import count_samples, read_shard

torch.set_num_threads(1)


class Server(ThreadingHTTPServer):
    """Serves a folder; tests set `has_ranges`, `cut_after` (bytes of each answer), `statuses` (of the next answers)."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.has_ranges, self.cut_after, self.statuses = folder, True, None, []
        self.starts = []  # first byte of each answer

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.server.folder / self.path.strip("/").partition("?")[0]
        status = server.statuses.pop(0) if server.statuses else (200 if path.is_file() else 404)
        if status != 200:
            self.send_error(status)
            return
        data, start = path.read_bytes(), 0
        if server.has_ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        server.starts.append(start)
        self.wfile.write(data[start : start + (server.cut_after or len(data))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(storage, "HTTP_BACKOFF_S", 0.001)
    monkeypatch.setattr(
        storage, "READ_BUFFER", 1024
    )  # small, so that small shards take several reads and jumps
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def urls(server, paths):
    return [server.url(path.rpartition("/")[2]) for path in paths]


def pipes(paths):
    return [f"pipe:cat {path}" for path in paths]


# web servers


def test_a_shard_on_a_server_reads_like_the_local_one(tmp_path, server):
    (path,) = make_shards(tmp_path, [30])
    assert list(read_shard(server.url("s-000.tar"))) == list(read_shard(path))
    assert count_samples(server.url("s-000.tar?token=1")) == 30


def test_a_compressed_shard_on_a_server_is_unpacked(tmp_path, server):
    (path,) = make_shards(tmp_path, [30])
    (tmp_path / "z.tar.gz").write_bytes(gzip.compress((tmp_path / "s-000.tar").read_bytes()))
    assert list(read_shard(server.url("z.tar.gz?x=a.b"))) == list(read_shard(path))


def test_a_lost_connection_is_taken_up_where_it_broke(tmp_path, server):
    (path,) = make_shards(tmp_path, [10])
    data = (tmp_path / "s-000.tar").read_bytes()
    server.cut_after = 3000
    with open_shard(server.url("s-000.tar")) as file:
        assert file.read() == data
    assert server.starts == list(range(0, len(data), 3000))
    assert list(read_shard(server.url("s-000.tar"))) == list(read_shard(path))


def test_without_ranges_a_lost_file_is_read_again_up_to_where_it_broke(tmp_path, server):
    make_shards(tmp_path, [10])
    server.has_ranges, server.cut_after = False, 3000
    with open_shard(server.url("s-000.tar")) as file:
        start = file.read(2000)
        server.cut_after = None
        assert start + file.read() == (tmp_path / "s-000.tar").read_bytes()
    assert server.starts == [0, 0]


def test_a_connection_that_is_lost_again_and_again_gives_up(tmp_path, server):
    make_shards(tmp_path, [10])
    server.has_ranges, server.cut_after = False, 3000  # never gets beyond that byte
    with pytest.raises(
        ShardError, match=r"s-000.tar: connection lost at byte 3000 of \d+ \(try 5\)"
    ):
        list(read_shard(server.url("s-000.tar")))


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_jump_reads_from_there(tmp_path, server, has_ranges):
    make_shards(tmp_path, [10])
    server.has_ranges = has_ranges
    data = (tmp_path / "s-000.tar").read_bytes()
    with open_shard(server.url("s-000.tar")) as file:
        file.seek(5000)
        assert file.read(600) == data[5000:5600]
        file.seek(9000)
        assert file.read(10) == data[9000:9010]
        file.seek(len(data) + 50)
        assert file.read(10) == b""
    assert server.starts[0] == (5000 if has_ranges else 0)


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(tmp_path, server):
    (path,) = make_shards(tmp_path, [3])
    server.statuses = [503, 429, 500]
    assert list(read_shard(server.url("s-000.tar"))) == list(read_shard(path))
    server.starts.clear()
    with pytest.raises(ShardError, match=r"missing.tar: HTTP Error 404: Not Found \(try 1\)"):
        list(read_shard(server.url("missing.tar")))
    server.statuses = [503] * 10
    with pytest.raises(ShardError, match=r"HTTP Error 503.* \(try 5\)"):
        list(read_shard(server.url("s-000.tar")))
    assert len(server.statuses) == 5


def test_a_server_that_answers_with_another_range_is_refused(tmp_path, server, monkeypatch):
    make_shards(tmp_path, [10])
    monkeypatch.setattr(Handler, "send_header", lambda self, name, value: (
        BaseHTTPRequestHandler.send_header(self, name, "bytes 7-9/10" if name == "Content-Range" else value)
    ))  # fmt: skip
    with (
        open_shard(server.url("s-000.tar")) as file,
        pytest.raises(OSError, match="asked for the bytes from 5000 on"),
    ):
        file.seek(5000)
        file.read(1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sizes", [[9, 8, 7], [24]], ids=["more_shards", "fewer_shards"])
def test_a_stream_from_a_server_has_the_order_of_the_local_one_and_resumes(
    tmp_path, server, sizes, num_workers
):
    paths = make_shards(tmp_path, sizes)
    server.cut_after = 5000

    def loader(shards):
        return build_loader(make_stream(shards, batch_size=3), num_workers)

    expected = take(iter(loader(paths)), 12)
    whole = loader(urls(server, paths))
    same(take(iter(whole), 5), expected[:5])
    resumed = loader(urls(server, paths))
    resumed.load_state_dict(whole.state_dict())
    same(take(iter(resumed), 7), expected[5:])


def test_the_first_shard_is_tried_before_any_worker_starts(tmp_path, server):
    paths = make_shards(tmp_path, [3])
    for shards in ([server.url("none.tar")], ["pipe:no_such_command"]):
        with pytest.raises(ShardError, match=r"404|exited with status 127: .*not found"):
            build_loader(make_stream([*paths, *shards]), 2)
    check_first_remote(paths)
    assert server.starts == []


# commands


def test_a_pipe_reads_like_the_file(tmp_path):
    (path,) = make_shards(tmp_path, [30])
    assert list(read_shard(f"pipe:cat {path}")) == list(read_shard(path))
    packed = gzip.compress((tmp_path / "s-000.tar").read_bytes())
    (tmp_path / "z.tar.gz").write_bytes(packed)
    assert list(read_shard(f"pipe:gzip -dc < {tmp_path}/z.tar.gz")) == list(read_shard(path))


def test_a_command_that_fails_names_itself_and_its_last_words(tmp_path):
    (path,) = make_shards(tmp_path, [3])
    for command in (
        f"cat {path}; echo one >&2; echo last words >&2; exit 3",
        "echo last words >&2; exit 3",
    ):
        with pytest.raises(ShardError, match="exited with status 3: last words") as error:
            list(read_shard(f"pipe:{command}"))
        assert error.value.reason == "unreadable" and command in str(error.value)


def test_a_command_that_stops_early_is_a_truncated_shard(tmp_path):
    (path,) = make_shards(tmp_path, [3])
    with pytest.raises(ShardError, match="truncated") as error:
        list(read_shard(f"pipe:head -c 2000 {path}"))
    assert error.value.reason == "truncated"


def test_leaving_a_pipe_ends_its_command():
    file = PipeFile("while true; do echo y; done")
    assert file.read(2) == b"y\n"
    file.close()
    assert file._process.poll() is not None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_from_pipes_has_the_order_of_the_local_one_and_resumes(tmp_path, num_workers):
    paths = make_shards(tmp_path, [9, 8, 7])

    def loader(shards):
        return build_loader(make_stream(shards, batch_size=3), num_workers)

    expected = take(iter(loader(paths)), 10)
    whole = loader(pipes(paths))
    same(take(iter(whole), 5), expected[:5])
    resumed = loader(pipes(paths))
    resumed.load_state_dict(whole.state_dict())
    same(take(iter(resumed), 5), expected[5:])
