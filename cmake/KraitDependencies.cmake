# Compiler flags and third-party libraries, each behind one krait_* interface target.
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(HDF5 REQUIRED COMPONENTS C)
find_package(GTest CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
find_package(ZLIB REQUIRED)

add_library(krait_flags INTERFACE)
target_compile_options(krait_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror>)
target_compile_options(krait_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${OpenMP_CXX_FLAGS}>)
target_link_libraries(krait_flags INTERFACE ${OpenMP_CXX_LIBRARIES})
if(KRAIT_SANITIZE)
  target_compile_options(krait_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer>)
  target_compile_definitions(krait_flags INTERFACE KRAIT_SANITIZE)
  target_link_options(krait_flags INTERFACE -fsanitize=address,undefined)
endif()

# Abseil and yaml-cpp statically, so that one binary runs on systems with other versions of them.
find_path(ABSL_INCLUDE_DIR absl/status/status.h REQUIRED)
find_library(ABSL_STATUS_ARCHIVE libabsl_status.a REQUIRED)
cmake_path(GET ABSL_STATUS_ARCHIVE PARENT_PATH ABSL_ARCHIVE_DIR)
file(GLOB ABSL_ARCHIVES ${ABSL_ARCHIVE_DIR}/libabsl_*.a)
list(FILTER ABSL_ARCHIVES EXCLUDE REGEX "flags_|_test|random_")
add_library(krait_absl INTERFACE)
target_include_directories(krait_absl SYSTEM INTERFACE ${ABSL_INCLUDE_DIR})
target_link_libraries(krait_absl INTERFACE -Wl,--start-group ${ABSL_ARCHIVES} -Wl,--end-group)

find_path(YAML_CPP_INCLUDE yaml-cpp/yaml.h REQUIRED)
find_library(YAML_CPP_ARCHIVE libyaml-cpp.a REQUIRED)
add_library(krait_yaml INTERFACE)
target_include_directories(krait_yaml SYSTEM INTERFACE ${YAML_CPP_INCLUDE})
target_link_libraries(krait_yaml INTERFACE ${YAML_CPP_ARCHIVE})

find_path(ZSTD_INCLUDE zstd.h REQUIRED)
find_library(ZSTD_LIBRARY zstd REQUIRED)

# The OpenMP flavour of OpenBLAS: it shares its threads with Krait's own loops.
find_path(CBLAS_INCLUDE cblas.h PATH_SUFFIXES openblas-openmp x86_64-linux-gnu/openblas-openmp openblas REQUIRED)
find_library(OPENBLAS_LIBRARY openblas PATH_SUFFIXES openblas-openmp x86_64-linux-gnu/openblas-openmp REQUIRED)
add_library(krait_blas INTERFACE)
target_include_directories(krait_blas SYSTEM INTERFACE ${CBLAS_INCLUDE})
target_link_libraries(krait_blas INTERFACE ${OPENBLAS_LIBRARY})
