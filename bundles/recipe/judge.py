"""Has a bundle draw 60 fixed prompts and a classifier say what it sees: whether class, place and first colour are those asked for.

    python judge.py BUNDLE WORK SHEET.png         # WORK/judge.pt is what `classifier.py judge` wrote
"""

import json
import sys
from pathlib import Path

from world import CLASSES, COLOURS, DRAWN_CLASSES, DRAWN_COLOURS, PATTERNS, PLACES, SCENES, SIDE

import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from classifier import ROLES, Classifier

STEPS, GUIDANCE, SEED = 25, 4.0, 100
COLUMNS = 10


def wanted():
    """Class, first colour, second colour, pattern and place of each prompt: every place thrice, every class ten times, of
    what the UNet learns."""
    classes, colours = [CLASSES.index(name) for name in DRAWN_CLASSES], [COLOURS.index(name) for name in DRAWN_COLOURS]
    rows = []
    for i in range(60):
        colour = (i + i // 6) % len(colours)
        second = (colour + 1 + i % (len(colours) - 1)) % len(colours)
        pattern = (i // 20) % len(PATTERNS) if i % 2 else 0
        rows.append((classes[i % len(classes)], colours[colour], colours[second], pattern, (i + i // 20 * 3) % len(PLACES)))
    return rows


def prompt(row):
    name, colour, second, pattern, place = row
    words = COLOURS[colour] if pattern == 0 else f"{COLOURS[colour]} and {COLOURS[second]} {PATTERNS[pattern]}"
    start = f"a photo of {'an' if words[0] in 'aeiou' else 'a'} {words} {CLASSES[name]}"
    place = PLACES[place]
    return f"{start} {SCENES[place][0]}" if place in SCENES else f"{start}, {place.removeprefix('plain ')} background"


def drawn(bundle, prompts):
    """Pictures [N, 3, 128, 128] in -1..1, each from noise of its own seed."""
    pipe = StableDiffusionPipeline.from_pretrained(bundle, torch_dtype=torch.float32)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for i in range(0, len(prompts), 12):
        part = prompts[i : i + 12]
        noise = [torch.Generator().manual_seed(SEED + i + k) for k in range(len(part))]
        size = {"height": SIDE, "width": SIDE}
        found = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, output_type="pt", **size).images
        pictures.append(found * 2 - 1)
    return torch.cat(pictures)


@torch.no_grad()
def main(bundle, work, sheet):
    rows = wanted()
    pictures = drawn(bundle, [prompt(row) for row in rows])
    net = Classifier(ROLES["judge"])
    net.load_state_dict(torch.load(Path(work) / "judge.pt", weights_only=True)["net"])
    seen = torch.stack([logits.argmax(1) for logits in net.eval()(pictures)], 1)
    right = seen == torch.tensor(rows)
    names = dict(zip(["class", "colour", "second", "pattern", "place"], range(5)))
    print(json.dumps({name: round(right[:, names[name]].float().mean().item(), 3) for name in ("class", "place", "colour")}))
    for i, row in enumerate(rows):
        wrong = [name for name in ("class", "colour", "place") if not right[i, names[name]]]
        print(f"{i:2} {prompt(row)}{'  WRONG: ' + ', '.join(wrong) if wrong else ''}")
    grid = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    lines = [torch.cat(list(grid[i : i + COLUMNS]), 1) for i in range(0, len(grid), COLUMNS)]
    Image.fromarray(torch.cat(lines).numpy()).save(sheet)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
