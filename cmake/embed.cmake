# Writes the C++ file that carries the text of the GPU kernels (src/jit/embedded.h says what it defines).
#
#   cmake -DOUTPUT=embedded.cc -DFILES="root|name;..." -P embed.cmake      each file is root/name, included as name
set(table "")
list(SORT FILES COMPARE STRING)
foreach(file IN LISTS FILES)
  string(REPLACE "|" ";" parts "${file}")
  list(GET parts 0 root)
  list(GET parts 1 name)
  file(READ "${root}/${name}" text)
  if(text MATCHES "[)]vicus\"")
    message(FATAL_ERROR "${root}/${name}: contains )vicus\", which ends the text in the generated file")
  endif()
  string(APPEND table "    {\"${name}\", R\"vicus(${text})vicus\"},\n")
endforeach()
file(WRITE "${OUTPUT}" "#include \"jit/embedded.h\"

namespace vicus::jit {

std::span<const EmbeddedFile> embedded_files() {
  static constexpr EmbeddedFile kFiles[] = {
${table}  };
  return kFiles;
}

}  // namespace vicus::jit
")
