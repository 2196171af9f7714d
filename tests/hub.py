"""A model hub on loopback, for the real ModelScope client: serves one folder as one model.

Over TLS, because clients before 1.38 speak nothing else.
"""

import hashlib
import http.server
import json
import ssl
import threading
import urllib.parse
from pathlib import Path

import trustme

COMMIT = "0" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of `folder` as `model_id`; `requests` lists the paths that were asked for."""

    def __init__(self, model_id: str, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model_id, self.folder, self.requests, self.authority = (
            model_id,
            folder,
            [],
            trustme.CA(),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables that point a client at this hub, with its downloads in `cache`."""
        cache.mkdir(parents=True, exist_ok=True)
        self.authority.cert_pem.write_to_path(cache / "hub.pem")
        domain = f"127.0.0.1:{self.server_port}"
        return {
            "MODELSCOPE_DOMAIN": domain,
            "MODELSCOPE_ENDPOINT": f"https://{domain}",
            "MODELSCOPE_CACHE": str(cache),
            "REQUESTS_CA_BUNDLE": str(cache / "hub.pem"),
            "SSL_CERT_FILE": str(cache / "hub.pem"),
        }

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def files(self) -> list[dict]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                "Name": path.name, "Path": path.relative_to(self.folder).as_posix(), "Type": "blob",
                "Size": path.stat().st_size, "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "Revision": COMMIT, "CommittedDate": 1_700_000_000, "IsLFS": False, "Mode": "100644",
            }
            for path in paths
        ]  # fmt: skip


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.server.requests.append(self.path)
        base = f"/api/v1/models/{self.server.model_id}"
        if url.path == f"{base}/repo/files":
            self.reply_json(
                {
                    "Files": self.server.files(),
                    "LatestCommitter": {"Id": COMMIT, "Revision": COMMIT},
                }
            )
        elif url.path == f"{base}/revisions":
            branch = {"Revision": "master", "CreatedAt": 1_700_000_000}
            self.reply_json({"RevisionMap": {"Branches": [branch], "Tags": []}})
        elif url.path == f"{base}/repo":
            self.reply((self.server.folder / query["FilePath"]).read_bytes())
        else:
            self.reply(b"{}", status=404)

    do_HEAD = do_GET

    def reply_json(self, data: dict) -> None:
        self.reply(json.dumps({"Code": 200, "Success": True, "Message": "", "Data": data}).encode())

    def reply(self, body: bytes, status: int = 200) -> None:
        first = 0
        if self.headers.get("Range"):
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, total = int(start), len(body)
            body = body[first : int(end) + 1 if end else None]
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass
