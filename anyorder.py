"""The idea: one causal transformer that draws the cells of an image in *any order it is given*.

    p(tokens | caption, order) = prod_k p(x_{o_k} | caption, x_{o_1} .. x_{o_{k-1}}, o_1 .. o_k)

The chain rule holds for every order of the cells. A raster model learns one factorisation; this one learns all of
them, by drawing a fresh random permutation for every image and every step (arXiv 2504.17069, section 3). To be asked
for any cell next, the input at step k says what was drawn last and where, and where the next cell lies, both on the
grid and as seen from the last one (the paper's double position):

    step           0                 1                    2                          (N inputs for N cells)
    what, where    start             x_{o_0} at o_0       x_{o_1} at o_1
    next           o_0               o_1, o_1 - o_0       o_2, o_2 - o_1
                   |                 |                    |
    [ caption words ] -> causal transformer -> ...
                   |                 |                    |
    predicts       x_{o_0}           x_{o_1}              x_{o_2}

reads    out/tokens.pt and out/tokenizer.pt (tokenizer.py, which makes them, is run first where they are missing)
writes   out/anyorder.pt (or out/raster.pt with --order raster), a sheet of samples and a loss curve beside it
run      python anyorder.py                        built-in sunsets: tokenizer 1 to 3, training 2 to 5 minutes, 2 cores
         python anyorder.py --data path/to/images  your own; folders and IDX files (see data.py)
you see  samples in random order on out/anyorder.png: sun, sky and sea are there, some details do not fit yet
not here choosing an order (order_infer.py), learning from it (finetune.py), guidance and completion (sample.py)
"""

import difflib
import functools
import itertools
import math
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.autograd.function import once_differentiable
from tqdm import tqdm

try:                                                   # comes with torch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from data import (UserError, arguments, fingerprint, load, on_interrupt, open_data, pick_device, restore, run, save,
                  save_picture, sheet, words_of)
from tokenizer import (SAVE_EVERY, Muon, batch_of, load_tokenizer, load_tokens, make_tokens, precision, resume_path,
                       seeded)

HEAD = 32           # channels per attention head
FEW = 16            # so many cells are looked at in one masked product; more of them by candidate_attention
CAPTION = 16        # at most so many words of a caption are read
DROP = 0.1          # share of training captions replaced by none, so that classifier-free guidance works

# ---------------------------------------------------------------------------------------------------------------------
# Orders. `order[b, k]` is the cell visited at step k; `rank[b, cell]` is the step at which a cell is visited.


def raster_order(B, N):
    """Left to right, top to bottom: order [B, N] int64 with order[b, k] = k."""
    return torch.arange(N).expand(B, N)


def random_order(B, N, generator=None):
    """B independent uniform permutations of N cells: order [B, N] int64. `generator` (CPU) makes it repeatable."""
    return torch.rand(B, N, generator=generator).argsort(1)


def rank_of(order):
    """The inverse permutation: order [B, N] -> rank [B, N], or rank -> order.

    On a 2x2 grid the order [2, 0, 3, 1] (bottom left, top left, bottom right, top right) gives the rank [1, 3, 0, 2]:
        1 3
        0 2        (what the grid looks like when each cell shows the step at which it is drawn)
    """
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def reference_attention(q, k, v):
    """Causal attention as its definition: q, k, v [B, heads, T, d] -> [B, heads, T, d] (Vaswani et al. 2017, eq. 1)."""
    T, d = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / math.sqrt(d)                        # [B, heads, T, T]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


# A library kernel has to serve every mask and size. This one knows that it is causal, and where the time goes on a
# CPU: not into arithmetic but into moving scores through memory. So it works on blocks: query rows start..end of some
# heads see the keys 0..end, and what lies behind is never computed. The scores of a block fit into the caches, the mask
# is added as the product is made, and all that remains are batched matrix products, which the CPU's library does best.

BLOCK = 2 ** 22     # bytes of scores in a block, at most


def blocks(n, T, like):
    """Of n heads with T rows, (heads, start, end, future) of each block: slices of heads, and rows start..end, the last
    rows first. future [end - start, end] is 0 for keys that a row sees and -inf for those behind it.

    Short blocks compute less of the future, long ones make better products: bfloat16 has the faster ones.
    """
    rows = math.ceil(T / max(1, round(T / min(256, 16 * math.isqrt(T) / like.element_size()))))
    some = max(1, BLOCK // (rows * T * like.element_size()))
    future = like.new_full((rows, T + rows), -math.inf).triu_(T + 1)       # the triangle begins at column T
    for i in range(0, n, some):
        for start in reversed(range(0, T, rows)):
            end = min(start + rows, T)
            yield slice(i, i + some), start, end, future[:end - start, T - start:][:, :end]


def products(a, b, scale):
    """scale * a @ b in one pass: a [n, i, j], b [n, j, k] -> [n, i, k]."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def part(x, some, start, end):
    """x[some, start:end], in one piece for bfloat16: its products would copy what has gaps, each of them again."""
    x = x[some, start:end]
    return x.contiguous() if x.dtype == torch.bfloat16 else x


def put(out, a, b, scale=1, add=False):
    """out [n, i, k] becomes scale * a @ b, or that is added to it. In place, but not for float32 where out has gaps:
    there the library goes matrix by matrix."""
    if out.is_contiguous() or out.dtype != torch.float32:
        out.baddbmm_(a, b, beta=float(add), alpha=scale)
    elif add:
        out += products(a, b, scale)
    else:
        out.copy_(products(a, b, scale))


def block_probs(q, k, future):
    """softmax(q k^T / sqrt(d) + future): q [n, rows, d], k [n, end, d] -> [n, rows, end]."""
    p = torch.baddbmm(future, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(p, -1, out=p)


class FusedAttention(torch.autograd.Function):
    """With P = softmax(Q K^T / sqrt(d)) and O = P V, the gradients are (dO is given)

        dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP))    dQ = dS K / sqrt(d)    dK = dS^T Q / sqrt(d)

    Short sequences keep P for the backward pass. Long ones (T > 16 d) compute it again, block by block, so that never
    more than one block of it exists: the memory grows with T, not with T^2.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        B, heads, T, d = q.shape
        q, k, v = (x.reshape(B * heads, T, d) for x in (q, k, v))
        out, kept = torch.empty_like(q), []
        for some, start, end, future in blocks(B * heads, T, q):
            p = block_probs(part(q, some, start, end), part(k, some, 0, end), future)
            put(out[some, start:end], p, part(v, some, 0, end))
            if T <= 16 * d:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(B, heads, T, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        (B, heads, T, d), scale = grad.shape, grad.shape[-1] ** -0.5
        dq, dk, dv, grad = (*(torch.empty_like(q) for _ in range(3)), grad.reshape(B * heads, T, d))
        for some, start, end, future in blocks(B * heads, T, q):
            rows, g = (part(x, some, start, end) for x in (q, grad))
            keys, values = (part(x, some, 0, end) for x in (k, v))
            p = kept.pop(0) if kept else block_probs(rows, keys, future)
            dp = torch.bmm(g, values.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)           # in dp's place
            more = end < T                             # the last rows come first, and see all keys
            put(dq[some, start:end], ds, keys, scale)
            put(dv[some, :end], p.transpose(1, 2), g, add=more)
            put(dk[some, :end], ds.transpose(1, 2), rows, scale, more)
        return tuple(x.view(B, heads, T, d) for x in (dq, dk, dv))


# On a GPU one kernel each way does it all (in Triton), so that scores never leave the chip. A program takes TILE rows
# of a head and meets their keys TILE by TILE. For each row it holds the largest score so far, the sum of the
# exponentials, and the sum of the values that they weight; where a larger score comes, both are scaled down (online
# softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). Causality asks for a mask in the last tile
# only. The logarithm of each sum is kept: with it the backward pass computes P again, tile by tile. There a program
# does first what its tile receives as keys, from all later rows, then what it receives as rows, from all earlier keys:
# so all have about the same work, and no two of them write to one place.

TILE = 64

if triton:
    EXACT = tl.constexpr("tf32x3")                     # float32: three products of TF32, as exact, on matrix units

    @triton.jit
    def read_tile(x, stride, first, T, D: tl.constexpr, TILE: tl.constexpr):
        """Rows first .. first + TILE of x [T, D]: [TILE, D], 0 behind the last."""
        row = first + tl.arange(0, TILE)[:, None]
        return tl.load(x + row * stride + tl.arange(0, D)[None, :], mask=row < T, other=0.0)

    @triton.jit
    def write_tile(x, stride, first, T, value, D: tl.constexpr, TILE: tl.constexpr):
        row = first + tl.arange(0, TILE)[:, None]
        tl.store(x + row * stride + tl.arange(0, D)[None, :], value.to(x.dtype.element_ty), mask=row < T)

    @triton.jit
    def attend(q, k, v, out, log, own_k, own_v, heads, C, T, bits, qb, qh, qt, kb, kh, kt, ob, oh, ot,
               OWN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
        """Rows q [C, D] of each head see keys k [T, D]: those up to their own number, or, where OWN, all of them and
        own_k, own_v [C, D], each its own. A tensor's strides are named after it: qb from image to image, qh from head
        to head, qt from row to row; k and v share theirs, as do q, own_k and own_v."""
        tiles = tl.cdiv(C, TILE)
        first, pair = tl.program_id(0) % tiles * TILE, (tl.program_id(0) // tiles).to(tl.int64)
        b, h = pair // heads, pair % heads
        k, v, at = k + b * kb + h * kh, v + b * kb + h * kh, b * qb + h * qh
        row = first + tl.arange(0, TILE)
        rows = read_tile(q + at, qt, first, C, D, TILE)
        if OWN:                                        # begin with the own key
            top = tl.sum(rows.to(tl.float32) * read_tile(own_k + at, qt, first, C, D, TILE), 1) * bits
            total = tl.full((TILE,), 1.0, tl.float32)
            found = read_tile(own_v + at, qt, first, C, D, TILE).to(tl.float32)
            whole, end = T // TILE * TILE, T
        else:
            top, total = tl.full((TILE,), -float("inf"), tl.float32), tl.zeros((TILE,), tl.float32)
            found = tl.zeros((TILE, D), tl.float32)
            whole, end = first, tl.minimum(first + TILE, T)
        for masked in tl.static_range(2):              # whole tiles, then the last one
            for start in range(whole if masked else 0, end if masked else whole, TILE):
                keys, values = read_tile(k, kt, start, T, D, TILE), read_tile(v, kt, start, T, D, TILE)
                score = tl.dot(rows, tl.trans(keys), input_precision=EXACT) * bits
                if masked:
                    key = start + tl.arange(0, TILE)[None, :]
                    score = tl.where(key < T if OWN else key <= row[:, None], score, -float("inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                p, less = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
                total = total * less + tl.sum(p, 1)
                found = tl.dot(p.to(values.dtype), values, found * less[:, None], input_precision=EXACT)
                top = higher
        write_tile(out + b * ob + h * oh, ot, first, C, found / total[:, None], D, TILE)
        if not OWN:
            tl.store(log + pair * T + row, top + tl.log2(total), mask=row < T)

    @triton.jit
    def attend_backward(q, k, v, out, log, grad, dq, dk, dv, heads, T, bits, scale, qb, qh, qt, ob, oh, ot, gb, gh, gt,
                        db, dh, dt, D: tl.constexpr, TILE: tl.constexpr):
        """The gradients as FusedAttention has them, from grad [T, D] of each head; P = 2^(bits q k^T - log), and
        rowsum(P * dP) is rowsum(out * grad). The strides of dq, dk, dv are db, dh, dt."""
        tiles = tl.cdiv(T, TILE)
        first, pair = tl.program_id(0) % tiles * TILE, (tl.program_id(0) // tiles).to(tl.int64)
        b, h = pair // heads, pair % heads
        q, k, v = q + b * qb + h * qh, k + b * qb + h * qh, v + b * qb + h * qh
        out, grad, log, to = out + b * ob + h * oh, grad + b * gb + h * gh, log + pair * T, b * db + h * dh
        here = first + tl.arange(0, TILE)

        keys, values = read_tile(k, qt, first, T, D, TILE), read_tile(v, qt, first, T, D, TILE)
        to_keys, to_values = tl.zeros((TILE, D), tl.float32), tl.zeros((TILE, D), tl.float32)
        for masked in tl.static_range(2):
            for start in range(first if masked else first + TILE, first + TILE if masked else T, TILE):
                row = start + tl.arange(0, TILE)
                rows, g = read_tile(q, qt, start, T, D, TILE), read_tile(grad, gt, start, T, D, TILE)
                mean = tl.sum(g.to(tl.float32) * read_tile(out, ot, start, T, D, TILE), 1)
                sums = tl.load(log + row, mask=row < T, other=float("inf"))
                p = tl.exp2(tl.dot(keys, tl.trans(rows), input_precision=EXACT) * bits - sums[None, :])   # P^T
                if masked:
                    p = tl.where(here[:, None] <= row[None, :], p, 0.0)
                to_values = tl.dot(p.to(g.dtype), g, to_values, input_precision=EXACT)
                ds = p * (tl.dot(values, tl.trans(g), input_precision=EXACT) - mean[None, :])
                to_keys = tl.dot(ds.to(rows.dtype), rows, to_keys, input_precision=EXACT)
        write_tile(dk + to, dt, first, T, to_keys * scale, D, TILE)
        write_tile(dv + to, dt, first, T, to_values, D, TILE)

        rows, g = read_tile(q, qt, first, T, D, TILE), read_tile(grad, gt, first, T, D, TILE)
        mean = tl.sum(g.to(tl.float32) * read_tile(out, ot, first, T, D, TILE), 1)
        sums = tl.load(log + here, mask=here < T, other=float("inf"))
        to_rows = tl.zeros((TILE, D), tl.float32)
        for masked in tl.static_range(2):
            for start in range(first if masked else 0, first + TILE if masked else first, TILE):
                keys, values = read_tile(k, qt, start, T, D, TILE), read_tile(v, qt, start, T, D, TILE)
                p = tl.exp2(tl.dot(rows, tl.trans(keys), input_precision=EXACT) * bits - sums[:, None])
                if masked:
                    p = tl.where(start + tl.arange(0, TILE)[None, :] <= here[:, None], p, 0.0)
                ds = p * (tl.dot(g, tl.trans(values), input_precision=EXACT) - mean[:, None])
                to_rows = tl.dot(ds.to(keys.dtype), keys, to_rows, input_precision=EXACT)
        write_tile(dq + to, dt, first, T, to_rows * scale, D, TILE)


def alike(*tensors):
    """Tensors as the kernels want them: of the same strides, the last of which is 1, and 32 bits count what is between
    the rows of a head."""
    same = all(x.stride() == tensors[0].stride() and x.stride(-1) == 1 and x.stride(-2) * x.shape[-2] < 2 ** 31
               for x in tensors)
    return tensors if same else tuple(x.contiguous() for x in tensors)


def kernel_attention(q, k, v, own_k=None, own_v=None):
    """Starts `attend`: q [B, heads, C, d], k, v [B, heads, T, d] -> (out [B, heads, C, d], log [B, heads, T])."""
    (B, heads, C, d), T, own = q.shape, k.shape[2], own_k is not None
    q, own_k, own_v = alike(q, own_k, own_v) if own else (q, q, q)
    k, v = alike(k, v)
    out = q.new_empty(B, C, heads, d).transpose(1, 2)
    log = q.new_empty(0 if own else (B, heads, T), dtype=torch.float32)
    strides = [stride for x in (q, k, out) for stride in x.stride()[:3]]
    # num_stages: candidates meet few keys, so that reading ahead does not pay
    with torch.cuda.device_of(q):                      # Triton starts kernels on the current GPU
        attend[-(-C // TILE) * B * heads,](q, k, v, out, log, own_k, own_v, heads, C, T, d ** -0.5 / math.log(2),
                                           *strides, OWN=own, D=d, TILE=TILE, num_stages=1 if own else 3)
    return out, log


class KernelAttention(torch.autograd.Function):
    """FusedAttention by the kernels."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = alike(q, k, v)
        out, log = kernel_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, log)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, log = ctx.saved_tensors
        (B, heads, T, d), scale, (grad,) = q.shape, q.shape[-1] ** -0.5, alike(grad)
        dq, dk, dv = q.new_empty(B, T, 3, heads, d).permute(2, 0, 3, 1, 4)
        strides = [stride for x in (q, out, grad, dq) for stride in x.stride()[:3]]
        # num_stages=1: to read ahead would take registers, and fewer programs would run side by side
        attend_backward[-(-T // TILE) * B * heads,](q, k, v, out, log, grad, dq, dk, dv, heads, T, scale / math.log(2),
                                                    scale, *strides, D=d, TILE=TILE, num_stages=1)
        return dq, dk, dv


@functools.cache
def kernels_run(device, dtype):
    """Whether they do: Triton may be missing, or what it compiles with (a C compiler, the headers of Python), and a GPU
    may be too old for the type."""
    try:
        kernel_attention(*torch.zeros(3, 1, 1, 1, HEAD, device=device, dtype=dtype))
    except Exception:
        return False
    return True


def has_kernel(x):
    """Whether x [..., d] is on a GPU where kernels run, and of a type that they know, and d is as matrix units take it,
    and so small that all tiles fit on the chip."""
    d = x.shape[-1]
    return (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and d in (16, 32, 64, 128)
            and d * x.element_size() <= 256 and kernels_run(x.device, x.dtype))


def fused_attention(q, k, v):
    """What reference_attention computes, by hand: q, k, v [B, heads, T, d] of one floating type, T >= 1, strided as
    they like -> [B, heads, T, d]. Differentiable once.

    On a GPU the kernels are faster than the library for narrow heads, such as a model has here, and where there is so
    much to do that the time to start them does not count. For all else the library does it there (README, "How fast is
    it?")."""
    with torch.autocast(q.device.type, enabled=False):
        if not q.is_cuda:
            return FusedAttention.apply(q, k, v)
        if q.shape[-1] <= HEAD and q.numel() >= 2 ** 22 and has_kernel(q):
            return KernelAttention.apply(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def candidate_attention(q, k, v, prefix_k, prefix_v):
    """C candidates for the next step: each attends to the shared prefix and to itself, not to the other candidates.

    q, k, v [B, heads, C, d], prefix_k, prefix_v [B, heads, T, d] (say, slices of a larger cache) -> [B, heads, C, d].
    One softmax over T + 1 keys; the prefix is never copied and there is no mask. For inference: no backward pass.
    """
    (B, heads, C, d), T = q.shape, prefix_k.shape[2]
    if T == 0:
        return v.clone()                                                   # each has only itself to attend to
    if has_kernel(q):
        return kernel_attention(q, prefix_k, prefix_v, k, v)[0]
    out, scale = q.new_empty(B, C, heads, d).transpose(1, 2), d ** -0.5
    bits = scale / math.log(2)                         # e^x = 2^(x / ln 2), which CPUs compute faster
    step = max(1, BLOCK // (heads * C * T * q.element_size()))
    for i in range(0, B, step):
        some = slice(i, i + step)
        qt, kt, vt, past_k, past_v = (x[some].flatten(0, 1) for x in (q, k, v, prefix_k, prefix_v))
        own = (qt * kt).sum(-1, keepdim=True)                              # [n, C, 1]
        p = torch.baddbmm(own, qt, past_k.transpose(1, 2), beta=-bits, alpha=bits).exp2_()             # [n, C, T]
        total = p.sum(-1, keepdim=True).add_(1)        # all relative to its own, whose exponential is 1: no maximum
        if (total < 1e30).all():
            found = torch.baddbmm(vt, p, past_v).view(-1, heads, C, d)
            torch.div(found, total.view(-1, heads, C, 1), out=out[some])
        else:                                          # a score 69 nats above its own: as its definition
            p = torch.cat((products(qt, past_k.transpose(1, 2), scale), own * scale), -1).softmax(-1)
            out[some] = torch.bmm(p[..., :-1], past_v).addcmul_(p[..., -1:], vt).view(-1, heads, C, d)
    return out


def cached_attention(q, k, v, mask=None):
    """Few queries with all keys: q [B, heads, n, d], k, v [B, heads, T, d] (say, slices of a larger cache) ->
    [B, heads, n, d]. mask [n, T] is -inf for keys that a query must not see, else 0. No backward pass."""
    p = products(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), q.shape[-1] ** -0.5)    # [B * heads, n, T]
    p = p if mask is None else p.add_(mask)
    return torch.bmm(torch.softmax(p, -1, out=p), v.flatten(0, 1)).view(q.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, D, layers):
        super().__init__()
        self.heads = D // HEAD
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)                         # one product instead of three
        self.proj = nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        for weight in (self.proj.weight, self.down.weight):                # residual branches start small (GPT-2)
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))

    def split(self, x):
        """x [B, T, D] -> q, k, v, each [B, heads, T, d] (views of one product, nothing is copied)."""
        B, T, D = x.shape
        return (y.transpose(1, 2) for y in self.qkv(self.norm1(x)).view(B, T, 3, self.heads, HEAD).unbind(2))

    def merge(self, x, y):
        """x [B, T, D] and what attention found, y [B, heads, T, d] -> x [B, T, D] after both residual branches."""
        x = x + self.proj(y.transpose(1, 2).flatten(2))                    # [B, T, heads, d] -> [B, T, D]
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x):
        return self.merge(x, fused_attention(*self.split(x)))


class AnyOrder(nn.Module):
    """The any-given-order transformer.

    config: rows, cols (grid), codebook V, width D (a multiple of 32), layers, order_head (bool), words (list of str,
    the vocabulary), caption_length L.
    tokens [B, N] int64 in 0..V-1, always in raster layout; order [B, N] int64 permutations; captions: B strings.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        rows, cols, V, D = config["rows"], config["cols"], config["codebook"], config["width"]
        self.N, self.V = rows * cols, V
        self.content = nn.Embedding(V + 1, D)                              # V: start, nothing was drawn yet
        self.at = nn.Embedding(self.N + 1, D)                              # N: nowhere yet
        self.next = nn.Embedding(self.N, D)
        self.relative = nn.Embedding((2 * rows - 1) * (2 * cols - 1) + 1, D)
        self.word = nn.Embedding(len(config["words"]) + 1, D)              # 0: no word
        self.word_at = nn.Embedding(config["caption_length"], D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)                            # what is there?
        if config["order_head"]:                                           # and where next? (trained by finetune.py)
            self.where = nn.Sequential(nn.Linear(2 * D, D), nn.GELU(), nn.Linear(D, self.N))
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(D, config["layers"]) for _ in range(config["layers"]))
        # A cell begins as waves along its row and its column, of all lengths: to look one cell to the left is then the
        # same rotation of these wherever one is, which attention learns once, and not again for each cell.
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()       # [N, 2]
        phase = place[..., None] * torch.linspace(0.25, 3, D // 4) * math.pi / max(rows, cols)
        waves = 0.06 * torch.cat((phase.cos(), phase.sin()), 1).flatten(1)                 # [N, D]
        with torch.no_grad():
            self.at.weight[:self.N] = waves
            self.next.weight.copy_(waves[:, torch.randperm(D)])            # shuffled, to be told from the other
        # how often each code occurs in the training images: what order_infer.py calibrates confidence by
        self.register_buffer("frequency", torch.full((V,), 1 / V))
        # hop[a, b] numbers the step from cell a to cell b by its rows and columns; the step from nowhere has its own
        cell = torch.arange(self.N)
        down = cell[None] // cols - cell[:, None] // cols + rows - 1       # [N, N] in 0 .. 2 rows - 2
        right = cell[None] % cols - cell[:, None] % cols + cols - 1
        hop = torch.cat((down * (2 * cols - 1) + right, torch.full((1, self.N), self.relative.num_embeddings - 1)))
        self.register_buffer("hop", hop, persistent=False)                 # [N + 1, N]
        self.number = {word: i + 1 for i, word in enumerate(config["words"])}

    def read(self, captions):
        """B strings -> [B, L] int64 numbers of words. Words never seen in training read as no word."""
        L = self.config["caption_length"]
        ids = [([self.number.get(w, 0) for w in words_of(c)] + [0] * L)[:L] for c in captions]
        return torch.tensor(ids, device=self.hop.device)

    def check_words(self, captions):
        """Raises UserError for a word that no training caption had, and names the nearest known ones, and for a caption
        that is longer than the model reads."""
        for word in sorted({w for c in captions for w in words_of(c)} - set(self.number)):
            near = difflib.get_close_matches(word, self.number, n=3, cutoff=0.5) or sorted(self.number)[:5]
            raise UserError(f"caption word {word!r} was never seen in training: try {', '.join(near) or 'no caption'}")
        for caption in captions:
            if len(words_of(caption)) > self.config["caption_length"]:
                raise UserError(f"caption {caption!r} has {len(words_of(caption))} words: give at most "
                                f"{self.config['caption_length']}, as training captions have")

    def embed_words(self, words):
        return self.word(words) + self.word_at.weight                      # [B, L, D]

    def embed_drawn(self, token, cell):
        return self.content(token) + self.at(cell)                         # what was drawn last, and where

    def embed_next(self, cell, following):
        return self.next(following) + self.relative(self.hop[cell, following])

    def forward(self, tokens, words, order):
        """tokens [B, N], words [B, L], order [B, N] -> (what [B, N, V], where [B, N, N] or None): at each step k,
        logits for the content of cell o_k, and, where the model has an order head, logits for o_k itself. The second
        must not know o_k: it reads the output of step k - 1 and what was drawn there, and nothing of step k.
        """
        L = words.shape[1]
        content = tokens.gather(1, order)                                  # [B, N], by step
        drawn = self.embed_drawn(F.pad(content[:, :-1], (1, 0), value=self.V),
                                 F.pad(order[:, :-1], (1, 0), value=self.N))
        following = self.embed_next(F.pad(order[:, :-1], (1, 0), value=self.N), order)
        x = torch.cat((self.embed_words(words), drawn + following), 1)     # [B, L + N, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        where = self.next_location(drawn, x[:, L - 1:-1]) if self.config["order_head"] else None
        return self.head(x[:, L:]), where

    def next_location(self, drawn, before):
        return self.where(torch.cat((F.layer_norm(drawn, drawn.shape[-1:]), before), -1))  # [..., N]

    def log_probs(self, tokens, captions, order):
        """log p of the content at each step k of `order`, in nats: [B, N]. Their sum over k is exact, not a bound."""
        logits, _ = self(tokens, self.read(captions), order)
        return -F.cross_entropy(logits.flatten(0, 1).float(), tokens.gather(1, order).flatten(),
                                reduction="none").view(order.shape)


class Drawing:
    """B images being drawn: the model with its key/value cache. The cached twin of `forward`.

        drawing = Drawing(model, words)     words [B, L] from model.read(captions)
        logits = drawing.look(cells)        free cells [B, C]: what would be drawn there? -> [B, C, V]
        drawing.place(choice, token)        of the cells just looked at, take numbers choice [B, n], draw token [B, n]

    The cache is allocated once. Looking at C cells repeats the *last input* C times: all copies share the cache, each
    attends to it and to itself, and only the keys and values of the chosen one are kept.

    One cell is placed at a time, or several at once (n > 1), none of which knew the others. The next look enters them
    as `forward` would, each leading to the one placed after it: n - 1 inputs more, and what it says is exact.

        logits = drawing.look(cells, together=True)     all of these cells come next, and all will be placed

    then needs no input more: each of the n drawn last leads to one of them, and sees the n - 1 others beside it. These
    are n chains that grow side by side; in training there was one, so what is said is no longer exact.
    """

    def __init__(self, model, words):
        self.model, (B, L) = model, words.shape
        D, layers, device = model.config["width"], len(model.blocks), words.device
        self.t = L                                                         # how many inputs the cache holds
        x = model.embed_words(words)
        shape = (layers, B, D // HEAD, L + model.N, HEAD)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        self.k, self.v = torch.empty(2, *shape, device=device, dtype=dtype)
        later = torch.full((L, L), -math.inf, device=device).triu(1)
        for i, block in enumerate(model.blocks):
            q, k, v = block.split(x)
            self.k[i, :, :, :L], self.v[i, :, :, :L] = k, v
            x = block.merge(x, cached_attention(q, k, v, later))
        self.before = model.norm(x)[:, -1:]                                # [B, 1, D], the output of the last step
        self.cell = words.new_full((B, 1), model.N)                        # nothing is drawn yet, nowhere
        self.drawn = model.embed_drawn(words.new_full((B, 1), model.V), self.cell)

    def look(self, cells, together=False):
        n, start, C = self.drawn.shape[1], self.t, cells.shape[1]          # n cells were drawn last
        M = max(n, C) if together else n - 1 + C
        step = torch.arange(M, device=cells.device)
        origin = step.clamp_max(n - 1)                                     # the last of them is repeated
        following = cells[:, step.clamp_max(C - 1)] if together else torch.cat((self.cell[:, 1:], cells), 1)
        x = self.drawn[:, origin] + self.model.embed_next(self.cell[:, origin], following)         # [B, M, D]
        few, mask = together or C <= FEW, None
        end = start + (M if few else n)                # the first n of them stay in the cache, one for each cell
        if (n > 1 or few and M > 1) and not (together and n == C):         # n chains that bring n cells: all see all
            who, whom = step[:M if few else n - 1, None], step[:end - start]
            # side by side, each sees those that bring another cell; else each sees what is before, but no other offer
            sees = (whom < n) & (whom != origin[who]) if together else (whom < n - 1) & (whom < who)
            mask = torch.where(sees | (whom == who), 0.0, -math.inf)
            mask = F.pad(mask, (start, 0))                                 # all see what is older
        self.cells, self.offered = cells, []
        for i, block in enumerate(self.model.blocks):
            q, k, v = block.split(x)                                       # [B, heads, M, d]
            self.k[i, :, :, start:end], self.v[i, :, :, start:end] = k[:, :, :end - start], v[:, :, :end - start]
            if C > 1 and not together:
                self.offered.append((k[:, :, n - 1:], v[:, :, n - 1:]))
            old_k, old_v = self.k[i, :, :, :end], self.v[i, :, :, :end]
            if few:
                y = cached_attention(q, old_k, old_v, mask)
            else:
                y = candidate_attention(*(z[:, :, n - 1:] for z in (q, k, v)), old_k[:, :, :-1], old_v[:, :, :-1])
                if n > 1:
                    y = torch.cat((cached_attention(q[:, :, :n - 1], old_k, old_v, mask), y), 2)
            x = block.merge(x, y)
        self.after = self.model.norm(x[:, :C] if together else x[:, -C:])                  # [B, C, D]
        return self.model.head(self.after)

    def place(self, choice, token):
        row = torch.arange(len(choice), device=choice.device)
        self.t += self.drawn.shape[1]
        if self.offered and choice[:, 0].any():        # the cache holds the first offer: replaced by what was taken
            for i, (k, v) in enumerate(self.offered):
                self.k[i, :, :, self.t - 1] = k[row, :, choice[:, 0]]
                self.v[i, :, :, self.t - 1] = v[row, :, choice[:, 0]]
        self.before = self.after[row, choice[:, -1]][:, None]
        self.cell = self.cells.gather(1, choice)                           # [B, n]
        self.drawn = self.model.embed_drawn(token, self.cell)              # [B, n, D]

    def next_location(self):
        """The order head's logits for the next cell, drawn ones included: [B, N]."""
        return self.model.next_location(self.drawn[:, -1:], self.before)[:, 0]


def one_of(p, generator=None):
    """A number for each row of probabilities p [n, V]: [n, 1] int64. One uniform number inverts the distribution
    function, where torch.multinomial would draw V random numbers, a sixth of all time when images are drawn."""
    total = p.cumsum(-1)
    height = 1 - torch.rand(len(p), 1, generator=generator, device=p.device)               # in (0, 1], so the first
    return torch.searchsorted(total, height * total[:, -1:])               # total to reach it belongs to some p > 0


@torch.inference_mode()
def draw(model, captions, order, generator=None):
    """Plain sampling at temperature 1 in a given order [B, N]: tokens [B, N]. sample.py does more; this is all there is
    to it."""
    drawing = Drawing(model, model.read(captions))
    tokens = torch.empty_like(order)
    first = order.new_zeros(len(order), 1)
    for cell in order.split(1, dim=1):                                     # [B, 1]
        p = drawing.look(cell)[:, 0].float().softmax(-1)
        token = one_of(p, generator)
        tokens.scatter_(1, cell, token)
        drawing.place(first, token)
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# What every training run needs


def optimizers(model, lr, dtype):
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and heads."""
    parts = [], []
    for name, w in model.named_parameters():
        parts[name.startswith("blocks") and w.dim() == 2].append(w)
    return (torch.optim.AdamW(parts[0], lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
            Muon(parts[1], lr, dtype))


def learning_rate(step, steps, peak):
    """Linear warm-up over the first twentieth of the run, then a cosine to zero."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))


def join(device):
    """(rank, processes), joined through torchrun's variables where it started us, else (0, 1). Rank 0 alone prints."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return 0, 1
    if not dist.is_initialized():
        if device.type == "cuda":                                          # from here on "cuda" is this process's own
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise UserError("more processes than GPUs: torchrun "
                                f"--nproc_per_node={torch.cuda.device_count()} -- ...")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def interrupted(asked, device):
    """Whether Ctrl-C was pressed, in any process: all must leave after the same step, or some would wait for ever."""
    if not dist.is_initialized():
        return bool(asked)
    some = torch.tensor(int(bool(asked)), device=device)
    dist.all_reduce(some)
    return bool(some)


def in_turn(parts):
    """Of a list that the processes share out, each has made items rank, rank + world, ...: the whole list, for all.
    With two processes, of ["a", "c"] and ["b"] comes ["a", "b", "c"]."""
    if not dist.is_initialized():
        return parts
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, parts)
    return [part for turn in itertools.zip_longest(*every) for part in turn if part is not None]


def open_tokens(out, data=None):
    """out/tokens.pt as a dict; with `data` it must have been made from that data. tokens [n, N] become int64."""
    held = load_tokens(os.path.join(out, "tokens.pt"))
    if data and open_data(data).fingerprint != held["made_from"]["data"]:
        raise UserError(f"{out}/tokens.pt was made from {held['config']['data']}, not from {data}: "
                        f"run python tokenizer.py --data {data} --out {out}")
    held["fingerprint"] = fingerprint(held["tokens"])
    held["tokens"] = held["tokens"].long()
    return held


def open_tokenizer(out, held, device="cpu"):
    """The Tokenizer in `out` that made the tokens `held` there. UserError if another one did."""
    path = os.path.join(out, "tokenizer.pt")
    tokenizer = load_tokenizer(path, device)
    if tokenizer.fingerprint != held["made_from"]["tokenizer"]:
        raise UserError(f"{out}/tokens.pt was made by another tokenizer than {path}: run python tokenizer.py")
    return tokenizer


def vocabulary(held):
    """(words, caption_length) of the training captions in tokens.pt."""
    captions = [held["captions"][i] for i in held["caption_index"][held["split"] == 0].unique().tolist()]
    words = sorted({w for c in captions for w in words_of(c)})
    return words, min(CAPTION, max([1] + [len(words_of(c)) for c in captions]))


@torch.no_grad()
def held_out(model, tokens, words, order, batch=256):
    """Mean nats per token of images the model does not train on, in this order: a float."""
    total = 0.0
    for i in range(0, len(tokens), batch):
        t, o = tokens[i:i + batch], order[i:i + batch]
        what, _ = model(t, words[i:i + batch], o)
        total += F.cross_entropy(what.flatten(0, 1).float(), t.gather(1, o).flatten(),
                                 reduction="sum").item()
    return total / tokens.numel()


def save_model(path, model, **about):
    """Writes a model with its config and what it was made from; see load_model."""
    save(path, {"kind": "model", "version": 1, "config": model.config, "model": model.state_dict(), **about})


def load_model(path, device="cpu"):
    """An AnyOrder in eval mode from a .pt of anyorder.py or finetune.py; `.about` has what else the file tells (step,
    held_out, order, made_from). UserError for a missing, broken or foreign file."""
    maker = "python finetune.py" if os.path.basename(path).startswith("ordered") else "python anyorder.py"
    file = load(path, "model", maker)
    model = restore(AnyOrder, file, path, maker)
    model.about = about = {key: value for key, value in file.items() if key not in ("model", "config")}
    types = {"order": str, "captions": list, "data": str, "step": int, "tokens_seen": int, "seconds": float}
    more = {"limit": int, "score": str, "distance": float, "caption_rank": torch.Tensor}   # the last 3 by finetune.py
    if not (all(isinstance(about.get(key), types[key]) for key in types)
            and all(isinstance(about[key], more[key]) for key in more.keys() & about.keys())
            and all(isinstance(text, str) for text in about["captions"] + model.config["words"])
            and ("caption_rank" not in about or about["caption_rank"].shape == (len(about["captions"]), model.N))
            and {"data", "tokenizer", "tokens"} <= about["made_from"].keys()):
        raise UserError(f"{path} is damaged: run {maker} again")
    return model.requires_grad_(False).eval().to(device)


def loss_curve(history, path, floor=None):
    """Draws (step, training loss, held-out loss) triples: training grey, held out red, `floor` a dashed line."""
    W, H, edge = 640, 360, 44
    picture = Image.new("RGB", (W, H), "white")
    pen = ImageDraw.Draw(picture)
    values = [value for row in history for value in row[1:]] + ([floor] if floor else [])
    low, high, last = min(values), max(values) + 1e-9, max(1, history[-1][0])
    x = lambda step: edge + (W - edge - 12) * step / last
    y = lambda loss: 12 + (H - edge - 12) * (high - loss) / (high - low + 1e-9)
    pen.line((edge, 12, edge, H - edge + 2, W - 12, H - edge + 2), fill="black")
    for value in torch.linspace(low, high, 5).tolist():
        pen.text((4, y(value) - 6), f"{value:.2f}", fill="black")
    pen.text((edge, H - 30), "0", fill="black")
    pen.text((W - 60, H - 30), f"step {last}", fill="black")
    pen.text((W // 2 - 150, H - 30),
             "nats per token: grey training, red held out" + (", dashed ln(V)" if floor else ""), fill="black")
    if floor:
        for left in range(edge, W - 12, 12):
            pen.line((left, y(floor), left + 6, y(floor)), fill="grey")
    for column, colour in ((1, "silver"), (2, "red")):
        pen.line([(x(row[0]), y(row[column])) for row in history], fill=colour, width=2)
    save_picture(path, picture)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def main():
    parser = arguments(__doc__)
    parser.set_defaults(data=None)
    parser.add_argument("--order", choices=("random", "raster"), default="random",
                        help="random: any given order; raster: the baseline that draws left to right, top to bottom")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch", type=int, default=32, help="images per step over all processes")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--width", type=int, default=128, help="model width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=6, help="transformer layers")
    parser.add_argument("--limit", type=int, default=0, help="train on the first N training images only (0: all)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    args = parser.parse_args()
    for name, least in (("steps", 1), ("batch", 1), ("layers", 1), ("limit", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} is too small: give at least {least}")
    if args.width < HEAD or args.width % HEAD:
        raise UserError(f"--width {args.width} is not a multiple of {HEAD}: "
                        f"try {max(1, round(args.width / HEAD)) * HEAD}")
    if not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr} is not a learning rate: give a number between 0 and 1, such as 0.006")
    device = pick_device(args.device)
    rank, world = join(device)
    if args.batch % world:
        raise UserError(f"--batch {args.batch} cannot be split over {world} processes: give a multiple of {world}")

    # tokens: made here where they are missing, or were made from other data than was asked for
    path = os.path.join(args.out, "tokens.pt")
    if not os.path.exists(path) or (
            args.data and load_tokens(path)["made_from"]["data"] != open_data(args.data).fingerprint):
        problem = f"{path} {'was made from other data' if os.path.exists(path) else 'does not exist'}"
        if args.resume and (os.path.exists(path) or not os.path.exists(resume_path(args.out))):
            raise UserError(f"{problem}, there is nothing to resume: give the same --data and --out as before, or "
                            "leave out --resume")
        if rank == 0:
            print(f"{problem}: training a tokenizer first")
            make_tokens(data=args.data or "sunsets", out=args.out, seed=args.seed, device=args.device,
                        resume=args.resume)
        args.resume = False                            # the tokenizer was interrupted, the model has not begun
        if world > 1:
            dist.barrier()
    held = open_tokens(args.out)
    grid = held["config"]
    N, V = grid["rows"] * grid["cols"], grid["codebook"]
    words, length = vocabulary(held)
    torch.manual_seed(args.seed)
    model = AnyOrder({"rows": grid["rows"], "cols": grid["cols"], "codebook": V, "width": args.width,
                      "layers": args.layers, "order_head": False, "words": words, "caption_length": length}).to(device)
    tokenizer = open_tokenizer(args.out, held, device)
    with torch.no_grad():                              # codes that look alike begin alike: a random projection of them
        book = (tokenizer.codebook - tokenizer.codebook.mean(0)) / tokenizer.codebook.std()             # [V, dim]
        mix = torch.randn(book.shape[1], args.width) * 0.04 / book.shape[1] ** 0.5
        model.content.weight[:V] += book @ mix.to(device)
    captions = model.read(held["captions"])[held["caption_index"].long().to(device)]       # [n, L]
    tokens = held["tokens"].to(device)
    train, check = (held["split"] == 0).nonzero()[:, 0], (held["split"] == 1).nonzero()[:512, 0]
    train = train[:args.limit or None]
    check = check if len(check) else train[:512]       # a handful of images leaves none to validate on
    model.frequency.copy_((torch.bincount(tokens[train].flatten(), minlength=V) + 1) / (tokens[train].numel() + V))
    orders = {"random": random_order, "raster": lambda B, N, generator: raster_order(B, N)}[args.order]
    check_order = orders(len(check), N, seeded(args.seed, "check")).to(device)

    name = "anyorder" if args.order == "random" else "raster"
    target, unfinished = (os.path.join(args.out, name + end) for end in (".pt", "_resume.pt"))
    made_from = {**held["made_from"], "tokens": held["fingerprint"]}
    settings = {**model.config, "optimizer": "Muon",
                **{key: getattr(args, key) for key in ("order", "steps", "batch", "lr", "limit", "seed")}}
    parameters = sum(p.numel() for p in model.parameters())
    kind, *_ = in_turn([precision(device)])                                # of all processes what the first one finds
    step, best, history, seconds = 0, math.inf, [], 0.0
    if args.resume:
        file = load(unfinished, "unfinished", "python anyorder.py without --resume")
        if file["config"] != settings or file["made_from"] != made_from:
            other = [k for k in settings if file["config"].get(k) != settings[k]] or ["tokens.pt"]
            raise UserError(f"{unfinished} was begun with another {', '.join(other)}: "
                            "repeat its flags, or leave out --resume")
        model.load_state_dict(file["model"])
        step, best, history, seconds = file["step"], file["best"], file["history"], file["seconds"]
        kind = torch.bfloat16 if file["bfloat16"] else torch.float32       # whatever the probe says this time
    both = optimizers(model, args.lr, kind)
    if args.resume:
        for optimizer, state in zip(both, file["optimizers"]):
            optimizer.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if rank == 0:
        print(f"{len(train):,} images to train on, {len(check)} to check, {N} cells, {V} codes, {len(words)} words; "
              f"{parameters / 1e6:.2f}M parameters in {str(kind).split('.')[1]} on {device}\n"
              f"a model that knows nothing loses ln({V}) = {math.log(V):.3f} nats per token")

    def remember():
        save(unfinished, {"kind": "unfinished", "version": 1, "config": settings, "made_from": made_from,
                          "model": model.state_dict(), "optimizers": [each.state_dict() for each in both], "step": step,
                          "best": best, "history": history, "seconds": seconds, "bfloat16": kind == torch.bfloat16})

    stop, saved = on_interrupt(), time.time()
    bar = tqdm(total=args.steps, initial=step, desc=name, unit="step", disable=rank > 0, dynamic_ncols=True)
    say = (lambda line: None) if rank else bar.write
    while step < args.steps:
        start = time.time()
        chance = seeded(args.seed, step)                                                   # the same on every process
        pick = train[batch_of(step, args.batch, len(train), args.seed)]    # by step and seed alone: --resume repeats it
        order = orders(args.batch, N, chance)
        told = torch.rand(args.batch, 1, generator=chance) >= DROP
        mine = slice(rank, None, world)                                                    # each takes its share
        pick, order, told = pick[mine].to(device), order[mine].to(device), told[mine].to(device)
        rate = learning_rate(step, args.steps, args.lr)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            what, _ = parallel(tokens[pick], captions[pick] * told, order)                 # [B, N, V]
            loss = F.cross_entropy(what.flatten(0, 1), tokens[pick].gather(1, order).flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)           # of all processes: they fail together
        if not math.isfinite(loss.item() + norm.item()):
            raise UserError(f"the loss is {loss.item()}, its gradient {norm.item()}, at step {step}: "
                            + f"{target} keeps the last good model; " * (best < math.inf)
                            + f"try --lr {args.lr / 3:.2g}")
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seconds += time.time() - start
        bar.update()
        if step == 1 or step % max(1, args.steps // 12) == 0 or step == args.steps:
            with torch.autocast(device.type, kind, enabled=kind != torch.float32):
                value = held_out(model, tokens[check], captions[check], check_order)
            history.append((step, loss.item(), value))
            say(f"step {step:5d}  loss {loss.item():.3f}  held out {value:.3f} nats per token"
                      + ("  best" if value < best else ""))
            if value < best:
                best = value
                if rank == 0:
                    save_model(target, model, made_from=made_from, order=args.order, step=step, held_out=value,
                               batch=args.batch, tokens_seen=step * args.batch * N, seconds=seconds, data=grid["data"],
                               captions=held["captions"], limit=args.limit)
        bar.set_postfix_str(f"loss {loss.item():.3f}, {step * args.batch / max(seconds, 1e-9):.0f} images/s",
                            refresh=False)
        leave = interrupted(stop, device)
        if rank == 0 and (leave or time.time() - saved > SAVE_EVERY):
            remember()
            saved = time.time()
        if leave:
            bar.close()
            print(f"stopped at step {step}: the same command with --resume goes on from {unfinished}")
            raise KeyboardInterrupt
    bar.close()
    if rank:
        return
    if os.path.exists(unfinished):
        os.remove(unfinished)
    loss_curve(history, os.path.join(args.out, f"{name}_loss.png"), math.log(V))
    model = load_model(target, device)
    shown = [held["captions"][i] for i in held["caption_index"][check].tolist()]
    shown = (shown * 32)[:32]
    chance = torch.Generator(device).manual_seed(args.seed)
    drawn = draw(model, shown, orders(32, N, seeded(args.seed, "sheet")).to(device), chance)
    save_picture(os.path.join(args.out, f"{name}.png"),
                 sheet(tokenizer.decode(drawn), 8, scale=max(1, 128 // grid["size"])))
    print(f"{target}: {best:.3f} nats per token held out, {seconds:.0f} s\n"
          f"{args.out}/{name}.png: samples of {', '.join(map(repr, shown[:8]))}, ...\n"
          + (f"next: python order_infer.py --out {args.out}" if name == "anyorder" else "this is the raster baseline"))


if __name__ == "__main__":
    run(main)
