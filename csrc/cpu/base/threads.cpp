#include "cpu/base/threads.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqaccel::inline base {
namespace {

// The whole cores in `quota` microseconds per `period`, or `most` if a file says nothing.
int cores_of(double quota, double period, int most) {
  return quota > 0 && period > 0 ? int(std::min(double(most), std::max(1.0, quota / period))) : most;
}

double number_in(const std::string& path) {
  double value = 0;
  std::ifstream(path) >> value;  // stays 0 if the file is missing or says "max"
  return value;
}

int quota_of_group(const std::string& folder, int most) {
  double quota = 0, period = 0;
  std::ifstream(folder + "/cpu.max") >> quota >> period;  // version 2; a quota of "max" is read as 0
  most = cores_of(quota, period, most);
  return cores_of(number_in(folder + "/cpu.cfs_quota_us"), number_in(folder + "/cpu.cfs_period_us"), most);
}

// The cores that the control groups allow: the minimum over this process's group and its parents.
int quota() {
  int most = INT_MAX;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // id:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string mount = "/sys/fs/cgroup" + (controllers.empty() ? "" : "/" + controllers);
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      most = quota_of_group(mount + path, most);
      if (path.empty() || path.rfind('/') == std::string::npos) break;
    }
  }
  return most;
}

// The result is refreshed after a tenth of a second, since a process may bind itself to other cores.
int allowed_cores() {
  using Clock = std::chrono::steady_clock;
  static const int within = quota();
  static std::atomic<int> cores{1};
  static std::atomic<Clock::rep> due{Clock::duration::min().count()};
  const Clock::rep now = Clock::now().time_since_epoch().count();
  if (now >= due.load(std::memory_order_relaxed)) {
    cores.store(std::max(1, std::min(within, omp_get_num_procs())), std::memory_order_relaxed);
    due.store(now + Clock::duration(std::chrono::milliseconds(100)).count(), std::memory_order_relaxed);
  }
  return cores.load(std::memory_order_relaxed);
}

}  // namespace

int team_size() {
  const int threads = omp_get_max_threads();
  return threads == 1 ? 1 : std::min(threads, allowed_cores());
}

#if defined(__linux__)
void sleep_while(int* word, int value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }

void wake_all(int* word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
void sleep_while(int*, int) { sched_yield(); }

void wake_all(int*) {}
#endif

}  // namespace seqaccel::inline base
