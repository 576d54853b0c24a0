"""A stand-in for the Hub: the part of its HTTP interface that uploads, listings and downloads use, on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_of_the_stand_in"


class HubServer(ThreadingHTTPServer):
    """
    Repositories of models as commits in memory.

    `repos` maps an id to its branches and tags, each of which maps to a commit; a commit maps paths to bytes.
    `requests` lists what was asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, content: bytes | dict | list = b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str):
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def commit_of(self, repo: str, revision: str) -> dict[str, bytes] | None:
        branches = self.server.repos[repo]
        return next((files for name, files in branches.items() if revision in (name, sha(files))), None)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*file.groups())
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+)(/.*)?)?", path):
            repo, revision, _ = listing.groups()
            if repo not in self.server.repos:
                return self.fail(404, "RepoNotFound")
            files = self.commit_of(repo, revision or "main")
            if files is None:
                return self.fail(404, "RevisionNotFound")
            if "/tree/" in path:
                return self.reply(
                    200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.reply(200, {"id": repo, "modelId": repo, "sha": sha(files), "siblings": siblings, "tags": []})
        return self.fail(404, "RepoNotFound")

    def send_file(self, repo: str, revision: str, name: str):
        if repo not in self.server.repos:
            return self.fail(404, "RepoNotFound")
        files = self.commit_of(repo, revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        if name not in files:
            return self.fail(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return self.reply(200, files[name], ETag=etag, X_Repo_Commit=sha(files))

    def do_POST(self):
        self.server.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401, "Unauthorized")
        if self.path == "/api/repos/create":
            content = json.loads(body)
            repo = "/".join(filter(None, (content.get("organization", "me"), content["name"])))
            if repo in self.server.repos:
                return self.reply(409, {"error": "exists", "url": f"{self.server.url}/{repo}"})
            self.server.repos[repo] = {"main": {}}
            return self.reply(200, {"url": f"{self.server.url}/{repo}"})
        if self.path.startswith("/api/validate-yaml"):
            return self.reply(200, {"errors": [], "warnings": []})
        repo, action, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+?)(?:\?.*)?", self.path).groups()
        if action == "preupload":
            files = json.loads(body)["files"]
            return self.reply(
                200,
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for file in files
                    ]
                },
            )
        files = dict(self.server.repos[repo].get(branch, {}))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.repos[repo][branch] = files
        url = f"{self.server.url}/{repo}/commit/{sha(files)}"
        return self.reply(200, {"success": True, "commitOid": sha(files), "commitUrl": url})


def sha(files: dict[str, bytes]) -> str:
    """Forty hexadecimal digits for a commit."""
    content = b"".join(name.encode() + data for name, data in sorted(files.items()))
    return hashlib.sha1(content).hexdigest()
