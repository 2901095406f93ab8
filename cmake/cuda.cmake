# scalpel._cuda: the kernels in a static library that contains the CUDA runtime, and a Python module around
# them. Nothing links to the driver or to torch, so that the module also loads where there is no GPU.
set(CMAKE_CUDA_COMPILER ${SCALPEL_NVCC})
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # the last includes PTX, for later GPUs
endif()
enable_language(CUDA)

file(GLOB _kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/*/*_cuda.cu ${CMAKE_CURRENT_SOURCE_DIR}/csrc/*/cuda/*_cuda.cu)
add_library(scalpel_cuda STATIC ${_kernels})
target_compile_features(scalpel_cuda PUBLIC cuda_std_20)
target_include_directories(scalpel_cuda PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
# A kernel that spills registers is slow without anybody noticing, so a spill is an error.
target_compile_options(scalpel_cuda PRIVATE -Xptxas=-warn-spills -Werror=all-warnings -Xfatbin=-compress-all)
set_target_properties(scalpel_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static
  CUDA_EXTENSIONS OFF
  CUDA_VISIBILITY_PRESET hidden
  POSITION_INDEPENDENT_CODE ON)
target_link_libraries(scalpel_cuda PRIVATE scalpel_core)

pybind11_add_module(_cuda MODULE NO_EXTRAS
  csrc/bindings/cuda_module.cpp
  csrc/bindings/arrays.cpp
  csrc/bindings/init_covariance_cuda.cpp
  csrc/bindings/init_jvp.cpp
  csrc/bindings/init_topk.cpp)
target_compile_definitions(_cuda PRIVATE SCALPEL_BINDS_CUDA=1)
target_include_directories(_cuda PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(_cuda PRIVATE scalpel_cuda scalpel_core)
target_link_options(_cuda PRIVATE LINKER:--exclude-libs,ALL)
set_target_properties(_cuda PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
install(TARGETS _cuda LIBRARY DESTINATION scalpel COMPONENT python)
