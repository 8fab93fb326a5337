"""How far the fast path's Triton kernels are from float64, as JSON; run by Triton's interpreter.

A process of its own: Triton asks for TRITON_INTERPRET when it is imported, never again.
"""

import json

import torch
from torch.nn.functional import cross_entropy, silu

from toolkit.train.speed import gated_kernels, kernels, loss_kernel


def apart(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def thin(rows, columns, ranks):
    out, c, b = torch.randn(rows, columns), torch.randn(rows, ranks), torch.randn(columns, ranks)
    wanted = out.double() + c.double() @ b.double().T
    return {"sum": apart(kernels.add_thin(out, c, b.t()), wanted)}


def turned():
    matrix = torch.randint(0, 256, (130, 257), dtype=torch.uint8)
    return {"bytes": float((kernels.turn(matrix) != matrix.t()).sum())}


def block(rows, inner, ranks):
    y, h, b = torch.randn(rows, 2 * inner), torch.randn(rows, ranks), torch.randn(2 * inner, ranks)
    grad, c, d = torch.randn(rows, inner), torch.randn(rows, 4), torch.randn(4, inner)
    times = torch.rand(2 * inner) + 0.5
    wide = (y.double() + h.double() @ b.double().T).requires_grad_()
    gate, up = wide.chunk(2, -1)
    wanted = silu(gate) * up
    (slope,) = torch.autograd.grad(wanted, wide, grad.double() + c.double() @ d.double())
    wanted = wanted.detach()
    v, of_v = gated_kernels.gated(y, h, b, True)
    dy, again, largest = gated_kernels.gated_backward(grad, c, d, y, h, b, times)
    return {
        "v": apart(v, wanted), "of v": apart(of_v, wanted.abs().amax(-1)),
        "again": apart(again, wanted), "dy": apart(dy, slope),
        "largest": apart(largest, (slope * times).abs().amax(-1)),
    }  # fmt: skip


def quantized(ranks):
    x, times, b = torch.randn(70, 300), torch.rand(300) + 0.5, torch.randn(300, ranks)
    meant = x * times
    q, scale, h = gated_kernels.quantize_thin(x, times, meant.abs().amax(-1), b)
    return {
        "scale": apart(scale, meant.abs().amax(-1) / 448), "h": apart(h, x.double() @ b.double()),
        # e4m3 has three bits and the interpreter cuts where a GPU rounds: 0.1 is right here
        "q, of 0.1": apart(q.float() * scale[:, None], meant) * 1e-5,
    }  # fmt: skip


def entropy(scale, cap):
    logits, targets = torch.randn(9, 9000) * 3, torch.randint(0, 9000, (9,))
    wide = logits.double().requires_grad_()
    bent = cap * torch.tanh(wide * scale / cap) if cap else wide * scale
    wanted = cross_entropy(bent, targets, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), wide)
    loss = loss_kernel.entropy_(logits, targets, scale, cap)
    return {"loss": apart(loss, wanted.detach()), "slope": apart(logits, slope)}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({
        "thin product": thin(70, 200, 48), "of one row": thin(1, 130, 8), "transposed": turned(),
        "gated block": block(70, 200, 32), "a small one": block(5, 130, 8),
        "quantized": quantized(8), "by more ranks": quantized(32),
        "entropy": entropy(1.0, 0.0), "scaled": entropy(0.25, 0.0), "capped": entropy(1.0, 3.0),
    }))  # fmt: skip
