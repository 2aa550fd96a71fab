#!/usr/bin/env bash
# diffusers: a Stable Diffusion pipeline that was saved in f16 and is loaded without a type cannot draw.
#
# Seen with diffusers 0.42.1, transformers 5.23.0 and torch 2.15.0. Where no type is asked for, diffusers loads its own
# parts (UNet, VAE) in f32, and transformers loads the text encoder in the type of the file. The UNet then gets f16
# embeddings for its f32 weights. Each package alone does what it says; the pipeline that joins them fails when it draws.
# Output seen:
#   text_encoder torch.float16
#   unet torch.float32
#   vae torch.float32
#   RuntimeError
#
# What helps: name the type, `from_pretrained(..., dtype=torch.float32)`.
# Fails if the packages behave otherwise. Needs Python 3.10 or newer; installs PyTorch, which takes some gigabytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
cat >"$work/show.py" <<'PYTHON'
import sys

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
pipeline = StableDiffusionPipeline(
    vae, text, None, unet, DDIMScheduler(steps_offset=1), None, None, requires_safety_checker=False
)
pipeline.to(torch.float16).save_pretrained(sys.argv[1])
loaded = StableDiffusionPipeline.from_pretrained(sys.argv[1], tokenizer=None, requires_safety_checker=False)
for name in "text_encoder", "unet", "vae":
    print(name, getattr(loaded, name).dtype)
embeddings = loaded.text_encoder(torch.zeros(1, 77, dtype=torch.long))[0]
try:
    loaded(prompt_embeds=embeddings, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    print("draws")
except Exception as error:
    print(type(error).__name__)
PYTHON
"$work/venv/bin/python" "$work/show.py" "$work/model" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
text_encoder torch.float16
unet torch.float32
vae torch.float32
RuntimeError
SEEN
echo "as described"
