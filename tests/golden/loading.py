"""What the readers of the reference accept and refuse: safetensors headers, tokenizers, whole directories.

    python tests/golden/loading.py              # the committed cases: loading/{headers,tokenizers,bundles}.jsonl
    python tests/golden/loading.py --all DIR    # many more of the same kind, into DIR/loading
    HYPNOS_GOLDENS=DIR cargo nextest run -E 'test(/^loading::/)'

The packages are make.py's. Cases are drawn from fixed seeds; a row has what makes a case, and what the reference says of
it. The tests in `tests/it/loading.rs` make the same files and ask Hypnos.

headers: `length` (announced; null: there is none), `header` (one character a byte), `spaces` behind it, `zeros` behind those;
`loads`, by safetensors.

tokenizers: the first row has the `texts`. Then `form` of the vocabulary, which is that of `tests/bundle`: `files`, `strings` or
`pairs` (merges in tokenizer.json), `both`; `sections` of tokenizer.json; `files`, name to text; `size`, one more than the largest
id; `ids` of each text; both null if transformers raises. `unnumbered`: start, end or padding is in no vocabulary and no list of
added tokens.

bundles: the first row has the files of the base, whose weights are `filled()`; then `edits` (see `EDITS`), the `variant` that
diffusers is asked for, and the `sums` of each part's weights; null if it does not load. It loads if every weight that the
pipeline has came from the files and it draws. `ours`: whether Hypnos loads it, where that is on purpose something else, and
`why`.
"""

import argparse
import json
import math
import random
import shutil
import struct
import sys
import tempfile
from pathlib import Path

from make import HERE, lines

import diffusers
import safetensors
import safetensors.torch
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY = HERE.parent / "bundle" / "tokenizer"

# ------------------------------------------------------------------------------------------------------ headers

DTYPES = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
DTYPES |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
NAMES = ["a", "b.weight", "", " ", "\u00e9", "\u6771", "\U0001f600", 'q"uote', "back\\slash", "new\nline", "__metadata", "a/b", "x" * 60]


def entries(rng):
    """Tensors that fill their data without a gap: name -> entry, and the bytes of data."""
    names, out, at = rng.sample(NAMES, rng.randrange(5)), [], 0
    for name in names:
        dtype = rng.choice(list(DTYPES) + ["F32", "F16", "BF16"] * 6)
        shape = [rng.choice([0, 1, 1, 2, 3, 4, 8]) for _ in range(rng.randrange(5))]
        size = DTYPES[dtype]
        for side in shape:
            size *= side
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size // 8]}
        keys = rng.sample(list(entry), 3)
        out.append([name, {key: entry[key] for key in keys}])
        at += size // 8
    rng.shuffle(out)
    return out, at


def dump(pairs, rng):
    """JSON of pairs, which may have a key twice."""
    indent = rng.choice([(",", ":"), (", ", ": "), (",\n", ":"), (" ,\t", " : ")])
    text = lambda value: json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=indent)
    return "{" + indent[0].join(f"{text(key)}{indent[1]}{text(value)}" for key, value in pairs) + "}"


def spoil_pairs(pairs, rng):
    """One thing wrong with one of the entries, or odd and right."""
    i = rng.randrange(len(pairs))
    name, entry = pairs[i][0], dict(pairs[i][1]) if isinstance(pairs[i][1], dict) else pairs[i][1]
    kind = rng.randrange(13)
    if not isinstance(entry, dict) or "data_offsets" not in entry or kind == 0:
        entry = rng.choice([None, 3, "F32", [], ["F32", [1], [0, 4]], {}, True, {"dtype": "F32"}])
    elif kind == 1:
        entry["data_offsets"] = [x + rng.choice([-4, -1, 1, 4, 8]) for x in entry["data_offsets"]]
    elif kind == 2:
        entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][1] + rng.choice([-4, -2, 1, 4, 2**32, 2**63])]
    elif kind == 3:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[end, begin], [begin], [begin, end, end], [float(begin), end], [str(begin), end], None, {"0": begin}])
    elif kind == 4:
        entry["dtype"] = rng.choice(["f32", "F33", "float32", "", None, 5, "U1", ["F32"], {"F32": None}, "F32 "])
    elif kind == 5:
        entry["shape"] = rng.choice([[-1], [1.0], ["2"], None, 4, [None], [2**64], [2**62, 4], [2**40, 2**40, 0], [0, 2**40, 2**40], [[1]], {"0": 1}])
    elif kind == 6:
        del entry[rng.choice(list(entry))]
    elif kind == 7:
        entry = entry | rng.choice([{"extra": 1}, {"dtypes": "F32"}, {"extra": {"deep": [1, {"er": None}]}}])
    elif kind == 8:
        entry = [entry["dtype"], entry["shape"], entry["data_offsets"]] + rng.choice([[], [], [1]])
    elif kind == 9:  # twice, as it is or otherwise
        other = rng.choice([entry, entry | {"data_offsets": [0, 4]}, entry | {"dtype": "I8"}, None])
        return pairs[: i + 1] + [[name, other]] + pairs[i + 1 :]
    elif kind == 10:
        entry["shape"] = entry["shape"] + [rng.choice([1, 2])]
    elif kind == 11:
        name = rng.choice([name + "x", "\x00", "\ud7ff"])
    else:
        return pairs[:i] + pairs[i + 1 :]
    return pairs[:i] + [[name, entry]] + pairs[i + 1 :]


METADATA = [None, {}, {"format": "pt"}, {"format": "pt", "a": "\u00e9"}, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, [], "pt", 3, {"a": ["b"]}, [["a", "b"]]]


def spoil_text(text, rng):
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            lambda: text[:at],
            lambda: text[:at] + rng.choice("{}[],:\"'0x\\\x00\n ") + text[at:],
            lambda: text.replace(",", ",,", 1),
            lambda: text[:-1] + ",}",
            lambda: text + rng.choice(["}", "{}", "null", "\x00\x00", "// no", ",", "\n\t\r ", "\x0b", "\u00a0"]),
            lambda: rng.choice([" ", "\n\t", "\ufeff", "x", "[", "\x00"]) + text,
            lambda: text.replace('"', "'"),
            lambda: text[:-1] + (', "deep": ' if len(text) > 2 else '"deep": ') + "[" * 126 + "]" * 126 + "}",
            lambda: text.replace('"dtype"', '"dtype": "F32", "dtype"', 1),
            lambda: text.replace("0", rng.choice(["00", "-0", "0.0", "0e0", "1e1", "+0", "18446744073709551616", "NaN"]), 1),
        ]
    )()


def header_case(rng):
    pairs, zeros = entries(rng)
    spaces, length = rng.choice([0, 0, 1, 3, 7, 8, 40]), 0
    for _ in range(rng.choice([0, 0, 1])):
        pairs = spoil_pairs(pairs, rng) if pairs else pairs
    if rng.random() < 0.35:
        pairs.insert(rng.randrange(len(pairs) + 1), ["__metadata__", rng.choice(METADATA)])
        if rng.random() < 0.08:
            pairs.append(["__metadata__", rng.choice(METADATA)])
    text = dump(pairs, rng)
    if rng.random() < 0.2:
        text = spoil_text(text, rng)
    header = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.04 and header:
        at = rng.randrange(len(header))
        header = header[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]) + header[at:]
    if rng.random() < 0.15:
        zeros = max(0, zeros + rng.choice([-8, -4, -1, 1, 4, 8, 4096]))
    if rng.random() < 0.12:  # a length whose first bytes are those of a pickle
        spaces = rng.choice([640, 896, 1152, 1408, 640 + 65536, 1408 + 65536]) - len(header)
    if rng.random() < 0.06:
        length = rng.choice([-9, -8, -1, 1, 8, 2**20, 2**40, 100_000_000])
    spaces = max(0, spaces)
    return [max(0, len(header) + spaces + length), header.decode("latin1"), spaces, zeros]


def whole_files():
    """What people put where weights belong, and lengths at the limits."""
    empty = '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    one = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    pickle = "\x80\x02}q\x00(X\x0b\x00"
    texts = ["", "x", "1234567", "{}", "not weights at all", "<!DOCTYPE html><html><body>404</body></html>", "GGUF\x03" + "\x00" * 40]
    texts += ["version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "PK\x03\x04" + "\x00" * 40, "PK\x03\x04 and so on"]
    texts += [pickle, pickle.replace("\x02", "\x04"), "\x80\x05" + "\x00" * 6 + "{}", "\x89HDF\r\n\x1a\n" + "\x00" * 30, "\x1f\x8b\x08" + "\x00" * 30]
    texts += ["\x00" * 7, "\x00" * 8, "\x00" * 64, "\x93NUMPY\x01\x00v\x00{}", '{"error": "Repository not found"}', "x" * 257 + "ustar" + "x" * 300]
    cases = [[None, text, 0, 0] for text in texts]
    for length, header, spaces, zeros in [(0, "", 0, 0), (2, "{}", 0, 0), (2, "{}", 0, 1), (2, "[]", 0, 0), (4, "null", 0, 0), (1, "{", 0, 0)]:
        cases.append([length, header, spaces, zeros])
    for total in [8, 640, 896, 1152, 1408, 65536, 66176, 100_000]:
        cases.append([total, empty, max(0, total - len(empty)), 0])
        cases.append([total, one, max(0, total - len(one)), 4])
    cases += [[total, one, total - len(one), 4] for total in (100_000_000, 100_000_001)]
    return cases


def verdict(case, path):
    length, header, spaces, zeros = case
    head = b"" if length is None else struct.pack("<Q", length)
    data = head + header.encode("latin1") + b" " * spaces + b"\0" * zeros
    path.write_bytes(data)

    def by(read):
        try:
            read()
        except (safetensors.SafetensorError, ValueError):  # ValueError: nothing can be mapped of an empty file
            return False
        return True

    def opened():
        with safetensors.safe_open(path, framework="np") as file:
            list(file.keys())

    answers = by(opened), by(lambda: safetensors.deserialize(data))
    assert answers[0] == answers[1], case
    return answers[0]


def headers(n):
    rng = random.Random(640)
    cases = whole_files() + [header_case(rng) for _ in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        return [
            {"length": case[0], "header": case[1], "spaces": case[2], "zeros": case[3], "loads": verdict(case, path)}
            for case in cases
        ]


# --------------------------------------------------------------------------------------------------- tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
PLACEHOLDERS = ["<my-jar>", "<My-Jar>", "<cat-toy>", "sks", "<x>", "<my-jar>_1", "[PAD]", "photo", "two words", "\u00e9clair", "<|pad|>"]
TEXTS = [
    "",
    "a photo of <my-jar> on a beach",
    "<My-Jar><my-jar> <MY-JAR>_1 x<x>x <x>",
    "two words, Two  words and a sks photo",
    "[PAD] [pad] <cat-toy>s <|pad|> \u00c9clair \u00e9clair",
    "<|startoftext|>mug<|endoftext|> <|EndOfText|>",
    "a " * 12 + "<my-jar> photo",
]


def token(rng, content=None, **more):
    """A token as an object."""
    flag = lambda share=0.2: rng.random() < share
    content = content or rng.choice(PLACEHOLDERS)
    out = {"content": content, "lstrip": flag(), "normalized": flag(0.5), "rstrip": flag(), "single_word": flag()}
    return out | {"special": flag(0.5)} | more


def named(rng):
    """A special token in one of the forms there were."""
    content = rng.choice([START, END, END, END, "[PAD]", "<my-jar>", "!"])
    plain = {key: value for key, value in token(rng, content).items() if key != "special"}
    return rng.choice([content, content, content, plain | {"__type": "AddedToken"}, plain, None])


def special_tokens_map(rng):
    out = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        content = START if key == "bos_token" else END
        form = rng.randrange(12)
        plain = {"content": content, "lstrip": False, "normalized": form % 2 == 0, "rstrip": False, "single_word": False}
        out[key] = named(rng) if form == 0 and key != "bos_token" else content if form < 6 else plain
    if rng.random() < 0.3:
        pick = rng.sample(PLACEHOLDERS, 2)
        objects = [{key: value for key, value in token(rng, name).items() if key != "special"} for name in pick]
        typed = [one | {"__type": "AddedToken"} for one in objects]
        key = rng.choice(["additional_special_tokens"] * 3 + ["extra_special_tokens"])
        out[key] = rng.choice([pick, pick, objects, typed])
    keys = [key for key in out if rng.random() < 0.95]
    return {key: out[key] for key in keys}


def tokenizer_config(rng):
    out = {"tokenizer_class": rng.choice(["CLIPTokenizer", "CLIPTokenizerFast"]), "do_lower_case": True, "add_prefix_space": False}
    if rng.random() < 0.8:
        out["model_max_length"] = rng.choice([20, 20, 20, 20, 20, 1e30, 77])
    elif rng.random() < 0.5:
        out["max_len"] = 20
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if rng.random() < 0.6:
            out[key] = START if key == "bos_token" else END
        if rng.random() < 0.06:
            out[key] = named(rng)
    if rng.random() < 0.3:
        decoder = {str(900): token(rng, START, special=True), str(901): token(rng, END, special=True)}
        numbers = iter([902, 903, 904, 950, 17])
        decoder |= {str(next(numbers)): token(rng, name) for name in rng.sample(PLACEHOLDERS, rng.randrange(4))}
        keys = rng.sample(list(decoder), len(decoder))
        out["added_tokens_decoder"] = {key: decoder[key] for key in keys}
        if rng.random() < 0.1:
            out["added_tokens_decoder"]["905"] = rng.choice(["<x>", None, {"id": 3}])
    if rng.random() < 0.2:
        names = rng.sample(PLACEHOLDERS, 2)
        out[rng.choice(["additional_special_tokens", "extra_special_tokens"])] = rng.choice(
            [names, names, [token(rng, names[0]) | {"__type": "AddedToken"}, names[1]], [token(rng)], None, []]
        )
    if rng.random() < 0.1:
        out["image_token"] = rng.choice(["<x>", "<image>"])
    if rng.random() < 0.05:
        out["extra_special_tokens"] = {"jar_token": "<my-jar>"}
    if rng.random() < 0.08:
        out["padding_side"] = rng.choice(["left", "right", "middle"])
    if rng.random() < 0.08:
        out["truncation_side"] = rng.choice(["left", "right", "middle"])
    if rng.random() < 0.06:
        out["split_special_tokens"] = True
    return out


def sections(rng):
    """What tokenizer.json has beside its model."""
    added = [token(rng, START, special=True) | {"id": 900}, token(rng, END, special=True) | {"id": 901}]
    added += [token(rng, name) | {"id": 902 + i} for i, name in enumerate(rng.sample(PLACEHOLDERS, rng.choice([0, 0, 1, 2, 3])))]
    added = added[rng.choice([0, 0, 0, 0, 1, 2]) :]
    truncation = {"direction": rng.choice(["Left", "Right"]), "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": rng.choice(["Left", "Right"]), "pad_to_multiple_of": None}
    padding |= {"pad_id": 901, "pad_type_id": 0, "pad_token": END}
    out = {"version": "1.0", "truncation": rng.choice([None, None, None, truncation]), "padding": rng.choice([None, None, None, padding])}
    out |= {"added_tokens": added, "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    if rng.random() < 0.04:
        del out["added_tokens"]
    return out


def tokenizer_case(rng):
    files = {"tokenizer_config.json": tokenizer_config(rng)}
    if rng.random() < 0.75:
        files["special_tokens_map.json"] = special_tokens_map(rng)
    if rng.random() < 0.4:
        added = {name: 902 + i for i, name in enumerate(rng.sample(PLACEHOLDERS, rng.randrange(4)))}
        if rng.random() < 0.2:
            added = {name: number + rng.choice([0, 7, 40]) for name, number in added.items()}
        files["added_tokens.json"] = dict(rng.sample(list(added.items()), len(added)))
    if rng.random() < 0.05:
        del files["tokenizer_config.json"]
    form = rng.choice(["files"] * 4 + ["strings", "pairs", "pairs", "both"])
    files = {name: json.dumps(value) for name, value in files.items()}
    return {"form": form, "sections": {} if form == "files" else sections(rng), "files": files}


def model_of(form):
    """The vocabulary as tokenizer.json has it."""
    vocab = json.loads((VOCABULARY / "vocab.json").read_text())
    merges = [line for line in (VOCABULARY / "merges.txt").read_text().split("\n")[1:] if line]
    merges = merges if form == "strings" else [line.split(" ") for line in merges]
    model = {"type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    return model | {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges}


def write_tokenizer(folder, form, sections, files):
    folder.mkdir(parents=True, exist_ok=True)
    if form in ("files", "both"):
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(VOCABULARY / name, folder / name)
    if form != "files":
        (folder / "tokenizer.json").write_text(json.dumps(sections | {"model": model_of(form)}))
    for name, text in files.items():
        (folder / name).write_text(text)


def read_tokenizer(case, folder):
    """Size and ids by the reference; None and None if it raises."""
    write_tokenizer(folder, case["form"], case["sections"], case["files"])
    try:
        reference = CLIPTokenizer.from_pretrained(folder)
        length = reference.model_max_length if reference.model_max_length < 1e6 else 77
        rows = [reference(text, padding="max_length", max_length=length, truncation=True).input_ids for text in TEXTS]
    except Exception as error:  # whatever it is, it does not load
        assert not isinstance(error, (AssertionError, NameError, ImportError)), error
        return None, None, False
    numbers = {*json.loads((VOCABULARY / "vocab.json").read_text())}
    config, added = (json.loads(case["files"].get(name, "{}")) for name in ("tokenizer_config.json", "added_tokens.json"))
    if "added_tokens_decoder" in config:
        numbers |= {entry.get("content") for entry in config["added_tokens_decoder"].values()}
    else:
        numbers |= {*added} | {entry["content"] for entry in case["sections"].get("added_tokens", [])}
    used = [reference.bos_token, reference.eos_token, reference.pad_token]
    return max(reference.get_vocab().values()) + 1, rows, any(token not in numbers for token in used)


def tokenizers(n):
    rng = random.Random(49408)
    rows = [{"texts": TEXTS}]
    for _ in range(n):
        case = tokenizer_case(rng)
        with tempfile.TemporaryDirectory() as folder:
            size, ids, unnumbered = read_tokenizer(case, Path(folder) / "tokenizer")
        rows.append(case | {"size": size, "ids": ids, "unnumbered": unnumbered})
    return rows


# ------------------------------------------------------------------------------------------------------ bundles

UNET, VAE, TEXT = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
WEIGHTS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
BASE = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.42.1",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 900,
        "eos_token_id": 901,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "pad_token_id": 1,
        "projection_dim": 16,
        "vocab_size": 902,
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "attention_head_dim": 2,
        "block_out_channels": [8, 16],
        "center_input_sample": False,
        "cross_attention_dim": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 8,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "tokenizer/tokenizer_config.json": {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    "tokenizer/special_tokens_map.json": {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END},
}
OLD_ATTENTION = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")]


def filled(name, shape):
    """A weight's values: a ramp that depends on its name."""
    n = torch.Size(shape).numel()
    return (((torch.arange(n) * 37 + len(name) * 101) % 199).float() - 99).div(1000).reshape(shape)


def spoiled(tensor, value):
    """The tensor with another first value."""
    tensor.view(-1)[0] = value
    return tensor


def read_tensors(path):
    return safetensors.torch.load_file(path)


def save_tensors(path, tensors):
    """As safetensors lays them out, sorted by name: torch's own order depends on sizes."""
    safetensors.torch.save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, {"format": "pt"})


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path, change):
    tensors = read_tensors(path)
    save_tensors(path, change(tensors) or tensors)


def shard(path, n, stem, index):
    """Splits a file into n and an index; `{i}` in the stem is the number of each."""
    tensors = read_tensors(path)
    path.unlink()
    where = {}
    for i in range(n):
        file = stem.replace("{i}", f"{i + 1:05}-of-{n:05}") + ".safetensors"
        mine = sorted(tensors)[i::n]
        save_tensors(path.parent / file, {name: tensors[name] for name in mine})
        where |= {name: file for name in mine}
    (path.parent / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


DTYPE_WORDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "F32": torch.float32, "I64": torch.int64}
DTYPE_WORDS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
EDITS = {
    "set": lambda path, key, value: edit_json(path, lambda config: config.update({key: value})),
    "unset": lambda path, key: edit_json(path, lambda config: config.pop(key)),
    "write": lambda path, text: (path.parent.mkdir(exist_ok=True), path.write_bytes(text.encode("latin1"))),
    "remove": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "rename": lambda path, to: path.rename(path.parent / to),
    "copy": lambda path, to: shutil.copyfile(path, path.parent / to),
    "cut": lambda path, n: path.write_bytes(path.read_bytes()[: n if n >= 0 else path.stat().st_size + n]),
    "append": lambda path, n: path.write_bytes(path.read_bytes() + b"\0" * n),
    "drop": lambda path, name: edit_tensors(path, lambda all: {key: v for key, v in all.items() if key != name}),
    "add": lambda path, name, shape: edit_tensors(path, lambda all: all | {name: filled(name, shape)}),
    "cast": lambda path, word: edit_tensors(path, lambda all: {name: v.to(DTYPE_WORDS[word]) for name, v in all.items()}),
    "scale": lambda path, factor: edit_tensors(path, lambda all: {name: v * factor for name, v in all.items()}),
    "spoil": lambda path, name, value: edit_tensors(path, lambda all: all | {name: spoiled(all[name], float(value))}),
    "retitle": lambda path, old, new: edit_tensors(path, lambda all: {name.replace(old, new): v for name, v in all.items()}),
    "shard": shard,
    "tokenizer": lambda path, form, sections: (
        [(path / name).unlink() for name in ("vocab.json", "merges.txt")],
        write_tokenizer(path, form, sections, {}),
    ),
}


def write_base(folder):
    for name, config in BASE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer", "files", {}, {})
    plain = lambda part: {key: value for key, value in BASE[f"{part}/config.json"].items() if not key.startswith("_")}
    models = {"unet": UNet2DConditionModel(**plain("unet")), "vae": AutoencoderKL(**plain("vae"))}
    models["text_encoder"] = CLIPTextModel(CLIPTextConfig(**plain("text_encoder")))
    for part, model in models.items():
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        if part == "text_encoder":  # named as transformers named them before version 5
            shapes = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes.items()}
        save_tensors(folder / WEIGHTS[part], {name: filled(name, shape) for name, shape in shapes.items()})


SHARDS = [
    # stem, index, variant
    ("{m}-{i}", "{m}.safetensors.index.json", None),
    ("{m}.fp16-{i}", "{m}.safetensors.index.fp16.json", "fp16"),
    ("{m}-{i}.fp16", "{m}.safetensors.fp16.index.json", "fp16"),
]
INTEGERS = "integers are what quantised weights are stored as, which mean nothing without their scales"
EIGHT_BITS = "transformers wants such files made by a quantiser; diffusers does not"
NO_INDEX = "a directory says enough without it"
NO_LENGTH = "every CLIP reads 77 tokens, where the reference would read 1e30"
NOT_NUMBERS = "whatever is computed with them is not a number"
NOT_BUILT = "a model of another architecture"
BETAS = "betas for fewer timesteps than there are"
LEVELS = "kinds of blocks for fewer levels than there are"
OTHER_NOISE = "no sampler draws from such a model"


def weight_cases():
    for part, path in WEIGHTS.items():
        m = Path(path).name.removesuffix(".safetensors")
        for word in DTYPE_WORDS:
            more = {"ours": False, "why": INTEGERS} if word == "I64" else {}
            more = {"ours": True, "why": EIGHT_BITS} if word[:2] == "F8" and part == "text_encoder" else more
            yield [["cast", path, word]], more
        for n in (1, 2, 3):
            for stem, index, variant in SHARDS:
                if "{i}.fp16" in stem and part == "text_encoder":
                    continue
                yield [["shard", path, n, stem.replace("{m}", m), index.replace("{m}", m)]], {"variant": variant}
        for variant in ("fp16", "bf16", "non_ema", "ema-only"):
            yield [["rename", path, f"{m}.{variant}.safetensors"]], {"variant": variant}
            yield [["copy", path, f"{m}.{variant}.safetensors"], ["scale", path, 2.0]], {}
        index, shards = f"{m}.safetensors.index.json", f"{m}-{{i}}"
        yield [["copy", path, "x.safetensors"], ["shard", path, 2, shards, index], ["rename", f"{part}/x.safetensors", Path(path).name], ["scale", path, 2.0]], {}
        yield [["shard", path, 2, shards, index], ["remove", f"{part}/{m}-00001-of-00002.safetensors"]], {}
        yield [["shard", path, 2, shards, index], ["unset", f"{part}/{index}", "metadata"]], {}
        yield [["shard", path, 2, shards, index], ["unset", f"{part}/{index}", "weight_map"]], {}
        yield [["shard", path, 2, shards, index], ["write", f"{part}/{index}", "{"]], {}
        yield [["shard", path, 2, shards, index], ["remove", f"{part}/{index}"]], {}
        yield [["shard", path, 2, shards, index], ["set", f"{part}/{index}", "weight_map", {}]], {}
        if part != "text_encoder":
            yield [["shard", path, 1, "sub", index], ["set", f"{part}/{index}", "weight_map", {"x": "../sub.safetensors"}]], {}
        yield [["cut", path, -4]], {}
        yield [["cut", path, 1000]], {}
        yield [["cut", path, 0]], {}
        yield [["append", path, 8]], {}
        yield [["remove", path]], {}
        yield [["write", path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"]], {}
        yield [["write", path, "<!DOCTYPE html><html></html>"]], {}
        yield [["write", path, "\x80\x02}q\x00(X\x0b\x00"]], {}
        yield [["rename", path, "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"]], {}
        yield [["rename", path, "weights.safetensors"]], {}
        for length in (640, 896, 1152, 1408):
            yield [["add", path, "x" * length, [1]]], {}


def tensor_cases():
    firsts = {UNET: "conv_in.bias", VAE: "encoder.conv_in.weight", TEXT: "text_model.final_layer_norm.weight"}
    more = {UNET: ["mid_block.resnets.0.conv1.weight", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.bias"]}
    more |= {VAE: ["decoder.mid_block.attentions.0.to_q.weight", "quant_conv.bias"]}
    more |= {TEXT: ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.bias"]}
    for path, first in firsts.items():
        for name in [first, *more[path]]:
            yield [["drop", path, name]], {}
            yield [["add", path, name, [3, 3]]], {}
            for value in ("nan", "inf", "-inf"):
                yield [["spoil", path, name, value]], {"ours": False, "why": NOT_NUMBERS}
            yield [["retitle", path, name, f"model.{name}"]], {}
        for name in ("extra", "conv_head.weight", "num_batches_tracked", "model_ema.decay"):
            yield [["add", path, name, [2]]], {}
    for name, count in (("text_model.embeddings.position_ids", 77), ("vision_model.embeddings.class_embedding", 4), ("text_projection.weight", 4)):
        yield [["add", TEXT, name, [1, count]]], {}
    yield [["retitle", TEXT, "text_model.", ""]], {}
    yield [["retitle", TEXT, "text_model.", "text_encoder."]], {}
    yield [["retitle", VAE, old, new] for old, new in OLD_ATTENTION], {}
    yield [["retitle", VAE, old, new] for old, new in OLD_ATTENTION[:2]], {}


def config_cases():
    unet, vae, text = "unet/config.json", "vae/config.json", "text_encoder/config.json"
    for file in (unet, vae, text):
        for key in BASE[file]:
            levels = file == vae and key in ("down_block_types", "up_block_types")
            yield [["unset", file, key]], {"ours": False, "why": LEVELS} if levels else {}
        yield [["remove", file]], {}
        yield [["write", file, "{"]], {}
        yield [["write", file, "[]"]], {}
        yield [["set", file, "_diffusers_version", "0.4.0"]], {}
        yield [["set", file, "made_by", {"somebody": 1}]], {}
    for key, value in {
        "sample_size": [4, 4], "layers_per_block": [1, 1], "attention_head_dim": [2, 2], "num_class_embeds": None,
        "upcast_attention": True, "only_cross_attention": False, "dual_cross_attention": False, "use_linear_projection": False,
        "resnet_time_scale_shift": "default", "class_embed_type": None, "act_fn": "swish", "dropout": 0.1, "norm_eps": 1e-6,
        "freq_shift": 1, "flip_sin_to_cos": False, "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": 1,
        "num_attention_heads": None, "cross_attention_dim": 12, "in_channels": 9, "out_channels": 8, "layers_per_block ": 2,
        "block_out_channels": [8, 8], "norm_num_groups": 3, "down_block_types": ["DownBlock2D", "DownBlock2D"], "downsample_padding": 1,
    }.items():
        yield [["set", unet, key, value]], {}
    for key, value in {"class_embed_type": "timestep", "mid_block_type": None, "resnet_time_scale_shift": "scale_shift"}.items():
        yield [["set", unet, key, value]], {"ours": False, "why": NOT_BUILT}
    for key, value in {
        "sample_size": [8, 8], "force_upcast": False, "scaling_factor": 1.0, "shift_factor": None, "latents_mean": None,
        "use_quant_conv": True, "layers_per_block": 2, "block_out_channels": [8, 16], "latent_channels": 8,
        "norm_num_groups": 16, "mid_block_add_attention": True,
    }.items():
        yield [["set", vae, key, value]], {}
    yield [["set", vae, "act_fn", "relu"]], {"ours": False, "why": NOT_BUILT}
    yield [["set", vae, "down_block_types", ["DownEncoderBlock2D"]]], {"ours": False, "why": LEVELS}
    for key, value in {
        "hidden_act": "gelu", "dtype": "float32", "torch_dtype": "float32", "num_attention_heads": 3, "vocab_size": 901,
        "num_hidden_layers": 2, "max_position_embeddings": 76, "hidden_size": 32, "model_type": "clip", "attention_dropout": 0.1,
        "transformers_version": "4.21.0", "dropout": 0.0, "return_dict": False,
    }.items():
        yield [["set", text, key, value]], {}
    nested = {"model_type": "clip", "text_config": BASE[text], "vision_config": {}}
    yield [["write", text, json.dumps(nested)]], {}


def scheduler_cases():
    file, index = "scheduler/scheduler_config.json", "model_index.json"
    for key in BASE[file]:
        yield [["unset", file, key]], {}
    for name in ("PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "HeunDiscrete", "DDPM"):
        yield [["set", index, "scheduler", ["diffusers", f"{name}Scheduler"]]], {}
        yield [["set", index, "scheduler", ["diffusers", f"{name}Scheduler"]], ["set", file, "_class_name", f"{name}Scheduler"]], {}
        yield [["set", file, "_class_name", f"{name}Scheduler"]], {}
    for name in ("UniPCMultistep", "DEISMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LCM", "TCD", "SASolver", "DDIMParallel"):
        yield [["set", index, "scheduler", ["diffusers", f"{name}Scheduler"]], ["set", file, "_class_name", f"{name}Scheduler"]], {}
    solver = [["set", index, "scheduler", ["diffusers", "DPMSolverMultistepScheduler"]]]
    for key, value in {
        "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min", "solver_order": 3, "euler_at_final": True,
        "use_karras_sigmas": True, "use_lu_lambdas": True, "thresholding": True, "lambda_min_clipped": -5.1, "solver_type": "heun",
        "timestep_spacing": "trailing", "lower_order_final": False,
    }.items():
        yield [*solver, ["set", file, key, value]], {}
    for key, value in {
        "clip_sample": True, "steps_offset": 0, "steps_offset ": 5, "set_alpha_to_one": True, "thresholding": True,
        "timestep_spacing": "linspace", "beta_schedule": "linear", "beta_end": 0.02, "num_train_timesteps": 500,
        "rescale_betas_zero_snr": False, "made_by": "somebody", "skip_prk_steps": True, "prediction_type": "v_prediction",
    }.items():
        yield [["set", file, key, value]], {}
    yield [["set", file, "steps_offset", 1000]], {}
    yield [["set", file, "prediction_type", "sample"]], {"ours": False, "why": OTHER_NOISE}
    yield [["set", file, "prediction_type", "noise"]], {}
    yield [["set", file, "beta_schedule", "sigmoid"]], {}
    betas = [0.001 * (i + 1) for i in range(10)]
    yield [["set", file, "trained_betas", betas], ["set", file, "num_train_timesteps", 10]], {}
    yield [["set", file, "trained_betas", betas], ["set", file, "num_train_timesteps", 11]], {"ours": False, "why": BETAS}
    yield [["set", file, "timestep_spacing", "odd"]], {}
    yield [["set", index, "scheduler", ["diffusers", "PNDMScheduler"]], ["set", file, "skip_prk_steps", False]], {}
    yield [["set", index, "scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]]], {"ours": False, "why": OTHER_NOISE}
    yield [["remove", file]], {}
    yield [["write", file, "{"]], {}


def layout_cases():
    index, rng = "model_index.json", random.Random(3)
    yield [], {}
    yield [["remove", index]], {"ours": True, "why": NO_INDEX}
    yield [["write", index, "{"]], {}
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        yield [["remove", part]], {}
    yield [["set", index, "tokenizer", ["transformers", "CLIPTokenizerFast"]]], {}
    yield [["set", index, "_class_name", "LatentDiffusionPipeline"]], {}
    yield [["set", index, "unet", ["diffusers", "UNet2DModel"]]], {}
    yield [["set", index, "vae", ["diffusers", "AutoencoderTiny"]]], {"ours": False, "why": NOT_BUILT}
    yield [["set", index, "text_encoder", ["transformers", "CLIPVisionModel"]]], {}
    yield [["set", index, "image_encoder", [None, None]]], {}
    for key in ("feature_extractor", "safety_checker", "requires_safety_checker", "_diffusers_version"):
        yield [["unset", index, key]], {}
    for form in ("files", "strings", "pairs", "both"):
        for _ in range(5):
            yield [["tokenizer", "tokenizer", form, sections(rng)]], {}
    jar, table = {"<my-jar>": 902}, "text_model.embeddings.token_embedding.weight"
    for sides in ([], [["set", "text_encoder/config.json", "vocab_size", 903], ["add", TEXT, table, [903, 16]]]):
        yield [["write", "tokenizer/added_tokens.json", json.dumps(jar)], *sides], {}
        decoder = {str(number): token(rng, text, special=False) for text, number in (jar | {START: 900, END: 901}).items()}
        yield [["set", "tokenizer/tokenizer_config.json", "added_tokens_decoder", decoder], *sides], {}
        yield [["set", "tokenizer/tokenizer_config.json", "additional_special_tokens", list(jar)], *sides], {}
        yield [*sides], {}
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        yield [["remove", f"tokenizer/{file}"]], {}
    yield [["remove", "tokenizer/tokenizer_config.json"]], {"ours": True, "why": NO_LENGTH}
    yield [["write", "tokenizer/merges.txt", "#version: 0.2\no f</w>\n\n"]], {}
    yield [["write", "tokenizer/merges.txt", "#version: 0.2\nzz qq\n"]], {}
    yield [["write", "tokenizer/vocab.json", "{}"]], {}
    for length in (20, 76, 78):
        yield [["set", "tokenizer/tokenizer_config.json", "model_max_length", length]], {}


def mixed_cases(n):
    """Several harmless or harmful edits of different files at once."""
    rng = random.Random(15)
    kinds = [list(cases()) for cases in (weight_cases, tensor_cases, config_cases, scheduler_cases)]
    for _ in range(n):
        picked = [rng.choice(kind) for kind in rng.sample(kinds, 2)]
        files = [{str(Path(edit[1]).parent) for edit in edits} for edits, _ in picked]
        if not files[0] & files[1] and not any(more for _, more in picked):
            yield [edit for edits, _ in picked for edit in edits], {}


def saved_again(base, folder):
    """The edits that make of the base what diffusers saves of it."""
    StableDiffusionPipeline.from_pretrained(base).save_pretrained(folder)
    whole = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    model = whole.pop("model")
    assert model == model_of("pairs"), "its words and merges are the base's"
    edits = [["tokenizer", "tokenizer", "pairs", whole], ["remove", "tokenizer/special_tokens_map.json"]]
    for path in sorted(folder.rglob("*.json")):
        name = str(path.relative_to(folder))
        if name != "tokenizer/tokenizer.json":
            edits.append(["write", name, json.dumps(json.loads(path.read_text()) | {"_name_or_path": "base"})])
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert made == {*BASE, *WEIGHTS.values(), "tokenizer/tokenizer.json"} - {"tokenizer/special_tokens_map.json"}, made
    for path in WEIGHTS.values():
        before, after = read_tensors(base / path), read_tensors(folder / path)
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before), path
    return edits


def sums(folder, variant):
    """The sum of every weight of each part, or why there is none: what a model has that no file gave it."""
    out = {}
    for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        has = variant and any(variant in file.name for file in (folder / part).iterdir())
        model, info = cls.from_pretrained(folder / part, output_loading_info=True, **({"variant": variant} if has else {}))
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"{part} lacks {info['missing_keys']}")
        total = sum(value.double().sum().item() for value in model.state_dict().values() if value.is_floating_point())
        out[part] = total if math.isfinite(total) else None  # JSON has no word for it
    return out


def loads(folder, variant):
    """What each part's weights add up to, if the pipeline loads and draws; else None."""
    try:
        pipe = StableDiffusionPipeline.from_pretrained(folder, variant=variant, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        prompt = "a mug " + " ".join(pipe.tokenizer.get_added_vocab())
        pipe(prompt, num_inference_steps=5, height=8, width=8, guidance_scale=1.0, output_type="latent")
        return sums(folder, variant)
    except Exception as error:  # whatever it is, it does not load
        assert not isinstance(error, (AssertionError, NameError)), error
        return None


def bundles(n_mixed):
    rows = [{"files": {name: json.dumps(config) for name, config in BASE.items()}}]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        write_base(base)
        cases = [(saved_again(base, Path(folder) / "saved"), {})]
        cases += [case for some in (layout_cases, scheduler_cases, tensor_cases, config_cases, weight_cases) for case in some()]
        for edits, more in [*cases, *mixed_cases(n_mixed)]:
            copy = Path(folder) / "copy"
            shutil.copytree(base, copy)
            for op, path, *rest in edits:
                EDITS[op](copy / path, *rest)
            variant = more.get("variant")
            rows.append({"edits": edits, "sums": loads(copy, variant)} | {key: value for key, value in more.items() if value is not None})
            shutil.rmtree(copy)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", metavar="DIR", type=Path, help="write all cases there")
    parser.add_argument("names", nargs="*", default=["headers", "tokenizers", "bundles"])
    args = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    out = (args.all or HERE) / "loading"
    out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        few, many = COUNTS[name]
        rows = MAKERS[name](many if args.all else few)
        lines(out / f"{name}.jsonl", rows)
        print(name, len(rows))


MAKERS = {"headers": headers, "tokenizers": tokenizers, "bundles": bundles}
COUNTS = {"headers": (2000, 20_000), "tokenizers": (120, 1200), "bundles": (60, 600)}

if __name__ == "__main__":
    main()
