"""Write the PyTorch checkpoints that tests/weights/test_torch_file.py reads.

Runs in an environment of its own with torch 2.13.0; neither mlc_llm nor its tests import torch.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

DIRECTORY = Path(__file__).resolve().parents[1] / "tests" / "weights" / "torch_files"


def make_tensors() -> OrderedDict[str, torch.Tensor]:
    """Return a tensor of every sort: dtypes, shared and transposed storages, odd shapes."""
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 4
    return OrderedDict(
        {
            "float32": whole,
            "tied": whole,
            "part": whole[1:, 1:3],
            "transposed": (torch.arange(15) - 7).reshape(5, 3).to(torch.bfloat16).t(),
            "float16": torch.tensor([[0.5, -2.0], [65504.0, 6e-8]], dtype=torch.float16),
            "float64": torch.tensor([0.1, -1e30], dtype=torch.float64),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "int64": torch.tensor([-1, 1 << 40]),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
        }
    )


def main() -> None:
    """Write all files."""
    tensors = make_tensors()
    DIRECTORY.mkdir(exist_ok=True)
    torch.save(tensors, DIRECTORY / "stream.bin", _use_new_zipfile_serialization=False)
    torch.save(tensors, DIRECTORY / "archive.bin")
    torch.save(dict(tensors), DIRECTORY / "protocol_4.bin", pickle_protocol=4)
    float8 = torch.tensor([0.5, -448.0, 0.0625]).to(torch.float8_e4m3fn)
    torch.save({"float8": float8}, DIRECTORY / "float8.bin")
    torch.save(torch.nn.Linear(2, 3), DIRECTORY / "module.bin")
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, 0.25)
    torch.nn.init.constant_(module.bias, 4.0)
    torch.save({"state_dict": module.state_dict()}, DIRECTORY / "state_dict.bin")


if __name__ == "__main__":
    main()
