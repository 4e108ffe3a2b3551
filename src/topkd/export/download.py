"""Downloads that resume and stop at a declared size."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

import topkd

PARTIAL, NOTHING_LEFT = 206, 416  # HTTP status codes of range requests

Advance = Callable[[int, str], None]


# Not huggingface_hub's download: it writes all that is sent, and deletes what an interruption left.
def download(url: str, file: IO[bytes], size: int, advance: Advance) -> None:
    """Appends the missing part of a file, and retries as long as every attempt makes progress.

    At most ``size`` bytes are read, whatever the server sends.

    Args:
        url: Address of the file on a Hugging Face hub.
        file: The part that is there already, positioned at its end.
        size: Size of the complete file in bytes.
        advance: Reports the number of bytes written.

    Raises:
        huggingface_hub.errors.HTTPError: If the server refuses, or an attempt makes no progress.
    """
    from huggingface_hub import errors

    while True:
        had = file.tell()
        try:
            return _resume(url, file, size, advance)
        except errors.HTTPError:  # type: ignore[attr-defined]
            if file.tell() <= had:  # it may have restarted
                raise


def _resume(url: str, file: IO[bytes], size: int, advance: Advance) -> None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = build_hf_headers(library_name="topkd", library_version=topkd.__version__)
    headers["Accept-Encoding"] = "identity"  # compressed transfers cannot be resumed
    headers["Range"] = f"bytes={file.tell()}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
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
