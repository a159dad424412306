"""Tests for published force fields: the list, and downloads from a server on this machine."""

import hashlib
import http.server
import io
import lzma
import resource
import threading
from pathlib import Path
from urllib.parse import urlparse

import pytest
from rich.console import Console
from rich.text import Text

from mlip_jax.defaults import published_defaults
from mlip_jax.importers import load_force_field, published
from mlip_jax.importers.catalog import downloads, published_list
from mlip_jax.importers.catalog.downloads import DownloadError, download
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.tasks import published as task

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; "/cut" ends the first connection early, "/no-ranges" ignores ranges."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        path = urlparse(self.path).path
        given = self.headers.get("Range")
        self.server.requests.append((path, given))
        if path == "/absent":
            return self.send_error(404)
        start = int(given.removeprefix("bytes=").rstrip("-")) if given else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        is_range = given and path != "/no-ranges"
        body = CONTENT[start:] if is_range else CONTENT
        self.send_response(206 if is_range else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_cut = path == "/cut" and not given
        self.wfile.write(body[:1000] if is_cut else body)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def url(server):
    server.requests.clear()
    return f"http://127.0.0.1:{server.server_port}"


def test_file_is_downloaded_once(tmp_path, url, server):
    target = tmp_path / "cache" / "X.model"
    for _ in range(2):
        assert download(f"{url}/file", target, len(CONTENT), SHA256) == target
    assert target.read_bytes() == CONTENT
    assert server.requests == [("/file", None)]
    assert [p.name for p in target.parent.iterdir()] == ["X.model"]


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_interrupted_download_is_resumed(tmp_path, url, server, size):
    target = tmp_path / "X.model"
    with pytest.raises(DownloadError, match="resumes after 1,000 bytes"):
        download(f"{url}/cut", target, size, SHA256)
    assert not target.exists()
    download(f"{url}/cut", target, size, SHA256)
    assert target.read_bytes() == CONTENT
    assert server.requests == [("/cut", None), ("/cut", "bytes=1000-")]


def test_server_without_ranges_and_part_that_is_too_long(tmp_path, url):
    target, part = tmp_path / "X.model", tmp_path / "X.model.part"
    part.write_bytes(b"x" * 100)
    assert download(f"{url}/no-ranges", target).read_bytes() == CONTENT
    target.unlink()
    part.write_bytes(b"x" * (len(CONTENT) + 1))
    assert download(f"{url}/file", target, len(CONTENT), SHA256).read_bytes() == CONTENT


def test_downloads_do_not_follow_links(tmp_path, url):
    """A link in a shared cache folder used to overwrite the file of the user that it leads to."""
    private, folder = tmp_path / "private", tmp_path / "cache"
    private.write_text("x")
    folder.mkdir()
    (folder / "weights.part").symlink_to(private)
    with pytest.raises(downloads.DownloadError, match="symbolic link"):
        downloads.download(url, folder / "weights")
    assert private.read_text() == "x"


def test_wrong_files_are_deleted(tmp_path, url):
    target = tmp_path / "X.model"
    with pytest.raises(DownloadError, match="differs from the published one"):
        download(f"{url}/file", target, len(CONTENT), "0" * 64)
    with pytest.raises(DownloadError, match="has 10,240 bytes, expected 7"):
        download(f"{url}/file", target, 7)
    with pytest.raises(DownloadError, match="the server answers 404"):
        download(f"{url}/absent", target)
    assert not list(tmp_path.iterdir())


def test_no_network_and_full_disk(tmp_path, url, monkeypatch):
    target = tmp_path / "X.model"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    with pytest.raises(DownloadError, match="cannot be downloaded.*copy the file to"):
        download(f"http://127.0.0.1:{port}/file", target)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match="needs 10,240 bytes, 100 are free.*Free up disk space"):
        download(f"{url}/file", target)
    assert not target.exists()
    monkeypatch.undo()
    # space that ends during the download, as other programs use it
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, previous[1]))
    try:
        with pytest.raises(
            DownloadError, match="cannot be written.*Free up disk space.*after 1,000"
        ):
            download(f"{url}/file", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert not target.exists()
    assert download(f"{url}/file", target, len(CONTENT), SHA256) == target


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(downloads.CACHE, str(tmp_path))
    return tmp_path


def test_files_of_the_cache_and_of_packages(cache, monkeypatch):
    """A file of the cache is used without a network, and verified."""
    entry = published_list.find("SevenNet-0")
    file = cache / "sevennet-0" / "checkpoint_sevennet_0.pth"
    monkeypatch.setattr(published, "in_package", lambda _: None)
    with pytest.raises(DownloadError, match="install the Python package sevenn"):
        published.locate(entry)
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    with pytest.raises(WeightsError, match="not the published file of sevennet-0"):
        published.locate(entry)
    assert published.locate(entry._replace(sha256=SHA256)) == file
    packaged = entry._replace(package="numpy", file="__init__.py", sha256=None)
    monkeypatch.undo()
    assert published.in_package(packaged).name == "__init__.py"
    assert published.in_package(packaged._replace(package="absent_package")) is None


def test_reference_method_of_published_files(cache, caplog, monkeypatch):
    """Reports used to state an unknown level of theory."""
    packed = Path(__file__).with_name("files") / "nequix_indexed.nqx.xz"
    file = cache / "nequix-mp-1" / "nequix-mp-1.nqx"
    file.parent.mkdir()
    file.write_bytes(lzma.decompress(packed.read_bytes()))
    monkeypatch.setattr(published, "_logged", set())
    statistics = load_force_field("nequix-mp-1").metadata["statistics"]
    method = published_list.find("nequix-mp-1").method
    assert statistics == {"elements": [1, 6, 8], "level_of_theory": method}
    assert "license MIT; cite Koker et al." in caplog.text


def test_task(cache, tmp_path, capsys):
    config = published_defaults()
    config.download = "sevennet-0"
    file = cache / "sevennet-0" / "checkpoint_sevennet_0.pth"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    with pytest.raises(WeightsError, match="not the published file"):
        task.run(config, tmp_path / "run")
    config.download = ""
    task.run(config, tmp_path / "list")
    table = capsys.readouterr().out
    assert "| mace-off23-small |" in table and "unknown" in table
    (bundled,) = (line for line in table.splitlines() if "| drugs-gfn2 |" in line)
    assert "| Apache-2.0 | for energies, geometries" in bundled  # the license used to have both
    # a list used to leave a folder runs/published
    assert not (tmp_path / "list").exists() and not (tmp_path / "run").exists()


def test_the_list_fits_on_a_terminal():
    """Lines of 300 characters used to be wrapped by the terminal, across all columns."""
    file = io.StringIO()
    task.print_list(published_list.FORCE_FIELDS, Console(file=file, force_terminal=True, width=100))
    lines = Text.from_ansi(file.getvalue()).plain.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(any(entry.name in x for x in lines) for entry in published_list.FORCE_FIELDS)


def test_list():
    names = [entry.name for entry in published_list.FORCE_FIELDS]
    assert len(set(names)) == len(names) and all(name == name.lower() for name in names)
    for entry in published_list.FORCE_FIELDS:
        assert bool(entry.url) or bool(entry.package and entry.file)
        assert entry.sha256 is None or len(entry.sha256) == 64
        assert not published_list.is_known(f"{entry.name}.model")
    off = published_list.find("mace-off23-small")
    assert "not for commercial use" in published.terms_of_use(off)
    with pytest.raises(ValueError, match="sevennet-0 has no option head"):
        published.load("sevennet-0", head="a")
    with pytest.raises(ValueError, match="expected the name of a published force field"):
        published_list.find("sevennet-9")
