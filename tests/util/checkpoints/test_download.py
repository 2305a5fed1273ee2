"""Downloads against a local server: complete or not there, checked, tried again politely, and one line if it fails."""

import hashlib
import http.server
import socket
import threading

import pytest
import torch

from util.checkpoints import download as module
from util.checkpoints.download import DownloadError, download
from util.checkpoints.weight_files import cached_path, fetch, read_weights
from util.errors import UserError

CONTENT = bytes(range(256)) * 2000
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers each path with the function of that name below; `requests` lists the paths that were asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Ignore the client's end of the connection."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.server.requests.append(self.path)
        self.close_connection = True
        getattr(self, "get_" + self.path.split("/")[1])(self.server.requests.count(self.path))

    def log_message(self, *_):
        pass

    def answer(self, code=200, content=CONTENT, length=None, **headers):
        self.send_response(code)
        if length != "none":
            self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def get_file(self, count):
        self.answer()

    def get_unknown_length(self, count):
        self.answer(length="none")

    def get_cut(self, count):
        self.answer(content=CONTENT[:1000], length=len(CONTENT))

    def get_cut_once(self, count):
        self.answer(content=CONTENT[: 1000 if count == 1 else None], length=len(CONTENT))

    def get_busy_once(self, count):
        self.answer(503 if count == 1 else 200, Retry_After="7")

    def get_busy(self, count):
        self.answer(503)

    def get_missing(self, count):
        self.answer(404)

    def get_page(self, count):
        self.answer(content=b"<html>Sign in</html>", Content_Type="text/html; charset=utf-8")

    def get_to_file(self, count):
        self.answer(302, b"", Location="/file/x")

    def get_to_disk(self, count):
        self.answer(302, b"", Location="file:///etc/hostname")

    def get_to_ftp(self, count):
        self.answer(302, b"", Location="ftp://127.0.0.1/x")

    def get_round(self, count):
        self.answer(302, b"", Location=f"/round/{count}")

    def get_silent(self, count):
        self.server.released.wait(30)

    def get_drip(self, count):
        self.answer(content=b"a", length=10**6)
        while not self.server.released.wait(0.02):
            self.wfile.write(b"a")

    def get_nonsense(self, count):
        self.wfile.write(b"SSH-2.0\r\n\r\n")

    def get_weights(self, count):
        import io

        file = io.BytesIO()
        torch.save({"model": {"w": torch.ones(2)}}, file)
        self.answer(content=file.getvalue())


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def get(server, tmp_path):
    """Download a path of the server; returns the waits between attempts."""

    def call(path, **options):
        waits = []
        options = {"schemes": ("http",), **options}
        download(server.url + path, tmp_path / "f.pth", sleep=waits.append, **options)
        return waits

    return call


def fails(get, tmp_path, path, reason, **options):
    with pytest.raises(DownloadError, match=reason) as excinfo:
        get(path, **options)
    assert "\n" not in str(excinfo.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("path", ["/file/x", "/unknown_length/x", "/to_file/x"])
@pytest.mark.parametrize("prefix", [None, SUM[:8], SUM])
def test_complete_file_has_its_name_and_no_other(get, tmp_path, path, prefix):
    assert get(path, sha256_prefix=prefix) == []
    assert [file.name for file in tmp_path.iterdir()] == ["f.pth"]
    assert (tmp_path / "f.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "waits"), [("/cut_once/x", [2.0]), ("/busy_once/x", [7.0])])
def test_temporary_failures_are_tried_again(get, server, tmp_path, path, waits):
    assert get(path) == waits
    assert server.requests == [path, path]
    assert (tmp_path / "f.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "reason", "attempts"),
    [
        ("/cut/x", "after 1000 of 512000 bytes", 3),
        ("/busy/x", "HTTP 503", 3),
        ("/nonsense/x", "SSH-2.0", 3),
        ("/missing/x", "HTTP 404", 1),
        ("/page/x", "web page", 1),
        ("/to_disk/x", "HTTP 302|not supported", 1),
        ("/to_ftp/x", "ftp:// is not supported", 1),
    ],
)
def test_failures_are_one_line_and_leave_nothing(get, server, tmp_path, path, reason, attempts):
    fails(get, tmp_path, path, reason)
    assert server.requests == [path] * attempts


def test_redirects_end(get, server, tmp_path):
    fails(get, tmp_path, "/round/0", "HTTP 302")
    assert len(server.requests) < 20


def test_wrong_sum_is_refused(get, server, tmp_path):
    fails(get, tmp_path, "/file/x", f"starts with {SUM[:8]}, not 00000000", sha256_prefix="0" * 8)
    assert server.requests == ["/file/x"]


def test_silent_server_times_out(get, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.05)
    fails(get, tmp_path, "/silent/x", "no answer in 0.05 s")


def test_server_that_sends_byte_after_byte_is_given_up(get, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.1)
    fails(get, tmp_path, "/drip/x", "bytes in 0.1 s")


def test_closed_port_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    waits = []
    with pytest.raises(DownloadError, match="refused"):
        download(url, tmp_path / "f.pth", schemes=("http",), sleep=waits.append)
    assert waits == [2.0, 4.0]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "file:///etc/hostname", "ftp://x/y", "data:,x"]
)
def test_only_https_by_default(tmp_path, url):
    with pytest.raises(DownloadError, match="https|not supported"):
        download(url, tmp_path / "f.pth")


def test_existing_file_is_never_overwritten(get, tmp_path, monkeypatch):
    """Even one that appears while the download runs."""
    copy = module._copy

    def and_a_file(*args):
        (tmp_path / "f.pth").write_bytes(b"mine")
        return copy(*args)

    monkeypatch.setattr(module, "_copy", and_a_file)
    get("/file/x")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("f.pth", b"mine")]


def test_full_disk_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    url = f"{server.url}/file/x.pth"
    with pytest.raises(UserError, match="No space left on device"):
        fetch(url, schemes=("http",))
    assert not [file for file in (tmp_path / "checkpoints").iterdir() if "lock" not in file.name]


def test_fetch_downloads_once_and_the_file_loads(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = f"{server.url}/weights/w.pth"
    for _ in range(2):
        assert fetch(url, schemes=("http",)) == cached_path(url)
    assert server.requests == ["/weights/w.pth"]
    assert read_weights(cached_path(url))["model"]["w"].tolist() == [1.0, 1.0]


def test_http_is_refused_with_the_place_for_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError) as excinfo:
        read_weights("http://127.0.0.1/w.pth")
    text = str(excinfo.value)
    assert "use https://" in text
    assert "\n" not in text
    assert str(cached_path("http://127.0.0.1/w.pth")) in text
