"""The constants of frozen weights, and their gradient in γ: every weight goes by once, in the dtype it is stored in.

A matrix is the tuple (pointer, stride of a row, stride of a column), one of heads has the stride of a head in front of
those. Either of a matrix's dimensions may be the dense one: a tile is read along it, and the compiler turns the tile
where another stands the other way round. Sums over many tiles are shared between programs, each of which writes the
sum of its own tiles; they are added up in their order afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ofa_kernels.kernels.attention_moments import product
from ofa_kernels.kernels.tile import load, store


@triton.jit
def load_matrix(
    start, row_stride, column_stride, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows row…row + ROWS − 1 and columns column…column + COLUMNS − 1 of a matrix in float32, 0 outside of it."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row + r < rows) & (column + c < columns)
    start += tl.cast(row, tl.int64) * row_stride + tl.cast(column, tl.int64) * column_stride
    return load(start, r * row_stride + c * column_stride, inside)


@triton.jit
def load_vector(vector, first, count, LENGTH: tl.constexpr):
    """Elements first…first + LENGTH − 1 of a dense vector in float32, 0 behind its end."""
    at = first + tl.arange(0, LENGTH)
    return load(vector, at, at < count)


@triton.jit
def share_of(program, programs, blocks, count, BLOCK: tl.constexpr):
    """Which block and which share of its tiles a program of so many works on, and those tiles' first and end."""
    split, block = program // blocks, (program % blocks).to(tl.int32)
    tiles = tl.cdiv(count, BLOCK)
    each = tl.cdiv(tiles, (programs // blocks).to(tl.int32))
    first = split.to(tl.int32) * each
    return block, split, first, tl.minimum(first + each, tiles)


@triton.jit
def mlp_constants_forward(
    gate,
    up,
    back,
    scale,
    sums,
    inner,
    width,
    CENTRED: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Shares of the sums that an MLP's constants are made of; one program per block of its inner channels k and share.

        sums[…, 0, k] = Σ_c W_g[k,c] γ_c² W_d[c,k], and behind it the same of W_u;
        if CENTRED, behind those: Σ_c W_g[k,c] γ_c, the same of W_u, and Σ_c γ_c W_d[c,k]

    gate, up (or None) and back = W_dᵀ are matrices, (inner, width); scale = γ, (width,) float32; sums (shares, 1, 2, 3
    or 5, inner) float32.
    """
    program = tl.program_id(0).to(tl.int64)
    block, split, first, end = share_of(
        program, tl.num_programs(0).to(tl.int64), tl.cdiv(inner, BLOCK_INNER), width, BLOCK_WIDTH
    )
    row = block * BLOCK_INNER
    gate_sum = tl.zeros((BLOCK_INNER,), tl.float32)
    up_sum = tl.zeros((BLOCK_INNER,), tl.float32)
    gate_along = tl.zeros((BLOCK_INNER,), tl.float32)
    up_along = tl.zeros((BLOCK_INNER,), tl.float32)
    back_along = tl.zeros((BLOCK_INNER,), tl.float32)
    for tile in range(first, end):
        column = tile * BLOCK_WIDTH
        y = load_vector(scale, column, width, BLOCK_WIDTH)[None, :]
        g = load_matrix(gate[0], gate[1], gate[2], row, column, inner, width, BLOCK_INNER, BLOCK_WIDTH)
        b = y * load_matrix(back[0], back[1], back[2], row, column, inner, width, BLOCK_INNER, BLOCK_WIDTH)
        gate_sum += tl.sum(g * (y * b), 1)
        if CENTRED:
            gate_along += tl.sum(g * y, 1)
            back_along += tl.sum(b, 1)
        if up is not None:
            u = load_matrix(up[0], up[1], up[2], row, column, inner, width, BLOCK_INNER, BLOCK_WIDTH)
            up_sum += tl.sum(u * (y * b), 1)
            if CENTRED:
                up_along += tl.sum(u * y, 1)
    GATED: tl.constexpr = up is not None
    KINDS: tl.constexpr = (2 if GATED else 1) * (2 if CENTRED else 1) + (1 if CENTRED else 0)
    k = row + tl.arange(0, BLOCK_INNER)
    inside = k < inner
    start = sums + split * KINDS * inner
    store(start, k, inside, gate_sum)
    if GATED:
        store(start + inner, k, inside, up_sum)
    if CENTRED:
        store(start + (KINDS // 2) * inner, k, inside, gate_along)
        if GATED:
            store(start + 3 * inner, k, inside, up_along)
        store(start + (KINDS - 1) * inner, k, inside, back_along)


@triton.jit
def mlp_constants_backward(
    gate,
    up,
    back,
    scale,
    grad_gate,
    grad_up,
    along,
    beside,
    sums,
    inner,
    width,
    CENTRED: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Shares of the gradient in γ; one program per block of the norm's channels c and share of the inner ones.

        Σ_k w[k,c] (2γ_c W_d[c,k] − r_k/d) − p_k W_d[c,k]/d,   w[k,c] = W_g[k,c] ḡ_k + W_u[k,c] ū_k

    of which r = `beside` = γ W_d and p = `along` = Σ (W γ) ḡ only if CENTRED. grad_gate = ḡ, grad_up = ū (or None), r
    and p are (inner,) float32, sums (shares, width) float32; the rest is as in the forward kernel.
    """
    program = tl.program_id(0).to(tl.int64)
    block, split, first, end = share_of(
        program, tl.num_programs(0).to(tl.int64), tl.cdiv(width, BLOCK_WIDTH), inner, BLOCK_INNER
    )
    column = block * BLOCK_WIDTH
    y = 2.0 * load_vector(scale, column, width, BLOCK_WIDTH)[None, :]
    total = tl.zeros((BLOCK_INNER, BLOCK_WIDTH), tl.float32)
    for tile in range(first, end):
        row = tile * BLOCK_INNER
        w = load_matrix(gate[0], gate[1], gate[2], row, column, inner, width, BLOCK_INNER, BLOCK_WIDTH)
        b = load_matrix(back[0], back[1], back[2], row, column, inner, width, BLOCK_INNER, BLOCK_WIDTH)
        w *= load_vector(grad_gate, row, inner, BLOCK_INNER)[:, None]
        if up is not None:
            u = load_matrix(up[0], up[1], up[2], row, column, inner, width, BLOCK_INNER, BLOCK_WIDTH)
            w += u * load_vector(grad_up, row, inner, BLOCK_INNER)[:, None]
        if CENTRED:
            r = load_vector(beside, row, inner, BLOCK_INNER)[:, None] / width
            p = load_vector(along, row, inner, BLOCK_INNER)[:, None] / width
            total += w * (y * b - r) - p * b
        else:
            total += w * (y * b)
    c = column + tl.arange(0, BLOCK_WIDTH)
    store(sums + split * width, c, c < width, tl.sum(total, 0))


@triton.jit
def product_in_two(left, right, total, STREAM: tl.constexpr, EMULATED: tl.constexpr):
    """The sum `total` + `left` `right`; `right`, float32, is multiplied as a number of the stream's dtype and the rest.

    What is lost of it is a rounding of the rest: 2⁻¹⁷ of an element in bfloat16, 2⁻²² in float16, nothing in float32.
    """
    total = product(left, right, total, STREAM, EMULATED)
    NARROW: tl.constexpr = STREAM.primitive_bitwidth < 32
    if NARROW:
        total = product(left, right - right.to(STREAM).to(tl.float32), total, STREAM, EMULATED)
    return total


@triton.jit(do_not_specialize=["heads", "groups"])
def attention_constants_forward(
    query,
    key,
    value,
    output,
    scale,
    unit,
    sums,
    share,
    heads,
    groups,
    width,
    CENTRED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Shares of the sums that an attention's constants are made of; one program per head, block of M_q and M_k, share.

        products[0, h] = W_q Γ² W_o,  products[1, h] = W_k Γ² W_o,  traces[…, h] = Σ_ec W_v[e,c] γ_c² W_o[c,e],
        and if CENTRED vectors[:, h] = (W_q γ, W_k γ, W_v γ, γ W_o)

    query, key and value are matrices of heads, (HEAD, width), output of (width, HEAD); a head of key and value serves
    `groups` of the `heads`. scale = γ, (width,) float32; unit, one power of two in float32 (or None), multiplies γ² on
    the way to the products, and divides them in the end. sums, float32, has `share` numbers for each share: products,
    (2, heads, HEAD, HEAD), only with PRODUCTS; behind them vectors, (4, heads, HEAD), only if CENTRED; and traces,
    (blocks of M, heads), with PRODUCTS again.
    """
    STREAM: tl.constexpr = query[0].dtype.element_ty
    BLOCKS: tl.constexpr = (HEAD + BLOCK_HEAD - 1) // BLOCK_HEAD
    program = tl.program_id(0).to(tl.int64)
    # The heads of a group are neighbours: one reads what they share, the others find it in the cache.
    block, split, first, end = share_of(
        program // heads, tl.num_programs(0).to(tl.int64) // heads, BLOCKS * BLOCKS, width, BLOCK_WIDTH
    )
    head = program % heads
    row, column = block // BLOCKS * BLOCK_HEAD, block % BLOCKS * BLOCK_HEAD
    query_head, key_head = query[0] + head * query[1], key[0] + head // groups * key[1]
    value_head, output_head = value[0] + head // groups * value[1], output[0] + head * output[1]
    # What belongs to the rows of M alone is seen to by the programs of the first columns, and the other way round.
    row_end, column_end = tl.where(column == 0, HEAD, 0), tl.where(row == 0, HEAD, 0)
    to_query = tl.zeros((BLOCK_HEAD, BLOCK_HEAD), tl.float32)
    to_key = tl.zeros((BLOCK_HEAD, BLOCK_HEAD), tl.float32)
    to_value = tl.zeros((BLOCK_WIDTH, BLOCK_HEAD), tl.float32)
    query_along = tl.zeros((BLOCK_HEAD,), tl.float32)
    key_along = tl.zeros((BLOCK_HEAD,), tl.float32)
    value_along = tl.zeros((BLOCK_HEAD,), tl.float32)
    output_along = tl.zeros((BLOCK_HEAD,), tl.float32)
    for tile in range(first, end):
        c = tile * BLOCK_WIDTH
        y = load_vector(scale, c, width, BLOCK_WIDTH)
        q = load_matrix(query_head, query[2], query[3], row, c, HEAD, width, BLOCK_HEAD, BLOCK_WIDTH)
        k = load_matrix(key_head, key[2], key[3], row, c, HEAD, width, BLOCK_HEAD, BLOCK_WIDTH)
        v = load_matrix(value_head, value[3], value[2], c, column, width, column_end, BLOCK_WIDTH, BLOCK_HEAD)
        o = load_matrix(output_head, output[2], output[3], c, column, width, HEAD, BLOCK_WIDTH, BLOCK_HEAD)
        if PRODUCTS:
            square = y * y
            if unit is not None:
                square *= tl.load(unit)
            scaled = o * square[:, None]
            to_value += v * scaled
            to_query = product_in_two(q, scaled, to_query, STREAM, EMULATED)
            to_key = product_in_two(k, scaled, to_key, STREAM, EMULATED)
        if CENTRED:
            query_along += tl.sum(q * y[None, :], 1)
            key_along += tl.sum(k * y[None, :], 1)
            value_along += tl.sum(v * y[:, None], 0)
            output_along += tl.sum(o * y[:, None], 0)
    r, e = row + tl.arange(0, BLOCK_HEAD), column + tl.arange(0, BLOCK_HEAD)
    own, wide = sums + split * share, heads.to(tl.int64)
    if PRODUCTS:
        size = 1.0
        if unit is not None:
            size = 1.0 / tl.load(unit)
        at, inside = r[:, None] * HEAD + e[None, :], (r < HEAD)[:, None] & (e < HEAD)[None, :]
        start = own + head * (HEAD * HEAD)
        store(start, at, inside, to_query * size)
        store(start + wide * (HEAD * HEAD), at, inside, to_key * size)
        own += 2 * wide * (HEAD * HEAD)
        traces = own
        if CENTRED:
            traces += 4 * wide * HEAD
        # 0 but in the first row's programs.
        tl.store(traces + block * heads + head, tl.sum(to_value) * size)
    if CENTRED:
        start, apart = own + head * HEAD, wide * HEAD
        store(start, r, r < row_end, query_along)
        store(start + apart, r, r < row_end, key_along)
        store(start + 2 * apart, e, e < column_end, value_along)
        store(start + 3 * apart, e, e < column_end, output_along)


@triton.jit(do_not_specialize=["heads", "groups"])
def attention_constants_backward(
    query,
    key,
    value,
    output,
    scale,
    unit,
    grad_query,
    grad_key,
    grad_value,
    along,
    beside,
    sums,
    heads,
    groups,
    width,
    CENTRED: tl.constexpr,
    EMULATED: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Every head's share of the gradient in γ; one program per head and block of the norm's channels c.

        sums[h, c] = Σ_e L[c,e] (2γ_c W_o[c,e] − b_e/d) − l_e W_o[c,e]/d,   L = W_qᵀ M̄_q + W_kᵀ M̄_k + c̄_v W_vᵀ

    of which b = `beside` = γ W_o and l = `along` = γ L, (heads, HEAD) float32, only if CENTRED. grad_query = M̄_q and
    grad_key = M̄_k are (heads, HEAD, HEAD), grad_value = c̄_v (heads,), float32 and dense; unit, (heads,) float32 (or
    None), is the power of two that multiplies M̄ on the way to the products. sums is (heads, width) float32; the rest is
    as in the forward kernel.
    """
    STREAM: tl.constexpr = query[0].dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    head, c = program % heads, (program // heads).to(tl.int32) * BLOCK_WIDTH
    query_head, key_head = query[0] + head * query[1], key[0] + head // groups * key[1]
    value_head, output_head = value[0] + head // groups * value[1], output[0] + head * output[1]
    to_query, to_key = grad_query + head * (HEAD * HEAD), grad_key + head * (HEAD * HEAD)
    size = 1.0
    if unit is not None:
        size = tl.load(unit + head)
    left = tl.zeros((BLOCK_WIDTH, HEAD_TILE), tl.float32)
    for row in range(0, HEAD, BLOCK_HEAD):
        q = load_matrix(query_head, query[3], query[2], c, row, width, HEAD, BLOCK_WIDTH, BLOCK_HEAD)
        m = load_matrix(to_query, HEAD, 1, row, 0, HEAD, HEAD, BLOCK_HEAD, HEAD_TILE)
        left = product_in_two(q, m * size, left, STREAM, EMULATED)
        k = load_matrix(key_head, key[3], key[2], c, row, width, HEAD, BLOCK_WIDTH, BLOCK_HEAD)
        m = load_matrix(to_key, HEAD, 1, row, 0, HEAD, HEAD, BLOCK_HEAD, HEAD_TILE)
        left = product_in_two(k, m * size, left, STREAM, EMULATED)
    y = 2.0 * load_vector(scale, c, width, BLOCK_WIDTH)[:, None]
    v = load_matrix(value_head, value[3], value[2], c, 0, width, HEAD, BLOCK_WIDTH, HEAD_TILE)
    o = load_matrix(output_head, output[2], output[3], c, 0, width, HEAD, BLOCK_WIDTH, HEAD_TILE)
    left = left * (1.0 / size) + tl.load(grad_value + head) * v
    if CENTRED:
        b = load_vector(beside + head * HEAD, 0, HEAD, HEAD_TILE)[None, :] / width
        a = load_vector(along + head * HEAD, 0, HEAD, HEAD_TILE)[None, :] / width
        total = tl.sum(left * (y * o - b) - a * o, 1)
    else:
        total = tl.sum(left * (y * o), 1)
    channel = c + tl.arange(0, BLOCK_WIDTH)
    store(sums + head * width, channel, channel < width, total)
