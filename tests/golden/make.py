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
    data = save(tensors, {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()})
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
