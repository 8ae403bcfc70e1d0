"""Every family from its formula, one scalar at a time, in float64. Slow on purpose: meant to be read and believed.

A function takes the tensors of one layer (suffix -> tensor), the layer's weight and, where the file does not tell
everything, a config (see ``Case.config``). It returns the full-strength ΔW in the shape of the weight, float64.
A weight is read as ``w[o][i][p]``: output, input, and the kernel positions flattened to one axis ``p`` (one position
for a Linear). Shapes in the docstrings: ``out in r`` as usual, ``*k`` the kernel axes, ``P`` their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
Matrix = list[list[float]]
Cube = list[list[list[float]]]

NOTHING: Config = {}


# ---- tensors <-> nested lists


def vector(t: Tensor) -> list[float]:
    """Any tensor as a flat list."""
    return t.detach().double().reshape(-1).tolist()


def matrix(t: Tensor) -> Matrix:
    """``(a, *rest)`` as rows: axis 0 stays, the rest is flattened row-major."""
    return t.detach().double().reshape(t.shape[0], -1).tolist()


def cube(t: Tensor) -> Cube:
    """``(a, b, *k)`` as ``[a][b][p]``."""
    return t.detach().double().reshape(t.shape[0], t.shape[1], -1).tolist()


def shaped(values: Any, base: Tensor) -> Tensor:
    """Nested lists as a float64 tensor in the shape of the weight."""
    return torch.tensor(values, dtype=torch.float64).reshape(base.shape)


def weight_cube(base: Tensor) -> Cube:
    """The layer's weight as ``[o][i][p]``; an embedding or a Linear has one kernel position."""
    return cube(base if base.dim() > 2 else base.unsqueeze(-1))


# ---- small matrix algebra


def identity(n: int) -> Matrix:
    return [[1.0 if a == b else 0.0 for b in range(n)] for a in range(n)]


def transposed(m: Matrix) -> Matrix:
    return [[row[c] for row in m] for c in range(len(m[0]))]


def product(a: Matrix, b: Matrix) -> Matrix:
    """``(n, r) x (r, m)``."""
    if len(a[0]) != len(b):
        raise ValueError(f"cannot multiply ({len(a)}, {len(a[0])}) by ({len(b)}, {len(b[0])})")
    return [[sum(a[i][q] * b[q][j] for q in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]


def combined(a: Matrix, b: Matrix, factor: float = 1.0) -> Matrix:
    """``a + factor * b``."""
    return [[x + factor * y for x, y in zip(ra, rb, strict=True)] for ra, rb in zip(a, b, strict=True)]


def times(a: Matrix, factor: float) -> Matrix:
    return [[x * factor for x in row] for row in a]


def inverse(m: Matrix) -> Matrix:
    """Gauss-Jordan with row pivoting."""
    n = len(m)
    rows = [list(row) + unit for row, unit in zip(m, identity(n), strict=True)]
    for c in range(n):
        pivot = max(range(c, n), key=lambda r: abs(rows[r][c]))
        rows[c], rows[pivot] = rows[pivot], rows[c]
        rows[c] = [x / rows[c][c] for x in rows[c]]
        for r in range(n):
            if r != c:
                factor = rows[r][c]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[n:] for row in rows]


def frobenius(blocks: list[Matrix]) -> float:
    """One norm over all blocks together."""
    return math.sqrt(sum(x * x for block in blocks for row in block for x in row))


# ---- scale


def alpha_over_rank(tensors: Tensors, rank: int, config: Config) -> float:
    """The config's scale where it gives one (peft); else alpha / rank; no alpha, or alpha 0, means 1."""
    if "scale" in config:
        return float(config["scale"])
    if "alpha" not in tensors:
        return 1.0
    alpha = float(tensors["alpha"].double().reshape(-1)[0])
    return alpha / rank if alpha != 0 else 1.0


def first(tensors: Tensors, *suffixes: str) -> Tensor:
    """The tensor under whichever of the spellings is there."""
    for suffix in suffixes:
        if suffix in tensors:
            return tensors[suffix]
    raise KeyError(f"none of {suffixes} in {sorted(tensors)}")


# ---- LoRA


def lora(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """LoRA, LoCon, rs-LoRA: up ``(out, r, 1...)``, down ``(r, in, *k)``; embedding A ``(r, num)``, B ``(dim, r)``.

    ``ΔW[o, j] = scale · Σ_q up[o, q] · down[q, j]``, j over ``in·P``; an embedding's is the transpose of that.
    """
    down = matrix(first(tensors, "lora_down.weight", "lora_A.weight", "lora_embedding_A"))
    up = matrix(first(tensors, "lora_up.weight", "lora_B.weight", "lora_embedding_B"))
    scale = alpha_over_rank(tensors, len(down), config)
    rows = times(product(up, down), scale)
    return shaped(transposed(rows) if "lora_embedding_A" in tensors else rows, base)


def lora_bias(tensors: Tensors, config: Config = NOTHING) -> Tensor | None:
    """PEFT ``lora_bias``: ``Δb = scale · lora_B.bias``."""
    if "lora_B.bias" not in tensors:
        return None
    scale = alpha_over_rank(tensors, tensors["lora_A.weight"].shape[0], config)
    return tensors["lora_B.bias"].double() * scale


def contracted(core: Cube, up: Matrix, down: Matrix) -> Cube:
    """``[o][i][p] = Σ_ab core[a][b][p] · up[o][a] · down[b][i]``: the Tucker form shared by three families."""
    positions = range(len(core[0][0]))
    ranks = [(a, b) for a in range(len(core)) for b in range(len(core[0]))]
    return [
        [[sum(core[a][b][p] * row[a] * down[b][i] for a, b in ranks) for p in positions] for i in range(len(down[0]))]
        for row in up
    ]


def tucker(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """Tucker LoCon: up ``(out, r, 1...)``, mid ``(r, r, *k)``, down ``(r, in, 1...)``.

    ``ΔW[o, i, p] = scale · Σ_ab up[o, a] · mid[a, b, p] · down[b, i]``.
    """
    up, down = matrix(tensors["lora_up.weight"]), matrix(tensors["lora_down.weight"])
    scale = alpha_over_rank(tensors, len(down), config)
    return scale * shaped(contracted(cube(tensors["lora_mid.weight"]), up, down), base)


def sparse(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """LoRA with a sparse residual: indices ``(2, nnz)``, values ``(nnz,)``, size ``(2,)`` = ``(out, in·P)``.

    ``ΔW = scale · (up @ down + E)``: the residual is added before the scale.
    """
    down, up = matrix(tensors["lora_down.weight"]), matrix(tensors["lora_up.weight"])
    rows = product(up, down)
    height, width = (int(n) for n in vector(tensors["bias_size"]))
    if (height, width) != (len(rows), len(rows[0])):
        raise ValueError(f"residual is {(height, width)}, the layer {(len(rows), len(rows[0]))}")
    at_row, at_column = (vector(axis) for axis in tensors["bias_indices"])
    for r, c, value in zip(at_row, at_column, vector(tensors["bias_values"]), strict=True):
        rows[int(r)][int(c)] += value
    return alpha_over_rank(tensors, len(down), config) * shaped(rows, base)


# ---- LoHa


def loha(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """LoHa: a ``(out, r)``, b ``(r, in·P)``. ``ΔW = scale · (w1_a @ w1_b) ⊙ (w2_a @ w2_b)``."""
    one = product(matrix(tensors["hada_w1_a"]), matrix(tensors["hada_w1_b"]))
    two = product(matrix(tensors["hada_w2_a"]), matrix(tensors["hada_w2_b"]))
    scale = alpha_over_rank(tensors, tensors["hada_w1_b"].shape[0], config)
    rows = [[scale * x * y for x, y in zip(r1, r2, strict=True)] for r1, r2 in zip(one, two, strict=True)]
    return shaped(rows, base)


def loha_tucker(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """Tucker LoHa: t ``(r, r, *k)``, a ``(r, out)`` (the other way round than plain), b ``(r, in)``.

    ``Wj[o, i, p] = Σ_ab tj[a, b, p] · wj_a[a, o] · wj_b[b, i]``, ``ΔW = scale · W1 ⊙ W2``.
    """
    scale = alpha_over_rank(tensors, tensors["hada_w1_b"].shape[0], config)
    halves = []
    for j in ("1", "2"):
        up = transposed(matrix(tensors[f"hada_w{j}_a"]))
        halves.append(shaped(contracted(cube(tensors[f"hada_t{j}"]), up, matrix(tensors[f"hada_w{j}_b"])), base))
    return scale * halves[0] * halves[1]


# ---- LoKr


def lokr_left(tensors: Tensors) -> Matrix:
    """w1 ``(l, m)``, or w1_a ``(l, r)`` @ w1_b ``(r, m)``."""
    if "lokr_w1" in tensors:
        return matrix(tensors["lokr_w1"])
    return product(matrix(tensors["lokr_w1_a"]), matrix(tensors["lokr_w1_b"]))


def lokr_right(tensors: Tensors, positions: int) -> Cube:
    """w2 as ``[k][n][p]`` from its full, decomposed or Tucker form.

    full ``(k, n, *K)``; decomposed ``(k, r)`` @ ``(r, n·P)``; Tucker t2 ``(r, r, *K)``, a ``(r, k)``, b ``(r, n)``.
    """
    if "lokr_t2" in tensors:
        up = transposed(matrix(tensors["lokr_w2_a"]))
        return contracted(cube(tensors["lokr_t2"]), up, matrix(tensors["lokr_w2_b"]))
    if "lokr_w2" in tensors:
        rows = matrix(tensors["lokr_w2"])
    else:
        rows = product(matrix(tensors["lokr_w2_a"]), matrix(tensors["lokr_w2_b"]))
    return [[row[n * positions : (n + 1) * positions] for n in range(len(row) // positions)] for row in rows]


def lokr_scale(tensors: Tensors, config: Config) -> float:
    """alpha / r once if either half is decomposed; both full: 1 whatever alpha says. PEFT scales all by its config."""
    if "scale" in config:
        return float(config["scale"])
    for factor in ("lokr_w2_b", "lokr_w1_b"):
        if factor in tensors:
            return alpha_over_rank(tensors, tensors[factor].shape[0], config)
    return 1.0


def lokr(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """LoKr: ``ΔW[x·K + k, y·N + n, p] = scale · w1[x, y] · w2[k, n, p]`` for w1 ``(l, m)``, w2 ``(K, N, *k)``."""
    positions = math.prod(base.shape[2:])
    left, right = lokr_left(tensors), lokr_right(tensors, positions)
    scale = lokr_scale(tensors, config)
    rows = [
        [[scale * a * value for value in block] for a in left_row for block in right_row]
        for left_row in left
        for right_row in right
    ]
    return shaped(rows, base)


# ---- full, norm, IA3, GLoRA


def full(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """diff, in the shape of the weight."""
    return shaped(vector(tensors["diff"]), base)


def norm(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """w_norm ``(C,)``."""
    return shaped(vector(tensors["w_norm"]), base)


def ia3(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """LyCORIS IA3: weight ``(n,)``, conv ``(1, n, 1...)``, n = out or in; ``ΔW[o, i, p] = W[o, i, p] · v[o or i]``."""
    on_input = bool(vector(tensors["on_input"])[0])
    return scaled_axis(base, vector(tensors["weight"]), on_input)


def scaled_axis(base: Tensor, v: list[float], on_input: bool) -> Tensor:
    """Each entry of the weight times the factor of its row, or of its input column."""
    w = weight_cube(base)
    if len(v) != (len(w[0]) if on_input else len(w)):
        raise ValueError(f"{len(v)} factors on the {'input' if on_input else 'output'} axis of {tuple(base.shape)}")
    rows = [[[x * v[i if on_input else o] for x in w[o][i]] for i in range(len(w[o]))] for o in range(len(w))]
    return shaped(rows, base)


def peft_ia3(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """PEFT IA3: ia3_l is the factor itself, not its distance from 1; which side is known to the config only."""
    v = [x - 1.0 for x in vector(tensors["ia3_l"])]
    return scaled_axis(base, v, bool(config["feedforward"]))


def peft_ia3_bias(tensors: Tensors, config: Config) -> Tensor | None:
    """On the output side PEFT scales the bias with the rows."""
    if config["feedforward"] or config.get("base_bias") is None:
        return None
    return config["base_bias"].double() * (tensors["ia3_l"].double().reshape(-1) - 1.0)


def glora_factors(tensors: Tensors, base: Tensor) -> tuple[Matrix, Matrix, int]:
    """A ``(in, in)``, B ``(out, in·P)`` and the rank, in whichever of the two layouts the tensors are."""
    a1, a2, b1, b2 = (matrix(tensors[f"{n}.weight"]) for n in ("a1", "a2", "b1", "b2"))
    r = tensors["a1.weight"].shape[0]
    old = all(n == r for n in (len(a2[0]), len(b1), len(b2[0])))
    new = all(n == len(a1[0]) for n in (len(a2), len(b1[0]), len(b2)))
    if old and new:
        old = base.shape[0] == base.shape[1] == len(a2)
    if old:
        return product(a2, a1), product(b2, b1), r
    return product(a1, a2), product(b1, b2), len(a2)


def glora(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """``ΔW[o, j, p] = scale · (Σ_i W[o, i, p] · A[i, j] + B[o, j·P + p])``; layouts in ``glora_factors``."""
    a, b, rank = glora_factors(tensors, base)
    w = weight_cube(base)
    scale = alpha_over_rank(tensors, rank, config)
    columns, positions = range(len(w[0])), range(len(w[0][0]))
    rows = [
        [
            [scale * (sum(w[o][i][p] * a[i][j] for i in columns) + b[o][j * len(positions) + p]) for p in positions]
            for j in columns
        ]
        for o in range(len(w))
    ]
    return shaped(rows, base)


# ---- OFT and BOFT as LyCORIS has them


def skew_blocks(blocks: Tensor) -> list[Matrix]:
    """``(..., n, n)`` -> ``Q = X - Xᵀ`` per block, leading axes flattened."""
    flat = blocks.reshape(-1, *blocks.shape[-2:])
    return [combined(matrix(x), transposed(matrix(x)), -1.0) for x in flat]


def clamped(q: list[Matrix], tensors: Tensors, out: int, config: Config) -> list[Matrix]:
    """alpha is a limit: ``‖Q‖ ≤ alpha · out`` over all blocks; 0 or absent means none. kohya clamps always."""
    limit = float(tensors["alpha"].double()) * out if "alpha" in tensors else 0.0
    size = frobenius(q)
    if config.get("kohya"):
        return [times(block, (min(size, limit) + 1e-8) / (size + 1e-8)) for block in q]
    if limit > 0 and size > limit:
        return [times(block, limit / (size + 1e-8)) for block in q]
    return q


def rotations(tensors: Tensors, base: Tensor, config: Config) -> list[Matrix]:
    """``R = (I + Q)(I - Q)⁻¹`` per block."""
    q = clamped(skew_blocks(tensors["oft_blocks"]), tensors, base.shape[0], config)
    unit = identity(len(q[0]))
    return [product(combined(unit, block), inverse(combined(unit, block, -1.0))) for block in q]


def rescaled(rows: Matrix, tensors: Tensors) -> Matrix:
    """Rows times ``rescale`` ``(out, 1...)`` if there is one."""
    if "rescale" not in tensors:
        return rows
    return [[x * factor for x in row] for row, factor in zip(rows, vector(tensors["rescale"]), strict=True)]


def oft(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """Diag-OFT: blocks ``(k, n, n)``, ``k·n = out``. ``W'[b·n + m] = rescale · Σ_j R_b[j, m] · W[b·n + j]``."""
    w = matrix(base)
    n = tensors["oft_blocks"].shape[-1]
    rows: Matrix = []
    for b, r in enumerate(rotations(tensors, base, config)):
        rows += product(transposed(r), w[b * n : (b + 1) * n])
    return shaped(rescaled(rows, tensors), base) - base.double()


def boft(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """LyCORIS BOFT: blocks ``(m, d, b, b)``, ``d·b = out``; stage i mixes rows ``2^i·b/2`` apart, then moves them back.

    Row ``c·2K + g·K + j`` (g = 0, 1; ``K = 2^i·b/2``) stands at ``c·2K + j·2 + g`` while the blocks act, with R itself.
    """
    m, d, b, _ = tensors["oft_blocks"].shape
    all_rotations = rotations(tensors, base, config)
    rows = matrix(base)
    for stage in range(m):
        order = butterfly_order(len(rows), 2**stage * (b // 2))
        moved = [rows[source] for source in order]
        mixed: Matrix = []
        for block in range(d):
            mixed += product(all_rotations[stage * d + block], moved[block * b : (block + 1) * b])
        for position, source in enumerate(order):
            rows[source] = mixed[position]
    return shaped(rescaled(rows, tensors), base) - base.double()


def butterfly_order(length: int, step: int) -> list[int]:
    """For each place during the stage, the row that stands there."""
    return [c * 2 * step + g * step + j for c in range(length // (2 * step)) for j in range(step) for g in (0, 1)]


# ---- OFT and BOFT as PEFT has them


def unpacked(values: list[float], n: int) -> Matrix:
    """The strict upper triangle, row by row, into ``U - Uᵀ``."""
    q = [[0.0] * n for _ in range(n)]
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n)]
    for (a, b), x in zip(pairs, values, strict=True):
        q[a][b], q[b][a] = x, -x
    return q


def cayley_neumann(q: Matrix) -> Matrix:
    """Five terms: ``I + 2Q + 2Q² + 2Q³ + Q⁴``."""
    total, power = identity(len(q)), identity(len(q))
    for factor in (2.0, 2.0, 2.0, 1.0):
        power = product(power, q)
        total = combined(total, power, factor)
    return total


def cayley_exact(q: Matrix) -> Matrix:
    """``(I - Q)(I + Q)⁻¹``: to first order the inverse of what the Neumann form is."""
    unit = identity(len(q))
    return product(combined(unit, q, -1.0), inverse(combined(unit, q)))


def peft_oft(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """PEFT OFT v2: oft_R.weight ``(blocks, b(b-1)/2)``, one row if shared. ``W'[o, blk] = R[blk] @ W[o, blk]``.

    The blocks cut the input side, kernel included. PEFT's forward pass agrees for Linear and 1x1 conv; for a 3x3 conv
    it rotates unfolded patches and folds them back, which no weight can express: there only its merge is this formula.
    With the marker ``oft_R.scaled_oft`` (OneTrainer) the packed values are divided by ``2·sqrt(b - 1)`` first.
    """
    packed = tensors["oft_R.weight"]
    b = round((1 + math.sqrt(1 + 8 * packed.shape[1])) / 2)
    divisor = 2.0 * math.sqrt(b - 1) if "oft_R.scaled_oft" in tensors else 1.0
    cayley = cayley_neumann if config.get("use_cayley_neumann", True) else cayley_exact
    blocks = [cayley(unpacked([x / divisor for x in row], b)) for row in matrix(packed)]
    rows = []
    for w in matrix(base):
        chunks = [w[start : start + b] for start in range(0, len(w), b)]
        turned = [product(blocks[i % len(blocks)], [[x] for x in chunk]) for i, chunk in enumerate(chunks)]
        rows.append([column[0] for chunk in turned for column in chunk])
    return shaped(rows, base) - base.double()


def peft_boft(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """PEFT BOFT: boft_R ``(m, d, b, b)``, ``d·b = in·P``; boft_s ``(out, 1)`` or conv ``(1, out)``.

    ``S = (X - Xᵀ)/2``, ``R = (I - S)(I + S)⁻¹``; stage i is ``B_i = P_i · blockdiag(R_i) · P_iᵀ`` and, stage 0 acting
    first, ``W' = boft_s ⊙ (B_{m-1} … B_0 · Wᵀ)ᵀ``.
    """
    blocks = tensors["boft_R"]
    m, d, b, _ = blocks.shape
    rows = matrix(base)
    for stage in range(m):
        order = peft_butterfly_order(d * b, b, stage)
        turns = [cayley_exact(times(q, 0.5)) for q in skew_blocks(blocks[stage])]
        rows = [turned_row(row, order, turns) for row in rows]
    factors = vector(tensors["boft_s"])
    return shaped([[x * f for x in row] for row, f in zip(rows, factors, strict=True)], base) - base.double()


def peft_butterfly_order(length: int, b: int, stage: int) -> list[int]:
    """``order[x]``: the column of the 1 in row x of P; groups of ``b·2^stage``: half-blocks 0, 2, .. then 1, 3, .."""
    group, half = b * 2**stage, b // 2
    if stage == 0:
        return list(range(length))
    segments = list(range(0, group // half, 2)) + list(range(1, group // half, 2))
    return [start + s * half + j for start in range(0, length, group) for s in segments for j in range(half)]


def turned_row(row: list[float], order: list[int], turns: list[Matrix]) -> list[float]:
    """``P · blockdiag(R) · Pᵀ`` on one vector, with ``P[x, order[x]] = 1``."""
    b = len(turns[0])
    gathered = [0.0] * len(row)
    for x, y in enumerate(order):
        gathered[y] = row[x]
    mixed = []
    for k, turn in enumerate(turns):
        mixed += [column[0] for column in product(turn, [[x] for x in gathered[k * b : (k + 1) * b]])]
    return [mixed[y] for y in order]


# ---- T-LoRA, DoRA


def tlora(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """T-LoRA, Linear: q ``(r, in)``, p ``(out, r)``, λ ``(1, r)``, less the top-r part of the SVD of the weight.

    ``ΔW = scale · (p · diag(λ) · q - U_r · diag(S_r) · V_r)``.
    """
    q, p, lam = matrix(tensors["q_layer.weight"]), matrix(tensors["p_layer.weight"]), vector(tensors["lambda_layer"])
    u, s, v = np.linalg.svd(base.double().numpy(), full_matrices=False)
    start = product([[u[o][k] * s[k] for k in range(len(q))] for o in range(len(p))], v[: len(q)].tolist())
    now = product([[row[k] * lam[k] for k in range(len(q))] for row in p], q)
    return alpha_over_rank(tensors, len(q), config) * shaped(combined(now, start, -1.0), base)


def magnitudes(tensors: Tensors, base: Tensor) -> tuple[list[float], bool]:
    """The magnitude vector and whether it lies on axis 1 of the weight rather than on axis 0.

    PEFT's has one entry per output feature in every shape: axis 0, but axis 1 of an embedding's ``(num, dim)``.
    """
    if "dora_scale" not in tensors:
        peft = vector(first(tensors, "lora_magnitude_vector", "lora_magnitude_vector.weight"))
        return peft, "lora_embedding_A" in tensors
    scale = tensors["dora_scale"]
    if scale.shape[0] == base.shape[0] == scale.numel():
        return vector(scale), False
    if scale.shape[0] == 1 and scale.shape[1] == base.shape[1] == scale.numel():
        return vector(scale), True
    raise ValueError(f"dora_scale {tuple(scale.shape)} fits no axis of {tuple(base.shape)}")


def dora(inner: Tensor, tensors: Tensors, base: Tensor) -> Tensor:
    """``M = W + D``; ``W' = M · g / ‖M‖`` per output row or per input column (kernel included); eps left out."""
    g, on_input = magnitudes(tensors, base)
    m = weight_cube(base.double() + inner)
    sums = [0.0] * len(g)
    for o, row in enumerate(m):
        for i, kernel in enumerate(row):
            sums[i if on_input else o] += sum(x * x for x in kernel)
    factors = [size / math.sqrt(total) for size, total in zip(g, sums, strict=True)]
    rows = [[[x * factors[i if on_input else o] for x in m[o][i]] for i in range(len(m[o]))] for o in range(len(m))]
    return shaped(rows, base) - base.double()


def with_dora(family: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DoRA around a family."""

    def wrapped(tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
        return dora(family(tensors, base, config), tensors, base)

    return wrapped


# ---- all

FAMILIES: dict[str, Callable[..., Tensor]] = {
    "lora": lora,
    "tucker": tucker,
    "loha": loha,
    "loha_tucker": loha_tucker,
    "lokr": lokr,
    "sparse": sparse,
    "full": full,
    "norm": norm,
    "ia3": ia3,
    "glora": glora,
    "oft": oft,
    "boft": boft,
    "tlora": tlora,
    "peft_ia3": peft_ia3,
    "peft_oft": peft_oft,
    "peft_boft": peft_boft,
    "dora_lora": with_dora(lora),
    "dora_tucker": with_dora(tucker),
    "dora_loha": with_dora(loha),
    "dora_loha_tucker": with_dora(loha_tucker),
    "dora_lokr": with_dora(lokr),
}


def family_of(tensors: Tensors) -> str:
    """The family that a group of suffixes is, for files (what only a config tells apart is taken as LyCORIS')."""
    wrap = "dora_" if {"dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"} & set(tensors) else ""
    marks = {
        "bias_indices": "sparse",
        "lora_mid.weight": "tucker",
        "lora_down.weight": "lora",
        "lora_A.weight": "lora",
        "lora_embedding_A": "lora",
        "hada_t1": "loha_tucker",
        "hada_w1_a": "loha",
        "lokr_w1": "lokr",
        "lokr_w1_a": "lokr",
        "diff": "full",
        "w_norm": "norm",
        "on_input": "ia3",
        "ia3_l": "peft_ia3",
        "a1.weight": "glora",
        "oft_blocks": "boft" if "oft_blocks" in tensors and tensors["oft_blocks"].dim() == 4 else "oft",
        "oft_R.weight": "peft_oft",
        "boft_R": "peft_boft",
        "q_layer.weight": "tlora",
    }
    for mark, family in marks.items():
        if mark in tensors:
            return wrap + family
    raise KeyError(f"no family has {sorted(tensors)}")


def delta(family: str, tensors: Tensors, base: Tensor, config: Config = NOTHING) -> Tensor:
    """Full-strength ΔW, float64, in the shape of ``base``."""
    return FAMILIES[family](tensors, base, config)


def bias_delta(family: str, tensors: Tensors, config: Config = NOTHING) -> Tensor | None:
    """Full-strength Δb ``(out,)``, or None where the family leaves the bias alone."""
    if family in ("full", "norm"):
        name = "diff_b" if family == "full" else "b_norm"
        return tensors[name].double() if name in tensors else None
    if family == "peft_ia3":
        return peft_ia3_bias(tensors, config)
    return lora_bias(tensors, config)


def at_strength(base: Tensor, full_delta: Tensor, strength: float) -> Tensor:
    """The strength rule of every family: ``W + s · (W' - W)``, in float64."""
    return base.double() + strength * full_delta.double()
