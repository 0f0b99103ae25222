#include "jit/source.h"

#include <map>
#include <string_view>

namespace vicus::jit {
namespace {

const EmbeddedFile* find_file(std::string_view name) {
  for (const EmbeddedFile& file : embedded_files()) {
    if (name == file.name) return &file;
  }
  return nullptr;
}

std::string_view skip_blanks(std::string_view text) {
  const std::size_t at = text.find_first_not_of(" \t");
  return at == std::string_view::npos ? std::string_view() : text.substr(at);
}

/// What the line includes in quotes, or nothing.
std::string_view included_by(std::string_view line) {
  line = skip_blanks(line);
  if (!line.starts_with('#')) return {};
  line = skip_blanks(line.substr(1));
  if (!line.starts_with("include")) return {};
  line = skip_blanks(line.substr(7));
  if (!line.starts_with('"')) return {};
  line.remove_prefix(1);
  return line.substr(0, line.find('"'));
}

void collect(std::string_view text, std::map<std::string_view, EmbeddedFile>& found) {
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const EmbeddedFile* const file = find_file(included_by(text.substr(0, end)));
    if (file != nullptr && found.emplace(file->name, *file).second) collect(file->text, found);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  }
}

}  // namespace

std::string name_of(const Source& source) { return source.file.empty() ? "kernel.cu" : source.file; }

std::string text_of(const Source& source) {
  std::string text = source.prologue;
  if (!text.empty() && text.back() != '\n') text += '\n';
  if (!source.file.empty()) text += "#include \"" + source.file + "\"\n";
  return text;
}

std::vector<EmbeddedFile> headers_of(const std::string& text) {
  std::map<std::string_view, EmbeddedFile> found;
  collect(text, found);
  std::vector<EmbeddedFile> list;
  list.reserve(found.size());
  for (const auto& [name, file] : found) list.push_back(file);
  return list;
}

}  // namespace vicus::jit
