"""The process behind `peers.generate`. Says ``ready``; then reads one batch a line, as JSON, on its input,
and answers each with the seconds after which each of its tokens was there; ends with the input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Arrivals(BaseStreamer):
    """When each step's tokens came, the whole batch's at once."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._has_prompt = False
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.seconds.append(time.perf_counter() - self._started_s)
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is kept back."""


def loaded(args: argparse.Namespace) -> tuple[nn.Module, nn.Module | None]:
    """The base as it is, and another that PEFT has wrapped, where there are adapters."""

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()

    wrapped: Any = None
    for text in args.lora:
        name, _, folder = text.partition("=")
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(
                base(), folder, adapter_name=name, autocast_adapter_dtype=False
            )
        else:
            wrapped.load_adapter(folder, name, autocast_adapter_dtype=False)
    return base(), wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--lora", action="append", default=[], help="NAME=FOLDER; may be given again")
    parser.add_argument("--base", required=True, help="how requests call the base")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain, wrapped = loaded(args)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = torch.tensor(asked["prompts"])
        size = asked["new_tokens"]
        is_base = all(model == args.base for model in asked["models"])
        names = ["__base__" if model == args.base else model for model in asked["models"]]
        model: Any = plain if is_base else wrapped
        arrivals = Arrivals()
        with torch.inference_mode():
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=size,
                max_new_tokens=size,
                pad_token_id=0,
                streamer=arrivals,
                **({} if is_base else {"adapter_names": names}),
            )
        print(json.dumps(arrivals.seconds), flush=True)


if __name__ == "__main__":
    main()
