#include "torch/tensors.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "vicus/error.h"

namespace vicus::binding {
namespace {

std::span<const std::int64_t> span_of(torch::headeronly::IntHeaderOnlyArrayRef list) {
  return {list.data(), list.size()};
}

std::int32_t code_of(const Tensor& tensor) {
  std::int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

DType dtype_of(const char* name, const Tensor& tensor) {
  const std::int32_t code = code_of(tensor);
  if (code == aoti_torch_dtype_float32()) return DType::float32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (code == aoti_torch_dtype_float16()) return DType::float16;
  if (code == aoti_torch_dtype_float64()) return DType::float64;
  throw InvalidArgument(std::string(name) + ".dtype", "another type", "float32, float64, bfloat16, float16");
}

std::int32_t code_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return aoti_torch_dtype_float64();
    case DType::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::float16:
      return aoti_torch_dtype_float16();
    case DType::float32:
      break;
  }
  return aoti_torch_dtype_float32();
}

TensorLayout layout_of(const Tensor& tensor) { return {span_of(tensor.sizes()), span_of(tensor.strides())}; }

template <class T>
Ints read(const Tensor& tensor) {
  const auto* data = static_cast<const T*>(tensor.const_data_ptr());
  const std::int64_t stride = tensor.stride(0);
  Ints values(static_cast<std::size_t>(tensor.size(0)));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = data[static_cast<std::int64_t>(i) * stride];
  return values;
}

void require_list(const char* name, const Tensor& tensor) {
  if (tensor.dim() == 1) return;
  throw InvalidArgument(name, std::to_string(tensor.dim()) + " dimensions", "one dimension");
}

// In PyTorch's CUDA library, which a PyTorch for CPUs lacks: looked up where it is loaded, never linked.
using CurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr) throw Unsupported("this PyTorch has no CUDA streams");
  return reinterpret_cast<CurrentStream>(symbol);
}

void* stream_of(const Place& place) {
  if (!place.cuda) return nullptr;
  static const CurrentStream current = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(place.device, &stream));
  return stream;
}

}  // namespace

Place place_of(const Tensor& tensor) {
  if (!tensor.is_cuda()) return {};
  return {.cuda = true, .device = tensor.get_device_index()};
}

ConstTensorView view(const char* name, const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(name, tensor), layout_of(tensor)};
}

ConstTensorView view(const char* name, const MaybeTensor& tensor) {
  return tensor ? view(name, *tensor) : ConstTensorView();
}

std::vector<ConstTensorView> views(const char* name, const std::vector<Tensor>& tensors) {
  std::vector<ConstTensorView> result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back(view(name, tensor));
  return result;
}

ConstTensorView Rows::operator()(const char* name, const Tensor& tensor) {
  const std::int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1) return view(name, tensor);
  copies_.push_back(torch::stable::contiguous(tensor));
  return view(name, copies_.back());
}

ConstTensorView Rows::operator()(const char* name, const MaybeTensor& tensor) {
  return tensor ? (*this)(name, *tensor) : ConstTensorView();
}

std::vector<ConstTensorView> Rows::operator()(const char* name, const std::vector<Tensor>& tensors) {
  std::vector<ConstTensorView> result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back((*this)(name, tensor));
  return result;
}

TensorView written(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), dtype_of("output", tensor), layout_of(tensor)};
}

Tensor empty(const Place& place, std::span<const std::int64_t> shape, DType dtype) {
  const TensorLayout layout(shape);  // contiguous
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      layout.dims(), layout.shape().data(), layout.strides().data(), code_of(dtype),
      place.cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), place.device, &handle));
  return Tensor(handle);
}

Queue::Queue(const Place& place) : place_(place), stream_(stream_of(place)) {}

void* Queue::take(std::size_t bytes, void* /*stream*/) {
  constexpr std::size_t kUnit = sizeof(float);
  const std::array<std::int64_t, 1> shape{static_cast<std::int64_t>((bytes + kUnit - 1) / kUnit)};
  taken_.push_back(empty(place_, shape, DType::float32));
  return taken_.back().mutable_data_ptr();
}

void Queue::give_back(void* data, void* /*stream*/) noexcept {
  std::erase_if(taken_, [data](const Tensor& tensor) { return tensor.const_data_ptr() == data; });
}

Gradient gradient_of(const Place& place, const ConstTensorView& of, bool wanted, DType otherwise) {
  if (!wanted || !of) return {empty(place, std::array<std::int64_t, 1>{0}, otherwise), {}};
  Tensor tensor = empty(place, of.shape(), of.dtype());
  const TensorView view = written(tensor);
  return {std::move(tensor), view};
}

Ints integers(const char* name, const MaybeTensor& tensor) {
  if (!tensor) return {};
  require_list(name, *tensor);
  if (!tensor->is_cpu()) throw InvalidArgument(std::string(name) + ".device", "another", "the CPU");
  const std::int32_t code = code_of(*tensor);
  if (code == aoti_torch_dtype_int32()) return read<std::int32_t>(*tensor);
  if (code == aoti_torch_dtype_int64()) return read<std::int64_t>(*tensor);
  throw InvalidArgument(std::string(name) + ".dtype", "another type", "int32, int64");
}

std::span<const std::int32_t> device_list(const char* name, const MaybeTensor& tensor, const Place& place) {
  if (!tensor) return {};
  require_list(name, *tensor);
  if (!tensor->is_cuda() || tensor->get_device_index() != place.device) {
    throw InvalidArgument(std::string(name) + ".device", "another",
                          "that of query, CUDA " + std::to_string(place.device));
  }
  if (code_of(*tensor) != aoti_torch_dtype_int32()) {
    throw InvalidArgument(std::string(name) + ".dtype", "another type", "int32 on a GPU");
  }
  const auto size = static_cast<std::size_t>(tensor->size(0));
  if (size > 1 && tensor->stride(0) != 1) {
    throw InvalidArgument(std::string(name) + ".stride(0)", std::to_string(tensor->stride(0)), "1 on a GPU");
  }
  return {static_cast<const std::int32_t*>(tensor->const_data_ptr()), size};
}

}  // namespace vicus::binding
