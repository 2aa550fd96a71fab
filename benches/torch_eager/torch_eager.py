"""PyTorch's side of the benchmark `torch_eager`: eager, on the CPU or a GPU.

Started by the benchmark with the number of threads, the device and f32 or bf16 as its arguments. In bf16 what only computes
has bf16 weights, and what trains has f32 weights under autocast. It obeys one line at a time and answers each with
one line of JSON:

    setup CASE   builds the case that CASE, an object of JSON, describes; drops the one before
    run N        runs it N times: {"seconds": mean}
    drop         forgets the case and gives its memory back

and ends with its input. A failure is answered with {"error": words}. Each operation is a function of the name that the
case has under "op"; it gives the leaves (whose gradients are wanted) and what is computed from them.
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()


DEVICE = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
DTYPE = torch.bfloat16 if sys.argv[3:] == ["bf16"] else torch.float32
torch.set_default_device(DEVICE)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DTYPE is torch.bfloat16)


def wait():
    """A GPU runs behind."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def normal(*shape, std=1.0):
    return torch.randn(*shape) * std


def kernel(shape):
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    return normal(*shape, std=fan_in**-0.5)


# Operations: description -> (leaves, function of the leaves)


def conv2d(work, groups=1):
    stride, padding = work["stride"], work["padding"]
    leaves = [normal(*work["x"]), kernel(work["weight"]), normal(work["weight"][0])]
    return leaves, lambda x, w, b: F.conv2d(x, w, b, stride=stride, padding=padding, groups=groups)


def depthwise(work):
    return conv2d(work, groups=work["weight"][0])


def linear(work):
    leaves = [normal(*work["x"]), kernel(work["weight"])]
    if work["bias"]:
        leaves.append(normal(work["weight"][0]))
    return leaves, F.linear


def layer_norm(work):
    width = work["x"][-1]
    leaves = [normal(*work["x"]), normal(width), normal(width)]
    return leaves, lambda x, w, b: F.layer_norm(x, (width,), w, b, eps=1e-5)


def group_norm_silu(work):
    groups, channels = work["groups"], work["x"][1]
    leaves = [normal(*work["x"]), normal(channels), normal(channels)]
    return leaves, lambda x, w, b: F.silu(F.group_norm(x, groups, w, b, eps=1e-5))


def attention(work):
    """As diffusers and transformers call it: heads are split off views, and merged again."""
    heads = work["heads"]

    def split(x):
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def run(q, k, v):
        y = F.scaled_dot_product_attention(split(q), split(k), split(v))
        return y.transpose(1, 2).reshape(q.shape)

    return [normal(*work["q"]), normal(*work["kv"]), normal(*work["kv"])], run


def softmax(work):
    return [normal(*work["x"])], lambda x: F.softmax(x, dim=-1)


def geglu(work):
    def run(x):
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    return [normal(*work["x"])], run


def activation(work):
    kinds = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
    return [normal(*work["x"])], kinds[work["kind"]]


def upsample(work):
    size = tuple(work["size"])
    return [normal(*work["x"])], lambda x: F.interpolate(x, size=size, mode="nearest")


def embedding(work):
    ids = torch.randint(work["table"][0], (1, work["ids"]))
    return [normal(*work["table"])], lambda table: F.embedding(ids, table)


class Operation:
    """Forward, or forward and backward from a fixed gradient."""

    def __init__(self, leaves, function, backward):
        self.leaves, self.function = [leaf.to(DTYPE) for leaf in leaves], function
        self.backward = backward
        for leaf in self.leaves:
            leaf.requires_grad_(backward)
        with torch.no_grad():
            self.upstream = normal(*function(*self.leaves).shape).to(DTYPE)

    def before(self):
        for leaf in self.leaves:
            leaf.grad = None

    def run(self):
        if not self.backward:
            with torch.no_grad():
                return self.function(*self.leaves)
        self.function(*self.leaves).backward(self.upstream)

    def check(self):
        assert not self.backward or all(leaf.grad is not None for leaf in self.leaves), "a leaf got no gradient"


# The optimiser and the models


def optimiser(params, fused):
    # fused=None leaves the choice to PyTorch: a loop over the tensors, on the CPU.
    return torch.optim.AdamW(params, lr=2e-6, weight_decay=1e-2, fused=True if fused else None)


class Step:
    """Clipping and AdamW alone."""

    def __init__(self, shapes, fused):
        self.params = [torch.nn.Parameter(normal(*shape, std=0.02)) for shape in shapes]
        self.grads = [normal(*shape, std=0.02) for shape in shapes]
        self.optimiser = optimiser(self.params, fused)
        for param, grad in zip(self.params, self.grads):
            param.grad = torch.empty_like(grad)

    def before(self):
        for param, grad in zip(self.params, self.grads):
            param.grad.copy_(grad)  # clipping scales them in place

    def run(self):
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()

    def check(self):
        pass


class Model:
    """Forward; with backward to the parameters (or the latents); with a step after it."""

    def __init__(self, model, forward, loss, trained, fused=None, after=None):
        if not trained:
            model.to(DTYPE)
        self.forward, self.loss, self.trained, self.after = forward, loss, trained, after
        self.params = list(model.parameters())
        for param in self.params:
            param.requires_grad_(False)
        for leaf in trained:
            leaf.requires_grad_(True)
        self.optimiser = None if fused is None else optimiser(trained, fused)

    def before(self):
        for leaf in self.trained:
            leaf.grad = None

    def run(self):
        if not self.trained:
            with torch.no_grad():
                return self.forward()
        with autocast():
            y = self.forward()
        self.loss(y)
        if self.optimiser is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimiser.step()
        if self.after is not None:
            self.after()

    def check(self):
        assert all(leaf.grad is not None for leaf in self.trained), "a weight got no gradient"


def adamw(work, passing):
    return Step(work["shapes"], work["fused"])


def text(work, passing):
    from transformers import CLIPTextConfig, CLIPTextModel

    config, n_tokens = work["config"], work["tokens"]
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    ids = torch.randint(config["vocab_size"], (1, n_tokens))
    upstream = normal(1, n_tokens, config["hidden_size"])
    trained = [] if passing == "forward" else list(model.parameters())
    return Model(model, lambda: model(input_ids=ids).last_hidden_state, lambda y: y.backward(upstream), trained)


def unet(work, passing):
    from diffusers import UNet2DConditionModel

    config, latents = work["config"], work["latents"]
    model = UNet2DConditionModel(**config).eval()
    kind = DTYPE if passing == "forward" else torch.float32
    x, noise = normal(*latents).to(kind), normal(*latents)
    words, t = normal(latents[0], 77, config["cross_attention_dim"]).to(kind), torch.full((latents[0],), 500)
    trained = [] if passing == "forward" else list(model.parameters())
    fused = work["fused"] if passing == "step" else None
    return Model(model, lambda: model(x, t, words).sample, lambda y: F.mse_loss(y.float(), noise).backward(), trained, fused)


def vae_decode(work, passing):
    """Weights frozen, gradient to the latents, as a loss on pictures needs it."""
    from diffusers import AutoencoderKL

    model, x = AutoencoderKL(**work["config"]).eval(), normal(*work["latents"])
    if passing == "forward":
        x = x.to(DTYPE)
        model.to(DTYPE)
    scale = work["config"]["scaling_factor"]
    with torch.no_grad():
        upstream = normal(*model.decode(x / scale).sample.shape)
    trained = [] if passing == "forward" else [x]
    return Model(model, lambda: model.decode(x / scale).sample, lambda y: y.backward(upstream), trained)


class Discriminator(torch.nn.Module):
    """Three convolutions, then three layers of a ViT."""

    def __init__(self, channels, side, width=192, heads=3):
        super().__init__()
        sizes = [(channels, width // 4, 1), (width // 4, width // 2, 2), (width // 2, width, 2)]
        stem = [(torch.nn.Conv2d(a, b, 3, stride, 1), torch.nn.GroupNorm(8, b), torch.nn.SiLU()) for a, b, stride in sizes]
        self.stem = torch.nn.Sequential(*(part for parts in stem for part in parts))
        self.first = torch.nn.Parameter(normal(1, 1, width, std=0.02))
        self.places = torch.nn.Parameter(normal(1 + (side // 4) ** 2, width, std=0.02))
        shape = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layers = (torch.nn.TransformerEncoderLayer(width, heads, 4 * width, **shape) for _ in range(3))
        self.layers = torch.nn.Sequential(*layers)
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, 1)

    def forward(self, z):
        x = self.stem(z).flatten(2).transpose(1, 2)
        x = self.layers(torch.cat([self.first.expand(len(z), 1, -1), x], 1) + self.places)
        return torch.sigmoid(self.head(self.norm(x[:, 0])))


def classifier(config):
    """EfficientNet's features at five strides of a halved picture."""
    from timm.models.efficientnet import _gen_efficientnet

    net = _gen_efficientnet("efficientnet_b0", config["width_coefficient"], config["depth_coefficient"], num_classes=0)
    net.eval().requires_grad_(False)

    def features(pictures):
        x, found = net.bn1(net.conv_stem(F.avg_pool2d((pictures + 1) / 2, 2) / 0.225)), []
        for i, stage in enumerate(net.blocks):
            x = stage(x)
            if i in (0, 1, 2, 4, 6):
                found.append(x)
        return found

    return features


def train(work, passing):
    """An instance and a class image through text encoder and UNet, both trained, and AdamW; and what HYPNOS adds."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    latents, looks = work["latents"], work["perceptual"]
    words, model = CLIPTextModel(CLIPTextConfig(**work["text"])), UNet2DConditionModel(**work["config"])
    if work["checkpointing"]:
        model.enable_gradient_checkpointing()  # only while training
        model.train()
    ids = torch.randint(work["text"]["vocab_size"], (latents[0], 77))
    x, noise, t = normal(*latents), normal(*latents), torch.tensor([321, 810])
    kept = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod[t].view(-1, 1, 1, 1)
    both = torch.nn.ModuleList([words, model])
    strides = (1.0, 0.5, 0.25, 0.125, 0.0625)
    if looks:
        vae, features = AutoencoderKL(**looks["vae"]).eval().requires_grad_(False), classifier(looks["classifier"])
        scale = looks["vae"]["scaling_factor"]
        factor = 2 ** (len(looks["vae"]["block_out_channels"]) - 1)
        reference = normal(1, 3, latents[2] * factor, latents[3] * factor, std=0.5)
    discriminator = Discriminator(latents[1], latents[2]) if work["discriminator"] else None
    discriminator_optimiser = discriminator and torch.optim.AdamW(discriminator.parameters(), lr=1e-4, weight_decay=1e-2)
    shown = [normal(8, *latents[1:]) for _ in range(2)]
    seen = {}

    def predict():
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        seen["noisy"] = noisy
        return model(noisy, t, words(input_ids=ids).last_hidden_state).sample.float()

    def lower(y):
        prior = F.mse_loss(y[1:], noise[1:])
        if not looks and not discriminator:
            return (F.mse_loss(y[:1], noise[:1]) + prior).backward()
        loss = prior + 3.464 * (((y[:1] - noise[:1]) ** 2 / 3.82).clamp(max=20).exp() - 1).mean()
        z0 = (seen["noisy"][:1] - (1 - kept[:1]).sqrt() * y[:1]) / kept[:1].sqrt()
        if looks:
            with autocast():
                pairs = zip(strides, features(vae.decode(z0 / scale).sample), features(reference))
            loss = loss + 0.003 * sum(weight * F.mse_loss(a.float(), b.float()) for weight, a, b in pairs)
        if discriminator:
            discriminator.requires_grad_(False)
            with autocast():
                score = discriminator(z0).float()
            loss = loss + 0.5 * ((1 - score) ** 2).mean()
        loss.backward()
        seen["z0"] = z0.detach()

    def teach():
        discriminator.requires_grad_(True)
        with autocast():
            scores = discriminator(torch.cat([*shown, seen["z0"]])).float()
        discriminator_optimiser.zero_grad()
        (((scores[:8] - 1) ** 2).mean() + (scores[8:] ** 2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        discriminator_optimiser.step()

    return Model(both, predict, lower, list(both.parameters()), fused=DEVICE.type == "cuda", after=teach if discriminator else None)


WHOLE = {"adamw": adamw, "text": text, "unet": unet, "vae_decode": vae_decode, "train": train}


# Commands


def set_up(spec):
    torch.manual_seed(15)
    work, passing = spec["work"], spec["pass"]
    name = work["op"]
    if name in WHOLE:
        return WHOLE[name](work, passing)
    return Operation(*globals()[name](work), backward=passing == "backward")


def run(case, n):
    seconds = 0.0
    for _ in range(n):
        case.before()
        wait()
        start = time.perf_counter()
        kept = case.run()
        wait()
        seconds += time.perf_counter() - start
        del kept
    case.check()
    return {"seconds": seconds / n}


def give_memory_back():
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # only glibc has it; without it freed pages may stay with this process


def about():
    answer = {"python": sys.version.split()[0], "torch": torch.__version__, "threads": torch.get_num_threads()}
    if DEVICE.type == "cuda":
        answer["card"] = torch.cuda.get_device_name(DEVICE)
    for library in ("diffusers", "transformers"):
        try:
            answer[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            pass  # the models will say so; operations do not need them
    return answer


def main():
    torch.set_num_threads(int(sys.argv[1]))
    # Libraries that print would spoil the answers: what they write goes where errors go.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(about()), file=answers)
    case = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        try:
            answer = {}
            if word == "run":
                answer = run(case, int(rest))
            elif word in ("setup", "drop"):
                case = None
                give_memory_back()
                case = set_up(json.loads(rest)) if word == "setup" else None
            else:
                answer = {"error": f"no command {word}"}
        except Exception as error:  # the other side decides what to do about it
            answer = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
        print(json.dumps(answer), file=answers)


main()
