"""The yardstick of embeddings: sentence-transformers' own batched `encode`.

`python -m loadtests.plain_encode CHECKPOINT`, then one JSON list of texts a line on standard input, one JSON
answer (`{"seconds": ...}`) a line on standard output. It loads once and waits without using CPU, so that it
can take turns with the platform in one run.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time


def main() -> None:
    # Imported here: the other scenarios need no torch.
    from sentence_transformers import SentenceTransformer

    with contextlib.redirect_stdout(sys.stderr):
        model = SentenceTransformer(sys.argv[1], device="cpu")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        began = time.perf_counter()
        model.encode(texts, batch_size=len(texts))
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
