"""Says of the pictures of `hypnos compare` whether they show the place and the class that their prompts ask for.

    python follow.py COMPARISON WORK         # WORK/judge.pt is what `classifier.py judge` wrote

Of every recipe, over the pictures whose prompt names a place: the share in that place, in the photos' own place although another was
asked for, and of the product's class. Over those whose prompt names none: the share in the photos' place, which has leaked.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from world import CLASSES, PLACES, SCENES, SIDE

import numpy as np
import torch
from PIL import Image

from classifier import ROLES, Classifier

PRODUCTS = Path(__file__).parents[2] / "examples/products/products.json"


def place(prompt):
    """The place that a prompt names, or None."""
    return next((PLACES.index(name) for name, (words, *_) in SCENES.items() if prompt.rstrip().endswith(words)), None)


def picture(path):
    image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.BOX)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def main(comparison, work):
    products = {product["name"]: product for product in json.loads(PRODUCTS.read_text())}
    net = Classifier(ROLES["judge"])
    net.load_state_dict(torch.load(Path(work) / "judge.pt", weights_only=True)["net"])
    net.eval()
    counts = defaultdict(lambda: np.zeros(6, int))
    for report in sorted(Path(comparison).glob("*/*/report.json")):
        product = products[report.parts[-3]]
        home, kind = place(product["place"]), CLASSES.index(product["class_name"]) if product["class_name"] in CLASSES else None
        for i, image in enumerate(json.loads(report.read_text())["images"]):
            asked = place(image["prompt"])
            seen = [logits.argmax(1).item() for logits in net(picture(report.parent / f"images/{i:02}.png")[None])]
            if asked is None:
                counts[report.parts[-2]] += [0, 0, 0, 0, 1, seen[4] == home]
            else:
                counts[report.parts[-2]] += [1, seen[4] == asked, asked != home and seen[4] == home, seen[0] == kind, 0, 0]
    for recipe, (n, follows, instead, right, n_free, leaked) in counts.items():
        share = lambda part, whole: f"{part / max(whole, 1):.2f}"
        shares = f"place {share(follows, n)}, the photos' place instead {share(instead, n)}, class {share(right, n)}"
        print(f"{recipe:20} of {n} with a place: {shares}; of {n_free} without: the photos' place {share(leaked, n_free)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
