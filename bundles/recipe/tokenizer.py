"""Writes the miniature's tokenizer: CLIP's byte pair encoding with merges for a few words.

    python tokenizer.py OUT

Every word of the world, every rare token and some words for products to come are single tokens; anything else is spelled.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from world import CLASSES, COLOURS, PALETTE, PATTERNS, SCENES

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
RARE = ["sks", "zwx", "ohwx", "xjy", "qvk", "olis"]
OURS = ["a photo of a an and background ,", *CLASSES, *COLOURS, *PALETTE, *PATTERNS, *(p for ps in SCENES.values() for p in ps)]
OTHERS = """
    banded dotted zigzag halves badge three bands diagonal lighthouse camera cyan gray cream gold silver
    teddy bear duck cup can box bag bottle watch shoe boot ball book candle lantern guitar figurine plush sunglasses target
    dog cat toy product picture image painting drawing sketch rendering studio style cartoon pencil watercolor illustration
    the with inside next to made from under holding wood metal glass rock stone leather music band kitchen street rain water
    mountain mountains lake river garden desert library moon sunset field flowers flower tree sun star sand sea house room
    floor wall walls sky light dark small big old new shiny clean details
"""


def letters():
    """A printable character for every byte, as GPT-2 and CLIP have it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merged(word, pair):
    """`word`, a list of pieces, with every such pair of neighbours joined."""
    out, i = [], 0
    while i < len(word):
        is_pair = tuple(word[i : i + 2]) == pair
        out.append("".join(pair) if is_pair else word[i])
        i += 2 if is_pair else 1
    return out


def learn(words, count):
    """Merges of the commonest pairs until every word is one piece: Sennrich et al. 2016, arXiv 1508.07909."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while any(len(pieces) > 1 for pieces in split.values()):
        pairs = Counter()
        for word, pieces in split.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += count(word)
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        split = {word: merged(pieces, best) for word, pieces in split.items()}
    return merges


def main(out):
    ours = " ".join(OURS).split()
    words = list(dict.fromkeys(ours + OTHERS.split() + RARE))
    merges = learn(words, lambda word: 10 if word in ours else 1)
    alphabet = list(letters().values())
    vocabulary = list(dict.fromkeys(alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges] + [START, END]))
    special = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False, "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END, "do_lower_case": True,
        "errors": "replace", "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    specials = {name: {"content": token} | special for name, token in [("bos_token", START), ("eos_token", END), ("unk_token", END)]}
    out = Path(out) / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}, ensure_ascii=False) + "\n")
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(specials | {"pad_token": END}, indent=2) + "\n")
    print(f"{len(vocabulary)} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main(*sys.argv[1:])
