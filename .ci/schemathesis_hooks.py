"""What a document cannot say: how many pixels a photo has, and that a request's name names one request."""

import re
import struct
import uuid
import zlib

import schemathesis
from hypothesis import strategies
from schemathesis.transport.serialization import Binary


def png(colour: bytes) -> bytes:
    """64 x 64 pixels of a gradient that begins with a colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = [b"\0" + bytes((c + 3 * x + 2 * y) % 256 for x in range(64) for c in colour) for y in range(64)]
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


schemathesis.openapi.format("binary", strategies.binary(min_size=3, max_size=3).map(png).map(Binary))


@schemathesis.hook
def before_call(context, case, kwargs):
    """A good Idempotency-Key is never sent twice; a bad one stays as it is."""
    headers = case.headers or {}
    for name in [name for name in headers if name.lower() == "idempotency-key"]:
        if re.fullmatch("[!-~]{1,255}", headers[name]):
            headers[name] = str(uuid.uuid4())
