"""Makes the goldens of the method: the discriminator, and whole training steps of each recipe, in PyTorch.

    pip install --no-deps timm==1.0.31 torchvision==0.29.2 carvekit==4.1.2   # beside what make.py names
    python tests/golden/method.py            # all of them
    python tests/golden/method.py discriminator     # only this
    python tests/golden/method.py --full DIR # TRACER-B7 and EfficientNet-B1 at full size, too large to be committed

What `--full` writes has the names of the small goldens: `HYPNOS_GOLDENS=DIR cargo nextest run -E 'test(/^method::the_(perc|segm)/)'` holds
the same tests to it.

The file format, the packages and the rules are make.py's; models that stand there begin with the same weights.
"""

import copy
import functools
import math
import sys
import types
from pathlib import Path

import diffusers
import PIL.Image
import timm
import torch
import torch.nn.functional as F
import torchvision
from carvekit.ml.arch.tracerb7.effi_utils import create_block_args, round_repeats
from carvekit.ml.arch.tracerb7.efficientnet import EfficientEncoderB7
from carvekit.ml.arch.tracerb7.tracer import TracerDecoder
from carvekit.ml.wrap.tracer_b7 import TracerUniversalB7
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import make
from make import Cases, fill, golden, normal, write

make.PINS |= {"timm": "1.0.31", "torchvision": "0.29.2", "carvekit": "4.1.2"}
make.check_pins()
OURS = dict(make.GOLDENS)


class Discriminator(torch.nn.Module):
    """Three convolutions, then a ViT of torch's own encoder layers over their pixels and a class token."""

    def __init__(self, channels, side, width, heads, layers, groups):
        super().__init__()
        sizes = [(channels, width // 4, 1), (width // 4, width // 2, 2), (width // 2, width, 2)]
        self.stem = torch.nn.Sequential(
            *(
                torch.nn.Sequential(torch.nn.Conv2d(a, b, 3, stride, 1), torch.nn.GroupNorm(groups, b), torch.nn.SiLU())
                for a, b, stride in sizes
            )
        )
        self.class_embedding = torch.nn.Parameter(torch.zeros(1, width))
        self.position_embedding = torch.nn.Parameter(torch.zeros(1 + (side // 4) ** 2, width))
        layer = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, heads, 4 * width, **layer) for _ in range(layers)
        )
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1)

    def forward(self, z):
        x = self.stem(z).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(z), 1, -1), x], 1) + self.position_embedding
        for layer in self.layers[:-1]:
            x = layer(x)
        last = self.layers[-1]
        normed = last.norm1(x)
        _, self.attention = last.self_attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
        return torch.sigmoid(self.head(self.norm(last(x))[:, 0]))[:, 0]

    def named(self):
        """Name in our files -> (parameter, the rows of it): torch keeps the three projections in one tensor."""
        names = {}
        for name, p in self.named_parameters():
            for i, kind in enumerate(("conv", "norm")):
                for level in range(3):
                    name = name.replace(f"stem.{level}.{i}.", f"stem.{level}.{kind}.")
            if "in_proj" in name:
                d = p.shape[0] // 3
                for i, letter in enumerate("qkv"):
                    names[name.replace("in_proj_", f"{letter}_proj.")] = (p, slice(i * d, (i + 1) * d))
            else:
                whole = f"{name}.weight" if name.endswith("embedding") else name
                names[whole] = (p, slice(None))
        return names


def tiny_discriminator(seed, side):
    config = {"channels": 4, "side": side, "width": 32, "heads": 2, "layers": 3, "groups": 4}
    return fill(Discriminator(**config), seed), config


def gradients(loss, module, inputs, **options):
    """Of `loss` with respect to `inputs` and every weight of a discriminator, by our names."""
    named = module.named()
    tensors = list(inputs.values()) + list(dict.fromkeys(p for p, _ in named.values()))
    found = dict(zip(map(id, tensors), torch.autograd.grad(loss, tensors, **options)))
    weights = {name: found[id(p)][rows] for name, (p, rows) in named.items()}
    return {name: found[id(value)] for name, value in inputs.items()}, weights


@golden
def discriminator():
    """The latent discriminator on 5 latents of 16x16: scores, the class token's attention in the last layer, and both losses.

    Loss d is least squares, 1 for the first two (real), 0 for the others; loss g is eq. 7 on the last one. Gradients: of d
    for every weight, of g for that latent.
    """
    module, config = tiny_discriminator(100, 16)
    cases = Cases("", torch.nn.Module())
    cases.tensors = {f"weight.{name}": p[rows] for name, (p, rows) in module.named().items()}
    latents = normal(101, 5, 4, 16, 16)

    def run(dtype):
        m, z = copy.deepcopy(module).to(dtype), latents.to(dtype).requires_grad_()
        scores = m(z)
        attention = m.attention[:, :, 0, 1:].unflatten(-1, (4, 4))
        d = ((scores[:2] - 1) ** 2).mean() + (scores[2:] ** 2).mean()
        _, weights = gradients(d, m, {}, retain_graph=True)
        g = ((1 - scores[4:]) ** 2).mean()
        (grad,) = torch.autograd.grad(g, z)
        return {"scores": scores, "attention": attention, "d": d, "g": g}, weights | {"latents": grad}

    cases.add("all", {"latents": latents}, run)
    write("discriminator", cases.tensors, config=config, **cases.metadata)


# ------------------------------------------------------------------------------------------------- perceptual loss


def statistics(module, seed):
    """Gives every batch norm running statistics that show when they are not used."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.copy_(0.3 * torch.randn(part.running_mean.shape, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return module


def efficientnet(seed, width, depth):
    """timm's EfficientNet with these coefficients, random weights and statistics."""
    net = timm.models.efficientnet._gen_efficientnet("efficientnet_b0", width, depth, num_classes=0)
    for name, parameter in fill(net, seed).named_parameters():
        if "bn" in name and name.endswith("weight"):
            parameter.data.copy_(1 + 0.2 * normal(seed + len(name), *parameter.shape).clamp(-2, 2))
    return statistics(net, seed + 1)


def features(net, pictures, halve=True):
    """At strides 2, 4, 8, 16 and 32 of pictures in -1..1."""
    mean, std = ([torch.tensor(v, dtype=pictures.dtype).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])
    x = (pictures + 1) / 2
    x = ((F.avg_pool2d(x, 2) if halve else x) - mean) / std
    x, found = net.bn1(net.conv_stem(x)), []
    for i, stage in enumerate(net.blocks):
        x = stage(x)
        if i in (0, 1, 2, 4, 6):
            found.append(x)
    return found


STRIDES = [1.0, 0.5, 0.25, 0.125, 0.0625]
# EfficientNet's width and depth, and the pictures' height and width.
CLASSIFIER = {"width": 0.25, "depth": 0.5, "height": 96, "side": 64}
CLASSIFIER_B1 = {"width": 1.0, "depth": 1.1, "height": 512, "side": 512}


def perceptual_loss(a, b):
    return sum(weight * F.mse_loss(x, y) for weight, x, y in zip(STRIDES, a, b))


def state(module, prefix="", without=("num_batches_tracked", "conv_head", "bn2.", "classifier")):
    """All tensors of a network's body, statistics too."""
    top = [name for name in module.state_dict() if not any(name.startswith(w) or name.endswith(w) for w in without)]
    return {f"weight.{prefix}{name}": module.state_dict()[name] for name in top}


@golden
def perceptual(width, depth, height, side):
    """EfficientNet's features of a picture, halved, and eq. 5 against another: value, and gradient to the first."""
    net = efficientnet(110, width, depth)
    cases = Cases("", torch.nn.Module())
    cases.tensors = state(net)
    x, y = (normal(seed, 1, 3, height, side).clamp(-1, 1) for seed in (112, 113))

    def run(dtype):
        n, a = copy.deepcopy(net).to(dtype), x.to(dtype).requires_grad_()
        found = features(n, a)
        loss = perceptual_loss(found, features(n, y.to(dtype)))
        (grad,) = torch.autograd.grad(loss, a)
        return {f"feature.{i}": f for i, f in enumerate(found)} | {"loss": loss}, {"x": grad}

    cases.add("all", {"x": x, "y": y}, run)
    config = {"width_coefficient": width, "depth_coefficient": depth, "batch_norm_eps": 1e-5}
    write("perceptual", cases.tensors, config=config, strides=STRIDES, **cases.metadata)


# ------------------------------------------------------------------------------------------------------- whole steps


def inverse_gaussian(predicted, noise, sigma, exponent_max):
    exponent = (predicted - noise) ** 2 / (2 * sigma**2)
    return sigma * math.sqrt(2 * math.pi) * (exponent.clamp(max=exponent_max).exp() - 1).mean()


SETTINGS = {
    "sigma": 1.382, "exponent_max": 3.0, "strides": STRIDES,
    "weights": {"reconstruction": 1.0, "prior": 1.0, "perceptual": 0.2, "discriminator": 0.5},
}  # fmt: skip


def hypnos_models():
    """Text encoder, UNet and autoencoder of `step`, the classifier of `perceptual`, and the discriminator with its config."""
    text, unet, vae = make.tiny_clip(80, hidden_act="quick_gelu"), make.tiny_unet("unet_list", 81), make.tiny_vae("vae", 70)
    disc, config = tiny_discriminator(140, 8)
    return (text, unet, vae, efficientnet(110, 0.25, 0.5), disc), config


def hypnos_inputs(seed, t):
    ids = torch.randint(0, 62, (2, 77), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[0, 9:], ids[1, 6:], ids[0, 4] = 62, 63, 63, 17
    inputs = {"ids": ids, "t": torch.tensor(t), "latents": normal(seed + 1, 2, 4, 8, 8)}
    return inputs | {"noise": normal(seed + 2, 2, 4, 8, 8), "reference": normal(seed + 3, 1, 3, 32, 32).clamp(-1, 1)}


def hypnos_losses(models, inputs, dtype, prediction):
    """All four losses of a step, their sum and its gradients; what was computed on the way."""
    t, u, v, n, d = (copy.deepcopy(model).to(dtype) for model in models)
    trained = {f"unet.{name}": p for name, p in u.named_parameters()}
    trained |= {f"text.text_model.{name}": p for name, p in t.named_parameters()}
    x = {name: value if name in ("ids", "t") else value.to(dtype) for name, value in inputs.items()}
    kept = diffusers.DDPMScheduler(**make.SCALED_LINEAR).alphas_cumprod.to(dtype)[x["t"]].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * x["latents"] + (1 - kept).sqrt() * x["noise"]
    predicted = u(noisy, x["t"], encoder_hidden_states=t(input_ids=x["ids"]).last_hidden_state).sample
    target, z0 = make.target_and_guess(prediction, kept, x["latents"], x["noise"], noisy, predicted, x["t"])
    decoded = v.decode(z0 / v.config.scaling_factor).sample
    found = {
        "reconstruction": inverse_gaussian(predicted[:1], target[:1], SETTINGS["sigma"], SETTINGS["exponent_max"]),
        "prior": F.mse_loss(predicted[1:], target[1:]),
        "perceptual": perceptual_loss(features(n, decoded), features(n, x["reference"])),
        "adversarial": ((1 - d(z0)) ** 2).mean(),
    }
    w = SETTINGS["weights"]
    total = sum(found[name] * w.get(name, w["discriminator"]) for name in found)
    grads = torch.autograd.grad(total, list(trained.values()))
    norm = torch.sqrt(sum((g**2).sum() for g in grads))
    exponents = (predicted[:1] - target[:1]) ** 2 / (2 * SETTINGS["sigma"] ** 2)
    found["cut"] = (exponents > SETTINGS["exponent_max"]).to(dtype).mean()
    out = {f"loss.{name}": value for name, value in found.items()}
    out |= {"total": total, "norm": norm, "z0": z0, "decoded": decoded, "predicted": predicted}
    return out, dict(zip(trained, grads))


def some_are_cut(cases):
    found = float(cases.tensors["output.all.loss.cut"])
    assert 0 < found < 0.5, found


@golden
def hypnos_step():
    """One whole step of HYPNOS, all four losses, and one of Textual Inversion: every loss, and every trained weight's gradient.

    Text encoder, UNet and autoencoder are those of `step`, the classifier is `perceptual`'s; the discriminator is here.
    Row 0 is the product, row 1 its class. The exponents are cut at a low number, so that some of them are. Case
    `embedding` is MSE on row 0 alone, and learns the embedding of token 17 only.
    """
    models, config = hypnos_models()
    cases, disc = Cases("", torch.nn.Module()), models[-1]
    cases.tensors = {f"weight.discriminator.{name}": p[rows] for name, (p, rows) in disc.named().items()}
    inputs = hypnos_inputs(142, [120, 640])

    def embedding(dtype):
        t, u = (copy.deepcopy(model).to(dtype) for model in models[:2])
        x = {name: value if name in ("ids", "t") else value.to(dtype) for name, value in inputs.items()}
        kept = diffusers.DDPMScheduler(**make.SCALED_LINEAR).alphas_cumprod.to(dtype)[x["t"]].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * x["latents"] + (1 - kept).sqrt() * x["noise"]
        table = t.get_input_embeddings().weight
        predicted = u(noisy[:1], x["t"][:1], encoder_hidden_states=t(input_ids=x["ids"][:1]).last_hidden_state).sample
        loss = F.mse_loss(predicted, x["noise"][:1])
        (grad,) = torch.autograd.grad(loss, table)
        return {"total": loss, "row": table[17:18].detach()}, {"row": grad[17:18]}

    cases.add("all", inputs, lambda dtype: hypnos_losses(models, inputs, dtype, "epsilon"))
    cases.add("embedding", {}, embedding)
    some_are_cut(cases)
    write("hypnos_step", cases.tensors, discriminator=config, settings=SETTINGS, **cases.metadata)


@golden
def hypnos_step_v():
    """The same step for a UNet that predicts v, with the models of `hypnos_step`: the target of reconstruction and prior is v, and
    the latents that the other two losses look at are those that v implies."""
    models, _ = hypnos_models()
    cases, inputs = Cases("", torch.nn.Module()), hypnos_inputs(162, [410, 77])
    cases.add("all", inputs, lambda dtype: hypnos_losses(models, inputs, dtype, "v_prediction"))
    some_are_cut(cases)
    write("hypnos_step_v", cases.tensors, settings=SETTINGS, **cases.metadata)


# ----------------------------------------------------------------------------------------------------------- TRACER


def tracer_net(seed, width, depth, image_size, rfb):
    """CarveKit's segmenter with an encoder of these coefficients, random weights and statistics."""

    class Encoder(EfficientEncoderB7):
        def __init__(self):
            args = create_block_args(width_coefficient=width, depth_coefficient=depth, dropout_rate=0.5, image_size=image_size)
            super(EfficientEncoderB7, self).__init__(*args)
            ends, n = [], 0
            for block in self._blocks_args:
                n += round_repeats(block.num_repeat, self._global_params)
                ends.append(n - 1)
            self.block_idx = [ends[i] for i in (1, 2, 4, 6)]
            self.channels = [self._blocks[i]._project_conv.out_channels for i in self.block_idx]

    encoder = Encoder()
    net = TracerDecoder(encoder, encoder.channels, list(rfb))
    fill(net, seed)
    for i, part in enumerate(net.modules()):
        if isinstance(part, torch.nn.BatchNorm2d):
            part.weight.data.copy_(1 + 0.2 * normal(seed + i, *part.weight.shape).clamp(-2, 2))
    # A random decoder says 0 nearly everywhere: its last layers are brought to where both answers occur.
    net.ObjectAttention1.conv1.bn.bias.data -= 0.5
    return statistics(net, seed + 1).eval()


SEGMENTER = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 60, "input_size": 64, "rfb_channels": [8, 8, 16]}
SEGMENTER_B7 = {"width_coefficient": 2.0, "depth_coefficient": 3.1, "image_size": 600, "input_size": 640, "rfb_channels": [32, 64, 128]}


@golden
def tracer(**config):
    """The segmenter on a photo that is no square, from its bytes: what comes to the network, its five features, its map."""
    net = tracer_net(120, config["width_coefficient"], config["depth_coefficient"], config["image_size"], config["rfb_channels"])
    cases = Cases("", torch.nn.Module())
    cases.tensors = state(net, without=("num_batches_tracked",))
    photo = torch.randint(0, 256, (75, 101, 3), generator=torch.Generator().manual_seed(122), dtype=torch.uint8)
    photo[20:60, 30:80] //= 3
    prepare = TracerUniversalB7.data_preprocessing
    size = torchvision.transforms.Resize((config["input_size"],) * 2)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    steps = [torchvision.transforms.ToTensor(), size, torchvision.transforms.Normalize(mean, std)]
    holder = types.SimpleNamespace(transform=torchvision.transforms.Compose(steps))
    prepared = prepare(holder, PIL.Image.fromarray(photo.numpy()))

    def run(dtype):
        n, x = copy.deepcopy(net).to(dtype), prepared.to(dtype)
        with torch.no_grad():
            found = n.encoder(x)
            return {f"feature.{i + 1}": f for i, f in enumerate(found)} | {"prepared": x, "map": n(x)}, {"none": torch.ones(1)}

    cases.add("all", {"photo": photo}, run)
    spread = cases.tensors["output.all.map"]
    assert spread.std() > 0.05, spread.std()
    del cases.tensors["grad.all.none"]
    write("tracer", cases.tensors, config=config, **cases.metadata)


for name, small in (("perceptual", CLASSIFIER), ("tracer", SEGMENTER)):
    make.GOLDENS[name] = functools.partial(make.GOLDENS[name], **small)
FULL = {"perceptual": CLASSIFIER_B1, "tracer": SEGMENTER_B7}

if __name__ == "__main__":
    mine = [name for name in make.GOLDENS if name not in OURS]
    match sys.argv[1:]:
        case ["--full", place]:
            make.HERE = Path(place)
            make.HERE.mkdir(parents=True, exist_ok=True)
            make.GOLDENS |= {name: functools.partial(make.GOLDENS[name], **large) for name, large in FULL.items()}
            make.main(list(FULL))
        case names:
            make.main(names or mine)
