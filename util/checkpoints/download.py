"""Download one file: over https, to a temporary name, checked, and renamed when it is complete."""

import contextlib
import hashlib
import os
import ssl
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import torch

from util.logger import log

HTTPS = ("https",)
CONNECT_SECONDS = 30.0  # without any byte; a firewall that drops packets must not hang the run
ATTEMPTS = 3
WAIT_SECONDS = 2.0  # before the second attempt; twice as long before each further one
MAX_WAIT_SECONDS = 60.0  # that a server may ask for
SLOW_SECONDS, SLOW_BYTES = 60.0, 60_000  # fewer bytes in this time count as no answer
BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that may be gone after a while
CHUNK = 2**17


class DownloadError(Exception):
    """A download failed. The message says why, in one line."""

    def __init__(self, reason: str, *, is_temporary: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.is_temporary = is_temporary
        self.wait = wait  # seconds that the server asks for


def download(
    url: str,
    path: Path,
    *,
    sha256_prefix: str | None = None,
    schemes: tuple[str, ...] = HTTPS,
    progress: bool = False,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Download `url` to `path`, which is never overwritten and never incomplete. Temporary failures are tried again.

    Args:
        sha256_prefix: first digits of the file's SHA-256 sum, in hexadecimal.
        schemes: allowed in the URL and in those that it redirects to.

    Raises:
        DownloadError: the server is not reached, refuses, is too slow or sends something else.
        OSError: the file can't be written.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download_once(url, path, sha256_prefix, schemes, progress)
            return
        except DownloadError as error:
            if attempt == ATTEMPTS or not error.is_temporary:
                raise
            wait = min(max(WAIT_SECONDS * 2 ** (attempt - 1), error.wait), MAX_WAIT_SECONDS)
            log.warning("%s: %s; trying again in %g s", url, error, wait)
            sleep(wait)


def _download_once(
    url: str, path: Path, sha256_prefix: str | None, schemes: tuple[str, ...], progress: bool
) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            digest = _receive(url, file, schemes, progress)
            file.flush()
            os.fsync(file.fileno())
        if sha256_prefix and not digest.startswith(sha256_prefix):
            raise DownloadError(
                f"its SHA-256 sum starts with {digest[: len(sha256_prefix)]}, not {sha256_prefix}: another file, or a "
                "damaged one"
            )
        if not path.exists():  # put there by hand in the meantime
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _receive(url: str, file: BinaryIO, schemes: tuple[str, ...], progress: bool) -> str:
    """Write the content of a URL to a file and return its SHA-256 sum."""
    _check_scheme(url, schemes)
    opener = urllib.request.build_opener(_Redirects(schemes))
    with _network_errors():
        request = urllib.request.Request(url, headers={"User-Agent": "PreDETR"})
        response = opener.open(request, timeout=CONNECT_SECONDS)
    with response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("it is a web page, not a file")
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isascii() and length.isdigit() else None
        digest, received = _copy(response, file, expected, progress)
    if expected is not None and received != expected:
        raise DownloadError(
            f"the connection ended after {received} of {expected} bytes", is_temporary=True
        )
    return digest


def _copy(response: Any, file: BinaryIO, expected: int | None, progress: bool) -> tuple[str, int]:
    """Return (SHA-256 sum, number of bytes)."""
    digest, received = hashlib.sha256(), 0
    window_start, window_bytes = time.monotonic(), 0
    with torch.hub.tqdm(total=expected, disable=not progress, unit="B", unit_scale=True) as bar:
        while True:
            with _network_errors():
                chunk = response.read1(CHUNK)  # what has arrived, at least one byte
            if not chunk:
                return digest.hexdigest(), received
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            window_bytes += len(chunk)
            bar.update(len(chunk))
            if time.monotonic() - window_start > SLOW_SECONDS:
                if window_bytes < SLOW_BYTES:
                    raise DownloadError(
                        f"only {window_bytes} bytes in {SLOW_SECONDS:g} s", is_temporary=True
                    )
                window_start, window_bytes = time.monotonic(), 0


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """Turn errors of the connection into DownloadError. An OSError of the disk is raised outside of this."""
    try:
        yield
    except HTTPError as error:
        error.close()
        is_busy = error.code in BUSY
        reason = _one_line(f"HTTP {error.code} {error.reason}")
        raise DownloadError(reason, is_temporary=is_busy, wait=_retry_after(error)) from error
    except URLError as error:
        reason = _one_line(error.reason)
        if isinstance(error.reason, TimeoutError):
            reason = f"no answer in {CONNECT_SECONDS:g} s"
        # A certificate does not become valid in a few seconds.
        is_temporary = not isinstance(error.reason, ssl.SSLCertVerificationError)
        raise DownloadError(reason, is_temporary=is_temporary) from error
    except TimeoutError as error:
        raise DownloadError(f"no answer in {CONNECT_SECONDS:g} s", is_temporary=True) from error
    except (OSError, HTTPException) as error:
        raise DownloadError(_one_line(error), is_temporary=True) from error
    except ValueError as error:  # a URL or a header that can't be parsed
        raise DownloadError(_one_line(error)) from error


def _retry_after(error: HTTPError) -> float:
    """Return the seconds that the server asks to wait; 0 if it gives none, or a date."""
    text = error.headers.get("Retry-After") or ""
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _one_line(error: Any) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _check_scheme(url: str, schemes: tuple[str, ...]) -> None:
    scheme = urlparse(url).scheme.lower()
    if scheme not in schemes:
        raise DownloadError(
            f"{scheme}:// is not encrypted, so that anyone on the way could replace the file: use https://"
            if scheme == "http"
            else f"{scheme}:// is not supported"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to allowed schemes only: https must not lead to http."""

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        _check_scheme(newurl, self.schemes)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
