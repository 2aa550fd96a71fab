#!/usr/bin/env bash
# transformers: a model that is saved again in shards is loaded with the weights that were saved first.
#
# Seen with transformers 5.23.0, diffusers 0.42.1 and torch 2.15.0. `save_pretrained` with a small `max_shard_size` writes
# shards and their index into a directory where the model was saved in one file before, and leaves that file there.
# `from_pretrained` prefers one file to an index, so it loads the old weights, without a warning. diffusers prefers
# the index and loads the new ones. So a Stable Diffusion pipeline that is trained on and saved into its own directory
# with `max_shard_size` draws with the new UNet and the old text encoder.
# Output seen (1 was saved first and in one file, 2 then in shards):
#   text_encoder 1.0
#   unet 2.0
#   vae 2.0
#
# What helps: save into an empty directory, or remove model.safetensors.
# Fails if the packages behave otherwise. Needs Python 3.10 or newer; installs PyTorch, which takes some gigabytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
cat >"$work/show.py" <<'PYTHON'
import sys

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

directory = sys.argv[1]
models = {
    "text_encoder": CLIPTextModel(
        CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    ),
    "unet": UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "vae": AutoencoderKL(block_out_channels=(32,), latent_channels=4),
}
for value, how in (1.0, {}), (2.0, {"max_shard_size": "20KB"}):
    for name, model in models.items():
        for weight in model.parameters():
            weight.data.fill_(value)
        model.save_pretrained(f"{directory}/{name}", **how)
for name, model in models.items():
    loaded = type(model).from_pretrained(f"{directory}/{name}")
    values = {weight.min().item() for weight in loaded.parameters()} | {weight.max().item() for weight in loaded.parameters()}
    print(name, *values)
PYTHON
"$work/venv/bin/python" "$work/show.py" "$work/model" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
text_encoder 1.0
unet 2.0
vae 2.0
SEEN
echo "as described"
