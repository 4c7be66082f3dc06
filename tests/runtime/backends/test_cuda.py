"""CUDA as a device, over the stand-in: order, memory, captures, errors; and what the real bindings say to the same calls."""

from __future__ import annotations

import gc
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

from balcony_edge.errors import DeviceError
from balcony_runtime.backends.accelerator import cuda
from balcony_runtime.backends.accelerator.cuda import CudaDevice, check, pci_bus_id
from balcony_runtime.backends.accelerator.device import Device, HostDevice, Launch, Region
from tests.runtime.backends.cuda_stand_in.runtime import FUNCTIONS, Runtime

ERRORS = real.cudaError_t


@pytest.fixture
def device(gpu: Runtime) -> Iterator[CudaDevice]:
    device = CudaDevice()
    with device.current():
        yield device
    device.close()


def values(region: Region) -> Any:
    """A region's numbers in place, for kernels."""
    import ctypes

    count = region.nbytes // 4
    return np.frombuffer((ctypes.c_float * count).from_address(region.pointer), np.float32)


def kernel(gpu: Runtime, device: CudaDevice, work: Callable[[], Any], *regions: Region) -> Launch:
    """A launch of a library's kernel that can be captured."""

    def run() -> None:
        code = gpu.launch(device.stream, lambda: (work(), None)[1], regions)
        if int(code):
            raise DeviceError(f"the kernel could not start: {code.name}")

    return Launch(run, lambda: True)


def doubled(region: Region) -> None:
    values(region)[:] *= 2


def no_driver() -> bool:
    return real.cudaGetDeviceCount()[0] == ERRORS.cudaErrorInsufficientDriver


def test_memory_keeps_the_order_of_the_calls(gpu: Runtime, device: CudaDevice) -> None:
    region = device.allocate((2, 3), "float32")
    source = np.arange(6.0).reshape(2, 3)
    device.upload(region, source)
    source[:] = -1  # the copy may still be to come,
    others = [np.full((2, 3), -1, np.float32) for _ in range(20)]  # and so may other arrays in the place of its source
    kernel(gpu, device, lambda: doubled(region), region).run()
    large = device.allocate((70_000,), "float32")  # does not fit the page-locked memory
    device.copy(large.pointer, 24, region.pointer, 12, 12, 2)
    np.testing.assert_array_equal(device.download(region), 2 * np.arange(6.0).reshape(2, 3))
    got = device.download(large)
    np.testing.assert_array_equal(got[:10], [0, 2, 4, 0, 0, 0, 6, 8, 10, 0])
    assert not got[10:].any()
    device.clear(region)
    assert not device.download(region).any()
    halves = device.allocate((2,), "bfloat16")  # NumPy has no bfloat16: its bits
    device.upload(halves, np.array([0x3F80, 0x4000], np.uint16))
    bits = device.download(halves)
    assert (bits.dtype, bits.tolist(), len(others)) == (np.uint16, [0x3F80, 0x4000], 20)
    empty = device.allocate((0,), "int64")
    for held in (region, large, halves, empty, empty):
        device.free(held)
    device.synchronize()
    assert gpu.held_bytes == 0


def test_runs_farther_apart_than_the_largest_pitch_are_copied_one_by_one(
    gpu: Runtime, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """131,072 rows of 8,192 values in float16 are 2 GiB, one byte more than the largest pitch."""
    source, target = device.allocate((4,), "float32"), device.allocate((4,), "float32")
    device.upload(source, np.arange(4.0))
    device.copy(target.pointer, 1 << 31, source.pointer, 16, 16, 1)
    assert device.download(target).tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(cuda, "MAX_PITCH", 15)  # so that several runs fit the memory of the stand-in
    source, target = device.allocate((2, 4), "float32"), device.allocate((2, 8), "float32")
    device.upload(source, np.arange(8.0).reshape(2, 4))
    device.copy(target.pointer, 32, source.pointer, 16, 16, 2)
    assert device.download(target)[:, :4].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert gpu.misuse() == []


@pytest.mark.parametrize("pools", [1, 0])
def test_memory_with_and_without_pools(gpu: Runtime, pools: int) -> None:
    gpu.set(pools=pools)
    device = CudaDevice()
    first, second = device.allocate((8,), "float32"), device.allocate((8,), "float32")
    kernel(gpu, device, lambda: values(first).fill(3), first).run()
    device.copy(second.pointer, 32, first.pointer, 32, 32, 1)
    device.free(first)  # while work that uses it waits
    assert device.download(second).tolist() == [3] * 8
    device.close()
    device.close()
    assert gpu.count("cudaMallocAsync" if pools else "cudaMalloc") == 2
    assert gpu.count("cudaMalloc" if pools else "cudaMallocAsync") == 0


def test_a_captured_step_is_replayed_in_order(gpu: Runtime, device: CudaDevice) -> None:
    a, b = device.allocate((4,), "float32"), device.allocate((4,), "float32")
    first = device.captured(kernel(gpu, device, lambda: doubled(a), a))
    second = device.captured(Launch(lambda: device.copy(b.pointer, 16, a.pointer, 16, 16, 1), lambda: True))
    step, again = device.joined([first, second]), device.joined([second, first])
    device.upload(a, np.ones(4))
    step()
    assert device.download(b).tolist() == [2] * 4 and gpu.count("cudaGraphLaunch") == 1
    again()
    assert (device.download(a).tolist(), device.download(b).tolist()) == ([4] * 4, [2] * 4)
    step()
    assert device.download(b).tolist() == [8] * 4
    assert gpu.count("cudaStreamBeginCapture") == 2 and gpu.count("cudaGraphInstantiate") == 2


def test_what_cannot_be_captured_runs_as_it_is(
    gpu: Runtime, device: CudaDevice, caplog: pytest.LogCaptureFixture
) -> None:
    region = device.allocate((4,), "float32")
    good = device.captured(kernel(gpu, device, lambda: doubled(region), region))
    refuses = kernel(gpu, device, lambda: doubled(region), region)._replace(may_capture=lambda: False)
    assert device.captured(refuses) is refuses

    def waits() -> None:
        device.synchronize()
        refuses.run()

    waiting = Launch(waits, lambda: True)
    assert device.captured(waiting) is waiting
    assert gpu.misuse() == ["cudaStreamSynchronize: the stream captures"]
    # The first error is told, not that of the capture's end.
    assert "cudaErrorStreamCaptureUnsupported" in caplog.text and "without a CUDA graph" in caplog.text

    def hides() -> None:
        gpu.initialise(device.stream)  # the library does not say so
        refuses.run()

    caplog.clear()
    hiding = Launch(hides, lambda: True)
    assert device.captured(hiding) is hiding and "CaptureInvalidated" in caplog.text
    device.upload(region, np.ones(4))
    device.joined([good, refuses, waiting])()
    assert device.download(region).tolist() == [8] * 4
    assert gpu.count("cudaStreamBeginCapture") == gpu.count("cudaStreamEndCapture") == 3
    device.close()
    without = CudaDevice(capture=False)
    assert without.captured(good) is good
    without.close()


def test_graphs_that_cannot_be_parts_of_one_run_one_by_one(
    gpu: Runtime, device: CudaDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """As those with nodes of memory, which CUDA refuses as children."""
    region = device.allocate((4,), "float32")
    parts = [device.captured(kernel(gpu, device, lambda: doubled(region), region)) for _ in range(2)]
    for function in ("cudaGraphAddChildGraphNode", "cudaGraphInstantiate"):
        gpu.fail(function, ERRORS.cudaErrorNotSupported)
        step = device.joined(parts)
        device.upload(region, np.ones(4))
        step()
        assert device.download(region).tolist() == [4] * 4
    assert caplog.text.count("runs as several CUDA graphs, which is slower") == 1, "the same error is told once"


def test_what_a_graph_uses_lives_until_the_graph_is_destroyed(gpu: Runtime, device: CudaDevice) -> None:
    """A context whose kernels are in an executable; Python may collect both in any order."""

    class Context:
        pass

    region, context = device.allocate((4,), "float32"), Context()
    gone = weakref.ref(context)
    plain = kernel(gpu, device, lambda: doubled(region), region)
    step = device.joined([device.captured(Launch(lambda context=context: plain.run(), lambda: True))])
    del context, step
    gc.collect()
    assert gone() is not None, "nothing has destroyed the graph yet"
    device.allocate((4,), "float32")  # the next call that may
    gc.collect()
    assert gone() is None


def test_an_interrupt_ends_the_capture(gpu: Runtime, device: CudaDevice) -> None:
    runs = []

    def interrupted() -> None:
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.captured(Launch(interrupted, lambda: True))
    device.synchronize()  # the stream captures no more
    device.captured(Launch(lambda: None, lambda: True))


def test_graphs_are_destroyed_later_and_not_during_a_capture(gpu: Runtime, device: CudaDevice) -> None:
    region = device.allocate((4,), "float32")
    old = [device.joined([device.captured(kernel(gpu, device, lambda: doubled(region), region))])]
    assert gpu.left().count("program") == 1

    def collects() -> None:
        old.clear()
        gc.collect()
        kernel(gpu, device, lambda: doubled(region), region).run()

    new = device.captured(Launch(collects, lambda: True))
    assert gpu.count("cudaGraphExecDestroy") == 0
    device.free(device.allocate((1,), "int8"))
    assert gpu.count("cudaGraphExecDestroy") == 1 and gpu.count("cudaGraphDestroy") == 2
    assert new.run is not None


def test_the_thread_uses_the_applications_gpu_afterwards(gpu: Runtime) -> None:
    gpu.set(devices=2)
    check(cuda.cudart.cudaSetDevice(1))
    device = CudaDevice()
    assert check(cuda.cudart.cudaGetDevice()) == 1
    with device.current():
        region = device.allocate((4,), "float32")
    assert check(cuda.cudart.cudaGetDevice()) == 1
    failed: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            check(cuda.cudart.cudaSetDevice(1))
            with device.current():  # a kernel of another GPU would be refused
                kernel(gpu, device, lambda: values(region).fill(5), region).run()
                assert device.download(region).tolist() == [5] * 4
            assert check(cuda.cudart.cudaGetDevice()) == 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not failed, failed
    device.close()
    assert check(cuda.cudart.cudaGetDevice()) == 1
    assert pci_bus_id() == "0000:65:00.0"


def test_no_memory_is_one_line_and_leaves_no_error_behind(gpu: Runtime, device: CudaDevice) -> None:
    gpu.set(memory=1000)
    with pytest.raises(DeviceError, match=r"out of memory \(cudaErrorMemoryAllocation\): free memory of the GPU"):
        device.allocate((1000,), "float32")
    # Other libraries ask for the thread's last error after their launches.
    assert cuda.cudart.cudaGetLastError() == (ERRORS.cudaSuccess,)
    device.free(device.allocate((100,), "float32"))
    gpu.fail("cudaMallocHost", ERRORS.cudaErrorMemoryAllocation)
    with pytest.raises(DeviceError, match="out of memory"):
        CudaDevice()
    assert "1 streams" in gpu.left()  # that of the fixture


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"driver": 0}, "driver version is insufficient .*: install NVIDIA's driver, or run on the CPU"),
        (
            {"driver": 12040, "code": "cudaErrorInsufficientDriver"},
            r"the driver supports CUDA 12.4, and cuda-python is for CUDA 1\d.\d: update .* or pip install 'cuda-python==12.\*'",
        ),
        ({"devices": 0}, r"no CUDA-capable device .*: install NVIDIA's driver \(on a Jetson: put this user into"),
    ],
)
def test_a_machine_without_a_usable_gpu(gpu: Runtime, machine: dict[str, Any], message: str) -> None:
    code = machine.pop("code", None)
    gpu.set(**machine)
    if code is not None:
        gpu.fail("cudaGetDeviceCount", getattr(ERRORS, code))
    with pytest.raises(DeviceError, match=message) as caught:
        CudaDevice()
    assert "\n" not in str(caught.value)


def test_after_a_crash_every_call_fails_and_closing_says_nothing(
    gpu: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    device = CudaDevice()
    region = device.allocate((4,), "float32")
    captured = device.captured(kernel(gpu, device, lambda: None, region))
    kernel(gpu, device, lambda: 1 / 0, region).run()
    for call in (device.synchronize, lambda: device.download(region), device.joined, lambda: device.free(region)):
        with pytest.raises(DeviceError, match=r"\(cudaErrorLaunchFailure\): this process can no longer use the GPU"):
            call([captured]) if call == device.joined else call()
    with pytest.raises(DeviceError, match="no longer use"):  # and is not taken for a launch that cannot be captured
        device.captured(Launch(device.synchronize, lambda: True))
    device.close()
    assert "while closing" in caplog.text and isinstance(gpu.error, ZeroDivisionError)
    gpu._c.standInReset()  # the process would end here


def test_every_call_may_fail(gpu: Runtime) -> None:
    """Whichever call of CUDA fails, the error is one line and closing frees the rest."""

    def use(device: CudaDevice) -> None:
        with device.current():
            region = device.allocate((4,), "float32")
            device.upload(region, np.ones(4))
            step = device.joined([device.captured(kernel(gpu, device, lambda: doubled(region), region))])
            step()
            assert device.download(region).tolist() == [4] * 4
            device.free(region)

    device = CudaDevice()
    use(device)
    device.close()
    used = {name: gpu.count(name) for name in FUNCTIONS if gpu.count(name)}
    assert len(used) > 15
    # Closing needs these itself, and tries each once.
    closing = {"cudaGetDevice", "cudaSetDevice", "cudaStreamDestroy", "cudaFreeHost", "cudaFreeAsync"}
    closing |= {"cudaGraphDestroy", "cudaGraphExecDestroy"}
    for name, count in used.items():
        for after in range(count):
            gpu._c.standInReset()
            gpu.fail(name, ERRORS.cudaErrorUnknown, after=after)
            device = None
            try:
                device = CudaDevice()
                use(device)
            except DeviceError as error:
                assert "unknown error" in str(error) and "\n" not in str(error), name
            finally:
                if device is not None:
                    device.close()
            if name not in closing:
                assert gpu.left() == "", (name, after)
    assert not gpu.misuse()
    gpu._c.standInReset()


@pytest.mark.skipif(not no_driver(), reason="a driver is installed: addresses of the stand-in would crash it")
def test_the_real_bindings_take_the_same_calls(gpu: Runtime, device: CudaDevice) -> None:
    """Without a driver each call of the real bindings fails, but only after it has converted its arguments."""
    region = device.allocate((2, 2), "float32")
    device.upload(region, np.ones((2, 2)))
    device.copy(region.pointer, 8, region.pointer, 8, 4, 1)
    step = device.joined([device.captured(kernel(gpu, device, lambda: None, region)) for _ in range(2)])
    step()
    device.download(region)
    pci_bus_id()
    device.free(region)
    del step
    device.close()
    gpu.set(pools=0)
    plain = CudaDevice()
    plain.free(plain.allocate((1,), "int8"))
    plain.close()
    cuda.cudart.cudaDriverGetVersion()
    cuda.cudart.cudaGetLastError()
    assert {name for name, _ in gpu.calls} == set(FUNCTIONS)
    for name, given in gpu.calls:
        result = getattr(real, name)(*given)
        assert isinstance(result[0], ERRORS), name
        assert len(result) == 1 + (FUNCTIONS[name] is not None), name
    for name in FUNCTIONS:
        parameters = inspect.signature(getattr(real, name)).parameters
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()), name


def test_the_stand_in_sees_misuse(gpu: Runtime) -> None:
    """What it is for: each of these would be a crash, a wrong number or a leak on a GPU."""
    rt: Any = gpu
    _, stream = rt.cudaStreamCreateWithFlags(rt.cudaStreamNonBlocking)
    _, block = rt.cudaMallocAsync(64, stream)
    _, pinned = rt.cudaMallocHost(64)
    host, down, up = np.zeros(64, np.uint8), rt.cudaMemcpyKind(2), rt.cudaMemcpyKind(1)
    address = host.ctypes.data

    def said(*results: Any) -> str:
        assert all(result[0] != ERRORS.cudaSuccess for result in results)
        return "\n".join(gpu.misuse())

    assert "65 bytes from byte 0 of 64" in said(rt.cudaMemsetAsync(block, 0, 65, stream))
    assert "from byte 60 of 64" in said(rt.cudaMemcpyAsync(address, block + 60, 8, down, stream))
    assert "a copy of kind 2 from host to device" in said(rt.cudaMemcpyAsync(block, address, 8, down, stream))
    assert "exceed their pitch" in said(
        rt.cudaMemcpy2DAsync(block, 4, block + 32, 8, 8, 2, rt.cudaMemcpyKind(3), stream)
    )
    assert "not memory of a pool" in said(rt.cudaFreeAsync(block + 1, stream))
    assert "not memory of its kind" in said(rt.cudaFree(block))
    assert "not a stream" in said(rt.cudaStreamSynchronize(7))
    # Nothing has happened before something waits.
    check(rt.cudaMemsetAsync(block, 1, 64, stream))
    check(rt.cudaMemcpyAsync(pinned, block, 64, down, stream))
    check(rt.cudaMemcpyAsync(address, block, 64, down, stream))
    assert not host.any()
    check(rt.cudaStreamSynchronize(stream))
    assert host.all()
    mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    for forbidden, words in (
        (lambda: rt.cudaStreamSynchronize(stream), "the stream captures"),
        (lambda: rt.cudaMalloc(8), "cudaMalloc: called during a capture"),
        (lambda: rt.cudaMemcpyAsync(block, address, 8, up, stream), "pageable memory in a capture"),
    ):
        check(rt.cudaStreamBeginCapture(stream, mode))
        assert words in said(forbidden())
        code, graph = rt.cudaStreamEndCapture(stream)
        assert (code.name, graph) == ("cudaErrorStreamCaptureInvalidated", None)
    check(rt.cudaStreamBeginCapture(stream, mode))
    assert "would own the memory" in said(rt.cudaMallocAsync(8, stream))
    assert "not the graph's" in said(rt.cudaFreeAsync(block, stream))
    _, graph = rt.cudaStreamEndCapture(stream)
    check(rt.cudaGraphDestroy(graph))
    assert "destroyed twice" in said(rt.cudaGraphDestroy(graph))
    # A kernel that writes next to its memory, and one that calls CUDA.
    region = Region(block, (16,), "float32")
    gpu.launch(int(stream), lambda: values(Region(block, (17,), "float32")).fill(0), [region])
    check(rt.cudaStreamSynchronize(stream))
    assert gpu.misuse() == ["bytes next to a block of 64 bytes were overwritten"]
    gpu.launch(int(stream), rt.cudaGetDevice, [])
    check(rt.cudaStreamSynchronize(stream))
    assert gpu.misuse() == ["cudaGetDevice: called by a kernel"]
    check(rt.cudaFreeAsync(block, stream))
    assert "after it was freed" in said(rt.cudaMemsetAsync(block, 0, 8, stream))
    assert "freed twice" in said(rt.cudaFreeAsync(block, stream))
    with pytest.raises(TypeError):
        rt.cudaFreeAsync(block)
    with pytest.raises(AttributeError, match="not in the stand-in"):
        rt.cudaMemcpy  # noqa: B018 - the attribute itself is the question
    assert gpu.left() == "1 blocks of a pool; 1 pinned blocks; 1 streams; "  # the free has not run
    gpu._c.standInReset()


@pytest.mark.parametrize("kind", [HostDevice, CudaDevice])
def test_devices_copy_alike(gpu: Runtime, kind: Callable[[], Device]) -> None:
    device = kind()
    with device.current():
        region = device.allocate((2, 3, 4), "float32")
        assert device.download(region).sum() == 0
        device.upload(region, np.arange(24).reshape(2, 3, 4))
        part = region.part(4, (2, 4))
        np.testing.assert_array_equal(device.download(part), np.arange(4, 12).reshape(2, 4))
        column = device.allocate((2, 1, 4), "float32")
        device.copy(column.pointer, 16, region.pointer + 32, 48, 16, 2)  # the last row of each member
        np.testing.assert_array_equal(device.download(column)[:, 0], [[8, 9, 10, 11], [20, 21, 22, 23]])
        ran: list[int] = []
        launches = [device.captured(Launch(lambda n=n: ran.append(n))) for n in range(3)]
        ran.clear()
        device.joined(launches)()
        assert ran == [0, 1, 2]
        device.clear(region)
        assert not device.download(region).any()
        device.free(region)
        device.free(region)
        device.synchronize()
    device.close()
