# The kernels of the CUDA part, which tests/emulated compiles for the CPU, too: all but the queries of the device. Sets
# cuda_sources.
file(GLOB cuda_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/../csrc/cuda/*.cu")
list(FILTER cuda_sources EXCLUDE REGEX "/device\\.cu$")
