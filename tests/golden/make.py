"""Makes the goldens of the engine: what the reference implementations compute, written down once.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0
    python tests/golden/make.py            # all of them
    python tests/golden/make.py clip ops   # only these

Nothing is downloaded: every model is tiny, its weights are drawn here from fixed seeds. A second run on the same
machine writes the same bytes. The only input is `tests/bundle`.

A `.safetensors` golden names its tensors `weight.<name in the state dict>`, `input.<case>.<what>`,
`output.<case>.<what>` and `grad.<case>.<name>`; all are f32 unless said otherwise (ids and timesteps of models: i64).
Its metadata are JSON texts: `versions` (of the packages), `config` (the model's config.json) and, where gradients are:
`zero`, per case the tensors whose gradient is zero but for rounding (in f64 its norm is under 1e-6 of the largest
one), and `rounding`, per case the largest |f32 - f64| / max |f64| over all other outputs and gradients - what the
reference itself owes to f32, so a test may ask for little more.
"""

import copy
import importlib.metadata
import json
import math
import os
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

PINS = {
    "torch": "2.15.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
}


def check_pins():
    for package, wanted in PINS.items():
        try:
            found = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            sys.exit(f"make.py: {package} {found} is installed, {wanted} is wanted; see the head of this file")


check_pins()

import diffusers
import diffusers.schedulers.scheduling_euler_ancestral_discrete as euler_ancestral
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
MINIATURE = HERE.parents[1] / "bundles" / "miniature"
BUNDLE = HERE.parent / "bundle" / "tokenizer"
GOLDENS = {}


def golden(make):
    """Registers a golden under its function's name."""
    GOLDENS[make.__name__] = make
    return make


def write(name, tensors, **metadata):
    """Writes one safetensors file; the header is sorted, for the library leaves the order of metadata to chance."""
    metadata = {"versions": PINS} | metadata
    tensors = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    assert all(t.isfinite().all() for t in tensors.values()), name
    data = save(tensors, {key: json.dumps(value, sort_keys=True, allow_nan=False) for key, value in metadata.items()})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (HERE / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


# ---------------------------------------------------------------------------------------------------- tokenizer

PRODUCTS = "mug bottle sneaker backpack watch lamp chair teapot candle headphones soap jar wallet vase t-shirt".split()
PLACES = ["on a beach", "in a kitchen", "on white marble", "at night, neon light", "in the snow", "on a wooden table"]
STYLES = ["studio light", "4k", "85mm f/1.8", "bokeh", "top-down view", "product photo", "8K UHD", "golden hour"]
EMOJI = "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 🇹🇷🇯🇵 🏴󠁧󠁢󠁳󠁣󠁴󠁿 ❤️ ❤ ☕ ✨ 🧑🏿‍🚀 1️⃣ #️⃣ 🏳️‍🌈 👁️‍🗨️ ™️ 🫠 🤷🏻‍♀️ ⌚ ©".split()
WORDS = (
    "crème brûlée façade naïve Ångström Ünal Škoda Łódź Dvořák coração señor Øresund Þór æther cœur Nguyễn Việt "
    "Ærø Žižek Gdańsk tête-à-tête Zürich Übergröße İstanbul ısırgan DİYARBAKIR IĞDIR straße STRASSE GROẞ ﬁne ﬂow eﬃcient "
    "ŉ ǆ ǅ Ǆ ΐ ΰ ﬆ K Å Ω ſ ϐ Σίσυφος ΣΊΣΥΦΟΣ Οδυσσέας Ὀδυσσεύς Москва ЁЖИК Київ ѲЕОДОРЪ "
    "Ⅻ ⅷ ½ ² ① ㈱ ㎏ ﾊﾝｶｸ ＡＢＣ１２３ 東京タワー 陶瓷杯 白色背景 木の机の上 コーヒーカップ がぎぐ 한국어 머그컵 흰색 "
    "ققهوة فنجان مُحَمَّد ٱلْعَرَبِيَّة ۱۲۳ ١٢٣ كوب‌ها कॉफ़ी मग हिन्दी क्षत्रिय १२३ กาแฟ แก้ว ๔๕๖ ქართული ᲥᲐᲠᲗᲣᲚᲘ ᏣᎳᎩ Հայերեն "
    "עִבְרִית ספל አማርኛ ትግርኛ བོད་ཡིག বাংলা தமிழ் తెలుగు ಕನ್ನಡ မြန်မာ ខ្មែរ 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝟘𝟙𝟚 𐐀𐐨 𠀀𠮷 𓂀"
).split()
SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x20\x85\xa0\u1680\u180e\u2000\u2002\u2003\u2007\u2009\u200a\u200b\u200c\u200d\u2028"
SPACES += "\u2029\u202f\u205f\u2060\u3000\ufeff\xad"
UNASSIGNED = "\u0378\u0379\u0530\u05ff\ufffe\uffff\ue000\uf8ff\U0001fffe\U000e0080\U000f0000\U0010ffff\ufdd0\ufffd"
CONTRACTIONS = "'s 't 're 've 'm 'll 'd 'S 'LL 'Ve ’s 'x ''s 'sx 'mug s' 'lls 'r 'v".split()
SPECIALS = ["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|STARTOFTEXT|>", "<|endoftext|", "|endoftext|>", "<|", "|>"]


def assigned(rng, low, high):
    """A code point that has had its meaning for years (the tables of older Unicode versions agree), no surrogate."""
    while True:
        c = chr(rng.randrange(low, high))
        if unicodedata.category(c) not in ("Cn", "Cs", "Co"):
            return c


def prompt(rng):
    text = f"a photo of {rng.choice(['a', 'the', 'one', 'zwx', 'ohwx', 'sks'])} {rng.choice(PRODUCTS)} {rng.choice(PLACES)}"
    text += "".join(", " + rng.choice(STYLES) for _ in range(rng.randrange(3)))
    return rng.choice([text, text, text.upper(), text.title(), text + ".", f"  {text} "])


def strings():
    """The texts of the tokenizer goldens: every kind of trouble a prompt can bring, and plain prompts."""
    rng = random.Random(77)
    pick = lambda pool, low, high, by=" ": by.join(rng.choice(pool) for _ in range(rng.randrange(low, high)))
    every = lambda n, make: [make() for _ in range(n)]
    out = ["", " ", "   ", "\t\n", "\xa0", "\u3000", "\0", "a\0b", "\0\0", "_", "__", "a_b", "_a_", "...", "'", "''", "\u0301", "<"]
    out += every(330, lambda: prompt(rng))
    out += EMOJI + every(160, lambda: pick(EMOJI, 1, 5, rng.choice(["", " "])) + rng.choice(["", " mug", "x", "!"]))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        out += [unicodedata.normalize(form, word) for word in WORDS]
        out += every(60, lambda: unicodedata.normalize(form, pick(WORDS, 2, 5, rng.choice([" ", "", "-"]))))
    out += [word.upper() for word in WORDS] + [word.swapcase() for word in WORDS] + [word.lower() for word in WORDS]
    out += [form.format(chr(c)) for c in [*range(32), *range(127, 160)] for form in ("a{0}b", "{0}")]
    out += [form.format(c) for c in SPACES for form in ("a{0}b", "{0}a", "a {0} {0}b{0}", "!{0}!", "1{0}2", "é{0}\u0301")]
    out += [form.format(c) for c in CONTRACTIONS for form in ("it{0}", "it {0}", "{0}", "IT{0} IT", "9{0}", "it{0}{0}")]
    out += [form.format(c) for c in SPECIALS for form in ("{0}", "a {0} b", "a{0}b", "{0}{0}", " {0} ", "mug {0}.", "{0}\t{0}")]
    out += [form.format(c) for c in UNASSIGNED for form in ("{0}", "a{0}b", "mug {0}", "1{0}!")]
    marks = "\u0300\u0301\u0323\u0308\u0345\u0653\u093c\u0e38\u1dc4\u20dd\u20e3\u3099\ufe0f\u034f\u1161\u11a8"
    out += [form.format(c) for c in marks for form in ("{0}", "a{0}", " {0}b", "1{0}2", "{0}{0}", "a\u0323{0}c", "!{0}")]
    out += every(90, lambda: pick("0123456789.,/:-%$€ x²½", 1, 16, ""))
    out += every(130, lambda: pick("!?.,;:-_'\"()[]{}<|>/\\@#$%^&*+=~`«»„“…—–·•°§¶¿¡", 1, 12, rng.choice(["", "", " "])))
    out += every(100, lambda: pick("abcXYZ_019 '-.", 3, 24, ""))
    out += every(60, lambda: "".join(assigned(rng, 0x80, 0x2000) for _ in range(rng.randrange(1, 10))))
    out += every(60, lambda: "".join(assigned(rng, 0x2000, 0x10000) for _ in range(rng.randrange(1, 8))))
    out += every(40, lambda: "".join(assigned(rng, 0x10000, 0x1F800) for _ in range(rng.randrange(1, 8))))
    mixed = [*WORDS, *EMOJI, *PRODUCTS, *CONTRACTIONS, *SPECIALS[:2], *SPACES, *STYLES, *"_-.!7"]
    out += every(330, lambda: pick(mixed, 2, 9, rng.choice(["", " ", "  "])))
    out += every(25, lambda: ", ".join(prompt(rng) for _ in range(rng.randrange(4, 9)))) + ["a" * 3000, "a " * 90, "! " * 300]
    out += [word * 30 for word in ("東京", "é", "👍🏽", "mug ", "1")] + ["<|endoftext|>" * 80, " " * 500 + "x", "x" * 76, "é" * 37 + "xy"]
    out = list(dict.fromkeys(out))
    assert len(out) >= 2200, len(out)
    return out


def encode(tokenizer, text):
    """The ids up to the last that counts (begin and end are among them); the rest up to 77 is padding."""
    row = tokenizer(text, padding="max_length", max_length=77, truncation=True)
    count = sum(row["attention_mask"])
    assert len(row["input_ids"]) == 77 and row["attention_mask"] == [1] * count + [0] * (77 - count), text
    assert row["input_ids"][0] == tokenizer.bos_token_id and row["input_ids"][count - 1] == tokenizer.eos_token_id
    assert row["input_ids"][count:] == [tokenizer.pad_token_id] * (77 - count), text
    return row["input_ids"][:count]


def learn_merges(words, count):
    """Byte-pair merges learned from words (a dict: tuple of symbols -> how often); ties fall to the smaller pair."""
    words, merges, pairs, where = [[list(w), n] for w, n in sorted(words.items())], [], {}, {}

    def note(index, sign):
        symbols, times = words[index]
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] = pairs.get(pair, 0) + sign * times
            where.setdefault(pair, set()).add(index)

    for index in range(len(words)):
        note(index, 1)
    for _ in range(count):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for index in sorted(where.pop(best)):
            note(index, -1)
            old, new = words[index][0], []
            while old:
                joined = tuple(old[:2]) == best
                new.append("".join(best) if joined else old[0])
                old = old[2 if joined else 1 :]
            words[index][0] = new
            note(index, 1)
        pairs = {pair: n for pair, n in pairs.items() if n > 0}
    return merges


def lines(path, rows):
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows), encoding="ascii")


@golden
def tokenizer():
    """Text -> ids as a pipeline has them (`CLIPTokenizer.from_pretrained` of a bundle), with the 902 tokens of tests/bundle.

    `tokenizer.jsonl`, one `{"text", "count", "ids"}` a line: `ids` are the first `count` of 77, the rest is padding.
    """
    reference = CLIPTokenizer.from_pretrained(BUNDLE)
    rows = [(text, encode(reference, text)) for text in strings()]
    lines(HERE / "tokenizer.jsonl", [{"text": text, "count": len(ids), "ids": ids} for text, ids in rows])


@golden
def tokenizer_wide():
    """The same texts with 3,000 merges learned from them, so that merges run across the bytes of one character.

    `tokenizer_wide/ids.jsonl`: line n has the ids of line n of `tokenizer.jsonl`; beside it lies the vocabulary.
    """
    folder = HERE / "tokenizer_wide"
    folder.mkdir(exist_ok=True)
    backend = CLIPTokenizer.from_pretrained(BUNDLE).backend_tokenizer
    words = {}
    for text in strings():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            word = (*word[:-1], word[-1] + "</w>")
            words[word] = words.get(word, 0) + 1
    merges = learn_merges(words, 3000)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((BUNDLE / name).read_bytes())
    reference = CLIPTokenizer.from_pretrained(folder)
    lines(folder / "ids.jsonl", [encode(reference, text) for text in strings()])


@golden
def tokenizer_sd2():
    """Text -> ids with the settings that Stable Diffusion 2's tokenizer comes with: a text is filled up with `!`, id 0 there.

    `tokenizer_sd2.jsonl`: the first line has the two files of settings, which stand beside the test bundle's vocabulary; every
    other one is `{"text", "ids"}`, all 77 of them.
    """
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    mark = lambda text: {"content": text} | plain
    named = {"bos_token": mark("<|startoftext|>"), "eos_token": mark("<|endoftext|>"), "unk_token": mark("<|endoftext|>")}
    config = {name: {"__type": "AddedToken"} | token for name, token in named.items()}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    config |= {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}  # what the other file says, wins
    files = {"tokenizer_config.json": config, "special_tokens_map.json": named | {"pad_token": "!"}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("vocab.json", "merges.txt"):
            (folder / name).write_bytes((BUNDLE / name).read_bytes())
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        reference = CLIPTokenizer.from_pretrained(folder)
    texts = [text for i, text in enumerate(strings()) if "!" in text or i % 20 == 0]
    ids = lambda text: reference(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert ids("")[2:] == [reference.convert_tokens_to_ids("!")] * 75
    lines(HERE / "tokenizer_sd2.jsonl", [files, *({"text": text, "ids": ids(text)} for text in texts)])


# ----------------------------------------------------------------------------------------------------- samplers

SD15 = {  # as Stable Diffusion 1.5 comes: no `timestep_spacing`, so each scheduler class falls back to its own
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SCHEDULES = {
    "sd15": SD15,
    "sd15_v": SD15 | {"prediction_type": "v_prediction"},
    "ddim": {key: value for key, value in SD15.items() if key != "skip_prk_steps"}
    | {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"}
    | {"clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
    | {"rescale_betas_zero_snr": False},
    "sd2": SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},  # as 2.0 and 2.1 come for 768 pixels
}
SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
}
STEPS = [1, 2, 4, 7, 20, 25, 30, 50]
AFTER = [1, 2, 3, 10]
MODEL = {"uncond": (0.8, 0.3, 0.9), "cond": (0.7, -0.4, 1.0)}  # a, b, d of `analytic`


def analytic(x, t, which):
    """A stand-in for the UNet that takes one line in any language: d * tanh(a * x + sin(t / 100 + b))."""
    a, b, d = MODEL[which]
    return torch.tanh(a * x + math.sin(float(t) / 100 + b)) * d


def scheduler_of(schedule, sampler):
    """What `Sampler.from_config(pipe.scheduler.config)` makes of a pipeline with this scheduler_config.json."""
    own = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
    cls, extra = SAMPLERS[sampler]
    return cls.from_config(own.config, **extra)


def walk(scheduler, steps, noise, draws, model=analytic):
    """The latents after every call of the model, with classifier-free guidance of 7.5."""
    scheduler.set_timesteps(steps)
    drawn = iter(draws)
    euler_ancestral.randn_tensor = lambda *_, **__: next(drawn)
    x, seen = noise * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        uncond, cond = model(scaled, t, "uncond"), model(scaled, t, "cond")
        x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
        seen.append(x)
    return seen


@golden
def samplers():
    """Timesteps, sigmas and latents of every sampler, and the noising of training.

    Cases are `<schedule>.<sampler>`; metadata `config.<case>` is the sampler's whole config, `schedule.<schedule>` the
    scheduler_config.json it came from, `after` the counts of calls of the model at which `latents.20` was kept (the
    last is all of them: 20, but 21 for pndm), `model` says the formula. `euler_a` takes `input.draws[i]` at step i.
    """
    generator = torch.Generator().manual_seed(20)
    noise, draws = torch.randn(2, 4, 5, 6, generator=generator), torch.randn(20, 2, 4, 5, 6, generator=generator)
    tensors, metadata = {"input.noise": noise, "input.draws": draws}, {"after": {}, "guidance": 7.5}
    metadata["model"] = {"formula": "d * tanh(a * x + sin(t / 100 + b)), sin in f64, the rest in f32", "abd": MODEL}
    for schedule, config in SCHEDULES.items():
        metadata[f"schedule.{schedule}"] = config
        for sampler in SAMPLERS:
            case = f"{schedule}.{sampler}"
            for steps in STEPS:
                scheduler = scheduler_of(config, sampler)
                scheduler.set_timesteps(steps)
                tensors[f"output.{case}.timesteps.{steps}"] = scheduler.timesteps.float()
                if hasattr(scheduler, "sigmas"):
                    tensors[f"output.{case}.sigmas.{steps}"] = scheduler.sigmas.float()
                if steps <= 20:
                    seen = walk(scheduler, steps, noise, draws)
                    after = [*AFTER, len(seen)] if steps == 20 else [len(seen)]
                    tensors[f"output.{case}.latents.{steps}"] = torch.stack([seen[n - 1] for n in after])
            metadata["after"][case] = after
            plain = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
            plain.pop("lambda_min_clipped", None)  # minus infinity, which JSON cannot say
            metadata[f"config.{case}"] = plain
    write("samplers", tensors, **metadata)


@golden
def noising():
    """Training's half of the schedule: alphas_cumprod of each `beta_schedule`, add_noise and get_velocity of DDPM.

    Metadata `betas.<case>` has beta_schedule, beta_start and beta_end; t of row i of the batch is `input.t[i]` (i64).
    """
    generator = torch.Generator().manual_seed(21)
    x0, noise = (torch.randn(7, 4, 5, 6, generator=generator) for _ in range(2))
    t = torch.tensor([0, 1, 37, 321, 500, 998, 999])
    tensors, metadata = {"input.x0": x0, "input.noise": noise, "input.t": t}, {}
    cases = {"linear": ("linear", 0.0001, 0.02), "linear_sd": ("linear", 0.00085, 0.012)}
    cases |= {"scaled_linear": ("scaled_linear", 0.00085, 0.012), "squaredcos_cap_v2": ("squaredcos_cap_v2", 0.0001, 0.02)}
    for case, (name, start, end) in cases.items():
        betas = {"beta_schedule": name, "beta_start": start, "beta_end": end}
        metadata[f"betas.{case}"] = betas
        ddpm = diffusers.DDPMScheduler(num_train_timesteps=1000, **betas)
        tensors[f"output.{case}.alphas_cumprod"] = ddpm.alphas_cumprod
        tensors[f"output.{case}.noisy"] = ddpm.add_noise(x0, noise, t)
        tensors[f"output.{case}.velocity"] = ddpm.get_velocity(x0, noise, t)
    write("noising", tensors, **metadata)


# ------------------------------------------------------------------------------------------------------- models


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module, seed):
    """Draws every weight: norms about 1 +- 0.2, biases 0.2 wide, the rest by fan-in; nothing is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            drawn *= (parameter.shape[0] / parameter.numel()) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.2 * drawn.clamp(-2, 2)
        else:
            drawn *= 0.2
        parameter.data.copy_(drawn)
    return module.eval()


def gradients(loss, tensors):
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()))))


def in_both(run):
    """`run(dtype)` -> (outputs, gradients) in f32 and in f64: the f32 ones, the names of zeros, the rounding."""
    (outputs, grads), (outputs64, grads64) = run(torch.float32), run(torch.float64)
    outputs, outputs64 = ({name: out.detach() for name, out in of.items()} for of in (outputs, outputs64))
    largest = max(g.norm() for g in grads64.values())
    zero = sorted(name for name, g in grads64.items() if g.norm() < 1e-6 * largest)
    pairs = [(outputs[n], outputs64[n]) for n in outputs] + [(grads[n], grads64[n]) for n in grads if n not in zero]
    return outputs, grads, zero, max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


class Cases:
    """What the cases of one model collect on their way into one file."""

    def __init__(self, prefix, module):
        self.tensors = {f"weight.{prefix}{name}": p for name, p in module.named_parameters()}
        self.metadata = {"zero": {}, "rounding": {}}

    def add(self, case, inputs, run):
        outputs, grads, zero, rounding = in_both(run)
        self.tensors |= {f"input.{case}.{name}": value for name, value in inputs.items()}
        self.tensors |= {f"output.{case}.{name}": value for name, value in outputs.items()}
        self.tensors |= {f"grad.{case}.{name}": value for name, value in grads.items()}
        self.metadata["zero"][case], self.metadata["rounding"][case] = zero, rounding


def tiny_clip(seed, **config):
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | config
    ids = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63, "max_position_embeddings": 77}
    return fill(CLIPTextModel(CLIPTextConfig(**ids, **config)), seed)


def clip_golden(name, activation):
    model = tiny_clip(30, hidden_act=activation)
    cases = Cases("text_model.", model)
    for case, batch, length in (("b1", 1, 77), ("b3", 3, 77), ("short", 2, 9)):
        ids = torch.randint(0, 62, (batch, length), generator=torch.Generator().manual_seed(31 + batch))
        ids[:, 0], ids[:, length * 2 // 3 :] = 62, 63
        inputs = {"ids": ids, "target": normal(35 + batch, batch, length, 16)}

        def run(dtype):
            m = copy.deepcopy(model).to(dtype)
            out = m(input_ids=ids).last_hidden_state
            loss = F.mse_loss(out, inputs["target"].to(dtype))
            named = {f"text_model.{n}": p for n, p in m.named_parameters()}
            return {"last_hidden_state": out, "loss": loss}, gradients(loss, named)

        cases.add(case, inputs, run)
    write(name, cases.tensors, config=model.config.to_diff_dict(), **cases.metadata)


@golden
def clip():
    """CLIP's text encoder with quick_gelu: last_hidden_state and every gradient of mean((out - target)^2).

    Weights are named as in files (`text_model.` before what the module calls them). Ids (i64) repeat, so that the
    gradient of the embedding has to add up.
    """
    clip_golden("clip", "quick_gelu")


@golden
def clip_gelu():
    """The same with the erf gelu of Stable Diffusion 2's text encoder."""
    clip_golden("clip_gelu", "gelu")


UNET_CONFIGS = {
    "unet_sd15": {  # the shape of 1.x: four levels, two layers, one number of heads for all levels
        "block_out_channels": (8, 8, 8, 12),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    },
    "unet_list": {  # three levels, heads per level, linear projections
        "block_out_channels": (8, 12, 8),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "attention_head_dim": [2, 3, 4],
        "cross_attention_dim": 16,
        "use_linear_projection": True,
    },
    "unet_sd2": {  # the shape of 2.x: heads of one width, linear projections
        "block_out_channels": (8, 8, 8, 12),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": [1, 2, 4, 3],
        "cross_attention_dim": 16,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "unet_odd": {  # sizes that do not halve (the up path is told them), and the switches that 1.x leaves alone
        "block_out_channels": (8, 8, 12),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "act_fn": "gelu",
        "norm_eps": 1e-3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


def tiny_unet(name, seed):
    config = {"norm_num_groups": 4, "in_channels": 4, "out_channels": 4, "sample_size": 8} | UNET_CONFIGS[name]
    return fill(diffusers.UNet2DConditionModel(**config), seed)


def unet_golden(name, shapes):
    """`shapes`: per case the height and width of the latents, the tokens of the text, the timesteps of the batch."""
    model = tiny_unet(name, 40)
    cases = Cases("", model)
    for seed, (case, (height, width, tokens, timesteps)) in enumerate(shapes.items(), 41):
        batch, t = len(timesteps), torch.tensor(timesteps)
        inputs = {
            "latents": normal(seed, batch, 4, height, width),
            "text": normal(seed + 10, batch, tokens, model.config.cross_attention_dim),
            "noise": normal(seed + 20, batch, 4, height, width),
        }

        def run(dtype):
            m = copy.deepcopy(model).to(dtype)
            x = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
            out = m(x["latents"], t, encoder_hidden_states=x["text"]).sample
            loss = F.mse_loss(out, x["noise"])
            wanted = dict(m.named_parameters()) | {f"input.{name}": x[name] for name in ("latents", "text")}
            return {"noise": out, "loss": loss}, gradients(loss, wanted)

        cases.add(case, inputs | {"t": t}, run)
    write(name, cases.tensors, config=json.loads(model.to_json_string()), **cases.metadata)


@golden
def unet_sd15():
    """UNet of 1.x's build: output, every weight's gradient of mean((out - noise)^2), and those of latents and text."""
    unet_golden("unet_sd15", {"b1": (8, 16, 77, [417]), "b3": (16, 8, 9, [999, 37, 500])})


@golden
def unet_list():
    """UNet with three levels, one layer each, a list of head counts and linear projections."""
    unet_golden("unet_list", {"b1": (8, 8, 77, [0]), "b3": (8, 12, 5, [999, 37, 500])})


@golden
def unet_sd2():
    """UNet of 2.x's build."""
    unet_golden("unet_sd2", {"b2": (12, 8, 77, [999, 250])})


@golden
def unet_odd():
    """UNet at sizes that do not halve, with gelu, another eps, cos after sin, a frequency shift, attention below."""
    unet_golden("unet_odd", {"b1": (9, 7, 6, [1]), "b3": (13, 10, 9, [999, 37, 500])})


VAE_CONFIGS = {
    "vae": {"block_out_channels": (8, 8, 12), "layers_per_block": 1},
    "vae8": {"block_out_channels": (8, 8, 12, 12), "layers_per_block": 2},  # the factor of 8 that 1.x has
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tiny_vae(name, seed):
    levels = len(VAE_CONFIGS[name]["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    config = {"norm_num_groups": 4, "latent_channels": 4, "sample_size": 16, "scaling_factor": 0.4} | blocks
    return fill(diffusers.AutoencoderKL(**config | VAE_CONFIGS[name]), seed)


def vae_golden(name, sizes):
    """`sizes`: per case the batch, and height and width of the images; decode takes latents of its own."""
    model = tiny_vae(name, 70)
    cases, factor = Cases("", model), 2 ** (len(model.config.block_out_channels) - 1)
    for seed, (case, (batch, height, width)) in enumerate(sizes.items(), 71):
        inputs = {
            "image": normal(seed, batch, 3, height, width) / 2,
            "z": normal(seed + 10, batch, 4, -(-height // factor), -(-width // factor)),
        }
        inputs["w"] = normal(seed + 20, batch, 3, *(side * factor for side in inputs["z"].shape[2:]))

        def run(dtype):
            m = copy.deepcopy(model).to(dtype)
            posterior = m.encode(inputs["image"].to(dtype)).latent_dist
            z = inputs["z"].to(dtype).requires_grad_()
            image = m.decode(z).sample
            grads = gradients((image * inputs["w"].to(dtype)).sum(), {"input.z": z})
            return {"mean": posterior.mean, "logvar": posterior.logvar, "image": image}, grads

        cases.add(case, inputs, run)
    write(name, cases.tensors, config=json.loads(model.to_json_string()), **cases.metadata)


@golden
def vae():
    """AutoencoderKL, factor 4: encode (mean and logvar), decode, and the gradient of sum(decode(z) * w) at z.

    Neither way is scaled by `scaling_factor`. `uneven` has sides no level halves; b2 has several images.
    """
    vae_golden("vae", {"b1": (1, 20, 28), "b2": (2, 16, 24), "uneven": (1, 19, 22)})


@golden
def vae8():
    """The same with four levels of two layers, factor 8."""
    vae_golden("vae8", {"b1": (1, 24, 40), "b2": (2, 16, 24)})


@golden
def vae_old_names():
    """The weights of `vae` as files from before diffusers 0.17 name them: query, key, value, proj_attn. No cases."""
    model = tiny_vae("vae", 70)
    tensors = {}
    for name, parameter in model.named_parameters():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
        tensors[f"weight.{name}"] = parameter
    write("vae_old_names", tensors, config=json.loads(model.to_json_string()))


# --------------------------------------------------------------------------------------------------- whole step

AFTER_STEP = [
    "text.text_model.embeddings.token_embedding.weight",
    "text.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text.text_model.final_layer_norm.bias",
    "unet.conv_in.weight",
    "unet.time_embedding.linear_1.weight",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "unet.mid_block.resnets.0.conv1.weight",
    "unet.up_blocks.1.upsamplers.0.conv.weight",
    "unet.conv_norm_out.weight",
    "unet.conv_out.bias",
]


SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def target_and_guess(prediction, kept, latents, noise, noisy, predicted, t):
    """What the UNet should have said, and what its answer says the first row's latents are. Checked against diffusers in f32."""
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    if prediction == "epsilon":
        target, guess = noise, (noisy[:1] - sigma[:1] * predicted[:1]) / alpha[:1]
    else:
        target, guess = alpha * noise - sigma * latents, alpha[:1] * noisy[:1] - sigma[:1] * predicted[:1]
    if predicted.dtype == torch.float32:
        ddpm = diffusers.DDPMScheduler(prediction_type=prediction, **SCALED_LINEAR)
        ddim = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False, **SCALED_LINEAR)
        ddim.set_timesteps(1000)
        implied = ddim.step(predicted[:1], t[0], noisy[:1]).pred_original_sample
        assert torch.allclose(guess, implied, rtol=1e-4, atol=1e-4)
        assert prediction == "epsilon" or torch.allclose(target, ddpm.get_velocity(latents, noise, t), atol=1e-6)
    return target, guess


def losses(text, unet, vae, inputs, dtype, prediction="epsilon"):
    """Loss a: noise of the instance + noise of the class. Loss b: a + 0.1 * the decoded guess against a picture."""
    ddpm = diffusers.DDPMScheduler(**SCALED_LINEAR)
    kept = ddpm.alphas_cumprod.to(dtype)[inputs["t"]].view(-1, 1, 1, 1)
    x = {name: value if name in ("ids", "t") else value.to(dtype) for name, value in inputs.items()}
    noisy = kept.sqrt() * x["latents"] + (1 - kept).sqrt() * x["noise"]
    if dtype == torch.float32:
        assert torch.allclose(noisy, ddpm.add_noise(x["latents"], x["noise"], x["t"]), atol=1e-6)
    predicted = unet(noisy, x["t"], encoder_hidden_states=text(input_ids=x["ids"]).last_hidden_state).sample
    target, guess = target_and_guess(prediction, kept, x["latents"], x["noise"], noisy, predicted, x["t"])
    instance, prior = ((predicted - target) ** 2).mean(dim=(1, 2, 3))
    image = vae.decode(guess / vae.config.scaling_factor).sample
    a = instance + 1.0 * prior
    return {"a": a, "b": a + 0.1 * F.mse_loss(image, x["target"]), "noisy": noisy, "predicted": predicted, "image": image}


@golden
def step():
    """Training's whole chain, text encoder -> UNet -> losses, with the gradients of both models under both losses.

    Row 0 of the batch is the instance, row 1 the class; x_t comes of the scaled_linear schedule; z0_hat of loss b is
    (x_t - sqrt(1 - abar) * eps) / sqrt(abar), decoded after division by scaling_factor with the frozen VAE, and
    compared by mean square with `input.all.target`. Weights, gradients: `unet.`, `text.`, `vae.` + name. Then AdamW
    twice on loss a, gradients clipped to a total norm of 1: `output.all.norm.<1|2>` is that norm before clipping,
    `output.all.after.<1|2>.<name>` a few weights after (a gradient near zero may still move a weight by lr).
    """
    text, unet, vae = tiny_clip(80, hidden_act="quick_gelu"), tiny_unet("unet_list", 81), tiny_vae("vae", 70)
    cases = Cases("unet.", unet)
    cases.tensors |= Cases("text.text_model.", text).tensors | Cases("vae.", vae).tensors
    ids = torch.randint(0, 62, (2, 77), generator=torch.Generator().manual_seed(82))
    ids[:, 0], ids[0, 9:], ids[1, 6:] = 62, 63, 63
    inputs = {"ids": ids, "t": torch.tensor([321, 810]), "latents": normal(83, 2, 4, 8, 8)}
    inputs |= {"noise": normal(84, 2, 4, 8, 8), "target": 6 + normal(85, 1, 3, 32, 32)}  # far off, so that b is not a

    def run(dtype):
        t, u, v = (copy.deepcopy(model).to(dtype) for model in (text, unet, vae))
        wanted = {f"unet.{n}": p for n, p in u.named_parameters()}
        wanted |= {f"text.text_model.{n}": p for n, p in t.named_parameters()}
        outputs, grads = losses(t, u, v, inputs, dtype), {}
        for name in "ab":
            found = torch.autograd.grad(outputs[name], list(wanted.values()), retain_graph=True)
            grads |= {f"{name}.{key}": grad for key, grad in zip(wanted, found)}
        adam = torch.optim.AdamW(wanted.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, foreach=False)
        for count in (1, 2):
            adam.zero_grad()
            losses(t, u, v, inputs, dtype)["a"].backward()
            outputs[f"norm.{count}"] = torch.nn.utils.clip_grad_norm_(wanted.values(), 1.0, foreach=False)
            adam.step()
            outputs |= {f"after.{count}.{name}": wanted[name].detach().clone() for name in AFTER_STEP}
        return outputs, grads

    cases.add("all", inputs, run)
    configs = {"text": text.config.to_diff_dict()} | {n: json.loads(m.to_json_string()) for n, m in (("unet", unet), ("vae", vae))}
    adamw = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2, "max_norm": 1.0}
    write("step", cases.tensors, config=configs, adamw=adamw, **cases.metadata)


@golden
def step_v():
    """The same for a model that predicts v: what it is to say is v = sqrt(abar) noise - sqrt(1 - abar) latents, and z0_hat of loss b
    is sqrt(abar) x_t - sqrt(1 - abar) v.

    UNet, autoencoder and the text encoder's weights are those of `step`; the latter computes with the erf gelu of Stable
    Diffusion 2. What diffusers' train_dreambooth.py does where `prediction_type` is `v_prediction`.
    """
    text, unet, vae = tiny_clip(80, hidden_act="gelu"), tiny_unet("unet_list", 81), tiny_vae("vae", 70)
    ids = torch.randint(0, 62, (2, 77), generator=torch.Generator().manual_seed(86))
    ids[:, 0], ids[0, 7:], ids[1, 9:] = 62, 63, 63
    inputs = {"ids": ids, "t": torch.tensor([702, 55]), "latents": normal(87, 2, 4, 8, 8)}
    inputs |= {"noise": normal(88, 2, 4, 8, 8), "target": 6 + normal(89, 1, 3, 32, 32)}

    def run(dtype):
        t, u, v = (copy.deepcopy(model).to(dtype) for model in (text, unet, vae))
        wanted = {f"unet.{n}": p for n, p in u.named_parameters()}
        wanted |= {f"text.text_model.{n}": p for n, p in t.named_parameters()}
        outputs, grads = losses(t, u, v, inputs, dtype, "v_prediction"), {}
        for name in "ab":
            found = torch.autograd.grad(outputs[name], list(wanted.values()), retain_graph=True)
            grads |= {f"{name}.{key}": grad for key, grad in zip(wanted, found)}
        return outputs, grads

    cases = Cases("", torch.nn.Module())
    cases.add("all", inputs, run)
    write("step_v", cases.tensors, config={"text": text.config.to_diff_dict()}, **cases.metadata)


@golden
def dreambooth_loop():
    """Three whole steps of DreamBooth: both models of `step`, whose weights they begin with, by AdamW, clipped to 1.

    Step k takes row k of `input.loop.<latents|noise|t>` (an instance and a class image each); `input.loop.ids` are the
    same for all. The class image counts half. `output.loop.loss` and `norm` (before clipping) have one number for each
    step, `output.loop.after.<name>` is a weight after the last. A gradient near zero moves a weight by lr whichever way
    its rounding points: weights where torch in f32 and in f64 end up more than 1e-5 apart (of the largest element) are
    left out and listed as `unsteady`.
    """
    text, unet = tiny_clip(80, hidden_act="quick_gelu"), tiny_unet("unet_list", 81)
    ids = torch.randint(0, 62, (2, 77), generator=torch.Generator().manual_seed(92))
    ids[:, 0], ids[0, 8:], ids[1, 5:] = 62, 63, 63
    inputs = {"ids": ids, "t": torch.tensor([[871, 40], [12, 555], [333, 998]])}
    inputs |= {"latents": normal(93, 3, 2, 4, 8, 8), "noise": normal(94, 3, 2, 4, 8, 8)}
    prior, settings = 0.5, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

    def run(dtype):
        t, u = copy.deepcopy(text).to(dtype), copy.deepcopy(unet).to(dtype)
        trained = {f"text.text_model.{n}": p for n, p in t.named_parameters()} | {f"unet.{n}": p for n, p in u.named_parameters()}
        ddpm = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        adam, seen = torch.optim.AdamW(trained.values(), foreach=False, **settings), {"loss": [], "norm": []}
        for latents, noise, steps in zip(inputs["latents"].to(dtype), inputs["noise"].to(dtype), inputs["t"]):
            kept = ddpm.alphas_cumprod.to(dtype)[steps].view(-1, 1, 1, 1)
            noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
            predicted = u(noisy, steps, encoder_hidden_states=t(input_ids=ids).last_hidden_state).sample
            instance, of_class = ((predicted - noise) ** 2).mean(dim=(1, 2, 3))
            loss = instance + prior * of_class
            adam.zero_grad()
            loss.backward()
            seen["loss"].append(loss.detach())
            seen["norm"].append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0, foreach=False))
            adam.step()
        after = {f"after.{name}": p.detach() for name, p in trained.items()}
        return {name: torch.stack(values) for name, values in seen.items()} | after

    out, exact = run(torch.float32), run(torch.float64)
    apart = {name: float((out[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in out}
    unsteady = sorted(name for name in out if apart[name] > 1e-5)
    assert not {"loss", "norm"} & set(unsteady) and len(unsteady) < len(out) / 2, (len(unsteady), len(out))
    tensors = {f"input.loop.{name}": value for name, value in inputs.items()}
    tensors |= {f"output.loop.{name}": value for name, value in out.items() if name not in unsteady}
    write("dreambooth_loop", tensors, settings=settings | {"max_norm": 1.0, "prior": prior}, unsteady=unsteady)


# ---------------------------------------------------------------------------------------------------------- ops


def conv_cases():
    """case -> (shapes of x, weight, bias; settings), over the kernels, strides and sides in use."""
    odd, even = (2, 5, 9, 7), (2, 5, 8, 6)
    dense = lambda k: {"weight": (6, 5, k, k), "bias": (6,)}
    depthwise = lambda k: {"weight": (5, 1, k, k), "bias": (5,)}
    plan = {"conv3": (odd, dense(3), 1, 1, 1), "conv1": (odd, dense(1), 1, 0, 1), "conv5": (odd, dense(5), 1, 2, 1)}
    plan |= {"conv3_s2": (odd, dense(3), 2, 1, 1), "conv3_s2_even": (even, dense(3), 2, 1, 1), "conv5_s2": (odd, dense(5), 2, 2, 1)}
    plan |= {"conv3_s2_asym": (odd, dense(3), 2, [0, 1, 0, 1], 1), "conv3_s2_asym_even": (even, dense(3), 2, [0, 1, 0, 1], 1)}
    plan["conv3_nobias"] = (even, {"weight": (6, 5, 3, 3)}, 1, 1, 1)
    plan["conv3_wide"] = ((3, 4, 3, 21), {"weight": (9, 4, 3, 3), "bias": (9,)}, 1, 1, 1)
    for k in (3, 5):
        for stride in (1, 2):
            plan[f"depthwise{k}_s{stride}"] = (odd, depthwise(k), stride, k // 2, 5)
    for case, (x, weights, stride, padding, groups) in plan.items():
        yield case, {"x": x} | weights, {"stride": stride, "padding": padding, "groups": groups}


def conv(x, weight, bias=None, *, stride, padding, groups):
    if isinstance(padding, list):  # left, right, top, bottom
        x, padding = F.pad(x, padding), 0
    return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)


def geglu(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def group_norm(x, weight, bias, *, groups, eps, silu):
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


def op_cases():
    """case -> (shapes of the inputs, settings, function)"""
    for case, shapes, settings in conv_cases():
        yield case, shapes, settings, conv
    qkv = lambda queries, keys: {"q": (3, 2, queries, 4), "k": (3, 2, keys, 4), "v": (3, 2, keys, 4)}
    attention = lambda q, k, v, *, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    upsample = lambda x, *, size: F.interpolate(x, size=tuple(size), mode="nearest")
    channels = {"x": (2, 8, 5, 3), "weight": (8,), "bias": (8,)}
    yield "linear", {"x": (2, 5, 6), "weight": (7, 6), "bias": (7,)}, {}, F.linear
    yield "linear_flat", {"x": (3, 6), "weight": (4, 6)}, {}, F.linear
    yield "layer_norm", {"x": (2, 5, 12), "weight": (12,), "bias": (12,)}, {"eps": 1e-5}, (
        lambda x, weight, bias, *, eps: F.layer_norm(x, (12,), weight, bias, eps)
    )
    yield "group_norm", channels, {"groups": 4, "eps": 1e-6, "silu": False}, group_norm
    yield "group_norm_silu", channels, {"groups": 2, "eps": 1e-5, "silu": True}, group_norm
    yield "softmax", {"x": (2, 3, 7)}, {"scale": 8.0}, lambda x, *, scale: F.softmax(x * scale, dim=-1)
    yield "attention_self", qkv(7, 7), {"causal": False}, attention
    yield "attention_cross", qkv(10, 5), {"causal": False}, attention
    yield "attention_causal", qkv(7, 7), {"causal": True}, attention
    yield "geglu", {"x": (2, 5, 12)}, {}, geglu
    yield "gelu", {"x": (4, 40)}, {}, lambda x: F.gelu(3 * x)
    yield "quick_gelu", {"x": (4, 40)}, {}, lambda x: 3 * x * torch.sigmoid(1.702 * 3 * x)
    yield "silu", {"x": (4, 40)}, {}, lambda x: F.silu(3 * x)
    for case, size in {"upsample_double": [10, 8], "upsample_odd": [9, 7], "upsample_uneven": [10, 7]}.items():
        yield case, {"x": (2, 3, 5, 4)}, {"size": size}, upsample


def adamw_case(tensors, metadata):
    """Five steps over three tensors with given gradients, the total norm clipped to 1 (steps 2 and 4 lie below it)."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    parameters = {f"p{i}": normal(95 + i, *shape).requires_grad_() for i, shape in enumerate([(4, 5), (7,), (2, 3, 3, 3)])}
    scale = torch.tensor([1.0, 0.02, 3.0, 0.05, 0.5])
    grads = {n: normal(98 + i, 5, *p.shape) * scale.view(5, *[1] * p.dim()) for i, (n, p) in enumerate(parameters.items())}
    tensors |= {f"input.adamw.{n}": p.detach().clone() for n, p in parameters.items()}
    tensors |= {f"input.adamw.grad_{n}": g for n, g in grads.items()}
    adam, seen = torch.optim.AdamW(parameters.values(), foreach=False, **settings), {"norm": []} | {n: [] for n in parameters}
    for index in range(5):
        for name, parameter in parameters.items():
            parameter.grad = grads[name][index].clone()
        seen["norm"].append(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0, foreach=False))
        adam.step()
        for name, parameter in parameters.items():
            seen[name].append(parameter.detach().clone())
    tensors |= {f"output.adamw.{name}": torch.stack(values) for name, values in seen.items()}
    metadata["settings"]["adamw"] = settings | {"max_norm": 1.0}


@golden
def ops():
    """Each op by itself: `output.<case>.out`, and for every input x the gradient of sum(out * w) as `grad.<case>.<x>`.

    Metadata `settings.<case>` has strides and the like; a list for `padding` is left, right, top, bottom. gelu,
    quick_gelu and silu are of 3 * x, softmax of scale * x (so are their gradients at x). `adamw` has no gradients:
    `input.adamw.grad_p<i>[n]` goes in at step n, `output.adamw.p<i>[n]` and `norm[n]` (before clipping) come out.
    """
    cases = Cases("", torch.nn.Module())
    cases.metadata["settings"] = {}
    for number, (case, shapes, settings, function) in enumerate(op_cases()):
        inputs = {name: normal(1000 + 10 * number + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
        w = normal(1009 + 10 * number, *function(*inputs.values(), **settings).shape)

        def run(dtype):
            leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
            out = function(*leaves.values(), **settings)
            return {"out": out}, gradients((out * w.to(dtype)).sum(), leaves)

        cases.add(case, inputs | {"w": w}, run)
        cases.metadata["settings"][case] = settings
    ids, table, w = torch.tensor([[3, 1, 3, 0, 9, 3, 1], [0, 9, 9, 9, 2, 4, 3]]), normal(90, 10, 4), normal(91, 2, 7, 4)
    table.requires_grad_()
    cases.tensors |= {"input.embedding.ids": ids, "input.embedding.table": table, "input.embedding.w": w}
    cases.tensors["output.embedding.out"] = F.embedding(ids, table)
    cases.tensors |= {"grad.embedding.table": torch.autograd.grad((F.embedding(ids, table) * w).sum(), table)[0]}
    adamw_case(cases.tensors, cases.metadata)
    write("ops", cases.tensors, **cases.metadata)


# ---------------------------------------------------------------------------------------------------- pictures


@golden
@torch.no_grad()
def pictures():
    """Two pictures of the miniature by every sampler, 20 steps: words to latents to pixels, nothing left out.

    `input.noise` [2,4,16,16], `input.draws` for euler_a; per sampler `output.<sampler>.latents`, and for ddim
    `output.ddim.image` [2,3,64,64], signed. Metadata: `prompts`, `negatives`.
    """
    text = CLIPTextModel.from_pretrained(MINIATURE / "text_encoder", dtype=torch.float32).eval()
    unet = diffusers.UNet2DConditionModel.from_pretrained(MINIATURE / "unet", torch_dtype=torch.float32).eval()
    vae = diffusers.AutoencoderKL.from_pretrained(MINIATURE / "vae", torch_dtype=torch.float32).eval()
    words = CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    prompts = ["a photo of a red mug, blue background", "a painting of a green chair on a wooden table"]
    negatives = ["", "blurry, dark"]
    schedule = json.loads((MINIATURE / "scheduler" / "scheduler_config.json").read_text())

    def states(texts):
        ids = words(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return text(ids).last_hidden_state

    conditions = {"uncond": states(negatives), "cond": states(prompts)}
    generator = torch.Generator().manual_seed(30)
    noise, draws = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(20, 2, 4, 16, 16, generator=generator)
    tensors = {"input.noise": noise, "input.draws": draws}
    for sampler in SAMPLERS:
        predict = lambda x, t, which: unet(x, t, conditions[which]).sample
        latents = walk(scheduler_of(schedule, sampler), 20, noise, draws, predict)[-1]
        tensors[f"output.{sampler}.latents"] = latents
        if sampler == "ddim":
            tensors["output.ddim.image"] = vae.decode(latents / vae.config.scaling_factor).sample
    write("pictures", tensors, prompts=prompts, negatives=negatives)


def main(names):
    unknown = [name for name in names if name not in GOLDENS]
    if unknown:
        sys.exit(f"make.py: no golden {unknown[0]!r}; there are {', '.join(GOLDENS)}")
    if not (BUNDLE / "vocab.json").is_file():
        sys.exit(f"make.py: {BUNDLE} has no vocab.json; the tokenizer goldens start from the test bundle's")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    for name in names or GOLDENS:
        GOLDENS[name]()
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
