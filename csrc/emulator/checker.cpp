// The checked build's view of memory: what may be touched, what is defined, in flight or raced for. (Not written yet:
// nothing is checked.)
#include "state.h"

namespace emulator {

void allow(const void*, int64_t, Use) {}
void touch(const void*, int, Access, Site) {}

}  // namespace emulator
