"""llama.cpp as a worker, and the requantization of a GGUF file.

The libraries are those of the npm package @node-llama-cpp/linux-x64, prebuilt for every x86-64 generation. The CPU backend
is chosen at load, with AVX-512, VNNI and AMX if the CPU has them; PyPI's prebuilt wheels stop at AVX2. The structures are
the declarations of llama-cpp-py-sync, pinned to a release of the same interface; the library of that package is not used.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI
from llama_cpp_py_sync._cffi_bindings import ffi

from benchmarks.peer_workers.worker import FloatArray, Stepper, serve

#: Directory in this environment into which `--install` unpacks the npm package.
NATIVE = Path(sys.prefix) / "native" / "package" / "bins" / "linux-x64"
#: Values of enum llama_ftype in llama.h.
FILE_TYPES = {"q4_0": 2, "q8_0": 7}
_GGML = """
typedef struct ggml_backend_reg * reg_t;
struct ggml_threadpool_params { bool cpumask[512]; int n_threads; int prio; uint32_t poll; bool strict_cpu; bool paused; };
struct ggml_threadpool_params ggml_threadpool_params_default(int n_threads);
void ggml_backend_load_all_from_path(const char * path);
reg_t ggml_backend_reg_by_name(const char * name);
void * ggml_backend_reg_get_proc_address(reg_t reg, const char * name);
"""


class _Library:
    """The loaded libraries: ``llama`` with its declarations, and the functions of ggml for a thread pool."""

    def __init__(self) -> None:
        self._ggml = FFI()
        self._ggml.cdef(_GGML)
        base = self._ggml.dlopen(str(NATIVE / "libggml-base.so"))
        (ggml,) = NATIVE.glob("libggml.v*.so")
        backends = self._ggml.dlopen(str(ggml))
        (llama,) = NATIVE.glob("libllama.v*.so")
        self.llama: Any = ffi.dlopen(str(llama))
        self.llama.llama_log_set(_log, ffi.NULL)
        self._check_layout()
        backends.ggml_backend_load_all_from_path(os.fsencode(NATIVE))
        cpu = backends.ggml_backend_reg_by_name(b"CPU")

        def procedure(name: bytes, kind: str) -> Any:
            return self._ggml.cast(kind, base.ggml_backend_reg_get_proc_address(cpu, name))

        self._params = base.ggml_threadpool_params_default
        self._new_pool = procedure(b"ggml_threadpool_new", "void * (*)(struct ggml_threadpool_params *)")
        self.version = f"llama.cpp {llama.name.removeprefix('libllama.').removesuffix('.so')}"

    def thread_pool(self, threads: int) -> Any:
        """Make a pool that lives as long as the process; without it llama.cpp starts new threads for every token."""
        params = self._ggml.new("struct ggml_threadpool_params *", self._params(threads))
        return ffi.cast("ggml_threadpool_t", int(self._ggml.cast("intptr_t", self._new_pool(params))))

    def _check_layout(self) -> None:
        """Exit if the declarations differ from the library: then its default values are not at the expected places."""
        model, context = self.llama.llama_model_default_params(), self.llama.llama_context_default_params()
        quantize = self.llama.llama_model_quantize_default_params()
        found = (context.n_ctx, context.type_k, context.type_v, context.offload_kqv, context.kv_unified)
        if found != (512, 1, 1, True, False) or not model.use_extra_bufts or quantize.ftype != FILE_TYPES["q8_0"]:
            raise SystemExit("llama.cpp: library and declarations differ: install the pinned versions of both")


class LlamaCpp(Stepper):
    """One GGUF file, with llama.cpp's own defaults for all other settings."""

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        library = _Library()
        self._llama, self.version = library.llama, library.version
        self._model = self._llama.llama_model_load_from_file(
            os.fsencode(model), self._llama.llama_model_default_params()
        )
        params = self._llama.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = options["max_length"], threads, threads
        self._context = self._llama.llama_init_from_model(self._model, params)
        if self._context == ffi.NULL:
            raise SystemExit(f"{model}: llama.cpp cannot load this file")
        pool = library.thread_pool(threads)
        self._llama.llama_attach_threadpool(self._context, pool, pool)
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        self.config = {"kv_cache": "f16", "cpu": _features(self._llama), **options}
        self.generate([0], 0, None)

    def begin(self, variant: int | None) -> None:
        """See :class:`Stepper`."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def prefill(self, tokens: list[int]) -> FloatArray:
        """See :class:`Stepper`."""
        most = self._llama.llama_n_batch(self._context)
        for first in range(0, len(tokens), most):
            logits = self._decode(tokens[first : first + most])
        return logits

    def step(self, token: int) -> FloatArray:
        """See :class:`Stepper`."""
        return self._decode([token])

    def _decode(self, tokens: list[int]) -> FloatArray:
        ids = ffi.new("llama_token[]", tokens)
        if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit(f"llama.cpp: no room for {len(tokens)} more tokens")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return np.frombuffer(ffi.buffer(logits, 4 * self._vocabulary), np.float32)


def convert(kind: str, source: Path, target: Path) -> None:
    """Requantize a GGUF file as `llama-quantize --allow-requantize` does."""
    llama = _Library().llama
    params = ffi.new("llama_model_quantize_params *", llama.llama_model_quantize_default_params())
    params.ftype, params.allow_requantize = FILE_TYPES[kind], True
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise SystemExit(f"{source}: llama.cpp cannot requantize this file")


def _features(llama: Any) -> str:
    text = ffi.string(llama.llama_print_system_info()).decode().removeprefix("CPU : ")
    return " ".join(part.split("=")[0].strip() for part in text.split("|") if part.strip().endswith("= 1"))


@ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
def _log(level: int, text: Any, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR; 5 continues a line
        sys.stderr.write(ffi.string(text).decode(errors="replace"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(LlamaCpp)
