# mypy: disallow-untyped-defs=False
# mypy: disable-error-code=assignment
"""Device code of the fused pixel decoder: what one program does with a tile of pixels.

Shape letters: R pixels of all patches, T pixels of a tile, P pixels of a patch, C channels, W decoder width,
V width padded to a power of two, O outputs of a linear.

Columns beyond W are zero in every activation, and rows beyond R have a zero gradient: neither adds to a sum.

The backward pass takes one block at a time: a program then has registers for the sums of the block's matrices over
its pixels next to the activations, and adds them to its own in memory once, at its end. Vectors' sums over a tile
are written, not added. Torch adds what the programs have left in a fixed order: the result does not depend on how
they are scheduled. Per pixel at width 32 with 3 blocks: with all sums in memory, read and written for each tile in
turn, 960 B of sums and 768 B of kept activations passed through the cache beside 146 B of inputs and results; now
gradients between the blocks are 1,152 B, what torch reads for the embedding 256 B, inputs and results 298 B.

The loops over blocks are loops of the run, so that code, registers and shared memory do not grow with their
number. Forward reads 60 KiB of weights for each tile, from the cache; with the matrices of all blocks kept from
tile to tile it spilled 144 B a thread, and at width 64 in fp32 took 286 KiB of shared memory (Triton 3.6), more
than there is. benchmarks/results/kernels_sm90.json has registers and spills. Not yet run on a GPU.
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
    grad_TV, condition_sums, valid_TV, condition_TV, state, matrices, vectors, sums, vector_sums,
    W: tl.constexpr, V: tl.constexpr, DOT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's input and of the condition after SiLU, and ``sums`` with the tile's part added.

    The tile's sums of vectors go to ``vector_sums``: of shift, normal, gate, first and last. ``normal`` takes the
    place of scale: ``grad_hidden * normal``, of which torch makes the gradients of the scale and of the norm (see
    pixel_decoder.py). To spare registers, what only products take is rounded at once, and the condition's gradient
    is loaded late.
    """
    normal, reciprocal_T, scale, gate, hidden, first, last = state
    modulation_sums, first_sums, last_sums = sums
    zeros = tl.zeros(grad_TV.shape, tl.float32)
    grad_gate = grad_TV * last.to(tl.float32)
    _store_sum(vector_sums + 2 * W, grad_gate, W, V)
    grad_gate = _rounded(grad_gate, DOT)
    grad_last = grad_TV * gate.to(tl.float32)
    _store_sum(vector_sums + 4 * W, grad_last, W, V)
    grad_last = _rounded(grad_last, DOT)
    first = first.to(tl.float32)
    grad_first = _dot(grad_last, matrices[4], zeros, DOT) * _silu_slope(first)
    _store_sum(vector_sums + 3 * W, grad_first, W, V)
    grad_first = _rounded(grad_first, DOT)
    # Of each product only one half is wanted; but 2V rows are enough for a warp group's products, V are not, and
    # the smaller ones would take both operands into registers.
    both = _side_by_side(grad_first, grad_last)
    first_sums = _transposed_dot(both, hidden, first_sums, DOT)
    last_sums = _transposed_dot(both, _silu(first), last_sums, DOT)
    grad_hidden = _dot(grad_first, matrices[3], zeros, DOT)
    rounded_hidden = _rounded(grad_hidden, DOT)
    grad_normal = grad_hidden * normal
    _store_sum(vector_sums, grad_hidden, W, V)
    _store_sum(vector_sums + W, grad_normal, W, V)
    grad_normal = _rounded(grad_normal, DOT)
    # One product with 4V rows has work for every warp; three with V rows would be computed by several warps alike.
    joined = _side_by_side(_side_by_side(rounded_hidden, grad_gate), _side_by_side(grad_normal, zeros.to(DOT)))
    modulation_sums = _transposed_dot(joined, condition_TV, modulation_sums, DOT)
    norm_weight, norm_bias = _vector(vectors, 0, W, V)[None, :], _vector(vectors, W, W, V)[None, :]
    grad_scale = grad_hidden * (normal * norm_weight + norm_bias)
    grad_condition_TV = zeros if LAST else tl.load(condition_sums, mask=valid_TV, other=0.0)
    grad_condition_TV = _dot(rounded_hidden, matrices[0], grad_condition_TV, DOT)
    grad_condition_TV = _dot(grad_scale, matrices[1], grad_condition_TV, DOT)
    grad_condition_TV = _dot(grad_gate, matrices[2], grad_condition_TV, DOT)
    grad_affine = grad_hidden * (1.0 + scale.to(tl.float32))
    grad_TV += _normalize_backward(grad_affine * norm_weight, normal, reciprocal_T, W, V)
    return grad_TV, grad_condition_TV, (modulation_sums, first_sums, last_sums)


@triton.jit
def _store_sum(pointer, parts_TV, W: tl.constexpr, V: tl.constexpr):
    column = tl.arange(0, V)
    tl.store(pointer + column, tl.sum(parts_TV, 0), mask=column < W)


@triton.jit
def _side_by_side(a, b):
    """Columns of ``a`` and ``b`` in turn: column c of ``a`` is column 2c."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _transposed_dot(grad, inputs, total, DOT: tl.constexpr):
    """``total + grad' @ inputs``: the gradient of a linear's weight."""
    return _dot(tl.trans(_rounded(grad, DOT)), inputs, total, DOT)


@triton.jit
def _block_places(W: tl.constexpr, V: tl.constexpr):
    """Offsets and masks of what :func:`_block_backward` sums, in matrices (W, W) of shift, normal, gate, first and
    last."""
    column, pair, four = tl.arange(0, V)[None, :], tl.arange(0, 2 * V)[:, None], tl.arange(0, 4 * V)[:, None]
    # Row 4w + j of the joined modulation is output w of shift, normal, gate or nothing; 2w + j of first or last.
    of_four = (four % 4 * W + four // 4) * W + column
    of_pair = ((3 + pair % 2) * W + pair // 2) * W + column
    inside = (pair // 2 < W) & (column < W)
    places = (of_four, of_pair, of_pair)
    masks = (
        (four % 4 < 3) & (four // 4 < W) & (column < W), inside & (pair % 2 == 0), inside & (pair % 2 == 1)
    )  # fmt: skip
    return places, masks


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
    patches, condition, constant, weights, grad_out, grad_condition, grad_stream, condition_sums, block_sums,
    tile_sums, rows, index, eps, P: tl.constexpr, C: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
    T: tl.constexpr, BLOCKS: tl.constexpr, DOT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Block ``index`` backward, with the head where it is the ``LAST``.

    The blocks before it are computed forward again. Gradients of the block's output and of the condition after
    SiLU come in ``grad_stream`` and ``condition_sums`` (R, W), and leave there; where the block is the ``FIRST``,
    the condition's leaves in ``grad_condition``. The sums of matrices are in registers during the loop, and are
    then added to the program's in ``block_sums``; those of vectors are written for each tile, the block's five and
    the head's C, into ``tile_sums``.
    """
    EMBED: tl.constexpr = BLOCKS * (MATRICES * W + VECTORS) * W
    HEAD: tl.constexpr = EMBED + C * W
    program = tl.program_id(0).to(tl.int64)
    vectors = weights + BLOCKS * MATRICES * W * W
    sums = (tl.zeros((4 * V, V), tl.float32), tl.zeros((2 * V, V), tl.float32), tl.zeros((2 * V, V), tl.float32))
    own_vectors = vectors + index * (VECTORS * W)
    for tile in range(tl.program_id(0), tl.cdiv(rows, T), tl.num_programs(0)):
        start = tl.cast(tile, tl.int64) * T
        patch, offsets_T, number_T = _tile(start, P, C, T)
        valid_T = start + tl.arange(0, T) < rows
        x_TV = _embed(patches + patch, offsets_T, valid_T, number_T, constant, weights, P, C, W, V, EMBED)
        raw_TV, places_TV, valid_TV = _load_tile(condition, start, rows, W, V, T)
        condition_TV = _rounded(_silu(raw_TV), DOT)
        if not FIRST:
            for before in range(index):
                others = _block_matrices(weights + before * (MATRICES * W * W), W, V, DOT)
                x_TV = _block(x_TV, condition_TV, others, vectors + before * (VECTORS * W), eps, W, V, DOT)[0]
        # From the cache for every tile: kept over the loop they would take registers in several layouts.
        matrices = _block_matrices(weights + index * (MATRICES * W * W), W, V, DOT)
        out_TV, state = _block(x_TV, condition_TV, matrices, own_vectors, eps, W, V, DOT)
        vector_sums = tile_sums + tile * ((MATRICES + C) * W)
        if LAST:
            head_sums = vector_sums + MATRICES * W
            grad_TV = _head_backward(
                out_TV, grad_out + patch, offsets_T, valid_T, weights + HEAD, head_sums, eps, P, C, W, V
            )  # fmt: skip
        else:
            grad_TV = tl.load(grad_stream + start * W + places_TV, mask=valid_TV, other=0.0)
        grad_TV, grad_condition_TV, sums = _block_backward(
            grad_TV, condition_sums + start * W + places_TV, valid_TV, condition_TV, state, matrices, own_vectors,
            sums, vector_sums, W, V, DOT, LAST,
        )  # fmt: skip
        tl.store(grad_stream + start * W + places_TV, grad_TV, mask=valid_TV)
        if FIRST:
            # Loaded again, after a store, beyond which the compiler keeps no loaded value in registers.
            grad_raw_TV = grad_condition_TV * _silu_slope(_load_tile(condition, start, rows, W, V, T)[0])
            tl.store(grad_condition + start * W + places_TV, grad_raw_TV, mask=valid_TV)
        else:
            tl.store(condition_sums + start * W + places_TV, grad_condition_TV, mask=valid_TV)
    # Places are made after the loop: before it, they would take registers in it.
    block_sums += (program * BLOCKS + index) * (MATRICES * W * W)
    places, masks = _block_places(W, V)
    for part in tl.static_range(3):
        pointers = block_sums + places[part]
        total = tl.load(pointers, mask=masks[part], other=0.0) + sums[part]
        tl.store(pointers, total, mask=masks[part])


@triton.jit
def _head_backward(
    x_TV, grad_out, offsets_T, valid_T, weights, head_sums, eps, P: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradient of the last block's output; writes the tile's sums of the head's weight (C, W)."""
    normal, reciprocal_T = _normalize(x_TV, eps, W, V)
    grad_TV = tl.zeros(x_TV.shape, tl.float32)
    for channel in tl.static_range(C):
        value_T = tl.load(grad_out + offsets_T + channel * P, mask=valid_T, other=0.0).to(tl.float32)
        grad_TV += value_T[:, None] * _vector(weights, channel * W, W, V)[None, :]
        _store_sum(head_sums + channel * W, value_T[:, None] * normal, W, V)
    return _normalize_backward(grad_TV, normal, reciprocal_T, W, V)
