"""A base model whose layers apply adapters: what the runner sees of them.

Knows neither digests nor files nor requests: programs live in numbered slots, and a row table says which
rows use which slots.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_methods.routing import Routed, Router, Scout, Scouted
from timbre_server.adapters.active_rows import ActiveRows, StepRows
from timbre_server.adapters.adapted_embedding import AdaptedEmbedding
from timbre_server.adapters.adapted_group import AdaptedGroup, PreparedKinds
from timbre_server.adapters.adapted_linear import AdaptedLinear
from timbre_server.adapters.adapted_norm import AdaptedNorm
from timbre_server.adapters.adapted_parameters import AdaptedParameters
from timbre_server.adapters.groups import Block, LinearGroup, LoneLayer, ParameterModule
from timbre_server.adapters.layer_product import Product
from timbre_server.adapters.prompts import StepPrompts
from timbre_server.adapters.routed_block import RoutedBlocks
from timbre_server.adapters.routing_report import Choice, choices_of, expert_tokens, router_places
from timbre_server.adapters.scouting import read_scouts, scouted_of
from timbre_server.adapters.slot_programs import SlotPrograms, opened
from timbre_server.operators.catalogue import Kernels, all_operators, embedding_operators
from timbre_server.operators.contract import Bound
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.row_table import Pairs, RowTable
from timbre_server.operators.step_routing import RouterCall, StepRouting


def _itself(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """By what means a model's numbers are computed; they are the same, to rounding, whatever is taken."""

    product_of: Callable[[nn.Module], Callable[[Tensor], Tensor]] = _itself
    """The fastest ``W x + b`` of a linear layer."""
    kernels: Kernels = "torch"
    """Of what adapters add."""
    norm_of: Callable[[nn.Module], Callable[[Tensor], Tensor]] = _itself
    """The fastest way to a norm's output."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedForward:
    """What one forward left in ``step``. Calling it leaves the same again; keeping it keeps what was prepared
    for the forward's tables."""

    step: StepRouting
    calls: Sequence[RouterCall]
    rows_of_copies: Mapping[RowTable, Tensor]
    prepared: Sequence[Sequence[Bound]]

    def __call__(self) -> None:
        self.step.repeat(self.calls, self.rows_of_copies)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedProgram:
    """A program with its parts made, and what operators have prepared of them at each group."""

    program: AdapterProgram
    groups: Sequence[PreparedKinds]


class AdaptedModel:
    """The layers of one model in adapted form, and the programs that they apply."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[LinearGroup],
        arithmetic: Arithmetic = Arithmetic(),
        lone: Sequence[LoneLayer] = (),
        blocks: Sequence[Block] = (),
        embedding: nn.Module | None = None,
        parameters: Sequence[ParameterModule] = (),
    ) -> None:
        """Replace the layers of ``groups``, the ``lone`` ones and the modules of ``parameters`` in place;
        routers may choose for ``blocks``.

        Without ``embedding``, the base's layer of token embeddings, no adapter may bring virtual tokens."""
        self._programs = SlotPrograms()
        self._prompts = StepPrompts(self._programs, embedding)
        self._rows = StepRows(layer.rows_per_token for layer in lone)
        self._groups: list[AdaptedGroup] = []
        self._linears: dict[str, AdaptedLinear] = {}
        self._step = StepRouting()
        self._places: dict[Router | Scouted, str] = {}
        self._scouts: dict[int, tuple[Scout, Sequence[Scouted]]] = {}
        self._listener: Callable[[int | None], None] = lambda _: None
        operators = {operator.part: operator for operator in all_operators(self._step, arithmetic.kernels)}
        for group in groups:
            rows = self._rows.head if group.is_head else self._rows.body
            adapted = AdaptedGroup(group.paths, rows, self._programs, operators)
            self._groups.append(adapted)
            for member, path in enumerate(group.paths):
                base = model.get_submodule(path)
                self._linears[path] = AdaptedLinear(base, arithmetic.product_of(base), adapted, member)
                _put_in_place(model, path, self._linears[path])
        lookups = {operator.part: operator for operator in embedding_operators()}
        for layer in lone:
            is_embedding = layer.kind == "embedding"
            rows = self._rows.by_rows_per_token[layer.rows_per_token]
            known = lookups if is_embedding else operators
            adapted = AdaptedGroup((layer.path,), rows, self._programs, known)
            self._groups.append(adapted)
            base = model.get_submodule(layer.path)
            make = AdaptedEmbedding if is_embedding else partial(AdaptedNorm, norm=arithmetic.norm_of(base))
            _put_in_place(model, layer.path, make(base, adapted))
        rows, programs = self._rows.body, self._programs
        routed = operators[Routed]
        assert isinstance(routed, RoutedOperator)
        self._blocks = RoutedBlocks(model, blocks, rows, self._step, routed.routers)
        self._parameters = [_adapted_parameters(model, facts, rows, programs) for facts in parameters]
        self._parameter_paths = {path for each in self._parameters for path in each.paths}

    @property
    def attention_prompts(self) -> StepPrompts | None:
        """What adapters do in the attention of the rows that are set; None: nothing."""
        return self._prompts if self._prompts.act_in_attention else None

    def set_rows(self, table: RowTable, head_table: RowTable) -> None:
        """The rows of the next forward, and those of them whose logits are kept."""
        for slot in self._programs.use(table.slots):
            self._forget(slot)
        self._step.begin(table.slots)
        if self._rows.begin(table, head_table):
            self._bind_groups()
        self._prompts.begin(table)

    def _bind_groups(self) -> None:
        """One after the other, which takes half as long as between products. Copies come with blocks."""
        not_yet = self._blocks.see_copies()
        try:
            for group in self._groups:
                if not group.paths[0].startswith(not_yet):
                    group.bound()
        except BaseException:
            self._rows.forget()  # An equal table may be next, to which only some are bound.
            raise

    def scout(self, rows_S: Tensor, hidden_SD: Tensor, kept_rows_T: Tensor) -> None:
        """Give the scouts what the base alone made of the rows ``rows_S``, increasing, of those that are set;
        ``kept_rows_T`` are the rows whose logits are kept. Every row of an adapter with one is among them."""
        body, head = self._rows.body.table, self._rows.head.table
        if body is not None:
            read_scouts(self._scouts, self._step, body, rows_S, hidden_SD)
        if head is not None:
            self._step.keep_rows(head, kept_rows_T)

    def clear_rows(self) -> None:
        """The forward has ended, well or not: base rows until told otherwise, nothing kept of its inputs."""
        self._rows.end()
        self._prompts.end()
        for group in self._groups:
            group.end_step()
        self._step.end_step()

    def expert_tokens(self) -> dict[int, list[int]]:
        """By slot: how often each expert acted in the forward that has just run. Before `clear_rows`."""
        return expert_tokens(self._step.noted, self._step.counts())

    def choices_of(self, rows: Sequence[int]) -> dict[int, list[Choice]]:
        """Which experts acted on these rows of the forward that has just run. Before `clear_rows`."""
        body, tables = self._rows.body.table, dict[RowTable, Tensor | None](self._step.rows_of_copies)
        return choices_of(
            rows, self._step.calls, self._places, tables if body is None else tables | {body: None}
        )

    def launches(self) -> tuple[Hashable, frozenset[int]] | None:
        """Of the rows that are set: a key that is equal for steps that launch the same on the same tensors,
        and the slots of the adapters that act. None where that is not told beforehand: of adapters of routed
        blocks, and where `act_beside_layers`."""
        body, head = self._rows.body, self._rows.head
        if body.table is None:
            return body.are_merged, frozenset()
        if self.act_beside_layers or self._programs.act_on(self._blocks.paths, body.table.slots):
            return None
        return (body.table, head.table), frozenset(body.table.slots)

    @property
    def act_beside_layers(self) -> bool:
        """Whether adapters of the rows that are set act on parameters, in attention, or by virtual rows."""
        table = self._rows.body.table
        slots = () if table is None else table.slots
        return self._prompts.act or self._programs.act_on(self._parameter_paths, slots)

    def recorded(self) -> RecordedForward:
        """Of the forward that has just run. Before `clear_rows`."""
        step = self._step
        # Of base rows nothing was prepared: what groups hold is an earlier step's, whose adapters may leave.
        groups = self._groups if self._rows.body.table is not None else ()
        prepared = tuple(group.last_bound for group in groups)
        return RecordedForward(step, tuple(step.calls), dict(step.rows_of_copies), prepared)

    def forget_forward(self) -> None:
        """Another forward of the same rows follows: what this one left does not count."""
        self._step.restart()

    def when_dropped(self, listener: Callable[[int | None], None]) -> None:
        """Told each slot that is dropped, and None when all layers' weights change: what was kept of their
        launches must go."""
        self._listener = listener

    @torch.inference_mode()
    def prepared(self, program: AdapterProgram) -> PreparedProgram:
        """What `put` takes, of a program whose tensors are on the model's device. On any thread."""
        opened_program = opened(program)
        return PreparedProgram(opened_program, [group.prepared(opened_program) for group in self._groups])

    def put(self, slot: int, program: AdapterProgram, prepared: PreparedProgram | None = None) -> None:
        """Let a free slot hold a program whose tensors are on the model's device. What is not `prepared` is
        when a row uses it first."""
        self._programs.put(slot, program)
        self._blocks.put(slot, program)
        self._places |= router_places(program)
        if program.scout is not None:
            self._scouts[slot] = program.scout, scouted_of(program)
        if prepared is not None:
            for closed in self._programs.open(slot, prepared.program):
                self._forget(closed)
            for group, own in zip(self._groups, prepared.groups, strict=True):
                group.expect(slot, own)

    def linear_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The base's own, by path."""
        yield from ((path, linear.base) for path, linear in self._linears.items())

    def program(self, slot: int) -> AdapterProgram:
        return self._programs[slot]

    def merge(self, pairs: Pairs, products: Mapping[str, Product]) -> None:
        """Run steps whose rows all have these pairs on merged weights: ``products`` of every linear layer
        that the adapters change, and they change nothing else. Others run as they did, on the base's own."""
        self.unmerge()
        for path, product in products.items():
            self._linears[path].merged = product
        self._rows.merge(pairs)

    def unmerge(self) -> None:
        """Drop the merged weights."""
        self._listener(None)
        self._rows.merge(())
        for linear in self._linears.values():
            linear.merged = None

    def drop(self, slot: int) -> None:
        """Free a slot's tensors, also where they were prepared for a table."""
        self._scouts.pop(slot, None)
        self._listener(slot)
        for router in router_places(self._programs.pop(slot)):
            del self._places[router]
        self._forget(slot)
        self._blocks.drop(slot)
        for module in self._parameters:
            module.forget()

    def _forget(self, slot: int) -> None:
        self._step.forget(slot)
        for group in self._groups:
            group.forget(slot)
        self._rows.forget()


def _adapted_parameters(
    model: nn.Module, facts: ParameterModule, rows: ActiveRows, programs: SlotPrograms
) -> AdaptedParameters:
    adapted = AdaptedParameters(model.get_submodule(facts.path), facts, rows, programs)
    _put_in_place(model, facts.path, adapted)
    return adapted


def _put_in_place(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
