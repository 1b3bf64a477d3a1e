# Third-party libraries, each behind one krait_* interface target, and the list of what was found.
# Required ones that are missing are reported together, with one apt line.
#
# All are looked for in CMAKE_PREFIX_PATH too (a conda environment, a folder of one's own), static or
# shared. launch/setup --unpack makes such a folder of Debian packages, .packages.

# krait_found(NAME WHAT GET): notes the outcome of one search for the summary and, when `WHAT` is
# empty, what to install. krait_require() also makes a missing one an error at the end of this file.
set(KRAIT_SUMMARY "")
set(KRAIT_MISSING "")
macro(krait_found name what get)
  string(LENGTH "${name}" krait_length)
  math(EXPR krait_pad "15 - ${krait_length}")
  string(REPEAT " " ${krait_pad} krait_pad)
  if("${what}" STREQUAL "")
    string(APPEND KRAIT_SUMMARY "\n  [ ] ${name}${krait_pad}not found: ${get}")
  else()
    string(APPEND KRAIT_SUMMARY "\n  [x] ${name}${krait_pad}${what}")
  endif()
endmacro()
macro(krait_require name what packages)
  krait_found("${name}" "${what}" "apt-get install ${packages}")
  if("${what}" STREQUAL "")
    list(APPEND KRAIT_MISSING "${name}")
    string(APPEND KRAIT_MISSING_PACKAGES " ${packages}")
  endif()
endmacro()

set(krait_unpacked ${CMAKE_SOURCE_DIR}/.packages)
if(IS_DIRECTORY ${krait_unpacked}/usr)
  list(PREPEND CMAKE_PREFIX_PATH ${krait_unpacked}/usr)
  # Its libraries need one another. With DT_RPATH (not DT_RUNPATH) they are found for each other too.
  file(GLOB krait_unpacked_dirs ${krait_unpacked}/usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}
    ${krait_unpacked}/usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}/openblas-openmp
    ${krait_unpacked}/lib/${CMAKE_LIBRARY_ARCHITECTURE})
  list(TRANSFORM krait_unpacked_dirs PREPEND "LINKER:-rpath," OUTPUT_VARIABLE krait_rpaths)
  add_link_options(LINKER:--disable-new-dtags ${krait_rpaths})
endif()
# An installed krait finds the libraries outside of the system's folders where the build did.
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)

# "found (static)" or "found (shared)".
function(krait_how variable found library)
  if("${library}" MATCHES "\\.a$")
    set(${variable} "${found} (static)" PARENT_SCOPE)
  else()
    set(${variable} "${found} (shared)" PARENT_SCOPE)
  endif()
endfunction()

krait_found("compiler" "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}" "")

find_package(OpenMP QUIET COMPONENTS CXX)
krait_require(OpenMP "${OpenMP_CXX_VERSION}" "g++")

# Abseil and yaml-cpp statically where they can be had so, that one binary runs on systems with other
# versions of them.
find_path(ABSL_INCLUDE_DIR absl/status/status.h)
find_library(ABSL_STATUS_LIBRARY NAMES libabsl_status.a absl_status NAMES_PER_DIR)
if(ABSL_INCLUDE_DIR AND ABSL_STATUS_LIBRARY)
  cmake_path(GET ABSL_STATUS_LIBRARY PARENT_PATH krait_folder)
  cmake_path(GET ABSL_STATUS_LIBRARY EXTENSION LAST_ONLY krait_extension)
  file(GLOB ABSL_LIBRARIES ${krait_folder}/libabsl_*${krait_extension})
  list(FILTER ABSL_LIBRARIES EXCLUDE REGEX "flags_|_test|random_")
  add_library(krait_absl INTERFACE)
  target_include_directories(krait_absl SYSTEM INTERFACE ${ABSL_INCLUDE_DIR})
  target_link_libraries(krait_absl INTERFACE -Wl,--start-group ${ABSL_LIBRARIES} -Wl,--end-group)
  file(STRINGS ${ABSL_INCLUDE_DIR}/absl/base/config.h krait_version
    REGEX "define ABSL_LTS_RELEASE_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" krait_version "${krait_version}")
  krait_how(krait_version "${krait_version}" ${ABSL_STATUS_LIBRARY})
  krait_require(Abseil "${krait_version}" "libabsl-dev")
else()
  krait_require(Abseil "" "libabsl-dev")
endif()

find_package(yaml-cpp CONFIG QUIET)
find_path(YAML_CPP_INCLUDE yaml-cpp/yaml.h)
find_library(YAML_CPP_LIBRARY NAMES libyaml-cpp.a yaml-cpp NAMES_PER_DIR)
if(YAML_CPP_INCLUDE AND YAML_CPP_LIBRARY)
  add_library(krait_yaml INTERFACE)
  target_include_directories(krait_yaml SYSTEM INTERFACE ${YAML_CPP_INCLUDE})
  target_link_libraries(krait_yaml INTERFACE ${YAML_CPP_LIBRARY})
  krait_how(krait_version "${yaml-cpp_VERSION}" ${YAML_CPP_LIBRARY})
  krait_require(yaml-cpp "${krait_version}" "libyaml-cpp-dev")
else()
  krait_require(yaml-cpp "" "libyaml-cpp-dev")
endif()

# Not by find_package: it asks h5cc, which names the folders that it was made for.
set(krait_hdf5_paths hdf5/serial ${CMAKE_LIBRARY_ARCHITECTURE}/hdf5/serial)
find_path(HDF5_INCLUDE hdf5.h PATH_SUFFIXES ${krait_hdf5_paths})
find_library(HDF5_LIBRARY NAMES hdf5_serial hdf5 NAMES_PER_DIR PATH_SUFFIXES ${krait_hdf5_paths})
if(HDF5_INCLUDE AND HDF5_LIBRARY)
  add_library(krait_hdf5 INTERFACE)
  target_include_directories(krait_hdf5 SYSTEM INTERFACE ${HDF5_INCLUDE})
  target_link_libraries(krait_hdf5 INTERFACE ${HDF5_LIBRARY})
  if(HDF5_LIBRARY MATCHES "\\.a$")
    # What its compression filters and plugins call, as far as it was built with them.
    foreach(name sz aec z crypto curl)
      find_library(HDF5_NEEDS_${name} ${name})
      if(HDF5_NEEDS_${name})
        target_link_libraries(krait_hdf5 INTERFACE ${HDF5_NEEDS_${name}})
      endif()
    endforeach()
    target_link_libraries(krait_hdf5 INTERFACE ${CMAKE_DL_LIBS} m)
  endif()
  file(STRINGS ${HDF5_INCLUDE}/H5public.h krait_version REGEX "define H5_VERS_INFO")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" krait_version "${krait_version}")
  krait_how(krait_version "${krait_version}" ${HDF5_LIBRARY})
  krait_require(HDF5 "${krait_version}" "libhdf5-dev")
else()
  krait_require(HDF5 "" "libhdf5-dev")
endif()

# The OpenMP flavour of OpenBLAS: it shares its threads with Krait's own loops.
set(krait_blas_paths openblas-openmp ${CMAKE_LIBRARY_ARCHITECTURE}/openblas-openmp openblas)
find_path(CBLAS_INCLUDE NAMES openblas_config.h PATH_SUFFIXES ${krait_blas_paths})
find_library(OPENBLAS_LIBRARY openblas PATH_SUFFIXES ${krait_blas_paths})
if(CBLAS_INCLUDE AND OPENBLAS_LIBRARY)
  add_library(krait_blas INTERFACE)
  target_include_directories(krait_blas SYSTEM INTERFACE ${CBLAS_INCLUDE})
  # A shared one is loaded at run time (kernels/cpu/blas.h): by the name that its run-time package
  # has, beside the one for building.
  if(OPENBLAS_LIBRARY MATCHES "\\.so$")
    cmake_path(GET OPENBLAS_LIBRARY PARENT_PATH krait_blas_folder)
    set(krait_blas_file ${OPENBLAS_LIBRARY})
    if(EXISTS ${krait_blas_folder}/libopenblas.so.0)
      set(krait_blas_file ${krait_blas_folder}/libopenblas.so.0)
    endif()
    target_compile_definitions(krait_blas INTERFACE KRAIT_OPENBLAS="${krait_blas_file}")
    target_link_libraries(krait_blas INTERFACE ${CMAKE_DL_LIBS})
  else()
    target_link_libraries(krait_blas INTERFACE ${OPENBLAS_LIBRARY} gfortran m)
  endif()
  file(STRINGS ${CBLAS_INCLUDE}/openblas_config.h krait_version REGEX "OPENBLAS_VERSION")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" krait_version "${krait_version}")
  krait_require(OpenBLAS "${krait_version} (${OPENBLAS_LIBRARY})" "libopenblas-openmp-dev")
else()
  krait_require(OpenBLAS "" "libopenblas-openmp-dev")
endif()

# The C library: in C++ code, MPI::MPI_CXX would bring MPI's abandoned C++ bindings along.
set(MPI_CXX_SKIP_MPICXX TRUE)
set(krait_mpi ${krait_unpacked}/usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}/openmpi)
if(EXISTS ${krait_mpi}/lib/libmpi.so)
  # An unpacked compiler wrapper would name the folders that it was made for.
  set(MPI_C_HEADER_DIR ${krait_mpi}/include CACHE PATH "")
  set(MPI_C_LIB_NAMES mpi CACHE STRING "")
  set(MPI_mpi_LIBRARY ${krait_mpi}/lib/libmpi.so CACHE FILEPATH "")
endif()
find_package(MPI QUIET COMPONENTS C)
if(MPI_C_FOUND)
  krait_require(MPI "${MPI_C_VERSION} (${MPI_C_LIBRARIES})" "libopenmpi-dev openmpi-bin")
else()
  krait_require(MPI "" "libopenmpi-dev openmpi-bin")
endif()

find_package(nlohmann_json CONFIG QUIET)
krait_require(nlohmann-json "${nlohmann_json_VERSION}" "nlohmann-json3-dev")
find_package(CLI11 CONFIG QUIET)
krait_require(CLI11 "${CLI11_VERSION}" "libcli11-dev")
find_package(ZLIB QUIET)
krait_require(zlib "${ZLIB_VERSION_STRING}" "zlib1g-dev")

find_path(ZSTD_INCLUDE zstd.h)
find_library(ZSTD_LIBRARY zstd)
if(ZSTD_INCLUDE AND ZSTD_LIBRARY)
  krait_require(zstd "${ZSTD_LIBRARY}" "libzstd-dev")
else()
  krait_require(zstd "" "libzstd-dev")
endif()

# Of tokenizers: PCRE2 for the patterns of tokenizer.json (look-ahead and Unicode properties, which
# std::regex and RE2 lack), utf8proc for its normal forms, SentencePiece for its own models.
foreach(krait_library "PCRE2;pcre2.h;pcre2-8;libpcre2-dev" "utf8proc;utf8proc.h;utf8proc;libutf8proc-dev"
    "SentencePiece;sentencepiece_processor.h;sentencepiece;libsentencepiece-dev")
  list(GET krait_library 0 krait_name)
  list(GET krait_library 1 krait_header)
  list(GET krait_library 2 krait_file)
  list(GET krait_library 3 krait_package)
  find_path(${krait_name}_INCLUDE ${krait_header})
  find_library(${krait_name}_LIBRARY ${krait_file})
  if(${krait_name}_INCLUDE AND ${krait_name}_LIBRARY)
    krait_require(${krait_name} "${${krait_name}_LIBRARY}" "${krait_package}")
  else()
    krait_require(${krait_name} "" "${krait_package}")
  endif()
endforeach()

find_package(GTest CONFIG QUIET)
if(TARGET GTest::gmock)
  krait_require(GoogleTest "${GTest_VERSION}" "libgtest-dev libgmock-dev")
else()
  krait_require(GoogleTest "" "libgtest-dev libgmock-dev")
endif()

if(KRAIT_MISSING)
  list(JOIN KRAIT_MISSING ", " krait_missing)
  message(FATAL_ERROR "Krait needs ${krait_missing}, not found on this machine. Install with:\n"
    "  apt-get install${KRAIT_MISSING_PACKAGES}\n"
    "or let launch/setup do it.")
endif()
