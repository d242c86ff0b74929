"""The systems that are timed, each behind one interface and none handicapped.

Every one gets the same type, the same number of threads, the whole graph with known sizes, and its own best settings.
Memory that a prepared call holds is freed when the call is dropped.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import math
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Call = Callable[[], torch.Tensor]
"""Runs the prepared network once on the prepared input. The result is read only until the next call."""


@dataclass(frozen=True)
class Peer:
    """A system: how it is called, what `prepare` does with a model in eval mode, and whether it is there."""

    name: str
    label: str
    prepare: Callable[[nn.Module, torch.Tensor, Path], Call]
    """With a folder for exported files, which are kept from call to call: exporting takes longer than the rest."""
    packages: tuple[str, ...] = ()
    needs_compiler: bool = False
    on_gpus: bool = False

    def absence(self, device: str = "cpu") -> str | None:
        """Why this system cannot be timed here on "cpu" or "cuda", as a sentence; None if it can."""
        if device != "cpu" and not self.on_gpus:
            return f"{self.label} is timed on CPUs only"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{self.label} is not installed here: `pip install {' '.join(missing)}`"
        if self.needs_compiler:
            if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
                return f"{self.label} needs a C++ compiler, and there is none on the PATH"
            if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
                return f"{self.label} needs Python's C headers (the package python3-dev), and they are not installed"
        return None


def _torch_call(model: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        with torch.inference_mode():
            y = model(x)
        return y if isinstance(y, torch.Tensor) else next(iter(y))

    return call


def _eager(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    return _torch_call(model, x)


def _eager_nhwc(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    copied = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _torch_call(copied, x.to(memory_format=torch.channels_last))


def _inductor(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    """Inductor with freezing, its setting for inference: weights are constants, packed and laid out once.

    On a GPU with "max-autotune" too, which has CUDA graphs.
    """
    import torch._inductor.config as config
    from torch._inductor import list_mode_options

    options = list_mode_options("max-autotune") if x.is_cuda else None
    call = _torch_call(torch.compile(copy.deepcopy(model), backend="inductor", options=options), x)
    with config.patch(freezing=True):
        call()
    return call


def exported(kind: str, model: nn.Module, x: torch.Tensor, folder: Path, export: Callable[[Path], None]) -> Path:
    """A folder in `folder` with what `export` writes there for this model and these sizes, made if it is missing."""
    digest = hashlib.sha256(f"{kind} {tuple(x.shape)} {model}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    path = folder / f"{kind}-{digest.hexdigest()[:16]}"
    if not path.exists():
        made = Path(tempfile.mkdtemp(dir=folder))
        export(made)
        made.rename(path)
    return path


def onnx_file(model: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    def export(made: Path) -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (x,),
                made / "model.onnx",
                dynamo=True,
                external_data=False,
                input_names=["x"],
                output_names=["y"],
                verbose=False,
            )

    return exported("onnx", model, x, folder, export) / "model.onnx"


def _onnxruntime(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    """All graph optimisations, as many intra-op threads as torch has, spinning as it does by default."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        onnx_file(model, x, folder), sess_options=options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    """The latency hint, float32 (it turns to bfloat16 by itself on machines with AMX), as many threads as torch."""
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(core.read_model(onnx_file(model, x, folder)), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def call() -> torch.Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def _ncnn(model: nn.Module, x: torch.Tensor, folder: Path) -> Call:
    """ncnn through pnnx, float32 throughout: its half-precision storage and arithmetic are switched off.

    Packed layout, Winograd and SGEMM are on by default. It takes one image at a time. Of a batch each thread takes
    its share, image by image: on two cores of an AMD EPYC that is 0 to 11 % faster than both on each image in turn.
    """
    ncnn = importlib.import_module("ncnn")
    threads = torch.get_num_threads()
    workers = math.gcd(threads, len(x))

    def export(made: Path) -> None:
        traced = torch.jit.trace(model, x[:1], check_trace=False)  # type: ignore[no-untyped-call]
        traced.save(str(made / "model.pt"))
        sizes = ",".join(map(str, x[:1].shape))
        # The program, since `pnnx.convert` goes on to load the network into torch again, which takes longer.
        command = [importlib.import_module("pnnx").EXEC_PATH, "model.pt", f"inputshape=[{sizes}]", "fp16=0"]
        subprocess.run(command, cwd=made, check=True, capture_output=True)
        for path in made.iterdir():
            if not path.name.startswith("model.ncnn"):
                path.unlink()

    made = exported("ncnn", model, x[:1], folder, export)
    net = ncnn.Net()
    net.opt.num_threads = threads // workers
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, name, False)
    if net.load_param(str(made / "model.ncnn.param")) or net.load_model(str(made / "model.ncnn.bin")):
        raise RuntimeError("it does not load what pnnx wrote")
    images = [ncnn.Mat(image.numpy()) for image in x]

    def run(image: Any) -> torch.Tensor:
        with net.create_extractor() as extractor:
            extractor.input("in0", image)
            return torch.from_numpy(extractor.extract("out0")[1].numpy())

    if workers == 1:
        return lambda: torch.stack([run(image) for image in images])
    pool = ThreadPoolExecutor(workers)
    return lambda: torch.stack(list(pool.map(run, images)))


def _convselect(model: nn.Module, x: torch.Tensor, folder: Path, **options: Any) -> Call:
    import convselect

    call = _torch_call(convselect.compile(copy.deepcopy(model), **options), x)
    call()
    return call


PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", "eager", _eager, on_gpus=True),
        Peer("eager_nhwc", "eager, channels_last", _eager_nhwc, on_gpus=True),
        Peer("inductor", "Inductor, freezing", _inductor, needs_compiler=True, on_gpus=True),
        Peer("onnxruntime", "ONNX Runtime", _onnxruntime, ("onnx", "onnxscript", "onnxruntime")),
        Peer("openvino", "OpenVINO f32", _openvino, ("onnx", "onnxscript", "openvino")),
        Peer("ncnn", "ncnn f32", _ncnn, ("ncnn", "pnnx")),
    )
}


def convselect_peer(**options: Any) -> Peer:
    """Ourselves, with these options of `convselect.compile`."""
    return Peer("convselect", "convselect", functools.partial(_convselect, **options), on_gpus=True)
