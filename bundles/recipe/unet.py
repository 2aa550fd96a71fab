"""Trains the miniature's UNet and text encoder together, from the first step on, on latents that its VAE made.

    python unet.py DATA WORK OUT --steps 20000 [--from DIR]
    torchrun --nproc-per-node 2 unet.py ...       # the same on two cores

Wants OUT/vae and OUT/tokenizer. Goes on from WORK/unet.pt if it is there; else begins with the weights in --from (a bundle),
else with random ones. Writes OUT/unet, OUT/text_encoder and what a diffusers pipeline needs beside them, every 100 steps.
The learning rate follows from the step and --steps alone, so a run may be cut short by naming fewer steps.
"""

import argparse
import copy
import json
from pathlib import Path

from world import SIDE, Average, Clock, Team, World, caption, keep, pace, rate, resume, rng, words_rng

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 77,
    "projection_dim": 128, "hidden_act": "quick_gelu",
}  # fmt: skip
UNET = {
    "sample_size": SIDE // 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 128, "norm_num_groups": 32,
    "block_out_channels": (64, 96, 128), "layers_per_block": 1,
    # Heads. Attention over 16 x 16 places is what costs a CPU most, and more heads cost more.
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SEED = 5
# Pictures of a step, and how often each is looked at with another noise: texts are encoded once.
PICTURES, LOOKS = 24, 2
WARM = 200
WITHOUT_CAPTION = 0.1
# Hang et al. 2023, arXiv 2303.09556: the weight of a timestep is min(SNR, GAMMA) / SNR; from FLAT of all steps on it is
# 1, for it is the last steps of drawing that leave pictures grainy.
GAMMA, FLAT = 5.0, 0.5


class Both(torch.nn.Module):
    """Text encoder and UNet."""

    def __init__(self, tokenizer):
        super().__init__()
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        self.text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ends))
        self.unet = UNet2DConditionModel(**UNET)

    def forward(self, noisy, t, ids):
        """The noise in `LOOKS` latents for each text."""
        texts = self.text(input_ids=ids).last_hidden_state.repeat_interleave(len(noisy) // len(ids), 0)
        return self.unet(noisy, t, encoder_hidden_states=texts).sample

    @torch.no_grad()
    def begin_with(self, bundle, tokenizer):
        """Takes over the weights of a bundle of the same shape; of embeddings, those of tokens that both vocabularies have."""
        unet = UNet2DConditionModel.from_pretrained(bundle / "unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(bundle / "text_encoder", torch_dtype=torch.float32)
        self.unet.load_state_dict(unet.state_dict())
        theirs, ours = CLIPTokenizer.from_pretrained(bundle / "tokenizer").get_vocab(), tokenizer.get_vocab()
        pairs = [(i, theirs[token]) for token, i in ours.items() if token in theirs]
        embeddings = self.text.get_input_embeddings().weight.clone()
        embeddings[[i for i, _ in pairs]] = text.get_input_embeddings().weight[[i for _, i in pairs]]
        name = next(name for name, p in self.text.named_parameters() if p is self.text.get_input_embeddings().weight)
        self.text.load_state_dict(text.state_dict() | {name: embeddings})


@torch.no_grad()
def encoded(world, chosen, out, work, team):
    """Latents of these pictures [N, 4, 16, 16], scaled; each process encodes a part of them, once."""
    vae = AutoencoderKL.from_pretrained(Path(out) / "vae", torch_dtype=torch.float32).eval()
    path = lambda part, size: Path(work) / f"latents.{len(chosen)}.{part}-of-{size}.npy"
    found = next((size for size in range(1, 17) if all(path(part, size).exists() for part in range(size))), None)
    if found is None:
        found, mine = team.size, np.array_split(chosen, team.size)[team.rank]
        clock, latents = Clock(len(mine), 160), []
        for i in range(0, len(mine), 16):
            latents.append(vae.encode(world.batch(mine[i : i + 16])[0]).latent_dist.mean.half().numpy())
            if team.first:
                clock.tell(i)
        part = path(team.rank, found)
        with open(f"{part}.part", "wb") as file:
            np.save(file, np.concatenate(latents))
        Path(f"{part}.part").rename(part)
        if team.size > 1:
            dist.barrier()
    latents = np.concatenate([np.load(path(part, found)) for part in range(found)])
    return torch.from_numpy(latents).float() * vae.config.scaling_factor


def export(both, out, tokenizer):
    """Writes both and what stands beside them, as f16."""
    copy.deepcopy(both.unet).half().save_pretrained(out / "unet")
    prefix = lambda name: name if name.startswith("text_model.") else f"text_model.{name}"
    tensors = {prefix(k): v.half().contiguous() for k, v in both.text.state_dict().items() if "position_ids" not in k}
    (out / "text_encoder").mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "text_encoder/model.safetensors", {"format": "pt"})
    both.text.config.architectures = ["CLIPTextModel"]
    both.text.config.save_pretrained(out / "text_encoder")
    DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False,
        "feature_extractor": [None, None], "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data"), parser.add_argument("work"), parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=20000, metavar="N", help="learn from the first N")
    parser.add_argument("--from", dest="begin", type=Path)
    args = parser.parse_args()
    team = Team()
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    both = Both(tokenizer)
    if args.begin:
        both.begin_with(args.begin, tokenizer)
    both.train()
    average = Average(both, 0.999)
    optimiser = torch.optim.AdamW(both.parameters(), args.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    path = Path(args.work) / "unet.pt"
    begin = resume(path, net=both, average=average, optimiser=optimiser)
    world = World(args.data)
    drawn = world.drawn()[: args.pictures]
    latents = encoded(world, drawn, args.out, args.work, team)
    kept = torch.cumprod(1 - torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2, 0)
    weights = (kept / (1 - kept)).clamp(max=GAMMA) * (1 - kept) / kept
    weights = weights / weights.mean()
    clock, mean = Clock(args.steps, 20), None
    if team.first:
        sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in both.named_children()}
        print(f"{sizes}; latents of {len(latents)} pictures, std {latents.std():.3f}; step {begin}", flush=True)
    for step in range(begin, args.steps):
        r, words = rng(SEED + 100 * team.rank, step), words_rng(SEED + 100 * team.rank, step)
        chosen = np.sort(r.choice(len(latents), PICTURES, replace=False))
        texts = ["" if words.random() < WITHOUT_CAPTION else caption(world.shown[drawn[i]], words) for i in chosen]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        z = latents[chosen].repeat_interleave(LOOKS, 0)
        t = torch.from_numpy(r.integers(0, 1000, len(z)))
        noise = torch.from_numpy(r.standard_normal(z.shape)).float()
        a = kept[t].view(-1, 1, 1, 1)
        error = (both(a.sqrt() * z + (1 - a).sqrt() * noise, t, ids) - noise).pow(2).mean((1, 2, 3))
        optimiser.zero_grad()
        (error * (weights[t] if step < FLAT * args.steps else 1)).mean().backward()
        team.average(both.parameters())
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        pace(optimiser, rate(step, args.steps, args.rate, WARM, hold=0.33, end=0.03))
        optimiser.step()
        average.follow(both, step)
        mean = error.mean().item() if mean is None else 0.99 * mean + 0.01 * error.mean().item()
        if team.first:
            clock.tell(step + 1, error=mean)
            if (step + 1) % 100 == 0 or step + 1 == args.steps:
                keep(path, step + 1, net=both, average=average, optimiser=optimiser)
                export(average.net, args.out, tokenizer)
    print("done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
