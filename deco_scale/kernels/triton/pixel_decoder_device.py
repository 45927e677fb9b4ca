# mypy: disallow-untyped-defs=False
# mypy: disable-error-code=assignment
"""Device code of the fused pixel decoder: what one program does with a tile of pixels.

Shape letters: R pixels of all patches, T pixels of a tile, P pixels of a patch, C channels, W decoder width,
V width padded to a power of two, O outputs of a linear.

Columns beyond W are zero in every activation, and rows beyond R have a zero gradient: neither adds to a sum.

What is summed over pixels is added up in memory that a program has for itself, once for each of its tiles, and
torch adds the programs' sums in a fixed order: the result does not depend on how programs are scheduled. The
15,360 accumulators of width 32 with 3 blocks would fit the registers alone, but not beside the activations: with
blocks unrolled and the accumulators carried through the loop over tiles, the compiler spilled 4 to 5 KB a thread
(at its default of three stages). Here the sums pass through the cache, 60 KiB in and out for a tile.

The loops over blocks are loops of the run, so that code, registers and shared memory do not grow with their
number. Forward then reads 60 KiB of weights for each tile, from the cache; with the matrices of all blocks kept
from tile to tile it spilled 144 B a thread, and at width 64 in fp32 took 286 KiB of shared memory (Triton 3.6),
more than there is. In bf16 at width 32 forward spills nothing, backward 304 to 472 B a thread (sm_90, Triton 3.9
to 3.6; benchmarks/results/kernels_sm90.json). Not yet run on a GPU.
"""

import triton
import triton.language as tl

MATRICES = tl.constexpr(5)
"""Of a block, (W, W) each: shift, scale, gate of the modulation, first and last linear."""
VECTORS = tl.constexpr(7)
"""Of a block, (W) each: norm's weight and bias, biases of first, last, shift, scale, gate."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(x, DOT: tl.constexpr):
    """In type DOT, rounded to the nearest; on its way to bf16 the interpreter would cut bits off instead."""
    if INTERPRETED and tl.bfloat16 == DOT:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DOT)


@triton.jit
def _dot(a, b, total, DOT: tl.constexpr):
    """``total + a @ b``: operands rounded to DOT, summed in fp32, full precision where DOT is fp32."""
    a, b = _rounded(a, DOT), _rounded(b, DOT)
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bf16; in fp32 the products are the same.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _linear(a_TV, weight_OV, bias_V, DOT: tl.constexpr):
    """A linear, rounded to DOT as autocast does: backward then keeps it in as many bits as it has."""
    zeros = tl.zeros(a_TV.shape, tl.float32)
    return _rounded(_dot(a_TV, tl.trans(weight_OV), zeros, DOT) + bias_V[None, :], DOT)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_slope(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _vector(weights, start, W: tl.constexpr, V: tl.constexpr):
    column = tl.arange(0, V)
    return tl.load(weights + start + column, mask=column < W, other=0.0).to(tl.float32)


@triton.jit
def _block_matrices(weights, W: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr):
    """The matrices of the block whose first one is at ``weights``, as (V, V)."""
    column = tl.arange(0, V)
    inside = (column < W)[:, None] & (column < W)[None, :]
    places = column[:, None] * W + column[None, :]
    loaded = ()
    for index in tl.static_range(MATRICES):
        matrix = tl.load(weights + index * W * W + places, mask=inside, other=0.0)
        loaded = loaded + (_rounded(matrix, DOT),)
    return loaded


@triton.jit
def _normalize(x_TV, eps, W: tl.constexpr, V: tl.constexpr):
    """Layer norm without affine over the first W columns, and the reciprocal deviation (T)."""
    inside = (tl.arange(0, V) < W)[None, :]
    centred = tl.where(inside, x_TV - (tl.sum(x_TV, 1) / W)[:, None], 0.0)
    reciprocal_T = tl.rsqrt(tl.sum(centred * centred, 1) / W + eps)
    return centred * reciprocal_T[:, None], reciprocal_T


@triton.jit
def _normalize_backward(grad_TV, normal_TV, reciprocal_T, W: tl.constexpr, V: tl.constexpr):
    inside = (tl.arange(0, V) < W)[None, :]
    mean_T = tl.sum(grad_TV, 1) / W
    along_T = tl.sum(grad_TV * normal_TV, 1) / W
    grad_TV = (grad_TV - mean_T[:, None] - normal_TV * along_T[:, None]) * reciprocal_T[:, None]
    return tl.where(inside, grad_TV, 0.0)


@triton.jit
def _tile(start, P: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """Of the tile that begins at pixel ``start``: its first patch's offset, and from there each pixel's offset
    in channel 0; each pixel's number in its patch."""
    local_T = (start % P).to(tl.int32) + tl.arange(0, T)
    return start // P * (C * P), local_T // P * (C * P) + local_T % P, local_T % P


@triton.jit
def _embed(
    pixels, offsets_T, valid_T, number_T, constant, weights, P: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    V: tl.constexpr, EMBED: tl.constexpr,
):  # fmt: skip
    """The folded pixel embedding and input projection of a tile (T, V); its weight (C, W) is at EMBED."""
    column = tl.arange(0, V)
    x_TV = tl.load(constant + number_T[:, None] * W + column[None, :], mask=(column < W)[None, :], other=0.0)
    x_TV = x_TV.to(tl.float32)
    for channel in tl.static_range(C):
        value_T = tl.load(pixels + offsets_T + channel * P, mask=valid_T, other=0.0).to(tl.float32)
        x_TV += value_T[:, None] * _vector(weights, EMBED + channel * W, W, V)[None, :]
    return x_TV


@triton.jit
def _load_tile(condition, start, rows, W: tl.constexpr, V: tl.constexpr, T: tl.constexpr):
    """Condition (T, V) before SiLU, with its places from the tile's first and which of them exist."""
    column = tl.arange(0, V)
    places_TV = tl.arange(0, T)[:, None] * W + column[None, :]
    valid_TV = (start + tl.arange(0, T) < rows)[:, None] & (column < W)[None, :]
    raw_TV = tl.load(condition + start * W + places_TV, mask=valid_TV, other=0.0).to(tl.float32)
    return raw_TV, places_TV, valid_TV


@triton.jit
def _block(x_TV, condition_TV, matrices, vectors, eps, W: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr):
    """Output of a block, and what its backward needs; ``condition_TV`` is after SiLU, ``vectors`` a pointer."""
    shift = _linear(condition_TV, matrices[0], _vector(vectors, 4 * W, W, V), DOT)
    scale = _linear(condition_TV, matrices[1], _vector(vectors, 5 * W, W, V), DOT)
    gate = _linear(condition_TV, matrices[2], _vector(vectors, 6 * W, W, V), DOT)
    normal, reciprocal_T = _normalize(x_TV, eps, W, V)
    hidden = normal * _vector(vectors, 0, W, V)[None, :] + _vector(vectors, W, W, V)[None, :]
    hidden = _rounded(hidden * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32), DOT)
    first = _linear(hidden, matrices[3], _vector(vectors, 2 * W, W, V), DOT)
    last = _linear(_silu(first.to(tl.float32)), matrices[4], _vector(vectors, 3 * W, W, V), DOT)
    x_TV += gate.to(tl.float32) * last.to(tl.float32)
    return x_TV, (normal, reciprocal_T, scale, gate, hidden, first, last)


@triton.jit
def _block_backward(
    grad_TV, grad_condition_TV, condition_TV, state, matrices, vectors, matrix_sums, vector_sums,
    W: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's input and of the condition after SiLU; adds the tile's part to the block's sums."""
    normal, reciprocal_T, scale, gate, hidden, first, last = state
    norm_weight, norm_bias = _vector(vectors, 0, W, V)[None, :], _vector(vectors, W, W, V)[None, :]
    zeros = tl.zeros(grad_TV.shape, tl.float32)
    first = first.to(tl.float32)
    grad_gate = grad_TV * last.to(tl.float32)
    grad_last = grad_TV * gate.to(tl.float32)
    _add_matrix(matrix_sums + 4 * W * W, grad_last, _silu(first), W, V, DOT)
    _add_vector(vector_sums + 3 * W, grad_last, W, V)
    grad_first = _dot(grad_last, matrices[4], zeros, DOT) * _silu_slope(first)
    _add_matrix(matrix_sums + 3 * W * W, grad_first, hidden, W, V, DOT)
    _add_vector(vector_sums + 2 * W, grad_first, W, V)
    grad_hidden = _dot(grad_first, matrices[3], zeros, DOT)
    grad_scale = grad_hidden * (normal * norm_weight + norm_bias)
    grad_affine = grad_hidden * (1.0 + scale.to(tl.float32))
    _add_vector(vector_sums, grad_affine * normal, W, V)
    _add_vector(vector_sums + W, grad_affine, W, V)
    _add_vector(vector_sums + 4 * W, grad_hidden, W, V)
    _add_vector(vector_sums + 5 * W, grad_scale, W, V)
    _add_vector(vector_sums + 6 * W, grad_gate, W, V)
    _add_modulation(matrix_sums, grad_hidden, grad_scale, grad_gate, condition_TV, W, V, DOT)
    grad_condition_TV = _dot(grad_hidden, matrices[0], grad_condition_TV, DOT)
    grad_condition_TV = _dot(grad_scale, matrices[1], grad_condition_TV, DOT)
    grad_condition_TV = _dot(grad_gate, matrices[2], grad_condition_TV, DOT)
    grad_TV += _normalize_backward(grad_affine * norm_weight, normal, reciprocal_T, W, V)
    return grad_TV, grad_condition_TV


@triton.jit
def _add_vector(sums, parts_TV, W: tl.constexpr, V: tl.constexpr):
    column = tl.arange(0, V)
    total = tl.load(sums + column, mask=column < W, other=0.0) + tl.sum(parts_TV, 0)
    tl.store(sums + column, total, mask=column < W)


@triton.jit
def _add_matrix(sums, grad_TV, input_TV, W: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr):
    """Add the gradient of a linear's weight (outputs, inputs)."""
    column = tl.arange(0, V)
    places = sums + column[:, None] * W + column[None, :]
    inside = (column < W)[:, None] & (column < W)[None, :]
    total = _dot(tl.trans(_rounded(grad_TV, DOT)), input_TV, tl.load(places, mask=inside, other=0.0), DOT)
    tl.store(places, total, mask=inside)


@triton.jit
def _add_modulation(
    sums, shift_TV, scale_TV, gate_TV, condition_TV, W: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr
):
    """Add the gradient of the modulation's weight (3W, W).

    The three gradients, and zeros as a fourth, lie side by side: output ``row % 4`` of column ``row // 4``. One
    product with 4V rows has work for every warp; three with V rows would be computed by several warps alike.
    """
    zeros = tl.zeros(shift_TV.shape, tl.float32)
    joined = tl.join(tl.join(shift_TV, gate_TV), tl.join(scale_TV, zeros))
    joined = tl.reshape(_rounded(joined, DOT), (shift_TV.shape[0], 4 * V))
    row, column = tl.arange(0, 4 * V), tl.arange(0, V)
    places = sums + (row % 4 * W + row // 4)[:, None] * W + column[None, :]
    inside = (row % 4 < 3)[:, None] & (row // 4 < W)[:, None] & (column < W)[None, :]
    total = _dot(tl.trans(joined), condition_TV, tl.load(places, mask=inside, other=0.0), DOT)
    tl.store(places, total, mask=inside)


@triton.jit
def forward_kernel(
    patches, condition, constant, weights, out, rows, eps, P: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    V: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Each program takes every n-th tile of T pixels; pixels, conditions and outputs cross memory once.

    The loop over blocks is one of the run: code, registers and shared memory do not grow with their number.
    """
    EMBED: tl.constexpr = BLOCKS * (MATRICES * W + VECTORS) * W
    HEAD: tl.constexpr = EMBED + C * W
    vectors = weights + BLOCKS * MATRICES * W * W
    for tile in range(tl.program_id(0), tl.cdiv(rows, T), tl.num_programs(0)):
        start = tl.cast(tile, tl.int64) * T
        patch, offsets_T, number_T = _tile(start, P, C, T)
        valid_T = start + tl.arange(0, T) < rows
        x_TV = _embed(patches + patch, offsets_T, valid_T, number_T, constant, weights, P, C, W, V, EMBED)
        raw_TV = _load_tile(condition, start, rows, W, V, T)[0]
        condition_TV = _rounded(_silu(raw_TV), DOT)
        for index in range(BLOCKS):
            matrices = _block_matrices(weights + index * (MATRICES * W * W), W, V, DOT)
            x_TV = _block(x_TV, condition_TV, matrices, vectors + index * (VECTORS * W), eps, W, V, DOT)[0]
        normal = _normalize(x_TV, eps, W, V)[0]
        for channel in tl.static_range(C):
            head = _vector(weights, HEAD + channel * W, W, V)
            value_T = tl.sum(normal * head[None, :], 1) + tl.load(weights + HEAD + C * W + channel).to(tl.float32)
            tl.store(out + patch + offsets_T + channel * P, value_T, mask=valid_T)


@triton.jit
def backward_kernel(
    patches, condition, constant, weights, grad_out, grad_patches, grad_condition, inputs, constant_sums,
    weight_sums, rows, eps, P: tl.constexpr, C: tl.constexpr, W: tl.constexpr, V: tl.constexpr, T: tl.constexpr,
    BLOCKS: tl.constexpr, DOT: tl.constexpr, WITH_PATCHES: tl.constexpr,
):  # fmt: skip
    """Computes a tile forward, keeping the blocks' inputs in ``inputs`` (of this program), and then backward.

    T pixels times the number of programs must be a multiple of P: then a program meets the same T pixel positions
    in each of its tiles, and its gradients of their constants are (T, W) sums. Sums must be zero at first.
    """
    EMBED: tl.constexpr = BLOCKS * (MATRICES * W + VECTORS) * W
    HEAD: tl.constexpr = EMBED + C * W
    program = tl.program_id(0).to(tl.int64)
    inputs += program * (BLOCKS * T * V)
    constant_sums += program * (T * W)
    sums = weight_sums + program * (HEAD + C * W + C)
    vectors, vector_sums = weights + BLOCKS * MATRICES * W * W, sums + BLOCKS * MATRICES * W * W
    own_TV = tl.arange(0, T)[:, None] * V + tl.arange(0, V)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, T), tl.num_programs(0)):
        start = tl.cast(tile, tl.int64) * T
        patch, offsets_T, number_T = _tile(start, P, C, T)
        valid_T = start + tl.arange(0, T) < rows
        x_TV = _embed(patches + patch, offsets_T, valid_T, number_T, constant, weights, P, C, W, V, EMBED)
        raw_TV, places_TV, valid_TV = _load_tile(condition, start, rows, W, V, T)
        condition_TV = _rounded(_silu(raw_TV), DOT)
        for index in range(BLOCKS):
            tl.store(inputs + index * (T * V) + own_TV, x_TV)
            matrices = _block_matrices(weights + index * (MATRICES * W * W), W, V, DOT)
            x_TV, _ = _block(x_TV, condition_TV, matrices, vectors + index * (VECTORS * W), eps, W, V, DOT)
        grad_TV = _head_backward(x_TV, grad_out + patch, offsets_T, valid_T, weights, sums, eps, P, C, W, V, HEAD)
        grad_condition_TV = tl.zeros((T, V), tl.float32)
        # What one thread has written, here or in the tile before, another one reads.
        tl.debug_barrier()
        for step in range(BLOCKS):
            index = BLOCKS - 1 - step
            x_TV = tl.load(inputs + index * (T * V) + own_TV)
            matrices = _block_matrices(weights + index * (MATRICES * W * W), W, V, DOT)
            block_vectors = vectors + index * (VECTORS * W)
            _, state = _block(x_TV, condition_TV, matrices, block_vectors, eps, W, V, DOT)
            grad_TV, grad_condition_TV = _block_backward(
                grad_TV, grad_condition_TV, condition_TV, state, matrices, block_vectors,
                sums + index * (MATRICES * W * W), vector_sums + index * (VECTORS * W), W, V, DOT,
            )  # fmt: skip
        grad_raw_TV = grad_condition_TV * _silu_slope(raw_TV)
        tl.store(grad_condition + start * W + places_TV, grad_raw_TV, mask=valid_TV)
        _embed_backward(
            grad_TV, patches + patch, grad_patches + patch, offsets_T, valid_T, weights, sums, constant_sums,
            P, C, W, V, T, EMBED, WITH_PATCHES,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _head_backward(
    x_TV, grad_out, offsets_T, valid_T, weights, sums, eps, P: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    V: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Gradient of the last block's output; adds to the sums of the head's weight (C, W) and bias (C)."""
    normal, reciprocal_T = _normalize(x_TV, eps, W, V)
    grad_TV = tl.zeros(x_TV.shape, tl.float32)
    for channel in tl.static_range(C):
        value_T = tl.load(grad_out + offsets_T + channel * P, mask=valid_T, other=0.0).to(tl.float32)
        grad_TV += value_T[:, None] * _vector(weights, HEAD + channel * W, W, V)[None, :]
        _add_vector(sums + HEAD + channel * W, value_T[:, None] * normal, W, V)
        bias = sums + HEAD + C * W + channel
        tl.store(bias, tl.load(bias) + tl.sum(value_T, 0))
    return _normalize_backward(grad_TV, normal, reciprocal_T, W, V)


@triton.jit
def _embed_backward(
    grad_TV, patches, grad_patches, offsets_T, valid_T, weights, sums, constant_sums, P: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, V: tl.constexpr, T: tl.constexpr, EMBED: tl.constexpr,
    WITH_PATCHES: tl.constexpr,
):  # fmt: skip
    """Adds to the sums of the embedding's weight (C, W) and constant; writes the gradient of the pixels."""
    column = tl.arange(0, V)
    places = constant_sums + tl.arange(0, T)[:, None] * W + column[None, :]
    tl.store(places, tl.load(places, mask=(column < W)[None, :], other=0.0) + grad_TV, mask=(column < W)[None, :])
    for channel in tl.static_range(C):
        value_T = tl.load(patches + offsets_T + channel * P, mask=valid_T, other=0.0).to(tl.float32)
        _add_vector(sums + EMBED + channel * W, value_T[:, None] * grad_TV, W, V)
        if WITH_PATCHES:
            value_T = tl.sum(grad_TV * _vector(weights, EMBED + channel * W, W, V)[None, :], 1)
            tl.store(grad_patches + offsets_T + channel * P, value_T, mask=valid_T)
