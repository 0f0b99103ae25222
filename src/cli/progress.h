// A progress bar on a terminal: one line, redrawn in place, erased at the end. Nothing at all elsewhere, so that logs and
// pipes stay clean. Own code because Debian packages no progress bar for C++.
#ifndef VICUS_CLI_PROGRESS_H_
#define VICUS_CLI_PROGRESS_H_

#include <iosfwd>
#include <string>

namespace vicus::cli {

class Progress {
 public:
  /// Draws on `out` if `enabled`.
  Progress(std::ostream& out, bool enabled) : out_(out), enabled_(enabled) {}
  ~Progress();
  Progress(Progress&&) = delete;
  Progress(const Progress&) = delete;
  Progress& operator=(Progress&&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Shows `label` and `fraction` (0 to 1) of the way.
  void update(const std::string& label, double fraction);

 private:
  std::ostream& out_;
  bool enabled_;
  std::string drawn_;
};

}  // namespace vicus::cli

#endif  // VICUS_CLI_PROGRESS_H_
