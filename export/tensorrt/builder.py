"""Build a TensorRT plan from ONNX, with the calls that TensorRT 10 and 11 have in common.

Imports only the standard library and, when it builds, `tensorrt`: `to_tensorrt.py --script` copies this file, as
`build_engine.py`, for machines that have only a GPU container. There it builds the request in the same folder, and
keeps the plan if its vectors are the stored reference's (`prove_plan.py`, which needs numpy):

    python build_engine.py [FOLDER]

Networks are strongly typed, so a plan computes in the types of the ONNX file. No precision flag is set: TensorRT 11 has
none, and TensorRT 10 ignores them in a strongly typed network.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
REQUEST_FILE = "request.json"
GIB = 1 << 30

SAMPLES_FILE = "samples.npz"
PROOF_MODULE = "prove_plan"

Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""The smallest, usual and largest shape of each input."""

OnProgress = Callable[[str], None]
"""Called with each line of progress."""

Prove = Callable[[Any, Any], tuple[float, float]]
"""Compute an engine's worst cosine and its floor, from the module `tensorrt` and the engine."""

HARDWARE = {
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
"""Members of `HardwareCompatibilityLevel`. All except "none" cost speed."""

FUSED_ATTENTION = ("_mha", "mha_", "fused_attention", "fmha")
"""Parts of the names of layers and tactics that compute attention in one kernel."""


class BuildError(Exception):
    """A plan cannot be built on this machine; the message states the reason and a remedy."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build. Paths are relative to the request's folder."""

    onnx: str  # external weights are in the same folder
    onnx_sha256: str
    plan: str  # the file to write; the sidecar is `<plan>.json`
    precision: str  # the graph's
    layout: str
    profiles: tuple[Profile, ...]  # in the engine's order
    level: int = 3  # 0 (quickest build) to 5 (all tactics; hours for large models)
    workspace_gib: float | None = None  # maximum GPU memory for scratch; None for all
    version_compatible: bool = False  # the plan also loads in newer TensorRT versions; costs speed
    hardware: str = "none"  # a key of `HARDWARE`
    timing_cache: str | None = None  # a file of kernel timings to read and extend

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise BuildError(f"level is {self.level}: it must be 0 to 5")
        if self.hardware not in HARDWARE:
            raise BuildError(f"hardware is {self.hardware!r}: choose {', '.join(HARDWARE)}")
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise BuildError(f"workspace_gib is {self.workspace_gib}: it must be positive")


def build(
    request: BuildRequest,
    folder: Path,
    *,
    on_progress: OnProgress = lambda _: None,
    prove: Prove | None = None,
) -> dict[str, Any]:
    """Build a plan. The plan, its sidecar, its inspector report and the timing cache are written only on success.

    Args:
        request: what to build.
        folder: the folder to which the request's paths are relative.
        on_progress: called with each line of progress.
        prove: returns an engine's worst cosine to the reference and its floor; None to leave the proof to the caller.

    Returns:
        The sidecar's content.

    Raises:
        BuildError: there is no GPU or no tensorrt, the graph cannot be built, or the engine's vectors are not the
            reference's.
    """
    onnx, plan = folder / request.onnx, folder / request.plan
    if not onnx.is_file() or _sha256(onnx.read_bytes()) != request.onnx_sha256:
        raise BuildError(f"{onnx} is missing, or is not the file that the request was written for: copy it again")
    trt = _tensorrt()
    name, capability = this_gpu()
    on_progress(f"TensorRT {trt.__version__} on {name}, {len(request.profiles)} profiles")
    began = time.perf_counter()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, logger, network, onnx)
    config = _configure(trt, builder, request)
    _add_profiles(builder, config, network, request.profiles)
    cache = _timing_cache(config, request, folder)
    if not builder.is_network_supported(network, config):
        raise BuildError(f"TensorRT cannot build {onnx.name} with these settings; its messages are above")
    on_progress("building")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"TensorRT failed to build an engine from {onnx.name}; its messages are above")
    content = bytes(serialized)
    engine = trt.Runtime(logger).deserialize_cuda_engine(content)
    if engine is None:
        raise BuildError("TensorRT cannot load the engine that it built; its messages are above")
    cosine = None if prove is None else _check_vectors(trt, engine, prove, on_progress)
    layers = _inspect(trt, engine)
    sidecar = {
        "format_version": FORMAT_VERSION,
        "tensorrt": str(trt.__version__),
        "gpu": name,
        "compute_capability": capability,
        "platform": f"{platform.system()} {platform.machine()}",
        "precision": request.precision,
        "layout": request.layout,
        "onnx": Path(request.onnx).name,
        "onnx_sha256": request.onnx_sha256,
        "plan_sha256": _sha256(content),
        "inputs": _tensors(trt, engine, trt.TensorIOMode.INPUT),
        "outputs": _tensors(trt, engine, trt.TensorIOMode.OUTPUT),
        "profiles": [{name: [list(s) for s in shapes] for name, shapes in p.items()} for p in request.profiles],
        "level": request.level,
        "workspace_gib": request.workspace_gib,
        "version_compatible": request.version_compatible,
        "hardware": request.hardware,
        "layers": len(layers),
        "fused_attention": sum(any(part in layer.lower() for part in FUSED_ATTENTION) for layer in layers),
        "min_cosine": cosine,
        "build_s": round(time.perf_counter() - began, 1),
    }
    if engine.num_optimization_profiles != len(request.profiles):
        raise BuildError(
            f"the engine has {engine.num_optimization_profiles} profiles, but {len(request.profiles)} were requested"
        )
    plan.parent.mkdir(parents=True, exist_ok=True)
    if cache is not None and request.timing_cache is not None:
        _write(folder / request.timing_cache, bytes(cache.serialize()))
    _write(plan.with_name(f"{plan.name}.layers.json"), json.dumps(layers, indent=1).encode())
    _write(plan, content)
    _write(plan.with_name(f"{plan.name}.json"), (json.dumps(sidecar, indent=2) + "\n").encode())
    return sidecar


def write_request(request: BuildRequest, path: Path) -> None:
    """Write a request as JSON."""
    path.write_text(json.dumps(asdict(request), indent=2) + "\n", encoding="utf-8")


def read_request(path: Path) -> BuildRequest:
    """Read what `write_request` wrote.

    Raises:
        BuildError: the file is missing or not a build request.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["profiles"] = tuple(
            {name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()}
            for profile in data["profiles"]
        )
        return BuildRequest(**data)
    except BuildError as error:
        raise BuildError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BuildError(
            f"{path} is not a build request: {error}. Write it again with to_tensorrt.py --script"
        ) from error


def trtexec_line(request: BuildRequest) -> str:
    """Return the command that builds the same engine with TensorRT's own tool, which writes no sidecar."""
    words = ["trtexec", f"--onnx={request.onnx}", f"--saveEngine={request.plan}", "--stronglyTyped"]
    for index, profile in enumerate(request.profiles):
        words += [f"--profile={index}"] if len(request.profiles) > 1 else []
        for option, which in (("--minShapes", 0), ("--optShapes", 1), ("--maxShapes", 2)):
            shapes = (f"{name}:{'x'.join(map(str, shapes[which]))}" for name, shapes in profile.items())
            words.append(f"{option}={','.join(shapes)}")
    words += [f"--builderOptimizationLevel={request.level}", "--profilingVerbosity=detailed", "--noTF32"]
    if request.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{request.workspace_gib * 1024:g}M")
    if request.version_compatible:
        words.append("--versionCompatible")
    if request.hardware != "none":
        level = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}[request.hardware]
        words.append(f"--hardwareCompatibilityLevel={level}")
    if request.timing_cache is not None:
        words.append(f"--timingCacheFile={request.timing_cache}")
    return shlex.join(words)


def this_gpu() -> tuple[str, str]:
    """Return name and compute capability, such as "8.9", of the first GPU that this process may use."""
    # As `mirror_runtime.gpu` asks, which a copy of this file in a GPU container does not have.
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BuildError(
            "no NVIDIA driver (libcuda.so.1) on this machine: a plan must be built on the machine with the GPU that "
            "runs it; write a build folder for that machine with --script"
        ) from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    ):
        raise BuildError("the NVIDIA driver shows no GPU to this process: see nvidia-smi and CUDA_VISIBLE_DEVICES")
    return name.value.decode(), f"{major.value}.{minor.value}"


def _tensorrt() -> Any:
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise BuildError(f"tensorrt cannot be imported: {error}. pip install 'tensorrt>=10'") from error
    if int(trt.__version__.split(".")[0]) < 10:
        raise BuildError(f"TensorRT {trt.__version__} is too old: 10 or newer is needed")
    return trt


def _parse(trt: Any, logger: Any, network: Any, onnx: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors[:5])
    raise BuildError(f"TensorRT cannot parse {onnx.name} ({len(errors)} errors): {lines}")


def _configure(trt: Any, builder: Any, request: BuildRequest) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = request.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Whatever is fp32 in the graph (all of it, or the head) must stay fp32: TF32, on by default, keeps only 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request.workspace_gib * GIB))
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.hardware != "none":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[request.hardware])
    return config


def _add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Profile]) -> None:
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    for index, shapes in enumerate(profiles):
        if sorted(shapes) != sorted(names):
            raise BuildError(f"profile {index} has {', '.join(shapes)}; the network's inputs are {', '.join(names)}")
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses profile {index}: {dict(shapes)}")


def _timing_cache(config: Any, request: BuildRequest, folder: Path) -> Any | None:
    if request.timing_cache is None:
        return None
    path = folder / request.timing_cache
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    # Never ignore mismatches: timings of another GPU select kernels that may be slow or wrong here.
    if not config.set_timing_cache(cache, False):
        raise BuildError(f"{path} is a timing cache of another GPU or TensorRT version: use another file")
    return cache


def _check_vectors(trt: Any, engine: Any, prove: Prove, on_progress: OnProgress) -> float:
    """Return the engine's worst cosine to the reference, or raise where it is below the floor."""
    on_progress("comparing with the reference")
    try:
        worst, floor = prove(trt, engine)
    except RuntimeError as error:
        raise BuildError(f"the engine cannot be proven: {error}") from error
    if not worst >= floor:  # also true of NaN
        raise BuildError(
            f"the engine's worst cosine to the reference is {worst:.6f}, below {floor}: the plan is not kept. "
            "Try another precision, or --level 2"
        )
    return worst


def _inspect(trt: Any, engine: Any) -> list[str]:
    """Return one line of JSON for each layer: its name, tactic and types."""
    inspector = engine.create_engine_inspector()
    return [inspector.get_layer_information(i, trt.LayerInformationFormat.JSON) for i in range(engine.num_layers)]


def _tensors(trt: Any, engine: Any, mode: Any) -> list[dict[str, Any]]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    types = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.UINT8: "uint8",
        trt.DataType.INT8: "int8",
        trt.DataType.BOOL: "bool",
        trt.DataType.BF16: "bfloat16",
    }
    return [
        {
            "name": name,
            "dtype": types[engine.get_tensor_dtype(name)],
            "shape": [int(size) for size in engine.get_tensor_shape(name)],
        }
        for name in names
        if engine.get_tensor_mode(name) == mode
    ]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write to a temporary file and rename it, so that a killed process leaves no incomplete file."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    os.replace(beside, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the request in a folder (default: this file's); return 0 on success, 2 with a message on an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    folder = Path(arguments[0]) if arguments else Path(__file__).resolve().parent

    def print_line(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    def prove(trt: Any, engine: Any) -> tuple[float, float]:
        worst: tuple[float, float] = importlib.import_module(PROOF_MODULE).prove(trt, engine, folder / SAMPLES_FILE)
        return worst

    try:
        request = read_request(folder / REQUEST_FILE)
        sidecar = build(request, folder, on_progress=print_line, prove=prove)
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(sidecar) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
