"""Makes the GPTQ 4-bit version of a trained demo model, calibrated on its own training chats.

    python -m tidegate.demo.quantize --model DIR --out DIR [--group-size 32] [--chats 512]

The method is Frantar et al., arXiv 2210.17323: each matrix is rounded column by column, and the error
made so far is corrected in the columns still to come, weighted by what real inputs look like.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer

from tidegate.demo.corpus import conversations

THREADS = 1
CALIBRATION_SEED = 20_000
"""Chats of the training split, but other ones than the training run drew with small seeds."""
UNCHANGED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Taken from the original, because GPTQModel rewrites them (sampling on, extra tokenizer settings)."""


def calibration_texts(model: Path, chats: int) -> list[str]:
    """`chats` training conversations, as the chat template renders them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    drawn = islice(conversations("train", CALIBRATION_SEED), chats)
    return [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in drawn]


def quantize(model: Path, out: Path, group_size: int, chats: int) -> None:
    """Writes a GPTQ checkpoint of `model` to `out`: 4 bits, one scale per `group_size` weights."""
    torch.set_num_threads(THREADS)
    # GPTQModel 7.6 wants two workers and gives itself one on a machine with two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    torch.manual_seed(0)
    # In memory: the disk offload of GPTQModel 7.6 loses tied or unusual output heads.
    config = QuantizeConfig(bits=4, group_size=group_size, device="cpu", offload_to_disk=False)
    model, out = model.resolve(), out.resolve()
    # GPTQModel writes a folder of logs into the working directory.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        quantizer = GPTQModel.load(str(model), config)
        quantizer.quantize(calibration_texts(model, chats), batch_size=8)
        quantizer.save(str(out))
    for name in UNCHANGED:
        shutil.copyfile(model / name, out / name)
    # Errors and timings of the rounding, and the machine's: of no use to who loads the model.
    (out / "quant_log.csv").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--chats", type=int, default=512)
    args = parser.parse_args()
    quantize(args.model, args.out, args.group_size, args.chats)


if __name__ == "__main__":
    main()
