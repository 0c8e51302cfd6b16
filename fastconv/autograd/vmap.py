# SPDX-License-Identifier: MIT
"""Rules of `torch.vmap` for this package's Functions: many calls are one call of the operator.

What is alike for all of them goes into the batch; where filters differ, the calls become groups of a
convolution, and products of matrices become 1x1 convolutions. Each rule takes the function to call, vmap's
`info` and `in_dims`, and the Function's arguments, and returns the outputs and where their new dimension is.
"""

_POINTWISE = ((1, 1), (0, 0, 0, 0), (1, 1), 1)  # a 1x1 convolution's arguments


def _in_front(tensor, dim, size):
    """`tensor` with the mapped dimension in front, repeated if it has none; of no calls, zeros for one."""
    if dim is None:
        return tensor.expand(max(size, 1), *tensor.shape)
    tensor = tensor.movedim(dim, 0)
    return tensor if size else tensor.new_zeros(1, *tensor.shape[1:])


def _apart(tensor, dim, size):
    """The other way: dimension `dim` as `size` and what is left of it."""
    calls = max(size, 1)
    return tensor.unflatten(dim, (calls, tensor.shape[dim] // calls)).narrow(dim, 0, size)


def folded(function, info, in_dims, *tensors):
    """Images of all calls as one batch: of tensors [N, ...]."""
    size = info.batch_size
    outputs = function(
        *(_in_front(t, dim, size).flatten(0, 1) for t, dim in zip(tensors, in_dims, strict=False))
    )
    if isinstance(outputs, tuple):
        return tuple(_apart(each, 0, size) for each in outputs), (0,) * len(outputs)
    return _apart(outputs, 0, size), 0


def _as_channels(tensor, dim, size):
    """[N, size * C, ...] of `size` tensors [N, C, ...]."""
    return _in_front(tensor, dim, size).transpose(0, 1).flatten(1, 2)


def _grouped(conv, size):
    *rest, groups = conv
    return (*rest, max(size, 1) * groups)


def conv_fprop(function, info, in_dims, input, weight, bias, conv, kernel):
    size = info.batch_size
    input_dim, weight_dim, bias_dim = in_dims[:3]
    if weight_dim is None and bias_dim is None:
        return folded(lambda x: function(x, weight, bias, conv, kernel), info, in_dims, input)
    weights = _in_front(weight, weight_dim, size).flatten(0, 1)
    biases = None if bias is None else _in_front(bias, bias_dim, size).flatten()
    if input_dim is None and conv[-1] == 1:  # all filters read the same channels
        output = function(input, weights, biases, conv, kernel)
    else:
        channels = _as_channels(input, input_dim, size)
        output = function(channels, weights, biases, _grouped(conv, size), kernel)
    return _apart(output, 1, size), 1


def conv_dgrad(function, info, in_dims, grad_output, weight, input_size, conv, kernel):
    size = info.batch_size
    grad_dim, weight_dim = in_dims[:2]
    if weight_dim is None:
        whole = (max(size, 1) * input_size[0], *input_size[1:])
        return folded(lambda g: function(g, weight, whole, conv, kernel), info, in_dims, grad_output)
    whole = (input_size[0], max(size, 1) * input_size[1], *input_size[2:])
    grads = _as_channels(grad_output, grad_dim, size)
    weights = _in_front(weight, weight_dim, size).flatten(0, 1)
    return _apart(function(grads, weights, whole, _grouped(conv, size), kernel), 1, size), 1


def conv_wgrad(function, info, in_dims, grad_output, input, weight_size, conv, bias, kernel):
    size = info.batch_size
    grads, inputs = (
        _as_channels(t, dim, size) for t, dim in zip((grad_output, input), in_dims, strict=False)
    )
    whole = (max(size, 1) * weight_size[0], *weight_size[1:])
    weights, biases = function(grads, inputs, whole, _grouped(conv, size), bias, kernel)
    if not bias:
        return (_apart(weights, 0, size), biases), (0, None)
    return (_apart(weights, 0, size), _apart(biases, 0, size)), (0, 0)


def _as_pixels(tensor, dim):
    """Rows [..., K] as images [M, K, 1, 1], the mapped dimension in front; where it is; what M is made of."""
    mapped = dim is not None
    if mapped:
        tensor = tensor.movedim(dim, 0)
    lead, features = tensor.shape[mapped:-1], tensor.shape[-1]
    pixels = tensor.reshape(*tensor.shape[:mapped], lead.numel(), features, 1, 1)
    return pixels, 0 if mapped else None, lead


def linear(function, convolve, info, in_dims, input, weight, bias, kernel):
    input_dim, weight_dim, bias_dim = in_dims[:3]
    if weight_dim is None and bias_dim is None:
        return function(input.movedim(input_dim, 0), weight, bias, "none", kernel), 0
    pixels, dim, lead = _as_pixels(input, input_dim)
    output, at = conv_fprop(
        convolve, info, (dim, weight_dim, bias_dim), pixels, weight[..., None, None], bias, _POINTWISE, kernel
    )
    output = output.movedim(at, 0).flatten(2)
    return output.reshape(info.batch_size, *lead, output.shape[-1]), 0


def linear_dgrad(function, convolve, info, in_dims, grad_output, weight, kernel):
    grad_dim, weight_dim = in_dims[:2]
    if weight_dim is None:
        return function(grad_output.movedim(grad_dim, 0), weight, kernel), 0
    pixels, dim, lead = _as_pixels(grad_output, grad_dim)
    filters = weight.movedim(weight_dim, 0)[..., None, None]
    size = (lead.numel(), *filters.shape[2:])
    output, at = conv_dgrad(convolve, info, (dim, 0), pixels, filters, size, _POINTWISE, kernel)
    return output.movedim(at, 0).flatten(2).reshape(info.batch_size, *lead, size[1]), 0


def linear_wgrad(convolve, info, in_dims, grad_output, input, bias, kernel):
    grads, grad_dim, _ = _as_pixels(grad_output, in_dims[0])
    inputs, input_dim, _ = _as_pixels(input, in_dims[1])
    size = (grads.shape[-3], inputs.shape[-3], 1, 1)
    (weights, biases), dims = conv_wgrad(
        convolve, info, (grad_dim, input_dim), grads, inputs, size, _POINTWISE, bias, kernel
    )
    return (weights.flatten(2), biases), dims
