#!/usr/bin/env bash
# diffusers: a Stable Diffusion pipeline sets `steps_offset` to 1, and the next change of scheduler sets it back to 0.
#
# Seen with diffusers 0.42.1, transformers 5.23.0 and torch 2.15.0. Where a scheduler's settings leave `steps_offset`
# out, StableDiffusionPipeline warns and puts 1. The usual way to another sampler,
# `X.from_config(pipeline.scheduler.config)`, then gives 0 again, though that configuration says 1: the key still counts
# as one that was never given, and such keys take the class's default. All timesteps move by one, so a pipeline draws
# other pictures after its scheduler was replaced by one of the same class and settings. A scheduler whose settings say
# `"steps_offset": 0` is set to 1 by the pipeline as well, and keeps the 1.
# Output seen, as steps_offset and timesteps in the pipeline, then after from_config:
#   left out: 1 [751, 501, 251, 1], then 0 [750, 500, 250, 0]
#   0:        1 [751, 501, 251, 1], then 1 [751, 501, 251, 1]
#   1:        1 [751, 501, 251, 1], then 1 [751, 501, 251, 1]
#
# What helps: write `steps_offset` into scheduler_config.json.
# Fails if diffusers behaves otherwise. Needs Python 3.10 or newer; installs PyTorch, which takes some gigabytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir torch==2.15.0 diffusers==0.42.1 transformers==5.23.0
cat >"$work/show.py" <<'PYTHON'
import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

diffusers.logging.set_verbosity_error()
text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
for name, given in {"left out": {}, "0": {"steps_offset": 0}, "1": {"steps_offset": 1}}.items():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **given)
    pipeline = StableDiffusionPipeline(
        vae, text, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    both = [pipeline.scheduler, DDIMScheduler.from_config(pipeline.scheduler.config)]
    for one in both:
        one.set_timesteps(4)
    print(f"{name}:", ", then ".join(f"{one.config.steps_offset} {one.timesteps.tolist()}" for one in both))
PYTHON
"$work/venv/bin/python" "$work/show.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'SEEN'
left out: 1 [751, 501, 251, 1], then 0 [750, 500, 250, 0]
0: 1 [751, 501, 251, 1], then 1 [751, 501, 251, 1]
1: 1 [751, 501, 251, 1], then 1 [751, 501, 251, 1]
SEEN
echo "as described"
