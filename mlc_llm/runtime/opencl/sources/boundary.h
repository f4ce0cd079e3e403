/*
 * How errors leave this library.
 *
 * It may be built by another compiler than TVM was (zig brings a C++ library of its own), and then an
 * exception that crosses from one to the other ends the process. Errors cross as values of the FFI:
 *
 *     TVM calls a method     ours fails: the error is kept, TVM is asked for a device whose only duty
 *                            is to return it, and throws in its own way
 *     TVM calls a function   through the FFI's C interface, which returns errors
 */
#ifndef MLC_LLM_OPENCL_BOUNDARY_H_
#define MLC_LLM_OPENCL_BOUNDARY_H_

#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/device_api.h>

#include <optional>
#include <utility>

namespace mlc_llm {

/* A type of devices that TVM has a name for, and no code. */
constexpr DLDeviceType kErrorDevice = kDLVPI;
constexpr const char* kErrorFunction = "device_api.vpi";

inline std::optional<tvm::ffi::Error>& KeptError() {
  static thread_local std::optional<tvm::ffi::Error> error;
  return error;
}

/* Do `work`; return false where it threw, and keep the error. */
template <typename Work>
[[gnu::noinline]] bool Succeeds(Work work) noexcept {
  try {
    work();
    return true;
  } catch (const tvm::ffi::Error& error) {
    KeptError() = error;
  } catch (const std::exception& error) {
    KeptError() = tvm::ffi::Error("RuntimeError", error.what(), "");
  }
  return false;
}

/* Do `work` of a method that TVM calls. Callers have nothing to destroy: TVM unwinds them. */
template <typename Work>
inline void Guarded(Work work) {
  if (!Succeeds(work)) tvm::runtime::DeviceAPI::Get({kErrorDevice, 0});
}

/* What `kErrorFunction` does. */
inline void* ThrowKeptError() {
  tvm::ffi::Error error = *std::exchange(KeptError(), std::nullopt);
  throw error;
}

/* Return the function as one that is called through the C interface alone. */
inline tvm::ffi::Function ThroughC(tvm::ffi::Function function) {
  auto call = [](void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
    return TVMFFIFunctionCall(
        tvm::ffi::details::ObjectUnsafe::GetHeader(static_cast<tvm::ffi::Function*>(self)->get()),
        const_cast<TVMFFIAny*>(args), num_args, result);
  };
  auto destroy = [](void* self) { delete static_cast<tvm::ffi::Function*>(self); };
  return tvm::ffi::Function::FromExternC(new tvm::ffi::Function(std::move(function)), call, destroy);
}

}  // namespace mlc_llm

#endif  // MLC_LLM_OPENCL_BOUNDARY_H_
