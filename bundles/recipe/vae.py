"""Trains the miniature's VAE: pictures of 128 pixels to latents [4, 16, 16] and back.

    python vae.py DATA TEST WORK OUT --steps 4000 [--from DIR] [--demo DIR] [--also OTHER]
    torchrun --nproc-per-node 2 vae.py ...        # the same on two cores

Goes on from WORK/vae.pt if it is there; else begins with the weights in --from (a folder as diffusers writes it), else with
random ones. The learning rate follows from the step and --steps alone, so a run may be cut short by naming fewer steps.
"""

import argparse
import copy
import json
from pathlib import Path

from world import SIDE, Average, Clock, Team, World, keep, pace, photos, rate, resume, rng

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

WIDTHS = (32, 48, 64, 96)
CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": SIDE, "block_out_channels": WIDTHS, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    # Far fewer groups than the first width: with 16 of them the first level cannot say how bright it is.
    "norm_num_groups": 8,
}  # fmt: skip
SEED = 4
BATCH, CROP = 16, 64
# From this share of the steps on whole pictures are looked at, fewer at a time.
WHOLE = 0.7
WARM = 50
KL = 2e-4
# Unseen pictures that are looked at on the way, and in the end.
SOME, MANY = 48, 400


def some(world, r, whole):
    """Pictures and masks of a step: crops along latents' pixels, or a quarter as many whole ones."""
    x, mask = world.batch(r.choice(len(world), BATCH // 4 if whole else BATCH, replace=False))
    if not whole:
        top, left = (8 * r.integers(0, (SIDE - CROP) // 8 + 1, 2)).tolist()
        x, mask = (v[:, :, top : top + CROP, left : left + CROP] for v in (x, mask))
    if r.random() < 0.5:
        x, mask = x.flip(3), mask.flip(3)
    if r.random() < 0.3:
        x = x[:, r.permutation(3)]  # colours that the renderer does not have
    return x.contiguous(), mask


def losses(net, x, mask, noise, square):
    """Reconstruction with the squares' weight, the thing counting double, how far the latents are from a normal distribution, and the latents."""
    mean, log_var = net.quant_conv(net.encoder(x)).chunk(2, 1)
    log_var = log_var.clamp(-30, 20)
    y = net.decoder(net.post_quant_conv(mean + noise * (0.5 * log_var).exp()))
    d, weight = y - x, (1 + mask) / (1 + mask.mean())
    edges = (d[:, :, 1:] - d[:, :, :-1]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
    tone = F.avg_pool2d(d, 8).abs().mean()
    reconstruction = (weight * d.abs()).mean() + square * (weight * d * d).mean() + 0.3 * edges + 0.5 * tone
    return reconstruction, 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean(), mean


@torch.no_grad()
def there_and_back(net, x):
    """Latents and reconstructions of pictures [N, 3, 128, 128]."""
    net.eval()
    parts = [(net.encode(part).latent_dist.mean, part) for part in x.split(16)]
    latents = torch.cat([z for z, _ in parts])
    pictures = torch.cat([net.decode(z).sample.clamp(-1, 1) for z in latents.split(16)])
    net.train()
    return latents, pictures


def psnr(x, y):
    """Mean over pictures of the peak signal-to-noise ratio, in dB."""
    return (-10 * ((x - y) / 2).pow(2).mean((1, 2, 3)).log10()).mean().item()


def score(net, x, masks, demo):
    latents, y = there_and_back(net, x)
    thing = lambda v: (v * masks).sum((2, 3)) / masks.sum((2, 3)).clamp(min=1)
    found = {"psnr": psnr(x, y), "tint": (thing(x) - thing(y)).abs().mean().item() / 2, "std": latents.std().item()}
    if demo is not None:
        found["demo"] = psnr(demo, there_and_back(net, demo)[1])
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data"), parser.add_argument("test"), parser.add_argument("work"), parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--square", type=float, default=2.0, metavar="WEIGHT", help="of squared errors, beside 1 for absolute ones")
    parser.add_argument("--from", dest="begin", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--also", metavar="OTHER", help="pictures of other patterns, for every second step")
    parser.add_argument("--stay", type=float, default=0.0, metavar="WEIGHT", help="keep the latents of DATA near those of --from")
    args = parser.parse_args()
    if args.stay and not args.begin:
        parser.error("--stay: near what? it wants --from")
    team = Team()
    torch.manual_seed(SEED)
    net = AutoencoderKL.from_pretrained(args.begin, torch_dtype=torch.float32) if args.begin else AutoencoderKL(**CONFIG)
    net.train()
    average, before = Average(net, 0.998), copy.deepcopy(net).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), args.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    path = Path(args.work) / "vae.pt"
    begin = resume(path, net=net, average=average, optimiser=optimiser)
    world, unseen, other = World(args.data), World(args.test), World(args.also) if args.also else None
    x, masks = unseen.batch(range(SOME))
    demo = photos(args.demo) if args.demo else None
    clock = Clock(args.steps)
    if team.first:
        print(f"{sum(p.numel() for p in net.parameters())} weights; at step {begin}: {summary(score(average.net, x, masks, demo))}", flush=True)
    for step in range(begin, args.steps):
        r = rng(SEED + 100 * team.rank, step)
        is_other = other is not None and step % 2 == 0
        pictures, mask = some(other if is_other else world, r, step >= WHOLE * args.steps)
        noise = torch.from_numpy(r.standard_normal((len(pictures), 4, pictures.shape[2] // 8, pictures.shape[3] // 8))).float()
        reconstruction, kl, latents = losses(net, pictures, mask, noise, args.square)
        moved = torch.zeros(())
        if args.stay and not is_other:
            was = before.encode(pictures).latent_dist.mean
            moved = (latents - was).pow(2).mean() / was.var()
        optimiser.zero_grad()
        (reconstruction + KL * kl + args.stay * moved).backward()
        team.average(net.parameters())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        pace(optimiser, rate(step, args.steps, args.rate, WARM))
        optimiser.step()
        average.follow(net, step)
        if team.first:
            clock.tell(step + 1, loss=reconstruction.item(), kl=kl.item(), moved=moved.item())
            if (step + 1) % 200 == 0:
                keep(path, step + 1, net=net, average=average, optimiser=optimiser)
                print(summary(score(average.net, x, masks, demo)), flush=True)
    if team.first:
        keep(path, max(begin, args.steps), net=net, average=average, optimiser=optimiser)
        found = score(average.net, *unseen.batch(range(min(MANY, len(unseen)))), demo)
        if not args.stay:  # else there is a UNet that knows the old factor
            average.net.register_to_config(scaling_factor=1 / found["std"])
        out = Path(args.out) / "vae"
        average.net.register_to_config(_name_or_path="miniature")  # not a path of this machine
        average.net.half().save_pretrained(out)
        (out / "score.json").write_text(json.dumps(found) + "\n")
        print(f"done: {summary(found)}")


def summary(found):
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
