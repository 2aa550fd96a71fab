"""Trains an EfficientNet on what pictures show: the perceptual loss's, or with `judge` the one that judges generated pictures.

    python classifier.py perceptual|judge DATA TEST WORK OUT [--steps N]    # goes on from WORK if it was there before
"""

import argparse
import json
from pathlib import Path

from world import CLASSES, COLOURS, PATTERNS, PLACES, Clock, World, keep, pace, rate, resume, rng

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HEADS = [len(CLASSES), len(COLOURS), len(COLOURS), len(PATTERNS), len(PLACES)]
NAMES = ["class", "colour", "second", "pattern", "place"]
RATE, WARM = 4e-3, 100
ROLES = {
    # Halved pictures; the judge has other seeds, and is asked for nothing but what the UNet learns.
    "perceptual": {"seed": 2, "width": 0.5, "depth": 0.5, "halve": True, "batch": 48},
    "judge": {"seed": 3, "width": 0.5, "depth": 0.5, "halve": True, "batch": 48, "drawn": True},
}
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Classifier(torch.nn.Module):
    def __init__(self, role):
        super().__init__()
        torch.manual_seed(role["seed"])
        self.halve = role["halve"]
        self.body = timm.models.efficientnet._gen_efficientnet("efficientnet_b0", role["width"], role["depth"], num_classes=0)
        self.heads = torch.nn.Linear(self.body.num_features, sum(HEADS))

    def forward(self, pictures):
        """Logits of each head for pictures in -1..1."""
        x = (pictures + 1) / 2
        x = F.avg_pool2d(x, 2) if self.halve else x
        return self.heads(self.body((x - MEAN) / STD)).split(HEADS, 1)


def blurred(x, r):
    """Now and then less sharp, as generated pictures are."""
    if r.random() < 0.5:
        return x
    side = int(r.integers(40, 100))
    return F.interpolate(F.interpolate(x, side, mode="bilinear", antialias=True), x.shape[-1], mode="bilinear")


def score(net, world, shown):
    """Share of right answers of each head."""
    net.eval()
    right = torch.zeros(len(HEADS))
    with torch.no_grad():
        for part in np.array_split(shown, max(1, len(shown) // 50)):
            (x, _), wanted = world.batch(part), world.labels(part)
            right += torch.stack([(logits.argmax(1) == wanted[:, k]).sum() for k, logits in enumerate(net(x))])
    net.train()
    return dict(zip(NAMES, (right / len(shown)).tolist()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=ROLES)
    parser.add_argument("data"), parser.add_argument("test"), parser.add_argument("work"), parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    name, steps, role = args.name, args.steps, ROLES[args.name]
    world, unseen = World(args.data), World(args.test)
    net = Classifier(role).train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.02)
    path = Path(args.work) / f"{name}.pt"
    begin = resume(path, net=net, optimiser=optimiser)
    clock = Clock(steps)
    print(f"{sum(p.numel() for p in net.parameters())} weights; at step {begin}", flush=True)
    shown, tested = (w.drawn() if role.get("drawn") else np.arange(len(w)) for w in (world, unseen))
    for step in range(begin, steps):
        r = rng(role["seed"], step)
        chosen = r.choice(shown, role["batch"], replace=False)
        (x, _), wanted = world.batch(chosen), world.labels(chosen)
        x = blurred(x.flip(3) if r.random() < 0.5 else x, r)
        x = (x + 0.05 * torch.from_numpy(r.standard_normal(x.shape)).float()).clamp(-1, 1)
        loss = sum(F.cross_entropy(logits, wanted[:, k]) for k, logits in enumerate(net(x)))
        optimiser.zero_grad()
        loss.backward()
        pace(optimiser, rate(step, steps, RATE, WARM))
        optimiser.step()
        clock.tell(step + 1, loss=loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            keep(path, step + 1, net=net, optimiser=optimiser)
        if (step + 1) % 500 == 0:
            print({k: round(v, 4) for k, v in score(net, unseen, tested[:300]).items()}, flush=True)
    if name == "perceptual":
        out = Path(args.out) / name
        out.mkdir(parents=True, exist_ok=True)
        without = ("num_batches_tracked",)
        tensors = {k: v.half().contiguous() for k, v in net.body.state_dict().items() if not k.endswith(without) and not k.startswith(("conv_head", "bn2."))}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        config = {"_class_name": "EfficientNet", "width_coefficient": role["width"], "depth_coefficient": role["depth"], "padding": "symmetric", "batch_norm_eps": 1e-5, "halve": True}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print("done:", {k: round(v, 4) for k, v in score(net, unseen, tested).items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
