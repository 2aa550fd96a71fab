"""Makes the goldens of the engine: what the reference implementations compute, written down once.

    pip install torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0
    python tests/golden/make.py            # all of them
    python tests/golden/make.py clip ops   # only these

Nothing is downloaded: every model is tiny, its weights are drawn here from fixed seeds. A second run on the same
machine writes the same bytes. The only input is `bundles/miniature/tokenizer`.

A `.safetensors` golden names its tensors `weight.<name in the state dict>`, `input.<case>.<what>`,
`output.<case>.<what>` and `grad.<case>.<name>`; all are f32 unless said otherwise (ids and timesteps of models: i64).
Its metadata are JSON texts: `versions` (of the packages), `config` (the model's config.json) and, where gradients are:
`zero`, per case the tensors whose gradient is zero but for rounding (in f64 its norm is under 1e-6 of the largest
one), and `rounding`, per case the largest |f32 - f64| / max |f64| over all other outputs and gradients - what the
reference itself owes to f32, so a test may ask for little more.
"""

import importlib.metadata
import json
import math
import os
import random
import sys
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
from transformers import CLIPTokenizer

HERE = Path(__file__).resolve().parent
BUNDLE = HERE.parents[1] / "bundles" / "miniature" / "tokenizer"
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
    """Text -> ids as a pipeline has them (`CLIPTokenizer.from_pretrained` of a bundle), with the miniature's 902 tokens.

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


def walk(scheduler, steps, noise, draws):
    """The latents after every call of the model, with classifier-free guidance of 7.5."""
    scheduler.set_timesteps(steps)
    drawn = iter(draws)
    euler_ancestral.randn_tensor = lambda *_, **__: next(drawn)
    x, seen = noise * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        uncond, cond = analytic(scaled, t, "uncond"), analytic(scaled, t, "cond")
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


def main(names):
    unknown = [name for name in names if name not in GOLDENS]
    if unknown:
        sys.exit(f"make.py: no golden {unknown[0]!r}; there are {', '.join(GOLDENS)}")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for name in names or GOLDENS:
        GOLDENS[name]()
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
