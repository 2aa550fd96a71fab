"""Trains the miniature's segmenter: TRACER in CarveKit's form, small.

    python segmenter.py DATA TEST WORK OUT [--steps N] [--empty PLACES]   # goes on from WORK/segmenter.pt if it is there

A sixth of the pictures comes from PLACES, in which there is nothing to find.
"""

import argparse
import json
from pathlib import Path

from world import Clock, World, keep, pace, rate, resume, rng

import torch
import torch.nn.functional as F
from carvekit.ml.arch.tracerb7.effi_utils import create_block_args, round_repeats
from carvekit.ml.arch.tracerb7.efficientnet import EfficientEncoderB7
from carvekit.ml.arch.tracerb7.tracer import TracerDecoder
from safetensors.torch import save_file

CONFIG = {
    "_class_name": "Tracer", "width_coefficient": 0.5, "depth_coefficient": 0.5,
    "image_size": 128, "input_size": 128, "rfb_channels": [16, 24, 32],
}  # fmt: skip
RATE, WARM = 3e-3, 50
# Halved pictures at a time, and whole ones.
BATCH, WHOLE_BATCH = 24, 12
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Encoder(EfficientEncoderB7):
    def __init__(self, config):
        width, depth = config["width_coefficient"], config["depth_coefficient"]
        super(EfficientEncoderB7, self).__init__(
            *create_block_args(width_coefficient=width, depth_coefficient=depth, dropout_rate=0.5, image_size=config["image_size"])
        )
        ends, n = [], 0
        for block in self._blocks_args:
            n += round_repeats(block.num_repeat, self._global_params)
            ends.append(n - 1)
        self.block_idx = [ends[i] for i in (1, 2, 4, 6)]
        self.channels = [self._blocks[i]._project_conv.out_channels for i in self.block_idx]


def build():
    torch.manual_seed(1)
    encoder = Encoder(CONFIG)
    return TracerDecoder(encoder, encoder.channels, CONFIG["rfb_channels"])


def varied(x, r):
    """Colours that the renderer does not have, so that new products are found as well."""
    b = len(x)
    if r.random() < 0.5:
        x = x[:, r.permutation(3)]
    gain = torch.from_numpy(r.uniform(0.7, 1.3, (b, 3, 1, 1))).float()
    shift = torch.from_numpy(r.uniform(-0.25, 0.25, (b, 1, 1, 1))).float()
    return (x * gain + shift).clamp(-1, 1)


def score(net, world, n=200):
    """Mean intersection over union."""
    net.eval()
    found = []
    with torch.no_grad():
        for i in range(0, n, 25):
            x, mask = world.batch(range(i, i + 25))
            m, want = net(((x + 1) / 2 - MEAN) / STD) > 0.5, mask > 0.5
            found.append((m & want).sum((1, 2, 3)) / (m | want).sum((1, 2, 3)).clamp(min=1))
    net.train()
    return torch.cat(found).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data"), parser.add_argument("test"), parser.add_argument("work"), parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=2000)
    # It is four times as fast on halved pictures. What it learns there is of use only after some hundred whole ones.
    parser.add_argument("--empty", metavar="PLACES", help="pictures of places alone")
    parser.add_argument("--halved", type=int, default=0, metavar="N", help="look at halved pictures before this step")
    args = parser.parse_args()
    world, unseen, empty = World(args.data), World(args.test), World(args.empty) if args.empty else None
    net = build().train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-3)
    path = Path(args.work) / "segmenter.pt"
    begin = resume(path, net=net, optimiser=optimiser)
    clock = Clock(args.steps)
    print(f"{sum(p.numel() for p in net.parameters())} weights; at step {begin}", flush=True)
    for step in range(begin, args.steps):
        r, is_halved = rng(1, step), step < args.halved
        x, mask = world.batch(r.choice(len(world), BATCH if is_halved else WHOLE_BATCH, replace=False))
        if empty:
            n = len(x) // 6
            x[:n], mask[:n] = empty.batch(r.choice(len(empty), n, replace=False))
        if is_halved:
            x, mask = F.avg_pool2d(x, 2), F.avg_pool2d(mask, 2)
        if r.random() < 0.5:
            x, mask = x.flip(3), mask.flip(3)
        x = ((varied(x, r) + 1) / 2 - MEAN) / STD
        p = net(x.contiguous(memory_format=torch.channels_last)).clamp(1e-5, 1 - 1e-5)
        overlap = (p * mask).sum((1, 2, 3)) / (p + mask - p * mask).sum((1, 2, 3)).clamp(min=1)
        overlap = overlap[mask.sum((1, 2, 3)) > 0]
        loss = F.binary_cross_entropy(p, mask) + 0.5 * (1 - overlap).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        pace(optimiser, rate(step, args.steps, RATE, WARM))
        optimiser.step()
        clock.tell(step + 1, loss=loss.item(), iou=overlap.mean().item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            keep(path, step + 1, net=net, optimiser=optimiser)
        if (step + 1) % 500 == 0:
            print(f"unseen pictures: IoU {score(net, unseen):.4f}", flush=True)
    out = Path(args.out) / "segmenter"
    out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"done: IoU {score(net, unseen, 1000):.4f} on 1000 unseen pictures")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
