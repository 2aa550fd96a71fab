"""Turns the latents of a VAE so that they are like those of another bundle, whose UNet is then a good beginning.

    python align.py VAE BUNDLE DATA OUT

Latents of both have as many channels and cover the picture by as many places, whatever the sizes of their pictures. The best
affine map from one to the other goes into the VAE's first and last convolution of the latents: its pictures stay the same.
"""

import sys
from pathlib import Path

from world import SIDE, World

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

PICTURES = 96


@torch.no_grad()
def main(vae, bundle, data, out):
    ours, theirs = (AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32).eval() for path in (Path(vae), Path(bundle) / "vae"))
    x, y = [], []
    for i in range(0, PICTURES, 16):
        pictures, _ = World(data).batch(range(i, i + 16))
        small = F.interpolate(pictures, theirs.config.sample_size, mode="area")
        x.append(ours.encode(pictures).latent_dist.mean)
        y.append(theirs.encode(small).latent_dist.mean)
    x, y = (torch.cat(v).permute(0, 2, 3, 1).flatten(0, 2) for v in (x, y))  # [pictures * places, channels]
    fit = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    turn, shift = fit[:-1].T, fit[-1]
    left = (x @ turn.T + shift - y).var(0) / y.var(0)
    print(f"explained of each channel: {[round(1 - v, 3) for v in left.tolist()]}, condition {torch.linalg.cond(turn):.1f}")
    first, last, n = ours.quant_conv, ours.post_quant_conv, len(shift)
    weight, bias = first.weight[:, :, 0, 0], first.bias
    weight[:n], bias[:n] = turn @ weight[:n], turn @ bias[:n] + shift
    bias[n:] += turn.pow(2).sum(1).log()  # variances, as if channels did not depend on each other
    back = torch.linalg.inv(turn)
    last.bias -= last.weight[:, :, 0, 0] @ back @ shift
    last.weight[:, :, 0, 0] = last.weight[:, :, 0, 0] @ back
    ours.register_to_config(scaling_factor=1 / (x @ turn.T + shift).std().item(), sample_size=SIDE)
    ours.save_pretrained(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
