#!/usr/bin/env bash
# diffusers: a model that is saved in one file where it lay in shards cannot be loaded any more.
#
# Seen with diffusers 0.42.1, transformers 5.23.0 and torch 2.15.0. `save_pretrained` writes the one file and removes the
# shards that were there, but not their index. `from_pretrained` prefers the index, and fails because the shards that
# it names are gone. transformers does the same when it saves, but prefers the one file when it loads.
# Output seen:
#   text_encoder ['model.safetensors', 'model.safetensors.index.json'] loads
#   unet ['diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.safetensors.index.json'] FileNotFoundError
#
# What helps: save into an empty directory, or remove diffusion_pytorch_model.safetensors.index.json.
# Fails if the packages behave otherwise. Needs Python 3.10 or newer; installs PyTorch, which takes some gigabytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
cat >"$work/show.py" <<'PYTHON'
import os
import sys

from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
for name, model in {"text_encoder": text, "unet": unet}.items():
    directory = f"{sys.argv[1]}/{name}"
    model.save_pretrained(directory, max_shard_size="20KB")
    model.save_pretrained(directory)
    try:
        type(model).from_pretrained(directory)
        said = "loads"
    except Exception as error:
        said = type(error).__name__
    print(name, sorted(set(os.listdir(directory)) - {"config.json"}), said)
PYTHON
"$work/venv/bin/python" "$work/show.py" "$work/model" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
text_encoder ['model.safetensors', 'model.safetensors.index.json'] loads
unet ['diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.safetensors.index.json'] FileNotFoundError
SEEN
echo "as described"
