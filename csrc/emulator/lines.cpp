// Code addresses as file:line, by addr2line (which comes with g++), asked only when a message or a table is made.
#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <unordered_map>

#include "checker.h"

namespace emulator::checker {

namespace {

struct Module {  // this library, as loaded
  uintptr_t base = 0;
  std::string path;
  std::vector<std::pair<uintptr_t, size_t>> segments;
};

const Module& module() {
  static const Module found = [] {
    Module m;
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void*>(&resolve_all), &info)) std::abort();
    m.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    m.path = info.dli_fname;
    dl_iterate_phdr(
        [](dl_phdr_info* each, size_t, void* context) {
          auto& m = *static_cast<Module*>(context);
          for (int i = 0; i < each->dlpi_phnum; ++i) {
            const auto& header = each->dlpi_phdr[i];
            if (header.p_type == PT_LOAD && each->dlpi_name == m.path) {
              m.segments.emplace_back(each->dlpi_addr + header.p_vaddr, header.p_memsz);
            }
          }
          return 0;
        },
        &m);
    return m;
  }();
  return found;
}

std::vector<Site> sites;
std::unordered_map<Place, Line> lines;

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

bool ends_in(const std::string& file, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* name) { return file.ends_with(name); });
}

// The frames of one address, innermost first.
Line line_of(const std::vector<std::pair<std::string, int>>& frames) {
  Line found;
  for (const auto& [file, line] : frames) {
    if (ends_in(file, {"/emulator/cuda.h", "/emulator/tensor_core.h", "/emulator/emulator.h"})) continue;
    const std::string text = base_name(file) + ":" + std::to_string(line);
    const bool common = ends_in(file, {"/cuda.cuh", "/launch.cuh", "/vector.cuh", "/ptx.cuh"});
    if (found.text.empty()) {
      found.text = text;
    } else if (!common) {
      found.text += " from " + text;
    }
    if (found.file.empty() || !common) {
      found.file = file;
      found.line = line;
    }
    if (!common) break;
  }
  if (found.text.empty()) found.text = found.file = "?";
  return found;
}

}  // namespace

Place place_of(const void* return_address) {
  return static_cast<Place>(reinterpret_cast<uintptr_t>(return_address) - 1 - module().base);  // within the call
}

Place place_of(Site site) {
  static std::unordered_map<uint64_t, Place> known;  // names of files live in the library, so their address will do
  const uint64_t key = reinterpret_cast<uint64_t>(site.file) << 16 ^ static_cast<uint64_t>(site.line);
  auto [at, is_new] = known.try_emplace(key, kSite | static_cast<Place>(sites.size()));
  if (is_new) sites.push_back(site);
  return at->second;
}

void resolve_all(const std::vector<Place>& places) {
  std::string asked;
  for (Place place : places) {
    place &= ~kAtomic;
    if (lines.count(place)) continue;
    if (place & kSite) {
      const Site site = sites[place & ~kSite];
      lines[place] = line_of({{site.file ? site.file : "?", site.line}});
    } else {
      char text[16];
      std::snprintf(text, sizeof text, " 0x%x", place);
      asked += text;
      lines[place] = {};  // once
    }
  }
  if (asked.empty()) return;
  FILE* answer = nullptr;
  // Addresses go in by a file's worth of echo, since a command line may be too short for them.
  char name[] = "/tmp/emulator-XXXXXX";
  const int file = mkstemp(name);
  if (file >= 0) {
    for (char& c : asked) c = c == ' ' ? '\n' : c;
    asked += '\n';
    const bool written = write(file, asked.data(), asked.size()) == static_cast<ssize_t>(asked.size());
    close(file);
    if (written)
      answer = popen(("grep . " + std::string(name) + " | addr2line -a -i -e '" + module().path + "'").c_str(), "r");
  }
  Place place = 0;
  std::vector<std::pair<std::string, int>> frames;
  const auto finish = [&] {
    if (!frames.empty()) lines[place] = line_of(frames);
    frames.clear();
  };
  char row[4096];
  while (answer && std::fgets(row, sizeof row, answer)) {
    if (!std::strncmp(row, "0x", 2)) {
      finish();
      place = static_cast<Place>(std::strtoul(row, nullptr, 16));
    } else if (char* colon = std::strrchr(row, ':')) {
      *colon = 0;
      frames.emplace_back(row, std::atoi(colon + 1));
    }
  }
  finish();
  if (answer) pclose(answer);
  unlink(name);
}

const Line& resolve(Place place) {
  resolve_all({place});
  return lines[place & ~kAtomic];
}

bool in_module_data(uintptr_t address, size_t bytes) {
  for (const auto& [begin, size] : module().segments) {
    if (address >= begin && address + bytes <= begin + size) return true;
  }
  return false;
}

}  // namespace emulator::checker
