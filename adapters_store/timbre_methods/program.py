"""The operators' vocabulary: what an adapter compiles to, as plain dataclasses of tensors.

A *part* is the parameters of one operator at one site, owned by one adapter. A site is one layer of the base
that is linear in what it is given, ``y0 = W x + b``: a linear layer, an embedding (x is one-hot tokens) or a
norm (x is normalised, W diagonal). Every part stands for a change that is **added** to the base, so
parts of one adapter, and of several adapters in a mix, combine by weighted sums and in any order::

    x' = x + Σ w · input_change(x)          Diagonal and Rotation with side="input"
    W' = W + Σ w · change                   SlicedLowRank, at a bare parameter
    y  = W x' + b + Σ w · change(x, y0)      all others

This module knows no file format, no method and no batch. `routing` has the parts of mixtures, whose weights
each row has of its own, and `prompt_parts` what acts outside of sites.

Legend: I in features, O out features, R rank, N stored coefficients or blocks, P and Q sizes of a basis, K
places of a sparse core or tokens, F factors, S stored blocks, B their size, M and N (`Circulant`) pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from timbre_methods.packed_parts import PackedBasis, PackedDense, PackedProjected
from timbre_methods.part_values import values_of
from timbre_methods.prompt_parts import AttentionPrompt, Prompt
from timbre_methods.routing import Routed, RoutedBlock, Router, Scout, repeated_router_bytes
from timbre_methods.sliced_ellpack import SlicedEllpack


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``y += B (A x)``; all scales in B. ``a_RI`` [R, I], ``b_OR`` [O, R]: float32, or 16 bits if exact."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Places:
    """Where the coefficients of a transform pair sit: coefficient k couples the input frequency
    ``columns_N[k]`` with the output frequency ``rows_N[k]``, int64. Equal places add.

    Places drawn from a seed are shared by all adapters of equal seed and shape. ``is_own``: they come from
    one adapter's file, and their bytes are its own; of `dct` and `hartley` alone. They stay on the CPU,
    wherever the adapters are. ``low_pass``: the filter of ``dwt``, of even length; empty for the others.
    """

    transform: Literal["dft", "dct", "hartley", "dwt"]
    out_features: int
    in_features: int
    rows_N: Tensor
    columns_N: Tensor
    low_pass: tuple[float, ...] = ()
    is_own: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Spectral:
    """``y += Re(T_Oᵀ (S (T_I x)))`` with ``S[rows[k], columns[k]] += c_N[k]``, in a transform T_n [F, n].

    ``c_N`` float32 holds every scale. F = n and, for v in [0, F) and p in [0, n)::

        dft      T[v, p] = exp(2πi v p / n) / n
        dct      T[v, p] = cos(π v (2p + 1) / 2n) √(2 / n), divided by √2 for v = 0: orthonormal
        hartley  T[v, p] = (cos + sin)(2π v p / n) / √n: orthonormal
        dwt      T[v, p] = low[p + L - 2 - 2v], T[F/2 + v, p] = high[p + L - 2 - 2v], for v in [0, F/2):
                 one level of a wavelet; low is ``low_pass`` of length L, high[j] = (-1)^j low[L - 1 - j],
                 both zero elsewhere; F is n + L - 2, made even
    """

    c_N: Tensor
    places: Places


@dataclass(frozen=True, slots=True, eq=False)
class Circulant:
    """``y[m] += Σ_n irfft(g[m, n] · rfft(x[n]))``: blocks of b x b circulant matrices, x and y cut into
    pieces of ``block_size`` b. ``spectrum_MNK2`` [O/b, I/b, b/2 + 1, 2] float32 holds the real and imaginary
    parts of g, with every scale."""

    spectrum_MNK2: Tensor
    block_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """``y += S x`` with S in CSR: ``row_ends`` int64 [O + 1], ``columns_N`` int32, ``values_N`` float32.

    Columns are in [0, I); within a row they may come in any order and must not repeat.
    """

    row_ends: Tensor
    columns_N: Tensor
    values_N: Tensor
    in_features: int


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A dense block on some channels, ``index_N`` int64, distinct, in any order; ``block`` float32:
    ``input``: ``y += S x[index]``, block S [O, N], index in [0, I).
    ``output``: ``y[index] += S x``, block S [N, I], index in [0, O).
    """

    side: Literal["input", "output"]
    index_N: Tensor
    block: Tensor
    out_features: int


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """``y += Δ x``, ``delta_OI`` [O, I] float32: for what is exact but has no small form. Its bytes count."""

    delta_OI: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """``y += (w1 ⊗ w2) x``: ``Y = w1 X w2ᵀ``, x read row by row as X [M, N] and Y [L, K] written so as y.

    ``w1_LM`` [L, M] holds every scale. ``w2_KR`` is w2 itself, [K, N]; or, with ``w2_RN`` [R, N], it is
    [K, R] and w2 is their product. All float32; O = L K, I = M N.
    """

    w1_LM: Tensor
    w2_KR: Tensor
    w2_RN: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Basis:
    """Two explicit matrices that many adapters share: ``p_NPI`` [N_p, P, I], ``q_NOQ`` [N_q, O, Q], float32.

    N_p and N_q are the number of blocks, or 1 where all blocks use the same matrix.
    """

    p_NPI: Tensor
    q_NOQ: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Projected:
    """A small core in an explicit shared basis, ``y += Σ_n outer_n ∘ Q_n (S_n (P_n (inner_n ∘ x)))``.

    ``form`` says how ``core`` is read: ``diagonal``: [N, P], one diagonal for each block (P = Q); ``dense``:
    [Q, P], one block; ``sparse``: [K] values at ``rows_K`` in [0, Q) and ``columns_K`` in [0, P), int64, one
    block, equal places add. ``inner_NI`` and ``outer_NO`` are element-wise, None for ones. Every scale is in
    the core already; all floats are float32.
    """

    form: Literal["diagonal", "dense", "sparse"]
    core: Tensor
    basis: Basis
    rows_K: Tensor | None = None
    columns_K: Tensor | None = None
    inner_NI: Tensor | None = None
    outer_NO: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """An element-wise gain and shift, as a change:
    ``input``: ``x' = x + (gain − 1) ∘ x`` before the base product, ``gain`` [I], no shift.
    ``output``: ``y += (gain − 1) ∘ y0 + shift``, ``gain`` and ``shift`` [O], y0 with the base's bias.
    """

    side: Literal["input", "output"]
    gain: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Small blocks that turn the input or the output, as a change; R need not be orthogonal.

    ``input``: ``x' = x + (R x − x)`` before the base product, and with ``scale_O``, which no part of another
    kind that changes the input is beside, ``y += (scale − 1) ∘ (W R x)``; alone ``y = scale ∘ (W R x) + b``.
    ``output``: ``y += R y0 − y0``, y0 with the base's bias, no scale.

    R is a product of factors, the first of which acts first. Factor f cuts the vector into chunks of
    ``chunks[f]`` entries, and both halves of a chunk into pieces of B/2: block after block multiplies one
    piece of the first half, joined with the piece in its place in the second half; a chunk of B entries is
    one block. ``blocks_FSBB``: R's in float32, R − 1 in bfloat16, as C++ reads them. All use one if S is 1.
    """

    side: Literal["input", "output"]
    blocks_FSBB: Tensor
    chunks: tuple[int, ...]
    scale_O: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """At an embedding alone: ``y += rows_KO[k]`` where the token is ``tokens_K[k]``.

    ``tokens_K`` int64, increasing; ``rows_KO`` float32, [K, O]: changes of whole rows of the table.
    """

    tokens_K: Tensor
    rows_KO: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SlicedLowRank:
    """At a bare parameter alone: ``W[e] += B[e] A[e]`` for each slice; the module runs with the changed W.
    ``a_ERI`` [slices, R, I] and ``b_EOR`` [slices, O, R], float32, every scale in B; a slice is [O, I]."""

    a_ERI: Tensor
    b_EOR: Tensor


Entries = Sparse | SlicedEllpack
ByMatrix = Block | Dense | PackedDense | Kronecker | Projected | PackedProjected
FromInput = LowRank | Spectral | Circulant | Entries | ByMatrix | TokenRows
Part = FromInput | Diagonal | Rotation | Routed | RoutedBlock | SlicedLowRank
AnyPart = Part | Prompt | AttentionPrompt | Scout


@dataclass(frozen=True, slots=True, eq=False)
class AdapterProgram:
    """One adapter, ready to run: for each adapted site (its path in the base) the parts that act there.

    With a ``prompt`` it puts virtual tokens at positions 0 to V - 1, before a request's own. Prompts have no
    weighted sum: such an adapter runs alone and with weight 1. What it does in ``attention`` is by layer.
    With ``invocation_tokens`` it acts only from the first token of their last occurrence in a request's
    prompt on, and on all that follows; a request without them is not the adapter's. A ``scout`` gives the
    gates of `Routed` parts with a `Scouted` router.
    """

    sites: Mapping[str, tuple[Part, ...]]
    prompt: Prompt | None = None
    attention: Mapping[int, AttentionPrompt] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    scout: Scout | None = None

    @property
    def virtual_tokens(self) -> int:
        """V: positions of each request that are the adapter's."""
        return 0 if self.prompt is None else self.prompt.num_tokens

    @property
    def row_copies(self) -> int:
        """How many times a row of its requests runs through the block where that is most often."""
        parts = (part for own in self.sites.values() for part in own)
        return max((part.copies for part in parts if isinstance(part, RoutedBlock)), default=1)

    def placed_parts(self) -> Iterator[tuple[str, AnyPart]]:
        """Everything that the adapter consists of, with the place where it acts."""
        yield from ((path, part) for path, parts in self.sites.items() for part in parts)
        lone = {"prompt": self.prompt, "scout": self.scout}
        yield from ((place, part) for place, part in lone.items() if part is not None)
        yield from ((f"attention of layer {layer}", part) for layer, part in self.attention.items())

    @property
    def prepared_bytes(self) -> int:
        """Bytes that this adapter alone needs in memory; exact on the meta device too."""
        parts = [part for _, part in self.placed_parts()]
        tensors = sum(tensor.nbytes for part in parts for tensor in owned_tensors(part))
        return tensors + sum(map(pattern_bytes, parts)) - repeated_router_bytes(parts)

    @property
    def shared_bytes(self) -> dict[int, int]:
        """Bytes of each tensor that it shares with others, by the tensor's identity."""
        return {id(t): t.nbytes for _, part in self.placed_parts() for t in shared_tensors(part)}


def shared_tensors(part: AnyPart) -> Iterator[Tensor]:
    """The tensors of a part's basis, where others may use it, too."""
    for basis in values_of(part):
        if isinstance(basis, Basis | PackedBasis) or (isinstance(basis, Places) and not basis.is_own):
            yield from (value for value in values_of(basis) if isinstance(value, Tensor))
    if isinstance(part, Routed):
        yield from (t for expert in part.experts for inner in expert for t in shared_tensors(inner))


def owned_tensors(part: AnyPart | Router) -> Iterator[Tensor]:
    """The tensors of a part that belong to its adapter, without the shared basis."""
    for value in values_of(part):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Places) and value.is_own:
            yield from (value.rows_N, value.columns_N)
        elif isinstance(value, Router) and not (isinstance(part, Routed) and part.from_block):
            yield from owned_tensors(value)
        elif isinstance(part, Scout) and isinstance(value, tuple):
            yield from value
    if isinstance(part, Routed):
        yield from (t for expert in part.experts for inner in expert for t in owned_tensors(inner))


def pattern_bytes(part: AnyPart) -> int:
    """What operators keep beside own places, at most: 12 bytes for each entry of S and each of its rows."""
    inner = [each for expert in part.experts for each in expert] if isinstance(part, Routed) else [part]
    own = [each.places for each in inner if isinstance(each, Spectral) and each.places.is_own]
    return sum(12 * (len(each.rows_N) + 2 * (each.out_features // 2 + 1)) for each in own)
