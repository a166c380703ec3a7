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
}
