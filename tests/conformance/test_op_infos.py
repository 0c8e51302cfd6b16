# SPDX-License-Identifier: MIT
"""The samples that PyTorch tests its own functions with (OpInfo), on fastconv.functional's.

A few of each function's samples by default. The slow form takes them all; of max-pools' derivatives, which
have many, a hundred or so.
"""

import pytest
import torch
from infos import op_db
from torch.autograd import gradcheck, gradgradcheck

import fastconv
from fastconv._accuracy import allowance

NAMES = [f"{kind}{axes}d" for kind in ("conv", "max_pool", "avg_pool") for axes in (1, 2, 3)] + ["linear"]
INFOS = {name: info for info in op_db for name in NAMES if info.name == f"nn.functional.{name}"}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = {"2d": torch.channels_last, "3d": torch.channels_last_3d}
FEW, MANY = 12, 100
each_function = pytest.mark.parametrize("name", NAMES)


def _few_or(most, name):
    return pytest.mark.parametrize(
        "most", [pytest.param(FEW, id="few"), pytest.param(most, id=name, marks=pytest.mark.slow)]
    )


few_or_all, few_or_many = _few_or(10**6, "all"), _few_or(MANY, "many")


def samples_of(name, dtype, most, requires_grad=False):
    """Up to `most` of the function's samples, from all of their kinds."""
    samples = list(INFOS[name].sample_inputs("cpu", dtype, requires_grad=requires_grad))
    return samples[:: max(1, len(samples) // most)]


def first(output):
    """The output without the indices."""
    return output[0] if isinstance(output, tuple) else output


class Call:
    """A sample's tensors, and both functions of them."""

    def __init__(self, name, sample):
        self.values = [sample.input, *sample.args]
        self.where = [i for i, value in enumerate(self.values) if isinstance(value, torch.Tensor)]
        self.tensors = [self.values[i] for i in self.where]
        self.kwargs = sample.kwargs
        self.functions = getattr(fastconv.functional, name), INFOS[name].op

    def _of(self, function):
        def call(*tensors):
            values = list(self.values)
            for i, tensor in zip(self.where, tensors, strict=True):
                values[i] = tensor
            return function(*values, **self.kwargs)

        return call

    @property
    def ours(self):
        return self._of(self.functions[0])

    @property
    def theirs(self):
        return self._of(self.functions[1])


def check_values(call, tensors):
    """The error rule, float64 to its last digits; the same indices, dtype and, of images, layout."""
    found = call.ours(*tensors)
    exact = call.theirs(*(t.double() for t in tensors))
    try:
        expected = call.theirs(*tensors)
    except NotImplementedError:  # torch has no avg_pool3d of 16 bits on a CPU
        expected = exact.to(tensors[0].dtype)
    if isinstance(expected, tuple):
        torch.testing.assert_close(found[1], expected[1])
    found, expected, exact = first(found), first(expected), first(exact)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dim() == 4 and found.numel():
        assert found.stride() == expected.stride() or min(found.shape) == 1
    finite = exact.isfinite()
    torch.testing.assert_close(found[~finite].double(), exact[~finite], equal_nan=True)
    if found.dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    elif finite.any():
        error, torch_error = (
            (each.double() - exact)[finite].abs().max().item() for each in (found, expected)
        )
        limit = allowance(torch_error, exact[finite].abs().max().item(), found.dtype)
        assert error <= limit, (error, limit)


@each_function
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@few_or_all
def test_forward(name, dtype, most, tally):
    def check(sample):
        call = Call(name, sample)
        check_values(call, call.tensors)

    for sample in samples_of(name, dtype, most):
        tally.run(check, sample)


@each_function
@few_or_all
def test_layouts(name, most, tally):
    """Not contiguous, and channels_last where there is such a layout."""

    def check(sample):
        call = Call(name, sample)
        check_values(call, Call(name, sample.noncontiguous()).tensors)
        if name[-2:] in FORMATS and call.tensors[0].dim() == int(name[-2]) + 2:
            layout = FORMATS[name[-2:]]
            images = [t.contiguous(memory_format=layout) if t.dim() > 3 else t for t in call.tensors]
            check_values(call, images)

    for sample in samples_of(name, torch.float32, most):
        tally.run(check, sample)


@pytest.mark.parametrize("name", [name for name in NAMES if INFOS[name].error_inputs_func])
def test_errors(name, tally):
    """What torch refuses is refused with the same class of exception."""

    def check(wrong):
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type):
            getattr(fastconv.functional, name)(sample.input, *sample.args, **sample.kwargs)

    for wrong in INFOS[name].error_inputs("cpu"):
        tally.run(check, wrong)


def refused(name):
    return sorted(INFOS[name].supported_dtypes("cpu") - set(DTYPES), key=str)


@pytest.mark.parametrize("name", [name for name in NAMES if refused(name)])
def test_refused_dtypes(name, tally):
    """Integers and complex numbers are refused, and the message names what is taken."""

    def check(sample):
        call = Call(name, sample)
        with pytest.raises(
            NotImplementedError, match=f"{name}: .* must be float32, float64, float16 or bfloat16"
        ):
            call.ours(*call.tensors)

    for dtype in refused(name):
        for sample in samples_of(name, dtype, FEW):
            tally.run(check, sample)


# --- derivatives


def derivatives(name, most, tally, check):
    for sample in samples_of(name, torch.float64, most, requires_grad=True):
        call = Call(name, sample)
        tally.run(lambda _, call=call: check(lambda *t: first(call.ours(*t)), call), sample)


@each_function
@few_or_many
def test_gradcheck(name, most, tally):
    derivatives(name, most, tally, lambda f, call: gradcheck(f, call.tensors, fast_mode=True))


@each_function
@few_or_many
def test_gradgradcheck(name, most, tally):
    derivatives(name, most, tally, lambda f, call: gradgradcheck(f, call.tensors, fast_mode=True))


@each_function
@few_or_many
def test_forward_mode(name, most, tally):
    def check(f, call):
        gradcheck(f, call.tensors, check_forward_ad=True, check_backward_ad=False, fast_mode=True)

    derivatives(name, most, tally, check)


@each_function
@few_or_many
def test_forward_over_reverse(name, most, tally):
    def check(f, call):
        options = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
        gradgradcheck(f, call.tensors, fast_mode=True, **options)

    derivatives(name, most, tally, check)


@each_function
def test_jacobians(name, tally):
    def check(f, call):
        tensors = [t.detach() for t in call.tensors]
        if sum(t.numel() for t in tensors) > 300:
            return
        which = tuple(range(len(tensors)))
        expected = torch.func.jacrev(lambda *t: first(call.theirs(*t)), which)(*tensors)
        torch.testing.assert_close(torch.func.jacrev(f, which)(*tensors), expected)
        torch.testing.assert_close(torch.func.jacfwd(f, which)(*tensors), expected)

    derivatives(name, FEW, tally, check)


# --- vmap


def stacks(tensors):
    """Each choice of arguments to map over: the stacked tensors, and the dimension of each, or None."""
    for chosen in range(1, 2 ** len(tensors)):
        dims = [min(1, t.dim()) if chosen >> i & 1 else None for i, t in enumerate(tensors)]
        yield (
            [t if d is None else torch.stack([t, t / 2, -t], d) for t, d in zip(tensors, dims, strict=True)],
            tuple(dims),
        )


def one_by_one(f, tensors, dims):
    """What vmap means."""
    calls = [
        f(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True))) for i in range(3)
    ]
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(each) for each in zip(*calls, strict=True))
    return torch.stack(calls)


@each_function
@few_or_many
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap(name, most, tally):
    """Over every choice of arguments, by rules of its own: torch warns of a loop."""

    def check(f, call):
        for tensors, dims in stacks([t.detach() for t in call.tensors]):
            found = torch.vmap(call.ours, dims)(*tensors)
            torch.testing.assert_close(found, one_by_one(call.theirs, tensors, dims))

    derivatives(name, most, tally, check)


@each_function
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_gradients_of_each_sample(name, tally):
    """vmap over gradients."""

    def check(f, call):
        for tensors, dims in stacks([t.detach() for t in call.tensors]):
            which = tuple(range(len(tensors)))
            ours = torch.func.grad(lambda *t: f(*t).square().sum(), which)
            theirs = torch.func.grad(lambda *t: first(call.theirs(*t)).square().sum(), which)
            expected = one_by_one(theirs, tensors, dims)
            torch.testing.assert_close(torch.vmap(ours, dims)(*tensors), expected)

    derivatives(name, FEW, tally, check)
