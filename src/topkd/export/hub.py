"""Upload to and verified download from the Hugging Face hub or a compatible server."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import topkd
from topkd._io import files
from topkd._io.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CHECKSUMS = "checksums.json"
"""The file with SHA-256 and size of every other file of an export."""

PARTS = ".parts"  # folder of incomplete downloads
LONGEST = 1 << 20  # maximum bytes of checksums.json; an entry has about 100
PARTIAL, NOTHING_LEFT = 206, 416  # HTTP status codes of range requests

Advance = Callable[[int, str], None]
Checksums = dict[str, dict[str, Any]]  # name -> sha256 and bytes


def push(
    folder: Path, repository: str, *, endpoint: str | None = None, private: bool = False
) -> str:
    """Uploads an export as one commit. Content that the server already has is not sent again.

    Hidden files are skipped. Files of an earlier push that the folder no longer contains are
    deleted from the repository. The token is that of huggingface_hub.

    Args:
        folder: A folder written by ``topkd export``.
        repository: Repository as ``owner/name``, created if it does not exist.
        endpoint: URL of the server. Defaults to that of huggingface_hub.
        private: Whether the repository must be private.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: If the folder holds no export.
        OSError: If the server cannot be reached or refuses.
        ValueError: If there is no token, a file has changed since its export, or the repository is
            public although ``private`` is set.
    """
    checksums = _checksums(folder)
    api = _api(repository, endpoint)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    if get_token() is None:
        raise ValueError("a push needs a token: run `hf auth login` or set HF_TOKEN")
    files.write_json(folder / CHECKSUMS, checksums)
    with _one_line_errors(repository, api):
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
    """Downloads an export and verifies every file before moving it to its place.

    Interrupted downloads are resumed. Only files listed in ``checksums.json`` are downloaded. The
    hashes detect damage; they do not prove who uploaded the files.

    ``huggingface_hub.snapshot_download`` is not used: it neither bounds the size of a download nor
    resumes files below 10 MB.

    Args:
        repository: Repository as ``owner/name``.
        folder: Output folder. Files in it are replaced only if an earlier pull wrote them.
        progress: Shows progress.
        endpoint: URL of the server. Defaults to that of huggingface_hub.
        revision: Branch, tag or commit. Defaults to ``main``.

    Returns:
        The paths of the files.

    Raises:
        FileExistsError: If the folder has another file of that name, or a symbolic link.
        OSError: If the server cannot be reached or refuses, or the files do not fit on the disk.
        ValueError: If a hash does not match; the message names the file.
    """
    api = _api(repository, endpoint)
    with _one_line_errors(repository, api):
        commit = str(api.repo_info(repository, revision=revision).sha)
        checksums = _fetch_checksums(api, repository, commit)
        if checksums is None:
            raise ValueError(f"{repository} has no {CHECKSUMS}: it was not pushed by topkd")
        wanted = _wanted(folder, checksums, repository)
        _refuse_more_than_fits(folder, checksums, wanted, repository)
        size = sum(checksums[name]["bytes"] for name in wanted)
        with progress.bar("Fetching", size, "bytes") as advance:
            for name in wanted:
                _fetch(api, repository, commit, name, checksums[name], folder, advance)
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _part(folder, name, checksums[name]).replace(folder / name)
    files.write_json(folder / CHECKSUMS, checksums)  # last: it says that all is there
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return [folder / name for name in checksums]


def _checksums(folder: Path) -> Checksums:
    """Hashes the files of an export and compares them with the hashes in ``config.json``."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no export: config.json is missing; `topkd export` writes it"
        )
    checksums: Checksums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and str(name) != CHECKSUMS:
            size = path.stat().st_size
            checksums[name.as_posix()] = {"sha256": files.sha256_of(path), "bytes": size}
    _refuse_names(checksums, str(folder))
    try:
        listed = files.read_json(folder / "config.json")["files"]
        known = {file: entry["sha256"] for file, entry in listed.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not what `topkd export` writes") from error
    for file, expected in known.items():
        if file not in checksums or checksums[file]["sha256"] != expected:
            raise ValueError(f"{folder / file} is not the file that was checked; export it again")
    return checksums


def _wanted(folder: Path, checksums: Checksums, repository: str) -> list[str]:
    """Lists the files to download, and refuses to overwrite files of other origin."""
    _refuse_links(folder, [*checksums, CHECKSUMS])
    path = folder / CHECKSUMS
    earlier = _checked(files.read_json(path), str(path)) if path.exists() else {}
    wanted = []
    for name, entry in checksums.items():
        there = folder / name
        found = files.sha256_of(there) if there.is_file() else None
        if found == entry["sha256"]:
            continue
        if there.exists() and (found is None or found != earlier.get(name, {}).get("sha256")):
            raise FileExistsError(
                f"{there} is not the file of {repository}; delete it, or pull to another folder"
            )
        wanted.append(name)
    _refuse_links(folder, [_part(Path(), name, checksums[name]).as_posix() for name in wanted])
    return wanted


def _part(folder: Path, name: str, entry: Mapping[str, Any]) -> Path:
    """Returns the path of an incomplete file, unique per name and content."""
    return folder / PARTS / files.sha256(f"{entry['sha256']} {name}".encode())


def _refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuses symbolic links below the folder, which would redirect writes."""
    for name in names:
        for path in (folder / name, *(folder / above for above in PurePosixPath(name).parents)):
            if path != folder and path.is_symlink():
                raise FileExistsError(
                    f"{path} is a symbolic link, which a pull does not follow; delete it, or pull "
                    "to another folder"
                )


def _refuse_more_than_fits(
    folder: Path, checksums: Checksums, wanted: Iterable[str], repository: str
) -> None:
    """Checks that the files fit on the disk, before any download."""
    parts = {name: _part(folder, name, checksums[name]) for name in wanted}
    there = sum(part.stat().st_size for part in parts.values() if part.exists())
    size = sum(checksums[name]["bytes"] for name in parts) - there
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if size > free:
        raise OSError(
            f"{repository} needs {size:,} bytes and {folder} has room for {free:,}; make room, or "
            "pull to a folder on another disk"
        )


def _fetch(
    api: HfApi,
    repository: str,
    commit: str,
    name: str,
    entry: Mapping[str, Any],
    folder: Path,
    advance: Advance,
) -> None:
    """Downloads a file to its temporary path and verifies its hash."""
    part, size = _part(folder, name, entry), entry["bytes"]
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        if file.tell() > size:  # not a part of this file
            file.truncate(0)
        advance(file.seek(0, os.SEEK_END), "")
        _get(api, repository, commit, name, file, size, advance)
    found, length = files.sha256_of(part), part.stat().st_size
    if found != entry["sha256"]:
        part.unlink()
        raise ValueError(
            f"{name} of {repository} is not what was pushed: the SHA-256 of its first {length:,} "
            f"bytes is {found}, {CHECKSUMS} says {size:,} bytes and {entry['sha256']}; it was not "
            "kept"
        )


def _fetch_checksums(api: HfApi, repository: str, revision: str) -> Checksums | None:
    """Downloads ``checksums.json``; returns None if the repository has none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    content, where = io.BytesIO(), f"{CHECKSUMS} of {repository}"
    try:
        _get(api, repository, revision, CHECKSUMS, content, LONGEST, lambda amount, news: None)
    except RemoteEntryNotFoundError:
        return None
    if content.tell() == LONGEST:
        raise ValueError(f"{where} is damaged: expected less than {LONGEST:,} bytes, got as many")
    try:
        value = json.loads(content.getvalue())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: it is not JSON: {error}") from error
    return _checked(value, where)


def _checked(value: Any, where: str) -> Checksums:
    """Validates names, hashes and sizes."""
    damaged = f"{where} is damaged"
    if not isinstance(value, dict):
        raise ValueError(f"{damaged}: expected names of files, got {_short(value)}")
    for name, entry in value.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{damaged}: {name!r}: expected sha256 and bytes, got {_short(entry)}")
        digest, size = entry.get("sha256"), entry.get("bytes")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"{damaged}: {name!r}: expected a SHA-256, got {_short(digest)}")
        if type(size) is not int or size < 0:  # True is an int, too
            expected = "expected bytes as a whole number from 0"
            raise ValueError(f"{damaged}: {name!r}: {expected}, got {_short(size)}")
    _refuse_names(value, damaged)
    return value


def _refuse_names(names: Iterable[str], where: str) -> None:
    """Refuses names that leave the folder or collide on some file system."""
    taken, folders = {CHECKSUMS: CHECKSUMS}, dict[str, str]()
    for name in names:
        if not _is_plain(name):
            raise ValueError(
                f"{where}: expected a name that stays inside of the folder, got {_short(name)}"
            )
        path = PurePosixPath(unicodedata.normalize("NFC", name).casefold())
        above = [str(parent) for parent in path.parents][:-1]
        clashes = [folders.get(str(path)), *(taken.get(place) for place in (str(path), *above))]
        other = next(filter(None, clashes), None)
        if other is not None:
            raise ValueError(
                f"{where}: {other!r} and {name!r} have the same place but for upper and lower "
                "case; give one of them another name"
            )
        taken[str(path)] = name
        folders |= dict.fromkeys(above, name)


def _is_plain(name: str) -> bool:
    """Returns whether a name stays inside the folder on every operating system."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not re.search(r"[\\:]", name)
        and not any(part == "" or part[0] == "." or part[-1] in ". " for part in parts)
    )


def _short(value: Any) -> str:
    """Abbreviates a value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _get(
    api: HfApi,
    repository: str,
    revision: str,
    name: str,
    file: IO[bytes],
    size: int,
    advance: Advance,
) -> None:
    """Downloads the missing part of a file, and retries as long as every attempt makes progress.

    At most ``size`` bytes are read, whatever the server sends.
    """
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository, name, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(library_name="topkd", library_version=topkd.__version__)
    while True:
        had = file.tell()
        try:
            return _resume(url, headers, file, size, advance)
        except errors.HTTPError:  # type: ignore[attr-defined]
            if file.tell() <= had:  # it may have restarted
                raise


def _resume(
    url: str, headers: dict[str, str], file: IO[bytes], size: int, advance: Advance
) -> None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    # Compressed transfers cannot be resumed.
    asked = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream(
        "GET", url, headers={**headers, **asked}, timeout=timeout
    ) as response:
        if response.status_code == NOTHING_LEFT:
            return
        hf_raise_for_status(response)
        if response.status_code != PARTIAL:  # the complete file instead of the range
            file.seek(0)
            file.truncate()
        for content in response.iter_raw():  # not decoded: a few bytes can decompress to any size
            taken = file.write(content[: size - file.tell()])
            advance(taken, "")
            if file.tell() == size:
                return


def _api(repository: str, endpoint: str | None) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("this needs huggingface_hub: pip install 'topkd[hub]'") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"a repository is written owner/name, got {repository!r}")
    return HfApi(endpoint=endpoint and endpoint.rstrip("/"), library_name="topkd")


@contextmanager
def _one_line_errors(repository: str, api: HfApi) -> Iterator[None]:
    """Converts exceptions of huggingface_hub to one-line messages."""
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
        message = error.server_message or error.response.reason_phrase
        reason = " ".join(message.split())[:200]  # may be a long page
        status = error.response.status_code
        raise OSError(f"{api.endpoint} refused {repository}: {status} {reason}") from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]
        # Interrupted uploads raise RuntimeError.
        raise OSError(
            f"the connection with {api.endpoint} failed: {error.__cause__ or error}; "
            "rerun the command to resume"
        ) from error
