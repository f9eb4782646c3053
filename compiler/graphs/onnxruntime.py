"""ONNX Runtime: every unique segment becomes an ONNX model, run on torch's own memory.

Inputs and outputs are bound by address, so nothing is copied between torch and ONNX Runtime. A
segment serves many layers; each layer's weights are bound once.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from halyard.compiler.graphs.onnx_graph import NUMPY_DTYPES, OPSET
from halyard.compiler.graphs.onnx_segment import segment_model
from halyard.hal.contract import CONTRACT_VERSION, Executable
from halyard.hal.devices.streams import current_stream_handle
from halyard.hal.errors import BackendUnavailableError, ModelError
from halyard.hal.types import DeviceInfo, Probe

__all__ = ["OnnxRuntimeCompiler"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16)}
_INSTALL = {"cpu": 'pip install "halyard[onnx]"', "cuda": 'pip install "halyard[onnx-gpu]"'}
_FILE = "model.onnx"
_FACTS = "halyard.segment"


@dataclass(frozen=True, slots=True)
class _Output:
    """What an output will be: a dimension is a size, or (input, dimension) it is taken from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | tuple[int, int], ...]


class _Binding:
    """An IOBinding that takes tensors by address."""

    def __init__(self, session: Any, device: torch.device) -> None:
        import onnxruntime

        self.inner = session.io_binding()
        # The wrapper's own methods make the device anew at each call, which costs more than all the
        # rest of a binding.
        self._raw = self.inner._iobinding
        self._device = onnxruntime.OrtDevice.make(device.type, device.index or 0)._get_c_device()

    def bind_input(self, name: str, tensor: Tensor) -> None:
        kind, shape = NUMPY_DTYPES[tensor.dtype], tensor.shape
        self._raw.bind_input(name, self._device, kind, shape, tensor.data_ptr())

    def bind_output(self, name: str, tensor: Tensor) -> None:
        kind, shape = NUMPY_DTYPES[tensor.dtype], tensor.shape
        self._raw.bind_output(name, self._device, kind, shape, tensor.data_ptr())


class _Segment:
    """A model as bytes and its sessions: positional tensors in, a tuple of tensors out."""

    def __init__(self, data: bytes, device: DeviceInfo) -> None:
        import onnx

        self.data = data
        model = onnx.load_from_string(data)
        facts = json.loads({prop.key: prop.value for prop in model.metadata_props}[_FACTS])
        self._names: list[str] = [value.name for value in model.graph.input]
        self._weights: list[int] = facts["weights"]  # positions of inputs
        weights = set(self._weights)
        self._others = [i for i in range(len(self._names)) if i not in weights]
        self._outputs = [
            _Output(
                output["name"],
                getattr(torch, output["dtype"]),
                tuple(d if isinstance(d, int) else (d[0], d[1]) for d in output["shape"]),
            )
            for output in facts["outputs"]
        ]
        self._kind = device.kind
        self._sessions: dict[tuple[int, int], Any] = {}  # by device index and stream
        self._bindings: dict[tuple[int, ...], _Binding] = {}  # by session and identities of weights
        self._run_options: Any = None
        if self._kind == "cpu":
            self._session(torch.device("cpu"))  # so that what can't run shows now

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        device = inputs[0].device
        session = self._session(device)
        key = (id(session), *[id(inputs[i]) for i in self._weights])
        binding = self._bindings.get(key)
        if binding is None:
            binding = self._bind_weights(session, key, inputs)
        held = []  # what is bound by address lives until the run is over
        for i in self._others:
            tensor = inputs[i].contiguous()
            held.append(tensor)
            binding.bind_input(self._names[i], tensor)
        made = []
        for output in self._outputs:
            shape = [d if isinstance(d, int) else inputs[d[0]].shape[d[1]] for d in output.shape]
            tensor = torch.empty(shape, dtype=output.dtype, device=device)
            made.append(tensor)
            binding.bind_output(output.name, tensor)
        try:
            session.run_with_iobinding(binding.inner, self._run_options)
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime failed: {' '.join(str(error).split())}") from error
        return tuple(made)

    def _session(self, device: torch.device) -> Any:
        if device.type == "cpu":
            where = (0, 0)
        else:
            where = (device.index or 0, current_stream_handle(device))
        session = self._sessions.get(where)
        if session is None:
            session = self._sessions[where] = self._open(*where)
        return session

    def _open(self, index: int, stream: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # A plan of memory is kept for every size of batch that ever came: there are thousands.
        options.enable_mem_pattern = False
        # Threads that spin after each operator would take the cores from attention's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider: Any = _PROVIDERS[self._kind]
        if self._kind == "cuda":
            settings = {
                "device_id": str(index),
                # The same stream as attention's, so that calls are ordered as issued. Its own name
                # for torch's default stream: 0 would mean "make one".
                "user_compute_stream": str(stream or 1),
                "use_tf32": "0",  # as torch does by default
            }
            # Its memory grows by doubling: one that takes what is asked for would still have to grow
            # while a step is recorded as a graph, where nothing may be allocated.
            provider = (provider, settings)
            self._run_options = onnxruntime.RunOptions()
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            session = onnxruntime.InferenceSession(self.data, options, providers=[provider])
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BackendUnavailableError(
                f"ONNX Runtime can't run a segment of this model: {reason}"
            ) from error
        if _PROVIDERS[self._kind] not in session.get_providers():
            raise BackendUnavailableError(
                "ONNX Runtime could not open its CUDA provider: onnxruntime-gpu and torch must be "
                f"built for the same CUDA release ({_INSTALL['cuda']})"
            )
        return session

    def _bind_weights(
        self, session: Any, key: tuple[int, ...], inputs: tuple[Tensor, ...]
    ) -> _Binding:
        """A binding that holds these weights' addresses, dropped with the first of them."""
        binding = _Binding(session, inputs[0].device)
        for i in self._weights:
            tensor = inputs[i]
            if not tensor.is_contiguous():
                raise ModelError("a weight is not contiguous in memory")
            binding.bind_input(self._names[i], tensor)
            weakref.finalize(tensor, self._bindings.pop, key, None).atexit = False
        self._bindings[key] = binding
        return binding


class OnnxRuntimeCompiler:
    """Translates segments to ONNX; float32 on CPUs, float32 and float16 on CUDA devices."""

    contract_version = CONTRACT_VERSION
    name = "onnxruntime"

    @classmethod
    def probe(cls, device: DeviceInfo) -> Probe:
        provider = _PROVIDERS.get(device.kind)
        if provider is None:
            return Probe(False, (f"onnxruntime runs on cpu and cuda here, not on {device.kind}",))
        reasons = []
        versions = {}
        for package in ("onnx", "onnxruntime"):
            try:
                module = __import__(package)
            except ImportError as error:
                why = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
                reasons.append(f"{package} can't be imported{why}: {_INSTALL[device.kind]}")
            else:
                versions[package] = str(module.__version__)
        if not reasons and device.kind != "cpu":
            import onnxruntime

            if provider not in onnxruntime.get_available_providers():
                reasons.append(f"this onnxruntime has no {provider}: {_INSTALL[device.kind]}")
        return Probe(not reasons, tuple(reasons), versions=versions)

    def passes(self, device: DeviceInfo, dtype: str) -> tuple[str, ...]:
        return ("drop_no_ops", "merge_equal_nodes", "fuse_linears_of_one_input")

    def fingerprint(self) -> str:
        """What, beside torch and the device, decides the models that come out."""
        return f"onnx {metadata.version('onnx')} opset {OPSET}"

    def compile(
        self, segment: fx.GraphModule, inputs: Sequence[Tensor], device: DeviceInfo
    ) -> Executable:
        found = self.probe(device)
        if not found.available:
            raise BackendUnavailableError(f"onnxruntime can't run here: {'; '.join(found.reasons)}")
        for tensor in inputs:
            if tensor.is_floating_point() and tensor.dtype not in _DTYPES[device.kind]:
                known = " or ".join(str(d).removeprefix("torch.") for d in _DTYPES[device.kind])
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise BackendUnavailableError(
                    f"onnxruntime computes in {known} on {device.kind}, not in {dtype}: "
                    "use --dtype float32 or another backend"
                )
        model, facts = segment_model(segment)
        model.metadata_props.add(key=_FACTS, value=json.dumps(facts))
        return _Segment(model.SerializeToString(), device)

    def save(self, executable: Executable, directory: Path) -> bool:
        if not isinstance(executable, _Segment):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _FILE).write_bytes(executable.data)
        return True

    def load(self, directory: Path, device: DeviceInfo) -> Executable:
        return _Segment((directory / _FILE).read_bytes(), device)
