"""What a line per POST is measured against: falcon on waitress, as the backend has them, that stores nothing."""

from __future__ import annotations

import socket
import sys

import falcon
import waitress

ANSWER = b'{"id": "01234567-89ab-7def-8123-456789abcdef", "created": "2026-11-23T18:43:46.610595Z"}'


class Nothing:
    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        response.status = falcon.HTTP_201
        response.data = ANSWER


def main(threads: int) -> None:
    app = falcon.App()
    app.add_route("/api/data", Nothing())
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    waitress.serve(app, sockets=[listener], threads=threads, connection_limit=4096, asyncore_use_poll=True, ident=None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
