# SPDX-License-Identifier: MIT
"""The right answers: every product from its definition, in a type wider than the tensors'."""

import itertools

import numpy as np
import torch


def array(tensor):
    """float64, and long double for tensors that are float64 themselves."""
    wide = np.longdouble if tensor.dtype is torch.float64 else np.float64
    return tensor.detach().cpu().double().numpy().astype(wide)


def _windows(conv, kernel, out):
    """For each filter tap: its index, and where in the padded input it meets the outputs."""
    stride, _, dilation, _ = conv
    for tap in itertools.product(*map(range, kernel)):
        corner = [t * d for t, d in zip(tap, dilation, strict=True)]
        yield (
            (..., *tap),
            (..., *(slice(c, c + (o - 1) * s + 1, s) for c, o, s in zip(corner, out, stride, strict=True))),
        )


def _padded(size, padding):
    axes = len(size)
    return [front + s + back for s, front, back in zip(size, padding[:axes], padding[axes:], strict=True)]


def _inside(size, padding):
    return (..., *(slice(front, front + s) for s, front in zip(size, padding, strict=False)))


def _grouped(a, axis, groups):
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1 :])


def _flat(a):
    return a.reshape(*a.shape[:3], int(np.prod(a.shape[3:])))


def conv_output_size(size, kernel, conv):
    stride, padding, dilation, _ = conv
    return [
        (whole - d * (k - 1) - 1) // s + 1
        for whole, k, s, d in zip(_padded(size, padding), kernel, stride, dilation, strict=True)
    ]


def conv_fprop(x, w, b, conv):
    n, c, *size = x.shape
    k, _, *kernel = w.shape
    _, padding, _, groups = conv
    out = conv_output_size(size, kernel, conv)
    padded = np.zeros((n, c, *_padded(size, padding)), x.dtype)
    padded[_inside(size, padding)] = x
    padded, filters = _grouped(padded, 1, groups), _grouped(w, 0, groups)
    y = np.zeros((n, groups, k // groups, int(np.prod(out))), x.dtype)
    for tap, window in _windows(conv, kernel, out):
        y += np.einsum("ngcp,gkc->ngkp", _flat(padded[window]), filters[tap])
    y = y.reshape(n, k, *out)
    return y if b is None else y + b.reshape(-1, *(1 for _ in out))


def conv_dgrad(gy, w, input_size, conv):
    n, c, *size = input_size
    _, _, *kernel = w.shape
    _, padding, _, groups = conv
    grads, filters = _grouped(gy, 1, groups), _grouped(w, 0, groups)
    padded = np.zeros((n, groups, c // groups, *_padded(size, padding)), gy.dtype)
    for tap, window in _windows(conv, kernel, gy.shape[2:]):
        part = np.einsum("ngkp,gkc->ngcp", _flat(grads), filters[tap])
        padded[window] += part.reshape(padded[window].shape)
    return padded.reshape(n, c, *padded.shape[3:])[_inside(size, padding)]


def conv_wgrad(gy, x, weight_size, conv):
    """The gradients of weight and bias."""
    n, c, *size = x.shape
    _, padding, _, groups = conv
    padded = np.zeros((n, c, *_padded(size, padding)), x.dtype)
    padded[_inside(size, padding)] = x
    padded, grads = _grouped(padded, 1, groups), _grouped(gy, 1, groups)
    gw = np.zeros(weight_size, gy.dtype)
    filters = _grouped(gw, 0, groups)
    for tap, window in _windows(conv, weight_size[2:], gy.shape[2:]):
        filters[tap] = np.einsum("ngkp,ngcp->gkc", _flat(grads), _flat(padded[window]))
    return gw, gy.sum((0, *range(2, gy.ndim)))


def max_pool(x, window):
    """The maxima of a tensor without NaN, windows inside the padded input."""
    kernel, stride, padding, dilation, _ = window
    size = x.shape[2:]
    conv = stride, (*padding, *padding), dilation, 1
    padded = np.full((*x.shape[:2], *_padded(size, conv[1])), -np.inf, x.dtype)
    padded[_inside(size, padding)] = x
    cells = [padded[cell] for _, cell in _windows(conv, kernel, conv_output_size(size, kernel, conv))]
    return np.maximum.reduce(cells)


def _averages(window, size, out, dtype):
    """A filter of ones, the convolution that sums windows of one channel, and what each sum is divided by."""
    kernel, stride, padding, _, count_include_pad, divisor = window
    hangs_over = [
        max(0, (o - 1) * s + k - n - 2 * p)
        for k, s, p, n, o in zip(kernel, stride, padding, size, out, strict=True)
    ]
    backs = [p + over for p, over in zip(padding, hangs_over, strict=True)]
    conv = stride, (*padding, *backs), (1,) * len(size), 1
    counted = np.ones((1, 1, *size), dtype)
    beside = [(p, p) if count_include_pad else (0, 0) for p in padding]
    counted = np.pad(counted, [(0, 0), (0, 0), *beside], constant_values=1)
    fronts = [0 if count_include_pad else p for p in padding]
    ends = [b - p if count_include_pad else b for b, p in zip(backs, padding, strict=True)]
    ones = np.ones((1, 1, *kernel), dtype)
    cells = conv_fprop(counted, ones, None, (stride, (*fronts, *ends), conv[2], 1))
    return ones, conv, cells.clip(min=1) if divisor is None else np.full_like(cells, divisor)


def avg_pool(x, window, out):
    n, c, *size = x.shape
    ones, conv, divisors = _averages(window, size, out, x.dtype)
    sums = conv_fprop(x.reshape(n * c, 1, *size), ones, None, conv)
    return (sums / divisors).reshape(n, c, *out)


def avg_pool_backward(gy, window, input_size):
    n, c, *size = input_size
    out = gy.shape[2:]
    ones, conv, divisors = _averages(window, size, out, gy.dtype)
    parts = gy.reshape(n * c, 1, *out) / divisors
    return conv_dgrad(parts, ones, (n * c, 1, *size), conv).reshape(input_size)


def max_pool_backward(gy, indices, input_size):
    gx = np.zeros((*input_size[:2], int(np.prod(input_size[2:]))), gy.dtype)

    def flat(a):
        return a.reshape(*a.shape[:2], int(np.prod(a.shape[2:])))

    n, c = np.ogrid[: input_size[0], : input_size[1]]
    np.add.at(gx, (n[..., None], c[..., None], flat(indices)), flat(gy))
    return gx.reshape(input_size)


def _of_channels(values, like):
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _normal(x, eps):
    """The batch-normed x, and what it was multiplied by."""
    axes = (0, *range(2, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    invstd = 1 / np.sqrt((centred * centred).mean(axes, keepdims=True) + x.dtype.type(eps))
    return centred * invstd, invstd


def batch_norm(x, w, b, eps):
    return _normal(x, eps)[0] * _of_channels(w, x) + _of_channels(b, x)


def batch_norm_backward(gy, x, w, eps):
    """The gradients of x, w and b."""
    axes = (0, *range(2, x.ndim))
    normal, invstd = _normal(x, eps)
    products = gy * normal
    rest = gy - gy.mean(axes, keepdims=True) - normal * products.mean(axes, keepdims=True)
    return _of_channels(w, x) * invstd * rest, products.sum(axes), gy.sum(axes)
