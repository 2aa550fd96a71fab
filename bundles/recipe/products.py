"""The demo products' photos as JPEG, and the list of them.

    python products.py DEMO ../../examples/products       # DEMO is what `render demo` wrote
"""

import json
import sys
from pathlib import Path

from PIL import Image

# What each product is, where its name does not end with it, and where it stands: render.rs's SETS in its order of
# products.
CLASSES = {"dotted-car": "toy car"}
PLACES = ["on a wooden table", "on white marble", "in the snow", "on the beach"]
ORDER = (
    "dotted-mug banded-vase banded-robot dotted-teapot lighthouse dotted-car dotted-robot camera banded-mug dotted-vase "
    "banded-teapot dotted-lamp"
).split()


def main(demo, out):
    products = []
    for i, name in enumerate(ORDER):
        (Path(out) / name).mkdir(parents=True, exist_ok=True)
        for photo in sorted((Path(demo) / name).glob("*.ppm")):
            Image.open(photo).save(Path(out) / name / f"{photo.stem}.jpg", quality=92)
        products.append({"name": name, "class_name": CLASSES.get(name, name.split("-")[-1]), "place": PLACES[i % len(PLACES)]})
    (Path(out) / "products.json").write_text(json.dumps(products, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
