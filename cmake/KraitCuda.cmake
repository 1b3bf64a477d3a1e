# The CUDA compiler and runtime (preset cuda), and the optional tools of the summary.
#
# nvcc is looked for in CMAKE_CUDA_COMPILER, CUDACXX, PATH and /usr/local/cuda, then among NVIDIA's
# Python wheels (.venv of this checkout, the active Python).
set(krait_cuda_get "NVIDIA's apt repository (cuda-toolkit-13-0), or: python3 -m venv .venv && \
.venv/bin/pip install 'cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.2'")

# Prints the folder of the CUDA wheels, if the given Python has them.
set(krait_wheel_probe "import importlib.util as u
for base in (u.find_spec('nvidia') or type('', (), {'submodule_search_locations': []})).submodule_search_locations:
    import os
    path = os.path.join(base, 'cu13')
    if os.path.exists(os.path.join(path, 'bin', 'nvcc')): print(path); break")

if(DEFINED CMAKE_CUDA_COMPILER)
  set(KRAIT_NVCC ${CMAKE_CUDA_COMPILER})
else()
  find_program(KRAIT_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
  foreach(python ${CMAKE_SOURCE_DIR}/.venv/bin/python3 python3)
    if(NOT KRAIT_NVCC)
      execute_process(COMMAND ${python} -c "${krait_wheel_probe}" OUTPUT_VARIABLE krait_wheels
        ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
      if(krait_wheels)
        find_program(KRAIT_NVCC nvcc PATHS ${krait_wheels}/bin NO_DEFAULT_PATH)
        set(CUDAToolkit_ROOT ${krait_wheels})
      endif()
    endif()
  endforeach()
endif()

if(KRAIT_CUDA)
  if(NOT KRAIT_NVCC)
    message(FATAL_ERROR "KRAIT_CUDA is on, but nvcc was not found in PATH, /usr/local/cuda or a "
      "Python wheel. Get it from ${krait_cuda_get}\nor build without CUDA: cmake --preset cpu")
  endif()
  set(CMAKE_CUDA_COMPILER ${KRAIT_NVCC})
  # The "a" unlocks Hopper's own instructions (wgmma, setmaxnreg); machine code for this chip alone.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a)
  endif()
  enable_language(CUDA)
  # CMake 3.25 knows no C++20 for CUDA and would silently pass no flag.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  # The runtime is linked statically (krait_cuda below): a binary starts on machines without CUDA.
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  find_package(CUDAToolkit REQUIRED)
  add_library(krait_cuda INTERFACE)
  target_link_libraries(krait_cuda INTERFACE CUDA::cudart_static)
  target_compile_options(krait_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror>")
else()
  find_package(CUDAToolkit QUIET)
endif()

# What the summary says about optional things: found or how to get it.
if(KRAIT_CUDA)
  krait_found("CUDA" "${CMAKE_CUDA_COMPILER_VERSION}, sm_${CMAKE_CUDA_ARCHITECTURES} (${KRAIT_NVCC})" "")
elseif(KRAIT_NVCC)
  krait_found("CUDA" "${KRAIT_NVCC}, not used by this preset (cmake --preset cuda)" "")
else()
  krait_found("CUDA" "" "${krait_cuda_get}")
endif()
set(krait_later "no part of Krait calls it yet")
macro(krait_cuda_library name file get)
  find_library(KRAIT_${name}_LIBRARY NAMES ${file} lib${file}.so.2 lib${file}.so.9 lib${file}.so.13
    HINTS ${CUDAToolkit_LIBRARY_DIR} ${CUDAToolkit_ROOT}/lib ${CUDAToolkit_ROOT}/../nccl/lib
    ${CUDAToolkit_ROOT}/../cudnn/lib /usr/local/cuda/lib64)
  if(KRAIT_${name}_LIBRARY)
    krait_found("${name}" "${KRAIT_${name}_LIBRARY} (${krait_later})" "")
  else()
    krait_found("${name}" "" "${get} (${krait_later})")
  endif()
endmacro()
krait_cuda_library(cuBLASLt cublasLt "pip install nvidia-cublas")
krait_cuda_library(cuDNN cudnn "pip install nvidia-cudnn-cu13")
krait_cuda_library(NCCL nccl "pip install nvidia-nccl-cu13")

macro(krait_program name program get)
  find_program(KRAIT_${name}_PROGRAM NAMES ${program})
  if(KRAIT_${name}_PROGRAM)
    krait_found("${name}" "${KRAIT_${name}_PROGRAM}${ARGN}" "")
  else()
    krait_found("${name}" "" "${get}${ARGN}")
  endif()
endmacro()
krait_program(MPI mpirun "apt-get install libopenmpi-dev openmpi-bin" " (${krait_later})")
krait_program(strace strace "apt-get install strace (crash-safety tests)")
krait_program(clang-format "clang-format-14;clang-format" "apt-get install clang-format-14")
krait_program(ccache ccache "apt-get install ccache (quicker rebuilds)")
