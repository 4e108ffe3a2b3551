"""Exports pushed to the Hugging Face hub or a server that speaks like it, and pulled by hash."""

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
"""The file that tells of every other file of an export its SHA-256 and its length."""

PARTS = ".parts"  # a folder for what was not fetched to its end
LONGEST = 1 << 20  # bytes of checksums.json, which tells a hundred of a file
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
        FileExistsError: If a file in the folder is another one, or a symbolic link.
        OSError: If the server cannot be reached or refuses, or the files do not fit on the disk.
        ValueError: If a file is not what was pushed; the message names it.
    """
    api = _api(repository, endpoint)
    with _told_in_one_line(repository, api):
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
            size = path.stat().st_size
            checksums[name.as_posix()] = {"sha256": files.sha256_of(path), "bytes": size}
    _refuse_names(checksums, str(folder))
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
    """Where a file lies until it is complete; files of the same content have parts of their own."""
    return folder / PARTS / files.sha256(f"{entry['sha256']} {name}".encode())


def _refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuses symbolic links below the folder: what follows one is written somewhere else."""
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
    """Refuses files that are longer than the disk has room for, before any is fetched."""
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
    """Fetches a file into the parts, and keeps it if it is the one that was pushed."""
    part, size = _part(folder, name, entry), entry["bytes"]
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        if file.tell() > size:  # no part of this file
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
    """Fetches names and hashes; None if there are none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    content, where = io.BytesIO(), f"{CHECKSUMS} of {repository}"
    try:
        _get(api, repository, revision, CHECKSUMS, content, LONGEST, lambda amount, news: None)
    except RemoteEntryNotFoundError:
        return None
    if content.tell() == LONGEST:
        raise ValueError(f"{where} is damaged: expected less than {LONGEST:,} bytes, got as many")
    try:
        told = json.loads(content.getvalue())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: it is not JSON: {error}") from error
    return _checked(told, where)


def _checked(told: Any, where: str) -> Checksums:
    """Makes sure that what was read are names, hashes and lengths, as a push writes them."""
    damaged = f"{where} is damaged"
    if not isinstance(told, dict):
        raise ValueError(f"{damaged}: expected names of files, got {_short(told)}")
    for name, entry in told.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{damaged}: {name!r}: expected sha256 and bytes, got {_short(entry)}")
        digest, size = entry.get("sha256"), entry.get("bytes")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"{damaged}: {name!r}: expected a SHA-256, got {_short(digest)}")
        if type(size) is not int or size < 0:  # True is an int, too
            expected = "expected bytes as a whole number from 0"
            raise ValueError(f"{damaged}: {name!r}: {expected}, got {_short(size)}")
    _refuse_names(told, damaged)
    return told


def _refuse_names(names: Iterable[str], where: str) -> None:
    """Refuses names that on some system leave the folder, or are two of one file."""
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
    """Tells whether a name stays inside of the folder, on any system."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not re.search(r"[\\:]", name)
        and not any(part == "" or part[0] == "." or part[-1] in ". " for part in parts)
    )


def _short(value: Any) -> str:
    """Shows what was read, in a message."""
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
    """Fetches what a file lacks, and goes on by itself for as long as every try brings something.

    No more than ``size`` bytes are read, however many are sent.

    The download of huggingface_hub keeps nothing of less than ten megabytes when it breaks off.
    """
    from huggingface_hub import errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository, name, revision=revision, endpoint=api.endpoint)
    headers = build_hf_headers(library_name="topkd", library_version=topkd.__version__)
    while True:
        had = file.tell()
        try:
            return _go_on(url, headers, file, size, advance)
        except errors.HTTPError:  # type: ignore[attr-defined]
            if file.tell() <= had:  # it may have begun anew
                raise


def _go_on(
    url: str, headers: Mapping[str, str], file: IO[bytes], size: int, advance: Advance
) -> None:
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
        for content in answer.iter_raw():  # a few bytes can decompress to any number
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
        told = error.server_message or error.response.reason_phrase
        reason = " ".join(told.split())[:200]  # a page of text is no line
        status = error.response.status_code
        raise OSError(f"{api.endpoint} refused {repository}: {status} {reason}") from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]
        # An upload that breaks off comes as RuntimeError.
        raise OSError(
            f"the connection with {api.endpoint} failed: {error.__cause__ or error}; "
            "the same command goes on where it stopped"
        ) from error
