/*
 * A device that OpenCL opened, its queue and its memory.
 *
 * TVM's pointers of a device are names of buffers here: numbers that no processor can follow. Offsets
 * come beside them, from tensors (byte_offset), and are never added.
 */
#ifndef MLC_LLM_OPENCL_DEVICE_H_
#define MLC_LLM_OPENCL_DEVICE_H_

#include <tvm/ffi/error.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "opencl.h"

namespace mlc_llm {

constexpr uintptr_t kFirstName = uintptr_t{1} << 60;
constexpr uintptr_t kNameStep = 4096;  // kernels may ask for aligned pointers
/* Kernels that may wait in the queue before the device is told of them. */
constexpr int kLaunchesPerFlush = 32;

extern opencl::Functions cl;

/* Return an error of OpenCL for people to read. */
inline std::string Describe(opencl::Int code) {
  const char* name = opencl::ErrorName(code);
  return name == nullptr ? "error " + std::to_string(code) : std::string("CL_") + name;
}

inline void Check(opencl::Int code, const char* action) {
  if (code != opencl::kSuccess) {
    TVM_FFI_THROW(DeviceError) << "OpenCL could not " << action << " (" << Describe(code) << ")";
  }
}

/* Return a size for people to read. */
inline std::string InMiB(uint64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

struct Buffer {
  opencl::Memory memory;
  size_t size;
};

/* A device with its context, its one queue, which keeps the order, and its buffers. */
class OpenDevice {
 public:
  OpenDevice(int index, opencl::PlatformID platform, opencl::DeviceID id) : index_(index), id_(id) {
    const intptr_t properties[] = {opencl::kContextPlatform, reinterpret_cast<intptr_t>(platform),
                                   0};
    opencl::Int code;
    context_ = cl.clCreateContext(properties, 1, &id, nullptr, nullptr, &code);
    Check(code, "open the device");
    queue_ = cl.clCreateCommandQueue(context_, id, 0, &code);
    Check(code, "make a queue for the device");
    memory_bytes_ = Number<opencl::ULong>(opencl::kGlobalMemoryBytes);
  }

  opencl::DeviceID id() const { return id_; }
  opencl::Context context() const { return context_; }
  opencl::Queue queue() const { return queue_; }

  template <typename T>
  T Number(opencl::UInt what) const {
    T value{};
    Check(cl.clGetDeviceInfo(id_, what, sizeof(T), &value, nullptr), "describe the device");
    return value;
  }

  std::string Text(opencl::UInt what) const {
    size_t size = 0;
    Check(cl.clGetDeviceInfo(id_, what, 0, nullptr, &size), "describe the device");
    std::string text(size, '\0');
    Check(cl.clGetDeviceInfo(id_, what, size, &text[0], nullptr), "describe the device");
    return text.c_str();  // without the zero at its end
  }

  std::string Name() const {
    return "opencl:" + std::to_string(index_) + " (" + Text(opencl::kName) + ")";
  }

  /* Return the name of a new buffer. Throws DeviceError where memory does not suffice. */
  void* Allocate(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    size = std::max<size_t>(size, 1);
    // Drivers take more than there is, and fail or crawl when it is first used.
    if (size > memory_bytes_ - used_bytes_) RefuseMemory(size, "that is more than is free");
    opencl::Int code;
    opencl::Memory memory =
        cl.clCreateBuffer(context_, opencl::kMemoryReadWrite, size, nullptr, &code);
    if (code != opencl::kSuccess) RefuseMemory(size, Describe(code));
    void* name = reinterpret_cast<void*>(next_name_);
    next_name_ += kNameStep;
    buffers_[name] = {memory, size};
    used_bytes_ += size;
    return name;
  }

  /* OpenCL keeps a buffer until the commands that use it are done. */
  void Free(const void* name) {
    Buffer buffer = Find(name);
    std::lock_guard<std::mutex> lock(mutex_);
    Check(cl.clReleaseMemObject(buffer.memory), "free a buffer");
    used_bytes_ -= buffer.size;
    buffers_.erase(name);
  }

  /* Return a buffer by its name. Throws DeviceError where there is none. */
  Buffer Find(const void* name) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = buffers_.find(name);
    if (found == buffers_.end()) {
      TVM_FFI_THROW(DeviceError) << Name() << " has no buffer at " << name;
    }
    return found->second;
  }

  uint64_t FreeBytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return memory_bytes_ - used_bytes_;
  }

  void CountLaunch() {
    if (++launches_ % kLaunchesPerFlush == 0) Check(cl.clFlush(queue_), "start kernels");
  }

 private:
  [[noreturn]] void RefuseMemory(size_t size, const std::string& reason) {
    TVM_FFI_THROW(DeviceError)
        << "out of memory: " << InMiB(size) << " were asked of " << Name() << " (" << reason
        << "); it has " << InMiB(memory_bytes_) << " in all, of which "
        << InMiB(used_bytes_) << " are used here, and gives at most "
        << InMiB(Number<opencl::ULong>(opencl::kMaxAllocationBytes))
        << " at once; use a smaller model, a shorter context or fewer requests at a time";
    TVM_FFI_UNREACHABLE();
  }

  const int index_;
  const opencl::DeviceID id_;
  opencl::Context context_;
  opencl::Queue queue_;
  uint64_t memory_bytes_, used_bytes_ = 0;
  std::mutex mutex_;
  std::unordered_map<const void*, Buffer> buffers_;
  uintptr_t next_name_ = kFirstName;
  int launches_ = 0;
};

/* Return a device by its number, opened at its first use. Throws DeviceError for one not there. */
OpenDevice& GetDevice(int index);

}  // namespace mlc_llm

#endif  // MLC_LLM_OPENCL_DEVICE_H_
