# gpt2fast/_cuda: csrc/<op>/<op>.cu by nvcc, the bindings by the C++ compiler. No torch headers; cudart is
# linked statically, so that the CUDA version of torch does not matter (the driver's must be new enough).
#
# GPT2FAST_CUDA_ARCHS says for what: 80, 90a (an A100's and an H100's machine code), 90-virtual (PTX, for GPUs
# to come). setup.py sets it to the GPUs of the machine; the default here is all three.
set(ARCHS "$ENV{GPT2FAST_CUDA_ARCHS}")
if(NOT ARCHS)
  set(ARCHS "80-real;90a-real;90-virtual")
endif()
string(REGEX REPLACE "[, ]+" ";" ARCHS "${ARCHS}")
foreach(arch IN LISTS ARCHS)
  if(NOT arch MATCHES "^[0-9]+[af]?(-real|-virtual)?$")
    message(FATAL_ERROR "GPT2FAST_REASON: GPT2FAST_CUDA_ARCHS has ${arch}; known are forms like 80, 90a, 90-virtual")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES "${ARCHS}")

project(gpt2fast LANGUAGES CXX CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "GPT2FAST_REASON: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old, 12.0 or later is needed")
endif()
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)

file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS csrc/*/*.cu)
list(FILTER CUDA_KERNELS EXCLUDE REGEX "/csrc/testing/")  # the tests' emulator is no part of the wheel
add_library(cuda_kernels OBJECT ${CUDA_KERNELS})
target_include_directories(cuda_kernels PRIVATE csrc)
# -fmad=false: kernels say fmaf where they want it. Left to itself nvcc fuses a product with any sum that follows,
# and differences that are 0 by their rounding (one key, one column) are not. -Xfatbin -compress-all: a third of the size.
target_compile_options(cuda_kernels PRIVATE --extended-lambda -fmad=false -Xfatbin -compress-all)

Python_add_library(_cuda MODULE WITH_SOABI csrc/bindings/cuda.cpp)
set_source_files_properties(csrc/bindings/cuda.cpp PROPERTIES COMPILE_OPTIONS -O1)
target_include_directories(_cuda PRIVATE csrc)
target_include_directories(_cuda SYSTEM PRIVATE ${PYBIND11_INCLUDE})
string(REPLACE ";" ", " ARCHS_TEXT "${ARCHS}")
target_compile_definitions(_cuda PRIVATE GPT2FAST_CUDA_ARCHS="${ARCHS_TEXT}")
target_link_libraries(_cuda PRIVATE cuda_kernels)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
