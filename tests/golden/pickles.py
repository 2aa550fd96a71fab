"""Makes the goldens of pickles: dictionaries of tensors as PyTorch saves them, and things that are none.

    pip install torch==2.15.0 safetensors==0.8.0 numpy
    python tests/golden/pickles.py

Written into `pickles/`: `archive.pth` (the zip archive of PyTorch since 1.6), `stream.pth` (the container before it),
`values.safetensors` (what both hold, in f32), and what has to be refused: `code.pth` (its pickle calls a function),
`module.pth` (a whole module), `script.pth` (TorchScript), `protocol4.pth`, `list.pth`, `big_endian.pth`. A second run
writes the same values, but other bytes: PyTorch names the storages of a stream by their addresses.
"""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent / "pickles"

assert torch.__version__.split("+")[0] == "2.15.0", torch.__version__


def tensors():
    generator = torch.Generator().manual_seed(7)
    drawn = lambda *shape: torch.randn(*shape, generator=generator)
    norm = torch.nn.BatchNorm2d(3)
    norm.running_mean.copy_(drawn(3))
    table = drawn(6, 5)
    state = norm.state_dict(prefix="norm.")  # an OrderedDict with notes on versions, and a count of batches in i64
    state["f32"] = drawn(2, 3, 4)
    state["f64"] = drawn(3).double()
    state["f16"] = drawn(4, 2).half()
    state["bf16"] = drawn(2, 2).bfloat16()
    state["parameter"] = torch.nn.Parameter(drawn(2, 2))
    state["transposed"] = drawn(3, 5).t()
    state["channels_last"] = drawn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    state["rows"] = table[2:4]
    state["columns"] = table[:, 1:4:2]
    state["table"] = table
    state["scalar"] = drawn(1)[0]
    state["empty"] = torch.zeros(0, 3)
    state["Größe"] = drawn(1)
    state["nothing"] = None
    state["number"] = 1.5
    return state


class Call:
    """Its pickle calls a function, as harmful ones do. This one is harmless."""

    def __reduce__(self):
        return os.getcwd, ()


def main():
    HERE.mkdir(exist_ok=True)
    state = tensors()
    torch.save(state, HERE / "archive.pth")
    torch.save(state, HERE / "stream.pth", _use_new_zipfile_serialization=False)
    floats = {name: t.detach().float().contiguous().clone() for name, t in state.items()
              if isinstance(t, torch.Tensor) and t.is_floating_point()}
    save_file(floats, HERE / "values.safetensors")

    torch.save(OrderedDict(weight=torch.ones(2), harmless=Call()), HERE / "code.pth")
    torch.save(torch.nn.Linear(2, 2), HERE / "module.pth")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(HERE / "script.pth"))
    torch.save({"weight": torch.ones(2)}, HERE / "protocol4.pth", pickle_protocol=4)
    torch.save([torch.ones(2)], HERE / "list.pth")
    with zipfile.ZipFile(HERE / "list.pth") as old, zipfile.ZipFile(HERE / "big_endian.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry, b"big" if entry.filename.endswith("/byteorder") else old.read(entry))


main()
