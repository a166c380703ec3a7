// The emulator's controls as a Python module; importing it also registers the emulated operators with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

PYBIND11_MODULE(EMULATOR_MODULE, m) {
  using emulator::options;
  m.doc() = "The CUDA kernels of csrc/cuda on the CPU (csrc/emulator).";
  m.def(
      "set_order", [](int order) { options().order = order; },
      "Order of a block's threads: 0 as numbered, 1 reversed, 2 and more shuffled by that seed.");
  m.def(
      "set_eager", [](bool eager) { options().eager = eager; },
      "Asynchronous copies are made when issued (True) or when waited for (False).");
  m.def(
      "set_bug", [](const std::string& name) { options().bug = name; },
      "Activates the deliberate fault of that name, or none (\"\").");
  m.def("bug_reached", &emulator::bug_reached, "Whether a kernel has come by the active deliberate fault.");
  m.def("set_counting", &emulator::set_counting,
        "Count accesses by source line (the checked build only); True forgets what was counted before.");
  m.def("take_largest_grid", &emulator::take_largest_grid, "Blocks of the largest launch since the last call.");
  m.def(
      "statistics",
      [] {
        pybind11::list rows;
        for (const emulator::Row& row : emulator::statistics()) {
          pybind11::dict fields;
          fields["file"] = row.file;
          fields["line"] = row.line;
          fields["kind"] = row.kind;
          fields["requests"] = row.requests;
          fields["units"] = row.units;
          fields["ideal"] = row.ideal;
          fields["width"] = row.width;
          rows.append(fields);
        }
        return rows;
      },
      "What was counted: file, line, kind, requests, units (32-byte sectors of global memory, wavefronts of shared "
      "memory), the fewest units that would have done, width (the most bytes that a lane asked for at once).");
  m.def(
      "allow",
      [](uintptr_t data, int64_t bytes, int use) {
        emulator::allow(reinterpret_cast<const void*>(data), bytes, static_cast<emulator::Use>(use));
      },
      "Before a launch from Python: this memory may be read (use 0), written (1) or both (2).");
  m.def("take_fault", &emulator::take_fault, "After a launch from Python: what went wrong, or \"\".");
#if defined(EMULATOR_EXTRA)  // what a test's own kernels add
  void extend(pybind11::module_&);
  extend(m);
#endif
}
