"""Fixtures of the method tests: tiny models, adapters as PEFT writes them, tiny sites."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from timbre_methods.contract import Site

HERE = Path(__file__).parent
LoadModule = Callable[[Path], ModuleType]


@pytest.fixture(scope="session")
def evaluate(load_module: LoadModule) -> ModuleType:
    """The tests' own evaluator of programs."""
    return load_module(HERE / "evaluate.py")


@pytest.fixture(scope="session")
def engine_bench(load_module: LoadModule) -> ModuleType:
    """The real engine around a tiny model, for methods that act on whole requests."""
    return load_module(HERE / "engine_bench.py")


@pytest.fixture(scope="session")
def mlp(load_module: LoadModule) -> ModuleType:
    """An MLP of the base under programs of mixtures."""
    return load_module(HERE / "mlp.py")


@pytest.fixture(scope="session")
def tiny_models(load_module: LoadModule) -> ModuleType:
    """The models' makers."""
    return load_module(HERE / "tiny_models.py")


@pytest.fixture(scope="session")
def llama(tiny_models: ModuleType) -> nn.Module:
    model: nn.Module = tiny_models.llama()
    return model


@pytest.fixture(scope="session")
def tied_llama(tiny_models: ModuleType) -> nn.Module:
    model: nn.Module = tiny_models.tied_llama()
    return model


@pytest.fixture(scope="session")
def gpt2(tiny_models: ModuleType) -> nn.Module:
    model: nn.Module = tiny_models.gpt2()
    return model


@pytest.fixture(scope="session")
def gemma2(tiny_models: ModuleType) -> nn.Module:
    model: nn.Module = tiny_models.gemma2()
    return model


@contextmanager
def warnings_of_others() -> Iterator[None]:
    """PEFT uses a renamed attribute, takes lora_B.bias for a torn matrix and AdaLoRA's masks for patterns,
    does not look for parameters where it checks patterns, makes unchecked sparse tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*have invalid shape: .*lora_B.bias", peft.utils.warning.PeftWarning
        )
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
        warnings.filterwarnings("ignore", r"The following rank_pattern keys .*\.lora_E'", RuntimeWarning)
        warnings.filterwarnings(
            "ignore", r"The following (rank|alpha)_pattern keys .*experts", RuntimeWarning
        )
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings(
            "ignore", "(?s).*(tie_word_embeddings|save_embedding_layers|ensure_weight_tying)", UserWarning
        )
        warnings.filterwarnings("ignore", "Unsupported layer type .*Norm", UserWarning)
        yield


NEAR_THEIR_START = ("magnitude", "ia3", "modules_to_save", "ln_tuning", "trainable_tokens")
"""Parameters that begin at what the base has or does, and that training does not carry far from it."""


@dataclass(frozen=True)
class Written:
    """An adapter as PEFT wrote it to disk."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path


@pytest.fixture
def quiet() -> Callable[[], AbstractContextManager[None]]:
    """A context in which PEFT's own warnings are not ours."""
    return warnings_of_others


@pytest.fixture
def written() -> Callable[[Path], Written]:
    """Reads the two files of an adapter's folder."""

    def read(folder: Path) -> Written:
        return Written(
            json.loads((folder / "adapter_config.json").read_text()),
            load_file(folder / "adapter_model.safetensors"),
            folder,
        )

    return read


@pytest.fixture
def write_with_peft(tmp_path: Path, written: Callable[[Path], Written]) -> Callable[..., Written]:
    """Makes an adapter with PEFT, gives all its weights random values and saves it."""

    def write(model: nn.Module, config: peft.PeftConfig, std: float = 0.3, **save: Any) -> Written:
        torch.manual_seed(5)
        with warnings_of_others():
            wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * std
                centre = parameter.data if any(part in name for part in NEAR_THEIR_START) else 0.0
                parameter.data.copy_(centre + noise)  # in place: tied parameters share their memory
        folder = tmp_path / f"adapter{len(os.listdir(tmp_path))}"
        with warnings_of_others():
            wrapped.save_pretrained(str(folder), **save)
        return written(folder)

    return write


@pytest.fixture
def peft_logits() -> Callable[[nn.Module, Path, Tensor], Tensor]:
    """The logits of PEFT's own forward with an adapter loaded from disk."""

    @torch.no_grad()
    def logits(model: nn.Module, folder: Path, token_ids: Tensor) -> Tensor:
        with warnings_of_others():
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
            return wrapped(token_ids).logits

    return logits


@pytest.fixture
def peft_greedy() -> Callable[..., tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities by PEFT's own forward, the whole text anew for each."""

    @torch.no_grad()
    def greedy(
        model: nn.Module, folder: Path, prompt: list[int], count: int, **options: Any
    ) -> tuple[list[int], list[float]]:
        with warnings_of_others():
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
            tokens, logprobs = list(prompt), []
            for _ in range(count):
                last_V = wrapped(torch.tensor([tokens]), **options).logits[0, -1].float().log_softmax(0)
                tokens.append(int(last_V.argmax()))
                logprobs.append(float(last_V.max()))
        return tokens[len(prompt) :], logprobs

    return greedy


@pytest.fixture
def prompts(load_module: LoadModule) -> list[list[int]]:
    """A short one, one of several blocks, and one of one token."""
    found: list[list[int]] = load_module(HERE / "as_peft.py").PROMPTS
    return found


@pytest.fixture
def as_peft(engine_bench: ModuleType, peft_greedy: Callable[..., Any], load_module: LoadModule) -> Any:
    """Whole answers of the real engine, compared with PEFT's."""
    return load_module(HERE / "as_peft.py").AsPeft(engine_bench, peft_greedy)


@pytest.fixture
def timbre_logits(evaluate: ModuleType, load_module: LoadModule) -> Callable[..., Tensor]:
    """The logits of the base with our reading of the adapter's two files."""
    from timbre_methods.prompt_contract import NO_FRAME, Frame
    from timbre_methods.registry import check_adapter, compile_adapter, derive

    adapted_copy = load_module(HERE / "adapted_copy.py").adapted_copy

    @torch.no_grad()
    def logits(model: nn.Module, written: Written, token_ids: Tensor, frame: Frame = NO_FRAME) -> Tensor:
        sites = evaluate.all_sites(model)
        check_adapter(written.config, written.tensors, sites, frame)
        tensors = {**written.tensors, **derive(written.config, written.tensors, sites)}
        program = compile_adapter(written.config, tensors, sites, frame)
        return adapted_copy(evaluate, model, program)(token_ids).logits

    return logits


@pytest.fixture(scope="session")
def token_ids() -> Tensor:
    return torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def agrees_with_peft(
    write_with_peft: Callable[..., Written],
    peft_logits: Callable[..., Tensor],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
) -> Callable[..., None]:
    """Writes an adapter with PEFT, reads it from disk both ways and compares all logits in float32."""

    def check(model: nn.Module, config: peft.PeftConfig, std: float = 0.3, **save: Any) -> None:
        written = write_with_peft(model, config, std, **save)
        expected = peft_logits(model, written.folder, token_ids)
        with torch.no_grad():
            base = model(token_ids).logits
        assert (expected - base).abs().max() > 0.05, "the adapter must change the model"
        actual = timbre_logits(model, written, token_ids)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    return check


@pytest.fixture
def agrees_in_bf16(
    write_with_peft: Callable[..., Written],
    peft_logits: Callable[..., Tensor],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
) -> Callable[..., None]:
    """On a bf16 base: no further from the exact answer than PEFT's own rounding explains. Where PEFT adds to
    a weight it rounds a layer's output once, and a base's product with a change added to it twice."""

    def check(model: nn.Module, config: peft.PeftConfig, std: float = 0.3) -> None:
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        exact_model = copy.deepcopy(rounded).float()
        written = write_with_peft(exact_model, config, std)
        exact = peft_logits(exact_model, written.folder, token_ids)
        expected = peft_logits(rounded, written.folder, token_ids).float()
        actual = timbre_logits(rounded, written, token_ids).float()
        peft_error, error = (expected - exact).abs(), (actual - exact).abs()
        assert 0 < peft_error.max() < 0.3
        assert error.max() <= 2 * peft_error.max()
        assert error.square().mean() <= 2 * peft_error.square().mean()

    return check


@pytest.fixture
def site() -> Callable[..., Site]:
    """Builds a site with random weights."""

    def build(
        path: str = "model.layers.0.self_attn.q_proj",
        out_features: int = 6,
        in_features: int = 5,
        bias: bool = False,
    ) -> Site:
        generator = torch.Generator().manual_seed(len(path) + out_features * in_features)
        weight = torch.randn(out_features, in_features, generator=generator)
        return Site(path, weight, torch.randn(out_features, generator=generator) if bias else None)

    return build
