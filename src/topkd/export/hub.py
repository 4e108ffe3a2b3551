"""Upload to and verified download from the Hugging Face hub or a compatible server."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import topkd
from topkd._io import files
from topkd._io.progress import Progress
from topkd.export import checksums
from topkd.export.checksums import CHECKSUMS, Checksums, Entry
from topkd.export.download import Advance, download

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

PARTS = ".parts"  # folder of incomplete downloads
LONGEST = 1 << 20  # maximum bytes of checksums.json; an entry has about 100


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
    local = checksums.of(folder)
    api = _api(repository, endpoint)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    if get_token() is None:
        raise ValueError("a push needs a token: run `hf auth login` or set HF_TOKEN")
    checksums.write(folder, local)
    with _one_line_errors(repository, api):
        api.create_repo(repository, private=private or None, exist_ok=True)
        info = api.model_info(repository)
        if private and not info.private:
            raise ValueError(f"{repository} is there already, and public: nothing was pushed")
        there, names = _names(info), [*local, CHECKSUMS]
        pushed = _fetch_checksums(api, repository, "main") if CHECKSUMS in there else {}
        stale = sorted(there & pushed.keys() - {*names})  # not those deleted by hand
        # Not upload_folder: with hf_xet it may make several commits.
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name) for name in stale),
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
        info = api.model_info(repository, revision=revision)
        if CHECKSUMS not in _names(info):
            raise ValueError(f"{repository} has no {CHECKSUMS}: it was not pushed by topkd")
        commit = str(info.sha)
        listed = _fetch_checksums(api, repository, commit)
        parts = _parts(folder, listed, repository)
        size = sum(listed[name].bytes for name in parts)
        _refuse_more_than_fits(folder, size, parts.values(), repository)
        with progress.bar("Fetching", size, "bytes") as advance:
            for name, part in parts.items():
                url, where = _url(api, repository, commit, name), f"{name} of {repository}"
                _fetch(url, where, part, listed[name], advance)
    for name, part in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        part.replace(folder / name)
    checksums.write(folder, listed)  # last: it says that all is there
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return [folder / name for name in listed]


def _parts(folder: Path, listed: Checksums, repository: str) -> dict[str, Path]:
    """Maps the files to download to paths of incomplete files, unique per name and content.

    Files of other origin are not overwritten.
    """
    _refuse_links(folder, [*listed, CHECKSUMS])
    path = folder / CHECKSUMS
    earlier = checksums.parse(path.read_bytes(), str(path)) if path.exists() else {}
    parts = {}
    for name, entry in listed.items():
        there = folder / name
        found = files.sha256_of(there) if there.is_file() else None
        if found == entry.sha256:
            continue
        if there.exists() and (name not in earlier or found != earlier[name].sha256):
            raise FileExistsError(
                f"{there} is not the file of {repository}; delete it, or pull to another folder"
            )
        parts[name] = folder / PARTS / files.sha256(f"{entry.sha256} {name}".encode())
    _refuse_links(folder, [f"{PARTS}/{part.name}" for part in parts.values()])
    return parts


def _refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Rejects symbolic links below the folder, which would redirect writes."""
    for name in names:
        for path in (folder / name, *(folder / above for above in PurePosixPath(name).parents)):
            if path != folder and path.is_symlink():
                raise FileExistsError(
                    f"{path} is a symbolic link, which a pull does not follow; delete it, or pull "
                    "to another folder"
                )


def _refuse_more_than_fits(folder: Path, size: int, parts: Iterable[Path], repository: str) -> None:
    """Checks that the files fit on the disk, before any download."""
    size -= sum(part.stat().st_size for part in parts if part.exists())
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if size > free:
        raise OSError(
            f"{repository} needs {size:,} bytes and {folder} has room for {free:,}; make room, or "
            "pull to a folder on another disk"
        )


def _fetch(url: str, where: str, part: Path, entry: Entry, advance: Advance) -> None:
    """Downloads a file to its temporary path and verifies its hash."""
    size = entry.bytes
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        if file.tell() > size:  # not a part of this file
            file.truncate(0)
        advance(file.seek(0, os.SEEK_END), "")
        download(url, file, size, advance)
        file.flush()
        os.fsync(file.fileno())
    found, length = files.sha256_of(part), part.stat().st_size
    if found != entry.sha256:
        part.unlink()
        raise ValueError(
            f"{where} is not what was pushed: the SHA-256 of its first {length:,} bytes is "
            f"{found}, {CHECKSUMS} says {size:,} bytes and {entry.sha256}; it was not kept"
        )


def _fetch_checksums(api: HfApi, repository: str, revision: str) -> Checksums:
    content, where = io.BytesIO(), f"{CHECKSUMS} of {repository}"
    url = _url(api, repository, revision, CHECKSUMS)
    download(url, content, LONGEST, lambda amount, news: None)
    if content.tell() == LONGEST:
        raise ValueError(f"{where} is damaged: expected less than {LONGEST:,} bytes, got as many")
    return checksums.parse(content.getvalue(), where)


def _names(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def _url(api: HfApi, repository: str, revision: str, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, name, revision=revision, endpoint=api.endpoint)


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
        reason = f"{error.response.status_code} {' '.join(message.split())[:200]}"  # may be a page
        raise OSError(f"{api.endpoint} refused {repository}: {reason}") from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]
        # Interrupted uploads raise RuntimeError.
        raise OSError(
            f"the connection with {api.endpoint} failed: {error.__cause__ or error}; "
            "rerun the command to resume"
        ) from error
