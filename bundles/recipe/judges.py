"""Trains what tells likeness: a vision transformer in DINO's place, and a CLIP pair. Both look at halved pictures.

    python judges.py dino|clip DATA TEST WORK OUT [--steps N] [--from DIR]    # goes on from WORK if it was there before

The transformer learns from labels of the thing alone, not by distillation as DINO does: what stands around the thing must not
count, and labels are there. CLIP's batches are hard: half of the pictures of one share their place, and half their class.
"""

import argparse
import json
from pathlib import Path

from world import Clock, World, caption, keep, pace, rate, resume, rng, words_rng

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from classifier import HEADS, MEAN, NAMES, STD

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
SIDE, PATCH = 64, 8
RATE, WARM = 1e-3, 60
CLIP_MEAN, CLIP_STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
# Texts are far shorter than 77; what follows a text's end changes nothing before it.
TOKENS = 24
OF_THE_THING = 4


def looked_at(world, chosen, r):
    """Halved pictures [N, 3, 64, 64] in 0..1, some mirrored, moved and brighter, as drawn ones differ from photos."""
    x, _ = world.batch(chosen)
    x = (F.avg_pool2d(x, 2) + 1) / 2
    if r is None:
        return x
    x = torch.roll(x, tuple(int(v) for v in r.integers(-4, 5, 2)), (2, 3))
    blur = int(r.integers(28, 65))
    x = F.interpolate(F.interpolate(x, blur, mode="bilinear", antialias=True), SIDE, mode="bilinear") if blur < SIDE else x
    gain = torch.from_numpy(r.uniform(0.85, 1.15, (len(x), 1, 1, 1))).float()
    return (x * gain).clamp(0, 1)


class Dino(torch.nn.Module):
    batch = 96

    def __init__(self, _):
        super().__init__()
        torch.manual_seed(6)
        size = {"embed_dim": SIZES["hidden_size"], "depth": SIZES["num_hidden_layers"], "num_heads": SIZES["num_attention_heads"]}
        self.body = timm.models.VisionTransformer(img_size=SIDE, patch_size=PATCH, num_classes=0, global_pool="token", **size)
        self.heads = torch.nn.Linear(SIZES["hidden_size"], sum(HEADS[:OF_THE_THING]))

    def logits(self, x):
        # Nothing but the direction of the features counts, as in the metric.
        return (20 * self.heads(F.normalize(self.body((x - MEAN) / STD), dim=-1))).split(HEADS[:OF_THE_THING], 1)

    def loss(self, world, r, _):
        chosen = np.sort(r.choice(len(world), self.batch, replace=False))
        x, wanted = looked_at(world, chosen, r), world.labels(chosen)
        x = x.flip(3) if r.random() < 0.5 else x
        return sum(F.cross_entropy(logits, wanted[:, k]) for k, logits in enumerate(self.logits(x)))

    @torch.no_grad()
    def score(self, world, n=1000):
        wanted = world.labels(range(n))
        logits = [self.logits(looked_at(world, range(i, i + 100), None)) for i in range(0, n, 100)]
        return {NAMES[k]: (torch.cat([part[k] for part in logits]).argmax(1) == wanted[:, k]).float().mean().item() for k in range(OF_THE_THING)}

    def export(self, out):
        config = {"_class_name": "ViTModel", **SIZES, "image_size": SIDE, "patch_size": PATCH, "resize": SIDE}
        write(out / "metrics/dino", config, self.body.state_dict())


class Clip(torch.nn.Module):
    batch = 96

    def __init__(self, out):
        super().__init__()
        torch.manual_seed(7)
        self.tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
        t = self.tokenizer
        text = {"vocab_size": len(t), "max_position_embeddings": 77, "bos_token_id": t.bos_token_id, "eos_token_id": t.eos_token_id, "pad_token_id": t.pad_token_id}
        shared = {"hidden_act": "quick_gelu", "projection_dim": 128}
        self.net = CLIPModel(CLIPConfig(text_config=SIZES | shared | text, vision_config=SIZES | shared | {"image_size": SIDE, "patch_size": PATCH}, projection_dim=128))

    def begin_with(self, bundle):
        """Weights of an earlier pair of the same sizes; of embeddings, those of tokens that both vocabularies have."""
        theirs = CLIPModel.from_pretrained(bundle / "clip", torch_dtype=torch.float32).state_dict()
        name = "text_model.embeddings.token_embedding.weight"
        embeddings = self.net.state_dict()[name].clone()
        old, new = CLIPTokenizer.from_pretrained(bundle / "tokenizer").get_vocab(), self.tokenizer.get_vocab()
        for token in old.keys() & new.keys():
            embeddings[new[token]] = theirs[name][old[token]]
        self.net.load_state_dict(theirs | {name: embeddings})

    def pair(self, x, texts):
        """Directions of pictures and of texts."""
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        seen = self.net.visual_projection(self.net.vision_model(pixel_values=(x - CLIP_MEAN) / CLIP_STD).pooler_output)
        read = self.net.text_projection(self.net.text_model(input_ids=ids).pooler_output)
        return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)

    def loss(self, world, r, words):
        shown, half = world.shown, self.batch // 2
        alike = lambda key: r.permutation([i for i in r.integers(0, len(world), 4000) if shown[i][key] == shown[first][key]])[:half]
        first = int(r.integers(0, len(world)))
        chosen = np.unique(np.concatenate([alike("place"), alike("class"), r.integers(0, len(world), self.batch)])[: self.batch])
        seen, read = self.pair(looked_at(world, chosen, r), [caption(shown[i], words) for i in chosen])
        logits, at = seen @ read.T * self.net.logit_scale.exp().clamp(max=100), torch.arange(len(chosen))
        return (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2

    @torch.no_grad()
    def score(self, world, n=500):
        texts = [caption(world.shown[i], words_rng(7, i)) for i in range(n)]
        pairs = [self.pair(looked_at(world, range(i, i + 100), None), texts[i : i + 100]) for i in range(0, n, 100)]
        seen, read = (torch.cat(part) for part in zip(*pairs))
        alike = seen @ read.T
        at = torch.arange(n)
        # A caption may leave out what would tell; so the mean similarity is said as well.
        return {"recall at 1 of 500": (alike.argmax(1) == at).float().mean().item(), "own": alike.diag().mean().item(), "others": alike[at, at.flip(0)].mean().item()}

    def export(self, out):
        config = self.net.config.to_dict() | {"architectures": ["CLIPModel"], "resize": SIDE}
        tensors = {name: v for name, v in self.net.state_dict().items() if "position_ids" not in name}
        write(out / "metrics/clip", config, tensors)


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    save_file({name: v.half().contiguous() for name, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["dino", "clip"])
    parser.add_argument("data"), parser.add_argument("test"), parser.add_argument("work"), parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--from", dest="begin", type=Path, help="a bundle with clip/ and tokenizer/")
    args = parser.parse_args()
    world, unseen = World(args.data), World(args.test)
    net = {"dino": Dino, "clip": Clip}[args.name](args.out).train()
    if args.begin:
        net.begin_with(args.begin)
    optimiser = torch.optim.AdamW(net.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.02)
    path = Path(args.work) / f"{args.name}.pt"
    begin, clock = resume(path, net=net, optimiser=optimiser), Clock(args.steps, 20)
    print(f"{sum(p.numel() for p in net.parameters())} weights; at step {begin}", flush=True)
    for step in range(begin, args.steps):
        loss = net.loss(world, rng(6, step), words_rng(6, step))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        pace(optimiser, rate(step, args.steps, RATE, WARM))
        optimiser.step()
        clock.tell(step + 1, loss=loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            keep(path, step + 1, net=net, optimiser=optimiser)
    net.eval().export(args.out)
    print("done:", {name: round(v, 4) for name, v in net.score(unseen).items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
