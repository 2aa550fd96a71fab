"""What diffusers says of our exports: the names of a single file, and a whole fine-tune loaded by it.

    python tests/golden/exports.py                                       # ldm_names/*.jsonl
    python tests/golden/exports.py --check DIFFUSERS SINGLE_FILE BUNDLE WEIGHTS [--hypnos PROGRAM] [--prompt TEXT]

The packages are make.py's. A golden's first line has the configs of UNet and autoencoder, every other one tensor: `[part, name in
diffusers, name in the single file, shape there]`, and the row of the single file's tensor where it begins, where that has several.
There is one for Stable Diffusion 1.5, for Stable Diffusion 2.1, for the miniature, and for a model of other depths. diffusers converts single files to its own names, so it is given one whose every tensor is another, and what comes
out tells which name became which. All of it has to be a model of that config, no tensor more and none less.

`--check` is for developers: DIFFUSERS and SINGLE_FILE are what `hypnos export` (or `hypnos train --export`) wrote of WEIGHTS,
which were trained from BUNDLE. diffusers loads both, draws from the same noise as `hypnos sample`, and compares weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from make import HERE

UNET, VAE, TEXT = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer"
OPEN_CLIP = "cond_stage_model.model"

SD15 = {  # the sizes of Stable Diffusion 1.5; all else is the classes' default
    "unet": {"cross_attention_dim": 768, "sample_size": 64},
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    | {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
SD2 = {  # the sizes of Stable Diffusion 2.1
    "unet": {"cross_attention_dim": 1024, "sample_size": 96, "attention_head_dim": [5, 10, 20, 20]}
    | {"use_linear_projection": True, "upcast_attention": True},
    "vae": SD15["vae"],
    "text_encoder": {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    | {"hidden_act": "gelu"},
}
ODD = {  # attention where SD 1 has none, and the reverse; three layers a level, transformers of two
    "unet": {"block_out_channels": [32, 64, 32], "layers_per_block": 3, "cross_attention_dim": 24}
    | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
    | {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}
    | {"attention_head_dim": 2, "transformer_layers_per_block": 2, "use_linear_projection": True},
    "vae": {"block_out_channels": [32, 32], "layers_per_block": 2, "norm_num_groups": 8}
    | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    "text_encoder": {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"bos_token_id": 48, "eos_token_id": 49},
}


def configs():
    """Name -> the three configs."""
    own = lambda part: json.loads((HERE.parent / "bundle" / part / "config.json").read_text())  # the bundle of the tests
    plain = lambda config: {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    return {"sd15": SD15, "sd2": SD2, "odd": ODD, "miniature": {part: plain(own(part)) for part in SD15}}


def models(config):
    """The diffusers models of these configs, without memory for their weights."""
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel(**config["unet"]),
            "vae": diffusers.AutoencoderKL(**config["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        }


# ------------------------------------------------------- which modules CompVis/stable-diffusion builds, and in what
# order


def both(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def res_block(shortcut):
    """`ResBlock` of ldm/modules/diffusionmodules/openaimodel.py."""
    return both("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", *["skip_connection"] * shortcut)


def spatial_transformer(depth):
    """`SpatialTransformer` of ldm/modules/attention.py."""
    names = both("norm", "proj_in", "proj_out")
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for attention in ("attn1", "attn2"):
            names += [f"{block}.{attention}.{name}.weight" for name in ("to_q", "to_k", "to_v")]
            names += both(f"{block}.{attention}.to_out.0")
        names += both(f"{block}.ff.net.0.proj", f"{block}.ff.net.2", *(f"{block}.norm{n}" for n in (1, 2, 3)))
    return names


def unet_names(config):
    """`UNetModel` of openaimodel.py: what its constructor appends, block by block."""
    channels, n_res = config["block_out_channels"], config["layers_per_block"]
    depth = config.get("transformer_layers_per_block", 1)
    names = both("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    add = lambda place, leaves: names.extend(f"{place}.{leaf}" for leaf in leaves)
    n, ch, skips = 1, channels[0], [channels[0]]
    for level, (out, kind) in enumerate(zip(channels, config["down_block_types"])):
        for _ in range(n_res):
            add(f"input_blocks.{n}.0", res_block(ch != out))
            if kind.startswith("CrossAttn"):
                add(f"input_blocks.{n}.1", spatial_transformer(depth))
            n, ch = n + 1, out
            skips.append(ch)
        if level + 1 < len(channels):
            names += both(f"input_blocks.{n}.0.op")
            n += 1
            skips.append(ch)
    add("middle_block.0", res_block(False))
    add("middle_block.1", spatial_transformer(depth))
    add("middle_block.2", res_block(False))
    n = 0
    for level, kind in reversed(list(enumerate(reversed(config["up_block_types"])))):
        for i in range(n_res + 1):
            add(f"output_blocks.{n}.0", res_block(ch + skips.pop() != channels[level]))
            ch, layer = channels[level], 1
            if kind.startswith("CrossAttn"):
                add(f"output_blocks.{n}.1", spatial_transformer(depth))
                layer = 2
            if level and i == n_res:
                names += both(f"output_blocks.{n}.{layer}.conv")
            n += 1
    assert not skips
    return names


def vae_names(config):
    """`Encoder` and `Decoder` of ldm/modules/diffusionmodules/model.py; the decoder's levels are numbered as the encoder's."""
    channels, n_res = config["block_out_channels"], config["layers_per_block"]
    names = both("quant_conv", "post_quant_conv")
    block = lambda place, shortcut: both(*(f"{place}.{x}" for x in ("norm1", "conv1", "norm2", "conv2")), *[f"{place}.nin_shortcut"] * shortcut)
    for coder in ("encoder", "decoder"):
        names += both(*(f"{coder}.{x}" for x in ("conv_in", "norm_out", "conv_out")))
        names += block(f"{coder}.mid.block_1", False) + block(f"{coder}.mid.block_2", False)
        names += both(*(f"{coder}.mid.attn_1.{x}" for x in ("norm", "q", "k", "v", "proj_out")))
    ch = channels[0]
    for level, out in enumerate(channels):
        for i in range(n_res):
            names += block(f"encoder.down.{level}.block.{i}", ch != out)
            ch = out
        names += both(f"encoder.down.{level}.downsample.conv") if level + 1 < len(channels) else []
    for level, out in reversed(list(enumerate(channels))):
        for i in range(n_res + 1):
            names += block(f"decoder.up.{level}.block.{i}", ch != out)
            ch = out
        names += both(f"decoder.up.{level}.upsample.conv") if level else []
    return names


def open_clip_names(layers):
    """`TextTransformer` of open_clip's transformer.py, whose attentions are torch's `MultiheadAttention`."""
    names = ["positional_embedding", "token_embedding.weight", *both("ln_final")]
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        names += [f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"]
        names += both(*(f"{block}.{leaf}" for leaf in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")))
    return names


# -------------------------------------------------------------------------------------------------------------- goldens


def whole(name):
    """A text encoder's name as files have it: transformers left out the encoder's own prefix from 5.6 on."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def numbered(names):
    """Name -> a tensor that is its number in `names`; each third of a packed projection adds a quarter more."""
    number = {name: torch.tensor([float(i)]) for i, name in enumerate(names)}
    for name in names:
        if ".in_proj_" in name:
            thirds = number[name] + torch.tensor([0.0, 0.25, 0.5])
            number[name] = thirds[:, None] if name.endswith("weight") else thirds
    return number


def pairs(own):
    """`[part, name in diffusers, name in the single file, shape there]`, as diffusers converts the latter to the former."""
    text, open_clip = own["text_encoder"], own["text_encoder"].config.hidden_act == "gelu"
    named = lambda prefix, names: [f"{prefix}.{name}" for name in names]
    unet, vae = own["unet"].config, own["vae"].config
    names = named(UNET, unet_names(unet)) + named(VAE, vae_names(vae))
    names += named(OPEN_CLIP, open_clip_names(text.config.num_hidden_layers)) if open_clip else named(TEXT, map(whole, text.state_dict()))
    assert len(set(names)) == len(names)
    number = numbered(names)  # so many tensors, told apart by their number
    width = {f"{OPEN_CLIP}.text_projection": torch.ones(1, 1)}  # where diffusers reads how wide a packed projection is
    converted = {
        "text_encoder": convert_open_clip_checkpoint(text, number | width) if open_clip else convert_ldm_clip_checkpoint(number),
        "unet": convert_ldm_unet_checkpoint(number, unet),
        "vae": convert_ldm_vae_checkpoint({n: t[:, None, None, None] for n, t in number.items() if n.startswith(VAE)}, vae),
    }
    converted["text_encoder"].pop("text_projection.weight", None)
    rows = []
    for part, tensors in converted.items():
        shapes = {name: list(tensor.shape) for name, tensor in own[part].state_dict().items()}
        if part == "text_encoder":
            shapes = {whole(name): shape for name, shape in shapes.items()}
        assert set(tensors) == set(shapes), (part, set(tensors) ^ set(shapes))
        for name in sorted(tensors):
            found = tensors[name].flatten()[0].item()
            theirs, shape = names[int(found)], shapes[name]
            if ".mid.attn_1." in theirs and len(shape) == 2:
                shape = [*shape, 1, 1]  # `AttnBlock` has convolutions of one pixel
            if ".in_proj_" in theirs:
                rows.append([part, name, theirs, [3 * shape[0], *shape[1:]], int(found % 1 * 4) * shape[0]])
            else:
                rows.append([part, name, theirs, shape])
    assert len({theirs for _, _, theirs, *_ in rows}) == len(names)
    verify(own, rows)
    return rows


def verify(own, rows):
    """The same once more with the shapes that were found: diffusers has to make its own of all of them."""
    ldm = {theirs: torch.empty(shape, device="meta") for _, _, theirs, shape, *_ in rows}
    for part, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        found = {name: tensor.shape for name, tensor in convert(dict(ldm), own[part].config).items()}
        assert found == {name: tensor.shape for name, tensor in own[part].state_dict().items()}, part


def goldens():
    folder = HERE / "ldm_names"
    folder.mkdir(exist_ok=True)
    for name, config in configs().items():
        own = models(config)
        rows = pairs(own)
        given = lambda part: {key: value for key, value in own[part].config.items() if not key.startswith("_") and value is not None}
        head = {"unet": given("unet"), "vae": given("vae"), "text_encoder": config["text_encoder"]}
        lines = [json.dumps(row, separators=(",", ":")) for row in [head, *rows]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="ascii")
        print(f"{name}: {len(rows)} tensors")


# ---------------------------------------------------------------------------------------------------------------- check


def off(found, wanted):
    """Relative to the norm of what is wanted, and to its largest element: the larger of both."""
    found, wanted = found.double(), wanted.double()
    difference = found - wanted
    return max((difference.norm() / wanted.norm()).item(), (difference.abs().max() / wanted.abs().max()).item())


@torch.no_grad()
def check(args):
    """Draws by both and compares; fails where they are further apart than 1e-3, or where any weight differs at all."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(args.diffusers, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    side = pipe.unet.config.sample_size
    noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(50))
    words = json.loads((args.diffusers / "hypnos.json").read_text())["product"]
    words = " ".join([words["token"]] + [words["class_name"]] * words["with_class"])
    prompt = args.prompt.replace("{product}", words)
    print(f"prompt: {prompt}")

    def ours(bundle, *more):
        """Latents and pixels of `hypnos sample`."""
        with tempfile.TemporaryDirectory() as scratch:
            given, kept = Path(scratch) / "noise.safetensors", Path(scratch) / "latents.safetensors"
            save_file({"latents": noise}, given)
            command = [args.hypnos, "sample", "--bundle", bundle, *more, "--prompt", args.prompt, "--scheduler", "ddim"]
            command += ["--steps", "20", "--guidance", "4", "--latents", given, "--save-latents", kept, "--out", scratch]
            subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
            pixels = torch.frombuffer(bytearray(Image.open(Path(scratch) / "0.png").tobytes()), dtype=torch.uint8)
            return load_file(kept)["latents"], pixels.reshape(side * pipe.vae_scale_factor, -1, 3)

    def theirs(pipe):
        drawn = pipe(prompt, latents=noise.clone(), num_inference_steps=20, guidance_scale=4.0, output_type="latent").images
        picture = pipe.vae.decode(drawn / pipe.vae.config.scaling_factor).sample
        return drawn, (picture / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)

    def compare(what, value, most):
        print(f"{what}: {value:.2e}, allowed {most:.0e}")
        assert value <= most, what

    latents, picture = theirs(pipe)
    for what, (ours_latents, pixels) in {
        "the weights, hypnos": ours(args.bundle, "--model", args.weights),
        "the export as a bundle, hypnos": ours(args.diffusers),
    }.items():
        compare(f"{what} against the export, diffusers: latents", off(ours_latents, latents), 1e-3)
        decoded = pipe.vae.decode(ours_latents / pipe.vae.config.scaling_factor).sample
        compare(f"{what} against the export, diffusers: picture", off((decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0), picture), 1e-3)
        levels = (pixels.int() - (picture * 255).round().int()).abs().max().item()
        compare(f"{what} against the export, diffusers: levels of 255", levels, 1)
    # Of a bundle in f16, transformers would keep the type and diffusers would not.
    base = diffusers.StableDiffusionPipeline.from_pretrained(args.bundle, dtype=torch.float32, local_files_only=True)
    base.set_progress_bar_config(disable=True)
    base.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config)
    moved = off(latents, theirs(base)[0])
    print(f"the export against the bundle it was trained from: latents {moved:.2e}")
    assert moved > 1e-2, "the fine-tune draws what its bundle draws; nothing was compared"

    single = diffusers.StableDiffusionPipeline.from_single_file(
        str(args.single_file), config=str(args.diffusers), local_files_only=True
    )
    n_equal = 0
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(one, part).state_dict() for one in (single, pipe))
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{part}.{name}"
        n_equal += len(wanted)
    print(f"the single file, converted back by diffusers: {n_equal} of {n_equal} tensors equal to the bit")
    changed = sum(not torch.equal(a, b) for part in ("unet", "text_encoder") for a, b in zip(getattr(single, part).state_dict().values(), getattr(base, part).state_dict().values()))
    print(f"of them {changed} differ from the bundle's")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", nargs=4, type=Path, metavar=("DIFFUSERS", "SINGLE_FILE", "BUNDLE", "WEIGHTS"))
    parser.add_argument("--hypnos", default="hypnos")
    parser.add_argument("--prompt", default="a photo of {product}, blue background")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    if args.check:
        args.diffusers, args.single_file, args.bundle, args.weights = args.check
        return check(args)
    goldens()


if __name__ == "__main__":
    sys.exit(main())
