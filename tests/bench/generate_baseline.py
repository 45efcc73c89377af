"""transformers' own generate on the same model, threads and shape: the baseline of the same run.

A process of its own, so that it holds neither memory nor threads while the server is measured. Reads one
batch size a line on standard input, answers each with one JSON line, ends with the input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.to(args.device).eval()
    for line in sys.stdin:
        batch = int(line)
        size = (batch, args.prompt_tokens)
        prompt = torch.randint(100, model.config.vocab_size, size, device=args.device)
        mask = torch.ones_like(prompt)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=1, pad_token_id=0)
            first_s = time.perf_counter() - start
            start = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=args.new_tokens,
                max_new_tokens=args.new_tokens,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        tokens_per_s = batch * args.new_tokens / seconds
        print(json.dumps({"tokens_per_s": tokens_per_s, "ttft_p50_ms": 1e3 * first_s}), flush=True)


if __name__ == "__main__":
    main()
