# SPDX-License-Identifier: MIT
"""PyTorch's own test material, imported as it stands without what it does to the process."""

from unittest import mock

with mock.patch("torch.backends.disable_global_flags"):  # from then on no flag could be set, by any test
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

__all__ = ["module_db", "op_db"]
