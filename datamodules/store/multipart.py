"""Objects that are made piece by piece: written without being held in memory, seen as a whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

PART_BYTES = 64 << 20  # of one request; S3 takes at most 10,000 of 5 MiB to 5 GiB
MOST_PARTS = 9_000

# Makes a call with a filesystem, and again where it is worth it: `Store` retries each request on its own.
Ask = Callable[[Callable[[Any], Any]], Any]


def upload(ask: Ask, bucket: str, key: str, pieces: Iterable[memoryview], size: int) -> None:
    """Writes an object of `size` bytes to S3; one part at a time is in memory.

    Raises:
        whatever `ask` and `pieces` raise; then nothing is left of the object.
    """
    place = {"Bucket": bucket, "Key": key}
    part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
    begun = ask(lambda fs: fs.call_s3("create_multipart_upload", **place))
    place["UploadId"] = begun["UploadId"]
    try:
        done = []
        for number, part in enumerate(parts(pieces, part_bytes), start=1):
            answer = ask(lambda fs: fs.call_s3("upload_part", **place, PartNumber=number, Body=part))  # noqa: B023
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
        ask(lambda fs: fs.call_s3("complete_multipart_upload", **place, MultipartUpload={"Parts": done}))
    except BaseException:
        with contextlib.suppress(Exception):  # a bucket's own rules remove what cannot be removed now
            ask(lambda fs: fs.call_s3("abort_multipart_upload", **place))
        raise


def parts(pieces: Iterable[memoryview], size: int) -> Iterator[bytearray]:
    """The same bytes in parts of `size`, the last one shorter."""
    part = bytearray()
    for piece in pieces:
        while len(piece):
            taken = piece[: size - len(part)]
            part += taken
            piece = piece[len(taken) :]
            if len(part) == size:
                yield part
                part = bytearray()
    if part:
        yield part
