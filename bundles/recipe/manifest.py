"""Writes a bundle's hypnos.json: every file's hash, and what else is known of it.

    python manifest.py BUNDLE RESOLUTION

A file that the last hypnos.json lists with the same hash keeps its entry.
"""

import hashlib
import json
import sys
from pathlib import Path

from tokenizer import RARE

SOURCE = "trained for this project on rendered pictures"
LICENCE = "MIT OR Apache-2.0"
WITHOUT = {"hypnos.json", "README.md"}
# Options that suit it: `hypnos demo` and the page take them.
TRAINING = json.loads(Path(__file__).with_name("training.json").read_text())
# How it draws best: a sampler that adds noise anew wipes out what a small UNet left of the last; it wants little
# guidance.
DRAWING = {"scheduler": "euler-a", "guidance": 4.0}


def main(bundle, resolution):
    bundle = Path(bundle)
    path = bundle / "hypnos.json"
    before = json.loads(path.read_text())["files"] if path.exists() else {}
    files = {}
    for file in sorted(p for p in bundle.rglob("*") if p.is_file() and p.name not in WITHOUT):
        name, sha256 = file.relative_to(bundle).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()
        known = before.get(name, {})
        revision = known.get("revision", "0")
        if known.get("sha256") != sha256:
            revision = str(int(revision) + 1)
        files[name] = {"source": SOURCE, "revision": revision, "sha256": sha256, "licence": LICENCE}
    manifest = {"name": "miniature", "kind": "miniature", "resolution": int(resolution), "rare_tokens": RARE, "training": TRAINING, "drawing": DRAWING, "files": files}
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    size = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file())
    print(f"{len(files)} files, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
