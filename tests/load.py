"""Requests of all kinds, through a proxy, while what is behind it changes."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

SECONDS = 60  # for one answer on a busy machine


class Load:
    """Requests of all kinds through a proxy, each of them once: what fails is noted, and nothing is sent again."""

    def __init__(self, url: str) -> None:
        self.sent: Counter[str] = Counter()  # URIs of all lines
        self.failures: list[str] = []
        self._address = urlsplit(url)
        self._done = threading.Event()
        self._mutex = threading.Lock()
        self._threads = [
            threading.Thread(target=self._repeat, args=(f"/{kind.__name__}/{n}", kind))
            for kind in (self.small, self.separate, self.large, self.slow, self.chunked, self.read)
            for n in range(2)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(SECONDS)

    def _repeat(self, name: str, kind: Callable[[HTTPConnection, str], None]) -> None:
        """The life of a thread: one request after the other, on a connection that the client keeps."""
        connection = self._connect()
        for n in itertools.count():
            if self._done.wait(0.01):
                return connection.close()
            try:
                kind(connection, f"{name}/{n}")
            except (OSError, HTTPException, AssertionError) as error:
                self.failures.append(f"{name}/{n}: {error!r}")
                connection.close()

    def _connect(self) -> HTTPConnection:
        return HTTPConnection(str(self._address.hostname), self._address.port, timeout=SECONDS)

    def _post(self, connection: HTTPConnection, uris: Sequence[str], pieces: int = 1, length: bool = True) -> None:
        with self._mutex:
            self.sent.update(uris)
        body = "".join(f"192.0.2.1 GET {uri} 200\n" for uri in uris).encode()
        size = -(-len(body) // pieces)
        parts = self._paced([body[start : start + size] for start in range(0, len(body), size)])
        headers = {"Content-Type": "text/plain", **({"Content-Length": str(len(body))} if length else {})}
        connection.request("POST", "/api/data", parts, headers, encode_chunked=not length)
        self._read(connection, 201)

    def _paced(self, parts: Sequence[bytes]) -> Iterator[bytes]:
        for n, part in enumerate(parts):
            if n:
                self._done.wait(0.03)
            yield part

    def _read(self, connection: HTTPConnection, status: int) -> bytes:
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == status, (answer.status, body[:200])
        return body

    def small(self, connection: HTTPConnection, uri: str) -> None:
        self._post(connection, [uri])

    def separate(self, _: HTTPConnection, uri: str) -> None:
        """On a connection of its own."""
        with closing(self._connect()) as connection:
            self._post(connection, [uri])

    def large(self, connection: HTTPConnection, uri: str) -> None:
        self._post(connection, large_batch(uri))

    def slow(self, connection: HTTPConnection, uri: str) -> None:
        """In pieces over a quarter of a second."""
        self._post(connection, large_batch(uri), pieces=8)

    def chunked(self, connection: HTTPConnection, uri: str) -> None:
        self._post(connection, large_batch(uri), pieces=4, length=False)

    def read(self, connection: HTTPConnection, _: str) -> None:
        """More records than one part of an export has."""
        connection.request("GET", "/api/data?limit=5000", headers={"Accept": "application/x-ndjson"})
        for line in self._read(connection, 200).splitlines():
            json.loads(line)


def large_batch(uri: str) -> list[str]:
    """URIs of lines that HAProxy's buffer of 16 KiB does not hold."""
    return [f"{uri}/{n}/{'x' * 200}" for n in range(100)]
