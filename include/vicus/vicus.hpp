// The whole C++ API. Includes only the standard library.
#ifndef VICUS_VICUS_HPP_
#define VICUS_VICUS_HPP_

#include "vicus/attention.h"
#include "vicus/compile.h"
#include "vicus/device.h"
#include "vicus/error.h"
#include "vicus/geometry.h"
#include "vicus/info.h"
#include "vicus/log.h"
#include "vicus/merge.h"
#include "vicus/plan.h"
#include "vicus/prepare.h"
#include "vicus/problem.h"
#include "vicus/tensor.h"
#include "vicus/unfused.h"

#endif  // VICUS_VICUS_HPP_
