# vicus_embed(target): compiles the text of the GPU kernels into `target`, again whenever a kernel file changes, comes or
# goes.
function(vicus_embed target)
  set(output ${CMAKE_CURRENT_BINARY_DIR}/embedded.cc)
  file(GLOB kernels CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/src/gpu
    ${PROJECT_SOURCE_DIR}/src/gpu/*.cuh ${PROJECT_SOURCE_DIR}/src/gpu/*.cu ${PROJECT_SOURCE_DIR}/src/gpu/*args.h)
  set(files "${PROJECT_SOURCE_DIR}/include|vicus/geometry.h")
  set(paths ${PROJECT_SOURCE_DIR}/include/vicus/geometry.h)
  foreach(kernel IN LISTS kernels)
    list(APPEND files "${PROJECT_SOURCE_DIR}/src/gpu|${kernel}")
    list(APPEND paths ${PROJECT_SOURCE_DIR}/src/gpu/${kernel})
  endforeach()
  add_custom_command(OUTPUT ${output}
    COMMAND ${CMAKE_COMMAND} -DOUTPUT=${output} "-DFILES=${files}" -P ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    DEPENDS ${paths} ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    COMMENT "Embedding the text of the GPU kernels" VERBATIM)
  target_sources(${target} PRIVATE ${output})
endfunction()
