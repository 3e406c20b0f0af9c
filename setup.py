"""Build csrc/ into ep_engine/_C, the CPU ops always, the CUDA ops where nvcc and a CUDA build of torch are; and into
ep_engine/_solver, which knows numpy and no torch.

torch is reached by its stable ABI only, so one build serves every torch from 2.10 on.
"""

import os
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the first stable ABI with all that bindings/ uses
CSRC = Path("csrc")


def solver() -> Extension:
    return Extension(
        "ep_engine._solver",
        sorted(map(str, (CSRC / "solver").glob("*.cpp"))),
        include_dirs=[pybind11.get_include(), str((CSRC / "solver").resolve())],
        extra_compile_args=["-std=c++20", "-O3", "-Wall", "-fvisibility=hidden"],
        language="c++",
    )


def ops() -> Extension:
    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    sources = sorted(str(path) for folder in ("cpu", "bindings") for path in (CSRC / folder).glob("*.cpp"))
    # No contraction to fused multiply-adds: a sum then has the same bits on every processor. No floating-point traps:
    # a choice between two values may then be computed without a branch.
    cxx = ["-std=c++20", "-O3", "-Wall", "-ffp-contract=off", "-fno-trapping-math", TORCH_TARGET]
    folders = [str(CSRC.resolve())]
    if not with_cuda:
        return CppExtension("ep_engine._C", sources, include_dirs=folders, extra_compile_args={"cxx": cxx})
    sources += sorted(str(path) for path in (CSRC / "cuda").glob("*.cu"))
    cuda_flags = ["-DEP_WITH_CUDA", "-DUSE_CUDA"]
    return CUDAExtension(
        "ep_engine._C",
        sources,
        include_dirs=folders,
        extra_compile_args={
            "cxx": [*cxx, *cuda_flags],
            "nvcc": ["-std=c++20", "-O3", TORCH_TARGET, *cuda_flags],
        },
    )


os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
setup(ext_modules=[ops(), solver()], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
