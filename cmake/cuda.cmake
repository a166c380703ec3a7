# nvcc, called directly: object files that link into a library built against any torch, the CPU wheel included.
#   cuda_info        for build_info()
#   cuda_libraries   what the kernels need: the CUDA runtime, linked statically
#   compile_cuda(OBJECTS sources…)
#
# FINETUNE_CUDA_ARCHS in the environment names the architectures, "80;90;120" for instance. The newest one's PTX goes in
# too, which younger GPUs compile when they first meet it, so the default of one architecture runs everywhere and builds
# quickly. <op>_hopper.cu is for sm_90a alone.
set(cuda_info "nvcc=0")
set(cuda_libraries)
if(cuda)
  set(archs $ENV{FINETUNE_CUDA_ARCHS})
  if(NOT archs)
    set(archs 80)
  endif()
  string(REPLACE "," ";" archs "${archs}")
  set(gencode)
  foreach(arch ${archs})
    if(NOT arch MATCHES "^[0-9]+[af]?$" OR arch VERSION_LESS 80)
      message(FATAL_ERROR "FINETUNE_CUDA_ARCHS: '${arch}' is no architecture from 80 on; \"80;90a;120\" for instance")
    endif()
    list(APPEND gencode -gencode=arch=compute_${arch},code=sm_${arch})
    if(arch MATCHES "^[0-9]+$")
      set(newest ${arch})
    endif()
  endforeach()
  set(arch_names ${archs})
  if(newest)
    list(APPEND gencode -gencode=arch=compute_${newest},code=compute_${newest})
    list(APPEND arch_names ${newest}+ptx)
  endif()
  string(REPLACE ";" "," arch_names "${arch_names}")

  # --dryrun prints the toolkit's folder, also where `nvcc` is a wrapper elsewhere
  execute_process(COMMAND ${NVCC} --dryrun x.cu ERROR_VARIABLE dryrun OUTPUT_QUIET)
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(NOT dryrun MATCHES "#\\$ _HERE_=([^\n]+)" OR NOT version MATCHES "V([0-9.]+)")
    message(FATAL_ERROR "${NVCC} does not run; mend it, or set FINETUNE_CUDA=0 to build without the CUDA kernels")
  endif()
  string(REGEX MATCH "V([0-9.]+)" _ "${version}")
  set(cuda_info "nvcc=${CMAKE_MATCH_1}|archs=${arch_names}")
  string(REGEX MATCH "#\\$ _HERE_=([^\n]+)" _ "${dryrun}")
  get_filename_component(cuda_root ${CMAKE_MATCH_1} DIRECTORY)
  find_library(CUDART_${cuda_root} cudart_static NO_DEFAULT_PATH
               PATHS ${cuda_root}/lib64 ${cuda_root}/lib ${cuda_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib)
  if(NOT CUDART_${cuda_root})
    message(FATAL_ERROR "${cuda_root} holds no libcudart_static.a: install cuda-cudart-dev (or nvidia-cuda-runtime)")
  endif()
  set(cuda_libraries ${CUDART_${cuda_root}} -Wl,--exclude-libs,libcudart_static.a dl rt pthread)
endif()

function(compile_cuda objects)
  set(made)
  foreach(source ${ARGN})
    get_filename_component(name ${source} NAME_WE)
    set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
    set(targets ${gencode})
    if(name MATCHES "_hopper$")
      set(targets -gencode=arch=compute_90a,code=sm_90a)
    endif()
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 -O3 ${targets}
              -Xcompiler=-fPIC,-fvisibility=hidden -I${CMAKE_SOURCE_DIR}/csrc/include -MD -MF ${object}.d
              -c ${CMAKE_SOURCE_DIR}/${source} -o ${object}
      DEPENDS ${CMAKE_SOURCE_DIR}/${source}
      DEPFILE ${object}.d
      COMMENT "nvcc ${source}"
      VERBATIM)
    list(APPEND made ${object})
  endforeach()
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)
  set(${objects} ${made} PARENT_SCOPE)
endfunction()
