"""Push and pull against a stand-in of the hub, which breaks off and damages files when told."""

import base64
import gzip
import hashlib
import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants

from topkd._io.progress import Progress
from topkd.export import hub

# huggingface_hub sends files in a way of which httpx disapproves.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_test"  # noqa: S105
QUIET = Progress(quiet=True)
CONTENT = {
    "README.md": b"---\nlicense: mit\n---\n# A network\n",
    "model.onnx": bytes(range(256)) * 64,
    "more/model.pt2": b"some other bytes" * 512,
}


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the hub, kept in memory."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}  # name -> {"private", "commits": [{path: bytes}]}
        self.objects = {}  # large files by hash
        self.seen = []  # (method, path, range)
        self.cut_get = {}  # path -> where it breaks off, for good
        self.cut_put = set()  # hashes of what is not taken
        self.step = {}  # path -> bytes after which it breaks off each time
        self.knows_ranges = True
        self.damage = {}  # path -> bytes to send in place of the file
        self.endless = {}  # path -> blocks of 64 kB that were sent of a file without an end

    def handle_error(self, request, client_address):
        pass  # a client that was cut off

    def files(self, name):
        return self.repos[name]["commits"][-1]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def answer(self, status, value=None, body=b"", **headers):
        body = json.dumps(value).encode() if value is not None else body
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server, self.path.split("?")[0]
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        hub.seen.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/lfs/"):
            return self.take(path.removeprefix("/lfs/"), body)
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not is_known:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in hub.repos
            private = asked.get("visibility") == "private" or asked.get("private", False)
            hub.repos.setdefault(name, {"private": private, "commits": [{".gitattributes": b""}]})
            return self.answer(409 if there else 200, {"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        name = re.search(r"(\w+/[\w-]+)(\.git|/resolve|/preupload|/commit|/revision|$)", path)[1]
        repo = hub.repos.get(name)
        if repo is None or (repo["private"] and not is_known):
            return self.answer(401, {"error": "no"}, X_Error_Code="RepoNotFound")
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.answer(200, {"objects": [self.offer(o) for o in objects]})
        if "/preupload/" in path:
            return self.answer(200, {"files": [self.mode(f) for f in json.loads(body)["files"]]})
        if "/commit/" in path:
            return self.commit(name, body)
        if "/resolve/" in path:
            return self.resolve(name, *re.search(r"/resolve/(\w+)/(.*)", path).groups())
        sha = (
            path.rpartition("/revision/")[2]
            if "/revision/" in path
            else f"{len(repo['commits']) - 1:040d}"
        )
        siblings = [{"rfilename": path} for path in hub.files(name)]
        facts = {"id": name, "sha": sha, "private": repo["private"], "siblings": siblings}
        return self.answer(200, facts)

    do_GET = do_POST = do_HEAD = do_PUT = handle_any

    def mode(self, file):
        mode = "lfs" if file["path"].endswith((".onnx", ".pt2")) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def offer(self, asked):
        offer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.server.objects:
            offer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
        return offer

    def take(self, oid, body):
        if oid in self.server.cut_put:
            return self.answer(400, {"error": "broken off"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        return self.answer(200)

    def commit(self, name, body):
        files = dict(self.server.files(name))
        for line in body.decode().splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif told["key"] == "deletedFile":
                if value["path"] not in files:
                    return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
                del files[value["path"]]
        commits = self.server.repos[name]["commits"]
        commits.append(files)
        oid = f"{len(commits) - 1:040d}"
        url = f"{self.server.url}/{name}/commit/{oid}"
        return self.answer(200, {"commitUrl": url, "commitOid": oid})

    def resolve(self, name, revision, path):
        commits = self.server.repos[name]["commits"]
        files = commits[-1 if revision == "main" else int(revision)]
        if path not in files:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        content = self.server.damage.get(path, files[path])
        if path in self.server.endless:
            return self.send_blocks(path)
        if not self.server.knows_ranges:
            return self.answer(200, body=content)
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
        step = self.server.step.get(path, len(content))
        stop = self.server.cut_get.get(path, min(start + step, len(content)))
        if stop < len(content):
            if start >= stop:
                return self.answer(500, {"error": "out of order"})
            self.send_response(206)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            return self.wfile.write(content[start:stop])
        if start >= len(content):
            return self.answer(416)
        told = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(206, body=content[start:], Content_Range=told)

    def send_blocks(self, path):
        self.send_response(200)
        self.end_headers()
        for _ in range(3200):  # 200 MB, should nobody stop it
            self.wfile.write(bytes(1 << 16))
            self.server.endless[path] += 1


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub of our own, and a huggingface_hub that knows no other."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # xet's own protocol is not stood in for
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before another try
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def export(tmp_path):
    """A folder like those that `topkd export` writes."""
    folder = tmp_path / "export"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    digest = hashlib.sha256(CONTENT["model.onnx"]).hexdigest()
    config = {"files": {"model.onnx": {"sha256": digest}}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / ".hidden").write_text("not to be pushed", encoding="utf-8")
    return folder


def asked(server, method, ending):
    return [seen for seen in server.seen if seen[0] == method and seen[1].endswith(ending)]


def test_what_is_pulled_is_what_was_pushed(server, export, tmp_path):
    url = hub.push(export, "me/small", endpoint=server.url)
    assert url == f"{server.url}/me/small/commit/{1:040d}"
    pushed = server.files("me/small")
    assert pushed.keys() == {*CONTENT, "config.json", "checksums.json", ".gitattributes"}
    recorded = json.loads(pushed["checksums.json"])
    for name, content in CONTENT.items():
        assert pushed[name] == content
        digest = hashlib.sha256(content).hexdigest()
        assert recorded[name] == {"sha256": digest, "bytes": len(content)}
    assert recorded.keys() == {*CONTENT, "config.json"}

    paths = hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    there = [path for path in (tmp_path / "pulled").rglob("*") if path.is_file()]
    assert {*there} == {*paths, tmp_path / "pulled/checksums.json"}
    for name, content in CONTENT.items():
        assert (tmp_path / "pulled" / name).read_bytes() == content


def test_what_the_server_has_is_not_sent_again(server, export):
    digest = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    server.cut_put.add(digest["more/model.pt2"])
    with pytest.raises(OSError, match="rerun the command to resume|refused me/small"):
        hub.push(export, "me/small", endpoint=server.url)
    assert server.files("me/small").keys() == {".gitattributes"}  # all or nothing
    assert digest["model.onnx"] in server.objects

    server.cut_put.clear()
    server.seen.clear()
    hub.push(export, "me/small", endpoint=server.url)
    assert not asked(server, "PUT", digest["model.onnx"])
    assert len(asked(server, "PUT", digest["more/model.pt2"])) == 1
    assert server.files("me/small")["model.onnx"] == CONTENT["model.onnx"]


def test_what_an_export_has_no_longer_is_deleted_there(server, export):
    hub.push(export, "me/small", endpoint=server.url)
    server.files("me/small")["by-hand.png"] = b"put there by somebody"
    (export / "more/model.pt2").unlink()
    hub.push(export, "me/small", endpoint=server.url)
    assert "more/model.pt2" not in server.files("me/small")
    assert "by-hand.png" in server.files("me/small")


def test_what_was_deleted_by_hand_is_not_deleted_again(server, export):
    hub.push(export, "me/small", endpoint=server.url)
    del server.files("me/small")["more/model.pt2"]  # the hub refuses to delete it again
    (export / "more/model.pt2").unlink()
    hub.push(export, "me/small", endpoint=server.url)
    recorded = json.loads(server.files("me/small")["checksums.json"])
    assert recorded.keys() == {"README.md", "model.onnx", "config.json"}


def test_a_pull_that_broke_off_goes_on_where_it_stopped(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    server.cut_get["model.onnx"] = 5000
    with pytest.raises(OSError, match="refused me/small: 500"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert not (tmp_path / "pulled/model.onnx").exists()
    assert not (tmp_path / "pulled/checksums.json").exists()

    server.cut_get.clear()
    server.seen.clear()
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert (tmp_path / "pulled/model.onnx").read_bytes() == CONTENT["model.onnx"]
    (again,) = asked(server, "GET", "/model.onnx")
    assert again[2] == "bytes=5000-"
    (whole,) = asked(server, "GET", "/README.md")
    assert whole[2] == f"bytes={len(CONTENT['README.md'])}-"  # nothing was left to send
    assert not (tmp_path / "pulled/.parts").exists()


def test_a_connection_that_breaks_off_now_and_then_is_no_matter(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    server.step["model.onnx"] = 3000  # bytes until it breaks off
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert (tmp_path / "pulled/model.onnx").read_bytes() == CONTENT["model.onnx"]
    ranges = [seen[2] for seen in asked(server, "GET", "/model.onnx")]
    assert ranges == [f"bytes={start}-" for start in range(0, 16384, 3000)]


def test_a_server_that_knows_no_ranges_sends_the_whole_file(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    server.cut_get["model.onnx"] = 5000
    with pytest.raises(OSError, match="refused"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    server.cut_get.clear()
    server.knows_ranges = False
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert (tmp_path / "pulled/model.onnx").read_bytes() == CONTENT["model.onnx"]


def test_a_pull_fetches_nothing_twice_and_follows_changes(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    (export / "README.md").write_text("# A better card\n", encoding="utf-8")
    hub.push(export, "me/small", endpoint=server.url)
    server.seen.clear()
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert (tmp_path / "pulled/README.md").read_text(encoding="utf-8") == "# A better card\n"
    assert not asked(server, "GET", "/model.onnx")
    hub.pull("me/small", tmp_path / "first", QUIET, endpoint=server.url, revision=f"{1:040d}")
    assert (tmp_path / "first/README.md").read_bytes() == CONTENT["README.md"]


def test_a_changed_byte_is_refused_and_named(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    content = CONTENT["model.onnx"]
    server.damage["model.onnx"] = content[:100] + bytes([content[100] ^ 1]) + content[101:]
    with pytest.raises(ValueError, match=r"model\.onnx of me/small is not what was pushed"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert not list((tmp_path / "pulled").rglob("model.onnx"))
    assert not (tmp_path / "pulled/README.md").exists()  # all or nothing
    server.damage.clear()
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert (tmp_path / "pulled/model.onnx").read_bytes() == content


def test_files_of_others_are_not_overwritten(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"README\.md is not the file of me/small; delete it"):
        hub.pull("me/small", tmp_path / "mine", QUIET, endpoint=server.url)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", ["model.onnx", "checksums.json"])
def test_a_file_without_an_end_is_not_read_on(server, export, tmp_path, name):
    hub.push(export, "me/small", endpoint=server.url)
    server.endless[name] = 0
    with pytest.raises(ValueError, match=rf"{re.escape(name)} of me/small is (not what|damaged)"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert server.endless[name] < 640  # 40 MB, most of it on the way
    kept = [path for path in (tmp_path / "pulled").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 64_000


def test_what_decompresses_to_more_is_not_decompressed(server, export, tmp_path, monkeypatch):
    hub.push(export, "me/small", endpoint=server.url)
    server.damage["model.onnx"] = gzip.compress(bytes(16384))
    answer = Handler.answer

    def compressed(self, status, value=None, body=b"", **headers):
        if body[:2] == b"\x1f\x8b":
            headers["Content_Encoding"] = "gzip"
        return answer(self, status, value, body, **headers)

    monkeypatch.setattr(Handler, "answer", compressed)
    with pytest.raises(ValueError, match=r"not what was pushed: .* its first \d\d bytes"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)


def test_a_server_that_begins_anew_again_and_again_is_left(server, export, tmp_path, monkeypatch):
    hub.push(export, "me/small", endpoint=server.url)
    breaks, resolve = itertools.cycle([3000, 2000]), Handler.resolve

    def breaking(self, name, revision, path):
        if path != "model.onnx":
            return resolve(self, name, revision, path)
        self.send_response(200)
        self.send_header("Content-Length", "16384")
        self.end_headers()
        return self.wfile.write(CONTENT[path][: next(breaks)])

    monkeypatch.setattr(Handler, "resolve", breaking)
    with pytest.raises(OSError, match="rerun the command to resume"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert len(asked(server, "GET", "/model.onnx")) == 2


def test_files_of_the_same_content_are_both_pulled(server, export, tmp_path):
    (export / "copy.onnx").write_bytes(CONTENT["model.onnx"])
    hub.push(export, "me/small", endpoint=server.url)
    hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    for name in ("copy.onnx", "model.onnx"):
        assert (tmp_path / "pulled" / name).read_bytes() == CONTENT["model.onnx"]


@pytest.mark.parametrize(
    "size", [True, 1e30, 5.0, "5", None, -1, float("nan"), 10**30, [5]], ids=str
)
def test_lengths_that_are_none_are_refused(server, export, tmp_path, size):
    hub.push(export, "me/small", endpoint=server.url)
    told = json.dumps({"a": {"sha256": "0" * 64, "bytes": size}}).encode()
    server.files("me/small")["checksums.json"] = told
    wrong, message = ValueError, r"damaged: 'a': expected bytes as a whole number from 0, got "
    if size == 10**30:
        wrong, message = OSError, r"me/small needs 1,000,000,.* bytes and .* has room for "
    with pytest.raises(wrong, match=message):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("link", ["README.md", "more", ".parts", "checksums.json"])
def test_links_in_the_folder_are_not_followed(server, export, tmp_path, link):
    hub.push(export, "me/small", endpoint=server.url)
    (tmp_path / "pulled").mkdir()
    (tmp_path / "elsewhere").mkdir()
    if link == "README.md":  # the very file: replacing the link would be harmless, telling is not
        (tmp_path / "pulled" / link).symlink_to(export / link)
    else:
        (tmp_path / "pulled" / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=rf"{re.escape(link)} is a symbolic link, which"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_part_of_a_file_may_be_no_link(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    server.cut_get["model.onnx"] = 5000
    with pytest.raises(OSError, match="refused me/small"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    mine = tmp_path / "mine"
    mine.write_text("mine", encoding="utf-8")
    for part in (tmp_path / "pulled/.parts").iterdir():
        part.unlink()
        part.symlink_to(mine)
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_folder_in_place_of_a_file_is_not_overwritten(server, export, tmp_path):
    hub.push(export, "me/small", endpoint=server.url)
    (tmp_path / "pulled/README.md").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"README\.md is not the file of me/small"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)


@pytest.mark.parametrize(
    "names",
    [("a", "A"), ("Ä", "a\u0308"), ("a", "a/b"), ("A/b", "a"), ("Checksums.json",)],
    ids=ascii,
)
def test_names_of_one_place_are_refused(server, export, tmp_path, names):
    hub.push(export, "me/small", endpoint=server.url)
    entry = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    server.files("me/small")["checksums.json"] = json.dumps(dict.fromkeys(names, entry)).encode()
    with pytest.raises(ValueError, match="have the same place but for upper and lower case"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)


def test_what_could_not_be_pulled_is_not_pushed(server, export):
    (export / "readme.md").write_text("the same to some systems", encoding="utf-8")
    if len(list(export.glob("*.md"))) < 2:
        pytest.skip("this system does not tell upper case from lower")
    with pytest.raises(ValueError, match=r"'README.md' and 'readme.md' have the same place"):
        hub.push(export, "me/small", endpoint=server.url)
    assert not server.repos


@pytest.mark.parametrize("content", ["[1]", '{"README.md": 1}'])
def test_damaged_checksums_of_an_earlier_pull_are_told(server, export, tmp_path, content):
    hub.push(export, "me/small", endpoint=server.url)
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled/checksums.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"pulled.checksums\.json is damaged: "):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)


@pytest.mark.parametrize(
    "name",
    ["../up", "/etc/passwd", "a/../../up", "C:\\up", ".ssh/key", "", "a//b", "a/", "a/./b"]
    + ["a\0b", "a\nb", "a. ", "\ud800"],
    ids=ascii,
)
def test_names_that_leave_the_folder_are_refused(server, export, tmp_path, name):
    hub.push(export, "me/small", endpoint=server.url)
    wrong = json.dumps({name: {"sha256": "0" * 64, "bytes": 0}}).encode()
    server.files("me/small")["checksums.json"] = wrong
    with pytest.raises(ValueError, match=r"checksums\.json of me/small is damaged"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)


@pytest.mark.parametrize(
    "content",
    [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"sha256": "zz"}}', b"[" * 100_000],
    ids=range(5),
)
def test_broken_checksums_are_refused(server, export, tmp_path, content):
    hub.push(export, "me/small", endpoint=server.url)
    server.files("me/small")["checksums.json"] = content
    with pytest.raises(ValueError, match=r"checksums\.json of me/small is damaged"):
        hub.pull("me/small", tmp_path / "pulled", QUIET, endpoint=server.url)


def test_what_was_not_pushed_by_topkd_is_not_pulled(server, tmp_path):
    server.repos["me/other"] = {"private": False, "commits": [{"model.bin": b"x"}]}
    with pytest.raises(ValueError, match=r"me/other has no checksums\.json"):
        hub.pull("me/other", tmp_path / "pulled", QUIET, endpoint=server.url)


def test_private_means_private(server, export, tmp_path, monkeypatch):
    hub.push(export, "me/hidden", endpoint=server.url, private=True)
    assert server.repos["me/hidden"]["private"]
    hub.push(export, "me/open", endpoint=server.url)
    with pytest.raises(ValueError, match="me/open is there already, and public"):
        hub.push(export, "me/open", endpoint=server.url, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no me/hidden at http.*, or your token does not"):
        hub.pull("me/hidden", tmp_path / "pulled", QUIET, endpoint=server.url)


def test_a_file_that_is_not_the_one_that_was_checked_is_not_pushed(server, export):
    (export / "model.onnx").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"model\.onnx is not the file that was checked"):
        hub.push(export, "me/small", endpoint=server.url)
    (export / "config.json").write_text('{"architectures": ["Bert"]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not what `topkd export` writes"):
        hub.push(export, "me/small", endpoint=server.url)
    assert not server.repos


def test_the_commands(server, export, tmp_path, monkeypatch, call):
    where = ("--endpoint", server.url + "/")
    status, out, _ = call("push", export, "me/small", "--private", *where)
    assert status == 0
    assert out == f"commit: {server.url}/me/small/commit/{1:040d}\n"
    assert server.repos["me/small"]["private"]
    status, out, _ = call("pull", "me/small", tmp_path / "pulled", *where)
    assert status == 0
    assert out == f"{tmp_path / 'pulled'}: 4 files, all hashes match\n"

    wrong = [
        (("push", tmp_path, "me/small"), "holds no export: config.json is missing"),
        (("push", export, "small"), "a repository is written owner/name, got 'small'"),
        (("pull", "me/none", tmp_path / "none"), "there is no me/none at http"),
    ]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for words, message in wrong:
        status, _, err = call(*words, *where)
        assert (status, message in err, err.count("\n")) == (2, True, 1), err
    monkeypatch.delenv("HF_TOKEN")
    status, _, err = call("push", export, "me/small", *where)
    assert (status, err) == (
        2,
        "topkd: a push needs a token: run `hf auth login` or set HF_TOKEN\n",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, _, err = call("push", export, "me/small", *where)
    assert (status, err.count("\n")) == (2, 1), err


def test_a_server_that_is_not_there_is_one_line(server, export, call):
    nowhere = ("--endpoint", "http://127.0.0.1:1")
    status, _, err = call("push", export, "me/small", *nowhere)
    assert status == 2
    assert err.startswith("topkd: the connection with http://127.0.0.1:1 failed: ")
    assert err.endswith("; rerun the command to resume\n")
    assert err.count("\n") == 1


def test_what_a_server_says_is_one_line(server, export, monkeypatch, call):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer(500, body=b"no\nand\n" * 999))
    status, _, err = call("pull", "me/a", export, "--endpoint", server.url)
    assert (status, err.count("\n")) == (2, 1), err
    assert len(err) < 400


def test_without_the_package_the_message_says_how_to_get_it(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"this needs huggingface_hub: pip install 'topkd\[hub\]'"
    ):
        hub.push(export, "me/small")
