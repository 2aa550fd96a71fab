"""Makes the golden of bf16: how far PyTorch's bf16 autocast takes each weight's gradient from its f32 one.

    python tests/golden/precision.py

The packages and the rules are make.py's. The models are those of `tests/bundle`: text encoder, UNet, and autoencoder, the
latter there and back; each gets the inputs of `drawn` and the loss mean((output - target)^2), in f32. One pass computes
in f32, one under `torch.autocast("cpu", torch.bfloat16)`, on one thread: eight times, with the same inputs but for changes
that bf16 may round away (`nudged`; the text encoder, whose inputs are whole numbers, gets others). A single time would
not do: what roundings make of a gradient that hangs on them differs tenfold from one to the next.

`precision.safetensors` has for each model `cosine.<model>` and `norm.<model>`, f32 [weights, times]: the cosine between
both gradients of a weight, and the norm of the bf16 one as a share of the f32 one's. The metadata `weights` name the rows
of each model; a weight whose gradient is zero but for rounding (its norm is under 1e-5 of the largest one) has none.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

import make
from make import write

BUNDLE = make.HERE.parent / "bundle"
TIMES = range(8)


def drawn(seed, which, *shape):
    """Uniform numbers of mean 0 and variance 1: a hash of their place, which any program computes alike."""
    n = int(np.prod(shape))
    x = np.arange(n, dtype=np.uint64) + np.uint64((1000 * seed + which) * 1_000_003)
    x = (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = x ^ (x >> np.uint32(16))
    values = (x.astype(np.float64) / 2.0**31 - 1.0) * 3.0**0.5
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def nudged(time, which, *shape):
    """The inputs of seed 0, each changed by up to half of what the last bit of bf16 counts for; at time 0 not at all."""
    values = drawn(0, which, *shape)
    return values * (1 + drawn(time, 10 + which, *shape) / 3.0**0.5 * 2.0**-9) if time else values


def text_encoder():
    model = CLIPTextModel.from_pretrained(BUNDLE, subfolder="text_encoder")

    def loss(time):
        ids = ((drawn(time, 0, 2, 77) + 2) * 200).long()
        return F.mse_loss(model(input_ids=ids).last_hidden_state.float(), drawn(time, 1, 2, 77, 128))

    return {f"text_model.{name}".replace("text_model.text_model.", "text_model."): p for name, p in model.named_parameters()}, loss


def unet():
    model = UNet2DConditionModel.from_pretrained(BUNDLE, subfolder="unet")

    def loss(time):
        latents, text, noise = nudged(time, 0, 2, 4, 16, 16), nudged(time, 1, 2, 77, 128), nudged(time, 2, 2, 4, 16, 16)
        answer = model(latents, torch.tensor([250, 700]), encoder_hidden_states=text).sample
        return F.mse_loss(answer.float(), noise)

    return dict(model.named_parameters()), loss


def vae():
    model = AutoencoderKL.from_pretrained(BUNDLE, subfolder="vae")

    def loss(time):
        picture, latents = nudged(time, 0, 1, 3, 64, 64) / 2, nudged(time, 1, 1, 4, 16, 16)
        mean, decoded = model.encode(picture).latent_dist.mean, model.decode(latents).sample
        return F.mse_loss(mean.float(), latents) + F.mse_loss(decoded.float(), picture)

    return dict(model.named_parameters()), loss


def gradients(params, loss, time, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss(time)
    grads = torch.autograd.grad(value.float(), list(params.values()), allow_unused=True)
    return {name: grad.double() for name, grad in zip(params, grads) if grad is not None}


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    tensors, weights = {}, {}
    for name, load in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        params, loss = load()
        pairs = [(gradients(params, loss, time, False), gradients(params, loss, time, True)) for time in TIMES]
        largest = max(grad.norm() for grad in pairs[0][0].values())
        rows = sorted(key for key, grad in pairs[0][0].items() if grad.norm() > 1e-5 * largest)
        of = lambda measure: torch.tensor([[measure(full[key], half[key]) for full, half in pairs] for key in rows])
        tensors[f"cosine.{name}"] = of(lambda a, b: float(a.flatten() @ b.flatten() / (a.norm() * b.norm())))
        tensors[f"norm.{name}"] = of(lambda a, b: float(b.norm() / a.norm()))
        weights[name] = rows
        off = 1 - tensors[f"cosine.{name}"]
        print(f"{name}: {len(rows)} weights, 1 - cosine {off.median():.1e} at the median, {off.max():.1e} at most")
    write("precision", tensors, weights=weights)


if __name__ == "__main__":
    main()
