"""C with OpenMP, compiled when it is needed: the fused loop of an expression, and native STREAM.

Libraries are kept in the user's cache folder under a hash of source, flags, compiler and
processor. Without a compiler `available` is None and the back ends built on it are missing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from narrows.chips._stream_expression import Expression, text
from narrows.core.errors import NarrowsError
from narrows.measure.probes import processor

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
"""The same for native STREAM and for the portable program."""

NATIVE = """
#define LOOP _Pragma("omp parallel for schedule(static) num_threads(threads)") \\
    for (long i = 0; i < n; i++)
typedef double *restrict out_t;
typedef const double *restrict in_t;
void stream_init(long n, int threads, out_t a, double *restrict b, double *restrict c)
    { LOOP { a[i] = 1.0; b[i] = 2.0; c[i] = 0.0; } }
void stream_copy(long n, int threads, out_t c, in_t a) { LOOP c[i] = a[i]; }
void stream_scale(long n, int threads, out_t b, in_t c) { LOOP b[i] = SCALAR * c[i]; }
void stream_add(long n, int threads, out_t c, in_t a, in_t b) { LOOP c[i] = a[i] + b[i]; }
void stream_triad(long n, int threads, out_t a, in_t b, in_t c)
    { LOOP a[i] = b[i] + SCALAR * c[i]; }
"""
"""STREAM as a C programmer writes it: four loops, one pragma."""

BIND = """
#define _GNU_SOURCE
#include <omp.h>
#ifdef __linux__
#include <sched.h>
#endif
void bind_workers(int threads, int count, const int *cpus, int each) {
#ifdef __linux__
    #pragma omp parallel num_threads(threads)
    if (omp_get_thread_num() > 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        if (each) CPU_SET(cpus[omp_get_thread_num()], &set);
        else for (int k = 0; k < count; k++) CPU_SET(cpus[k], &set);
        sched_setaffinity(0, sizeof set, &set);
    }
#endif
}
"""
"""Workers on one processor each, or all of them on all."""

PLAIN = """
void kernel(long n, int threads, double *{restrict} out{parameters}) {{
    #pragma omp parallel for{simd} schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++) out[i] = {scalar};
}}
"""

STREAMING = """
#include <immintrin.h>
typedef double lane __attribute__((vector_size(32), may_alias));
void kernel(long n, int threads, double *out{parameters}) {{
    long whole = n / 4;
    #pragma omp parallel num_threads(threads)
    {{
        #pragma omp for schedule(static)
        for (long v = 0; v < whole; v++) {{
            long i = 4 * v;
            (void)i;
            lane r = (lane){{0, 0, 0, 0}} + {vector};
            _mm256_stream_pd(out + i, (__m256d)r);
        }}
        _mm_sfence();
    }}
    for (long i = 4 * whole; i < n; i++) out[i] = {scalar};
}}
"""
"""Stores that bypass the caches, so that what is overwritten is not read first. x86 with AVX."""


@cache
def available() -> str | None:
    """Path of a C compiler that links OpenMP, None where there is none."""
    for name in ("gcc", "cc", "clang"):
        found = shutil.which(name)
        if found is not None:
            with suppress(NarrowsError):
                _compiled(BIND, found)
                return found
    return None


def streams() -> bool:
    """Whether stores that bypass the caches can be compiled here."""
    with suppress(OSError):
        told = Path("/proc/cpuinfo").read_text()
        return available() is not None and " avx " in told
    return False


@cache
def library(source: str) -> ctypes.CDLL:
    """A compiled source. Raises NarrowsError where there is no compiler or it refuses."""
    compiler = available()
    if compiler is None:
        raise NarrowsError("no C compiler with OpenMP was found; install gcc, or leave out 'c'")
    return ctypes.CDLL(str(_compiled(source, compiler)))


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _compiled(source: str, compiler: str) -> Path:
    import platformdirs

    told = "\0".join((source, *FLAGS, _version(compiler), processor()))
    folder = Path(platformdirs.user_cache_dir("narrows")) / "stream"
    kept = folder / f"{sha256(told.encode()).hexdigest()[:24]}.so"
    if kept.exists():
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        code, made = Path(work) / "kernel.c", Path(work) / "kernel.so"
        code.write_text(source)
        command = [compiler, *FLAGS, "-o", str(made), str(code)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            raise NarrowsError(f"{compiler} could not compile a loop: {ran.stderr.strip()[:300]}")
        os.replace(made, kept)
    return kept


def source(expression: Expression, arguments: int, aliased: bool, streaming: bool) -> str:
    """C of one fused loop. aliased: the result is one of the arguments as well."""
    scalar = text(expression)
    if streaming:
        parameters = "".join(f", const double *p{k}" for k in range(arguments))
        vector = text(expression, "*(const lane *)(p{} + i)")
        return STREAMING.format(parameters=parameters, vector=vector, scalar=scalar)
    # an element-wise result may overwrite its own argument: then nothing is `restrict`, and the
    # pragma says what the compiler can no longer see
    restrict, simd = ("", " simd") if aliased else ("restrict", "")
    parameters = "".join(f", const double *{restrict} p{k}" for k in range(arguments))
    return PLAIN.format(restrict=restrict, simd=simd, parameters=parameters, scalar=scalar)


def bind(threads: int, cpus: Sequence[int], each: bool) -> None:
    """Bind OpenMP's workers (all threads but the calling one): one to each of the processors,
    or, to let them go again, all to all of them."""
    library(BIND).bind_workers(threads, len(cpus), (ctypes.c_int * len(cpus))(*cpus), int(each))


def native(scalar: float) -> ctypes.CDLL:
    """Native STREAM: stream_init, stream_copy, stream_scale, stream_add, stream_triad."""
    return library(f"#define SCALAR ({scalar!r})\n{NATIVE}")
