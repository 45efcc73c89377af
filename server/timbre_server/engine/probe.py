"""What a loaded model is made of, found by one forward pass instead of by reading its configuration.

With our attention installed, a recording context answers the layers (densely, without a cache) and notes
each layer's heads, sizes, window, soft cap and sinks; hooks note which tensor every linear layer, norm and
embedding reads.
A model that this cannot serve is refused here, by name: most would otherwise be silently wrong.

Legend: T rows, H query heads, G KV heads, M query heads of one KV head, D key dim, E value dim, N kept rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from timbre_server.adapters.groups import Block, LinearGroup, LoneLayer, ParameterModule
from timbre_server.engine.batch import run_model
from timbre_server.engine.blocks import BlockCalls, block_shape
from timbre_server.engine.context import AttentionCall
from timbre_server.engine.deny_list import family_name
from timbre_server.engine.kv_cache import LayerShape
from timbre_server.engine.linears import bias_of, features, is_linear, stores_transposed
from timbre_server.engine.lone_layers import lone_layer, lone_shape, may_be_lone
from timbre_server.engine.messages import AttentionShape, SiteShape
from timbre_server.engine.paged_attention import exact_attention
from timbre_server.engine.parameters import ParameterCalls, parameter_shapes
from timbre_server.errors import UnsupportedModel

_TOKEN_IDS = (1, 2, 3, 4, 5, 6, 7)
_NUM_ROWS = len(_TOKEN_IDS)
_KEPT_ROWS = (1, 3, 6)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One attention layer as it was called."""

    shape: LayerShape
    path: str
    """Of its module."""
    num_heads: int
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool
    shares_with: int | None
    """The earlier layer whose keys and values it was called with."""

    @property
    def attention(self) -> AttentionShape:
        shape, shared = self.shape, self.shares_with
        sizes = (self.num_heads, shape.num_kv_heads, shape.key_dim, shape.value_dim)
        return AttentionShape(self.path, *sizes, shares_with=shared)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    layers: tuple[LayerAttention, ...]
    """In layer order."""
    groups: tuple[LinearGroup, ...]
    """In call order; only linears that see every row exactly once, and the head, which sees the kept ones."""
    lone: tuple[LoneLayer, ...]
    """Embeddings of the tokens, and norms, in call order."""
    blocks: tuple[Block, ...]
    """In the order in which they end."""
    parameters: tuple[ParameterModule, ...]
    """Modules with bare parameters, in call order."""
    sites: tuple[SiteShape, ...]
    """The members of all groups, in their order, the lone layers, the blocks and the parameters."""
    hidden_size: int
    """Of what the embedding layer puts out."""

    @property
    def kv_shapes(self) -> tuple[LayerShape, ...]:
        return tuple(layer.shape for layer in self.layers)

    @property
    def changed_bytes(self) -> int:
        """The most that changed parameters take beside the base's own while a step runs."""
        return max((module.num_bytes for module in self.parameters), default=0)


class Recording:
    """An attention context that remembers its calls and attends causally over the step's rows alone."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.paths: dict[int, str] = {}
        """Of each layer that has called, the module that was entered last."""
        self._entered = ""
        self.hidden_size = 0

    def note_embedding(self, module: nn.Module, args: tuple[object, ...], out_1TD: Tensor) -> None:
        self.hidden_size = out_1TD.shape[-1]

    def enter(self, path: str, module: nn.Module, args: tuple[object, ...]) -> None:
        """A module that knows its layer begins."""
        self._entered = path

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        self.paths[call.layer] = self._entered
        num_rows, num_kv_heads = call.q_HTD.shape[1], call.k_GTD.shape[0]
        q_GMTD = call.q_HTD.reshape(num_kv_heads, -1, *call.q_HTD.shape[1:])
        hidden_TT = torch.ones(num_rows, num_rows, device=call.q_HTD.device).triu(1).bool()
        mask_TT = torch.zeros(num_rows, num_rows, dtype=call.q_HTD.dtype, device=call.q_HTD.device)
        mask_TT.masked_fill_(hidden_TT, float("-inf"))
        k_G1TD, v_G1TE = call.k_GTD[:, None], call.v_GTE[:, None]
        out_GMTE = exact_attention(q_GMTD, k_G1TD, v_G1TE, mask_TT, call, None)
        return out_GMTE.flatten(0, 1).transpose(0, 1)


@dataclass(slots=True)
class _Reads:
    """Which tensor each layer read, in call order. Keeps the tensors: only the living have unique ids."""

    entries: list[tuple[str, Tensor]] = field(default_factory=list)
    """Of linear layers."""
    lone: list[tuple[str, Tensor]] = field(default_factory=list)
    """Of layers that may be embeddings or norms and were given one tensor."""

    def note(self, path: str, module: nn.Module, args: tuple[Tensor, ...], result: object) -> None:
        """What gives more than one tensor (a router, which looks like a linear layer) is none."""
        if args and isinstance(result, Tensor):
            self.entries.append((path, args[0]))

    def note_lone(
        self, path: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> None:
        if len(args) == 1 and not kwargs:
            self.lone.append((path, args[0]))


def probe(model: PreTrainedModel) -> ProbeResult:
    """Run a few rows through the model, whose attention must be installed already.

    Raises:
        UnsupportedModel: the family's name and why it cannot be served.
    """
    family = family_name(model.config)
    _refuse_by_signature(model, family)
    recording, reads = Recording(), _Reads()
    block_calls, parameter_calls = BlockCalls(), ParameterCalls()
    hooks = [
        module.register_forward_hook(partial(reads.note, path))
        for path, module in model.named_modules()
        if is_linear(module)
    ]
    hooks += [
        module.register_forward_pre_hook(partial(reads.note_lone, path), with_kwargs=True)
        for path, module in model.named_modules()
        if may_be_lone(module)
    ]
    hooks += [
        module.register_forward_pre_hook(partial(recording.enter, path))
        for path, module in model.named_modules()
        if hasattr(module, "layer_idx")
    ]
    hooks += block_calls.watch(model)
    hooks += parameter_calls.watch(model)
    hooks.append(model.get_input_embeddings().register_forward_hook(recording.note_embedding))
    try:
        with torch.inference_mode():
            run_model(model, recording, _TOKEN_IDS, range(_NUM_ROWS), _KEPT_ROWS)
    except UnsupportedModel as refusal:
        raise UnsupportedModel(f"{family}: {refusal}") from refusal
    finally:
        for hook in hooks:
            hook.remove()
    groups, lone = _groups(model, reads.entries), _lone(model, reads.lone)
    parameters = parameter_calls.found(model, _NUM_ROWS)
    sites = _linear_sites(model, groups, lone)
    sites += [lone_shape(layer, model.get_submodule(layer.path)) for layer in lone]
    blocks = block_calls.blocks(_NUM_ROWS, set(recording.paths.values()))
    sites += map(block_shape, blocks)
    for facts in parameters:
        sites += parameter_shapes(facts, model.get_submodule(facts.path))
    layers = _layers(model, family, recording)
    return ProbeResult(layers, groups, lone, blocks, parameters, tuple(sites), recording.hidden_size)


def _refuse_by_signature(model: PreTrainedModel, family: str) -> None:
    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in ("input_ids", "position_ids", "logits_to_keep") if name not in accepted]
    if missing:
        raise UnsupportedModel(
            f"{family}: its forward takes no {', '.join(missing)}; a model whose rows have no positions of "
            "their own (recurrent or convolutional state, for one) cannot be served from a paged cache."
        )


def _layers(model: PreTrainedModel, family: str, recording: Recording) -> tuple[LayerAttention, ...]:
    calls = recording.calls
    text = model.config.get_text_config()
    expected = int(text.num_hidden_layers)
    called = sorted(call.layer for call in calls)
    if called != list(range(expected)):
        raise UnsupportedModel(
            f"{family}: {len(set(called))} of {expected} layers called transformers' attention interface "
            f"({len(calls)} calls in all, expected one a layer). The others compute attention in "
            "code of their own or keep recurrent state, and cannot be served from a paged cache."
        )
    by_layer = sorted(calls, key=lambda call: call.layer)
    layers = tuple(_layer(call, by_layer, recording.paths[call.layer]) for call in by_layer)
    for kind, layer in zip(getattr(text, "layer_types", None) or (), layers, strict=False):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise UnsupportedModel(
                f"{family}: layer {layer.shape.layer} is declared {kind} but calls attention with window "
                f"{layer.window}; its window exists only in the mask and cannot be served."
            )
    return layers


def _layer(call: AttentionCall, by_layer: Sequence[AttentionCall], path: str) -> LayerAttention:
    earlier = by_layer[: call.layer]
    shape = LayerShape(call.layer, call.k_GTD.shape[0], call.k_GTD.shape[2], call.v_GTE.shape[2])
    return LayerAttention(
        shape=shape,
        path=path,
        num_heads=call.q_HTD.shape[0],
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        has_sinks=call.sinks_H is not None,
        shares_with=next((e.layer for e in earlier if e.k_GTD.data_ptr() == call.k_GTD.data_ptr()), None),
    )


def _linear_sites(
    model: PreTrainedModel, groups: Sequence[LinearGroup], lone: Sequence[LoneLayer]
) -> list[SiteShape]:
    """As the model defines them: methods count layers so, and families call some in another order."""
    called = {path for group in groups for path in group.paths}
    embeddings = [layer.path for layer in lone if layer.kind == "embedding"]
    tables = {id(model.get_submodule(path).weight): path for path in embeddings}
    return [_site(path, module, tables) for path, module in model.named_modules() if path in called]


def _site(path: str, module: nn.Module, tables: Mapping[int, str]) -> SiteShape:
    """``tables``: the path of each embedding by the identity of its weight."""
    in_features, out_features = features(module)
    return SiteShape(
        path,
        out_features,
        in_features,
        bias_of(module) is not None,
        is_transposed=stores_transposed(module),
        tied_to=tables.get(id(getattr(module, "weight", None))),
    )


def _lone(model: PreTrainedModel, reads: Sequence[tuple[str, Tensor]]) -> tuple[LoneLayer, ...]:
    ids_T = torch.tensor(_TOKEN_IDS, device=model.device)
    times = [path for path, _ in reads]
    with torch.inference_mode():
        found = [
            lone_layer(path, model.get_submodule(path), x, ids_T)
            for path, x in reads
            if times.count(path) == 1
        ]
    return tuple(layer for layer in found if layer is not None)


def _groups(model: PreTrainedModel, entries: Sequence[tuple[str, Tensor]]) -> tuple[LinearGroup, ...]:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    times = [path for path, _ in entries]

    def is_adapted(path: str, x: Tensor) -> bool:
        num_rows = len(_KEPT_ROWS) if model.get_submodule(path) is head else _NUM_ROWS
        return times.count(path) == 1 and x.numel() // x.shape[-1] == num_rows

    found: list[LinearGroup] = []
    for _, own in groupby((entry for entry in entries if is_adapted(*entry)), key=lambda entry: id(entry[1])):
        paths = tuple(path for path, _ in own)
        found.append(LinearGroup(paths, any(model.get_submodule(path) is head for path in paths)))
    return tuple(found)
