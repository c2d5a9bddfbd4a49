"""Servers on loopback for stores: static files with and without byte ranges, and S3, each counting what it sends.

As a program: `python tests/servers.py ranges|plain FOLDER` or `python tests/servers.py s3 [HOST [LOG]]` serves until it
is ended and says its address first, so that a measurement does not share a process with it.
"""

import contextlib
import functools
import http.server
import json
import os
import re
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's static server, which ignores ranges, without listings; it counts requests and bytes of files."""

    def log_message(self, *args):
        pass

    def list_directory(self, path):
        self.send_error(404)

    def do_GET(self):
        self.server.requests += 1
        super().do_GET()

    def copyfile(self, source, outputfile):
        data = source.read()
        self.server.sent += len(data)
        outputfile.write(data)


class Ranges(Plain):
    """The same with byte ranges and connections that stay open, as web servers have them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests += 1
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, stop = 0, size
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
        if start >= size > 0:
            self.send_error(416)
            return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        self.server.sent += len(data)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.write(data)


class Quiet(http.server.ThreadingHTTPServer):
    """A threaded server that counts, and does not complain of clients that leave."""

    requests = 0
    sent = 0

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(handler, folder):
    """Serve a folder; gives the server, whose `url`, `requests` and `sent` tell."""
    with Quiet(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Stall:
    """An answer that stops: after this share of its body, or before its first byte."""

    def __init__(self, share=None):
        self.share = share


@contextlib.contextmanager
def s3(host="127.0.0.1", log=None):
    """Serve an empty S3 with moto, as `serving` does; what clients need to hear of it is the caller's to set.

    `asked` lists all requests: time, method, path, query. `answer(method, path)` may return how to fail: a status, a
    status and a body, or a `Stall`.
    An open file `log` gets a line of JSON for every request: who asked for what, and how many bytes went each way.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        def log(self, *args):
            pass

    counts = types.SimpleNamespace(requests=0, sent=0, asked=[], answer=lambda method, path: None)
    application, ended = DomainDispatcherApplication(create_backend_app), threading.Event()

    def stalling(body, share):
        yield body[: max(1, int(len(body) * share))]
        ended.wait(120)

    def counted(environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        counts.asked.append((time.time(), method, path, environ["QUERY_STRING"]))
        wanted = counts.answer(method, path)  # how a test makes the server fail
        if isinstance(wanted, Stall) and wanted.share is None:
            ended.wait(120)
            wanted = "503 Service Unavailable"
        if wanted and not isinstance(wanted, Stall):
            status, body = (wanted, b"") if isinstance(wanted, str) else wanted
            start_response(status, [("Content-Length", str(len(body)))])
            return [body]
        body = b"".join(application(environ, start_response))
        if wanted and body:
            return stalling(body, wanted.share)
        if method == "GET":
            counts.requests += 1
            counts.sent += len(body)
        if log is not None:
            size = int(environ.get("CONTENT_LENGTH") or 0)
            told = {"from": environ["REMOTE_ADDR"], "method": method, "path": path, "got": size, "gave": len(body)}
            print(json.dumps(told), file=log, flush=True)
        return [body]

    server = make_server(host, 0, counted, threaded=True, request_handler=Handler)
    counts.url = f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    urllib.request.urlopen(urllib.request.Request(f"{counts.url}/moto-api/reset", method="POST")).close()
    try:
        yield counts
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",  # which is looked for in what a run leaves
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What an S3 client needs to hear besides `AWS_ENDPOINT_URL`; moto takes any key."""


def main(kind, *words):
    """Serve until ended."""
    if kind == "s3":
        os.environ.setdefault("MOTO_S3_DEFAULT_KEY_BUFFER_SIZE", str(2**20))  # larger objects lie on disk
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(Path(name).open("a")) for name in words[1:]]
            server = stack.enter_context(s3(*words[:1], *logs))
            print(server.url, flush=True)
            while True:
                time.sleep(3600)
    with serving({"plain": Plain, "ranges": Ranges}[kind], *(words or ["."])) as server:
        print(server.url, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
