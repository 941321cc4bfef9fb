"""A folder of a bucket, through pyarrow: S3 and what speaks like it, and Google's storage.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, or the machine's own role). An object is there as a whole or not at
all. Every call has a deadline; pyarrow has none for a server that answers a byte now and then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from deepgen.masking import masked
from deepgen.reading.deadline import Deadline

CALL_S = 60.0  # for a list or a small object
SLOWEST = 1 << 20  # bytes/s that a large object gets at least
_PIECE = 8 << 20
_ATTEMPTS = 3  # of one request, by pyarrow; who calls tries again later

_Result = TypeVar("_Result")


class BucketError(Exception):
    """A call that the bucket did not answer, in one line without secrets. Another attempt may be answered."""


class Bucket:
    """The objects below `address`, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER. Names are relative, with "/"."""

    def __init__(self, address: str) -> None:
        scheme, _, path = address.partition("://")
        self.address, self._base = address, path.rstrip("/")
        self._system: fs.FileSystem = _s3() if scheme == "s3" else _gs()

    def put(self, name: str, content: bytes) -> None:
        """Write a small object."""

        def write() -> None:
            with self._system.open_output_stream(self._path(name)) as stream:
                stream.write(content)

        self._call(f"write {name}", write)

    def get(self, name: str) -> bytes | None:
        """A small object; None if there is none."""

        def read() -> bytes | None:
            try:
                with self._system.open_input_stream(self._path(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._call(f"read {name}", read)

    def upload(self, file: Path, name: str) -> None:
        """Copy a file into the bucket. Raises FileNotFoundError if it has gone meanwhile."""
        size = file.stat().st_size

        def copy() -> None:
            with file.open("rb") as source, self._system.open_output_stream(self._path(name)) as target:
                left = size  # a file that grows gets the rest the next time
                while left and (piece := source.read(min(_PIECE, left))):
                    target.write(piece)
                    left -= len(piece)

        self._call(f"write {name}", copy, size)
        found = self._call(f"look at {name}", lambda: self._system.get_file_info(self._path(name)))
        if found.size != size:
            raise BucketError(f"{self.address}/{name} has {found.size} bytes after {size} were written")

    def download(self, name: str, file: Path, size: int) -> None:
        """Copy an object of `size` bytes into a file, whose folder is made."""
        file.parent.mkdir(parents=True, exist_ok=True)

        def copy() -> None:
            with self._system.open_input_stream(self._path(name)) as source, file.open("wb") as target:
                while piece := source.read(_PIECE):
                    target.write(piece)

        self._call(f"read {name}", copy, size)
        if file.stat().st_size != size:
            raise BucketError(f"{self.address}/{name}: {file.stat().st_size} of {size} bytes have arrived")

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of all objects below a folder, by name relative to it."""
        base = self._path(folder)
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        found = self._call(f"list {folder}", lambda: self._system.get_file_info(selector))
        return {one.path[len(base) + 1 :]: one.size for one in found if one.type == fs.FileType.File}

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, one after the other; those that are gone already are no error."""
        for name in names:

            def remove(path: str = self._path(name)) -> None:
                if self._system.get_file_info(path).type != fs.FileType.NotFound:
                    self._system.delete_file(path)

            self._call(f"delete {name}", remove)

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}".rstrip("/")

    def _call(self, what: str, call: Callable[[], _Result], size: int = 0) -> _Result:
        """The result of a call, with a deadline by its size. Raises BucketError; a local file's errors as they are."""
        seconds = CALL_S + size / SLOWEST
        try:
            return Deadline(seconds).call(call)
        except FileNotFoundError as error:
            if error.filename is not None:  # a local one; pyarrow names no file
                raise
            raise self._error(what, error) from error
        except TimeoutError as error:
            raise BucketError(f"{self.address}: could not {what} within {seconds:.0f} s") from error
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise
            raise self._error(what, error) from error

    def _error(self, what: str, error: Exception) -> BucketError:
        said = " ".join(masked(str(error)).split())
        return BucketError(f"{self.address}: could not {what}: {said[:300]}")


def _s3() -> fs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    scheme, _, host = (endpoint or "").rpartition("://")
    return fs.S3FileSystem(
        region=region,
        endpoint_override=host.rstrip("/") or None,
        scheme=scheme or "https",
        connect_timeout=10,
        request_timeout=CALL_S / 2,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        allow_bucket_creation=False,
    )


def _gs() -> fs.FileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=CALL_S / 2))
