"""Makes the golden of the metrics: what the references' own packages make of a handful of pictures, from their pixels on.

    pip install --no-deps timm==1.0.31 torchvision==0.29.2 lpips==0.1.4 pytorch-fid==0.3.0 scikit-image==0.26.0 \
        torchmetrics==1.9.0 lightning-utilities==0.15.3 lazy-loader==0.6 scipy==1.17.1 imageio==2.38.1 networkx==3.6.1
    python tests/golden/metrics.py               # metrics.safetensors: the networks in miniature
    python tests/golden/metrics.py --full DIR    # DIR/metrics.safetensors: at full size, with the real heads of lpips
    HYPNOS_GOLDENS=DIR cargo nextest run -E 'test(/^metrics::/)'

The file format and the rules are make.py's, whose packages are wanted too. No weights are written: `drawn` makes each
from its name alone, here and in `tests/it/metrics.rs`. The one exception are the real heads, which are lpips' own and go
into DIR only, never into the repository.

The references: timm's ViT with DINO's names and eps behind torchvision's transforms, as DINO's own code has them;
transformers' CLIPModel behind CLIPImageProcessor; pytorch-fid's Inception and its Fréchet distance; lpips; scikit-image,
and torchmetrics in agreement with it inside the edges. Narrow networks are the packages' own, each layer with its channels divided.
"""

import functools
import hashlib
import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers  # noqa: F401  before timm, whose import of torchvision would otherwise be the first
import lpips
import numpy as np
import PIL.Image
import pytorch_fid.fid_score
import pytorch_fid.inception
import skimage.metrics
import timm
import torch
import torch.nn.functional as F
import torchmetrics.functional.image
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torchvision import transforms
from torchvision.models.inception import BasicConv2d
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import make
from make import BUNDLE, golden, write

make.PINS |= {
    "timm": "1.0.31",
    "torchvision": "0.29.2",
    "lpips": "0.1.4",
    "pytorch-fid": "0.3.0",
    "scikit-image": "0.26.0",
    "torchmetrics": "1.9.0",
    "scipy": "1.17.1",
}
make.check_pins()

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# What each size of the golden is made of: the pictures' sizes and the networks'.
MINIATURE = {
    "sizes": [(83, 61), (64, 97), (20, 33)],
    "dino": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8, "image_size": 32, "resize": 37},
    "clip": {
        "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "projection_dim": 24,
    },
    "inception": {"image_size": 91, "channel_divisor": 16},
    "lpips_alex": {"net": "alex", "channel_divisor": 8},
    "lpips_vgg": {"net": "vgg", "channel_divisor": 8},
}
FULL = {
    "sizes": [(640, 427), (333, 512), (120, 161)],
    "dino": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16, "image_size": 224, "resize": 256},
    "clip": {
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        "projection_dim": 512,
    },
    "inception": {"image_size": 299, "channel_divisor": 1},
    "lpips_alex": {"net": "alex", "channel_divisor": 1},
    "lpips_vgg": {"net": "vgg", "channel_divisor": 1},
}
SIZES = MINIATURE

TEXTS = ["a photo of a mug", "a photo of sks backpack, on a beach", "", "Watch! 85mm f/1.8", "a very long prompt " * 12]


# ------------------------------------------------------------------------------------------------------------ weights


def philox(seed, n):
    """The first `n` words of stream 0 of `seed`: Philox4x32-10, as crates/hypnos-ml/src/random.rs has it."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    block = np.arange(-(-n // 4), dtype=np.uint64)
    counter = [block & low, block >> half, np.zeros_like(block), np.zeros_like(block)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        counter = [(second >> half) ^ counter[1] ^ k0, second & low, (first >> half) ^ counter[3] ^ k1, first & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, 1).reshape(-1)[:n]


def drawn(name, shape):
    """The weight of this name and shape: uniform numbers of a seed that is the name's, by the kind of weight it is."""
    seed = int.from_bytes(hashlib.sha256(bytes(8) + name.encode()).digest()[:8], "little")
    n = int(np.prod(shape))
    unit = (philox(seed, n) >> np.uint64(8)).astype(np.float32) / np.float32(1 << 24)
    signed = 2 * unit - 1
    if name.endswith("running_var"):
        value = 0.5 + unit
    elif name.endswith(("bias", "running_mean")):
        value = np.float32(0.1) * signed
    elif name.startswith("lin"):
        value = unit
    elif name.endswith("weight") and len(shape) == 1:
        value = 1 + np.float32(0.2) * signed
    elif not name.endswith("weight") or (name.endswith("embedding.weight") and len(shape) == 2):
        value = np.float32(0.5) * signed
    else:
        value = np.float32(np.sqrt(6 / np.prod(shape[1:]))) * signed
    return torch.from_numpy(value.reshape(shape))


@torch.no_grad()
def draw(module, rename=lambda name: name, skip=()):
    """Puts the drawn weights into a module; `rename` gives our name for one of its own."""
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked") and not name.startswith(skip):
            tensor.copy_(drawn(rename(name), tensor.shape))
    return module.eval()


# ----------------------------------------------------------------------------------------------------------- pictures


def picture(seed, width, height):
    """Something with smooth shades, hard edges and fine grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 3) * x + rng.uniform(0.5, 3) * y + rng.uniform())) for _ in range(3)]
    shades = 0.5 + 0.35 * np.stack(waves, 2)
    for _ in range(4):
        cx, cy, r = rng.uniform(0, x.max()), rng.uniform(0, y.max()), rng.uniform(0.05, 0.25)
        shades[(np.abs(x - cx) < r) & (np.abs(y - cy) < 0.7 * r)] = rng.uniform(0, 1, 3)
    shades += rng.normal(0, 0.04, shades.shape)
    return PIL.Image.fromarray((shades.clip(0, 1) * 255).round().astype(np.uint8))


def saved(image, **how):
    """What a file of it gives back."""
    file = io.BytesIO()
    image.save(file, **how)
    return PIL.Image.open(file).convert("RGB")


def pictures():
    """PNG and JPEG, wide, high and small; two of each of the first two sizes, the second of the first a worse copy."""
    (wide, high, small) = SIZES["sizes"]
    first = picture(1, *wide)
    return [
        saved(first, format="PNG"),
        saved(first, format="JPEG", quality=25),
        saved(picture(2, *high), format="JPEG", quality=90),
        saved(picture(3, *high), format="PNG"),
        saved(picture(4, *small), format="JPEG", quality=75, subsampling=0),
    ]


PAIRS = [(0, 1), (2, 3)]


def bytes_of(image):
    return torch.from_numpy(np.asarray(image).copy())


def spread(features):
    """The features have to tell the pictures apart, or the comparison is worth nothing."""
    ratio = (features.std(0).norm() / features.mean(0).norm()).item()
    assert ratio > 1e-3, ratio
    return features


# ---------------------------------------------------------------------------------------------------------- backbones


def cosines(a, b):
    return F.cosine_similarity(a.double()[:, None], b.double()[None], dim=2)


def dino(photos):
    config = SIZES["dino"]
    net = VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_classes=0,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )
    assert net.norm.eps == 1e-6 and net.global_pool == "token"
    draw(net)
    cut = [transforms.Resize(config["resize"], interpolation=transforms.InterpolationMode.BICUBIC)]
    cut += [transforms.CenterCrop(config["image_size"])]
    normal = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**IMAGENET)])
    cut = [transforms.Compose(cut)(photo) for photo in photos]
    # DINO's forward: the class token behind the last norm.
    features = spread(net.forward_features(torch.stack([normal(photo) for photo in cut]))[:, 0])
    alike = cosines(features, features)
    n = len(photos)
    return {
        "dino.middle": torch.stack([bytes_of(photo) for photo in cut]),
        "dino.features": features,
        "dino.pairwise": cosines(features[:3], features[3:]).mean(),
        "dino.self": (alike.sum() - n) / (n * (n - 1)),
    }


def clip(photos):
    config = SIZES["clip"]
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLE)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config["text_config"] |= {"vocab_size": len(tokenizer), "hidden_act": "quick_gelu", "max_position_embeddings": 77}
    text = config["text_config"] | ids
    whole = CLIPConfig(text_config=text, vision_config=config["vision_config"], projection_dim=config["projection_dim"])
    net = draw(CLIPModel(whole), skip="logit_scale")
    side = config["vision_config"]["image_size"]
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    cut = processor(photos, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
    prepared = processor(photos, return_tensors="pt")
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    found = net(**prepared, **tokens)
    images, texts = spread(found.image_embeds), spread(found.text_embeds)
    return {
        "clip.middle": cut.permute(0, 2, 3, 1).round().to(torch.uint8),
        "clip.images": images,
        "clip.texts": texts,
        "clip.pairwise": cosines(images[:3], images[3:]).mean(),
        "clip.paired": F.cosine_similarity(images.double(), texts.double()).mean(),
    }


def narrowed(module, divisor):
    """Divides the channels of every convolution, batch norm and head of a network, but for its three inputs."""
    if divisor == 1:
        return module
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Conv2d):
            n_in = 3 if child.in_channels == 3 else child.in_channels // divisor
            n_out = 1 if child.out_channels == 1 else child.out_channels // divisor
            how = {"stride": child.stride, "padding": child.padding, "bias": child.bias is not None}
            setattr(module, name, torch.nn.Conv2d(n_in, n_out, child.kernel_size, **how))
        elif isinstance(child, torch.nn.BatchNorm2d):
            setattr(module, name, torch.nn.BatchNorm2d(child.num_features // divisor, eps=child.eps))
        else:
            narrowed(child, divisor)
    return module


def inception(photos):
    config = SIZES["inception"]
    divisor, side = config["channel_divisor"], config["image_size"]
    # pytorch-fid patches torchvision's network, then reads its file: ours is drawn in the place of that.
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: None
    whole = torchvision.models.inception.Inception3
    read, whole.load_state_dict = whole.load_state_dict, lambda net, _: draw(narrowed(net, divisor), skip=("fc", "AuxLogits"))
    try:
        net = pytorch_fid.inception.InceptionV3([0, 3], resize_input=side == 299).eval()
    finally:
        whole.load_state_dict = read
    assert all(module.bn.eps == 1e-3 for module in net.modules() if isinstance(module, BasicConv2d))
    prepared, first, last = [], [], []
    for photo in photos:
        unit = transforms.ToTensor()(photo)[None]
        resized = F.interpolate(unit, size=(side, side), mode="bilinear", align_corners=False)
        pools = net(unit if side == 299 else resized)
        prepared.append(2 * resized - 1)
        # As fid_score does where a layer is no single number a channel.
        first.append(F.adaptive_avg_pool2d(pools[0], (1, 1)).flatten(1))
        last.append(pools[1].flatten(1))
    first, last = spread(torch.cat(first)), spread(torch.cat(last))
    out = {"inception.pool64": first, "inception.pool2048": last, "inception.prepared": torch.cat(prepared)[:, :, ::7]}
    for depth, features in (("pool64", first), ("pool2048", last)):
        out[f"inception.fid.{depth}"] = frechet(features[:3], features[2:])
    return out


def frechet(a, b):
    statistics = [part for x in (a, b) for part in (x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False))]
    return torch.tensor(float(pytorch_fid.fid_score.calculate_frechet_distance(*statistics)), dtype=torch.float64)


def perceptual(net, photos):
    config = SIZES[f"lpips_{net}"]
    full = config["channel_divisor"] == 1
    model = lpips.LPIPS(net=net, version="0.1", pretrained=full, pnet_rand=True, verbose=False)
    del model.lins  # the heads once more
    model = narrowed(model, config["channel_divisor"]).eval()
    model.lins = torch.nn.ModuleList([getattr(model, f"lin{i}") for i in range(5)])
    draw(model.net, rename=lambda name: f"features.{name.split('.', 1)[1]}")
    out = {}
    for i in range(5):
        head = getattr(model, f"lin{i}").model[1].weight
        if full:
            out[f"weight.lpips_{net}.lin{i}.model.1.weight"] = head.detach()
        else:
            head.data.copy_(drawn(f"lin{i}.model.1.weight", head.shape))
    signed = [lpips.im2tensor(np.asarray(photo)) for photo in photos]
    between = {f"{i}-{j}": model(signed[i], signed[j]).double().squeeze() for i, j in PAIRS}
    assert all(value > 1e-3 for value in between.values()), between
    alike = [photos[i] for i in PAIRS[1]] + [photos[PAIRS[1][0]].transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)]
    alike = [lpips.im2tensor(np.asarray(photo)) for photo in alike]
    among = [model(alike[i], alike[j]).double().item() for i in range(3) for j in range(i)]
    out["output.lpips_{}.among".format(net)] = torch.tensor(np.mean(among), dtype=torch.float64)
    return out | {f"output.lpips_{net}.{pair}": value for pair, value in between.items()}


def pixelwise(photos):
    out = {}
    for i, j in PAIRS:
        a, b = np.asarray(photos[i]), np.asarray(photos[j])
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": -1}
        ssim = skimage.metrics.structural_similarity(a, b, **settings)
        psnr = skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255)
        as_batch = lambda x: torch.from_numpy(x.copy()).permute(2, 0, 1)[None].double()
        both = (as_batch(a), as_batch(b))
        measure = torchmetrics.functional.image.structural_similarity_index_measure
        _, other = measure(*both, data_range=255.0, return_full_image=True)
        other = other[..., 5:-5, 5:-5].mean()  # it mirrors the picture at its edges, and counts what it sees there
        assert abs(other.item() - ssim) < 1e-6, (other, ssim)
        other = torchmetrics.functional.image.peak_signal_noise_ratio(*both, data_range=255.0)
        assert abs(other.item() - psnr) < 1e-4, (other, psnr)
        out |= {f"ssim.{i}-{j}": torch.tensor(ssim, dtype=torch.float64), f"psnr.{i}-{j}": torch.tensor(psnr, dtype=torch.float64)}
    return out


def distances():
    """The Fréchet distance by itself: many rows, few, and few against many."""
    tensors = {}
    for case, (n, m, width) in {"many": (90, 70, 12), "few": (4, 5, 24), "mixed": (3, 60, 16)}.items():
        generator = torch.Generator().manual_seed(len(case))
        mix = torch.randn(width, width, generator=generator)
        a, b = torch.randn(n, width, generator=generator) @ mix, torch.randn(m, width, generator=generator) * 1.5 + 0.3
        tensors |= {f"input.frechet.{case}.a": a, f"input.frechet.{case}.b": b, f"output.frechet.{case}": frechet(a, b)}
    return tensors


def pools():
    """torch's pools as the networks use them, and their gradients for a sum weighted by `w`."""
    x = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(9)).requires_grad_()
    tensors = {"input.pool.x": x}
    average = functools.partial(F.avg_pool2d, count_include_pad=False)
    for name, pool in {"max": F.max_pool2d, "avg": average}.items():
        for kernel, stride, padding in [(3, 2, 0), (3, 1, 1), (2, 2, 0), (3, 2, 1)]:
            y = pool(x, kernel, stride, padding)
            w = torch.randn(y.shape, generator=torch.Generator().manual_seed(10))
            (grad,) = torch.autograd.grad((y * w).sum(), x)
            case = f"{name}.{kernel}.{stride}.{padding}"
            tensors |= {f"input.pool.{case}": w, f"output.pool.{case}": y, f"grad.pool.{case}": grad}
    return tensors


@golden
def metrics():
    photos = pictures()
    tensors = {f"input.picture.{i}": bytes_of(photo) for i, photo in enumerate(photos)}
    tensors |= distances() | pools()
    with torch.no_grad():
        outputs = {}
        for part in (dino, clip, inception, pixelwise):
            outputs |= part(photos)
            print("metrics:", part.__name__)
        tensors |= {f"output.{name}": value for name, value in outputs.items()}
        tensors |= perceptual("alex", photos) | perceptual("vgg", photos)
    configs = {name: config for name, config in SIZES.items() if name != "sizes"}
    write("metrics", tensors, texts=TEXTS, **{f"config.{name}": config for name, config in configs.items()})
    for name, value in sorted(tensors.items()):
        if value.numel() == 1:
            print(f"{name:32} {value.item():.8f}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--full"] and len(arguments) == 2:
        make.HERE, SIZES = Path(arguments[1]), FULL
        make.HERE.mkdir(parents=True, exist_ok=True)
    elif arguments:
        sys.exit(f"metrics.py: wanted nothing or --full DIR, got {' '.join(arguments)}")
    make.main(["metrics"])
