# The CUDA compiler and runtime (preset cuda), and the optional tools of the summary.
#
# nvcc is looked for in CMAKE_CUDA_COMPILER, CUDACXX, PATH and /usr/local/cuda, then among NVIDIA's
# Python wheels (.venv of this checkout, the active Python). Scripts find the answer as KRAIT_NVCC in
# the cache of any build folder.
set(krait_cuda_get "NVIDIA's apt repository (cuda-toolkit-13-0), or: python3 -m venv .venv && \
.venv/bin/pip install 'cuda-toolkit[nvcc,cudart,crt,nvvm,cccl,cublas]==13.0.2'")

if(KRAIT_NVCC AND NOT EXISTS ${KRAIT_NVCC})
  unset(KRAIT_NVCC CACHE)
endif()
# A path, or the name of a program in PATH.
set(krait_nvcc_given $ENV{CUDACXX})
if(DEFINED CMAKE_CUDA_COMPILER)
  set(krait_nvcc_given ${CMAKE_CUDA_COMPILER})
endif()
if(krait_nvcc_given)
  unset(KRAIT_NVCC CACHE)
  find_program(KRAIT_NVCC ${krait_nvcc_given})
else()
  find_program(KRAIT_NVCC nvcc PATHS /usr/local/cuda/bin)
  foreach(python ${CMAKE_SOURCE_DIR}/.venv/bin/python3 python3)
    if(NOT KRAIT_NVCC)
      execute_process(COMMAND ${python} -c "import nvidia; print(list(nvidia.__path__)[0])"
        OUTPUT_VARIABLE krait_wheels OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      find_program(KRAIT_NVCC nvcc PATHS ${krait_wheels}/cu13/bin NO_DEFAULT_PATH)
    endif()
  endforeach()
endif()
if(KRAIT_NVCC)
  file(REAL_PATH ${KRAIT_NVCC} krait_cuda_root)
  cmake_path(GET krait_cuda_root PARENT_PATH krait_cuda_root)
  cmake_path(GET krait_cuda_root PARENT_PATH krait_cuda_root)
  if(NOT EXISTS ${krait_cuda_root}/lib64)
    # nvcc looks for its libraries in lib64, wheels keep them in lib.
    string(PREPEND CMAKE_CUDA_FLAGS "-L${krait_cuda_root}/lib ")
  endif()
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
  # The runtime is linked statically (krait_cuda below), cuBLASLt dynamically: it has 500 MB.
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  find_package(Threads REQUIRED)
  find_library(KRAIT_CUDART libcudart_static.a REQUIRED
    HINTS ${krait_cuda_root}/lib64 ${krait_cuda_root}/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  # Also where apt's packages and NVIDIA's Python wheels keep it; these have versioned names only.
  find_library(KRAIT_CUBLASLT NAMES cublasLt libcublasLt.so.13
    HINTS ${krait_cuda_root}/lib64 ${krait_cuda_root}/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  find_path(KRAIT_CUDA_INCLUDE cublasLt.h
    HINTS ${krait_cuda_root}/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  if(NOT KRAIT_CUBLASLT OR NOT KRAIT_CUDA_INCLUDE)
    message(FATAL_ERROR "KRAIT_CUDA is on, but cuBLASLt (libcublasLt, cublasLt.h) was not found "
      "beside ${KRAIT_NVCC}. Get it from NVIDIA's apt repository (libcublas-dev-13-0), or: "
      ".venv/bin/pip install 'cuda-toolkit[cublas]==13.0.2'")
  endif()
  add_library(krait_cuda INTERFACE)
  target_include_directories(krait_cuda SYSTEM INTERFACE ${KRAIT_CUDA_INCLUDE})
  target_link_libraries(krait_cuda INTERFACE
    ${KRAIT_CUBLASLT} ${KRAIT_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
  # cuDNN's attention: its library, its headers and NVRTC as above, and the headers of cudnn-frontend,
  # which a Python wheel has too (in the include folder beside its modules).
  find_library(KRAIT_CUDNN NAMES cudnn libcudnn.so.9 HINTS ${krait_cuda_root}/lib64
    ${krait_cuda_root}/../cudnn/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  find_library(KRAIT_NVRTC NAMES nvrtc libnvrtc.so.13 HINTS ${krait_cuda_root}/lib64
    ${krait_cuda_root}/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  find_path(KRAIT_CUDNN_INCLUDE cudnn.h HINTS ${krait_cuda_root}/include
    ${krait_cuda_root}/../cudnn/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  find_path(KRAIT_CUDNN_FRONTEND_INCLUDE cudnn_frontend.h)
  foreach(python ${CMAKE_SOURCE_DIR}/.venv/bin/python3 python3)
    if(NOT KRAIT_CUDNN_FRONTEND_INCLUDE)
      execute_process(COMMAND ${python} -c "import sysconfig; print(sysconfig.get_path('platlib'))"
        OUTPUT_VARIABLE krait_wheels OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      find_path(KRAIT_CUDNN_FRONTEND_INCLUDE cudnn_frontend.h PATHS ${krait_wheels}/include
        NO_DEFAULT_PATH)
    endif()
  endforeach()
  set(KRAIT_CUDNN_ATTENTION OFF)
  if(KRAIT_CUDNN AND KRAIT_NVRTC AND KRAIT_CUDNN_INCLUDE AND KRAIT_CUDNN_FRONTEND_INCLUDE)
    set(KRAIT_CUDNN_ATTENTION ON)
  endif()
  # NCCL, for several GPUs.
  find_library(KRAIT_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${krait_cuda_root}/lib64
    ${krait_cuda_root}/lib ${krait_cuda_root}/../nccl/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  find_path(KRAIT_NCCL_INCLUDE nccl.h HINTS ${krait_cuda_root}/include
    ${krait_cuda_root}/../nccl/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  set(KRAIT_NCCL OFF)
  if(KRAIT_NCCL_LIBRARY AND KRAIT_NCCL_INCLUDE)
    set(KRAIT_NCCL ON)
  endif()
  target_compile_options(krait_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror>")
endif()

# What the summary says about optional things: found or how to get it.
if(KRAIT_CUDA)
  krait_found("CUDA" "${CMAKE_CUDA_COMPILER_VERSION}, sm_${CMAKE_CUDA_ARCHITECTURES} (${KRAIT_NVCC})" "")
  krait_found("cuBLASLt" "${KRAIT_CUBLASLT}" "")
elseif(KRAIT_NVCC)
  krait_found("CUDA" "${KRAIT_NVCC}, not used by this preset (cmake --preset cuda)" "")
else()
  krait_found("CUDA" "" "${krait_cuda_get}")
endif()
if(KRAIT_NCCL)
  krait_found("NCCL" "${KRAIT_NCCL_LIBRARY}" "")
elseif(KRAIT_CUDA)
  krait_found("NCCL" "" "one GPU per run. For several: NVIDIA's apt repository (libnccl-dev), or: \
.venv/bin/pip install nvidia-nccl-cu13")
endif()

macro(krait_program name program get)
  find_program(KRAIT_${name}_PROGRAM NAMES ${program})
  if(KRAIT_${name}_PROGRAM)
    krait_found("${name}" "${KRAIT_${name}_PROGRAM}${ARGN}" "")
  else()
    krait_found("${name}" "" "${get}${ARGN}")
  endif()
endmacro()
krait_program(strace strace "apt-get install strace (crash-safety tests)")
krait_program(clang-format "clang-format-14;clang-format" "apt-get install clang-format-14")
krait_program(ccache ccache "apt-get install ccache (quicker rebuilds)")
