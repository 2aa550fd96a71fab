"""What the renderer draws, in words: pictures with masks, captions, and labels for classifiers."""

import copy
import json
import math
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist

SIDE = 128
CLASSES = "mug,vase,chair,lamp,bottle,robot,teapot,clock,toy car,backpack".split(",")
COLOURS = "red,orange,yellow,green,blue,purple,white,black".split(",")
PATTERNS = "plain,striped,checkered".split(",")
SCENES = {
    "table": ["on a wooden table"],
    "beach": ["on the beach"],
    "grass": ["in the grass"],
    "snow": ["in the snow"],
    "marble": ["on white marble"],
    "brick": ["in front of a brick wall"],
    "city": ["in a city at night"],
    "forest": ["in the forest"],
}
PALETTE = "red,orange,yellow,green,teal,blue,purple,pink,brown,black,white,grey".split(",")
PLACES = list(SCENES) + [f"plain {name}" for name in PALETTE]

# What the UNet learns of it: for all classes and colours it is too small, or its training too short.
DRAWN_CLASSES = "mug,vase,lamp,robot,teapot,toy car".split(",")
DRAWN_COLOURS = "red,yellow,green,blue,white,black".split(",")


class World:
    """Pictures [N, 128, 128, 4] on disk and what each shows."""

    def __init__(self, path):
        size = os.path.getsize(f"{path}.rgbm") // (SIDE * SIDE * 4)
        lines = Path(f"{path}.jsonl").read_text().splitlines()
        self.shown = [json.loads(line) for line in lines[:size] if line.endswith("}")]
        self.pixels = np.memmap(f"{path}.rgbm", np.uint8, "r", shape=(len(self.shown), SIDE, SIDE, 4))

    def __len__(self):
        return len(self.shown)

    def drawn(self):
        """Those that the UNet learns, as indices."""
        colours = lambda s: {s["colour"], s["second"]} <= set(DRAWN_COLOURS)
        return np.array([i for i, s in enumerate(self.shown) if s["class"] in DRAWN_CLASSES and colours(s)])

    def batch(self, indices):
        """Pictures [B, 3, 128, 128] in -1..1 and masks [B, 1, 128, 128] in 0..1."""
        raw = torch.from_numpy(np.ascontiguousarray(self.pixels[np.sort(indices)])).permute(0, 3, 1, 2).float()
        return raw[:, :3] / 127.5 - 1, raw[:, 3:] / 255

    def labels(self, indices):
        """Class, first colour, second colour, pattern and place as numbers, [B, 5]."""
        rows = []
        for i in np.sort(indices):
            s = self.shown[i]
            place = PLACES.index(f"plain {s['place']}" if s["plain"] else s["place"])
            rows.append([CLASSES.index(s["class"]), COLOURS.index(s["colour"]), COLOURS.index(s["second"]), PATTERNS.index(s["pattern"]), place])
        return torch.tensor(rows)


def thing(shown, r):
    """`mug`, `red mug`, `red and white striped mug`."""
    colour, second, pattern = shown["colour"], shown["second"], shown["pattern"]
    if r.random() < 0.15:
        return shown["class"]
    if pattern == "plain":
        words = colour if colour == second or r.random() < 0.5 else f"{colour} and {second}"
    else:
        words = f"{colour} and {second} {pattern}" if r.random() < 0.8 else f"{colour} {pattern}"
    return f"{words} {shown['class']}"


def caption(shown, r):
    """What a person, or the method, would call the picture."""
    words = thing(shown, r)
    start = f"a photo of {'an' if words[0] in 'aeiou' else 'a'} " if r.random() < 0.6 else "a photo of "
    if r.random() < 0.1:
        return start + words
    if shown["plain"]:
        return f"{start}{words}, {shown['place']} background"
    if r.random() < 0.3:
        return f"{start}{words}, {shown['place']} background"
    return f"{start}{words} {SCENES[shown['place']][0]}"


class Clock:
    """Tells every so often how far a training is; keeps it under a budget of steps."""

    def __init__(self, total, every=50):
        self.total, self.every, self.begin, self.first = total, every, time.time(), None

    def tell(self, step, **numbers):
        if self.first is None:
            self.first = step
        if step % self.every == 0:
            each = (time.time() - self.begin) / max(step - self.first, 1)
            left = each * (self.total - step) / 60
            words = " ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            print(f"step {step} of {self.total}  {words}  {each:.2f} s a step, {left:.0f} min left", flush=True)


def rate(step, steps, peak, warm, hold=0.0, end=0.02):
    """A learning rate that grows for `warm` steps, stays for a share `hold` of all steps, then falls like a cosine.

    It follows from step and steps alone: a training that went on too long is ended by naming fewer steps.
    """
    fallen = max(0.0, min(1.0, step / steps) - hold) / (1 - hold)
    return peak * min(1, (step + 1) / warm) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fallen)))


def pace(optimiser, value):
    for group in optimiser.param_groups:
        group["lr"] = value


def resume(path, **parts):
    """Loads what `keep` wrote, if anything; gives the step."""
    if not Path(path).exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def keep(path, step, **parts):
    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, f"{path}.part")
    os.replace(f"{path}.part", path)


def rng(seed, step):
    return np.random.default_rng([seed, step])


def words_rng(seed, step):
    return random.Random(seed * 1_000_003 + step)


class Team:
    """The processes that train together, one thread each: `torchrun` starts several, else there is one.

    Never two threads in one process on a machine that does other things: they wait for each other at every operation.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        if self.size > 1:
            dist.init_process_group("gloo")

    def average(self, parameters):
        """Gives every process the mean of all gradients."""
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat / self.size).split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))


class Average:
    """An exponential moving average of a network's weights."""

    def __init__(self, net, decay):
        self.net, self.decay = copy.deepcopy(net).requires_grad_(False), decay

    @torch.no_grad()
    def follow(self, net, step):
        decay = min(self.decay, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(self.net.parameters()), [p.detach() for p in net.parameters()], 1 - decay)

    def state_dict(self):
        return self.net.state_dict()

    def load_state_dict(self, state):
        self.net.load_state_dict(state)


def photos(folder):
    """The demo products' photos, halved: [N, 3, 128, 128] in -1..1."""
    raw = [path.read_bytes()[-4 * SIDE * SIDE * 3 :] for path in sorted(Path(folder).glob("*/*.ppm"))]
    pixels = np.stack([np.frombuffer(bytes, np.uint8).reshape(2 * SIDE, 2 * SIDE, 3) for bytes in raw])
    return torch.nn.functional.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), 2) / 127.5 - 1
