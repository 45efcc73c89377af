"""From a folder or a hub id to a model that is ready to serve: loaded, checked, probed, attention installed.

Weights are read from safetensors only, code that came with a model is never run, and nothing is trained:
eval mode, no gradients. Knows neither adapters nor requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from timbre_server.engine import self_check
from timbre_server.engine.attention import install_attention
from timbre_server.engine.deny_list import refuse_by_config
from timbre_server.engine.layer_stack import Ranges, stack_layers
from timbre_server.engine.model_digest import model_digest, stacked_digest
from timbre_server.engine.options import Device, Dtype, LoraDtype
from timbre_server.engine.probe import ProbeResult, probe
from timbre_server.errors import UnsupportedModel

Progress = Callable[[str], None]
_BFLOAT16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As /proc/cpuinfo names them on x86 and ARM."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory. ``name`` is what the operator asked for; ``digest`` is the identity of the
    checkpoint and of its ``stack``: the layer at each place, empty where each stands once."""

    model: PreTrainedModel
    name: str
    digest: str
    stack: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of distinct parameters and buffers; a tied head counts once."""
        tensors: dict[int, Tensor] = {
            tensor.data_ptr(): tensor for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class PreparedModel:
    loaded: LoadedModel
    probed: ProbeResult


def prepare_model(
    name: str,
    *,
    dtype: Dtype,
    device: Device,
    check: bool,
    layers: Ranges = (),
    on_progress: Progress = lambda text: None,
) -> PreparedModel:
    """Load a model, lay its ``layers`` out (`stack_layers`), install our attention, probe it and, with
    ``check``, compare it with itself as shipped.

    Raises:
        UnsupportedModel: it cannot be loaded or cannot be served; names it and the reason.
    """
    on_progress(f"Loading {name}")
    loaded = load_model(name, dtype=dtype, device=device, layers=layers)
    if loaded.stack:
        on_progress(f"Running a stack of {len(loaded.stack)} of the model's layers")
    expected = self_check.plain_logits(loaded.model) if check else ()
    on_progress("Probing the model's layers")
    install_attention(loaded.model)
    probed = probe(loaded.model)
    if check:
        on_progress("Checking attention against the model's own")
        self_check.check_against(expected, loaded.model, probed.kv_shapes)
    return PreparedModel(loaded, probed)


def load_model(name: str, *, dtype: Dtype, device: Device, layers: Ranges = ()) -> LoadedModel:
    """Read a model as it is, with the attention that transformers calls eager.

    Raises:
        UnsupportedModel: there is no such model, it is no causal language model, or it cannot be served.
    """
    target = chosen_device(device)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        refuse_by_config(config)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=chosen_dtype(dtype, target),
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{name}: could not be loaded as a causal language model. {error}") from error
    cast(nn.Module, model).to(target).eval().requires_grad_(False)
    stack = stack_layers(model, layers)
    return LoadedModel(model, name, stacked_digest(model_digest(_checkpoint_folder(name)), stack), stack)


def chosen_device(device: Device) -> torch.device:
    """``auto``: a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel(
            "device is cuda, but torch finds no GPU. Use device = cpu, or a CUDA build of torch."
        )
    return torch.device(device)


def chosen_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the machine computes it natively; else float16 on a GPU, float32 on a CPU."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def factors_rounded_to(asked: LoraDtype, model_dtype: torch.dtype) -> torch.dtype | None:
    """What adapters' factors of low rank are rounded to; None: they keep their values. ``auto``: bfloat16 for
    a model that runs in it; float16 would flush small factors to zero."""
    is_narrow = model_dtype is torch.bfloat16 if asked == "auto" else asked == "bfloat16"
    return torch.bfloat16 if is_narrow else None


def end_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a text: the generation config's where it has any, else the configuration's."""
    generation = getattr(model.generation_config, "eos_token_id", None)
    found = generation if generation is not None else model.config.get_text_config().eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def longest_sequence(config: PreTrainedConfig, asked: int | None) -> int:
    """How many positions the model has; where its configuration does not say, as many as asked for.

    Raises:
        UnsupportedModel: neither says.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        length = asked
    if length is None:
        raise UnsupportedModel(
            f"{config.model_type}: the configuration has no max_position_embeddings. Set max_model_len."
        )
    return int(length)


def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; elsewhere float32 is faster."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not _BFLOAT16_CPU_FLAGS.isdisjoint(flags.split())


def _checkpoint_folder(name: str) -> Path:
    """The folder that `from_pretrained` has just read, also for a hub id."""
    if Path(name).is_dir():
        return Path(name)
    for filename in ("model.safetensors.index.json", "model.safetensors"):
        found = cached_file(
            name, filename, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        if found is not None:
            return Path(found).parent
    raise UnsupportedModel(f"{name}: its weights are not in the hub's cache after loading.")
