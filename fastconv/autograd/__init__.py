# SPDX-License-Identifier: MIT
"""Gradients of the operators, as `torch.autograd.Function`s.

fprop, dgrad and wgrad are closed under differentiation: the gradient of each is made of the other two. So
each is a Function whose backward calls the others', and derivatives of every order follow. The same holds for
max-pool's backward and gather, for the two passes of average pooling, and for linear's three products.

Plain calls of convolution, linear and max-pool do not come here: csrc/glue/eager.cpp has the same backward
passes in C++, and comes here for derivatives of a higher order.

Each Function is entered through a function of the same meaning in lower case, which calls the operator
directly where no gradient is wanted. `kernel` names rows to force; it is kept for backward, which runs on
another thread.

All Functions but those of fused operators (conv_act_pool, batch_norm, chain) have a derivative in forward
mode and a rule for vmap; where either is wanted, fused operators are made of the others.
"""

from fastconv.autograd import batch_norm, chain, conv, conv_act_pool, linear, operators, pool

__all__ = ["batch_norm", "chain", "conv", "conv_act_pool", "linear", "operators", "pool"]
