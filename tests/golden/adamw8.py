"""Makes adamw8.safetensors: AdamW with moments in 8 bits as bitsandbytes computes it on a CPU, and PyTorch's in f32.

    pip install torch==2.15.0 safetensors==0.8.0 bitsandbytes==0.50.2
    python tests/golden/adamw8.py

`code.signed` and `code.unsigned` are the values of the 256 codes. `weight` [4400] takes 10 steps with the gradients
`gradient` [10, 4400], whose sizes span two decades; `adamw8` and `adamw` are the weights after them. 4400 is no
multiple of a block, which has 256.
"""

import importlib.metadata
import sys
from pathlib import Path

PINS = {"torch": "2.15.0", "safetensors": "0.8.0", "bitsandbytes": "0.50.2"}
for package, wanted in PINS.items():
    found = importlib.metadata.version(package).split("+")[0]
    if found != wanted:
        sys.exit(f"adamw8.py: {package} {found} is installed, {wanted} is wanted; see the head of this file")

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import save_file

N, STEPS = 4400, 10
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

generator = torch.Generator().manual_seed(8)
weight = torch.randn(N, generator=generator)
sizes = 10 ** (torch.rand(N, generator=generator) * 2 - 4)
gradient = torch.randn(STEPS, N, generator=generator) * sizes


def after(optimiser):
    value = torch.nn.Parameter(weight.clone())
    stepping = optimiser([value], **SETTINGS)
    for row in gradient:
        value.grad = row.clone()
        stepping.step()
    return value.detach().clone()


tensors = {
    "code.signed": create_dynamic_map(signed=True).float(),
    "code.unsigned": create_dynamic_map(signed=False).float(),
    "weight": weight,
    "gradient": gradient,
    "adamw8": after(bnb.optim.AdamW8bit),
    "adamw": after(torch.optim.AdamW),
}
versions = {"versions": str(PINS).replace("'", '"')}
save_file(tensors, Path(__file__).parent / "adamw8.safetensors", metadata=versions)
