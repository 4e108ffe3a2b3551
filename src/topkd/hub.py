"""Exports pushed to the Hugging Face hub or a server that speaks like it, and pulled by hash."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import topkd
from topkd import files
from topkd.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CHECKSUMS = "checksums.json"
"""The file that tells of every other file of an export its SHA-256 and its length."""

PARTS = ".parts"  # a folder for what was not fetched to its end
PARTIAL, NOTHING_LEFT = 206, 416  # answers of a server that is asked for the rest of a file

Advance = Callable[[int, str], None]
Checksums = dict[str, dict[str, Any]]  # name -> sha256 and bytes


def push(
    folder: Path, repository: str, *, endpoint: str | None = None, private: bool = False
) -> str:
    """Pushes an export as one commit; what the server has already is not sent again.

    Every file is sent but hidden ones, and what an earlier push sent and the folder no longer has
    is deleted there. The token is the one that huggingface_hub finds.

    Args:
        folder: What ``topkd export`` wrote.
        repository: As ``owner/name``; made if it is not there.
        endpoint: Address of the server, if not the one that huggingface_hub knows.
        private: Whether only the owner may see it.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If the folder holds no export.
        OSError: If the server cannot be reached or refuses.
        ValueError: If there is no token, a file is not the one that was checked, or the repository
            is public and was to be private.
    """
    checksums = _checksums(folder)
    api = _api(repository, endpoint)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    if get_token() is None:
        raise ValueError("to push one needs a token: `hf auth login`, or the variable HF_TOKEN")
    files.write_json(folder / CHECKSUMS, checksums)
    with _told_in_one_line(repository, api):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ValueError(f"{repository} is there already, and public: nothing was pushed")
        there = _fetch_checksums(api, repository, "main") or {}
        names = [*checksums, CHECKSUMS]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name) for name in there if name not in names),
            ],
            commit_message=f"Export by topkd {topkd.__version__}",
        )
    return commit.commit_url


def pull(
    repository: str,
    folder: Path,
    progress: Progress,
    *,
    endpoint: str | None = None,
    revision: str | None = None,
) -> list[Path]:
    """Fetches an export and checks every byte before a file is put in its place.

    A fetch that broke off goes on where it stopped. What ``checksums.json`` does not name is not
    fetched. It finds what was damaged on the way or later; it is no proof of who pushed.

    Args:
        repository: As ``owner/name``.
        folder: Where to; files in it that are neither as pushed nor of an earlier pull stop it.
        progress: Tells the user.
        endpoint: Address of the server, if not the one that huggingface_hub knows.
        revision: A branch, tag or commit; ``main`` if not told.

    Returns:
        The files.

    Raises:
        FileExistsError: If a file in the folder is another one.
        OSError: If the server cannot be reached or refuses.
        ValueError: If a file is not what was pushed; the message names it.
    """
    api = _api(repository, endpoint)
    with _told_in_one_line(repository, api):
        commit = str(api.repo_info(repository, revision=revision).sha)
        checksums = _fetch_checksums(api, repository, commit)
        if checksums is None:
            raise ValueError(f"{repository} has no {CHECKSUMS}: it was not pushed by topkd")
        wanted = _wanted(folder, checksums, repository)
        size = sum(checksums[name]["bytes"] for name in wanted)
        with progress.bar("Fetching", size, "bytes") as advance:
            for name in wanted:
                part = folder / PARTS / checksums[name]["sha256"]
                _fetch(api, repository, commit, name, part, advance)
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / PARTS / checksums[name]["sha256"]).replace(folder / name)
    files.write_json(folder / CHECKSUMS, checksums)  # last: it says that all is there
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return [folder / name for name in checksums]


def _checksums(folder: Path) -> Checksums:
    """Hashes what is to be pushed, and compares it with what was checked when it was exported."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no export: config.json is missing; `topkd export` writes it"
        )
    checksums: Checksums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and str(name) != CHECKSUMS:
            content = path.read_bytes()
            checksums[name.as_posix()] = {"sha256": files.sha256(content), "bytes": len(content)}
    try:
        told = files.read_json(folder / "config.json")["files"]
        known = {file: entry["sha256"] for file, entry in told.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not what `topkd export` writes") from error
    for file, expected in known.items():
        if file not in checksums or checksums[file]["sha256"] != expected:
            raise ValueError(f"{folder / file} is not the file that was checked; export it again")
    return checksums


def _wanted(folder: Path, checksums: Checksums, repository: str) -> list[str]:
    """Names what has to be fetched: neither what is there, nor over what others put there."""
    path = folder / CHECKSUMS
    earlier = files.read_json(path) if path.exists() else {}
    wanted = []
    for name, entry in checksums.items():
        there = folder / name
        found = files.sha256(there.read_bytes()) if there.exists() else None
        if found == entry["sha256"]:
            continue
        if found is not None and found != earlier.get(name, {}).get("sha256"):
            raise FileExistsError(
                f"{there} is not the file of {repository}; delete it, or pull to another folder"
            )
        wanted.append(name)
    return wanted


def _fetch(
    api: HfApi, repository: str, commit: str, name: str, part: Path, advance: Advance
) -> None:
    """Fetches a file into the parts, where it is called by its hash."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        advance(file.tell(), "")
        _get(api, repository, commit, name, file, advance)
    found = files.sha256(part.read_bytes())
    if found != part.name:
        part.unlink()
        raise ValueError(
            f"{name} of {repository} is not what was pushed: its SHA-256 is {found}, "
            f"{CHECKSUMS} says {part.name}; it was not kept"
        )


def _fetch_checksums(api: HfApi, repository: str, revision: str) -> Checksums | None:
    """Fetches names and hashes; None if there are none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    content = io.BytesIO()
    try:
        _get(api, repository, revision, CHECKSUMS, content, lambda amount, news: None)
    except RemoteEntryNotFoundError:
        return None
    try:
        checksums: Checksums = json.loads(content.getvalue())
        is_right = all(
            _is_plain(name)
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
            and entry["bytes"] >= 0
            for name, entry in checksums.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ValueError(f"{CHECKSUMS} of {repository} is damaged: expected names and SHA-256")
    return checksums


def _is_plain(name: str) -> bool:
    """Tells whether a name stays inside of the folder, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not re.search(r"[\\:]|^/", name) and not any(p[0] == "." for p in parts)


def _get(
    api: HfApi, repository: str, revision: str, name: str, file: IO[bytes], advance: Advance
) -> None:
    """Fetches what a file lacks, and goes on by itself for as long as every try brings something.

    The download of huggingface_hub keeps nothing of less than ten megabytes when it breaks off.
    """
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository, name, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(library_name="topkd", library_version=topkd.__version__)
    while True:
        had = file.tell()
        try:
            return _go_on(url, headers, file, advance)
        except errors.HTTPError:  # type: ignore[attr-defined]
            if file.tell() == had:
                raise


def _go_on(url: str, headers: Mapping[str, str], file: IO[bytes], advance: Advance) -> None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    # What is compressed on the way cannot be gone on with.
    asked = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers={**headers, **asked}, timeout=timeout) as answer:
        if answer.status_code == NOTHING_LEFT:
            return
        hf_raise_for_status(answer)
        if answer.status_code != PARTIAL:  # the whole file, whatever was asked for
            file.seek(0)
            file.truncate()
        for content in answer.iter_bytes():
            file.write(content)
            advance(len(content), "")


def _api(repository: str, endpoint: str | None) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("this needs huggingface_hub: pip install 'topkd[hub]'") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"a repository is written owner/name, got {repository!r}")
    return HfApi(endpoint=endpoint and endpoint.rstrip("/"), library_name="topkd")


@contextmanager
def _told_in_one_line(repository: str, api: HfApi) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line for people."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repository} has no such revision at {api.endpoint}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no {repository} at {api.endpoint}, or your token does not let you see it"
        ) from error
    except errors.HfHubHTTPError as error:
        reason = error.server_message or error.response.reason_phrase
        status = error.response.status_code
        raise OSError(f"{api.endpoint} refused {repository}: {status} {reason}") from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]
        # An upload that breaks off comes as RuntimeError.
        raise OSError(
            f"the connection with {api.endpoint} failed: {error.__cause__ or error}; "
            "the same command goes on where it stopped"
        ) from error
