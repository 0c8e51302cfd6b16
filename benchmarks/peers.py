# SPDX-License-Identifier: MIT
"""Other runtimes on the same network and numbers, for inference on a CPU: those that are installed."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch

__all__ = ["INSTALLED", "openable"]


def openable(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """A function each that runs `model` on `images`, by the names of `INSTALLED`.

    They run on as many threads as torch does, read the tensor in place and return one.
    """
    exported = _exported(model, images) if INSTALLED else b""
    return {name: RUNTIMES[name](exported, images) for name in INSTALLED}


def _exported(model: torch.nn.Module, images: torch.Tensor) -> bytes:
    """`model` for a batch of this size, in the ONNX format."""
    exported = io.BytesIO()
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)  # what else torch's exporter says is about its own dependencies
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (images,), exported, dynamo=True, verbose=False)
    finally:
        logger.setLevel(before)
    return exported.getvalue()


def _onnxruntime(exported: bytes, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(precision: str) -> Callable[[bytes, torch.Tensor], Callable[[], torch.Tensor]]:
    def open_model(exported: bytes, images: torch.Tensor) -> Callable[[], torch.Tensor]:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        request = core.compile_model(core.read_model(exported), "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
        output = request.get_output_tensor()

        def run() -> torch.Tensor:
            request.infer()
            return torch.from_numpy(output.data)

        return run

    return open_model


RUNTIMES = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino("f32"),
    "openvino bfloat16": _openvino("bf16"),
}
_EXPORTER = all(map(find_spec, ("onnx", "onnxscript")))
INSTALLED = [name for name in RUNTIMES if _EXPORTER and find_spec(name.split()[0])]
