"""The choice of `auto` and its reason, and the engines that a GPU refuses, as far as a machine without a GPU can test them."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import balcony_edge
from balcony_edge.bundle.bundle import Bundle
from balcony_edge.bundle.manifest import EngineSet, EngineSpec, FileSpec, GraphSpec, TensorSpec
from balcony_edge.cli.device.doctor import engine_facts
from balcony_edge.device.machine import Gpu, this_device
from balcony_edge.errors import BundleError, ContextLengthError, DeviceError, InputError, MissingDependencyError
from balcony_export.tensorrt.graphs import Format
from balcony_runtime.backends import choose as choose_module
from balcony_runtime.backends.accelerator import cuda, tensorrt
from balcony_runtime.backends.accelerator import onnxruntime as onnxruntime_device
from balcony_runtime.backends.accelerator.cuda import check
from balcony_runtime.backends.accelerator.device import Region
from balcony_runtime.backends.accelerator.onnxruntime import PROVIDERS, OnnxRuntimeExecutor
from balcony_runtime.backends.accelerator.tensorrt_builder import import_tensorrt
from balcony_runtime.backends.choose import choose
from balcony_runtime.backends.onnxruntime.backend import open_session
from balcony_runtime.backends.webgpu import adapters as adapters_module
from balcony_runtime.backends.webgpu import provider
from balcony_runtime.backends.webgpu.adapters import Adapter
from tests.support.command import printed
from tests.support.engine_sets import write_graphs

GRAPH = GraphSpec(
    file="norm.onnx", inputs=(TensorSpec(name="hidden", dtype="float16", shape=("batch", "queries", 8)),),
    outputs=(), parameters=8, weight_bytes=16,
)  # fmt: skip

SOFTWARE = Adapter("llvmpipe", "CPU", half=True)
CARD = Adapter("a card", "discrete GPU", half=False)
MACHINE = "1f" * 16


def engine_set(**changes: Any) -> EngineSet:
    options: dict[str, Any] = {
        "target": "rtx",
        "precision": "fp16",
        "operators": "fused",
        "context_length": 64,
        "batch_size": 1,
        "graphs": {"norm": GRAPH},
        "engines": {"norm": EngineSpec(file="norm.engine", layers=3)},
        "builder": "tensorrt_rtx 1.7",
        "compute_capabilities": ("86", "89"),
        "files": {"norm.engine": FileSpec(bytes=1, sha256="0" * 64)},
    }
    engines = EngineSet(**{**options, **changes})
    return engines.model_copy(update={"built_on": engines.mark(MACHINE)})


def test_engines_that_do_not_fit_are_refused_with_the_cure() -> None:
    refuse, here = tensorrt._refuse_misfits, Path("b/tensorrt/rtx-fp16")
    refuse(here, engine_set(), "tensorrt_rtx 1.7", "89")
    refuse(here, engine_set(compute_capabilities=()), "tensorrt_rtx 1.7", "120")
    for engines, version, capability, message in (
        (  # without its options `build` would make another set, and on a Jetson ask for TensorRT-RTX
            engine_set(engines={}, target="tensorrt", precision="int4", operators="plain"),
            "tensorrt 10.13",
            "87",
            "has graphs but no engines: build them with `balcony-edge build BUNDLE --target tensorrt --precision int4 "
            "--operators plain`",
        ),
        (
            engine_set(),
            "tensorrt_rtx 1.8",
            "89",
            "built by tensorrt_rtx 1.7, but this machine has tensorrt_rtx 1.8: build again with `balcony-edge build BUNDLE "
            "--target rtx --precision fp16 --sm 86,89`",
        ),
        (  # built again with its own options, it would be refused on this GPU
            engine_set(),
            "tensorrt_rtx 1.8",
            "120",
            "built for compute capability 86, 89, but this GPU has 120: build with `balcony-edge build BUNDLE --target rtx "
            "--precision fp16 --sm 120`",
        ),
        (  # it is built for all GPUs that TensorRT-RTX takes without being told
            engine_set(compute_capabilities=()),
            "tensorrt_rtx 1.8",
            "89",
            "build again with `balcony-edge build BUNDLE --target rtx --precision fp16`",
        ),
        (
            engine_set(),
            "tensorrt_rtx 1.7",
            "87",
            r"built for compute capability 86, 89, but this GPU has 87: build with --target tensorrt",
        ),
        (  # without --sm TensorRT-RTX leaves 7.5 out, and fp8 needs 8.9
            engine_set(compute_capabilities=()),
            "tensorrt_rtx 1.7",
            "75",
            "built for compute capability 86, 89, 120, 121, but this GPU has 75: build with `balcony-edge build BUNDLE "
            "--target rtx --precision fp16 --sm 75`, or",
        ),
        (
            engine_set(compute_capabilities=(), precision="fp8"),
            "tensorrt_rtx 1.7",
            "86",
            "built for compute capability 89, 120, 121, but this GPU has 86: build with another --precision",
        ),
    ):
        with pytest.raises(BundleError, match=message):
            refuse(here, engines, version, capability)


def test_a_pass_takes_the_first_profile_that_holds_it() -> None:
    class Engine:
        num_optimization_profiles = 3

    def profile(rows: int) -> int:
        return tensorrt._profile_for("hidden", {"hidden": Region(0, (1, rows, 8), "float16")}, Engine())

    assert [profile(rows) for rows in (1, 8, 9, 64, 65, 512)] == [0, 0, 1, 1, 2, 2]


def test_auto_says_why(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "machine_id", lambda: MACHINE)
    manifest = Bundle.open(tiny.path).manifest
    assert choose(manifest)[:2] == ("cpu", None) and "no graphs for GPUs" in choose(manifest).reason
    here = engine_set(builder=f"tensorrt_rtx {import_tensorrt('rtx').__version__}")
    built = manifest.model_copy(update={"engines": {"rtx-fp16": here, "graphs": engine_set(engines={})}})
    try:
        cuda.compute_capability()
    except DeviceError as error:
        card = Gpu(name="RTX", driver="550", memory_bytes=2**33)
        for gpus in (
            (),
            (card,),
        ):  # NVML lists those that the tests hide; with one: a driver too old, or no cuda-python
            device = this_device().model_copy(update={"gpus": gpus})
            with monkeypatch.context() as patch:
                patch.setattr(choose_module, "this_device", lambda device=device: device)
                assert choose(built) == ("cpu", None, str(error), bool(gpus))
    for capability, wanted, reason in (
        ("89", ("tensorrt", "rtx-fp16"), "engines for this GPU"),
        (
            "87",
            ("cpu", None),
            "no engines for compute capability 87 and the TensorRT that is installed, and ONNX Runtime has",
        ),
    ):
        monkeypatch.setattr(cuda, "compute_capability", lambda capability=capability: capability)
        choice = choose(built)
        assert choice[:2] == wanted and reason in choice.reason and choice.unfit == (wanted[0] == "cpu")
    monkeypatch.setattr(cuda, "compute_capability", lambda: "89")
    assert choose(built, "graphs").device == "cpu", "the graphs that are named, and not another set's engines"
    other = manifest.model_copy(update={"engines": {"a": engine_set(builder="tensorrt_rtx 0.1")}})
    assert choose(other, "a").device == "tensorrt", "opening it says that it must be built again"
    for changes in ({"builder": "tensorrt_rtx 0.1"}, {"target": "tensorrt", "builder": "tensorrt 10.0"}):
        assert choose(manifest.model_copy(update={"engines": {"a": engine_set(**changes)}})).device == "cpu"
    anywhere = manifest.model_copy(update={"engines": {"a": here.model_copy(update={"compute_capabilities": ()})}})
    assert choose(anywhere).device == "tensorrt"
    monkeypatch.setattr(cuda, "compute_capability", lambda: "90")
    assert choose(anywhere).device == "cpu", "TensorRT-RTX knows no H100"
    monkeypatch.setattr(cuda, "compute_capability", lambda: "75")
    assert choose(anywhere).device == "cpu", "7.5 must be named"


@pytest.mark.parametrize("machine", ["2e" * 16, None])
def test_auto_runs_no_engines_of_another_machine(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, machine: str | None
) -> None:
    """Engines are programs: those that came with the bundle must be named."""
    monkeypatch.setattr(cuda, "compute_capability", lambda: "89")
    monkeypatch.setattr(choose_module, "machine_id", lambda: MACHINE)
    here = engine_set(builder=f"tensorrt_rtx {import_tensorrt('rtx').__version__}")
    manifest = Bundle.open(tiny.path).manifest.model_copy(update={"engines": {"a": here}})
    assert choose(manifest).device == "tensorrt"
    forged = {"norm.engine": FileSpec(bytes=1, sha256="1" * 64)}
    changed = manifest.model_copy(update={"engines": {"a": here.model_copy(update={"files": forged})}})
    assert choose(changed).device == "cpu", "a mark is of these engines only"
    monkeypatch.setattr(choose_module, "machine_id", lambda: machine)
    choice = choose(manifest)
    assert choice[:2] == ("cpu", None) and choice.unfit
    assert "the engines of a were not built on this machine" in choice.reason and "--engines a" in choice.reason
    assert choose(manifest, "a").device == "tensorrt"
    unmarked = manifest.model_copy(update={"engines": {"a": here.model_copy(update={"built_on": ""})}})
    assert choose(unmarked).device == "cpu"
    onnxruntime = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(choose_module, "checked_onnxruntime", lambda: onnxruntime)
    assert choose(manifest)[:2] == ("cuda", "a") and choose(manifest).unfit, "and a warning says why"


@pytest.mark.parametrize(("machine", "named"), [(MACHINE, False), (None, True)])
def test_doctor_says_which_engines_auto_takes(
    monkeypatch: pytest.MonkeyPatch, machine: str | None, named: bool
) -> None:
    """None in a container without an identifier, even if it built them."""
    monkeypatch.setattr(cuda, "compute_capability", lambda: "89")
    monkeypatch.setattr("balcony_edge.device.machine.machine_id", lambda: machine)
    (facts,) = [facts for facts in engine_facts() if facts["engine"] == "cuda"]
    assert "takes engines that this machine built for it" in facts["note"]
    assert ("name a set with --engines" in facts["note"]) == named


def test_auto_says_that_no_engines_fit_without_onnxruntime(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With [tensorrt] alone, after an update of TensorRT: it would not run the engines with ONNX Runtime either."""

    def absent() -> None:
        raise MissingDependencyError("ONNX Runtime is not installed: pip install it")

    old = {"a": engine_set(builder="tensorrt_rtx 0.1")}
    manifest = Bundle.open(tiny.path).manifest.model_copy(update={"engines": old})
    monkeypatch.setattr(cuda, "compute_capability", lambda: "89")
    monkeypatch.setattr(choose_module, "checked_onnxruntime", absent)
    with pytest.raises(MissingDependencyError, match=r"no engines for compute capability 89 .*; ONNX Runtime is not"):
        choose(manifest)

    def too_old() -> str:
        raise DeviceError("CUDA: the driver is too old: update the driver")

    card = this_device().model_copy(update={"gpus": (Gpu(name="RTX", driver="550", memory_bytes=2**33),)})
    monkeypatch.setattr(cuda, "compute_capability", too_old)
    monkeypatch.setattr(choose_module, "this_device", lambda: card)
    monkeypatch.setattr(provider, "checked_onnxruntime", absent)
    with pytest.raises(MissingDependencyError, match=r"^CUDA: .*: update the driver; ONNX Runtime is not installed"):
        choose(manifest)


def test_auto_takes_a_gpu_and_no_software(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Bundle.open(tiny.path).manifest
    found = provider.Provider(("x",), (), [SOFTWARE, CARD])
    monkeypatch.setattr(provider, "_NODES", Path("nowhere"))
    monkeypatch.setattr(provider, "is_installed", lambda: True)
    monkeypatch.setattr(provider, "find_provider", lambda: found)
    assert choose(manifest)[:3] == ("webgpu", None, "ONNX Runtime has WebGPU, and there is a GPU: a card")
    found.adapters.remove(CARD)
    assert choose(manifest)[:3] == ("cpu", None, "WebGPU has no GPU here, only llvmpipe")
    unfit = choose_module.Choice("cpu", None, "no engines for compute capability 87", unfit=True)
    monkeypatch.setattr(choose_module, "_on_nvidia", lambda *_: unfit)
    both = "no engines for compute capability 87; WebGPU has no GPU here, only llvmpipe"
    assert choose(manifest) == ("cpu", None, both, True), "why neither GPU path runs"
    portable = Bundle.open(tiny.path).portable().manifest
    assert choose(portable).device == "cpu"


def test_auto_takes_the_gpu_of_a_system_that_lists_none(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows: Metal and Direct3D 12, without Vulkan's list."""
    monkeypatch.setattr(provider, "is_installed", lambda: True)
    monkeypatch.setattr(provider, "find_provider", lambda: provider.Provider(("x",), (), None))
    monkeypatch.setattr(adapters_module, "adapters", lambda: None)
    device, _, reason, _ = choose(Bundle.open(tiny.path).manifest)
    assert (device, reason) == (
        "webgpu",
        "ONNX Runtime has WebGPU, and there is a GPU: this system's, which nothing names",
    )
    (facts,) = [facts for facts in engine_facts() if facts["engine"] == "webgpu"]
    assert (facts["adapters"], facts["used"]) == ([], provider.NAME)
    assert facts["note"] == (
        "no list of adapters on this system: bundles run on it with --device webgpu; --device auto takes the faster one of it "
        "and the CPU"
    )


def test_engine_sets_are_named_where_there_are_several(tiny: Any, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "b"))
    with pytest.raises(BundleError, match="has no engine set for cuda: make one with `balcony-edge build`"):
        balcony_edge.load(path, device="cuda")
    for name in ("one", "two"):
        write_graphs(Bundle.open(path), name, "rtx", Format("fp16", "fused", 64))
    with pytest.raises(BundleError, match="has engine sets one, two: name one with --engines"):
        balcony_edge.load(path, device="cuda")
    with pytest.raises(InputError, match="packed weights are for the CPU"):
        balcony_edge.load(path, device="cpu", engines="one", packed=tmp_path / "packed")
    with balcony_edge.load(path, device="cpu", engines="two") as llm:
        reply = llm.generate("the fox", max_new_tokens=4, ignore_eos=True)
        assert len(reply.tokens) == 4 and llm.engine.backend.max_length == 64
        scored = llm.generate("the fox", max_new_tokens=4, ignore_eos=True, logprobs=1)
        assert [token.id for token in scored.tokens] == [token.id for token in reply.tokens]
        assert all(token.logprob is not None for token in scored.tokens)


def test_a_build_without_the_provider_is_refused_and_not_run_on_the_cpu(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "b"))
    write_graphs(Bundle.open(path), "one", "rtx", Format("fp16", "fused", 64))
    directory = path / "tensorrt" / "one"
    with pytest.raises(
        DeviceError,
        match=r"--device cuda: this build of ONNX Runtime has no CUDAExecutionProvider.*balcony-edge\[gpu\]",
    ):
        OnnxRuntimeExecutor(directory, {"norm": "norm.onnx"}, "cuda", {})
    # The provider is listed but does not start: ONNX Runtime then uses the CPU, with a warning.
    monkeypatch.setitem(PROVIDERS, "cuda", ("AzureExecutionProvider", "cpu"))
    monkeypatch.setattr(onnxruntime_device, "open_session", lambda path, **_: open_session(path))
    with pytest.raises(DeviceError, match="norm: ONNX Runtime could not start AzureExecutionProvider"):
        OnnxRuntimeExecutor(directory, {"norm": "norm.onnx"}, "cuda", {})


def test_auto_runs_on_the_cpu_where_cuda_does_not_start(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "b"))
    write_graphs(Bundle.open(path), "one", "rtx", Format("fp32", "fused", 64))
    bundle = Bundle.open(path)
    monkeypatch.setattr(
        choose_module, "choose", lambda *_: choose_module.Choice("cuda", "one", "ONNX Runtime has CUDA")
    )
    monkeypatch.setitem(PROVIDERS, "cuda", ("AzureExecutionProvider", "cpu"))
    with contextlib.closing(choose_module.open_backend(bundle, "auto")) as backend:
        assert backend.name == "onnxruntime" and "runs on the CPU" in caplog.text
    with pytest.raises(DeviceError):
        choose_module.open_backend(bundle, "auto", "one")


def test_cuda_errors_are_one_line_with_a_cure() -> None:
    errors = cuda.cudart.cudaError_t
    assert check((errors.cudaSuccess, 7)) == 7 and check((errors.cudaSuccess, 1, 2)) == (1, 2)
    for code, cure in (
        (errors.cudaErrorMemoryAllocation, "out of memory .*build the engine set with a smaller --context-length"),
        (errors.cudaErrorNoDevice, "no CUDA-capable device .*: install NVIDIA's driver"),
        (errors.cudaErrorLaunchFailure, "this process can no longer use the GPU"),
        (errors.cudaErrorContained, "this process can no longer use the GPU"),  # of an H100: an error of its memory
        (errors.cudaErrorTensorMemoryLeak, "this process can no longer use the GPU"),
        (errors.cudaErrorInvalidValue, "nvidia-smi"),
    ):
        with pytest.raises(DeviceError, match=cure) as caught:
            check((code, None))
        assert "\n" not in str(caught.value)


class CompiledKernels:
    """The part of TensorRT-RTX's cache that needs no GPU: bytes in, bytes out."""

    def __init__(self) -> None:
        self.blob = b""

    def deserialize(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob


class OneEngine:
    """Returns configurations as an engine does, and keeps the last."""

    def create_runtime_config(self) -> OneEngine:
        return self

    def set_execution_context_allocation_strategy(self, strategy: object) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> CompiledKernels:
        return CompiledKernels()

    def set_runtime_cache(self, cache: CompiledKernels) -> None:
        self.cache = cache


def test_compiled_kernels_are_kept_next_to_the_engines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, first, second = tmp_path / "kernels-89.cache", OneEngine(), OneEngine()
    kernels = tensorrt._KernelCache(path)
    kernels.save()
    assert not path.exists()  # nothing was compiled
    kernels.config_for(first, "managed by us")
    kernels.config_for(second, "managed by us")
    assert first.cache is second.cache and first.strategy == "managed by us"
    kernels.save()
    assert not path.exists()  # still nothing was compiled
    first.cache.blob = b"compiled"
    kernels.save()
    assert path.read_bytes() == b"compiled" and list(tmp_path.iterdir()) == [path]
    gone = tensorrt._KernelCache(tmp_path / "replaced" / "kernels.cache")
    gone.config_for(OneEngine(), None)
    gone._cache.blob = b"of a set that another one has replaced"
    gone.save()
    assert list(tmp_path.iterdir()) == [path]

    again = tensorrt._KernelCache(path)
    again.config_for(first, None)
    assert first.cache.blob == b"compiled"
    first.cache.blob = b"more"
    (tmp_path / "file").write_text("not a directory")
    blocked = tensorrt._KernelCache(tmp_path / "file" / "kernels.cache")
    blocked.config_for(first, None)
    first.cache.blob = b"more"
    blocked.save()
    assert "cannot be written (File exists): make it writable to keep compiled kernels" in caplog.text


@pytest.mark.parametrize(
    ("features", "precision", "told"),
    [
        (
            "fpu sse2 sse4_2",
            "int4,head=4",
            "has no AVX2, so .* int4 and int8 weights .* --precision fp32",
        ),  # a Celeron J4125, x86-64-v2-AES
        ("fpu sse2 sse4_2 avx avx2", "int4", None),
        # a Cortex-A72
        ("fp asimd crc32", "int4", "has no dot products of int8, so .* 8-bit weights .* --precision int4,head=4"),
        ("fp asimd crc32", "int4,head=4", None),
        ("fp asimd asimddp", "int4", None),
        ("", "int4", None),  # without procfs
    ],
)
def test_a_cpu_on_which_weights_are_unpacked_at_every_token_is_told(
    features: str,
    precision: str,
    told: str | None,
    with_precision: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choose_module, "cpu_features", lambda: frozenset(features.split()))
    choose_module.open_backend(Bundle.open(with_precision("llama", precision)), "cpu").close()
    assert [bool(re.search(told or "unpacks", line)) for line in caplog.messages] == ([] if told is None else [True])


def test_an_engine_names_the_threads_that_run_it(tiny: Any) -> None:
    """The first engine of a process decides, and a device profile is compared with what runs."""
    program = (
        "import sys\n"
        "from balcony_runtime.engine import Engine\n"
        "for threads in (2, 1):\n"
        "    with Engine.open(sys.argv[1], threads=threads, device='cpu') as engine:\n"
        "        print(engine.backend.threads)\n"
    )
    assert printed(program, tiny.path) == "2\n2\n"


def test_a_set_that_is_named_runs_or_is_refused(with_engine_sets: Callable[[str], Bundle]) -> None:
    """Its graphs are for a GPU, and slow on the CPU."""
    path = with_engine_sets("llama").path
    with pytest.raises(
        DeviceError, match=r"engine set rtx-fp32 cannot run: .*run its graphs on the CPU with --device cpu"
    ):
        balcony_edge.load(path, engines="rtx-fp32")
    with pytest.raises(BundleError, match="has no engine set rtx-fp61"):
        balcony_edge.load(path, engines="rtx-fp61")


@pytest.mark.parametrize("engines", [None, "rtx-fp32"])
def test_a_device_of_another_name_is_one_line(with_engine_sets: Callable[[str], Bundle], engines: str | None) -> None:
    device: Any = "gpu"
    with pytest.raises(DeviceError, match=r"^device = 'gpu': must be one of auto, cpu, cuda, tensorrt, webgpu: give"):
        balcony_edge.load(with_engine_sets("llama").path, device=device, engines=engines)


def test_a_prompt_that_is_too_long_for_the_caches_of_an_engine_set_says_what_to_build(engine_sets: Bundle) -> None:
    """To export again with a longer context would not help: `build` decides how long these caches are."""
    write_graphs(engine_sets, "short", "rtx", Format("fp32", "fused", 64))
    with balcony_edge.load(engine_sets.path, device="cpu", engines="short") as llm:
        assert llm.engine.max_length == 64
        with pytest.raises(
            ContextLengthError, match=r"\(64 in this engine set\): shorten the prompt, or build its engine set with"
        ):
            llm.generate([1] * 64)
