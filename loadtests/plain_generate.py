"""The yardstick of the engine: one plain batched transformers `generate`.

`python -m loadtests.plain_generate CHECKPOINT`, then one JSON order a line on standard input
(`{"batch": 16, "tokens": 128}`), one JSON answer a line on standard output. It loads once and waits without
using CPU, so that it can take turns with the platform in one run.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    # Imported here: the other scenarios need no torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    print(json.dumps({"ready": True, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        with torch.inference_mode():
            answer = measure(model, tokenizer, order["prompt"], order["batch"], order["tokens"])
        print(json.dumps(answer), flush=True)


def measure(model: Any, tokenizer: Any, prompt: str, batch: int, tokens: int) -> dict[str, float]:
    """Seconds of one batched generate, and of the prefill of a single prompt (the fastest of three)."""
    chats = [[{"role": "user", "content": prompt}]] * batch
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    single = {name: tensor[:1] for name, tensor in inputs.items()}
    prefills = []
    for _ in range(3):
        began = time.perf_counter()
        model(**single, use_cache=True)
        prefills.append(time.perf_counter() - began)
    began = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - began
    made = batch * (output.shape[1] - inputs["input_ids"].shape[1])
    return {"seconds": seconds, "tokens": made, "prefill_seconds": min(prefills)}


if __name__ == "__main__":
    main()
