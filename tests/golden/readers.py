"""What other programs read in our pictures of how they were drawn.

    pip install pillow==13.0.0 piexif==1.1.3 sd-parsers==0.6
    pip install --no-deps sd-prompt-reader==1.3.5
    HYPNOS_PICTURES=DIR cargo test --test it provenance::other_programs    # leaves the pictures in DIR, whatever it says
    python tests/golden/readers.py DIR                                     # provenance.jsonl

The pictures are those of `tests/it/provenance.rs`, each as PNG, JPEG and WebP. Pillow gives texts, EXIF and XMP as they lie in
the file, Python's XML parser reads the XMP, and piexif the EXIF comment as AUTOMATIC1111's web UI does. sd-parsers and
sd-prompt-reader are readers of the field; the latter is a program with windows, of which only the reader is loaded.

The golden's first line has the versions, every other one what was read in one file.
"""

import importlib.metadata
import io
import json
import logging
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

PINS = {"pillow": "13.0.0", "piexif": "1.1.3", "sd-parsers": "0.6", "sd-prompt-reader": "1.3.5"}
for package, wanted in PINS.items():
    found = importlib.metadata.version(package)
    if found != wanted:
        sys.exit(f"readers.py: {package} {found} is installed, {wanted} is wanted; see the head of this file")

import piexif
import piexif.helper
from PIL import Image
from sd_parsers import ParserManager
from sd_prompt_reader.format import BaseFormat
from sd_prompt_reader.image_data_reader import ImageDataReader

HERE = Path(__file__).resolve().parent
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
DRAWN = "{urn:hypnos:xmp/}drawn"


def by_sd_parsers(file):
    info = ParserManager().parse(file)
    if info is None:
        return None
    (sampler,) = info.samplers
    said, model = sampler.parameters, sampler.model
    return {
        "prompt": info.full_prompt,
        "negative": info.full_negative_prompt,
        "sampler": sampler.name,
        "schedule": said["scheduler"],
        "steps": said["steps"],
        "guidance": said["cfg_scale"],
        "seed": said["seed"],
        "size": info.metadata["Size"],
        "model": model and model.name,
        "model_hash": model and model.hash,
    }


def by_sd_prompt_reader(file):
    reader = ImageDataReader(file)
    if reader.status != BaseFormat.Status.READ_SUCCESS:
        return None
    said = reader.parameter
    named = {"sampler": "sampler", "steps": "steps", "guidance": "cfg", "seed": "seed", "size": "size", "model": "model"}
    return {"prompt": reader.positive, "negative": reader.negative} | {ours: said[theirs] for ours, theirs in named.items()}


def read(file):
    with Image.open(file) as image, Image.open(file.with_stem("bare")) as bare:
        assert image.convert("RGB").tobytes() == bare.convert("RGB").tobytes(), f"{file}: other pixels"
        info, size = dict(image.info), image.size
    texts = {key: str(text) for key, text in info.items() if isinstance(text, str)} if file.suffix == ".png" else {}
    exif = info.get("exif")
    comment = exif and piexif.helper.UserComment.load(piexif.load(exif)["Exif"][piexif.ExifIFD.UserComment])
    xmp = texts.get("XML:com.adobe.xmp") or info["xmp"].decode()
    (description,) = ET.fromstring(xmp.strip("\ufeff")).iter(f"{RDF}Description")
    return {
        "case": file.stem,
        "format": file.suffix[1:],
        "size": size,
        "texts": texts,
        "exif": exif and exif.removeprefix(b"Exif\0\0").hex(),
        "xmp": xmp,
        "source_type": description.findtext(SOURCE_TYPE),
        "drawn": json.loads(description.findtext(DRAWN)),
        "user_comment": comment,
        "sd_parsers": by_sd_parsers(file),
        "sd_prompt_reader": by_sd_prompt_reader(file),
    }


def main(directory):
    logging.disable()
    files = sorted(file for file in directory.iterdir() if file.stem != "bare")
    rows = [read(file) for file in files]
    head = {"versions": PINS, "hypnos": rows[0]["drawn"]["hypnos"]}
    with io.open(HERE / "provenance.jsonl", "w", encoding="utf-8", newline="\n") as out:
        for row in [head, *rows]:
            out.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
    print(f"{len(rows)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
