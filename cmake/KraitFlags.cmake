# Compiler flags of all Krait targets.
add_library(krait_flags INTERFACE)
set(krait_warnings -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror)
# Under the sanitizers GCC 12 and 13 see uninitialised values where there are none (GCC bug 105562).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND KRAIT_SANITIZE)
  list(APPEND krait_warnings -Wno-error=maybe-uninitialized)
endif()
target_compile_options(krait_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${krait_warnings}>)
target_compile_options(krait_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${OpenMP_CXX_FLAGS}>)
target_link_libraries(krait_flags INTERFACE ${OpenMP_CXX_LIBRARIES})
# A program depends on the shared libraries that it calls, not on all that its archives name.
target_link_options(krait_flags INTERFACE -Wl,--as-needed)

if(KRAIT_SANITIZE)
  target_compile_options(krait_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>)
  target_compile_definitions(krait_flags INTERFACE KRAIT_SANITIZE)
  target_link_options(krait_flags INTERFACE -fsanitize=address,undefined)
endif()
