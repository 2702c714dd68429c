"""A Hub on loopback: what `huggingface_hub` asks to push and pull models, over HTTP, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}


@dataclass
class Repository:
    """Branches that name commits, and commits that name files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    changes: list[dict[str, str]] = field(default_factory=list)  # of each commit: the kind of change, by path

    def commit(self, branch: str, files: dict[str, bytes], message: str, changes: dict[str, str] | None = None) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        self.changes.append(changes or {})
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def object_id(path: str, content: bytes) -> str:
    """The id that git, or git's large file storage, has for a file."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by id, such as `"me/clip"`.
        users: the user of each token.
        cut: kind of request (`"upload"` or `"commit"`) during which connections are cut off.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users, self.cut = users, None
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        port = self.server_address[1]
        # Large files have a host of their own: clients take an answer from another host for the storage's.
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that is gone, or that was cut off


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    # ---- answers

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, fields: object) -> None:
        self.send(json.dumps(fields).encode(), Content_Type="application/json")

    def cut_off(self, kind: str) -> None:
        """Read half of what comes and hang up, if this kind of request is to be cut."""
        if self.server.cut == kind:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            raise ConnectionAbortedError

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split():
                    answer(self, **found.groupdict())
                    return
            raise Refusal(404, "EntryNotFound", f"No such address: {self.command} {path}")
        except Refusal as refusal:
            unread = {"Connection": "close"} if self.command in ("POST", "PUT") else {}
            self.send(json.dumps({"error": str(refusal)}).encode(), refusal.status, **refusal.headers, **unread)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # ---- who may do what

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def repository(self, repo: str, write: bool = False) -> Repository:
        found, owner = self.server.repositories.get(repo), repo.split("/")[0]
        if found is None or (found.private and self.user != owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != owner:
            raise Refusal(403 if self.user else 401, "", "You don't have the rights to write to this repository")
        return found

    # ---- addresses

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        self.send_json({"name": self.user, "type": "user", "orgs": []})

    def create(self) -> None:
        fields = json.loads(self.body())
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        owner = fields["organization"] or self.user
        if owner != self.user:
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{fields['name']}"
        url = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repositories:
            self.send(json.dumps(url).encode(), 409, X_Error_Message="You already created this model repo")
            return
        self.server.repositories[repo] = made = Repository(private=fields.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.send_json(url)

    def branch(self, repo: str, branch: str) -> None:
        found = self.repository(repo, write=True)
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        if branch in found.branches:
            raise Refusal(409, "", "Reference already exists")
        found.branches[branch] = found.resolve(start)
        self.send_json({})

    def validate_yaml(self) -> None:
        self.body()
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.repository(repo, write=True)
        files = found.commits[found.resolve(revision)]
        answers = []
        for asked in json.loads(self.body())["files"]:
            path = asked["path"]
            known = {"oid": object_id(path, files[path])} if path in files else {}
            mode = "lfs" if is_large(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.send_json({"files": answers, "commitOid": found.resolve(revision)})

    def batch(self, repo: str) -> None:
        self.repository(repo, write=True)
        answers = []
        for asked in json.loads(self.body())["objects"]:
            actions = {
                "upload": {"href": f"{self.server.storage}/objects/{asked['oid']}"},
                "verify": {"href": f"{self.server.url}/{repo}.git/verify"},
            }
            here = asked["oid"] in self.server.objects
            answers.append({"oid": asked["oid"], "size": asked["size"], **({} if here else {"actions": actions})})
        self.send_json({"transfer": "basic", "objects": answers})

    def put_object(self, oid: str) -> None:
        self.cut_off("upload")
        content = self.chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "", "The content is not what its id says")
        self.server.objects[oid] = content
        self.send(b"")

    def chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def verify(self, repo: str) -> None:
        if json.loads(self.body())["oid"] not in self.server.objects:
            raise Refusal(404, "", "No such object")
        self.send_json({})

    def commit(self, repo: str, revision: str) -> None:
        found = self.repository(repo, write=True)
        self.cut_off("commit")
        header, *operations = [json.loads(line) for line in self.body().splitlines()]
        head = found.resolve(revision)
        if header["value"].get("parentCommit", head) != head:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[head])
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, "", f"This Hub does not know the operation {kind}")
        changes = {operation["value"]["path"]: operation["key"] for operation in operations}
        sha = found.commit(revision, files, header["value"]["summary"], changes)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repository(repo)
        sha = found.resolve(revision)
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        self.send_json({"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        found = self.repository(repo)
        sha = found.resolve(revision)
        query = parse_qs(urlsplit(self.path).query.lower())
        entries, recursive = {}, query.get("recursive") == ["true"]
        prefix = f"{folder}/" if folder else ""
        for path, content in found.commits[sha].items():
            if not path.startswith(prefix):
                continue
            first, _, rest = path.removeprefix(prefix).partition("/")
            if rest and not recursive:
                entries[first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
                continue
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": object_id(path, content)}
            if is_large(path):
                oid = object_id(path, content)
                entries[path]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        if folder and not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist", commit=sha)
        self.send_json(list(entries.values()))

    def file(self, repo: str, revision: str, path: str) -> None:
        found = self.repository(repo)
        sha = found.resolve(revision)
        content = found.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", commit=sha)
        oid = object_id(path, content)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{oid}"', "Accept_Ranges": "bytes"}
        if is_large(path):  # kept elsewhere
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
            self.server.objects[oid] = content
            self.send(b"", 302, **headers, **linked, Location=f"{self.server.storage}/objects/{oid}")
        else:
            self.send(content, **headers)

    def get_object(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "", "A token was sent to the storage, which it is none of")
        self.send(self.server.objects[oid], ETag=f'"{oid}"')


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{REPO}\.git/verify", Handler.verify),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", Handler.put_object),
    ("GET HEAD", "/objects/(?P<oid>[0-9a-f]{64})", Handler.get_object),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.file),
]
