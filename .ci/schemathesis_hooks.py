"""What a document cannot say: how many pixels a photo has, that a request's name names one request, that a step is one of the steps,
that two tokens differ."""

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
def filter_case(context, case):
    """Good forms with a model are left out: no worker has registered one here, so that most names are refused."""
    return not names_model(case)


@schemathesis.hook
def before_call(context, case, kwargs):
    """A good Idempotency-Key is never sent twice; a bad one stays as it is."""
    headers = case.headers or {}
    for name in [name for name in headers if name.lower() == "idempotency-key"]:
        if re.fullmatch("[!-~]{1,255}", headers[name]):
            headers[name] = str(uuid.uuid4())
    if options := options_of(case):
        mend(options)
        # Schemathesis validates a case again that a hook has changed, and takes each form with a file in it for a bad one, since
        # it cannot validate files. With this the mended form counts as the generated one, and stays a good one.
        case._sync_validated_hashes()


def names_model(case):
    """Whether a good form names a model. Which models there are is no part of the document."""
    is_bad = case.meta and case.meta.generation.mode.is_negative
    return isinstance(case.body, dict) and not is_bad and bool(case.body.get("model"))


def options_of(case):
    """The options of a good form. Bad data stays as bad as it is."""
    is_bad = case.meta and case.meta.generation.mode.is_negative
    options = case.body.get("options") if isinstance(case.body, dict) and not is_bad else None
    return options if isinstance(options, dict) else None


def mend(options):
    """Makes good options agree with one another."""
    tokens = [options.get(name) for name in ("instance_token", "background_token")]
    if all(isinstance(token, str) for token in tokens) and tokens[0] == tokens[1]:
        del options["background_token"]
    return within_steps(options)


def within_steps(options):
    """Steps that are whole numbers and only beyond the last one become the last one; all else stays as it is."""
    last = options.get("steps", 3000 if options.get("method") == "textual_inversion" else 800)
    if not isinstance(last, int) or not 1 <= last <= 10_000:
        return options

    def within(step, most):
        return last if isinstance(step, int) and last < step <= most else step

    if "s_p" in options:
        options["s_p"] = within(options["s_p"], 10_000)
    evaluation = options.get("evaluation")
    for holder, name in ((options, "previews"), (evaluation, "trials")):
        if isinstance(holder, dict) and isinstance(holder.get(name), list):
            holder[name] = [within(step, 2**31 - 1) for step in holder[name]]
    return options
