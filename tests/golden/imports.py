"""What diffusers makes of a single file: the weights of small models by the original names, converted by `from_single_file`.

    python tests/golden/imports.py     # imports/*.jsonl and imports/*.ckpt

The packages are make.py's. The first line of `imports/<name>.jsonl` has `configs` of the parts and of the scheduler, and `sha256`: for each
type that the file's weights may have, and for `ema` (f32), what each part of the pipeline hashes to - over all its tensors by their
names in diffusers, sorted: name, zero byte, shape as JSON, zero byte, values as little-endian f32. Every other line is one
tensor of the single file: `[name, shape, type]`; `float` is the type that the file is made for, others are as in published files and
no weights. Element i of tensor n is `((40503 i + crc32(n)) mod 65536) / 65536 - 1/2`, rounded to the type.

`imports/pickled.ckpt` is such a file of the smallest model as `torch.save` writes it, f16, with what a published checkpoint has beside
its weights; `imports/pickled_unet.bin` is its UNet as `save_pretrained(safe_serialization=False)` names it. `imports/code.ckpt` is a pickle that runs a program where Python opens it.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import types
import zlib
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

from exports import OPEN_CLIP, TEXT, UNET, models, open_clip_names, pairs, whole
from make import HERE, MINIATURE, SCHEDULES, UNET_CONFIGS, VAE_CONFIGS

VAE = {"norm_num_groups": 4, "scaling_factor": 0.4} | VAE_CONFIGS["vae8"]
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT_SIZES = {"vocab_size": 902, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "bos_token_id": 900, "eos_token_id": 901}
CASES = {
    "sd1": {
        "unet": {"norm_num_groups": 4, "sample_size": 8} | UNET_CONFIGS["unet_sd15"] | {"cross_attention_dim": 16},
        "text_encoder": {"num_hidden_layers": 3} | TEXT_SIZES,
        "scheduler": SCHEDULES["sd15"],
    },
    "sd2": {  # 23 layers: diffusers knows the last one, which is not used, by its number
        "unet": {"norm_num_groups": 4, "sample_size": 8} | UNET_CONFIGS["unet_sd2"],
        "text_encoder": {"num_hidden_layers": 23, "hidden_act": "gelu"} | TEXT_SIZES,
        "scheduler": SCHEDULES["sd2"],
    },
    "pickled": {
        "unet": {"norm_num_groups": 4, "sample_size": 8, "cross_attention_dim": 16}
        | {"block_out_channels": [8, 8], "layers_per_block": 1, "attention_head_dim": 2}
        | {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "text_encoder": {"num_hidden_layers": 1} | TEXT_SIZES,
        "scheduler": SCHEDULES["sd15"],
    },
}
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def value(name, shape, dtype=torch.float32):
    count = 1
    for side in shape:
        count *= side
    numbers = (torch.arange(count, dtype=torch.int64) * 40503 + zlib.crc32(name.encode())) % 65536
    return (numbers.to(torch.float32) / 65536 - 0.5).reshape(shape).to(dtype)


def in_file(case, own, rows):
    """`[name, shape, type]` of everything in the file: the weights, and what published files have beside them."""
    tensors = {theirs: shape for _, _, theirs, shape, *_ in rows}
    listed = [[name, shape, "float"] for name, shape in tensors.items()]
    if case == "sd2":
        d, layers = own["text_encoder"].config.hidden_size, own["text_encoder"].config.num_hidden_layers
        shapes = {name.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): shape for name, shape in tensors.items()}
        last = [f"{OPEN_CLIP}.{name}" for name in open_clip_names(layers + 1) if f"resblocks.{layers}." in name]
        listed += [[name, shapes[name], "float"] for name in last]
        listed += [[f"{OPEN_CLIP}.text_projection", [d, d], "float"], [f"{OPEN_CLIP}.logit_scale", [], "float"]]
    else:
        listed += [[f"{TEXT}.text_model.embeddings.position_ids", [1, 77], "i64"]]
        averaged = [[f"model_ema.{''.join(name.split('.')[1:])}", shape, "float"] for name, shape in tensors.items() if name.startswith(UNET)]
        listed += [*averaged, ["model_ema.decay", [], "f32"], ["model_ema.num_updates", [], "i32"]] if case == "sd1" else []
    return sorted(listed + [["betas", [1000], "f32"], ["alphas_cumprod", [1000], "f32"]])


def checkpoint(listed, dtype):
    types = TYPES | {"i64": torch.int64, "i32": torch.int32, "float": dtype}
    return {name: value(name, shape, types[kind]) for name, shape, kind in listed}


def digest(tensors):
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].to(torch.float32).contiguous()
        total.update(f"{name}\0{json.dumps(list(tensor.shape), separators=(',', ':'))}\0".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def directory(folder, own, scheduler):
    """The configs that `from_single_file` is told to use."""
    for part, model in own.items():
        model.config.save_pretrained(folder / part) if part == "text_encoder" else model.save_config(folder / part)
    shutil.copytree(MINIATURE / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", scheduler["_class_name"]]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))


def converted(file, folder):
    """What each part of the pipeline hashes to."""
    pipe = diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    text = {whole(name): tensor for name, tensor in pipe.text_encoder.state_dict().items()}
    text.pop("text_model.embeddings.position_ids", None)
    return {"text_encoder": digest(text), "unet": digest(pipe.unet.state_dict()), "vae": digest(pipe.vae.state_dict())}


def lightning():
    """The class that the first published checkpoints name in their callbacks, of a package that need not be there."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        sys.modules.setdefault(parent, types.ModuleType(parent))
    sys.modules[name].ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    return sys.modules[name].ModelCheckpoint


class Code:
    """What makes a pickle run a program, where it is opened by Python."""

    def __reduce__(self):
        return os.system, ("touch hypnos-ran-code",)


def golden(case, config):
    own = models({"vae": VAE} | config)
    listed, sha256 = in_file(case, own, pairs(own)), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "configs", Path(scratch) / "file.safetensors"
        directory(folder, own, config["scheduler"])
        for name, dtype in TYPES.items():
            save_file(checkpoint(listed, dtype), file)
            sha256[name] = converted(file, folder)
        if case == "pickled":
            published = {"epoch": 5, "global_step": 840000, "pytorch-lightning_version": "1.4.2", "lr_schedulers": []}
            published |= {"state_dict": checkpoint(listed, torch.float16), "callbacks": {}, "optimizer_states": []}
            torch.save(published, Path(scratch) / "file.ckpt")
            assert converted(Path(scratch) / "file.ckpt", folder) == sha256["f16"]
            published["callbacks"] = {lightning(): {"monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.5)}}
            torch.save(published, HERE / "imports" / "pickled.ckpt")
            pipe = diffusers.StableDiffusionPipeline.from_single_file(str(Path(scratch) / "file.ckpt"), config=str(folder), local_files_only=True)
            weights = {name: tensor.half() for name, tensor in pipe.unet.state_dict().items()}
            torch.save(weights, HERE / "imports" / "pickled_unet.bin")
    if case == "sd1":
        averaged = convert_ldm_unet_checkpoint(checkpoint(listed, torch.float32), own["unet"].config, extract_ema=True)
        sha256["ema"] = sha256["f32"] | {"unet": digest(averaged)}
        assert sha256["ema"]["unet"] != sha256["f32"]["unet"]
    told = lambda part: {key: value for key, value in own[part].config.items() if not key.startswith("_") and value is not None}
    configs = {"unet": told("unet"), "vae": told("vae"), "text_encoder": config["text_encoder"], "scheduler": config["scheduler"]}
    lines = [json.dumps(row, separators=(",", ":")) for row in [{"configs": configs, "sha256": sha256}, *listed]]
    (HERE / "imports" / f"{case}.jsonl").write_text("\n".join(lines) + "\n", encoding="ascii")
    print(f"{case}: {len(listed)} tensors")


def main():
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    (HERE / "imports").mkdir(exist_ok=True)
    for case, config in CASES.items():
        golden(case, config)
    torch.save({"state_dict": {f"{UNET}.out.2.bias": torch.zeros(4), "callback": Code()}}, HERE / "imports" / "code.ckpt")


if __name__ == "__main__":
    sys.exit(main())
