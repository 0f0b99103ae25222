// What kernels are told: arguments of the launches that the driver of the tests has seen.
#ifndef VICUS_TESTS_JIT_LAUNCHED_H_
#define VICUS_TESTS_JIT_LAUNCHED_H_

#include <gtest/gtest.h>

#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "fake_cuda.h"

namespace vicus::testing {

template <class Args>
Args args_of(const FakeLaunch& launch) {
  Args args;
  EXPECT_EQ(launch.args.size(), sizeof(Args)) << launch.kernel;
  if (launch.args.size() == sizeof(Args)) std::memcpy(&args, launch.args.data(), sizeof(Args));
  return args;
}

/// What `kernel`, whose argument is an Args, is told in each of the launches that `call` makes.
template <class Args, class Call>
std::vector<Args> told(const std::string& kernel, const Call& call) {
  FakeCuda& fake = fake_cuda();
  {
    const std::lock_guard lock(fake.mutex);
    fake.arg_bytes[kernel] = sizeof(Args);
    fake.launches.clear();
  }
  call();
  const std::lock_guard lock(fake.mutex);
  std::vector<Args> list;
  for (const FakeLaunch& launch : fake.launches) {
    if (launch.kernel == kernel) list.push_back(args_of<Args>(launch));
  }
  return list;
}

}  // namespace vicus::testing

#endif  // VICUS_TESTS_JIT_LAUNCHED_H_
