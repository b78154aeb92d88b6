"""One contract for every object store: memory, files, and S3 over HTTP; then what only one of them promises."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from cluster import cloud_store
from cluster.cloud_store import CloudStore
from cluster.errors import Invalid, NotFound, Unavailable
from cluster.file_store import ASIDE, FileStore
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectInfo, ObjectStore, check_key, open_store, path_of_url

SEED = 7
BIG_BYTES = 10 * 1024 * 1024 + 12_345  # more than one part of a multipart upload, and no whole number of them
WRITERS = 16
BAD_KEYS = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", "a/./b"]


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """The results of `work(0..count-1)`, started together."""
    start = threading.Barrier(count)

    def run(number: int) -> object:
        start.wait(timeout=30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def keys(store: ObjectStore, prefix: str) -> list[str]:
    return [info.key for info in store.objects(prefix)]


class ObjectStoreContract:
    """What every store promises. A subclass gives a fixture `store`: an empty one."""

    def test_put_then_get_returns_the_bytes(self, store: ObjectStore) -> None:
        for key, data in [("a", b"1"), ("b/c/d-e_f.json", bytes(range(256))), ("empty", b"")]:
            store.put(key, data)
            assert store.get(key) == data

    def test_put_overwrites(self, store: ObjectStore) -> None:
        store.put("a/b", b"first, and longer")
        store.put("a/b", b"second")
        assert store.get("a/b") == b"second"
        assert keys(store, "a/") == ["a/b"]

    def test_get_of_an_absent_object_is_not_found_and_names_it(self, store: ObjectStore) -> None:
        store.put("a/b", b"1")
        for key in ("x", "a", "a/x", "a/b/c"):
            with pytest.raises(NotFound, match=f"^no object {key}$"):
                store.get(key)

    def test_download_of_an_absent_object_is_not_found_and_leaves_no_file(
        self, store: ObjectStore, tmp_path: Path
    ) -> None:
        with pytest.raises(NotFound, match=r"^no object x/y$"):
            store.download("x/y", tmp_path / "file")
        assert not (tmp_path / "file").exists()

    def test_put_if_absent_writes_only_the_first_time(self, store: ObjectStore) -> None:
        assert store.put_if_absent("a/1", b"first") is True
        assert store.put_if_absent("a/1", b"second") is False
        assert store.put_if_absent("a/1", b"first") is False
        assert store.get("a/1") == b"first"

    def test_put_if_absent_sees_what_put_wrote(self, store: ObjectStore) -> None:
        store.put("a", b"put")
        assert store.put_if_absent("a", b"create") is False
        assert store.get("a") == b"put"

    def test_put_if_absent_after_delete_writes_again(self, store: ObjectStore) -> None:
        store.put_if_absent("a", b"first")
        store.delete("a")
        assert store.put_if_absent("a", b"second") is True
        assert store.get("a") == b"second"

    def test_of_many_racing_writers_exactly_one_writes(self, store: ObjectStore) -> None:
        for round_number in range(5):
            key = f"race/{round_number}/new"  # in a folder that is new too
            wrote = self._race_to_create(store, key)
            assert sorted(wrote, key=bool) == [False] * (WRITERS - 1) + [True]
            assert store.get(key) == f"{wrote.index(True)}".encode()

    def _race_to_create(self, store: ObjectStore, key: str) -> list[object]:
        return in_threads(WRITERS, lambda number: store.put_if_absent(key, f"{number}".encode()))

    def test_racing_puts_leave_one_whole_object(self, store: ObjectStore) -> None:
        contents = [bytes([number]) * 100_000 for number in range(8)]
        in_threads(8, lambda number: store.put("race", contents[number]))
        assert store.get("race") in contents

    def test_upload_then_download_of_a_big_file_returns_it(self, store: ObjectStore, tmp_path: Path) -> None:
        data = np.random.default_rng(SEED).bytes(BIG_BYTES)
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(data)
        store.upload(source, "big/file")
        store.download("big/file", target)
        assert target.read_bytes() == data
        assert store.get("big/file") == data
        assert [(info.key, info.size_bytes) for info in store.objects("big/")] == [("big/file", BIG_BYTES)]
        assert source.read_bytes() == data

    @pytest.mark.parametrize("size_bytes", [0, 1, BIG_BYTES])
    def test_download_shows_every_piece_in_order(self, store: ObjectStore, tmp_path: Path, size_bytes: int) -> None:
        data, pieces = np.random.default_rng(SEED).bytes(size_bytes), []
        store.put("a", data)
        store.download("a", tmp_path / "target", lambda piece: pieces.append(bytes(piece)))
        assert b"".join(pieces) == data
        assert (tmp_path / "target").read_bytes() == data

    def test_upload_overwrites_and_takes_an_empty_file(self, store: ObjectStore, tmp_path: Path) -> None:
        source = tmp_path / "source"
        store.put("a", b"before")
        source.write_bytes(b"")
        store.upload(source, "a")
        assert store.get("a") == b""

    def test_download_overwrites_a_longer_file(self, store: ObjectStore, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"much longer than the object")
        store.put("a", b"short")
        store.download("a", target)
        assert target.read_bytes() == b"short"

    def test_objects_are_those_under_the_prefix_in_key_order(self, store: ObjectStore) -> None:
        for key in ["p/b", "p/a/2", "p/a/1", "p/a.x", "p/a-x", "pq/a", "o/a", "p/a/b/c", "p/B"]:
            store.put(key, key.encode())
        assert keys(store, "p/") == ["p/B", "p/a-x", "p/a.x", "p/a/1", "p/a/2", "p/a/b/c", "p/b"]
        assert keys(store, "p/a/") == ["p/a/1", "p/a/2", "p/a/b/c"]
        assert keys(store, "absent/") == []
        assert len(keys(store, "")) == 9

    def test_objects_have_size_and_time_of_writing(self, store: ObjectStore) -> None:
        before = time.time()
        store.put("p/a", b"12345")
        after = time.time()
        (info,) = store.objects("p/")
        assert info == ObjectInfo("p/a", 5, info.modified_s)
        assert before - 1 <= info.modified_s <= after + 1  # HTTP dates have whole seconds

    def test_objects_of_several_pages_are_all_listed(self, store: ObjectStore) -> None:
        names = [f"p/{number:04d}" for number in range(130)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), names))
        assert keys(store, "p/") == names

    def test_objects_deleted_while_listing_do_not_break_it(self, store: ObjectStore) -> None:
        for key in ("p/a", "p/b", "p/c"):
            store.put(key, b"1")
        listing = store.objects("p/")
        assert next(listing).key == "p/a"
        store.delete("p/b")
        assert [info.key for info in listing][-1] == "p/c"

    def test_folders_are_the_names_directly_below_that_hold_objects(self, store: ObjectStore) -> None:
        for key in ["c/b/x", "c/a/deep/er", "c/a/x", "c/object", "d/x"]:
            store.put(key, b"1")
        assert store.folders("c/") == ["a", "b"]
        assert store.folders("c/a/") == ["deep"]
        assert store.folders("absent/") == []
        assert store.folders("") == ["c", "d"]

    def test_folder_is_gone_with_its_last_object(self, store: ObjectStore) -> None:
        store.put("c/a/x/1", b"1")
        store.put("c/b/1", b"1")
        store.delete("c/a/x/1")
        assert store.folders("c/") == ["b"]
        assert keys(store, "c/") == ["c/b/1"]

    def test_delete_is_idempotent(self, store: ObjectStore) -> None:
        store.put("a/b", b"1")
        for _ in range(2):
            store.delete("a/b")
            with pytest.raises(NotFound):
                store.get("a/b")
        store.delete("never/was")

    def test_delete_leaves_other_objects(self, store: ObjectStore) -> None:
        for key in ("a/b", "a/bc", "a/c/d"):
            store.put(key, b"1")
        store.delete("a/b")
        store.delete("a/c")  # a folder, not an object
        assert keys(store, "") == ["a/bc", "a/c/d"]

    def test_puts_and_deletes_racing_in_one_folder_all_succeed(self, store: ObjectStore) -> None:
        def work(number: int) -> None:
            for turn in range(20):
                store.put(f"p/q/{number}", b"1")
                if turn < 19:
                    store.delete(f"p/q/{number}")

        in_threads(4, work)
        assert keys(store, "p/") == [f"p/q/{number}" for number in range(4)]

    def test_local_path_is_none_or_a_file_with_the_bytes(self, store: ObjectStore) -> None:
        store.put("a/b", b"data")
        path = store.local_path("a/b")
        assert path is None or path.read_bytes() == b"data"
        assert store.local_path("a/x") is None

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_keys_that_are_not_plain_are_refused_by_every_method(
        self, store: ObjectStore, tmp_path: Path, key: str
    ) -> None:
        (tmp_path / "source").write_bytes(b"1")
        calls: list[Callable[[], object]] = [
            lambda: store.get(key),
            lambda: store.put(key, b"1"),
            lambda: store.put_if_absent(key, b"1"),
            lambda: store.upload(tmp_path / "source", key),
            lambda: store.download(key, tmp_path / "target"),
            lambda: store.delete(key),
        ]
        for call in calls:
            with pytest.raises(Invalid) as caught:
                call()
            assert [error.field for error in caught.value.errors] == ["key"]
        assert keys(store, "") == []


class TestMemoryStore(ObjectStoreContract):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryStore()


class TestFileStore(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return open_store((tmp_path / "data").as_uri())


BUCKET = "eagleray-contract"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server in this process, on a free port."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with one_put_at_a_time():
        server.start()
        try:
            host, port = server.get_host_and_port()
            yield f"http://{host}:{port}"
        finally:
            server.stop()


@contextmanager
def one_put_at_a_time() -> Iterator[None]:
    """moto looks whether an object is there and then writes it: two of its threads may both find it absent.

    S3 does both in one step.
    """
    lock, put_object = threading.Lock(), S3Response.put_object

    def locked(self: S3Response) -> object:
        with lock:
            return put_object(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", locked)
        yield


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, with a prefix."""
    use_endpoint(monkeypatch, s3_server)
    s3 = boto3.resource("s3", region_name="us-east-1", endpoint_url=s3_server)
    bucket = s3.create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}/some/prefix"
    bucket.objects.all().delete()
    bucket.delete()
    s3.meta.client.close()


class TestS3Store(ObjectStoreContract):
    @pytest.fixture
    def store(self, s3_url: str) -> ObjectStore:
        return open_store(s3_url)

    def test_objects_stand_under_the_prefix_of_the_url(self, store: ObjectStore, s3_server: str) -> None:
        store.put("a/b", b"1")
        s3 = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_server)
        listed = s3.list_objects_v2(Bucket=BUCKET)["Contents"]
        s3.close()
        assert [entry["Key"] for entry in listed] == ["some/prefix/a/b"]

    @pytest.mark.parametrize("ranges", [2, 5, 11])
    def test_a_large_object_is_downloaded_in_ranges_in_order(
        self, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: int
    ) -> None:
        monkeypatch.setattr(cloud_store, "RANGE_BYTES", 1_000)
        monkeypatch.setattr(cloud_store, "STREAMED_BYTES_MAX", 1_000)
        data, pieces = np.random.default_rng(SEED).bytes(1_000 * ranges - 1), []
        store.put("a", data)
        store.download("a", tmp_path / "target", lambda piece: pieces.append(bytes(piece)))
        assert [len(piece) for piece in pieces] == [1_000] * (ranges - 1) + [999]
        assert b"".join(pieces) == data
        assert (tmp_path / "target").read_bytes() == data

    def test_a_large_object_that_vanishes_during_its_download_is_not_found(
        self, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cloud_store, "RANGE_BYTES", 1_000)
        monkeypatch.setattr(cloud_store, "STREAMED_BYTES_MAX", 1_000)
        store.put("a", bytes(20_000))
        with pytest.raises(NotFound, match=r"^no object a$"):
            store.download("a", tmp_path / "target", lambda piece: store.delete("a"))

    def test_absent_bucket_is_an_error_of_ours(self, store: ObjectStore) -> None:
        elsewhere = open_store("s3://no-such-bucket-here/prefix")
        with pytest.raises((NotFound, Unavailable)):
            elsewhere.put("a", b"1")


# ---- files: durability


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(kind, inode) of every fsync, in order."""
    calls: list[tuple[str, int]] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        calls.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", status.st_ino))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return calls


def write_by(method: str, store: FileStore, key: str, data: bytes, tmp_path: Path) -> None:
    if method == "upload":
        (tmp_path / "source").write_bytes(data)
        store.upload(tmp_path / "source", key)
    elif method == "put":
        store.put(key, data)
    else:
        assert store.put_if_absent(key, data)


WRITE_METHODS = ["put", "put_if_absent", "upload"]


@pytest.mark.parametrize("method", WRITE_METHODS)
def test_file_store_syncs_the_file_then_every_folder_that_names_it(
    tmp_path: Path, synced: list[tuple[str, int]], method: str
) -> None:
    root = tmp_path / "data"
    store = FileStore(root)
    synced.clear()
    write_by(method, store, "a/b/c", b"data", tmp_path)
    assert synced == [
        ("file", inode(root / "a/b/c")),
        ("folder", inode(root)),  # names a
        ("folder", inode(root / "a")),  # names b
        ("folder", inode(root / "a/b")),  # names c, last
    ]
    synced.clear()
    write_by(method, store, "a/b/d", b"data", tmp_path)
    assert synced == [("file", inode(root / "a/b/d")), ("folder", inode(root / "a/b"))]


class Crash(BaseException):
    """The process ends here: nothing of ours may catch it."""


@pytest.mark.parametrize("method", WRITE_METHODS)
@pytest.mark.parametrize("crash_at", range(4))
def test_file_store_crash_at_any_step_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, crash_at: int
) -> None:
    root, steps = tmp_path / "data", iter(range(100))
    store = FileStore(root)

    def crashing(real: Callable[..., None]) -> Callable[..., None]:
        def step(*args: object) -> None:
            if next(steps) == crash_at:
                raise Crash
            real(*args)

        return step

    with monkeypatch.context() as patch:
        for name in ("fsync", "link", "replace"):  # four steps: file, the folder's folder, name, folder
            patch.setattr(os, name, crashing(getattr(os, name)))
        with pytest.raises(Crash):
            write_by(method, store, "c/k", b"all of the data", tmp_path)
    after = FileStore(root)
    named = crash_at == 3  # the name was given, the folder not synced: written, not acknowledged
    assert keys(after, "") == (["c/k"] if named else [])
    assert after.folders("") == (["c"] if named else [])
    if named:
        assert after.get("c/k") == b"all of the data"
    else:
        with pytest.raises(NotFound):
            after.get("c/k")
    after.put("c/k", b"again")
    assert after.get("c/k") == b"again"


@pytest.mark.parametrize("crash_in", ["fsync", "replace"])
def test_file_store_crash_while_overwriting_keeps_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    store = FileStore(tmp_path / "data")
    store.put("c/k", b"old")

    def crash(*args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, crash_in, crash)
        with pytest.raises(Crash):
            store.put("c/k", b"new")
    assert store.get("c/k") == b"old"
    assert [info.size_bytes for info in store.objects("")] == [3]


@pytest.mark.parametrize("method", WRITE_METHODS)
def test_file_store_on_a_full_disk_is_unavailable_and_frees_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    store = FileStore(tmp_path / "data")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match=r"^a/b: .*No space left on device"):
            write_by(method, store, "a/b", b"data", tmp_path)
    assert keys(store, "") == []
    assert list((tmp_path / "data" / ASIDE).iterdir()) == []
    write_by(method, store, "a/b", b"data", tmp_path)
    assert store.get("a/b") == b"data"


def test_file_store_whose_file_cannot_be_read_is_unavailable(tmp_path: Path) -> None:
    root = tmp_path / "data"
    store = FileStore(root)
    (root / "loop").symlink_to("loop")
    with pytest.raises(Unavailable, match=r"^loop: "):
        store.get("loop")
    with pytest.raises(Unavailable, match=r"^loop: "):
        store.download("loop", tmp_path / "target")


def test_file_store_whose_folder_cannot_be_listed_is_unavailable_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "data")
    store.put("a/b", b"1")

    def refuse(*args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(Unavailable, match=r"^a/: .*Too many open files"):
        list(store.objects("a/"))
    with pytest.raises(Unavailable, match=r"^: .*Too many open files"):
        store.folders("")


def test_file_store_whose_file_cannot_be_deleted_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "data")
    store.put("a/b", b"1")

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(Unavailable, match=r"^a/b: "):
            store.delete("a/b")
    assert store.get("a/b") == b"1"


@pytest.mark.parametrize("method", ["put", "put_if_absent"])
def test_file_store_never_claims_a_write_below_an_object(tmp_path: Path, method: str) -> None:
    """A file cannot be a folder too; the write must fail, not be taken for one that was there already."""
    store = FileStore(tmp_path / "data")
    store.put("a", b"object")
    with pytest.raises(Unavailable, match=r"^a/b: "):
        getattr(store, method)("a/b", b"1")
    assert keys(store, "") == ["a"]


def test_file_store_on_a_path_that_is_a_file_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="cannot be used"):
        FileStore(tmp_path / "file")


def test_file_store_readers_see_only_whole_objects_while_it_is_overwritten(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "data")
    contents = [bytes([number]) * 200_000 for number in range(4)]
    store.put("k", contents[0])
    done = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        while not done.is_set():
            seen.append(store.get("k"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(40):
            store.put("k", contents[turn % 4])
    finally:
        done.set()
        reader.join(timeout=30)
    assert seen
    assert set(seen) <= set(contents)


def test_file_store_lists_no_unfinished_files(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "data")
    (tmp_path / "data" / ASIDE / "torn").write_bytes(b"half")
    store.put("a", b"1")
    assert keys(store, "") == ["a"]
    assert store.folders("") == []


# ---- the cloud: failures of the endpoint


def all_calls(store: ObjectStore, tmp_path: Path) -> dict[str, Callable[[], object]]:
    (tmp_path / "source").write_bytes(b"1")
    return {
        "get": lambda: store.get("a"),
        "put": lambda: store.put("a", b"1"),
        "put_if_absent": lambda: store.put_if_absent("a", b"1"),
        "upload": lambda: store.upload(tmp_path / "source", "a"),
        "download": lambda: store.download("a", tmp_path / "target"),
        "objects": lambda: list(store.objects("a/")),
        "folders": lambda: store.folders("a/"),
        "delete": lambda: store.delete("a"),
    }


CALLS = ["get", "put", "put_if_absent", "upload", "download", "objects", "folders", "delete"]


@pytest.mark.parametrize("call", CALLS)
def test_cloud_store_at_a_dead_endpoint_is_unavailable_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    with socket.socket() as taken:  # bound, never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        use_endpoint(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        store = open_store("s3://bucket/prefix")
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"^s3://bucket/prefix: a"):
            all_calls(store, tmp_path)[call]()
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("call", ["get", "put_if_absent"])
def test_cloud_store_at_an_endpoint_that_never_answers_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    monkeypatch.setattr(cloud_store, "STALL_TIMEOUT_S", 0.2)
    with socket.socket() as silent:  # the system accepts connections; nobody reads them
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        use_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = CloudStore("s3://bucket/prefix")
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"^s3://bucket/prefix: a"):
            all_calls(store, tmp_path)[call]()
        assert time.monotonic() - started < 10


SLOW_CHUNKS = 12
SLOW_CHUNK = bytes(range(256)) * 256


class SlowObject(BaseHTTPRequestHandler):
    """Answers every GET with `SLOW_CHUNKS` chunks and a pause before each: a big object over a slow line."""

    protocol_version = "HTTP/1.1"
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(SLOW_CHUNKS * len(SLOW_CHUNK)))
        self.send_header("ETag", '"slow"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        for _ in range(SLOW_CHUNKS):
            threading.Event().wait(0.15)
            self.wfile.write(SLOW_CHUNK)
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_cloud_store_download_longer_than_the_stall_timeout_succeeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bound is on silence, not on the transfer: segments may be of any size."""
    monkeypatch.setattr(cloud_store, "STALL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(SlowObject, "requests", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowObject) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        started = time.monotonic()
        CloudStore("s3://bucket/prefix").download("a", tmp_path / "target")
        assert time.monotonic() - started > 1.0
        server.shutdown()
    assert (tmp_path / "target").read_bytes() == SLOW_CHUNK * SLOW_CHUNKS
    assert SlowObject.requests == 1


# ---- opening and keys


def test_open_store_picks_the_class_by_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert isinstance(open_store(str(tmp_path / "plain")), FileStore)
    assert isinstance(open_store((tmp_path / "url").as_uri()), FileStore)
    assert isinstance(open_store("memory://one"), MemoryStore)
    assert isinstance(open_store("s3://bucket/prefix"), CloudStore)


def test_open_store_gives_the_same_memory_for_the_same_name() -> None:
    assert open_store("memory://test-same") is open_store("memory://test-same")
    assert open_store("memory://test-same") is not open_store("memory://test-other")


def test_open_store_of_an_unknown_scheme_is_invalid_and_names_the_known_ones() -> None:
    with pytest.raises(Invalid, match="unknown storage scheme 'ftp'; known: file, memory, s3, gs, az"):
        open_store("ftp://host/path")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("file:///a%20b/%C3%A4", "/a b/ä"),
        ("/a/b", "/a/b"),
        ("/a%20b", "/a%20b"),
    ],
)
def test_path_of_url(url: str, path: str) -> None:
    assert path_of_url(url) == Path(path)


def test_path_of_a_relative_path_is_absolute() -> None:
    assert path_of_url("data/x") == Path.cwd() / "data/x"


def test_path_of_url_with_a_host_is_invalid() -> None:
    with pytest.raises(Invalid, match="names the host 'server'"):
        path_of_url("file://server/a")


@pytest.mark.parametrize("key", ["a", "a/b", "a.b/..c/d..", "..."])
def test_check_key_returns_plain_keys(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", BAD_KEYS)
def test_check_key_refuses_keys_that_could_leave_the_root(key: str) -> None:
    with pytest.raises(Invalid, match="is not a plain object key"):
        check_key(key)
